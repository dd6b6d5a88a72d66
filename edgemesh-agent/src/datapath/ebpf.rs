//! The eBPF programs: loaded, attached to a cgroup, and their maps kept equal to what was planned.

use std::{
    fs::File,
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::AsFd as _,
    path::{Path, PathBuf},
};

use aya::{
    Ebpf, EbpfError, EbpfLoader,
    maps::{MapData, MapError, RingBuf},
    programs::{
        CgroupAttachMode, CgroupSock, CgroupSockAddr, ProgramError, ProgramFd, SockOps,
        links::{FdLink, LinkError},
    },
};
use edgemesh_ebpf_abi as abi;

pub use super::counters::Counters;
use super::{
    counters::Peers,
    host,
    map_sizes::MapSizes,
    pins::{Pins, replace_program},
    plan::{Change, Frontend, Plan},
    stale::Sweeper,
    tables::{Family as _, Table, V4, V6},
};
use crate::node_local::{Ipv4Range, Ipv6Range};

static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/edgemesh-ebpf.o"));

/// The programs that see socket addresses, by the names in the object. What shows Service addresses comes before what
/// hides them, so that no socket sees a backend's address while they are attached one after the other.
const ADDRESS_PROGRAMS: [&str; 8] =
    ["recvmsg4", "recvmsg6", "getpeername4", "getpeername6", "sendmsg4", "sendmsg6", "connect6", "connect4"];
/// The maps that outlive the agent.
const MAPS: [&str; 12] = [
    abi::FRONTENDS,
    abi::BACKENDS,
    abi::PEERS,
    abi::UNCONNECTED_PEERS,
    abi::FRONTENDS6,
    abi::BACKENDS6,
    abi::PEERS6,
    abi::UNCONNECTED_PEERS6,
    abi::AFFINITIES,
    abi::COUNTERS,
    abi::CALLS,
    abi::CALLS6,
];
/// The program that sees what befalls TCP sockets.
const EVENTS_PROGRAM: &str = "tcp_events";
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
    /// The kernel's network namespaces have no cookies, by which programs tell the host's from a pod's.
    #[error("the kernel has no SO_NETNS_COOKIE (eBPF socket load balancing needs Linux 5.18)")]
    NoNetnsCookie,
    /// Programs and maps can't be pinned, or their pins not removed.
    #[error("BPF filesystem: {path}: {source}")]
    Pins {
        /// Which folder or pin.
        path: PathBuf,
        /// Why.
        source: io::Error,
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
    #[error("no room for {backends} more backends in the eBPF map of {slots} slots; `backendSlots` gives it more")]
    Full {
        /// How many were to be added.
        backends: usize,
        /// How many slots there are.
        slots: u32,
    },
}

impl EbpfDatapathError {
    /// Whether a map has no room for what was to be written.
    pub(super) fn is_full(&self) -> bool {
        match self {
            Self::Full { .. } => true,
            Self::Map { source, .. } => {
                matches!(&**source, MapError::SyscallError(error) if error.io_error.raw_os_error() == Some(libc::E2BIG))
            }
            _ => false,
        }
    }
}

/// Addresses of this host that nobody has, to which pods' UDP sockets are connected that name a port which a Service lacks:
/// their datagrams are refused.
#[derive(Debug, Clone, Copy)]
pub struct Nowhere {
    v4: Ipv4Addr,
    v6: Ipv6Addr,
}

impl Nowhere {
    /// A port that programs don't listen on, also at all addresses of the host.
    const PORT: u16 = 1;

    /// The first address of each node-local range, which no Service port gets.
    pub fn new(v4: Ipv4Range, v6: Ipv6Range) -> Self {
        Self { v4: v4.base(), v6: v6.base() }
    }
}

impl Default for Nowhere {
    fn default() -> Self {
        Self::new(Ipv4Range::default(), Ipv6Range::default())
    }
}

/// Attached programs and their maps.
pub struct Programs {
    ipv4: Table<V4>,
    ipv6: Table<V6>,
    sweeper: Option<Sweeper>,
    unanswered: Option<RingBuf<MapData>>,
    adopted: Plan,
    cgroup: PathBuf,
    pins: Option<Pins>,
    /// Holds the programs, and their links unless they are pinned.
    ebpf: Ebpf,
}

impl Programs {
    /// Loads the programs with maps of some size and attaches them to a cgroup, given relative to the cgroup2 mount. They are
    /// detached when this is dropped.
    ///
    /// # Errors
    /// When the cgroup is missing, or the kernel lacks something or denies it.
    pub fn start(cgroup: &Path, sizes: MapSizes, nowhere: Nowhere) -> Result<(Self, Counters), EbpfDatapathError> {
        Self::load(cgroup_path(cgroup)?, None, sizes, nowhere)
    }

    /// As [`Programs::start`], but programs and maps are pinned in a BPF filesystem: they stay when this is dropped. What an
    /// earlier agent pinned is taken over, see [`Programs::take_adopted`].
    ///
    /// # Errors
    /// As for [`Programs::start`]; also when the BPF filesystem can't be mounted or written.
    pub fn start_pinned(
        cgroup: &Path,
        bpffs: &Path,
        sizes: MapSizes,
        nowhere: Nowhere,
    ) -> Result<(Self, Counters), EbpfDatapathError> {
        let cgroup = cgroup_path(cgroup)?;
        // Named first, so that a missing cgroup is not reported as a trouble of the BPF filesystem.
        File::open(&cgroup).map_err(|source| EbpfDatapathError::Io { path: cgroup.clone(), source })?;
        let pins = Pins::open(bpffs, &cgroup, sizes.slots())
            .map_err(|source| EbpfDatapathError::Pins { path: bpffs.into(), source })?;
        Self::load(cgroup, Some(pins), sizes, nowhere)
    }

    /// Detaches the pinned programs of a cgroup and frees their maps.
    ///
    /// # Errors
    /// When a pin can't be removed.
    pub fn uninstall(cgroup: &Path, bpffs: &Path) -> Result<(), EbpfDatapathError> {
        let cgroup = cgroup_path(cgroup)?;
        Pins::remove(bpffs, &cgroup).map_err(|source| EbpfDatapathError::Pins { path: bpffs.into(), source })
    }

    fn load(
        cgroup: PathBuf,
        pins: Option<Pins>,
        sizes: MapSizes,
        nowhere: Nowhere,
    ) -> Result<(Self, Counters), EbpfDatapathError> {
        let folder = File::open(&cgroup).map_err(|source| EbpfDatapathError::Io { path: cgroup.clone(), source })?;
        let host = host::netns_cookie().map_err(|source| match source.raw_os_error() {
            Some(libc::ENOPROTOOPT) => EbpfDatapathError::NoNetnsCookie,
            _ => EbpfDatapathError::Io { path: "SO_NETNS_COOKIE".into(), source },
        })?;
        let mut loader = EbpfLoader::new();
        loader.override_global(abi::HOST_NETNS, &host, true);
        let v4 = abi::SocketAddress::new(nowhere.v4.octets(), Nowhere::PORT).to_bits();
        let v6 = abi::SocketAddress6::new(nowhere.v6.octets(), Nowhere::PORT).to_words();
        loader.override_global(abi::NOWHERE, &v4, true).override_global(abi::NOWHERE6, &v6, true);
        for name in [abi::FRONTENDS, abi::FRONTENDS6, abi::CALLS, abi::CALLS6] {
            loader.map_max_entries(name, sizes.frontends());
        }
        loader.map_max_entries(abi::BACKENDS, sizes.slots()).map_max_entries(abi::BACKENDS6, sizes.slots6());
        for name in pins.iter().flat_map(|_| MAPS) {
            if let Some(pins) = &pins {
                loader.map_pin_path(name, pins.map(name));
            }
        }
        let mut ebpf = loader.load(OBJECT)?;
        let peers = Peers::open(&ebpf)?;
        let counters = Counters::take(&mut ebpf)?;
        let unanswered =
            RingBuf::try_from(take_map(&mut ebpf, abi::UNANSWERED)?).map_err(map_error(abi::UNANSWERED))?;
        let mut programs = Self {
            ipv4: Table::take(&mut ebpf)?,
            ipv6: Table::take(&mut ebpf)?,
            sweeper: Some(Sweeper::new(peers, cgroup.clone())),
            unanswered: Some(unanswered),
            adopted: Plan::new(),
            cgroup,
            pins,
            ebpf,
        };
        programs.ipv4.adopt(&mut programs.adopted);
        programs.ipv6.adopt(&mut programs.adopted);
        programs.attach(&folder)?;
        Ok((programs, counters))
    }

    /// The kernel puts a link beside the programs that others attached there or below: `Single` adds no flag of its own. A
    /// pinned link gets the new program in one step.
    fn attach(&mut self, cgroup: &File) -> Result<(), EbpfDatapathError> {
        let path = self.cgroup.clone();
        let failed = |name| {
            let cgroup = path.clone();
            move |source: ProgramError| EbpfDatapathError::Program { name, cgroup, source: Box::new(source) }
        };
        let in_place = |name, pins: &Option<Pins>, program: &ProgramFd| match pins {
            Some(pins) => replace_program(&pins.link(name), program.as_fd())
                .map_err(|source| EbpfDatapathError::Pins { path: pins.link(name), source }),
            None => Ok(false),
        };
        let pin = |name, pins: &Option<Pins>, link: Result<FdLink, LinkError>| -> Result<(), EbpfDatapathError> {
            let Some(path) = pins.as_ref().map(|pins| pins.link(name)) else { return Ok(()) };
            let pinned = link.map_err(io::Error::other).and_then(|link| link.pin(&path).map_err(io::Error::other));
            pinned.map(drop).map_err(|source| EbpfDatapathError::Pins { path, source })
        };
        // The types of programs and of their links have all this in common, but no trait.
        macro_rules! attach {
            ($kind:ty, $name:expr) => {{
                let program = self.ebpf.program_mut($name).ok_or(EbpfDatapathError::Missing($name))?;
                let program: &mut $kind = program.try_into().map_err(failed($name))?;
                program.load().map_err(failed($name))?;
                if !in_place($name, &self.pins, program.fd().map_err(failed($name))?)? {
                    let link = program.attach(cgroup, CgroupAttachMode::Single).map_err(failed($name))?;
                    if self.pins.is_some() {
                        let link = program.take_link(link).map_err(failed($name))?;
                        pin($name, &self.pins, link.try_into())?;
                    }
                }
            }};
        }
        attach!(CgroupSock, RELEASE_PROGRAM);
        attach!(SockOps, EVENTS_PROGRAM);
        for name in ADDRESS_PROGRAMS {
            attach!(CgroupSockAddr, name);
        }
        Ok(())
    }

    /// What an earlier agent left in the maps and is in force; it can be taken once.
    pub fn take_adopted(&mut self) -> Plan {
        std::mem::take(&mut self.adopted)
    }

    /// Detaches programs that agents with another layout of the maps pinned for this cgroup: those served until these are
    /// programmed.
    pub fn remove_older(&self) {
        if let Some(pins) = &self.pins {
            pins.remove_older();
        }
    }

    /// The cgroup to which they are attached.
    pub fn cgroup(&self) -> &Path {
        &self.cgroup
    }

    /// What ends sockets of these programs whose endpoint is gone; it can be taken once.
    pub fn take_sweeper(&mut self) -> Option<Sweeper> {
        self.sweeper.take()
    }

    /// Where the programs tell of backends that left a SYN unanswered; it can be taken once.
    pub(super) fn take_unanswered(&mut self) -> Option<RingBuf<MapData>> {
        self.unanswered.take()
    }

    /// How many slots for backends are in use and how many there are, of IPv4 and of IPv6.
    pub fn slots(&self) -> [(u32, u32); 2] {
        [self.ipv4.slots(), self.ipv6.slots()]
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

    /// Forgets what was counted at a frontend: the Service that has it now is another one.
    pub(super) fn forget_calls(&mut self, frontend: Frontend) {
        match frontend.address {
            SocketAddr::V4(address) => self.ipv4.forget_calls(&V4::key(address, frontend.protocol)),
            SocketAddr::V6(address) => self.ipv6.forget_calls(&V6::key(address, frontend.protocol)),
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
pub(super) fn cgroup_path(cgroup: &Path) -> Result<PathBuf, EbpfDatapathError> {
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
