//! A pod's volumes on the node: emptyDir, hostPath, configMap, secret, downwardAPI and projected.

mod atomic;
mod mount;
mod payload;

use std::{
    collections::BTreeMap,
    fs, io,
    os::unix::fs::{FileTypeExt, PermissionsExt, chown},
    path::{Component, Path, PathBuf},
};

use k8s_cri::v1::{Mount, MountPropagation};
use k8s_openapi::api::core::v1::{Container, EmptyDirVolumeSource, HostPathVolumeSource, Pod, Volume, VolumeMount};

use super::{
    folders::{PodFolder, is_plain_name},
    inputs::{InputError, Inputs, OwnFields},
    quantity,
};

/// Why a volume can't be had.
#[derive(Debug, thiserror::Error)]
pub(crate) enum VolumeError {
    #[error(transparent)]
    Input(#[from] InputError),
    #[error("volume {0:?}: this kind of volume is not supported on edge nodes")]
    Unsupported(String),
    #[error("volume {0:?} does not exist")]
    Unknown(String),
    #[error("path {0:?} leaves the volume")]
    Path(String),
    #[error("hostPath type check failed: {path} is not a {expected}")]
    HostPathType { path: String, expected: String },
    #[error("volumeMount {0:?}: subPathExpr is not supported on edge nodes")]
    SubPathExpr(String),
    #[error("{path}: {source}")]
    Io { path: String, source: io::Error },
}

fn io_error(path: &Path) -> impl FnOnce(io::Error) -> VolumeError {
    let path = path.display().to_string();
    move |source| VolumeError::Io { path, source }
}

/// Where each volume of a pod is on the node.
pub(crate) type VolumePaths = BTreeMap<String, PathBuf>;

/// Makes all volumes of a pod, or brings them up to date.
pub(crate) fn prepare(
    pod: &Pod,
    folder: &PodFolder,
    inputs: &Inputs,
    own: &OwnFields<'_>,
) -> Result<VolumePaths, VolumeError> {
    let mut paths = VolumePaths::new();
    let group = fs_group(pod);
    for volume in pod.spec.iter().flat_map(|s| s.volumes.iter().flatten()) {
        if !is_plain_name(&volume.name) {
            return Err(VolumeError::Path(volume.name.clone()));
        }
        let path = folder.volume(&volume.name);
        let path = if let Some(source) = &volume.empty_dir {
            empty_dir(&path, source, group)?;
            path
        } else if let Some(source) = &volume.host_path {
            host_path(source)?
        } else if let Some(files) = payload::payload(volume, inputs, own)? {
            atomic::write(&path, &files, group).map_err(io_error(&path))?;
            path
        } else {
            return Err(VolumeError::Unsupported(volume.name.clone()));
        };
        paths.insert(volume.name.clone(), path);
    }
    Ok(paths)
}

/// Brings the volumes that are made of objects up to date while the pod runs. One that lost its object keeps its last files.
/// Returns the names of those that changed.
pub(crate) fn refresh(pod: &Pod, folder: &PodFolder, inputs: &Inputs, own: &OwnFields<'_>) -> Vec<String> {
    let group = fs_group(pod);
    let mut changed = Vec::new();
    for volume in pod.spec.iter().flat_map(|s| s.volumes.iter().flatten()) {
        let path = folder.volume(&volume.name);
        if !is_plain_name(&volume.name) || !path.exists() {
            continue;
        }
        let result = match payload::payload(volume, inputs, own) {
            Ok(Some(files)) => atomic::write(&path, &files, group).map_err(io_error(&path)),
            Ok(None) => continue,
            Err(error) => Err(error),
        };
        match result {
            Ok(true) => changed.push(volume.name.clone()),
            Ok(false) => {}
            Err(error) => tracing::debug!(volume = volume.name, %error, "a volume keeps its last content"),
        }
    }
    changed
}

/// Whether the pod has a volume whose files follow an object.
pub(crate) fn follows_objects(pod: &Pod) -> bool {
    let follows =
        |v: &Volume| v.config_map.is_some() || v.secret.is_some() || v.projected.is_some() || v.downward_api.is_some();
    pod.spec.iter().flat_map(|s| s.volumes.iter().flatten()).any(follows)
}

/// Removes everything of a pod from the node: unmounts what was mounted, then deletes the folder.
pub(crate) fn remove_all(folder: &PodFolder) -> Result<(), VolumeError> {
    let path = folder.path();
    mount::unmount_below(path).map_err(io_error(path))?;
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io_error(path)(error)),
        _ => Ok(()),
    }
}

/// The mounts of a container.
pub(crate) fn mounts(container: &Container, paths: &VolumePaths) -> Result<Vec<Mount>, VolumeError> {
    container.volume_mounts.iter().flatten().map(|mount| one_mount(mount, paths)).collect()
}

fn one_mount(mount: &VolumeMount, paths: &VolumePaths) -> Result<Mount, VolumeError> {
    let root = paths.get(&mount.name).ok_or_else(|| VolumeError::Unknown(mount.name.clone()))?;
    if mount.sub_path_expr.as_ref().is_some_and(|expr| !expr.is_empty()) {
        return Err(VolumeError::SubPathExpr(mount.name.clone()));
    }
    let host_path = match mount.sub_path.as_deref().filter(|sub| !sub.is_empty()) {
        Some(sub) => sub_path(root, sub)?,
        None => root.clone(),
    };
    let propagation = match mount.mount_propagation.as_deref() {
        Some("HostToContainer") => MountPropagation::PropagationHostToContainer,
        Some("Bidirectional") => MountPropagation::PropagationBidirectional,
        _ => MountPropagation::PropagationPrivate,
    };
    Ok(Mount {
        container_path: if mount.mount_path.starts_with('/') {
            mount.mount_path.clone()
        } else {
            format!("/{}", mount.mount_path)
        },
        host_path: host_path.to_string_lossy().into_owned(),
        readonly: mount.read_only == Some(true),
        propagation: propagation.into(),
        ..Default::default()
    })
}

/// A place inside of a volume; made as a folder when it isn't there. Links must not lead out of the volume.
fn sub_path(root: &Path, sub: &str) -> Result<PathBuf, VolumeError> {
    let relative = Path::new(sub);
    if !relative.components().all(|part| matches!(part, Component::Normal(_) | Component::CurDir)) {
        return Err(VolumeError::Path(sub.to_owned()));
    }
    let wanted = root.join(relative);
    if !wanted.exists() {
        // The existing part decides where new folders would land.
        let existing = wanted.ancestors().find(|path| path.exists()).unwrap_or(root);
        inside(root, existing, sub)?;
        fs::create_dir_all(&wanted).map_err(io_error(&wanted))?;
    }
    inside(root, &wanted, sub)
}

fn inside(root: &Path, path: &Path, sub: &str) -> Result<PathBuf, VolumeError> {
    let root = root.canonicalize().map_err(io_error(root))?;
    let real = path.canonicalize().map_err(io_error(path))?;
    if real.starts_with(&root) { Ok(real) } else { Err(VolumeError::Path(sub.to_owned())) }
}

fn fs_group(pod: &Pod) -> Option<u32> {
    let group = pod.spec.as_ref()?.security_context.as_ref()?.fs_group?;
    u32::try_from(group).ok()
}

fn empty_dir(path: &Path, source: &EmptyDirVolumeSource, group: Option<u32>) -> Result<(), VolumeError> {
    let new = !path.exists();
    fs::create_dir_all(path).map_err(io_error(path))?;
    if source.medium.as_deref() == Some("Memory") {
        let limit = source.size_limit.as_ref().and_then(quantity::whole).filter(|&bytes| bytes > 0);
        match mount::tmpfs(path, limit) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                tracing::warn!(path = %path.display(), "no permission to mount a tmpfs: the volume is on disk");
            }
            Err(error) => return Err(io_error(path)(error)),
        }
    }
    if new {
        chown(path, None, group).map_err(io_error(path))?;
        let mode = if group.is_some() { 0o2777 } else { 0o777 };
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).map_err(io_error(path))?;
    }
    Ok(())
}

/// Checks, and for the `…OrCreate` types makes, what a hostPath names (Kubernetes, "hostPath volume types").
fn host_path(source: &HostPathVolumeSource) -> Result<PathBuf, VolumeError> {
    let path = PathBuf::from(&source.path);
    let kind = source.type_.as_deref().unwrap_or_default();
    let found = fs::metadata(&path).ok().map(|metadata| metadata.file_type());
    let fits = match kind {
        "" => true,
        "DirectoryOrCreate" => {
            if found.is_none() {
                fs::create_dir_all(&path).map_err(io_error(&path))?;
                fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).map_err(io_error(&path))?;
            }
            found.is_none_or(|kind| kind.is_dir())
        }
        "FileOrCreate" => {
            if found.is_none() {
                fs::write(&path, b"").map_err(io_error(&path))?;
                fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).map_err(io_error(&path))?;
            }
            found.is_none_or(|kind| kind.is_file())
        }
        "Directory" => found.is_some_and(|kind| kind.is_dir()),
        "File" => found.is_some_and(|kind| kind.is_file()),
        "Socket" => found.is_some_and(|kind| kind.is_socket()),
        "CharDevice" => found.is_some_and(|kind| kind.is_char_device()),
        "BlockDevice" => found.is_some_and(|kind| kind.is_block_device()),
        _ => false,
    };
    if !fits {
        let expected = kind.trim_end_matches("OrCreate").to_owned();
        return Err(VolumeError::HostPathType { path: source.path.clone(), expected });
    }
    if kind.is_empty() && found.is_none() {
        // A missing folder is made, as runtimes have always done for a hostPath without a type.
        fs::create_dir_all(&path).map_err(io_error(&path))?;
    }
    Ok(path)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, symlink};

    use serde_json::json;

    use super::{super::resources::Machine, *};

    fn prepared(folder: &Path, volumes: serde_json::Value) -> Result<VolumePaths, String> {
        let pod: Pod =
            serde_json::from_value(json!({"metadata": {"name": "p"}, "spec": {"containers": [], "volumes": volumes}}))
                .unwrap();
        let machine = Machine { memory_bytes: 1, cpus: 1, lowest_oom_score_adj: 0 };
        let own = OwnFields { pod: &pod, pod_ips: &[], host_ips: &[], machine };
        prepare(&pod, &PodFolder::new(folder, "u"), &Inputs::default(), &own).map_err(|e| e.to_string())
    }

    #[test]
    fn an_empty_dir_is_writable_for_all_and_keeps_its_content() {
        let folder = tempfile::tempdir().unwrap();
        let volumes = json!([{"name": "scratch", "emptyDir": {}}]);
        let paths = prepared(folder.path(), volumes.clone()).unwrap();
        let path = &paths["scratch"];
        assert_eq!(fs::metadata(path).unwrap().mode() & 0o777, 0o777);
        fs::write(path.join("kept"), "x").unwrap();
        prepared(folder.path(), volumes).unwrap();
        assert!(path.join("kept").exists());
        remove_all(&PodFolder::new(folder.path(), "u")).unwrap();
        assert!(!folder.path().join("u").exists());
    }

    #[test]
    fn a_memory_volume_is_a_tmpfs_and_goes_with_the_pod() {
        let folder = tempfile::tempdir().unwrap();
        let volumes = json!([{"name": "fast", "emptyDir": {"medium": "Memory", "sizeLimit": "1Mi"}}]);
        let paths = prepared(folder.path(), volumes.clone()).unwrap();
        prepared(folder.path(), volumes).unwrap();
        let mounts = fs::read_to_string("/proc/thread-self/mounts").unwrap();
        let name = paths["fast"].display().to_string();
        assert_eq!(mounts.matches(&format!("tmpfs {name} tmpfs")).count(), 1, "mounted once");
        remove_all(&PodFolder::new(folder.path(), "u")).unwrap();
        assert!(!fs::read_to_string("/proc/thread-self/mounts").unwrap().contains(&name));
    }

    #[test]
    fn host_paths_are_checked_by_type() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name).display().to_string();
        fs::write(at("file"), "").unwrap();
        let check = |path: &str, kind: &str| {
            prepared(folder.path(), json!([{"name": "h", "hostPath": {"path": at(path), "type": kind}}])).map(|_| ())
        };
        check("file", "File").unwrap();
        check("new/deep", "DirectoryOrCreate").unwrap();
        check("new/deep", "Directory").unwrap();
        check("touched", "FileOrCreate").unwrap();
        assert!(check("file", "Directory").unwrap_err().contains("is not a Directory"));
        assert!(check("none", "File").unwrap_err().contains("is not a File"));
        assert!(check("file", "Socket").is_err());
    }

    #[test]
    fn unsupported_volumes_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let error = prepared(folder.path(), json!([{"name": "n", "nfs": {"path": "/", "server": "s"}}])).unwrap_err();
        assert!(error.contains("\"n\"") && error.contains("not supported"), "{error}");
    }

    #[test]
    fn sub_paths_stay_inside_of_their_volume() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("v");
        fs::create_dir(&root).unwrap();
        symlink("/etc", root.join("out")).unwrap();
        assert!(sub_path(&root, "a/b").unwrap().ends_with("v/a/b"));
        for bad in ["../x", "/etc", "out/passwd", "out", "out/new"] {
            assert!(sub_path(&root, bad).is_err(), "{bad}");
        }
    }
}
