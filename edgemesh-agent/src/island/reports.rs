//! What other nodes of the network reported of their own endpoints, for as long as it is to be believed.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use edgemesh_mesh::{Catalog, Viewpoint};
use edgemesh_tunnel::{PeerName, Refusal, RefusalReason, Session, TunnelStream};
use parking_lot::Mutex;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    time::timeout,
};

use super::message::{self, Held, Report};
use crate::{metrics::IslandMetrics, overlay::COMPONENT};

/// How long a peer may take to send its report.
const DEADLINE: Duration = Duration::from_secs(5);
/// The answer to a report that was taken.
pub(super) const TAKEN: u8 = 1;

/// The reports that arrived.
#[derive(Debug, Default)]
pub struct Reports {
    metrics: IslandMetrics,
    /// A report is forgotten after this time.
    keep: Duration,
    received: Mutex<Received>,
}

#[derive(Debug, Default)]
struct Received {
    /// Nothing is believed while the cloud is there.
    is_island: bool,
    by_node: HashMap<Arc<str>, (Instant, Report)>,
}

impl Reports {
    /// None yet; they are kept for a time.
    pub(super) fn new(keep: Duration, metrics: IslandMetrics) -> Self {
        Self { metrics, keep, received: Mutex::default() }
    }

    /// Begins to take reports, or stops and forgets all.
    pub(super) fn set_island(&self, is_island: bool) {
        *self.received.lock() = Received { is_island, by_node: HashMap::new() };
    }

    /// Whether a peer may report now, and what takes its report.
    pub(crate) fn accept(
        self: &Arc<Self>,
        catalog: Arc<Catalog>,
        viewpoint: &Viewpoint,
        peer: &PeerName,
    ) -> Result<Session, Refusal> {
        let node =
            catalog.node(&peer.node).filter(|node| node.network == viewpoint.network && node.name != viewpoint.node);
        let Some(node) = node.filter(|_| peer.component == COMPONENT).map(|node| Arc::clone(&node.name)) else {
            self.metrics.reported("refused");
            return Err(Refusal::new(RefusalReason::NotHere, "only agents of the same network report endpoints"));
        };
        if !self.received.lock().is_island {
            self.metrics.reported("refused");
            return Err(Refusal::new(RefusalReason::NotServing, "the cloud is there"));
        }
        let reports = Arc::clone(self);
        Ok(Session::new(move |mut stream| async move {
            match timeout(DEADLINE, reports.take(&catalog, &node, &mut stream)).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => {
                    reports.metrics.reported("malformed");
                    tracing::debug!(%node, %error, "a report about endpoints can't be used");
                }
                Err(_) => reports.metrics.reported("malformed"),
            }
        }))
    }

    async fn take(&self, catalog: &Catalog, node: &Arc<str>, stream: &mut TunnelStream) -> std::io::Result<()> {
        let mut bytes = Vec::new();
        // One byte more than the limit, so that what is longer is seen to be.
        stream.take(message::MAX_LENGTH as u64 + 1).read_to_end(&mut bytes).await?;
        let report = message::decode(&bytes).map_err(std::io::Error::other)?;
        self.believe(catalog, node, report, Instant::now());
        stream.write_all(&[TAKEN]).await?;
        stream.shutdown().await
    }

    /// Keeps what a node says about endpoints that the catalog places on that node, and nothing else.
    fn believe(&self, catalog: &Catalog, node: &Arc<str>, mut report: Report, now: Instant) {
        let all = report.len();
        report.retain(|endpoint, _| is_on(catalog, *endpoint, node));
        self.metrics.reported(if report.len() == all { "taken" } else { "foreign" });
        let mut received = self.received.lock();
        // The cloud may have come back while the report was on its way.
        if received.is_island {
            received.by_node.insert(Arc::clone(node), (now, report));
        }
    }

    /// What the endpoint's own node says, if it said so lately.
    pub(super) fn fresh(&self, node: &str, endpoint: SocketAddr, now: Instant) -> Option<Held> {
        let received = self.received.lock();
        let (at, report) = received.by_node.get(node)?;
        (now.duration_since(*at) < self.keep).then(|| report.get(&endpoint).copied())?
    }

    /// Forgets what a node said.
    pub(super) fn forget(&self, node: &str) {
        self.received.lock().by_node.remove(node);
    }

    /// Forgets reports that are too old.
    pub(super) fn forget_old(&self, now: Instant) {
        self.received.lock().by_node.retain(|_, (at, _)| now.duration_since(*at) < self.keep);
    }

    /// For each node, how old its report is in seconds, and its endpoints.
    pub(super) fn debug_view(&self) -> serde_json::Value {
        let received = self.received.lock();
        let view = received.by_node.iter().map(|(node, (at, report))| {
            let named = |held: &Held| match held {
                Held::Dead => "dead",
                Held::Back => "back",
                Held::AsKnown => "as known",
            };
            let endpoints: serde_json::Map<_, _> =
                report.iter().map(|(endpoint, held)| (endpoint.to_string(), named(held).into())).collect();
            (node.to_string(), serde_json::json!({"age_seconds": at.elapsed().as_secs(), "endpoints": endpoints}))
        });
        serde_json::Value::Object(view.collect())
    }
}

/// Whether the catalog knows a TCP endpoint there and places it on the node.
fn is_on(catalog: &Catalog, at: SocketAddr, node: &str) -> bool {
    catalog.is_endpoint_on(at, edgemesh_mesh::model::Protocol::Tcp, node)
}

#[cfg(test)]
mod tests {
    use edgemesh_mesh::CatalogStore;
    use serde_json::json;

    use super::*;

    fn catalog() -> Arc<Catalog> {
        let store = CatalogStore::new();
        for (name, range, network) in
            [("here", "10.244.1.0/24", "lan"), ("there", "10.244.2.0/24", "lan"), ("far", "10.244.3.0/24", "other")]
        {
            let labels = json!({"edgemesh.dev/network": network});
            let node = json!({"metadata": {"name": name, "labels": labels}, "spec": {"podCIDRs": [range]}});
            store.apply_node(&serde_json::from_value(node).unwrap());
        }
        let service = json!({
            "metadata": {"namespace": "default", "name": "web"},
            "spec": {"clusterIP": "None", "ports": [{"name": "http", "port": 80, "protocol": "TCP"}]},
        });
        let slice = json!({
            "metadata": {"namespace": "default", "name": "web-1", "labels": {"kubernetes.io/service-name": "web"}},
            "addressType": "IPv4",
            "ports": [{"name": "http", "port": 80, "protocol": "TCP"}],
            "endpoints": [
                {"addresses": ["10.244.2.5"], "nodeName": "there", "conditions": {"ready": true}},
                {"addresses": ["10.244.2.6"], "conditions": {"ready": true}},
                {"addresses": ["10.244.1.5"], "nodeName": "here", "conditions": {"ready": true}},
                {"addresses": ["10.244.3.5"], "nodeName": "far", "conditions": {"ready": true}},
            ],
        });
        store.apply_service(&serde_json::from_value(service).unwrap());
        store.apply_endpoint_slice(&serde_json::from_value(slice).unwrap());
        store.publish();
        store.snapshot()
    }

    fn reports() -> Arc<Reports> {
        Arc::new(Reports::new(Duration::from_secs(10), IslandMetrics::default()))
    }

    #[test]
    fn a_node_is_believed_about_its_own_endpoints_only_and_not_for_ever() {
        let (catalog, reports, now) = (catalog(), reports(), Instant::now());
        let told =
            ["10.244.2.5:80", "10.244.2.6:80", "10.244.1.5:80", "10.244.3.5:80", "10.244.2.5:22", "10.244.2.9:80"];
        let report: Report = told.map(|endpoint| (endpoint.parse().unwrap(), Held::Dead)).into();
        reports.believe(&catalog, &"there".into(), report.clone(), now);
        assert_eq!(reports.fresh("there", told[0].parse().unwrap(), now), None, "the cloud is there");

        reports.set_island(true);
        reports.believe(&catalog, &"there".into(), report, now);
        let believed = |now| told.map(|endpoint| reports.fresh("there", endpoint.parse().unwrap(), now).is_some());
        assert_eq!(believed(now), [true, true, false, false, false, false]);
        assert_eq!(believed(now + Duration::from_secs(10)), [false; 6]);
        reports.forget_old(now + Duration::from_secs(10));
        assert_eq!(reports.debug_view(), json!({}));
    }

    #[test]
    fn only_agents_of_the_same_network_report_and_only_to_an_island() {
        let (catalog, reports) = (catalog(), reports());
        let viewpoint = Viewpoint::of(&catalog, "here");
        let may = |node: &str, component: &str| {
            let peer = PeerName { node: node.into(), component: component.into() };
            reports.accept(catalog.clone(), &viewpoint, &peer).is_ok()
        };
        assert!(!may("there", "agent"));
        reports.set_island(true);
        assert!(may("there", "agent"));
        for (node, component) in [("there", "gateway"), ("far", "agent"), ("here", "agent"), ("nowhere", "agent")] {
            assert!(!may(node, component), "{node}/{component}");
        }
    }
}
