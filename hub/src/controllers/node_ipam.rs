//! Pod ranges for Nodes: each new Node gets a block of each of the cluster's pod ranges, for as long as it exists.

use std::{
    collections::{BTreeSet, HashMap},
    fmt,
    str::FromStr,
    sync::Arc,
    time::Duration,
};

use edgemesh_api::cidr::Cidr;
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
/// Prefix length of a node's range of IPv4 (Kubernetes' default, as the other).
const NODE_PREFIX: u8 = 24;
/// The same for IPv6.
const NODE_PREFIX6: u8 = 64;
/// How often a Node is tried again when the range is exhausted.
const EXHAUSTED_RETRY: Duration = Duration::from_secs(30);

/// A range of which nodes get blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PodRange(Cidr);

/// A pod range that can't be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no range for pods: write an address and a prefix, for example 10.244.0.0/16 (IPv4: /8 to /24) or fd00:10:244::/48 (IPv6: /40 to /64)"
)]
pub struct BadPodRange(String);

impl PodRange {
    /// Prefix length of a node's block.
    fn node_prefix(self) -> u8 {
        if self.0.network().is_ipv4() { NODE_PREFIX } else { NODE_PREFIX6 }
    }

    fn blocks(self) -> impl Iterator<Item = Cidr> {
        let prefix = self.node_prefix();
        let size = if self.0.network().is_ipv4() { 32 - prefix } else { 128 - prefix };
        let count = 1_u128 << (prefix - self.0.prefix());
        (0..count).filter_map(move |number| Cidr::new(self.0.nth(number << size)?, prefix))
    }

    /// The first free block; `taken` may contain ranges of any size.
    fn first_free(self, taken: &BTreeSet<Cidr>) -> Option<Cidr> {
        self.blocks().find(|block| taken.iter().all(|range| !range.overlaps(block)))
    }
}

impl FromStr for PodRange {
    type Err = BadPodRange;

    fn from_str(text: &str) -> Result<Self, BadPodRange> {
        let range = Cidr::parse_network(text).ok_or_else(|| BadPodRange(text.to_owned()))?;
        let prefixes = if range.network().is_ipv4() { 8..=NODE_PREFIX } else { 40..=NODE_PREFIX6 };
        if prefixes.contains(&range.prefix()) { Ok(Self(range)) } else { Err(BadPodRange(text.to_owned())) }
    }
}

impl fmt::Display for PodRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
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
    let given: Arc<Mutex<HashMap<String, Vec<Cidr>>>> = Arc::default();
    let reconcile = move |name: Name| {
        let (context, given) = (Arc::clone(&shared), Arc::clone(&given));
        async move { reconcile(&context, &given, &name).await }
    };
    // One worker: two nodes can't be offered the same block.
    vec![worker::run(context, CONTROLLER, queue, 1, synced, reconcile)]
}

fn ranges(node: &Node) -> BTreeSet<Cidr> {
    let spec = node.spec.as_ref();
    let listed = spec.and_then(|spec| spec.pod_cidrs.clone()).unwrap_or_default();
    listed.iter().chain(spec.and_then(|spec| spec.pod_cidr.as_ref())).filter_map(|range| Cidr::parse(range)).collect()
}

async fn reconcile(context: &Context, given: &Mutex<HashMap<String, Vec<Cidr>>>, name: &Name) -> Result<Next, Failure> {
    let Some(node) = context.nodes.get(name).filter(|node| ranges(node).is_empty()) else {
        return Ok(Next::OnChange);
    };
    let nodes = context.nodes.all();
    let uid = node.uid().unwrap_or_default();
    let blocks = {
        let mut given = given.lock();
        given.retain(|uid, _| nodes.iter().any(|node| node.uid().as_ref() == Some(uid)));
        let taken = nodes.iter().flat_map(|node| ranges(node)).chain(given.values().flatten().copied()).collect();
        let free = |range: &PodRange| range.first_free(&taken).ok_or(*range);
        given.get(&uid).cloned().map_or_else(|| context.config.pod_ranges.iter().map(free).collect(), Ok)
    };
    let blocks: Vec<Cidr> = match blocks {
        Ok(blocks) => blocks,
        Err(full) => {
            let message = format!("every /{} of {full} is in use", full.node_prefix());
            tracing::warn!(node = %name, "{message}");
            context.recorder.warning(CONTROLLER, &*node, "CIDRNotAvailable", message);
            return Ok(Next::After(EXHAUSTED_RETRY));
        }
    };
    given.lock().insert(uid.clone(), blocks.clone());
    let patch = json!({
        "metadata": {"uid": uid, "resourceVersion": node.metadata.resource_version},
        "spec": {"podCIDR": blocks.first(), "podCIDRs": blocks},
    });
    let api: Api<Node> = Api::all(context.client.clone());
    let patched = ignore_not_found(api.patch(&name.name, &PatchParams::default(), &Patch::Merge(&patch)).await)
        .map_err(Failure::api("give a Node its pod range"))?;
    if let Some(patched) = patched {
        let ranges: Vec<_> = blocks.iter().map(ToString::to_string).collect();
        tracing::info!(node = %name, ranges = ranges.join(", "), "pod ranges given");
        context.nodes.wrote(patched);
    }
    Ok(Next::OnChange)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cidr(text: &str) -> Cidr {
        Cidr::parse(text).unwrap()
    }

    #[test]
    fn nodes_get_different_blocks_and_a_freed_one_is_used_again() {
        for (range, blocks) in [
            ("10.244.0.0/16", ["10.244.0.0/24", "10.244.1.0/24", "10.244.2.0/24"]),
            ("fd00:10:244::/48", ["fd00:10:244::/64", "fd00:10:244:1::/64", "fd00:10:244:2::/64"]),
        ] {
            let range: PodRange = range.parse().unwrap();
            let mut taken = BTreeSet::new();
            for block in blocks {
                assert_eq!(range.first_free(&taken), Some(cidr(block)));
                taken.insert(cidr(block));
            }
            taken.remove(&cidr(blocks[1]));
            assert_eq!(range.first_free(&taken), Some(cidr(blocks[1])));
        }
    }

    #[test]
    fn a_range_given_by_hand_is_stepped_over_whatever_its_size() {
        let range: PodRange = "10.0.0.0/22".parse().unwrap();
        let taken = BTreeSet::from(["10.0.0.0/23", "10.0.2.128/25", "fd00::/16"].map(cidr));
        assert_eq!(range.first_free(&taken), Some(cidr("10.0.3.0/24")));
        assert_eq!(range.first_free(&BTreeSet::from([cidr("10.0.0.0/8")])), None);
    }

    #[test]
    fn a_range_that_no_node_fits_in_is_refused() {
        for bad in ["10.0.0.0", "10.0.0.0/25", "10.0.0.1/16", "fd00::/65", "x/16", "10.0.0.0/4", "fd00::/16"] {
            assert!(bad.parse::<PodRange>().is_err(), "{bad}");
        }
    }
}
