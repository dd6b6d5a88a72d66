//! Where a pod's files are on the node.

use std::path::{Path, PathBuf};

/// The folder of one pod: `<podsDir>/<uid>`.
#[derive(Debug, Clone)]
pub(crate) struct PodFolder(PathBuf);

impl PodFolder {
    /// The folder of the pod with this uid.
    pub(crate) fn new(pods_dir: &Path, uid: &str) -> Self {
        Self(pods_dir.join(uid))
    }

    /// The folder itself.
    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    /// The folder of all volumes that are made on this node.
    pub(crate) fn volumes(&self) -> PathBuf {
        self.0.join("volumes")
    }

    /// The folder of a volume.
    pub(crate) fn volume(&self, name: &str) -> PathBuf {
        self.volumes().join(name)
    }

    /// The pod's /etc/hosts.
    pub(crate) fn hosts(&self) -> PathBuf {
        self.0.join("etc-hosts")
    }

    /// The folder of all logs; the runtime writes `<container>/<attempt>.log` in it.
    pub(crate) fn logs(&self) -> PathBuf {
        self.0.join("logs")
    }

    /// A container's log, relative to [`Self::logs`].
    pub(crate) fn log_name(container: &str, attempt: u32) -> String {
        format!("{container}/{attempt}.log")
    }

    /// The folder of a container's own files.
    pub(crate) fn container(&self, name: &str) -> PathBuf {
        self.0.join("containers").join(name)
    }

    /// The file into which a container writes its last words.
    pub(crate) fn termination_message(&self, container: &str, attempt: u32) -> PathBuf {
        self.container(container).join(format!("termination-{attempt}"))
    }
}

/// Whether a name is one path component that stays in its folder: uids and volume names come from outside.
pub(crate) fn is_plain_name(name: &str) -> bool {
    !name.is_empty() && name.len() <= 253 && !name.contains(['/', '\0']) && name != "." && name != ".."
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_leave_the_folder_are_refused() {
        for bad in ["", ".", "..", "a/b", "../x", "a\0"] {
            assert!(!is_plain_name(bad), "{bad:?}");
        }
        assert!(is_plain_name("0a1b-2c") && is_plain_name("..data"));
    }
}
