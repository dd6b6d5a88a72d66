//! What the programs count and remember.

use std::fmt;

use aya::{
    Ebpf,
    maps::{HashMap as BpfHashMap, MapData, PerCpuArray},
};
use edgemesh_ebpf_abi as abi;

use super::ebpf::{EbpfDatapathError, map_error, take_map};

/// What the programs counted since they were loaded, and what they remember.
pub struct Counters {
    counters: PerCpuArray<MapData, u64>,
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
