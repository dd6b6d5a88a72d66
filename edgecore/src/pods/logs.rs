//! Container logs stay bounded: a large one is moved aside and the runtime opens a new one.

use std::{fs, io, path::Path};

use super::{actual::Run, folders::PodFolder};
use crate::runtime::Runtime;

/// A log that is larger is rotated.
const MAX_LOG_BYTES: u64 = 10 << 20;

/// Rotates the log of a running container if it's large. One older part is kept.
pub(crate) async fn rotate(runtime: &Runtime, folder: &PodFolder, container: &str, run: &Run) {
    let path = folder.logs().join(PodFolder::log_name(container, run.attempt));
    match move_if_large(&path, MAX_LOG_BYTES) {
        Ok(true) => {
            if let Err(error) = runtime.reopen_log(&run.id).await {
                tracing::warn!(container, %error, "the runtime could not open a new log");
            }
        }
        Ok(false) => {}
        Err(error) => tracing::warn!(path = %path.display(), %error, "a log could not be rotated"),
    }
}

/// Removes logs of runs that are gone, all but the newest ones.
pub(crate) fn remove_old(folder: &PodFolder, container: &str, newest_attempt: u32) {
    const KEEP: u32 = 2;
    let Some(attempt) = newest_attempt.checked_sub(KEEP) else { return };
    let path = folder.logs().join(PodFolder::log_name(container, attempt));
    let _ = fs::remove_file(rotated(&path));
    let _ = fs::remove_file(path);
    let _ = fs::remove_file(folder.termination_message(container, attempt));
}

fn rotated(path: &Path) -> std::path::PathBuf {
    path.with_extension("log.1")
}

fn move_if_large(path: &Path, limit: u64) -> io::Result<bool> {
    match fs::metadata(path) {
        Ok(metadata) if metadata.len() > limit => fs::rename(path, rotated(path)).map(|()| true),
        Ok(_) => Ok(false),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_large_logs_move_and_one_old_part_is_kept() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("0.log");
        assert!(!move_if_large(&path, 3).unwrap());
        fs::write(&path, "abc").unwrap();
        assert!(!move_if_large(&path, 3).unwrap());
        for text in ["abcd", "wxyz"] {
            fs::write(&path, text).unwrap();
            assert!(move_if_large(&path, 3).unwrap());
        }
        assert!(!path.exists());
        assert_eq!(fs::read_to_string(folder.path().join("0.log.1")).unwrap(), "wxyz");
    }
}
