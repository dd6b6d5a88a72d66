//! The eBPF programs: loaded, attached to a cgroup, and their maps kept equal to what was planned.

use std::{
    collections::HashMap,
    fmt,
    fs::File,
    net::{Ipv4Addr, SocketAddrV4},
    path::{Path, PathBuf},
};

use aya::{
    Ebpf, EbpfError, EbpfLoader,
    maps::{Array, HashMap as BpfHashMap, MapData, MapError, PerCpuArray},
    programs::{CgroupAttachMode, CgroupSock, CgroupSockAddr, ProgramError},
};
use edgemesh_ebpf_abi as abi;
use edgemesh_mesh::model::Protocol;

use super::{
    plan::{Change, Frontend},
    slots::{Run, Slots},
};

static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/edgemesh-ebpf.o"));

/// The programs that see socket addresses, by the names in the object. What shows Service addresses comes before what
/// hides them, so that no socket sees a backend's address while they are attached one after the other.
const ADDRESS_PROGRAMS: [&str; 7] =
    ["recvmsg4", "recvmsg6", "getpeername4", "getpeername6", "sendmsg4", "connect6", "connect4"];
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
    frontends: BpfHashMap<MapData, u64, u64>,
    backends: Array<MapData, u64>,
    slots: Slots,
    generation: u16,
    programmed: HashMap<u64, Option<Run>>,
    cgroup: PathBuf,
    /// Holds the programs and their links.
    _ebpf: Ebpf,
}

/// What the programs counted since they were loaded, and what they remember.
pub struct Counters {
    counters: PerCpuArray<MapData, u64>,
    peers: BpfHashMap<MapData, [u64; 2], u64>,
}

impl fmt::Debug for Counters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(abi::Counter::ALL.map(|counter| (counter, self.get(counter).ok()))).finish()
    }
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
        let (frontends, backends) = (take_map(&mut ebpf, abi::FRONTENDS)?, take_map(&mut ebpf, abi::BACKENDS)?);
        let (counters, peers) = (take_map(&mut ebpf, abi::COUNTERS)?, take_map(&mut ebpf, abi::PEERS)?);
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
        let backends = Array::try_from(backends).map_err(map_error(abi::BACKENDS))?;
        let slots = Slots::new(backends.len());
        let programs = Self {
            frontends: BpfHashMap::try_from(frontends).map_err(map_error(abi::FRONTENDS))?,
            backends,
            slots,
            generation: 0,
            programmed: HashMap::new(),
            cgroup,
            _ebpf: ebpf,
        };
        let counters = Counters {
            counters: PerCpuArray::try_from(counters).map_err(map_error(abi::COUNTERS))?,
            peers: BpfHashMap::try_from(peers).map_err(map_error(abi::PEERS))?,
        };
        Ok((programs, counters))
    }

    /// The cgroup to which they are attached.
    pub fn cgroup(&self) -> &Path {
        &self.cgroup
    }

    /// How many frontends are in the maps.
    pub fn len(&self) -> usize {
        self.programmed.len()
    }

    /// Whether no frontend is in the maps.
    pub fn is_empty(&self) -> bool {
        self.programmed.is_empty()
    }

    /// Writes one change. Sockets that connect meanwhile see the state before or after it, never a mixture: the
    /// backends go to slots of their own, then the frontend leads there, then the old slots are free.
    ///
    /// # Errors
    /// When a map is full or can't be written; the frontend is then as before.
    pub fn apply(&mut self, change: &Change<'_>) -> Result<(), EbpfDatapathError> {
        let key = key_of(change.frontend);
        let Some(target) = change.target else {
            if self.programmed.contains_key(&key) {
                self.frontends.remove(&key).map_err(map_error(abi::FRONTENDS))?;
                self.release(key);
            }
            return Ok(());
        };
        let backends = target.backends();
        // A Service port with more endpoints than fit in the count uses the first ones: still far more than it needs.
        let count = u16::try_from(backends.len()).unwrap_or(u16::MAX);
        let mut run = None;
        if count > 0 {
            let full = || EbpfDatapathError::Full { backends: backends.len(), slots: self.backends.len() };
            run = Some(self.slots.take(count).ok_or_else(full)?);
        }
        self.generation = self.generation.wrapping_add(1);
        if let Err(error) = self.write(key, run, &backends[..usize::from(count)]) {
            if let Some(run) = run {
                self.slots.release(run);
            }
            return Err(error);
        }
        self.release(key);
        self.programmed.insert(key, run);
        Ok(())
    }

    fn write(&mut self, key: u64, run: Option<Run>, backends: &[SocketAddrV4]) -> Result<(), EbpfDatapathError> {
        let first = run.map_or(0, |run| run.first);
        for (slot, backend) in (first..).zip(backends) {
            let word = abi::Backend::new(socket_address(*backend), self.generation).to_bits();
            self.backends.set(slot, word, 0).map_err(map_error(abi::BACKENDS))?;
        }
        let count = u16::try_from(backends.len()).unwrap_or(u16::MAX);
        let word = abi::Frontend::new(first, count, self.generation).to_bits();
        self.frontends.insert(key, word, 0).map_err(map_error(abi::FRONTENDS))
    }

    fn release(&mut self, key: u64) {
        if let Some(Some(run)) = self.programmed.remove(&key) {
            self.slots.release(run);
        }
    }
}

impl Counters {
    /// The value of one counter, over all CPUs.
    ///
    /// # Errors
    /// When the map can't be read.
    pub fn get(&self, counter: abi::Counter) -> Result<u64, EbpfDatapathError> {
        let values = self.counters.get(&(counter as u32), 0).map_err(map_error(abi::COUNTERS))?;
        Ok(values.iter().sum())
    }

    /// How many backends of sockets are remembered with their Service addresses. Walks the whole map.
    pub fn remembered_peers(&self) -> usize {
        self.peers.keys().take(abi::MAX_PEERS as usize).filter(Result::is_ok).count()
    }
}

fn take_map(ebpf: &mut Ebpf, name: &'static str) -> Result<aya::maps::Map, EbpfDatapathError> {
    ebpf.take_map(name).ok_or(EbpfDatapathError::Missing(name))
}

fn map_error(name: &'static str) -> impl Fn(MapError) -> EbpfDatapathError {
    move |source| EbpfDatapathError::Map { name, source: Box::new(source) }
}

fn key_of(frontend: Frontend) -> u64 {
    let protocol = match frontend.protocol {
        Protocol::Tcp => abi::TCP,
        Protocol::Udp => abi::UDP,
    };
    abi::FrontendKey::new(socket_address(frontend.address), protocol).to_bits()
}

fn socket_address(address: SocketAddrV4) -> abi::SocketAddress {
    abi::SocketAddress::new(Ipv4Addr::octets(address.ip()), address.port())
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
