//! Routes of the host: to the pod ranges of the other nodes of this network, and those that make ranges the host's own: the
//! node-local addresses, and the pod ranges that are captured.
//!
//! Only routes that carry our protocol number are ever changed or removed, and where somebody else leads a pod range, as the CNI
//! of a cluster does, that route stays alone. Ours stay when the agent ends, so that pods keep talking while it restarts; what is
//! no longer wanted goes at the next start, and all at the uninstallation.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
    time::Duration,
};

use edgemesh_mesh::{Catalog, CatalogStore, Viewpoint, cidr::Cidr};
use edgemesh_telemetry::Shutdown;
use futures::TryStreamExt;
use rtnetlink::{
    Handle, RouteMessageBuilder,
    packet_route::{
        AddressFamily,
        route::{RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType},
    },
};

use crate::{
    config::Config,
    metrics::RouteMetrics,
    node_local::{Ipv4Range, Ipv6Range},
};

/// Our routes' protocol number; the kernel and the routing daemons that iproute2 knows use others.
pub const PROTOCOL: RouteProtocol = RouteProtocol::Other(176);
/// Changes of the catalog that come close together are handled together.
const DEBOUNCE: Duration = Duration::from_millis(50);
/// Routes vanish with a link that goes down: look again that often.
const RESYNC: Duration = Duration::from_secs(10);
/// Index of the loopback interface: the kernel gives each network namespace its own as the first.
const LOOPBACK: u32 = 1;
/// The routing table that says which addresses are this host's own (`RT_TABLE_LOCAL` of linux/rtnetlink.h).
const LOCAL_TABLE: u8 = 255;
const FORWARDING: &str = "/proc/sys/net/ipv4/ip_forward";
const FORWARDING6: &str = "/proc/sys/net/ipv6/conf/all/forwarding";

/// Pod ranges with the node address, of the same family, that leads there.
pub type PodRoutes = BTreeMap<Cidr, IpAddr>;

/// Why a route can't be read or written.
#[derive(Debug, thiserror::Error)]
pub enum RouteError {
    /// No netlink socket.
    #[error("netlink: {0}")]
    Socket(#[from] std::io::Error),
    /// The kernel refuses the local route of the node-local range.
    #[error("route `local {range} dev lo` (is the loopback interface up?): {source}")]
    Local {
        /// The range.
        range: String,
        /// Why.
        source: Box<rtnetlink::Error>,
    },
    /// The kernel's routes can't be listed.
    #[error("listing routes: {0}")]
    List(Box<rtnetlink::Error>),
    /// One of ours can't be removed.
    #[error("removing a route: {0}")]
    Remove(Box<rtnetlink::Error>),
}

/// What a round of [`HostRoutes::sync`] did.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Routes that are in place.
    pub present: usize,
    /// Ranges to which routes of somebody else lead.
    pub foreign: BTreeSet<Cidr>,
    /// Routes that the kernel refused, with its reason.
    pub failed: BTreeMap<Cidr, String>,
}

/// The routing table of this network namespace.
#[derive(Debug, Clone)]
pub struct HostRoutes(Handle);

impl HostRoutes {
    /// Opens a netlink socket; its task ends when the last clone is dropped.
    ///
    /// # Errors
    /// When the socket can't be opened.
    pub fn open(shutdown: &Shutdown) -> Result<Self, RouteError> {
        let (connection, handle) = connection()?;
        shutdown.spawn(connection);
        Ok(Self(handle))
    }

    /// As [`HostRoutes::open`], for work that goes on after the drain.
    ///
    /// # Errors
    /// When the socket can't be opened.
    pub fn open_beyond_drain() -> Result<Self, RouteError> {
        let (connection, handle) = connection()?;
        tokio::spawn(connection);
        Ok(Self(handle))
    }

    /// Makes the kernel take every address of the range for its own, so that one listener serves them all.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub async fn deliver_locally(&self, range: Ipv4Range) -> Result<(), RouteError> {
        let route = RouteMessageBuilder::<Ipv4Addr>::new()
            .table_id(LOCAL_TABLE.into())
            .kind(RouteType::Local)
            .scope(RouteScope::Host)
            .protocol(PROTOCOL)
            .destination_prefix(range.base(), range.prefix())
            .output_interface(LOOPBACK)
            .build();
        let source = |source| RouteError::Local { range: range.to_string(), source: Box::new(source) };
        self.0.route().add(route).replace().execute().await.map_err(source)
    }

    /// As [`HostRoutes::deliver_locally`], for IPv6.
    ///
    /// # Errors
    /// When the kernel refuses, which it does where IPv6 is disabled.
    pub async fn deliver_locally6(&self, range: Ipv6Range) -> Result<(), RouteError> {
        let route = local_route6(range.base(), Ipv6Range::PREFIX);
        let source = |source| RouteError::Local { range: range.to_string(), source: Box::new(source) };
        self.0.route().add(route).replace().execute().await.map_err(source)
    }

    /// Makes the ranges that are the host's own equal to `wanted`, each with the first that will do of `sources`, addresses of this
    /// host that its processes may call from. Those of `kept` are left alone.
    ///
    /// # Errors
    /// When the routes can't be listed. A single route that is refused is in the result, with the kernel's reason.
    pub async fn sync_local(
        &self,
        wanted: &BTreeSet<Cidr>,
        sources: &[IpAddr],
        kept: &[Cidr],
    ) -> Result<BTreeMap<Cidr, String>, RouteError> {
        let mut failed = BTreeMap::new();
        let mut present = BTreeSet::new();
        for route in self.existing(LOCAL_TABLE).await? {
            let range = destination(&route);
            match range {
                Some(range) if kept.contains(&range) => {}
                // The kernel keeps it when the host loses the address: then nobody could call by it.
                Some(range) if wanted.contains(&range) && has_source(&route, sources) => drop(present.insert(range)),
                Some(range) if wanted.contains(&range) => {}
                _ => {
                    if let Err(error) = self.0.route().del(route).execute().await {
                        tracing::debug!(?range, %error, "an old route was not removed");
                    }
                }
            }
        }
        for range in wanted.difference(&present) {
            match self.add_local(*range, sources).await {
                Ok(()) => tracing::info!(%range, "pods of another network are reached through the tunnel"),
                Err(error) => drop(failed.insert(*range, error.to_string())),
            }
        }
        Ok(failed)
    }

    async fn add_local(&self, range: Cidr, sources: &[IpAddr]) -> Result<(), rtnetlink::Error> {
        let address = match range.network() {
            IpAddr::V4(address) => address,
            // The kernel chooses the source by its own rules, from the addresses of the interfaces.
            IpAddr::V6(address) => {
                let route = local_route6(address, range.prefix());
                return self.0.route().add(route).replace().execute().await;
            }
        };
        // Without a preferred source a process would call a pod from the pod's own address.
        let mut outcome = Err(rtnetlink::Error::RequestFailed);
        for source in sources {
            let IpAddr::V4(source) = source else { continue };
            let route = RouteMessageBuilder::<Ipv4Addr>::new()
                .table_id(LOCAL_TABLE.into())
                .kind(RouteType::Local)
                .scope(RouteScope::Host)
                .protocol(PROTOCOL)
                .destination_prefix(address, range.prefix())
                .pref_source(*source)
                .output_interface(LOOPBACK)
                .build();
            outcome = self.0.route().add(route).replace().execute().await;
            if outcome.is_ok() {
                break;
            }
        }
        outcome
    }

    /// Makes our routes to pod ranges equal to `wanted`, but for ranges to which routes of others lead.
    ///
    /// # Errors
    /// When the routes can't be listed. A single route that is refused is in the outcome.
    pub async fn sync(&self, wanted: &PodRoutes) -> Result<Outcome, RouteError> {
        let mut outcome = Outcome::default();
        let mut present = BTreeSet::new();
        let (ours, others): (Vec<_>, Vec<_>) =
            self.listed(RouteHeader::RT_TABLE_MAIN).await?.into_iter().partition(is_ours);
        outcome.foreign = others.iter().filter_map(destination).filter(|range| wanted.contains_key(range)).collect();
        let wanted: PodRoutes = wanted
            .iter()
            .filter(|(range, _)| !outcome.foreign.contains(range))
            .map(|(range, via)| (*range, *via))
            .collect();
        let mut moves = BTreeSet::new();
        for route in ours {
            let range = destination(&route);
            if range.is_some_and(|range| wanted.contains_key(&range) && wanted.get(&range).copied() == gateway(&route))
            {
                present.extend(range);
            } else if range.is_none_or(|range| !wanted.contains_key(&range)) {
                // A route that vanished by itself meanwhile is as good.
                if let Err(error) = self.0.route().del(route).execute().await {
                    tracing::debug!(?range, %error, "an old route was not removed");
                }
            } else {
                moves.extend(range);
            }
        }
        for (&range, &via) in &wanted {
            if !present.contains(&range) {
                let Some(route) = pod_route(range, via) else { continue };
                let add = self.0.route().add(route);
                // What is there is ours. Without that, a route that comes from somebody else at this moment is left alone.
                let add = if moves.contains(&range) { add.replace() } else { add };
                if let Err(error) = add.execute().await {
                    outcome.failed.insert(range, format!("via {via}: {error}"));
                    continue;
                }
                tracing::info!(%range, %via, "route to pods");
            }
            outcome.present += 1;
        }
        Ok(outcome)
    }

    /// Our routes of both families in a table.
    async fn existing(&self, table: u8) -> Result<Vec<RouteMessage>, RouteError> {
        let mut routes = self.listed(table).await?;
        routes.retain(is_ours);
        Ok(routes)
    }

    /// The routes of both families in a table, or in all of them (`RT_TABLE_UNSPEC`).
    async fn listed(&self, table: u8) -> Result<Vec<RouteMessage>, RouteError> {
        let mut routes = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut filter = RouteMessage::default();
            filter.header.address_family = family;
            filter.header.table = table;
            let listed: Result<Vec<RouteMessage>, _> = self.0.route().get(filter).execute().try_collect().await;
            match listed {
                Ok(listed) => routes.extend(listed),
                // A kernel without IPv6.
                Err(_) if family == AddressFamily::Inet6 => {}
                Err(error) => return Err(RouteError::List(Box::new(error))),
            }
        }
        // The kernel need not filter.
        routes.retain(|route| table == RouteHeader::RT_TABLE_UNSPEC || route.header.table == table);
        Ok(routes)
    }

    /// Removes every route of ours, of both families and in all tables.
    ///
    /// # Errors
    /// When the routes can't be listed, or one is still there.
    pub async fn remove_all(&self) -> Result<(), RouteError> {
        for route in self.existing(RouteHeader::RT_TABLE_UNSPEC).await? {
            self.0.route().del(route).execute().await.map_err(|error| RouteError::Remove(Box::new(error)))?;
        }
        Ok(())
    }

    /// Removes the routes to pod ranges that an earlier agent left.
    pub async fn leave(self) {
        if let Err(error) = self.sync(&PodRoutes::new()).await {
            tracing::warn!(%error, "routes to pods that shall not be kept can't be removed");
        }
    }

    /// Keeps the routes to pod ranges equal to the catalog until shutdown.
    pub async fn keep(
        self,
        config: Arc<Config>,
        catalog: Arc<CatalogStore>,
        metrics: RouteMetrics,
        shutdown: Shutdown,
    ) {
        let mut generations = catalog.subscribe();
        let (mut failed, mut foreign) = (BTreeMap::new(), BTreeSet::new());
        let mut ipv6_told = false;
        loop {
            generations.mark_unchanged();
            if catalog.is_synced() {
                let snapshot = catalog.snapshot();
                let wanted = wanted(&snapshot, &config.viewpoint(&snapshot));
                if !ipv6_told && wanted.keys().any(|range| range.network().is_ipv6()) && !is_on(FORWARDING6) {
                    ipv6_told = true;
                    // A host that forwards takes no more router advertisements (RFC 4861, 6.2.7): not ours to decide.
                    tracing::warn!("{FORWARDING6} is not 1: pods reach those of other nodes by IPv4 only");
                }
                match self.sync(&wanted).await {
                    Ok(outcome) => {
                        metrics.present.set(i64::try_from(outcome.present).unwrap_or(i64::MAX));
                        metrics.failed.set(i64::try_from(outcome.failed.len()).unwrap_or(i64::MAX));
                        metrics.foreign.set(i64::try_from(outcome.foreign.len()).unwrap_or(i64::MAX));
                        if outcome.foreign != foreign {
                            tracing::info!(ranges = outcome.foreign.len(), "pod ranges to which routes of others lead");
                        }
                        foreign = outcome.foreign;
                        // Once for each new reason: rounds repeat.
                        for (range, reason) in &outcome.failed {
                            if failed.get(range) != Some(reason) {
                                tracing::warn!(%range, reason, "no route to pods");
                            }
                        }
                        failed = outcome.failed;
                    }
                    Err(error) => tracing::warn!(%error, "routes to pods can't be kept"),
                }
            }
            tokio::select! {
                changed = generations.changed() => if changed.is_err() { return },
                () = tokio::time::sleep(RESYNC) => {}
                () = shutdown.stopping().cancelled() => return,
            }
            tokio::time::sleep(DEBOUNCE).await;
        }
    }
}

fn connection() -> std::io::Result<(impl Future<Output = ()> + Send + 'static, Handle)> {
    // Only so does the kernel list one table alone (Linux 4.20): others can hold a route for each Service.
    let (connection, handle, _) =
        rtnetlink::new_connection_with_strict_check().or_else(|_| rtnetlink::new_connection())?;
    Ok((connection, handle))
}

/// The routes that a node needs: to the pod ranges of all other nodes of its network.
pub fn wanted(catalog: &Catalog, viewpoint: &Viewpoint) -> PodRoutes {
    let mut routes = PodRoutes::new();
    let own: Vec<IpAddr> = catalog.node(&viewpoint.node).map(|node| node.addresses.clone()).unwrap_or_default();
    let peers = catalog.nodes().filter(|node| node.network == viewpoint.network && node.name != viewpoint.node);
    for node in peers {
        for range in node.pod_cidrs.iter().filter_map(|range| Cidr::parse(range)) {
            let leads_there = |via: &&IpAddr| via.is_ipv4() == range.network().is_ipv4() && !own.contains(via);
            if let Some(via) = node.addresses.iter().find(leads_there) {
                routes.insert(range, *via);
            }
        }
    }
    routes
}

/// A route to a pod range; nothing if the two are of different families.
fn pod_route(range: Cidr, via: IpAddr) -> Option<RouteMessage> {
    match (range.network(), via) {
        (IpAddr::V4(address), IpAddr::V4(via)) => Some(
            RouteMessageBuilder::<Ipv4Addr>::new()
                .protocol(PROTOCOL)
                .destination_prefix(address, range.prefix())
                .gateway(via)
                .build(),
        ),
        (IpAddr::V6(address), IpAddr::V6(via)) => Some(
            RouteMessageBuilder::<Ipv6Addr>::new()
                .protocol(PROTOCOL)
                .destination_prefix(address, range.prefix())
                .gateway(via)
                .build(),
        ),
        _ => None,
    }
}

/// Whether an IPv4 route has the first of these as its preferred source address.
fn has_source(route: &RouteMessage, sources: &[IpAddr]) -> bool {
    let first = sources.iter().find_map(|source| match source {
        IpAddr::V4(source) => Some(RouteAttribute::PrefSource(RouteAddress::Inet(*source))),
        IpAddr::V6(_) => None,
    });
    route.header.address_family == AddressFamily::Inet6 || first.is_some_and(|first| route.attributes.contains(&first))
}

fn is_ours(route: &RouteMessage) -> bool {
    route.header.protocol == PROTOCOL
}

/// Lets the host pass packets between its pods and other hosts.
pub fn enable_forwarding() {
    // Per network namespace. Written only when it is off: the folder is read-only in some containers.
    if is_on(FORWARDING) {
        return;
    }
    if let Err(error) = std::fs::write(FORWARDING, "1") {
        tracing::warn!(%error, "{FORWARDING} can't be set to 1: pods reach only what is on this node");
    }
}

fn is_on(setting: &str) -> bool {
    std::fs::read_to_string(setting).is_ok_and(|value| value.trim() == "1")
}

fn local_route6(address: Ipv6Addr, prefix: u8) -> RouteMessage {
    RouteMessageBuilder::<Ipv6Addr>::new()
        .table_id(LOCAL_TABLE.into())
        .kind(RouteType::Local)
        .protocol(PROTOCOL)
        .destination_prefix(address, prefix)
        .output_interface(LOOPBACK)
        .build()
}

fn destination(route: &RouteMessage) -> Option<Cidr> {
    let prefix = route.header.destination_prefix_length;
    route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Destination(RouteAddress::Inet(address)) => Cidr::new((*address).into(), prefix),
        RouteAttribute::Destination(RouteAddress::Inet6(address)) => Cidr::new((*address).into(), prefix),
        _ => None,
    })
}

fn gateway(route: &RouteMessage) -> Option<IpAddr> {
    route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Gateway(RouteAddress::Inet(address)) => Some(IpAddr::V4(*address)),
        RouteAttribute::Gateway(RouteAddress::Inet6(address)) => Some(IpAddr::V6(*address)),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use edgemesh_mesh::CatalogStore;
    use serde_json::json;

    use super::*;

    #[test]
    fn pods_of_the_own_network_get_routes_and_no_others() {
        let store = CatalogStore::new();
        for (name, network, addresses, ranges) in [
            ("a1", "site-a", &["192.168.1.11", "fd00:a::11"][..], &["10.244.1.0/24", "fd00:1::/64"][..]),
            ("a2", "site-a", &["192.168.1.12", "fd00:a::12"], &["10.244.2.0/24", "fd00:2::/64"]),
            ("b1", "site-b", &["192.168.2.11"], &["10.244.3.0/24"]),
            ("a3", "site-a", &["fd00:a::13"], &["10.244.4.0/24"]),
        ] {
            let node = json!({
                "metadata": {"name": name, "labels": {"edgemesh.dev/network": network}},
                "spec": {"podCIDR": ranges[0], "podCIDRs": ranges},
                "status": {"addresses": addresses.iter().map(|ip| json!({"type": "InternalIP", "address": ip}))
                    .collect::<Vec<_>>()},
            });
            store.apply_node(&serde_json::from_value(node).unwrap());
        }
        store.publish();
        let catalog = store.snapshot();
        let routes = wanted(&catalog, &Viewpoint::of(&catalog, "a1"));
        let expected = [("10.244.2.0/24", "192.168.1.12"), ("fd00:2::/64", "fd00:a::12")];
        let expected = expected.map(|(range, via)| (Cidr::parse(range).unwrap(), via.parse().unwrap()));
        assert_eq!(routes, PodRoutes::from(expected));
    }
}
