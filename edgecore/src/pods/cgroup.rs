//! The pod's cgroup: runtimes make it below the node's cgroup root, and leave it behind.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use super::sandbox::cgroup_parent;

/// Removes a pod's empty cgroups in all hierarchies. What still has processes stays; its removal is tried again with the pod.
pub(crate) fn remove(cgroup_root: &str, uid: &str) -> io::Result<()> {
    let parent = cgroup_parent(cgroup_root, uid);
    for hierarchy in hierarchies(&fs::read_to_string("/proc/thread-self/mounts")?) {
        remove_tree(&hierarchy.join(parent.trim_start_matches('/')))?;
    }
    Ok(())
}

fn hierarchies(mounts: &str) -> Vec<PathBuf> {
    let fields = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    fields
        .filter(|fields| matches!(fields.get(2), Some(&"cgroup" | &"cgroup2")))
        .filter_map(|fields| fields.get(1).map(PathBuf::from))
        .collect()
}

/// cgroups are removed from the leaves up; their files can't be deleted and need not be.
fn remove_tree(path: &Path) -> io::Result<()> {
    let entries = match fs::read_dir(path) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_tree(&entry.path())?;
        }
    }
    match fs::remove_dir(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_hierarchy_is_found() {
        let mounts = "tmpfs /sys/fs/cgroup tmpfs rw 0 0\ncgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n\
            cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\nproc /proc proc rw 0 0\n";
        assert_eq!(hierarchies(mounts), [PathBuf::from("/sys/fs/cgroup/cpu"), PathBuf::from("/sys/fs/cgroup/unified")]);
    }
}
