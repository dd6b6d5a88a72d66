//! `sessionAffinity: ClientIP`: a client keeps its backend while that is one of the Service port's, until it has not
//! called for the timeout (Kubernetes, "Virtual IPs and Service Proxies": session affinity).

use aya_ebpf::helpers::generated::bpf_ktime_get_coarse_ns;
use edgemesh_ebpf_abi::{Affinity, AffinityKey, Frontend, FrontendKey6, MAX_AFFINITY_BACKENDS, SocketAddress6};

use crate::{families::Family, maps::AFFINITIES, translate::backend};

/// The backend of a client: the one that it has, or else the one that `random` picks, which it has from now on. Nothing if
/// the slots are of another generation than the frontend.
#[inline(always)]
pub fn keep<F: Family>(
    netns: u64,
    service: F::Address,
    protocol: u8,
    frontend: Frontend,
    random: u32,
) -> Option<F::Address> {
    let timeout = F::timeout(frontend.first() + u32::from(frontend.count()), frontend.generation())?;
    let key = AffinityKey { netns, frontend: FrontendKey6::new(service.into(), protocol) };
    // SAFETY: the helper has no conditions.
    let now = unsafe { bpf_ktime_get_coarse_ns() };
    if let Some(known) = AFFINITIES.get_ptr_mut(&key) {
        // SAFETY: an element of the map is memory that lives as long as the program runs. If it is evicted and reused at
        // this moment, the backend that is read is still compared with the Service's own.
        let (kept, used) = unsafe { ((&raw const (*known).backend).read(), (&raw const (*known).used).read()) };
        if now.wrapping_sub(used) < u64::from(timeout) * 1_000_000_000
            && let Some(found) = find::<F>(frontend, kept)?
        {
            // SAFETY: as above; a client whose time is refreshed by mistake keeps its backend a little longer.
            unsafe { (&raw mut (*known).used).write(now) };
            return Some(found);
        }
    }
    let chosen = backend::<F>(frontend, random)?;
    // Only a full map without anything to evict fails, and then the next connection chooses again.
    let _ = AFFINITIES.insert(&key, &Affinity { backend: chosen.into(), used: now }, 0);
    Some(chosen)
}

/// Looks for an address among a frontend's backends. The outer nothing: the slots are of another generation.
#[inline(always)]
fn find<F: Family>(frontend: Frontend, wanted: SocketAddress6) -> Option<Option<F::Address>> {
    for offset in 0..u32::from(MAX_AFFINITY_BACKENDS) {
        if offset >= u32::from(frontend.count()) {
            break;
        }
        let address = F::backend(frontend.first() + offset, frontend.generation())?;
        if address.into() == wanted {
            return Some(Some(address));
        }
    }
    Some(None)
}
