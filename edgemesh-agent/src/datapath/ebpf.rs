//! The eBPF programs: loaded, attached to a cgroup, and their maps kept equal to what was planned.

use std::{
    fs::File,
    net::SocketAddr,
    path::{Path, PathBuf},
};

use aya::{
    Ebpf, EbpfError, EbpfLoader,
    maps::MapError,
    programs::{CgroupAttachMode, CgroupSock, CgroupSockAddr, ProgramError},
};

pub use super::counters::Counters;
use super::{
    counters::Peers,
    plan::Change,
    stale::Sweeper,
    tables::{Family as _, Table, V4, V6},
};

static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/edgemesh-ebpf.o"));

/// The programs that see socket addresses, by the names in the object. What shows Service addresses comes before what
/// hides them, so that no socket sees a backend's address while they are attached one after the other.
const ADDRESS_PROGRAMS: [&str; 8] =
    ["recvmsg4", "recvmsg6", "getpeername4", "getpeername6", "sendmsg4", "sendmsg6", "connect6", "connect4"];
/// The program that sees sockets close.
const RELEASE_PROGRAM: &str = "sock_release";
/// The largest `/proc/self/mounts` that is read, in bytes.
const MAX_MOUNTS: u64 = 4 << 20;

/// Why the programs can't serve.
#[derive(Debug, thiserror::Error)]
pub enum EbpfDatapathError {
    /// No cgroup2 hierarchy is mounted.
    #[error("no cgroup2 mount in /proc/self/mounts; eBPF socket load balancing needs one")]
    NoCgroup2,
    /// A file or folder can't be used.
    #[error("{path}: {source}")]
    Io {
        /// Which one.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The kernel refuses the object.
    #[error("loading the eBPF programs (needs Linux 5.18, CAP_BPF and CAP_NET_ADMIN): {0}")]
    Load(#[from] EbpfError),
    /// The kernel refuses one program.
    #[error("eBPF program {name} at {cgroup}: {source}")]
    Program {
        /// Which one.
        name: &'static str,
        /// Where it was to be attached.
        cgroup: PathBuf,
        /// Why.
        source: Box<ProgramError>,
    },
    /// A map can't be read or written.
    #[error("eBPF map {name}: {source}")]
    Map {
        /// Which one.
        name: &'static str,
        /// Why.
        source: Box<MapError>,
    },
    /// The object lacks a part that it should have.
    #[error("the eBPF object has no {0}")]
    Missing(&'static str),
    /// There are more backends than slots.
    #[error("no room for {backends} more backends in the eBPF map of {slots}")]
    Full {
        /// How many were to be added.
        backends: usize,
        /// How many slots there are.
        slots: u32,
    },
}

/// Attached programs and their maps. They are detached when this is dropped.
pub struct Programs {
    ipv4: Table<V4>,
    ipv6: Table<V6>,
    sweeper: Option<Sweeper>,
    cgroup: PathBuf,
    /// Holds the programs and their links.
    _ebpf: Ebpf,
}

impl Programs {
    /// Loads the programs and attaches them to a cgroup, given relative to the cgroup2 mount.
    ///
    /// # Errors
    /// When the cgroup is missing, or the kernel lacks something or denies it.
    pub fn start(cgroup: &Path) -> Result<(Self, Counters), EbpfDatapathError> {
        let cgroup = cgroup_path(cgroup)?;
        let folder = File::open(&cgroup).map_err(|source| EbpfDatapathError::Io { path: cgroup.clone(), source })?;
        let mut ebpf = EbpfLoader::new().load(OBJECT)?;
        let peers = Peers::open(&ebpf)?;
        let (ipv4, ipv6, counters) = (Table::take(&mut ebpf)?, Table::take(&mut ebpf)?, Counters::take(&mut ebpf)?);
        let failed = |name| {
            let cgroup = cgroup.clone();
            move |source| EbpfDatapathError::Program { name, cgroup, source: Box::new(source) }
        };
        // The kernel puts a link beside the programs that others attached there or below: `Single` adds no flag of its own.
        let program = ebpf.program_mut(RELEASE_PROGRAM).ok_or(EbpfDatapathError::Missing(RELEASE_PROGRAM))?;
        let release: &mut CgroupSock = program.try_into().map_err(failed(RELEASE_PROGRAM))?;
        release.load().map_err(failed(RELEASE_PROGRAM))?;
        release.attach(&folder, CgroupAttachMode::Single).map_err(failed(RELEASE_PROGRAM))?;
        for name in ADDRESS_PROGRAMS {
            let program = ebpf.program_mut(name).ok_or(EbpfDatapathError::Missing(name))?;
            let program: &mut CgroupSockAddr = program.try_into().map_err(failed(name))?;
            program.load().map_err(failed(name))?;
            program.attach(&folder, CgroupAttachMode::Single).map_err(failed(name))?;
        }
        let sweeper = Some(Sweeper::new(peers, cgroup.clone()));
        Ok((Self { ipv4, ipv6, sweeper, cgroup, _ebpf: ebpf }, counters))
    }

    /// The cgroup to which they are attached.
    pub fn cgroup(&self) -> &Path {
        &self.cgroup
    }

    /// What ends sockets of these programs whose endpoint is gone; it can be taken once.
    pub fn take_sweeper(&mut self) -> Option<Sweeper> {
        self.sweeper.take()
    }

    /// How many frontends are in the maps.
    pub fn len(&self) -> usize {
        self.ipv4.len() + self.ipv6.len()
    }

    /// Whether no frontend is in the maps.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Writes one change. Sockets that connect meanwhile see the state before or after it, never a mixture.
    ///
    /// # Errors
    /// When a map is full or can't be written; the frontend is then as before.
    pub fn apply(&mut self, change: &Change<'_>) -> Result<(), EbpfDatapathError> {
        let protocol = change.frontend.protocol;
        match (change.frontend.address, change.target) {
            (SocketAddr::V4(address), Some(target)) => self.ipv4.set(V4::key(address, protocol), target),
            (SocketAddr::V4(address), None) => self.ipv4.remove(V4::key(address, protocol)),
            (SocketAddr::V6(address), Some(target)) => self.ipv6.set(V6::key(address, protocol), target),
            (SocketAddr::V6(address), None) => self.ipv6.remove(V6::key(address, protocol)),
        }
    }
}

pub(super) fn take_map(ebpf: &mut Ebpf, name: &'static str) -> Result<aya::maps::Map, EbpfDatapathError> {
    ebpf.take_map(name).ok_or(EbpfDatapathError::Missing(name))
}

pub(super) fn map_error(name: &'static str) -> impl Fn(MapError) -> EbpfDatapathError {
    move |source| EbpfDatapathError::Map { name, source: Box::new(source) }
}

/// The folder of a cgroup that is given relative to the cgroup2 mount, wherever that is.
fn cgroup_path(cgroup: &Path) -> Result<PathBuf, EbpfDatapathError> {
    use std::io::Read;
    let path = PathBuf::from("/proc/self/mounts");
    let mut mounts = String::new();
    File::open(&path)
        .and_then(|file| file.take(MAX_MOUNTS).read_to_string(&mut mounts))
        .map_err(|source| EbpfDatapathError::Io { path, source })?;
    let mount = cgroup2_mount(&mounts).ok_or(EbpfDatapathError::NoCgroup2)?;
    Ok(mount.join(cgroup.strip_prefix("/").unwrap_or(cgroup)))
}

fn cgroup2_mount(mounts: &str) -> Option<PathBuf> {
    mounts.lines().find_map(|line| {
        let mut fields = line.split(' ');
        let (_, folder, kind) = (fields.next()?, fields.next()?, fields.next()?);
        (kind == "cgroup2").then(|| PathBuf::from(folder.replace("\\040", " ")))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cgroup2_mount_is_found_beside_a_hybrid_hierarchy() {
        let mounts = "tmpfs /sys/fs/cgroup tmpfs rw 0 0\ncgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n\
                      cgroup2 /sys/fs/cgroup/unified cgroup2 rw,relatime 0 0\n";
        assert_eq!(cgroup2_mount(mounts), Some(PathBuf::from("/sys/fs/cgroup/unified")));
        assert_eq!(cgroup2_mount("proc /proc proc rw 0 0\n"), None);
    }
}
