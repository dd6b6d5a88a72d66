//! Service addresses translated by nftables: for packets of this node's sockets and pods where eBPF is not to be had, and
//! for packets from outside of the node in any case. The table stays when the agent ends, and is taken over by the next.

mod counts;
mod elements;
mod nft;
mod routes;
mod ruleset;
mod transaction;
mod unanswered;
mod untracked;

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::PathBuf,
    sync::Arc,
};

use edgemesh_mesh::{cidr::Cidr, model::Protocol};
use parking_lot::RwLock;

use super::{
    conntrack::Conntrack,
    flows::FlowSweeper,
    outside::{OutsidePlan, OutsideTarget},
    plan::{Frontend, Plan, Target},
};
pub use counts::RuleCounts;
use elements::{Element, Joined, Needs};
pub use nft::NftError;
pub(crate) use nft::transaction;
use routes::{Called, ServiceRoutes};
pub use ruleset::TABLE;
use ruleset::{Chain, Family, Map, Place, Scope};
use transaction::{Elements, Kernel, Transaction};
pub(super) use unanswered::UnansweredFlows;
pub use untracked::DNS_TABLE;
pub(super) use untracked::keep as keep_dns_untracked;

/// Whether an endpoint is on this node.
pub type IsLocal<'a> = &'a dyn Fn(SocketAddr, Protocol) -> bool;

/// Changes to make.
#[derive(Debug, Default)]
pub struct Changes {
    /// Frontends for this node and its pods, each with where it leads, or nothing where it is gone.
    pub inside: Vec<(Frontend, Option<Target>)>,
    /// The same for callers from outside.
    pub outside: Vec<(Frontend, Option<OutsideTarget>)>,
}

/// The frontends that are or were served, by which foreign flows are told from ours.
pub(super) type Served = Arc<RwLock<HashSet<Frontend>>>;

/// The table of this network namespace.
#[derive(Debug)]
pub struct Rules {
    scope: Scope,
    kernel: Kernel,
    table: Table,
    /// Somebody else removed the table.
    was_lost: bool,
    programmed: HashMap<(Place, Frontend), Programmed>,
    /// Chains that were made on demand.
    chains: HashSet<Chain>,
    /// Backends on this node, with how many frontends lead there.
    local: HashMap<IpAddr, usize>,
    pods: Vec<Cidr>,
    served: Served,
    routes: Option<ServiceRoutes>,
}

/// What is known of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Table {
    /// It may hold anything.
    Unknown,
    /// It holds what is in `programmed`.
    Kept,
    /// There is none, and nothing to put into it.
    Absent,
}

/// What is in force for a frontend.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Programmed {
    target: OutsideTarget,
    local: Vec<IpAddr>,
}

/// Whether this network namespace has a table of this name, of family `inet`.
///
/// # Errors
/// When the tables can't be listed.
pub(crate) fn table_is_present(name: &str) -> Result<bool, NftError> {
    Ok(Kernel::default().tables(name)?.iter().any(|table| table == name))
}

/// Removes the routes of Service addresses that an agent in another mode left.
pub(super) fn remove_routes() {
    if let Err(error) = routes::remove_all() {
        tracing::debug!(%error, "routes of Service addresses were not removed");
    }
}

impl Rules {
    /// For this node's sockets, its pods, and callers from outside.
    ///
    /// # Errors
    /// When `nft` can't be run or the kernel has no nftables.
    pub fn for_all() -> Result<Self, NftError> {
        nft::check(&format!("add table inet {TABLE}\n"))?;
        let bridged_answers = routes::let_bridged_answers_pass();
        let mut rules = Self::new(Scope { inside: true, bridged_answers });
        match ServiceRoutes::open() {
            Ok(routes) => rules.routes = Some(routes),
            Err(error) => {
                tracing::warn!(%error, "host processes reach Services only where there is a default route");
            }
        }
        Ok(rules)
    }

    /// For callers from outside, and for this node only what not everybody may call: the rest is done elsewhere.
    pub fn for_outside() -> Self {
        // Nothing is loaded for the few pods that call such an address.
        Self::new(Scope { inside: false, bridged_answers: false })
    }

    fn new(scope: Scope) -> Self {
        Self {
            scope,
            kernel: Kernel::default(),
            table: Table::Unknown,
            was_lost: false,
            programmed: HashMap::new(),
            chains: HashSet::new(),
            local: HashMap::new(),
            pods: Vec::new(),
            served: Served::default(),
            routes: None,
        }
    }

    /// Removes the table, those of other versions, that of DNS, and the routes, whichever of them there are.
    ///
    /// # Errors
    /// When they can't be removed.
    pub fn uninstall() -> Result<(), NftError> {
        // What can be removed is: each of them alone would be in the way of something.
        let mut kernel = Kernel::default();
        let tables = kernel.tables(ruleset::NAME).and_then(|tables| kernel.remove(&tables));
        let untracked = untracked::remove();
        let routes = routes::remove_all().map_err(NftError::from);
        tables.and(untracked).and(routes)
    }

    /// Whether an agent left a table here that serves.
    pub fn is_present() -> bool {
        Kernel::default().tables(ruleset::NAME).is_ok_and(|tables| !tables.is_empty())
    }

    /// What ends flows of these rules whose endpoint is gone; `cgroup` is where sockets are looked for.
    ///
    /// # Errors
    /// When the network namespace of the calling thread can't be told.
    pub fn sweeper(&self, cgroup: Option<PathBuf>) -> io::Result<FlowSweeper> {
        FlowSweeper::new(self.served(), cgroup)
    }

    /// The frontends that are or were served.
    fn served(&self) -> Served {
        Arc::clone(&self.served)
    }

    /// Looks whether what others can remove is still there, as a firewall does that is loaded anew, with all tables. The table is written
    /// anew with the next change, be it none.
    pub fn look(&mut self) {
        match (self.table, table_is_present(TABLE)) {
            (Table::Kept, Ok(false)) => {
                tracing::warn!(table = TABLE, "somebody else removed the table; it is written anew");
                (self.table, self.was_lost) = (Table::Unknown, true);
            }
            (_, Ok(_)) => {}
            (_, Err(error)) => tracing::debug!(%error, "it can't be told whether the table is still there"),
        }
        if let Some(routes) = &mut self.routes
            && let Err(error) = routes.renew()
        {
            tracing::warn!(%error, "routes of Service addresses can't be kept");
        }
    }

    /// How many frontends are in force.
    pub fn len(&self) -> usize {
        self.programmed.len()
    }

    /// Whether none is.
    pub fn is_empty(&self) -> bool {
        self.programmed.is_empty()
    }

    /// The ranges of this node's pods, from the next change on.
    pub fn set_pods(&mut self, pods: Vec<Cidr>) {
        if self.pods != pods {
            self.pods = pods;
            if self.table == Table::Kept {
                self.table = Table::Unknown;
            }
        }
    }

    /// Brings the table to plans: what an earlier agent left serves until then. Returns how many
    /// frontends differ from what was known to be in force.
    ///
    /// # Errors
    /// When the table is as before, or without elements where that of an earlier agent could not be taken over.
    pub fn replace(&mut self, inside: &Plan, outside: &OutsidePlan, is_local: IsLocal<'_>) -> Result<usize, NftError> {
        let mut wanted: HashMap<(Place, Frontend), Option<OutsideTarget>> =
            self.programmed.keys().map(|key| (*key, None)).collect();
        wanted.extend(
            inside
                .iter()
                .map(|(frontend, target)| ((Place::Inside, *frontend), Some(OutsideTarget::Target(target.clone())))),
        );
        wanted
            .extend(outside.iter().map(|(frontend, target)| ((place_of(*frontend), *frontend), Some(target.clone()))));
        self.write(wanted, is_local)
    }

    /// Makes changes, all of them or none. Returns how many frontends differ.
    ///
    /// # Errors
    /// When the table is as before.
    pub fn apply(&mut self, changes: Changes, is_local: IsLocal<'_>) -> Result<usize, NftError> {
        let mut wanted = HashMap::new();
        let inside = changes.inside.into_iter();
        wanted.extend(inside.map(|(frontend, target)| ((Place::Inside, frontend), target.map(OutsideTarget::Target))));
        wanted.extend(changes.outside.into_iter().map(|(frontend, target)| ((place_of(frontend), frontend), target)));
        self.write(wanted, is_local)
    }

    fn write(
        &mut self,
        wanted: HashMap<(Place, Frontend), Option<OutsideTarget>>,
        is_local: IsLocal<'_>,
    ) -> Result<usize, NftError> {
        let mut changed = Vec::new();
        for (key, target) in wanted {
            let target = target.map(|target| Programmed { local: local_of(&target, key.1, is_local), target });
            if self.programmed.get(&key) != target.as_ref() {
                changed.push((key, target));
            }
        }
        if changed.is_empty() && self.table != Table::Unknown {
            return Ok(0);
        }
        let count = changed.len();
        let mut forgotten = self.forgotten_flows(&changed);
        if self.was_lost {
            // What was sent while there was no table went untranslated.
            forgotten.0.extend(
                self.programmed
                    .iter()
                    .filter(|(key, programmed)| leads_udp(key, programmed))
                    .map(|(key, _)| key.1.address),
            );
        }
        let kept = self.table == Table::Kept;
        let (mut next, mut structure, mut found) = (Next::default(), String::new(), Vec::new());
        if kept {
            next.local = self.local.clone();
            for (key, target) in &changed {
                next.exchange(*key, self.programmed.get(key), target.as_ref());
            }
            next.chains.retain(|chain| !self.chains.contains(chain));
        } else {
            // All over again: what was programmed before is only what should be there.
            let mut all: HashMap<_, _> = self.programmed.iter().collect();
            for (key, target) in &changed {
                match target {
                    Some(target) => drop(all.insert(key, target)),
                    None => drop(all.remove(key)),
                }
            }
            found = self.kernel.tables(ruleset::NAME)?;
            self.chains.clear();
            if !self.scope.inside && all.is_empty() {
                if found.iter().any(|table| table == TABLE) {
                    self.remember_served_of_others()?;
                }
                // Even an empty table has the kernel track connections.
                self.kernel.remove(&found)?;
                self.commit(changed, next);
                self.table = Table::Absent;
                return Ok(count);
            }
            for (key, target) in all {
                next.exchange(*key, None, Some(target));
            }
            ruleset::write_base(&mut structure, self.scope, &self.pods);
        }
        for chain in &next.chains {
            chain.write(&mut structure);
        }
        let taken_over = found.iter().any(|table| table == TABLE);
        self.write_to_kernel(&structure, &next.take_transaction(!kept), found)?;
        self.commit(changed, next);
        if taken_over && let Err(error) = self.forget_counts_of_others() {
            tracing::warn!(%error, "what was counted at frontends that are gone can't be forgotten");
        }
        (self.table, self.was_lost) = (Table::Kept, false);
        if !self.scope.inside && self.programmed.is_empty() {
            self.kernel.remove(&[TABLE.to_owned()])?;
            self.chains.clear();
            self.table = Table::Absent;
        }
        if let Err(error) = forgotten.forget() {
            tracing::warn!(%error, "UDP flows that began before their Service may stay untranslated");
        }
        Ok(count)
    }

    /// Has what is new of the structure made, which nothing leads to yet, then the elements all at once. Of the tables that were
    /// `found`, ours is replaced if it can't be taken over; those of other versions go when ours serves.
    fn write_to_kernel(
        &mut self,
        structure: &str,
        elements: &Transaction,
        mut found: Vec<String>,
    ) -> Result<(), NftError> {
        let mut write = |structure: &str| match structure {
            "" => self.kernel.commit(elements),
            structure => nft::transaction(structure).and_then(|()| self.kernel.commit(elements)),
        };
        let taken_over = found.iter().position(|table| table == TABLE).map(|at| found.swap_remove(at));
        if let Err(error) = write(structure) {
            // The table is not what it was thought to be: another program can have changed it, or removed it.
            (self.table, self.was_lost) = (Table::Unknown, true);
            if taken_over.is_none() || error.is_shortage() {
                return Err(error);
            }
            tracing::warn!(%error, "the table that an earlier agent left can't be taken over; it is replaced");
            let mut anew = String::new();
            ruleset::write_removal(&mut anew);
            anew.push_str(structure);
            write(&anew)?;
        }
        if let Err(error) = self.kernel.remove(&found) {
            tracing::warn!(%error, "tables of other versions can't be removed");
        }
        Ok(())
    }

    fn commit(&mut self, changed: Vec<((Place, Frontend), Option<Programmed>)>, next: Next) {
        self.keep_routes(&changed);
        let mut served = self.served.write();
        for (key, target) in changed {
            match target {
                Some(target) => {
                    served.insert(key.1);
                    self.programmed.insert(key, target);
                }
                None => drop(self.programmed.remove(&key)),
            }
        }
        // Those that are gone are told from foreign ones for a while only.
        if served.len() > 2 * self.programmed.len() + 10_000 {
            *served = self.programmed.keys().map(|key| key.1).collect();
        }
        drop(served);
        self.chains.extend(next.chains);
        self.local = next.local;
    }

    /// Has counting begin anew at frontends, because they are another Service's now.
    ///
    /// # Errors
    /// When it goes on where it was.
    pub fn forget_counts(&mut self, frontends: &[Frontend]) -> Result<(), NftError> {
        let (mut delete, mut add) = (Elements::default(), Elements::default());
        for (place, frontend) in frontends.iter().flat_map(|at| Place::ALL.map(|place| (place, *at))) {
            let Some(programmed) = self.programmed.get(&(place, frontend)) else { continue };
            for Element { map, key, .. } in counters(place, frontend, programmed) {
                delete.push_key(map, key);
                add.push_key(map, key);
            }
        }
        let mut transaction = Transaction::default();
        transaction.delete(delete);
        transaction.add(add);
        self.kernel.commit(&transaction)
    }

    /// Has flows be ended that an earlier agent's rules led away from frontends that were removed while no agent was there.
    fn remember_served_of_others(&mut self) -> Result<(), NftError> {
        for map in Map::all_that_count() {
            let counted = self.kernel.counted(map)?;
            self.served.write().extend(counted.into_keys().filter_map(|key| key.counted_at(map)));
        }
        Ok(())
    }

    /// Forgets what was counted at frontends that are not there any more, but for their flows.
    fn forget_counts_of_others(&mut self) -> Result<(), NftError> {
        let ours = self.programmed.iter().flat_map(|((place, frontend), programmed)| {
            counters(*place, *frontend, programmed).map(|element| (element.map, element.key))
        });
        let ours: HashSet<_> = ours.collect();
        let mut others = Elements::default();
        for map in Map::all_that_count() {
            let mut counted = self.kernel.counted(map)?;
            counted.retain(|key, _| !ours.contains(&(map, *key)));
            self.served.write().extend(counted.keys().filter_map(|key| key.counted_at(map)));
            counted.into_keys().for_each(|key| others.push_key(map, key));
        }
        let mut transaction = Transaction::default();
        transaction.delete(others);
        self.kernel.commit(&transaction)
    }

    /// UDP frontends that begin to lead somewhere: what was sent there before left flows that would never be translated.
    fn forgotten_flows(&self, changed: &[((Place, Frontend), Option<Programmed>)]) -> Untranslated {
        let begins = |(key, target): &&((Place, Frontend), Option<Programmed>)| {
            target.as_ref().is_some_and(|target| leads_udp(key, target))
                && !self.programmed.get(key).is_some_and(|before| leads_udp(key, before))
        };
        Untranslated(changed.iter().filter(begins).map(|(key, _)| key.1.address).collect())
    }

    /// Before what changed is taken down as programmed.
    fn keep_routes(&mut self, changed: &[((Place, Frontend), Option<Programmed>)]) {
        let Some(routes) = &mut self.routes else { return };
        let old = &self.programmed;
        for ((place, frontend), target) in changed {
            if *place == Place::Inside && !frontend.address.ip().is_loopback() {
                let called = |programmed: &Programmed| match programmed.target.target() {
                    _ if frontend.address.port() == 0 => Called::Closed,
                    Some(target) if !target.backends().is_empty() => Called::Served,
                    _ => Called::Refused,
                };
                let key = (*place, *frontend);
                routes.exchange(frontend.address.ip(), old.get(&key).map(called), target.as_ref().map(called));
            }
        }
        if let Err(error) = routes.write() {
            tracing::warn!(%error, "routes of Service addresses can't be kept");
        }
    }
}

/// What is about to be brought.
#[derive(Debug, Default)]
struct Next {
    delete: Elements,
    add: Elements,
    /// Chains to make.
    chains: HashSet<Chain>,
    local: HashMap<IpAddr, usize>,
    /// Backends that begin to be on this node, and that cease to be.
    arrived: BTreeSet<IpAddr>,
    departed: BTreeSet<IpAddr>,
}

impl Next {
    /// A frontend changes.
    fn exchange(&mut self, (place, frontend): (Place, Frontend), old: Option<&Programmed>, new: Option<&Programmed>) {
        let needs = |programmed: Option<&Programmed>| {
            programmed.map(|programmed| elements::of(place, frontend, &programmed.target)).unwrap_or_default()
        };
        let (Needs { elements: old_elements, .. }, Needs { elements: new_elements, chain }) = (needs(old), needs(new));
        if old_elements.is_empty() {
            new_elements.iter().for_each(|element| self.add.push(element));
        } else {
            let (before, after) = (HashSet::<_>::from_iter(old_elements), HashSet::from_iter(new_elements));
            before.difference(&after).for_each(|element| self.delete.push(&element.without_value()));
            after.difference(&before).for_each(|element| self.add.push(element));
        }
        self.chains.extend(chain.filter(|chain| chain.is_made_on_demand()));
        for &address in new.iter().flat_map(|new| &new.local) {
            let uses = self.local.entry(address).or_default();
            *uses += 1;
            if *uses == 1 && !self.departed.remove(&address) {
                self.arrived.insert(address);
            }
        }
        for &address in old.iter().flat_map(|old| &old.local) {
            let Some(uses) = self.local.get_mut(&address) else { continue };
            *uses -= 1;
            if *uses == 0 {
                self.local.remove(&address);
                if !self.arrived.remove(&address) {
                    self.departed.insert(address);
                }
            }
        }
    }

    /// The transaction that brings it; with `anew`, whatever elements there are.
    fn take_transaction(&mut self, anew: bool) -> Transaction {
        for (addresses, elements) in [(&self.departed, &mut self.delete), (&self.arrived, &mut self.add)] {
            for &address in addresses {
                let (family, key) = (Family::from(address), Joined::default().address(address));
                elements.push_key(Map::Local(family), key);
                elements.push_key(Map::Hairpin(family), key.address(address));
            }
        }
        let mut transaction = Transaction::default();
        if anew {
            let stays = |map: &Map| matches!(map, Map::Pods(_)) || map.counts();
            Map::all().into_iter().filter(|map| !stays(map)).for_each(|map| transaction.empty(map));
        }
        transaction.delete(std::mem::take(&mut self.delete));
        transaction.add(std::mem::take(&mut self.add));
        transaction
    }
}

/// Whether a frontend sends datagrams somewhere.
fn leads_udp(key: &(Place, Frontend), programmed: &Programmed) -> bool {
    let leads = || programmed.target.target().is_some_and(|target| !target.backends().is_empty());
    key.1.protocol == Protocol::Udp && leads()
}

/// The elements that count for a frontend.
fn counters(place: Place, frontend: Frontend, programmed: &Programmed) -> impl Iterator<Item = Element> {
    elements::of(place, frontend, &programmed.target).elements.into_iter().filter(|element| element.map.counts())
}

fn place_of(frontend: Frontend) -> Place {
    if frontend.address.ip().is_unspecified() { Place::NodePort } else { Place::Outside }
}

fn local_of(target: &OutsideTarget, frontend: Frontend, is_local: IsLocal<'_>) -> Vec<IpAddr> {
    let Some(target) = target.target() else { return Vec::new() };
    if matches!(target, Target::Listener(_)) {
        return Vec::new();
    }
    let on_node = target.backends().iter().filter(|backend| is_local(**backend, frontend.protocol));
    let mut local: Vec<IpAddr> = on_node.map(SocketAddr::ip).collect();
    local.sort_unstable();
    local.dedup();
    local
}

/// UDP frontends whose untranslated flows are to be forgotten.
struct Untranslated(HashSet<SocketAddr>);

impl Untranslated {
    fn forget(self) -> io::Result<()> {
        if self.0.is_empty() {
            return Ok(());
        }
        let mut conntrack = Conntrack::open()?;
        let mut found = Vec::new();
        conntrack.flows(|flow| {
            let any = if flow.called.is_ipv4() {
                IpAddr::V4(Ipv4Addr::UNSPECIFIED)
            } else {
                IpAddr::V6(Ipv6Addr::UNSPECIFIED)
            };
            let called = self.0.contains(&flow.called) || self.0.contains(&SocketAddr::new(any, flow.called.port()));
            if flow.protocol == Protocol::Udp && flow.server == flow.called && called {
                found.push(flow);
            }
        })?;
        conntrack.forget(&found)
    }
}
