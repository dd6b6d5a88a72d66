//! Pod ranges for Nodes: each new Node gets a /24 of the cluster's pod range, for as long as it exists.

use std::{
    collections::{BTreeSet, HashMap},
    fmt,
    net::Ipv4Addr,
    str::FromStr,
    sync::Arc,
    time::Duration,
};

use k8s_openapi::api::core::v1::Node;
use kube::{
    Api, ResourceExt,
    api::{Patch, PatchParams},
};
use parking_lot::Mutex;
use serde_json::json;
use tokio::task::JoinHandle;

use super::{
    Context,
    cache::Name,
    queue::WorkQueue,
    worker::{self, Failure, Next, ignore_not_found},
};

const CONTROLLER: &str = "node-ipam";
/// Prefix length of a node's range (Kubernetes' default for IPv4).
const NODE_PREFIX: u8 = 24;
/// How often a Node is tried again when the range is exhausted.
const EXHAUSTED_RETRY: Duration = Duration::from_secs(30);

/// An IPv4 range of which nodes get /24 blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PodRange {
    base: u32,
    prefix: u8,
}

/// A pod range that can't be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no IPv4 range for pods: write an address and a prefix from /8 to /24, for example 10.244.0.0/16")]
pub struct BadPodRange(String);

impl PodRange {
    /// 10.244.0.0/16, as most clusters have it.
    pub const FALLBACK: Self = Self { base: 0x0af4_0000, prefix: 16 };

    fn blocks(self) -> impl Iterator<Item = String> {
        let count = 1_u32 << (NODE_PREFIX - self.prefix);
        (0..count).map(move |number| {
            let base = self.base + (number << (32 - NODE_PREFIX));
            format!("{}/{NODE_PREFIX}", Ipv4Addr::from(base))
        })
    }

    /// The first free block; `taken` may contain ranges of any size.
    fn first_free(self, taken: &BTreeSet<String>) -> Option<String> {
        let spans: Vec<(u32, u32)> = taken.iter().filter_map(|range| span(range)).collect();
        self.blocks().find(|block| {
            let Some((first, last)) = span(block) else { return false };
            spans.iter().all(|(low, high)| last < *low || first > *high)
        })
    }
}

/// First and last address of an IPv4 range.
fn span(range: &str) -> Option<(u32, u32)> {
    let (address, prefix) = range.split_once('/')?;
    let address = u32::from(address.parse::<Ipv4Addr>().ok()?);
    let prefix: u32 = prefix.parse().ok().filter(|prefix| *prefix <= 32)?;
    let mask = u32::MAX.checked_shl(32 - prefix).unwrap_or(0);
    Some((address & mask, address | !mask))
}

impl FromStr for PodRange {
    type Err = BadPodRange;

    fn from_str(text: &str) -> Result<Self, BadPodRange> {
        let bad = || BadPodRange(text.to_owned());
        let (address, prefix) = text.split_once('/').ok_or_else(bad)?;
        let base = u32::from(address.parse::<Ipv4Addr>().map_err(|_| bad())?);
        let prefix: u8 = prefix.parse().map_err(|_| bad())?;
        if !(8..=NODE_PREFIX).contains(&prefix) || span(text).is_none_or(|(first, _)| first != base) {
            return Err(bad());
        }
        Ok(Self { base, prefix })
    }
}

impl fmt::Display for PodRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", Ipv4Addr::from(self.base), self.prefix)
    }
}

pub(crate) fn start(context: &Arc<Context>) -> Vec<JoinHandle<()>> {
    let queue: Arc<WorkQueue<Name>> = worker::queue(context, CONTROLLER);
    let target = Arc::clone(&queue);
    context.nodes.on_change(move |_, new| {
        if let Some(node) = new.filter(|node| ranges(node).is_empty()) {
            target.add(Name::of(&**node));
        }
    });
    let synced = {
        let context = Arc::clone(context);
        async move { context.nodes.synced().await }
    };
    let shared = Arc::clone(context);
    // What this process gave out, by node uid: the cache may not show it yet.
    let given: Arc<Mutex<HashMap<String, String>>> = Arc::default();
    let reconcile = move |name: Name| {
        let (context, given) = (Arc::clone(&shared), Arc::clone(&given));
        async move { reconcile(&context, &given, &name).await }
    };
    // One worker: two nodes can't be offered the same block.
    vec![worker::run(context, CONTROLLER, queue, 1, synced, reconcile)]
}

fn ranges(node: &Node) -> BTreeSet<String> {
    let spec = node.spec.as_ref();
    let listed = spec.and_then(|spec| spec.pod_cidrs.clone()).unwrap_or_default();
    listed.into_iter().chain(spec.and_then(|spec| spec.pod_cidr.clone())).filter(|range| !range.is_empty()).collect()
}

async fn reconcile(context: &Context, given: &Mutex<HashMap<String, String>>, name: &Name) -> Result<Next, Failure> {
    let Some(node) = context.nodes.get(name).filter(|node| ranges(node).is_empty()) else {
        return Ok(Next::OnChange);
    };
    let nodes = context.nodes.all();
    let uid = node.uid().unwrap_or_default();
    let block = {
        let mut given = given.lock();
        given.retain(|uid, _| nodes.iter().any(|node| node.uid().as_ref() == Some(uid)));
        let taken = nodes.iter().flat_map(|node| ranges(node)).chain(given.values().cloned()).collect();
        given.get(&uid).cloned().or_else(|| context.config.pod_range.first_free(&taken))
    };
    let Some(block) = block else {
        let message = format!("every /{NODE_PREFIX} of {} is in use", context.config.pod_range);
        tracing::warn!(node = %name, "{message}");
        context.recorder.warning(CONTROLLER, &*node, "CIDRNotAvailable", message);
        return Ok(Next::After(EXHAUSTED_RETRY));
    };
    given.lock().insert(uid.clone(), block.clone());
    let patch = json!({
        "metadata": {"uid": uid, "resourceVersion": node.metadata.resource_version},
        "spec": {"podCIDR": block, "podCIDRs": [block]},
    });
    let api: Api<Node> = Api::all(context.client.clone());
    let patched = ignore_not_found(api.patch(&name.name, &PatchParams::default(), &Patch::Merge(&patch)).await)
        .map_err(Failure::api("give a Node its pod range"))?;
    if let Some(patched) = patched {
        tracing::info!(node = %name, range = block, "pod range given");
        context.nodes.wrote(patched);
    }
    Ok(Next::OnChange)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_get_different_blocks_and_a_freed_one_is_used_again() {
        let range: PodRange = "10.244.0.0/16".parse().unwrap();
        let mut taken = BTreeSet::new();
        for _ in 0..3 {
            let block = range.first_free(&taken).unwrap();
            assert!(taken.insert(block));
        }
        assert_eq!(taken.iter().next_back().map(String::as_str), Some("10.244.2.0/24"));
        taken.remove("10.244.1.0/24");
        assert_eq!(range.first_free(&taken).as_deref(), Some("10.244.1.0/24"));
    }

    #[test]
    fn a_range_given_by_hand_is_stepped_over_whatever_its_size() {
        let range: PodRange = "10.0.0.0/22".parse().unwrap();
        let taken = BTreeSet::from(["10.0.0.0/23".to_owned(), "10.0.2.128/25".to_owned()]);
        assert_eq!(range.first_free(&taken).as_deref(), Some("10.0.3.0/24"));
        let full = BTreeSet::from(["10.0.0.0/8".to_owned()]);
        assert_eq!(range.first_free(&full), None);
    }

    #[test]
    fn a_range_that_no_node_fits_in_is_refused() {
        for bad in ["10.0.0.0", "10.0.0.0/25", "10.0.0.1/16", "fd00::/64", "x/16", "10.0.0.0/4"] {
            assert!(bad.parse::<PodRange>().is_err(), "{bad}");
        }
    }
}
