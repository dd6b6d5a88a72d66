//! Writes all files of a volume at once: readers see the old set or the new one, never a mixture.
//!
//! The layout is the one that programs in pods know: `key -> ..data/key`, `..data -> ..<version>`, and the files in `..<version>`.

use std::{
    collections::BTreeSet,
    fs, io,
    os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink},
    path::Path,
    time::{SystemTime, UNIX_EPOCH},
};

use super::payload::Payload;

const DATA_LINK: &str = "..data";
const NEW_DATA_LINK: &str = "..data_tmp";

/// Makes the volume hold exactly `payload`. Returns whether anything changed. Files belong to `group` if one is given.
pub(crate) fn write(folder: &Path, payload: &Payload, group: Option<u32>) -> io::Result<bool> {
    fs::create_dir_all(folder)?;
    let current = fs::read_link(folder.join(DATA_LINK)).ok();
    if let Some(current) = &current
        && holds(&folder.join(current), payload)?
    {
        return Ok(false);
    }
    let stamp = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let version = format!("..{}_{:09}", stamp.as_secs(), stamp.subsec_nanos());
    let new = folder.join(&version);
    fs::create_dir(&new)?;
    own(&new, 0o755, group)?;
    for (path, file) in payload {
        let target = new.join(path);
        let mut parent = new.clone();
        for part in Path::new(path).parent().into_iter().flat_map(Path::components) {
            parent.push(part);
            if !parent.exists() {
                fs::create_dir(&parent)?;
                own(&parent, 0o755, group)?;
            }
        }
        fs::write(&target, &file.data)?;
        // The group of a volume may read what its owner may.
        let mode = if group.is_some() { file.mode | (file.mode & 0o500) >> 3 } else { file.mode };
        own(&target, mode, group)?;
    }
    let link = folder.join(NEW_DATA_LINK);
    let _ = fs::remove_file(&link);
    symlink(&version, &link)?;
    fs::rename(&link, folder.join(DATA_LINK))?;
    publish_names(folder, payload)?;
    remove_old(folder, &version)?;
    Ok(true)
}

/// The visible names: one link for each first path component.
fn publish_names(folder: &Path, payload: &Payload) -> io::Result<()> {
    let names: BTreeSet<&str> = payload.keys().filter_map(|path| path.split('/').next()).collect();
    for name in &names {
        let link = folder.join(name);
        if fs::symlink_metadata(&link).is_err() {
            symlink(Path::new(DATA_LINK).join(name), &link)?;
        }
    }
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if !name.starts_with("..") && !names.contains(name.as_ref()) {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

fn remove_old(folder: &Path, version: &str) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.starts_with("..") && name != DATA_LINK && name != version && entry.file_type()?.is_dir() {
            fs::remove_dir_all(entry.path())?;
        }
    }
    Ok(())
}

fn own(path: &Path, mode: u32, group: Option<u32>) -> io::Result<()> {
    if group.is_some() {
        chown(path, None, group)?;
    }
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
}

/// Whether a version's folder holds exactly these files.
fn holds(version: &Path, payload: &Payload) -> io::Result<bool> {
    let mut found = 0usize;
    let mut folders = vec![version.to_owned()];
    while let Some(folder) = folders.pop() {
        let entries = match fs::read_dir(&folder) {
            Ok(entries) => entries,
            // The link points to nothing: a crash in between. Write again.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(error),
        };
        for entry in entries {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let Some(wanted) = path.strip_prefix(version).ok().and_then(|p| payload.get(p.to_string_lossy().as_ref()))
            else {
                return Ok(false);
            };
            let metadata = fs::metadata(&path)?;
            let same_owner_bits = metadata.mode() & 0o700 == wanted.mode & 0o700;
            if metadata.len() != wanted.data.len() as u64 || !same_owner_bits || fs::read(&path)? != wanted.data {
                return Ok(false);
            }
            found += 1;
        }
    }
    Ok(found == payload.len())
}

#[cfg(test)]
mod tests {
    use super::{super::payload::PayloadFile, *};

    fn payload(files: &[(&str, &str)]) -> Payload {
        files
            .iter()
            .map(|(path, data)| ((*path).to_owned(), PayloadFile { data: data.as_bytes().to_vec(), mode: 0o640 }))
            .collect()
    }

    #[test]
    fn an_update_swaps_all_files_at_once_and_removes_what_is_gone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path();
        assert!(write(path, &payload(&[("a", "1"), ("d/b", "2")]), None).unwrap());
        assert_eq!(fs::read_to_string(path.join("a")).unwrap(), "1");
        assert_eq!(fs::read_to_string(path.join("d/b")).unwrap(), "2");
        assert_eq!(fs::metadata(path.join("a")).unwrap().mode() & 0o777, 0o640);
        let before = fs::read_link(path.join(DATA_LINK)).unwrap();
        assert!(!write(path, &payload(&[("a", "1"), ("d/b", "2")]), None).unwrap(), "nothing changed");
        assert_eq!(fs::read_link(path.join(DATA_LINK)).unwrap(), before);
        assert!(write(path, &payload(&[("a", "one"), ("c", "3")]), None).unwrap());
        assert_eq!(fs::read_to_string(path.join("a")).unwrap(), "one");
        assert!(!path.join("d").exists() && path.join("c").exists() && !path.join(before).exists());
        let mut names: Vec<_> =
            fs::read_dir(path).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.retain(|name| name != DATA_LINK && !name.starts_with("..1") && !name.starts_with("..2"));
        names.sort();
        assert_eq!(names, ["a", "c"]);
    }

    #[test]
    fn a_dangling_link_of_a_crash_is_repaired() {
        let folder = tempfile::tempdir().unwrap();
        symlink("..gone", folder.path().join(DATA_LINK)).unwrap();
        symlink("..gone", folder.path().join(NEW_DATA_LINK)).unwrap();
        assert!(write(folder.path(), &payload(&[("a", "1")]), None).unwrap());
        assert_eq!(fs::read_to_string(folder.path().join("a")).unwrap(), "1");
    }

    #[test]
    fn an_empty_payload_is_an_empty_volume() {
        let folder = tempfile::tempdir().unwrap();
        assert!(write(folder.path(), &Payload::new(), None).unwrap());
        assert!(folder.path().join(DATA_LINK).is_dir());
    }
}
