//! Service addresses translated by nftables: for packets of this node's sockets and pods where eBPF is not to be had, and
//! for packets from outside of the node in any case. The table stays when the agent ends, and is taken over by the next.

mod elements;
mod nft;
mod routes;
mod ruleset;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    fmt::Write as _,
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
use elements::{Element, Needs};
pub use nft::NftError;
use routes::ServiceRoutes;
pub use ruleset::TABLE;
use ruleset::{Chain, Family, LAYOUT, Map, Place, Scope};

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
    table: Table,
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
        nft::exists(&["tables"]).and_then(|works| match works {
            true => Ok(()),
            false => Err(NftError::Refused("the kernel's tables can't be listed".to_owned())),
        })?;
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

    /// For callers from outside only: the rest is done elsewhere.
    pub fn for_outside() -> Self {
        Self::new(Scope { inside: false, bridged_answers: true })
    }

    fn new(scope: Scope) -> Self {
        Self {
            scope,
            table: Table::Unknown,
            programmed: HashMap::new(),
            chains: HashSet::new(),
            local: HashMap::new(),
            pods: Vec::new(),
            served: Served::default(),
            routes: None,
        }
    }

    /// Removes the table and the routes, whichever of them there are.
    ///
    /// # Errors
    /// When they can't be removed.
    pub fn uninstall() -> Result<(), NftError> {
        routes::remove_all()?;
        nft::transaction(&ruleset::removal())
    }

    /// Whether an agent left a table here that serves.
    pub fn is_present() -> bool {
        nft::exists(&["chain", "inet", TABLE, LAYOUT]).unwrap_or(false)
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

    /// Brings the table to plans, in one transaction: what an earlier agent left serves until then. Returns how many
    /// frontends differ from what was known to be in force.
    ///
    /// # Errors
    /// When the table is as before.
    pub fn replace(&mut self, inside: &Plan, outside: &OutsidePlan, is_local: IsLocal<'_>) -> Result<usize, NftError> {
        let mut wanted: HashMap<(Place, Frontend), Option<OutsideTarget>> =
            self.programmed.keys().map(|key| (*key, None)).collect();
        if self.scope.inside {
            let inside = inside
                .iter()
                .map(|(frontend, target)| ((Place::Inside, *frontend), Some(OutsideTarget::Target(target.clone()))));
            wanted.extend(inside);
        }
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
        if self.scope.inside {
            let inside = changes.inside.into_iter();
            wanted.extend(
                inside.map(|(frontend, target)| ((Place::Inside, frontend), target.map(OutsideTarget::Target))),
            );
        }
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
        let forgotten = self.forgotten_flows(&changed);
        let mut next = Next { chains: self.chains.clone(), local: self.local.clone(), ..Next::default() };
        let (mut script, mut present) = (String::new(), false);
        let kept = self.table == Table::Kept;
        if kept {
            for (key, target) in &changed {
                next.exchange(*key, self.programmed.get(key), target.as_ref());
            }
        } else {
            // All over again: what was programmed before is only what should be there.
            next = Next::default();
            let mut all = self.programmed.clone();
            for (key, target) in &changed {
                match target {
                    Some(target) => drop(all.insert(*key, target.clone())),
                    None => drop(all.remove(key)),
                }
            }
            if !self.scope.inside && all.is_empty() {
                // Even an empty table has the kernel track connections.
                remove_if_present()?;
                self.commit(changed, next);
                self.table = Table::Absent;
                return Ok(count);
            }
            for (key, target) in &all {
                next.exchange(*key, None, Some(target));
            }
            for range in &self.pods {
                let map = Map::Pods(range.network().into());
                next.add.push(map, &format!("{}/{}", range.network(), range.prefix()), None);
            }
            present = Self::is_present();
            ruleset::write_base(&mut script, self.scope, !present);
        }
        next.write(&mut script, &self.chains, kept);
        if let Err(error) = nft::transaction(&script) {
            // The table is not what it was thought to be: another program can have changed it, or removed it.
            self.table = Table::Unknown;
            if !present {
                return Err(error);
            }
            tracing::warn!(%error, "the table that an earlier agent left can't be taken over; it is replaced");
            let mut anew = String::new();
            ruleset::write_base(&mut anew, self.scope, true);
            next.write(&mut anew, &self.chains, false);
            nft::transaction(&anew)?;
        }
        self.commit(changed, next);
        self.table = Table::Kept;
        if !self.scope.inside && self.programmed.is_empty() {
            nft::transaction(&ruleset::removal())?;
            self.chains.clear();
            self.table = Table::Absent;
        }
        if let Err(error) = forgotten.forget() {
            tracing::warn!(%error, "UDP flows that began before their Service may stay untranslated");
        }
        Ok(count)
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
        self.chains = next.chains;
        self.local = next.local;
    }

    /// UDP frontends that begin to lead somewhere: what was sent there before left flows that would never be translated.
    fn forgotten_flows(&self, changed: &[((Place, Frontend), Option<Programmed>)]) -> Untranslated {
        let leads = |programmed: &Programmed| match &programmed.target {
            OutsideTarget::Target(target) => !target.backends().is_empty(),
            OutsideTarget::Drop => false,
        };
        let begins = |(key, target): &&((Place, Frontend), Option<Programmed>)| {
            key.1.protocol == Protocol::Udp
                && target.as_ref().is_some_and(leads)
                && !self.programmed.get(key).is_some_and(leads)
        };
        Untranslated(changed.iter().filter(begins).map(|(key, _)| key.1.address).collect())
    }

    /// Before what changed is taken down as programmed.
    fn keep_routes(&mut self, changed: &[((Place, Frontend), Option<Programmed>)]) {
        let Some(routes) = &mut self.routes else { return };
        let old = &self.programmed;
        for ((place, frontend), target) in changed {
            if *place == Place::Inside && frontend.address.port() != 0 && !frontend.address.ip().is_loopback() {
                let serves = |programmed: &Programmed| matches!(&programmed.target, OutsideTarget::Target(target) if !target.backends().is_empty());
                let key = (*place, *frontend);
                routes.exchange(frontend.address.ip(), old.get(&key).map(serves), target.as_ref().map(serves));
            }
        }
        if let Err(error) = routes.write() {
            tracing::warn!(%error, "routes of Service addresses can't be kept");
        }
    }
}

fn remove_if_present() -> Result<(), NftError> {
    match nft::exists(&["table", "inet", TABLE]) {
        Ok(true) => nft::transaction(&ruleset::removal()),
        Ok(false) => Ok(()),
        // Where the program was never installed, no agent wrote rules.
        Err(NftError::Run(error)) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

/// What a transaction is about to bring.
#[derive(Debug, Default)]
struct Next {
    delete: Commands,
    add: Commands,
    chains: HashSet<Chain>,
    local: HashMap<IpAddr, usize>,
    /// Backends that begin to be on this node, and that cease to be.
    arrived: BTreeSet<IpAddr>,
    departed: BTreeSet<IpAddr>,
}

/// Elements as nft reads them, by map.
#[derive(Debug, Default)]
struct Commands(BTreeMap<Map, String>);

impl Commands {
    fn push(&mut self, map: Map, key: &str, value: Option<&str>) {
        let text = self.0.entry(map).or_default();
        if !text.is_empty() {
            text.push_str(", ");
        }
        text.push_str(key);
        if let Some(value) = value {
            text.push_str(" : ");
            text.push_str(value);
        }
    }

    fn write(&self, script: &mut String, command: &str) {
        for (map, elements) in &self.0 {
            let _ = writeln!(script, "{command} element inet {TABLE} {map} {{ {elements} }}");
        }
    }
}

impl Next {
    /// A frontend changes.
    fn exchange(&mut self, (place, frontend): (Place, Frontend), old: Option<&Programmed>, new: Option<&Programmed>) {
        let needs = |programmed: Option<&Programmed>| {
            programmed.map(|programmed| elements::of(place, frontend, &programmed.target)).unwrap_or_default()
        };
        let (Needs { elements: old_elements, .. }, Needs { elements: new_elements, chain }) = (needs(old), needs(new));
        {
            let by_key = |elements: &'_ [Element]| -> HashMap<(Map, String), Option<String>> {
                elements.iter().map(|e| ((e.map, e.key.clone()), e.value.clone())).collect()
            };
            let (before, after) = match old {
                Some(_) => (by_key(&old_elements), by_key(&new_elements)),
                None => Default::default(),
            };
            // A value is no part of what is deleted.
            for Element { map, key, value } in old_elements {
                if after.get(&(map, key.clone())) != Some(&value) {
                    self.delete.push(map, &key, None);
                }
            }
            for Element { map, key, value } in new_elements {
                if before.is_empty() || before.get(&(map, key.clone())) != Some(&value) {
                    self.add.push(map, &key, value.as_deref());
                }
            }
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

    fn write(&self, script: &mut String, known: &HashSet<Chain>, kept: bool) {
        for chain in &self.chains {
            if !kept || !known.contains(chain) {
                chain.write(script);
            }
        }
        self.delete.write(script, "delete");
        self.add.write(script, "add");
        for (addresses, command) in [(&self.departed, "delete"), (&self.arrived, "add")] {
            let mut local = Commands::default();
            for &address in addresses {
                let (family, text) = (Family::from(address), address.to_string());
                local.push(Map::Local(family), &text, None);
                local.push(Map::Hairpin(family), &format!("{text} . {text}"), None);
            }
            local.write(script, command);
        }
    }
}

fn place_of(frontend: Frontend) -> Place {
    if frontend.address.ip().is_unspecified() { Place::NodePort } else { Place::Outside }
}

fn local_of(target: &OutsideTarget, frontend: Frontend, is_local: IsLocal<'_>) -> Vec<IpAddr> {
    let OutsideTarget::Target(target) = target else { return Vec::new() };
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
