//! The capture by an eBPF program of the kind `sk_lookup`: it is asked which socket a packet is for that belongs to no connection
//! yet, and names the agent's listener for every port of the captured ranges.
//!
//! Its link is pinned, so that it outlives the agent. Without its listeners the program refuses, and calls of pods never end up
//! at what else listens on the host.

use std::{
    fs::{self, File},
    io,
    net::IpAddr,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use aya::{
    Ebpf, EbpfError, EbpfLoader,
    maps::{
        Map, MapData, MapError, SockMap,
        lpm_trie::{Key, LpmTrie},
    },
    programs::{ProgramError, SkLookup, links::FdLink},
};
use edgemesh_ebpf_abi::{self as abi, CaptureSocket};
use edgemesh_mesh::cidr::Cidr;

use crate::{datapath::pins, overlay::PodSockets};

static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/edgemesh-capture.o"));
const PROGRAM: &str = "capture";
const NAMESPACE: &str = "/proc/thread-self/ns/net";

/// Why the program can't serve.
#[derive(Debug, thiserror::Error)]
pub enum SkLookupError {
    /// The kernel refuses the object.
    #[error("loading the program (needs Linux 5.9, CAP_BPF and CAP_NET_ADMIN): {0}")]
    Load(#[from] EbpfError),
    /// The kernel refuses the program, or to attach it.
    #[error("attaching the program: {0}")]
    Attach(#[from] ProgramError),
    /// A map can't be written.
    #[error("eBPF map: {0}")]
    Map(#[from] MapError),
    /// The network namespace can't be opened.
    #[error("{NAMESPACE}: {0}")]
    Namespace(#[from] io::Error),
    /// The object lacks a part that it should have.
    #[error("the object has no {0}")]
    Missing(&'static str),
}

/// The attached program and its maps.
pub(super) struct Program {
    ipv4: LpmTrie<MapData, [u8; 4], u8>,
    ipv6: LpmTrie<MapData, [u8; 16], u8>,
    /// Keeps the listeners for the program.
    _listeners: SockMap<MapData>,
    /// Attached as long as this is open, or pinned.
    link: Option<FdLink>,
    pin: PathBuf,
    pinned: bool,
    /// Holds the program.
    _ebpf: Ebpf,
}

impl Program {
    /// Loads the program and attaches it to this thread's network namespace. It captures nothing yet.
    pub(super) fn start(bpffs: &Path, sockets: &[PodSockets]) -> Result<Self, SkLookupError> {
        let mut ebpf = EbpfLoader::new().load(OBJECT)?;
        let mut take = |name: &'static str| ebpf.take_map(name).ok_or(SkLookupError::Missing(name));
        let ipv4 = LpmTrie::try_from(take(abi::CAPTURED)?)?;
        let ipv6 = LpmTrie::try_from(take(abi::CAPTURED6)?)?;
        let listeners: Map = take(abi::LISTENERS)?;
        let mut listeners = SockMap::try_from(listeners)?;
        for sockets in sockets {
            let (tcp, udp) = if sockets.address.is_ipv4() {
                (CaptureSocket::Tcp4, CaptureSocket::Udp4)
            } else {
                (CaptureSocket::Tcp6, CaptureSocket::Udp6)
            };
            listeners.set(tcp as u32, &sockets.tcp, 0)?;
            listeners.set(udp as u32, &sockets.udp, 0)?;
        }
        let program = ebpf.program_mut(PROGRAM).ok_or(SkLookupError::Missing(PROGRAM))?;
        let program: &mut SkLookup = program.try_into()?;
        program.load()?;
        let link = program.attach(File::open(NAMESPACE)?)?;
        let link = program.take_link(link)?;
        let pin = pin(bpffs)?;
        Ok(Self { ipv4, ipv6, _listeners: listeners, link: Some(link.into()), pin, pinned: false, _ebpf: ebpf })
    }

    /// Captures a range.
    pub(super) fn add(&mut self, range: Cidr) -> Result<(), SkLookupError> {
        let prefix = u32::from(range.prefix());
        match range.network() {
            IpAddr::V4(address) => self.ipv4.insert(&Key::new(prefix, address.octets()), 1, 0)?,
            IpAddr::V6(address) => self.ipv6.insert(&Key::new(prefix, address.octets()), 1, 0)?,
        }
        Ok(())
    }

    /// Leaves a range alone again.
    pub(super) fn remove(&mut self, range: Cidr) -> Result<(), SkLookupError> {
        let prefix = u32::from(range.prefix());
        match range.network() {
            IpAddr::V4(address) => self.ipv4.remove(&Key::new(prefix, address.octets()))?,
            IpAddr::V6(address) => self.ipv6.remove(&Key::new(prefix, address.octets()))?,
        }
        Ok(())
    }

    /// Makes it outlive this process, in place of what an earlier agent left. Returns whether it does.
    pub(super) fn pin(&mut self) -> bool {
        let Some(link) = self.link.take() else { return self.pinned };
        let pinned = replace_pin(&self.pin).and_then(|()| link.pin(&self.pin).map_err(io::Error::other));
        match pinned {
            Ok(_) => self.pinned = true,
            Err(error) => {
                tracing::warn!(pin = %self.pin.display(), %error, "while the agent is away, its host answers for pods of other networks");
            }
        }
        self.pinned
    }

    /// Whether it outlives this process.
    pub(super) fn is_pinned(&self) -> bool {
        self.pinned
    }
}

/// Detaches what an agent pinned for this network namespace.
pub(super) fn unpin(bpffs: &Path) -> io::Result<()> {
    replace_pin(&pin(bpffs)?)
}

/// One for each network namespace.
fn pin(bpffs: &Path) -> io::Result<PathBuf> {
    let number = fs::metadata(NAMESPACE)?.ino();
    Ok(bpffs.join(pins::OURS).join(format!("capture-{number}")))
}

/// Makes room for a pin.
fn replace_pin(pin: &Path) -> io::Result<()> {
    if let Some(folder) = pin.parent() {
        // Not on any other filesystem: the datapath has mounted it, if that can be done.
        let bpffs = folder.parent().unwrap_or(folder);
        if !pins::is_bpffs(bpffs) {
            return Err(io::Error::other("not a BPF filesystem"));
        }
        fs::create_dir_all(folder)?;
    }
    match pins::detach(pin) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        // Its namespace is gone, for example.
        Err(error) => tracing::debug!(pin = %pin.display(), %error, "not detached"),
        Ok(()) => {}
    }
    fs::remove_file(pin)
}
