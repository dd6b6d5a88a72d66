//! Node-local addresses: one IPv4 address for each Service port that the agent proxies, and one IPv6 address at the same place
//! of its range, so that a listener knows the Service from the local address of a connection, with no race and no lookup of
//! conntrack.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fmt,
    hash::{DefaultHasher, Hash, Hasher},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddrV4, SocketAddrV6},
    path::{Path, PathBuf},
    str::FromStr,
    sync::Arc,
};

use arc_swap::ArcSwapOption;
use edgemesh_mesh::{
    cidr::Cidr,
    model::{Protocol, ServiceName, ServicePort},
};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

/// Port on every node-local address (but the DNS one) at which the proxied path listens, TCP and UDP.
pub const PROXIED_PORT: u16 = 15001;
/// The largest allocation file that is read, in bytes: 65,536 entries with names of ordinary length.
const MAX_FILE_BYTES: u64 = 32 << 20;

/// A range of IPv4 addresses, `/16` to `/28`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Ipv4Range {
    base: Ipv4Addr,
    prefix: u8,
}

impl Ipv4Range {
    /// First address of the range; it is not given out.
    pub fn base(self) -> Ipv4Addr {
        self.base
    }

    /// Length of the network prefix, in bits.
    pub fn prefix(self) -> u8 {
        self.prefix
    }

    /// The address of the node's DNS listener: the first after the base.
    pub fn dns_address(self) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.base.to_bits() + 1)
    }

    /// Whether the address is in the range.
    pub fn contains(self, address: Ipv4Addr) -> bool {
        self.offset(address).is_some()
    }

    /// How many addresses the range has.
    fn len(self) -> u32 {
        1 << (32 - u32::from(self.prefix))
    }

    fn offset(self, address: Ipv4Addr) -> Option<u32> {
        address.to_bits().checked_sub(self.base.to_bits()).filter(|&offset| offset < self.len())
    }
}

impl Default for Ipv4Range {
    /// [`edgemesh_api::names::DEFAULT_NODE_LOCAL_CIDR`].
    fn default() -> Self {
        Self { base: Ipv4Addr::new(169, 254, 64, 0), prefix: 18 }
    }
}

impl fmt::Display for Ipv4Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.base, self.prefix)
    }
}

impl From<Ipv4Range> for String {
    fn from(range: Ipv4Range) -> Self {
        range.to_string()
    }
}

impl TryFrom<String> for Ipv4Range {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl FromStr for Ipv4Range {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wanted = || format!("`{text}` must be an IPv4 range such as 169.254.64.0/18");
        let (base, prefix) = text.split_once('/').ok_or_else(wanted)?;
        let base: Ipv4Addr = base.parse().map_err(|_| wanted())?;
        let prefix: u8 = prefix.parse().map_err(|_| wanted())?;
        if !(16..=28).contains(&prefix) {
            return Err(format!("`{text}` must have a prefix from /16 to /28"));
        }
        let range = Self { base, prefix };
        if base.to_bits() & (range.len() - 1) != 0 {
            return Err(format!("`{text}` must begin at a multiple of its size"));
        }
        Ok(range)
    }
}

/// A range of 65,536 IPv6 addresses: as many as the largest [`Ipv4Range`] has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Ipv6Range {
    base: Ipv6Addr,
}

impl Ipv6Range {
    /// Its length of the network prefix, in bits.
    pub const PREFIX: u8 = 112;

    /// First address of the range; it is not given out.
    pub fn base(self) -> Ipv6Addr {
        self.base
    }

    /// Address on which the agent answers DNS by IPv6; it is not given out.
    pub fn dns_address(self) -> Ipv6Addr {
        self.at(1)
    }

    /// Whether the address is in the range.
    pub fn contains(self, address: Ipv6Addr) -> bool {
        self.offset(address).is_some()
    }

    fn offset(self, address: Ipv6Addr) -> Option<u32> {
        let offset = address.to_bits().checked_sub(self.base.to_bits())?;
        u16::try_from(offset).ok().map(u32::from)
    }

    fn at(self, offset: u32) -> Ipv6Addr {
        Ipv6Addr::from_bits(self.base.to_bits() + u128::from(offset))
    }
}

impl Default for Ipv6Range {
    /// A unique local prefix (RFC 4193) of the mesh: the bytes after `fd` spell `edgemesh`.
    fn default() -> Self {
        Self { base: Ipv6Addr::new(0xfd65, 0x6467, 0x656d, 0x6573, 0x6800, 0, 0, 0) }
    }
}

impl fmt::Display for Ipv6Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.base, Self::PREFIX)
    }
}

impl From<Ipv6Range> for String {
    fn from(range: Ipv6Range) -> Self {
        range.to_string()
    }
}

impl TryFrom<String> for Ipv6Range {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl FromStr for Ipv6Range {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wanted = || format!("`{text}` must be an IPv6 range such as {}", Self::default());
        let (base, prefix) = text.split_once('/').ok_or_else(wanted)?;
        let range = Self { base: base.parse().map_err(|_| wanted())? };
        if prefix != Self::PREFIX.to_string() {
            return Err(format!("`{text}` must have the prefix /{}", Self::PREFIX));
        }
        if range.base.to_bits() & u128::from(u16::MAX) != 0 {
            return Err(format!("`{text}` must begin at a multiple of its size"));
        }
        Ok(range)
    }
}

/// One port of a Service, by the names that stay the same when its number or addresses change.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub struct ServicePortName {
    /// The Service.
    pub service: ServiceName,
    /// The port's name; empty for the only port of a Service.
    pub port: Arc<str>,
    /// The port's protocol.
    pub protocol: Protocol,
}

impl From<&ServicePort> for ServicePortName {
    fn from(port: &ServicePort) -> Self {
        Self { service: port.service.clone(), port: Arc::clone(&port.name), protocol: port.protocol }
    }
}

impl fmt::Display for ServicePortName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let protocol = match self.protocol {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
        };
        write!(f, "{}/{}:{}/{protocol}", self.service.namespace, self.service.name, self.port)
    }
}

/// What can go wrong with the allocation's file.
#[derive(Debug, thiserror::Error)]
pub enum AllocatorError {
    /// The file can't be read or written.
    #[error("{path}: {source}")]
    Io {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The range has no free address left.
    #[error("all {0} node-local addresses are in use; widen nodeLocalCidr")]
    Full(u32),
}

/// Which node-local address belongs to which Service port. An address keeps its Service port across restarts, and is
/// given to another one only when the range is used up, because sockets may still be connected to it.
#[derive(Debug)]
pub struct Allocator {
    range: Ipv4Range,
    /// None on a host that has no IPv6.
    ipv6: Option<Ipv6Range>,
    /// By offset in the range. Readers take no lock.
    slots: Box<[ArcSwapOption<ServicePortName>]>,
    writer: Mutex<Writer>,
}

#[derive(Debug, Default)]
struct Writer {
    offsets: HashMap<Arc<ServicePortName>, u32>,
    path: Option<PathBuf>,
    dirty: bool,
    /// For which generation of the catalog addresses were last taken back because none was left.
    retired_for: Option<u64>,
}

#[derive(Serialize, Deserialize)]
struct Entry {
    namespace: String,
    name: String,
    port: String,
    protocol: Protocol,
}

impl Allocator {
    /// An allocator that remembers nothing across restarts.
    pub fn in_memory(range: Ipv4Range) -> Self {
        let slots = (0..range.len()).map(|_| ArcSwapOption::empty()).collect();
        Self { range, ipv6: None, slots, writer: Mutex::default() }
    }

    /// The same, with IPv6 addresses too.
    #[must_use]
    pub fn with_ipv6(self, range: Ipv6Range) -> Self {
        Self { ipv6: Some(range), ..self }
    }

    /// An allocator that is kept in a file. Entries that are outside of the range are dropped, and so is a file that
    /// is not ours: the allocation then begins anew.
    ///
    /// # Errors
    /// When the file is there and can't be read.
    pub fn open(range: Ipv4Range, path: &Path) -> Result<Self, AllocatorError> {
        let allocator = Self::in_memory(range);
        let entries = read_entries(path)?;
        {
            let mut writer = allocator.writer.lock();
            writer.path = Some(path.to_owned());
            for (address, entry) in entries {
                let name = ServicePortName {
                    service: ServiceName { namespace: entry.namespace.into(), name: entry.name.into() },
                    port: entry.port.into(),
                    protocol: entry.protocol,
                };
                if let Some(offset) = range.offset(address).filter(|&offset| allocator.usable(offset)) {
                    allocator.place(&mut writer, Arc::new(name), offset);
                }
            }
            writer.dirty = false;
        }
        Ok(allocator)
    }

    /// The range of an address' family that is allocated from.
    pub fn range_of(&self, family: IpAddr) -> Option<Cidr> {
        match family {
            IpAddr::V4(_) => Cidr::new(self.range.base.into(), self.range.prefix),
            IpAddr::V6(_) => Cidr::new(self.ipv6?.base.into(), Ipv6Range::PREFIX),
        }
    }

    /// The Service port to which a local address belongs. Lock-free.
    pub fn service_of(&self, address: impl Into<IpAddr>) -> Option<Arc<ServicePortName>> {
        let offset = match address.into() {
            IpAddr::V4(address) => self.range.offset(address),
            IpAddr::V6(address) => self.ipv6?.offset(address),
        };
        let offset = usize::try_from(offset?).ok()?;
        self.slots.get(offset)?.load_full()
    }

    /// The listener address of a Service port, allotted if it has none yet.
    ///
    /// # Errors
    /// When no address is left; see [`Allocator::retire_once`].
    pub fn listener(&self, name: &ServicePortName) -> Result<SocketAddrV4, AllocatorError> {
        let offset = self.offset(name)?;
        Ok(SocketAddrV4::new(Ipv4Addr::from_bits(self.range.base.to_bits() + offset), PROXIED_PORT))
    }

    /// As [`Allocator::listener`], the IPv6 address; none on a host without IPv6.
    ///
    /// # Errors
    /// As for [`Allocator::listener`].
    pub fn listener6(&self, name: &ServicePortName) -> Result<Option<SocketAddrV6>, AllocatorError> {
        let Some(range) = self.ipv6 else { return Ok(None) };
        Ok(Some(SocketAddrV6::new(range.at(self.offset(name)?), PROXIED_PORT, 0, 0)))
    }

    fn offset(&self, name: &ServicePortName) -> Result<u32, AllocatorError> {
        let mut writer = self.writer.lock();
        Ok(match writer.offsets.get(name) {
            Some(&offset) => offset,
            None => {
                let offset = self.free_offset(name).ok_or(AllocatorError::Full(self.range.len()))?;
                self.place(&mut writer, Arc::new(name.clone()), offset);
                offset
            }
        })
    }

    /// Whether less than a quarter of the range is free.
    pub fn is_short(&self) -> bool {
        self.writer.lock().offsets.len() * 4 >= self.slots.len() * 3
    }

    /// As [`Allocator::retire`], once for each generation of the catalog: where the Service ports that there are have all
    /// addresses, it is not worth looking again for each that wants one.
    pub fn retire_once(&self, generation: u64, live: impl FnOnce() -> HashSet<ServicePortName>) -> bool {
        if self.writer.lock().retired_for.replace(generation) == Some(generation) {
            return false;
        }
        self.retire(&live())
    }

    /// Takes the addresses of all Service ports but `live` back, when less than a quarter of the range is free. Returns
    /// whether it took any.
    pub fn retire(&self, live: &HashSet<ServicePortName>) -> bool {
        if !self.is_short() {
            return false;
        }
        let mut writer = self.writer.lock();
        let used = writer.offsets.len();
        writer.offsets.retain(|name, &mut offset| {
            let keep = live.contains(&**name);
            if !keep && let Some(slot) = self.slots.get(offset as usize) {
                slot.store(None);
            }
            keep
        });
        let took = writer.offsets.len() != used;
        writer.dirty |= took;
        took
    }

    /// Writes the file if something changed since the last time. Blocks on the disk.
    ///
    /// # Errors
    /// When it can't be written; the next call tries again.
    pub fn save(&self) -> Result<(), AllocatorError> {
        let (path, text) = {
            let mut writer = self.writer.lock();
            let Some(path) = writer.path.clone().filter(|_| writer.dirty) else { return Ok(()) };
            let entries: BTreeMap<Ipv4Addr, Entry> = writer
                .offsets
                .iter()
                .map(|(name, offset)| {
                    let entry = Entry {
                        namespace: name.service.namespace.to_string(),
                        name: name.service.name.to_string(),
                        port: name.port.to_string(),
                        protocol: name.protocol,
                    };
                    (Ipv4Addr::from_bits(self.range.base.to_bits() + offset), entry)
                })
                .collect();
            writer.dirty = false;
            (path, serde_json::to_vec_pretty(&entries))
        };
        let written = text.map_err(std::io::Error::from).and_then(|text| {
            let part = path.with_extension("json.part");
            std::fs::write(&part, text)?;
            std::fs::File::open(&part)?.sync_all()?;
            std::fs::rename(&part, &path)
        });
        written.map_err(|source| {
            self.writer.lock().dirty = true;
            AllocatorError::Io { path, source }
        })
    }

    fn usable(&self, offset: u32) -> bool {
        // The base and the broadcast address look special to people and to some tools; the first is DNS.
        offset >= 2 && offset < self.range.len() - 1
    }

    fn place(&self, writer: &mut Writer, name: Arc<ServicePortName>, offset: u32) {
        if let Some(slot) = self.slots.get(offset as usize) {
            slot.store(Some(Arc::clone(&name)));
            writer.offsets.insert(name, offset);
            writer.dirty = true;
        }
    }

    /// The address that the name's hash picks, or the next free one: so most Service ports get the same address again
    /// even when the file is lost.
    fn free_offset(&self, name: &ServicePortName) -> Option<u32> {
        let mut hasher = DefaultHasher::new();
        name.hash(&mut hasher);
        let len = self.range.len();
        let start = u32::try_from(hasher.finish() % u64::from(len)).ok()?;
        (0..len)
            .map(|step| (start + step) % len)
            .find(|&offset| self.usable(offset) && self.slots[offset as usize].load().is_none())
    }
}

fn read_entries(path: &Path) -> Result<BTreeMap<Ipv4Addr, Entry>, AllocatorError> {
    let error = |source| AllocatorError::Io { path: path.to_owned(), source };
    match std::fs::metadata(path) {
        Ok(found) if found.len() <= MAX_FILE_BYTES => {}
        Ok(found) => {
            tracing::warn!(path = %path.display(), bytes = found.len(), "too large for a node-local allocation: beginning anew");
            return Ok(BTreeMap::new());
        }
        Err(missing) if missing.kind() == std::io::ErrorKind::NotFound => return Ok(BTreeMap::new()),
        Err(other) => return Err(error(other)),
    }
    let text = std::fs::read(path).map_err(error)?;
    Ok(serde_json::from_slice(&text).unwrap_or_else(|reason| {
        tracing::warn!(path = %path.display(), %reason, "not a node-local allocation: beginning anew");
        BTreeMap::new()
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(name: &str) -> ServicePortName {
        ServicePortName {
            service: ServiceName { namespace: "ns".into(), name: name.into() },
            port: "http".into(),
            protocol: Protocol::Tcp,
        }
    }

    fn small() -> Ipv4Range {
        "169.254.64.0/28".parse().unwrap()
    }

    #[test]
    fn an_address_leads_back_to_its_service_port_and_dns_is_never_given_out() {
        let allocator = Allocator::in_memory(small());
        let mut seen = HashSet::new();
        for i in 0..13 {
            let name = name(&format!("s{i}"));
            let address = allocator.listener(&name).unwrap();
            assert_eq!(allocator.listener(&name).unwrap(), address, "stable");
            assert_eq!(*allocator.service_of(*address.ip()).unwrap(), name);
            assert!(seen.insert(address));
            assert_ne!(*address.ip(), small().dns_address());
        }
        assert!(matches!(allocator.listener(&name("more")), Err(AllocatorError::Full(16))));
        assert!(allocator.service_of(Ipv4Addr::new(169, 254, 65, 1)).is_none());
    }

    #[test]
    fn both_addresses_of_a_service_port_lead_back_to_it() {
        let without = Allocator::in_memory(small());
        assert_eq!(without.listener6(&name("web")).unwrap(), None);
        let allocator = Allocator::in_memory(small()).with_ipv6(Ipv6Range::default());
        let (v4, v6) = (allocator.listener(&name("web")).unwrap(), allocator.listener6(&name("web")).unwrap().unwrap());
        assert_eq!(u128::from(v4.ip().to_bits() & 0xf), v6.ip().to_bits() & 0xffff, "the same place in the range");
        assert_eq!(*allocator.service_of(*v4.ip()).unwrap(), name("web"));
        assert_eq!(*allocator.service_of(*v6.ip()).unwrap(), name("web"));
        assert!(allocator.service_of(Ipv6Addr::from_bits(v6.ip().to_bits() + 0x1_0000)).is_none());
        assert!(allocator.service_of(Ipv6Addr::from_bits(Ipv6Range::default().base().to_bits() + 0xffff)).is_none());
    }

    #[test]
    fn ipv6_ranges_have_one_size() {
        assert_eq!("fd00:1::/112".parse::<Ipv6Range>().unwrap().to_string(), "fd00:1::/112");
        for bad in ["fd00:1::/64", "fd00:1::1/112", "fd00:1::", "169.254.64.0/112", "x/112"] {
            assert!(bad.parse::<Ipv6Range>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_service_port_keeps_its_address_across_restarts() {
        let dir = std::env::temp_dir().join(format!("datapath-node-local-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let path = dir.join("node-local.json");
        let first = Allocator::open(small(), &path).unwrap();
        let addresses: Vec<_> = (0..10).map(|i| first.listener(&name(&format!("s{i}"))).unwrap()).collect();
        first.save().unwrap();
        let second = Allocator::open(small(), &path).unwrap();
        // In another order, so that only the file can bring them back.
        for i in (0..10).rev() {
            assert_eq!(second.listener(&name(&format!("s{i}"))).unwrap(), addresses[i]);
        }
        std::fs::write(&path, "garbage").unwrap();
        assert!(Allocator::open(small(), &path).unwrap().service_of(*addresses[0].ip()).is_none());
        std::fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn addresses_of_services_that_are_gone_are_reused_only_when_the_range_runs_out() {
        let allocator = Allocator::in_memory(small());
        let old = name("old");
        let address = allocator.listener(&old).unwrap();
        allocator.retire(&HashSet::new());
        assert!(!allocator.is_short());
        assert!(allocator.service_of(*address.ip()).is_some(), "plenty is free");
        let live: HashSet<_> = (0..12).map(|i| name(&format!("s{i}"))).collect();
        for name in &live {
            allocator.listener(name).unwrap();
        }
        allocator.retire(&live);
        assert!(allocator.service_of(*address.ip()).is_none_or(|found| *found != old));
        assert!(live.iter().all(|name| allocator.service_of(*allocator.listener(name).unwrap().ip()).is_some()));
    }
}
