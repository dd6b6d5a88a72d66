//! What the programs count and remember.

use std::{
    collections::HashMap,
    fmt,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::AsFd as _,
};

use aya::{
    Ebpf,
    maps::{HashMap as BpfHashMap, Map, MapData, PerCpuArray},
};
use edgemesh_ebpf_abi as abi;

use super::{
    ebpf::{EbpfDatapathError, map_error, take_map},
    frontend_counts::{CountsFrontends, FrontendCounts},
    map_batch::PerCpuBatches,
    mode::DatapathError,
    plan::Frontend,
    tables::{Family, V4, V6},
};

/// What the programs counted since they were loaded, and what they remember.
pub struct Counters {
    counters: PerCpuArray<MapData, u64>,
    calls: PerCpuBatches<<V4 as Family>::Key, [u64; 2]>,
    calls6: PerCpuBatches<<V6 as Family>::Key, [u64; 2]>,
    peers: BpfHashMap<MapData, [u64; 2], u64>,
    peers6: BpfHashMap<MapData, [u64; 4], [u64; 3]>,
}

impl fmt::Debug for Counters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(abi::Counter::ALL.map(|counter| (counter, self.get(counter).ok()))).finish()
    }
}

impl Counters {
    /// The maps of an object that was just loaded.
    pub(super) fn take(ebpf: &mut Ebpf) -> Result<Self, EbpfDatapathError> {
        Ok(Self {
            counters: PerCpuArray::try_from(take_map(ebpf, abi::COUNTERS)?).map_err(map_error(abi::COUNTERS))?,
            calls: PerCpuBatches::new(open_again(ebpf, abi::CALLS)?).map_err(map_error(abi::CALLS))?,
            calls6: PerCpuBatches::new(open_again(ebpf, abi::CALLS6)?).map_err(map_error(abi::CALLS6))?,
            peers: BpfHashMap::try_from(take_map(ebpf, abi::PEERS)?).map_err(map_error(abi::PEERS))?,
            peers6: BpfHashMap::try_from(take_map(ebpf, abi::PEERS6)?).map_err(map_error(abi::PEERS6))?,
        })
    }

    /// The value of one counter, over all CPUs.
    ///
    /// # Errors
    /// When the map can't be read.
    pub fn get(&self, counter: abi::Counter) -> Result<u64, EbpfDatapathError> {
        let values = self.counters.get(&(counter as u32), 0).map_err(map_error(abi::COUNTERS))?;
        Ok(values.iter().sum())
    }

    /// How many backends of sockets are remembered with their Service addresses. Walks the whole maps.
    pub fn remembered_peers(&self) -> usize {
        self.peers.keys().take(abi::MAX_PEERS as usize).filter(Result::is_ok).count()
            + self.peers6.keys().take(abi::MAX_PEERS6 as usize).filter(Result::is_ok).count()
    }
}

impl CountsFrontends for Counters {
    fn read(&self) -> Result<HashMap<Frontend, FrontendCounts>, DatapathError> {
        let mut read = HashMap::new();
        read_calls::<V4>(&self.calls, &mut read)?;
        read_calls::<V6>(&self.calls6, &mut read)?;
        Ok(read)
    }
}

fn read_calls<F: Family>(
    calls: &PerCpuBatches<F::Key, [u64; 2]>,
    read: &mut HashMap<Frontend, FrontendCounts>,
) -> Result<(), EbpfDatapathError> {
    let each = |key, values: &[[u64; 2]]| {
        let Some(frontend) = F::frontend(key) else { return };
        let mut counts = FrontendCounts::default();
        for abi::Calls { sent, refused } in values.iter().copied().map(abi::Calls::from_words) {
            counts.flows += sent;
            match frontend.address.port() {
                0 => counts.no_such_port += refused,
                _ => counts.no_endpoint += refused,
            }
        }
        read.insert(frontend, counts);
    };
    calls.each(each).map_err(|source| EbpfDatapathError::Io { path: F::CALLS.into(), source })
}

/// A socket that was sent to a backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Peer {
    /// The socket's cookie.
    pub(super) cookie: u64,
    /// Where it was sent.
    pub(super) backend: SocketAddr,
    /// The Service address that it named.
    pub(super) service: SocketAddr,
}

/// What the programs remember of sockets: another handle on the same maps.
pub(super) struct Peers {
    ipv4: BpfHashMap<MapData, [u64; 2], u64>,
    ipv6: BpfHashMap<MapData, [u64; 4], [u64; 3]>,
}

impl Peers {
    /// Of an object whose maps were not taken yet.
    pub(super) fn open(ebpf: &Ebpf) -> Result<Self, EbpfDatapathError> {
        Ok(Self {
            ipv4: BpfHashMap::try_from(Map::LruHashMap(open_again(ebpf, abi::PEERS)?))
                .map_err(map_error(abi::PEERS))?,
            ipv6: BpfHashMap::try_from(Map::LruHashMap(open_again(ebpf, abi::PEERS6)?))
                .map_err(map_error(abi::PEERS6))?,
        })
    }

    /// Calls `each` for everything that is remembered.
    pub(super) fn each(&self, mut each: impl FnMut(Peer)) {
        // The walk begins anew where the kernel evicts the entry at which it stands: the bound ends it all the same.
        for ([cookie, backend], service) in self.ipv4.iter().take(abi::MAX_PEERS as usize).flatten() {
            let address = |bits| {
                let address = abi::SocketAddress::from_bits(bits);
                SocketAddr::from((Ipv4Addr::from(address.octets()), address.port()))
            };
            each(Peer { cookie, backend: address(backend), service: address(service) });
        }
        for ([cookie, high, low, port], service) in self.ipv6.iter().take(abi::MAX_PEERS6 as usize).flatten() {
            let address = |words| {
                let address = abi::SocketAddress6::from_words(words);
                SocketAddr::from((Ipv6Addr::from(address.octets()), address.port()))
            };
            each(Peer { cookie, backend: address([high, low, port]), service: address(service) });
        }
    }

    /// Forgets a socket.
    pub(super) fn forget(&mut self, cookie: u64, backend: SocketAddr) {
        // What is not there any more was forgotten by the programs.
        match backend {
            SocketAddr::V4(backend) => {
                let address = abi::SocketAddress::new(backend.ip().octets(), backend.port());
                drop(self.ipv4.remove(&[cookie, address.to_bits()]));
            }
            SocketAddr::V6(backend) => {
                let [high, low, port] = abi::SocketAddress6::new(backend.ip().octets(), backend.port()).to_words();
                drop(self.ipv6.remove(&[cookie, high, low, port]));
            }
        }
    }
}

/// Another handle on a hash map of an object.
fn open_again(ebpf: &Ebpf, name: &'static str) -> Result<MapData, EbpfDatapathError> {
    let Some(Map::LruHashMap(map) | Map::PerCpuHashMap(map)) = ebpf.map(name) else {
        return Err(EbpfDatapathError::Missing(name));
    };
    let descriptor = map.fd().as_fd().try_clone_to_owned();
    let descriptor = descriptor.map_err(|source| EbpfDatapathError::Io { path: name.into(), source })?;
    MapData::from_fd(descriptor).map_err(map_error(name))
}
