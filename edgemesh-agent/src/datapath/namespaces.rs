//! The network namespaces of the processes in a cgroup and below, or of all.

use std::{
    collections::HashSet,
    fs::{self, File},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

/// Cgroups and threads that are looked at; a node has a few hundred and a few thousand.
const MAX_CGROUPS: usize = 20_000;
const MAX_THREADS: usize = 200_000;
/// Namespaces that are opened at one time, so that descriptors last: one for each pod, and the host's.
const MAX_NAMESPACES: usize = 512;

/// Each network namespace once. Threads are looked at, since each may be in another one than its process.
pub(super) fn of_cgroup(folder: &Path) -> Vec<File> {
    let mut folders: Vec<PathBuf> = vec![folder.to_owned()];
    let mut seen = HashSet::new();
    let mut found = Vec::new();
    let (mut cgroups, mut threads) = (0, 0);
    while let Some(folder) = folders.pop() {
        cgroups += 1;
        let listed = fs::read_to_string(folder.join("cgroup.threads")).unwrap_or_default();
        for thread in listed.lines() {
            threads += 1;
            let path = format!("/proc/{thread}/ns/net");
            // A thread that has ended meanwhile has no sockets.
            let Ok(metadata) = fs::metadata(&path) else { continue };
            if seen.insert((metadata.dev(), metadata.ino()))
                && let Ok(namespace) = File::open(&path)
            {
                found.push(namespace);
            }
            if threads >= MAX_THREADS || found.len() >= MAX_NAMESPACES {
                tracing::warn!(threads, namespaces = found.len(), "too many to look at; the rest is left out");
                return found;
            }
        }
        let below = fs::read_dir(&folder).into_iter().flatten().flatten();
        let is_folder = |entry: &fs::DirEntry| entry.file_type().is_ok_and(|kind| kind.is_dir());
        folders.extend(below.filter(is_folder).map(|entry| entry.path()).take(MAX_CGROUPS.saturating_sub(cgroups)));
    }
    found
}

/// Each network namespace of a process once, where no cgroup says which are concerned.
pub(super) fn of_all() -> Vec<File> {
    let mut seen = HashSet::new();
    let mut found = Vec::new();
    for process in fs::read_dir("/proc").into_iter().flatten().flatten().take(MAX_THREADS) {
        let is_process = process.file_name().to_str().is_some_and(|name| name.bytes().all(|b| b.is_ascii_digit()));
        let path = process.path().join("ns/net");
        if is_process
            && let Ok(metadata) = fs::metadata(&path)
            && seen.insert((metadata.dev(), metadata.ino()))
            && let Ok(namespace) = File::open(&path)
        {
            found.push(namespace);
            if found.len() >= MAX_NAMESPACES {
                tracing::warn!(namespaces = found.len(), "too many to look at; the rest is left out");
                break;
            }
        }
    }
    found
}
