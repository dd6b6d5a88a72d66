//! What the programs count and remember.

use std::{collections::HashMap, fmt, net::SocketAddr, os::fd::AsFd as _};

use aya::{
    Ebpf, Pod,
    maps::{HashMap as BpfHashMap, Map, MapData, PerCpuArray},
};
use edgemesh_ebpf_abi as abi;

use super::{
    ebpf::{EbpfDatapathError, map_error, take_map},
    frontend_counts::{CountsFrontends, FrontendCounts},
    map_batch::Batches,
    mode::DatapathError,
    plan::Frontend,
    tables::{Family, V4, V6},
};

/// What the programs counted since they were loaded, and what they remember.
pub struct Counters {
    counters: PerCpuArray<MapData, u64>,
    calls: Batches<<V4 as Family>::Key, [u64; 2]>,
    calls6: Batches<<V6 as Family>::Key, [u64; 2]>,
    peers: Batches<u64, [u64; 2]>,
    peers6: Batches<u64, [u64; 6]>,
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
            calls: batches(ebpf, abi::CALLS)?,
            calls6: batches(ebpf, abi::CALLS6)?,
            peers: batches(ebpf, abi::PEERS)?,
            peers6: batches(ebpf, abi::PEERS6)?,
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

    /// How many sockets are remembered that were connected to a backend, with each family one at most. Walks the whole maps.
    ///
    /// # Errors
    /// When a map can't be read.
    pub fn remembered_peers(&self) -> Result<usize, EbpfDatapathError> {
        let mut count = 0;
        each(&self.peers, abi::PEERS, |_, _| count += 1)?;
        each(&self.peers6, abi::PEERS6, |_, _| count += 1)?;
        Ok(count)
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
    calls: &Batches<F::Key, [u64; 2]>,
    read: &mut HashMap<Frontend, FrontendCounts>,
) -> Result<(), EbpfDatapathError> {
    each(calls, F::CALLS, |key, values| {
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
    })
}

/// A socket that was connected to a backend. It may have another peer by now, or none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Peer {
    /// The socket's cookie.
    pub(super) cookie: u64,
    /// Where it was sent.
    pub(super) backend: SocketAddr,
    /// The Service address that it named, and its protocol.
    pub(super) service: Frontend,
}

/// What the programs remember of connected sockets: another handle on the same maps.
pub(super) struct Peers {
    all: Batches<u64, [u64; 2]>,
    all6: Batches<u64, [u64; 6]>,
    ipv4: BpfHashMap<MapData, u64, [u64; 2]>,
    ipv6: BpfHashMap<MapData, u64, [u64; 6]>,
}

impl Peers {
    /// Of an object whose maps were not taken yet.
    pub(super) fn open(ebpf: &Ebpf) -> Result<Self, EbpfDatapathError> {
        Ok(Self {
            all: batches(ebpf, abi::PEERS)?,
            all6: batches(ebpf, abi::PEERS6)?,
            ipv4: BpfHashMap::try_from(Map::LruHashMap(open_again(ebpf, abi::PEERS)?))
                .map_err(map_error(abi::PEERS))?,
            ipv6: BpfHashMap::try_from(Map::LruHashMap(open_again(ebpf, abi::PEERS6)?))
                .map_err(map_error(abi::PEERS6))?,
        })
    }

    /// Calls `found` for everything that is remembered.
    ///
    /// # Errors
    /// When not all of it can be read.
    pub(super) fn each(&self, mut found: impl FnMut(Peer)) -> Result<(), EbpfDatapathError> {
        each(&self.all, abi::PEERS, |cookie, peers| {
            peers.iter().filter_map(|peer| Peer::of(cookie, *peer)).for_each(&mut found);
        })?;
        each(&self.all6, abi::PEERS6, |cookie, peers| {
            peers.iter().filter_map(|peer| Peer::of6(cookie, *peer)).for_each(&mut found);
        })
    }

    /// Forgets a socket, unless it was connected to another backend meanwhile.
    pub(super) fn forget(&mut self, cookie: u64, backend: SocketAddr) {
        let known = match backend {
            SocketAddr::V4(_) => self.ipv4.get(&cookie, 0).ok().and_then(|peer| Peer::of(cookie, peer)),
            SocketAddr::V6(_) => self.ipv6.get(&cookie, 0).ok().and_then(|peer| Peer::of6(cookie, peer)),
        };
        // What is not there any more was forgotten by the programs.
        if known.is_some_and(|known| known.backend == backend) {
            let _ = match backend {
                SocketAddr::V4(_) => self.ipv4.remove(&cookie),
                SocketAddr::V6(_) => self.ipv6.remove(&cookie),
            };
        }
    }
}

impl Peer {
    /// From the words of an [`abi::Peer`].
    fn of(cookie: u64, [backend, service]: [u64; 2]) -> Option<Self> {
        let backend = abi::SocketAddress::from_bits(backend);
        Some(Self { cookie, backend: (backend.octets(), backend.port()).into(), service: V4::frontend(service)? })
    }

    /// From the words of an [`abi::Peer6`].
    fn of6(cookie: u64, [high, low, port, service @ ..]: [u64; 6]) -> Option<Self> {
        let backend = abi::SocketAddress6::from_words([high, low, port]);
        Some(Self { cookie, backend: (backend.octets(), backend.port()).into(), service: V6::frontend(service)? })
    }
}

/// A map of an object, to be read as a whole.
fn batches<K: Pod, V: Pod>(ebpf: &Ebpf, name: &'static str) -> Result<Batches<K, V>, EbpfDatapathError> {
    Batches::new(open_again(ebpf, name)?).map_err(map_error(name))
}

fn each<K: Pod, V: Pod>(
    map: &Batches<K, V>,
    name: &'static str,
    found: impl FnMut(K, &[V]),
) -> Result<(), EbpfDatapathError> {
    map.each(found).map_err(|source| EbpfDatapathError::Io { path: name.into(), source })
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
