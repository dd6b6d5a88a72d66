//! The node's own Node: registers it, keeps its labels and status true, and renews its Lease. All through the store, so
//! it works with no cloud; the outbox carries it there.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use edgemesh_api::{
    ObjectKey, ResourceName,
    names::{EDGE_ROLE_LABEL, NETWORK_LABEL, NODE_LEASE_NAMESPACE},
};
use edgemesh_apiserver::{
    ApiError, Identity, RequestContext,
    store::{Part, Store},
};
use edgemesh_telemetry::Shutdown;
use jiff::Timestamp;
use serde_json::{Map, Value, json};
use tokio::sync::watch;

use crate::{config::Role, machine::Machine, pods::NodeConditions};

/// How often the status is looked at, and the Lease renewed (Kubernetes, "Node heartbeats").
const INTERVAL: Duration = Duration::from_secs(10);
/// How often the status is written even when nothing changed.
const STATUS_AT_LEAST: Duration = Duration::from_secs(5 * 60);
/// How long the Lease lasts.
const LEASE_SECONDS: u64 = 40;

/// What the Node says that is not measured.
#[derive(Debug, Clone)]
pub struct NodeConfig {
    /// Its name.
    pub name: String,
    /// Its address; found by asking the kernel for the way to the hub where it is not set.
    pub address: Option<IpAddr>,
    /// Its IPv6 address, in a dual-stack cluster.
    pub address6: Option<Ipv6Addr>,
    /// The hub's host and port.
    pub hub: (String, u16),
    /// Its network.
    pub network: Option<String>,
    /// Edge or cloud.
    pub role: Role,
    /// Further labels.
    pub labels: BTreeMap<String, String>,
    /// The folder whose file system counts as the node's.
    pub data_dir: PathBuf,
}

/// Starts the tasks that keep Node and Lease. `conditions` is the runtime's state, none without a runtime; `synced`
/// counts how often the node came in step with the cloud.
pub fn start(
    config: NodeConfig,
    store: Store,
    conditions: Option<watch::Receiver<NodeConditions>>,
    synced: watch::Receiver<u64>,
    shutdown: &Shutdown,
) {
    let context = RequestContext::new(Identity::node(&config.name));
    let lease = Lease { store: store.clone(), name: config.name.clone(), context: context.clone() };
    let node = Node { config, store, context, conditions, synced, written: None };
    shutdown.spawn(node.run(shutdown.clone()));
    shutdown.spawn(lease.run(shutdown.clone()));
}

struct Node {
    config: NodeConfig,
    store: Store,
    context: RequestContext,
    conditions: Option<watch::Receiver<NodeConditions>>,
    synced: watch::Receiver<u64>,
    written: Option<tokio::time::Instant>,
}

impl Node {
    async fn run(mut self, shutdown: Shutdown) {
        let mut force = true;
        loop {
            if let Err(error) = self.sync(force).await {
                tracing::warn!(%error, "the node's own Node can't be written; trying again");
            }
            force = false;
            let conditions = self.conditions.as_mut();
            tokio::select! {
                () = tokio::time::sleep(INTERVAL) => {}
                () = changed(conditions) => {}
                // What the cloud thought of the node while it was away is overwritten.
                Ok(()) = self.synced.changed() => force = true,
                () = shutdown.stopping().cancelled() => return,
            }
        }
    }

    fn key(&self) -> ObjectKey {
        ObjectKey::new(ResourceName::new("", "v1", "nodes"), "", &self.config.name)
    }

    async fn sync(&mut self, force: bool) -> Result<(), ApiError> {
        let key = self.key();
        let labels = self.labels();
        let present = match self.store.get(&key).await {
            Ok(present) => present,
            Err(error) if error.is_not_found() => {
                let node = json!({
                    "apiVersion": "v1", "kind": "Node", "metadata": {"name": self.config.name, "labels": labels},
                });
                match self.store.create(&key.resource, "", node, &self.context).await {
                    Ok(created) => created,
                    // The cloud's copy came in between.
                    Err(error) if error.is_already_exists() => self.store.get(&key).await?,
                    Err(error) => return Err(error),
                }
            }
            Err(error) => return Err(error),
        };
        if labels.iter().any(|(name, value)| present["metadata"]["labels"][name] != *value) {
            let change = move |_: &_, now: &std::sync::Arc<Value>| {
                let mut node = (**now).clone();
                if !node["metadata"]["labels"].is_object() {
                    node["metadata"]["labels"] = json!({});
                }
                for (name, value) in labels {
                    node["metadata"]["labels"][name] = value;
                }
                Ok(node)
            };
            self.store.modify(&key, Part::Main, &self.context, change).await?;
        }
        self.write_status(&key, &present, force).await
    }

    fn labels(&self) -> Map<String, Value> {
        let mut labels = Map::new();
        for (name, value) in &self.config.labels {
            labels.insert(name.clone(), json!(value));
        }
        labels.insert("kubernetes.io/hostname".to_owned(), json!(self.config.name));
        labels.insert("kubernetes.io/os".to_owned(), json!("linux"));
        labels.insert("kubernetes.io/arch".to_owned(), json!(crate::machine::architecture()));
        if let Some(network) = &self.config.network {
            labels.insert(NETWORK_LABEL.to_owned(), json!(network));
        }
        if self.config.role == Role::Edge {
            labels.insert(EDGE_ROLE_LABEL.to_owned(), json!(""));
        }
        labels
    }

    async fn write_status(&mut self, key: &ObjectKey, present: &Value, force: bool) -> Result<(), ApiError> {
        let address = match self.config.address {
            Some(address) => Some(address),
            None => address_towards(&self.config.hub).await,
        };
        let machine = Machine::read(&self.config.data_dir);
        let conditions = self.conditions.as_ref().map(|conditions| conditions.borrow().clone());
        let further = self.config.address6.map(IpAddr::from).filter(|further| address != Some(*further));
        let addresses: Vec<IpAddr> = address.into_iter().chain(address.and(further)).collect();
        let status = status(&self.config.name, &addresses, &machine, conditions.as_ref(), &present["status"]);
        let old = self.written.is_none_or(|at| at.elapsed() >= STATUS_AT_LEAST);
        if !force && !old && without_heartbeats(&status) == without_heartbeats(&present["status"]) {
            return Ok(());
        }
        let change = move |_: &_, now: &std::sync::Arc<Value>| {
            let mut node = (**now).clone();
            if !node["status"].is_object() {
                node["status"] = json!({});
            }
            if let (Some(all), Some(own)) = (node["status"].as_object_mut(), status.as_object()) {
                all.extend(own.clone());
            }
            Ok(node)
        };
        self.store.modify(key, Part::Status, &self.context, change).await?;
        self.written = Some(tokio::time::Instant::now());
        Ok(())
    }
}

async fn changed(conditions: Option<&mut watch::Receiver<NodeConditions>>) {
    if let Some(conditions) = conditions
        && conditions.changed().await.is_ok()
    {
        return;
    }
    std::future::pending().await
}

/// The address from which the kernel would talk to the hub. Nothing is sent.
async fn address_towards((host, port): &(String, u16)) -> Option<IpAddr> {
    let resolve = tokio::time::timeout(Duration::from_secs(2), tokio::net::lookup_host((host.as_str(), *port)));
    let target: SocketAddr = resolve.await.ok()?.ok()?.next()?;
    let any: SocketAddr = if target.is_ipv4() { ([0; 4], 0).into() } else { ([0_u16; 8], 0).into() };
    let socket = tokio::net::UdpSocket::bind(any).await.ok()?;
    socket.connect(target).await.ok()?;
    Some(socket.local_addr().ok()?.ip()).filter(|address| !address.is_unspecified())
}

/// The status as it is now (Kubernetes, "Node Status"). `before` gives the times of conditions that did not change.
fn status(
    name: &str,
    internal: &[IpAddr],
    machine: &Machine,
    conditions: Option<&NodeConditions>,
    before: &Value,
) -> Value {
    let mut addresses = Vec::new();
    // With no way to the hub, the node keeps the address that it had.
    match internal {
        [] => addresses.extend(
            before["addresses"].as_array().into_iter().flatten().filter(|a| a["type"] == "InternalIP").cloned(),
        ),
        known => addresses.extend(known.iter().map(|ip| json!({"type": "InternalIP", "address": ip}))),
    }
    addresses.push(json!({"type": "Hostname", "address": name}));
    let now = Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
    let condition = |type_: &str, holds: bool, reason: &str, message: &str| {
        let status = if holds { "True" } else { "False" };
        let old = before["conditions"].as_array().into_iter().flatten().find(|old| old["type"] == type_);
        let since = old.filter(|old| old["status"] == status).and_then(|old| old["lastTransitionTime"].as_str());
        json!({
            "type": type_, "status": status, "reason": reason, "message": message,
            "lastHeartbeatTime": now, "lastTransitionTime": since.unwrap_or(&now),
        })
    };
    let (ready, reason, message) = match conditions {
        None => (false, "NoRuntime", "no container runtime is configured"),
        Some(conditions) if conditions.ready() => (true, "EdgecoreReady", "edgecore runs pods"),
        Some(NodeConditions { runtime, .. }) if !runtime.ready => (
            false,
            "RuntimeNotReady",
            if runtime.message.is_empty() { "the runtime does not answer yet" } else { &runtime.message },
        ),
        Some(NodeConditions { network, .. }) => (
            false,
            "NetworkNotReady",
            if network.message.is_empty() { "pods have no network yet" } else { &network.message },
        ),
    };
    let runtime = conditions.and_then(|conditions| conditions.version.as_ref()).map(|version| version.node_info());
    let mut info = machine.info.clone();
    info["containerRuntimeVersion"] = json!(runtime.unwrap_or_default());
    json!({
        "addresses": addresses,
        "capacity": machine.capacity,
        "allocatable": machine.allocatable,
        "conditions": [
            condition("MemoryPressure", false, "EdgecoreHasSufficientMemory", "memory is not watched for pressure"),
            condition("DiskPressure", false, "EdgecoreHasNoDiskPressure", "the disk is not watched for pressure"),
            condition("PIDPressure", false, "EdgecoreHasSufficientPID", "process numbers are not watched for pressure"),
            condition("Ready", ready, reason, message),
        ],
        "nodeInfo": info,
    })
}

fn without_heartbeats(status: &Value) -> Value {
    let mut out = json!({});
    for part in ["addresses", "capacity", "allocatable", "nodeInfo"] {
        out[part] = status[part].clone();
    }
    let conditions = status["conditions"].as_array().into_iter().flatten();
    out["conditions"] = conditions
        .map(|condition| json!([condition["type"], condition["status"], condition["reason"], condition["message"]]))
        .collect();
    out
}

struct Lease {
    store: Store,
    name: String,
    context: RequestContext,
}

impl Lease {
    async fn run(self, shutdown: Shutdown) {
        loop {
            if let Err(error) = self.renew().await {
                tracing::warn!(%error, "the node's Lease can't be renewed; trying again");
            }
            tokio::select! {
                () = tokio::time::sleep(INTERVAL) => {}
                () = shutdown.stopping().cancelled() => return,
            }
        }
    }

    async fn renew(&self) -> Result<(), ApiError> {
        let resource = ResourceName::new("coordination.k8s.io", "v1", "leases");
        let key = ObjectKey::new(resource, NODE_LEASE_NAMESPACE, &self.name);
        let now = Timestamp::now().strftime("%Y-%m-%dT%H:%M:%S.%6fZ").to_string();
        let spec = json!({"holderIdentity": self.name, "leaseDurationSeconds": LEASE_SECONDS, "renewTime": now});
        let lease = json!({
            "apiVersion": "coordination.k8s.io/v1", "kind": "Lease",
            "metadata": {"name": self.name, "namespace": NODE_LEASE_NAMESPACE}, "spec": spec,
        });
        let change = move |_: &_, present: &std::sync::Arc<Value>| {
            let mut lease = (**present).clone();
            lease["spec"] = spec;
            Ok(lease)
        };
        match self.store.modify(&key, Part::Main, &self.context, change).await {
            Ok(_) => Ok(()),
            Err(error) if error.is_not_found() => {
                self.store.create(&key.resource, NODE_LEASE_NAMESPACE, lease, &self.context).await.map(drop)
            }
            Err(error) => Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::RuntimeCondition;

    fn ready() -> NodeConditions {
        let good = RuntimeCondition { ready: true, ..RuntimeCondition::default() };
        NodeConditions { runtime: good.clone(), network: good, version: None }
    }

    #[test]
    fn a_condition_keeps_its_time_until_it_changes() {
        let machine = Machine::read(std::path::Path::new("/"));
        let mut before = status("n", &[], &machine, Some(&ready()), &Value::Null);
        for condition in before["conditions"].as_array_mut().unwrap() {
            condition["lastTransitionTime"] = json!("2020-01-01T00:00:00Z");
        }
        let same = status("n", &[], &machine, Some(&ready()), &before);
        assert_eq!(same["conditions"][3]["lastTransitionTime"], "2020-01-01T00:00:00Z");
        assert_eq!(without_heartbeats(&same), without_heartbeats(&before));
        let broken = status("n", &[], &machine, Some(&NodeConditions::default()), &before);
        assert_eq!(broken["conditions"][3]["status"], "False");
        assert_ne!(broken["conditions"][3]["lastTransitionTime"], "2020-01-01T00:00:00Z");
        assert_eq!(broken["conditions"][0]["lastTransitionTime"], "2020-01-01T00:00:00Z");
    }

    #[test]
    fn a_node_that_lost_its_way_to_the_hub_keeps_its_address() {
        let machine = Machine::read(std::path::Path::new("/"));
        let before = json!({"addresses": [{"type": "InternalIP", "address": "192.168.1.5"}]});
        let after = status("n", &[], &machine, None, &before);
        assert_eq!(after["addresses"][0]["address"], "192.168.1.5");
        let both = ["192.168.1.5", "fd00::5"].map(|ip| ip.parse().unwrap());
        let internal = status("n", &both, &machine, None, &before)["addresses"].clone();
        let internal = internal.as_array().unwrap().iter().filter(|address| address["type"] == "InternalIP");
        assert_eq!(internal.map(|address| address["address"].clone()).collect::<Vec<_>>(), ["192.168.1.5", "fd00::5"]);
    }

    #[tokio::test]
    async fn the_address_is_the_one_that_leads_to_the_hub() {
        assert_eq!(address_towards(&("127.0.0.1".to_owned(), 9)).await, Some("127.0.0.1".parse().unwrap()));
    }
}
