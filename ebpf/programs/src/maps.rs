//! The maps that the agent fills and reads.

use aya_ebpf::{
    Global,
    macros::map,
    maps::{Array, HashMap, LruHashMap, PerCpuArray, PerCpuHashMap, RingBuf},
};
use edgemesh_ebpf_abi::{
    Affinity, AffinityKey, Calls, Counter, Frontend, FrontendKey, FrontendKey6, MAX_AFFINITIES, MAX_PEERS, MAX_PEERS6,
    MAX_UNCONNECTED_PEERS, MAX_UNCONNECTED_PEERS6, Peer, Peer6, PeerKey, PeerKey6, SocketAddress, SocketAddress6,
    UNANSWERED_BYTES,
};

/// Elements are allocated when they are needed: most nodes have far fewer Services than the map may hold.
const BPF_F_NO_PREALLOC: u32 = 1;

/// The size of a map that the loader gives another one.
const SET_WHEN_LOADED: u32 = 1;

/// Service addresses.
#[map]
pub static FRONTENDS: HashMap<FrontendKey, Frontend> = HashMap::with_max_entries(SET_WHEN_LOADED, BPF_F_NO_PREALLOC);

/// Backends of all frontends, in [`edgemesh_ebpf_abi::Backend`]'s form; a frontend names its first and how many follow.
#[map]
pub static BACKENDS: Array<u64> = Array::with_max_entries(SET_WHEN_LOADED, 0);

/// To whom a socket was connected by a Service. By the socket alone, since one that is closed may have no peer any more.
#[map]
pub static PEERS: LruHashMap<u64, Peer> = LruHashMap::with_max_entries(MAX_PEERS, 0);

/// The Service address that an unconnected socket named when it sent to a backend. They are many and end unseen, so they must not take the places of connected ones.
#[map]
pub static UNCONN_PEERS: LruHashMap<PeerKey, SocketAddress> = LruHashMap::with_max_entries(MAX_UNCONNECTED_PEERS, 0);

/// As [`FRONTENDS`], for IPv6.
#[map]
pub static FRONTENDS6: HashMap<FrontendKey6, Frontend> = HashMap::with_max_entries(SET_WHEN_LOADED, BPF_F_NO_PREALLOC);

/// As [`BACKENDS`], in [`edgemesh_ebpf_abi::Backend6`]'s form.
#[map]
pub static BACKENDS6: Array<[u64; 3]> = Array::with_max_entries(SET_WHEN_LOADED, 0);

/// As [`PEERS`], for IPv6.
#[map]
pub static PEERS6: LruHashMap<u64, Peer6> = LruHashMap::with_max_entries(MAX_PEERS6, 0);

/// As [`UNCONN_PEERS`], for IPv6.
#[map]
pub static UNCONN_PEERS6: LruHashMap<PeerKey6, SocketAddress6> =
    LruHashMap::with_max_entries(MAX_UNCONNECTED_PEERS6, 0);

/// The backends that clients keep.
#[map]
pub static AFFINITIES: LruHashMap<AffinityKey, Affinity> = LruHashMap::with_max_entries(MAX_AFFINITIES, 0);

/// What became of calls, by Service address. Addresses that nobody calls have no entry.
#[map]
pub static CALLS: PerCpuHashMap<FrontendKey, Calls> =
    PerCpuHashMap::with_max_entries(SET_WHEN_LOADED, BPF_F_NO_PREALLOC);

/// As [`CALLS`], for IPv6.
#[map]
pub static CALLS6: PerCpuHashMap<FrontendKey6, Calls> =
    PerCpuHashMap::with_max_entries(SET_WHEN_LOADED, BPF_F_NO_PREALLOC);

/// Backends that left a SYN unanswered. Not pinned: it is for the agent that loaded the programs.
#[map]
pub static UNANSWERED: RingBuf = RingBuf::with_byte_size(UNANSWERED_BYTES, 0);

/// The cookie of the network namespace in which the agent is; set when the programs are loaded.
#[unsafe(no_mangle)]
pub static HOST_NETNS: Global<u64> = Global::new(0);

/// Where nobody listens, as sockets of pods reach it; set when the programs are loaded.
#[unsafe(no_mangle)]
pub static NOWHERE: Global<u64> = Global::new(0);

/// As [`NOWHERE`], for IPv6.
#[unsafe(no_mangle)]
pub static NOWHERE6: Global<[u64; 3]> = Global::new([0; 3]);

#[map]
static COUNTERS: PerCpuArray<u64> = PerCpuArray::with_max_entries(Counter::ALL.len() as u32, 0);

/// Counts one.
#[inline(always)]
pub fn count(counter: Counter) {
    if let Some(value) = COUNTERS.get_ptr_mut(counter as u32) {
        // SAFETY: the pointer is to this CPU's own value, and a program is not moved to another CPU while it runs. A
        // program that preempts it on the same CPU can lose a count, which does no harm.
        unsafe { *value += 1 };
    }
}

/// Adds one call to those of a Service address.
#[inline(always)]
pub fn count_call<K>(map: &PerCpuHashMap<K, Calls>, key: &K, call: Calls) {
    match map.get_ptr_mut(key) {
        // SAFETY: as above; an element that is removed and reused at this moment gets a count too many.
        Some(calls) => unsafe {
            (*calls).sent += call.sent;
            (*calls).refused += call.refused;
        },
        // Another CPU may have made the element meanwhile: this sets the value of this one. A full map loses the count.
        None => drop(map.insert(key, &call, 0)),
    }
}
