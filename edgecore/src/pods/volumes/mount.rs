//! Mounting and unmounting of memory-backed volumes.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use nix::mount::{MntFlags, MsFlags, mount, umount2};

/// Mounts a tmpfs at `path`, unless one is there.
pub(super) fn tmpfs(path: &Path, size_limit: Option<i64>) -> io::Result<()> {
    if mounted_below(path)?.iter().any(|at| at == path) {
        return Ok(());
    }
    let options = size_limit.map_or_else(|| "mode=0777".to_owned(), |bytes| format!("mode=0777,size={bytes}"));
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount(Some("tmpfs"), path, Some("tmpfs"), flags, Some(options.as_str())).map_err(io::Error::from)
}

/// Unmounts everything at or below `path`.
pub(super) fn unmount_below(path: &Path) -> io::Result<()> {
    // The deepest first: a mount can be below another.
    let mut mounted = mounted_below(path)?;
    mounted.sort_by_key(|at| std::cmp::Reverse(at.components().count()));
    for at in mounted {
        match umount2(&at, MntFlags::MNT_DETACH) {
            Ok(()) | Err(nix::Error::EINVAL | nix::Error::ENOENT) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn mounted_below(path: &Path) -> io::Result<Vec<PathBuf>> {
    let mounts = fs::read_to_string("/proc/thread-self/mounts")?;
    let points = mounts.lines().filter_map(|line| line.split(' ').nth(1)).map(|at| PathBuf::from(unescape(at)));
    Ok(points.filter(|at| at.starts_with(path)).collect())
}

/// /proc/thread-self/mounts writes space, tab, newline and backslash as octal (proc(5)).
fn unescape(text: &str) -> String {
    text.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\")
}
