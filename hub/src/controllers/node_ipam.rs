//! Pod ranges for Nodes: each new Node gets a block of each of the cluster's pod ranges, for as long as it exists. One that
//! registers again under its name gets its former blocks, as long as no other Node needed them: so its pods keep their addresses.

use std::{
    collections::{BTreeSet, HashMap, VecDeque},
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
/// Of how many Nodes that are gone the blocks are remembered: the latest.
const REMEMBERED: usize = 1024;
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

    /// Whether a node can be given exactly this.
    fn has_block(self, block: &Cidr) -> bool {
        block.prefix() == self.node_prefix() && self.0.contains(block.network())
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

/// What this process knows beside the Nodes that exist.
#[derive(Debug, Default)]
struct Ledger {
    /// What it gave out, by node uid: the cache may not show it yet.
    given: HashMap<String, Vec<Cidr>>,
    /// What Nodes had that are gone, by name, the latest last.
    former: VecDeque<(String, BTreeSet<Cidr>)>,
}

impl Ledger {
    fn gone(&mut self, name: String, blocks: BTreeSet<Cidr>) {
        self.former.retain(|(known, _)| *known != name);
        self.former.push_back((name, blocks));
        if self.former.len() > REMEMBERED {
            self.former.pop_front();
        }
    }

    /// A block of each range for a Node: its former one, else one that nobody had, else any that is free.
    ///
    /// # Errors
    /// The range that is full.
    fn choose(&self, name: &str, ranges: &[PodRange], taken: &BTreeSet<Cidr>) -> Result<Vec<Cidr>, PodRange> {
        let own = self.former.iter().filter(|(known, _)| known == name).flat_map(|(_, blocks)| blocks);
        let own: Vec<Cidr> = own.copied().filter(|block| taken.iter().all(|range| !range.overlaps(block))).collect();
        let avoided: BTreeSet<Cidr> =
            taken.iter().chain(self.former.iter().flat_map(|(_, blocks)| blocks)).copied().collect();
        let one = |range: &PodRange| {
            let former = own.iter().copied().find(|block| range.has_block(block));
            former.or_else(|| range.first_free(&avoided)).or_else(|| range.first_free(taken)).ok_or(*range)
        };
        ranges.iter().map(one).collect()
    }
}

pub(crate) fn start(context: &Arc<Context>) -> Vec<JoinHandle<()>> {
    let queue: Arc<WorkQueue<Name>> = worker::queue(context, CONTROLLER);
    let ledger: Arc<Mutex<Ledger>> = Arc::default();
    let (target, known) = (Arc::clone(&queue), Arc::clone(&ledger));
    context.nodes.on_change(move |old, new| {
        if let Some(old) = old.filter(|old| new.is_none_or(|new| new.uid() != old.uid()) && !ranges(old).is_empty()) {
            known.lock().gone(old.name_any(), ranges(old));
        }
        if let Some(node) = new.filter(|node| ranges(node).is_empty()) {
            target.add(Name::of(&**node));
        }
    });
    let synced = {
        let context = Arc::clone(context);
        async move { context.nodes.synced().await }
    };
    let shared = Arc::clone(context);
    let reconcile = move |name: Name| {
        let (context, ledger) = (Arc::clone(&shared), Arc::clone(&ledger));
        async move { reconcile(&context, &ledger, &name).await }
    };
    // One worker: two nodes can't be offered the same block.
    vec![worker::run(context, CONTROLLER, queue, 1, synced, reconcile)]
}

fn ranges(node: &Node) -> BTreeSet<Cidr> {
    let spec = node.spec.as_ref();
    let listed = spec.and_then(|spec| spec.pod_cidrs.clone()).unwrap_or_default();
    listed.iter().chain(spec.and_then(|spec| spec.pod_cidr.as_ref())).filter_map(|range| Cidr::parse(range)).collect()
}

async fn reconcile(context: &Context, ledger: &Mutex<Ledger>, name: &Name) -> Result<Next, Failure> {
    let Some(node) = context.nodes.get(name).filter(|node| ranges(node).is_empty()) else {
        return Ok(Next::OnChange);
    };
    let nodes = context.nodes.all();
    let uid = node.uid().unwrap_or_default();
    let blocks = {
        let mut ledger = ledger.lock();
        ledger.given.retain(|uid, _| nodes.iter().any(|node| node.uid().as_ref() == Some(uid)));
        let given = ledger.given.values().flatten().copied();
        let taken = nodes.iter().flat_map(|node| ranges(node)).chain(given).collect();
        let choose = || ledger.choose(&name.name, &context.config.pod_ranges, &taken);
        ledger.given.get(&uid).cloned().map_or_else(choose, Ok)
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
    ledger.lock().given.insert(uid.clone(), blocks.clone());
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
    fn a_node_that_returns_gets_its_former_block_unless_another_needed_it() {
        let ranges: Vec<PodRange> = ["10.0.0.0/22", "fd00::/48"].map(|range| range.parse().unwrap()).into();
        let mut ledger = Ledger::default();
        let block = |number| [format!("10.0.{number}.0/24"), format!("fd00:0:0:{number}::/64")].map(|text| cidr(&text));
        let mut taken = BTreeSet::from(block(1));
        ledger.gone("a".to_owned(), block(0).into());
        ledger.gone("b".to_owned(), block(2).into());
        assert_eq!(ledger.choose("a", &ranges, &taken), Ok(block(0).into()));
        assert_eq!(ledger.choose("b", &ranges, &taken), Ok(block(2).into()));
        assert_eq!(ledger.choose("new", &ranges, &taken), Ok(block(3).into()));
        taken.extend(block(3));
        // No other is left.
        assert_eq!(ledger.choose("newer", &ranges, &taken).unwrap()[0], block(0)[0]);
        taken.extend(block(0));
        assert_eq!(ledger.choose("a", &ranges, &taken).unwrap()[0], block(2)[0]);
        taken.extend(block(2));
        assert_eq!(ledger.choose("b", &ranges, &taken), Err(ranges[0]));
        for number in 0..REMEMBERED {
            ledger.gone(number.to_string(), BTreeSet::new());
        }
        assert_eq!(ledger.former.len(), REMEMBERED);
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
