//! Removes a lab, also one whose `up` was interrupted: everything is found by its name, not by saved state.

use std::{fs, io::ErrorKind, path::Path};

use anyhow::{Context, Result};

use crate::{cgroup, command::ip, lab::Lab};

/// Kills and removes everything of the lab. Does nothing where there is nothing.
///
/// # Errors
/// When something can't be killed or removed.
pub fn remove(lab: &Lab) -> Result<()> {
    cgroup::kill(&lab.cgroup())?;
    cgroup::remove(&lab.cgroup())?;
    for entry in fs::read_dir("/run/netns").into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with(&lab.netns_prefix()) {
            ip(&format!("netns del {name}"))?;
        }
    }
    remove_folder(&lab.folder)
}

fn remove_folder(folder: &Path) -> Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error).context(folder.display().to_string()),
        _ => Ok(()),
    }
}
