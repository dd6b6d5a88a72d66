//! Where the programs' links and maps outlive the agent: a folder of a BPF filesystem for each cgroup, layout
//! of the maps and size.

use std::{
    ffi::CString,
    fs, io,
    os::{
        fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::{ffi::OsStrExt, fs::MetadataExt},
    },
    path::{Path, PathBuf},
};

use edgemesh_ebpf_abi::LAYOUT;
use nix::{
    mount::{MsFlags, mount},
    sys::statfs::{BPF_FS_MAGIC, statfs},
};

/// Folder in the BPF filesystem that is ours.
pub(crate) const OURS: &str = "edgemesh";
/// Commands of bpf(2).
const BPF_OBJ_GET: libc::c_long = 7;
const BPF_LINK_UPDATE: libc::c_long = 29;
const BPF_LINK_DETACH: libc::c_long = 34;

/// The pins of one cgroup's programs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Pins {
    /// Our folder in the BPF filesystem.
    ours: PathBuf,
    /// The cgroup's path as a name.
    cgroup: String,
    /// The folder of this cgroup, layout and size of the maps.
    folder: PathBuf,
}

impl Pins {
    /// The pins of a cgroup, with maps of so many slots, in a BPF filesystem, which is mounted if it isn't yet.
    ///
    /// # Errors
    /// When it can't be mounted or written.
    pub(super) fn open(bpffs: &Path, cgroup: &Path, slots: u32) -> io::Result<Self> {
        if !is_bpffs(bpffs) {
            fs::create_dir_all(bpffs)?;
            if !is_bpffs(bpffs) {
                let none: Option<&str> = None;
                mount(Some("bpf"), bpffs, Some("bpf"), MsFlags::empty(), none)?;
            }
        }
        let pins = Self::name(bpffs, cgroup, slots)?;
        fs::create_dir_all(&pins.folder)?;
        Ok(pins)
    }

    /// Removes the pins of a cgroup, of whatever layout: programs are detached and maps freed. Does nothing where there are none.
    ///
    /// # Errors
    /// When one can't be removed.
    pub(super) fn remove(bpffs: &Path, cgroup: &Path) -> io::Result<()> {
        let name = cgroup_name(cgroup);
        let ours = bpffs.join(OURS);
        for folder in folders(&ours, &name) {
            remove_folder(&folder)?;
        }
        match fs::remove_dir(ours) {
            // Others have pins there, or nobody ever had.
            Err(error) if !matches!(error.kind(), io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::NotFound) => {
                Err(error)
            }
            _ => Ok(()),
        }
    }

    fn name(bpffs: &Path, cgroup: &Path, slots: u32) -> io::Result<Self> {
        // By its number too: links to a cgroup that was removed and made again are dead.
        let number = fs::metadata(cgroup)?.ino();
        let (ours, name) = (bpffs.join(OURS), cgroup_name(cgroup));
        Ok(Self { folder: ours.join(format!("{name}-{number}-v{LAYOUT}-{slots}")), ours, cgroup: name })
    }

    /// Removes what other versions of the agent, or a cgroup of this name that is gone, left here.
    pub(super) fn remove_older(&self) {
        for folder in folders(&self.ours, &self.cgroup).into_iter().filter(|folder| *folder != self.folder) {
            match remove_folder(&folder) {
                Ok(()) => tracing::info!(folder = %folder.display(), "older programs removed"),
                Err(error) => tracing::warn!(folder = %folder.display(), %error, "older programs can't be removed"),
            }
        }
    }

    /// Where a map is pinned.
    pub(super) fn map(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// Where a program's link is pinned.
    pub(super) fn link(&self, program: &str) -> PathBuf {
        self.folder.join(format!("link_{program}"))
    }
}

/// Puts another program behind a pinned link, at once. Returns whether there is such a link and it is alive.
///
/// # Errors
/// When the kernel refuses.
pub(super) fn replace_program(link: &Path, program: BorrowedFd<'_>) -> io::Result<bool> {
    let pinned = match get(link) {
        Ok(pinned) => pinned,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error),
    };
    let update = LinkUpdate { link: pinned.as_raw_fd(), program: program.as_raw_fd(), flags: 0, old_program: 0 };
    // SAFETY: the command reads as many bytes as the structure has, and the descriptors in it are open.
    let result = unsafe { libc::syscall(libc::SYS_bpf, BPF_LINK_UPDATE, &raw const update, size_of::<LinkUpdate>()) };
    if result == 0 {
        return Ok(true);
    }
    let error = io::Error::last_os_error();
    if error.raw_os_error() == Some(libc::ENOLINK) {
        // Its cgroup is gone.
        fs::remove_file(link)?;
        return Ok(false);
    }
    Err(error)
}

/// `union bpf_attr` for `BPF_LINK_UPDATE`.
#[repr(C)]
struct LinkUpdate {
    link: i32,
    program: i32,
    flags: u32,
    old_program: u32,
}

/// `union bpf_attr` for `BPF_OBJ_GET`.
#[repr(C)]
struct ObjectGet {
    path: u64,
    descriptor: u32,
    flags: u32,
}

fn get(path: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let get = ObjectGet { path: path.as_ptr() as u64, descriptor: 0, flags: 0 };
    // SAFETY: the command reads as many bytes as the structure has, and the path in it, which ends with a zero byte.
    let result = unsafe { libc::syscall(libc::SYS_bpf, BPF_OBJ_GET, &raw const get, size_of::<ObjectGet>()) };
    match i32::try_from(result) {
        // SAFETY: the kernel has just opened this descriptor for us.
        Ok(descriptor) if descriptor >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(descriptor) }),
        _ => Err(io::Error::last_os_error()),
    }
}

pub(crate) fn is_bpffs(folder: &Path) -> bool {
    statfs(folder).is_ok_and(|found| found.filesystem_type() == BPF_FS_MAGIC)
}

/// A path as one name, each path as another one. A BPF filesystem allows no dots.
fn cgroup_name(cgroup: &Path) -> String {
    let mut name = String::new();
    for byte in cgroup.as_os_str().as_bytes() {
        match byte {
            b'/' => name.push('_'),
            byte if byte.is_ascii_alphanumeric() => name.push(char::from(*byte)),
            byte => name.push_str(&format!("%{byte:02x}")),
        }
    }
    name
}

/// Folders of a cgroup, of whatever number and layout.
fn folders(ours: &Path, cgroup: &str) -> Vec<PathBuf> {
    let is_of_cgroup = |entry: &fs::DirEntry| {
        entry.file_name().to_str().and_then(|n| n.split_once('-')).is_some_and(|n| n.0 == cgroup)
    };
    fs::read_dir(ours).into_iter().flatten().flatten().filter(is_of_cgroup).map(|entry| entry.path()).collect()
}

/// Detaches the program behind a pinned link at once; the kernel would do it some time after the pin is gone.
pub(crate) fn detach(link: &Path) -> io::Result<()> {
    let pinned = get(link)?;
    let descriptor = pinned.as_raw_fd();
    // SAFETY: the command reads the descriptor, which is open.
    let result = unsafe { libc::syscall(libc::SYS_bpf, BPF_LINK_DETACH, &raw const descriptor, size_of::<i32>()) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Links go first: no program may run without its maps' contents.
fn remove_folder(folder: &Path) -> io::Result<()> {
    let mut pins: Vec<PathBuf> = fs::read_dir(folder)?.flatten().map(|entry| entry.path()).collect();
    let is_link = |path: &PathBuf| path.file_name().is_some_and(|name| name.as_bytes().starts_with(b"link_"));
    pins.sort_by_key(|path| !is_link(path));
    for pin in pins {
        if is_link(&pin)
            && let Err(error) = detach(&pin)
        {
            // Its cgroup is gone, for example: it is as good as detached.
            tracing::debug!(pin = %pin.display(), %error, "not detached");
        }
        fs::remove_file(pin)?;
    }
    fs::remove_dir(folder)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_cgroup_has_a_name_of_its_own_without_dots_and_dashes() {
        let paths = ["/", "/a/b", "/a_b", "/a-b", "/a.b", "/a%2eb", "/A/b", "/kubepods.slice/pod-1.slice"];
        let names: std::collections::HashSet<String> = paths.iter().map(|path| cgroup_name(Path::new(path))).collect();
        assert_eq!(names.len(), paths.len());
        assert!(names.iter().all(|name| !name.contains(['.', '-', '/'])), "{names:?}");
    }
}
