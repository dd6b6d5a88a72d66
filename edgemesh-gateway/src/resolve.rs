//! From Gateway API objects and the catalog to the routing table and every object's status. Pure but for the task that repeats it.

mod grants;
mod listeners;
mod routes;

use std::{sync::Arc, time::Duration};

use edgemesh_api::names::GATEWAY_CONTROLLER_NAME;
use edgemesh_mesh::{CatalogStore, catalog::Catalog};
use edgemesh_telemetry::Shutdown;
use serde_json::{Value, json};
use tokio::sync::watch;

use crate::{
    objects::{Name, Objects},
    routing::{RoutingTable, Rule},
};

pub use listeners::Certificates;

/// Changes that come together are resolved once.
const SETTLE: Duration = Duration::from_millis(20);

/// Addresses that the status of a Gateway may have (Gateway API, `GatewayStatus`).
const MAX_ADDRESSES: usize = 16;

/// What follows from all objects at one moment.
#[derive(Debug, Clone, Default)]
pub struct Resolved {
    /// Whether the objects were known when this was made; before that, nothing is opened or closed.
    pub known: bool,
    /// The routing table.
    pub table: RoutingTable,
    /// What the objects' status should say.
    pub statuses: Statuses,
    /// The objects that it was made from, for their present status.
    pub objects: Arc<Objects>,
}

/// What the objects' status should say.
#[derive(Debug, Clone, Default)]
pub struct Statuses {
    /// Conditions of GatewayClasses.
    pub classes: Vec<(Name, Vec<Verdict>)>,
    /// Of Gateways.
    pub gateways: Vec<(Name, GatewayVerdict)>,
    /// Of HTTPRoutes: a list for each parent that is one of our Gateways, by the parent's place in the route.
    pub routes: Vec<(Name, Vec<ParentVerdict>)>,
}

/// A parent's place in its route, and its conditions.
pub type ParentVerdict = (usize, Vec<Verdict>);

/// A condition without its time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    /// Type, for example `Accepted`.
    pub kind: &'static str,
    /// Whether it holds.
    pub holds: bool,
    /// Reason, a word of the Gateway API.
    pub reason: &'static str,
    /// For people.
    pub message: String,
}

impl Verdict {
    /// It holds.
    pub fn yes(kind: &'static str, reason: &'static str) -> Self {
        Self { kind, holds: true, reason, message: String::new() }
    }

    /// It does not hold.
    pub fn no(kind: &'static str, reason: &'static str, message: impl Into<String>) -> Self {
        Self { kind, holds: false, reason, message: message.into() }
    }
}

/// A Gateway's status.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct GatewayVerdict {
    /// Its conditions.
    pub conditions: Vec<Verdict>,
    /// Addresses of the nodes that run a gateway.
    pub addresses: Vec<String>,
    /// Of each listener, in the Gateway's order: its name, attached routes, conditions.
    pub listeners: Vec<(String, i32, Vec<Verdict>)>,
}

/// Repeats [`resolve`] whenever an object or the catalog changes.
pub fn start(
    mut objects: watch::Receiver<Arc<Objects>>,
    catalog: Arc<CatalogStore>,
    shutdown: &Shutdown,
) -> watch::Receiver<Arc<Resolved>> {
    let (sender, receiver) = watch::channel(Arc::default());
    let stopping = shutdown.stopping().clone();
    shutdown.spawn(async move {
        let mut generations = catalog.subscribe();
        let mut certificates = Certificates::default();
        loop {
            tokio::select! {
                changed = objects.changed() => if changed.is_err() { return },
                changed = generations.changed() => if changed.is_err() { return },
                () = stopping.cancelled() => return,
            }
            tokio::time::sleep(SETTLE).await;
            let current = Arc::clone(&objects.borrow_and_update());
            generations.borrow_and_update();
            let snapshot = catalog.snapshot();
            if snapshot.is_synced() {
                sender.send_replace(Arc::new(resolve(&current, &snapshot, &mut certificates)));
            }
        }
    });
    receiver
}

/// The routing table and statuses for the objects.
pub fn resolve(objects: &Arc<Objects>, catalog: &Catalog, certificates: &mut Certificates) -> Resolved {
    let ours = |name: &str| {
        let class = objects.classes.get(&(String::new(), name.to_owned()));
        class.is_some_and(|class| class.spec.controller_name == GATEWAY_CONTROLLER_NAME)
    };
    let mut statuses = Statuses::default();
    for (name, class) in &objects.classes {
        if class.spec.controller_name == GATEWAY_CONTROLLER_NAME {
            statuses.classes.push((name.clone(), vec![Verdict::yes("Accepted", "Accepted")]));
        }
    }
    // The oldest Gateway wins where two want the same.
    let mut gateways: Vec<_> = objects.gateways.iter().filter(|(_, g)| ours(&g.spec.gateway_class_name)).collect();
    gateways.sort_by_key(|(name, gateway)| (created(&gateway.metadata), (*name).clone()));
    let mut claimed = listeners::judge(&gateways, objects, certificates);
    let table = routes::attach(objects, catalog, &mut claimed, &mut statuses);
    let addresses = addresses(catalog);
    for (name, listeners) in claimed {
        let working = listeners.iter().filter(|listener| listener.usable()).count();
        let mut conditions = if working == listeners.len() {
            vec![Verdict::yes("Accepted", "Accepted")]
        } else {
            let bad: Vec<_> = listeners.iter().filter(|l| !l.usable()).map(|l| l.name.as_str()).collect();
            let message = format!("listeners that can't be served: {}", bad.join(", "));
            vec![Verdict { holds: working > 0, ..Verdict::no("Accepted", "ListenersNotValid", message) }]
        };
        conditions.push(if working > 0 {
            Verdict::yes("Programmed", "Programmed")
        } else {
            Verdict::no("Programmed", "Invalid", "no listener can be served")
        });
        let listeners = listeners.into_iter().map(|l| (l.name.clone(), l.attached, l.verdicts)).collect();
        statuses.gateways.push((name, GatewayVerdict { conditions, addresses: addresses.clone(), listeners }));
    }
    Resolved { known: true, table, statuses, objects: Arc::clone(objects) }
}

/// Addresses of the nodes that are to run a gateway and have done so. All gateways write the same status, so the order is the same
/// for all: else each would write its own in the place of another's.
fn addresses(catalog: &Catalog) -> Vec<String> {
    let gateways = catalog.nodes().filter(|node| node.gateway && node.peers.contains_key("gateway"));
    let mut addresses: Vec<_> = gateways.flat_map(|node| &node.addresses).collect();
    addresses.sort();
    addresses.dedup();
    addresses.into_iter().take(MAX_ADDRESSES).map(ToString::to_string).collect()
}

/// Creation time in seconds; objects without one are the youngest.
fn created(metadata: &kube::api::ObjectMeta) -> i64 {
    metadata.creation_timestamp.as_ref().map_or(i64::MAX, |time| time.0.as_second())
}

/// The routing table for `/debug/routes`.
pub fn debug_view(resolved: &Resolved) -> Value {
    let mut ports = serde_json::Map::new();
    for (number, port) in &resolved.table.ports {
        let listeners: Vec<Value> = port
            .listeners
            .iter()
            .map(|listener| {
                let hosts = listener.hosts.iter();
                let hosts: Vec<Value> =
                    hosts.map(|h| json!({"host": h.host.to_string(), "rules": h.rules.iter().map(rule_view).collect::<Vec<_>>()})).collect();
                json!({"listener": listener.name, "host": listener.host.to_string(), "hosts": hosts})
            })
            .collect();
        ports.insert(number.to_string(), json!({"tls": port.tls.is_some(), "listeners": listeners}));
    }
    json!({"known": resolved.known, "ports": ports})
}

fn rule_view(rule: &Rule) -> Value {
    let backends = rule.backends.all.iter().map(|backend| {
        let target =
            backend.target.as_ref().map(|(service, port)| format!("{}/{}:{port}", service.namespace, service.name));
        json!({"weight": backend.weight, "target": target})
    });
    json!({"route": rule.route, "match": format!("{:?}", rule.condition), "backends": backends.collect::<Vec<_>>()})
}
