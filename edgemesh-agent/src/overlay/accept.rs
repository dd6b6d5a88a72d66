//! Streams that other nodes open: accepted only for endpoints that the catalog places on this node, and for addresses of its pods.

use std::{
    collections::HashSet,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use edgemesh_mesh::{
    Catalog, CatalogStore,
    cidr::Cidr,
    l4::{
        copy::{Copied, CopyEnd, Side, copy_both},
        udp::{Traffic, pump, socket},
    },
    model::{Protocol, Service, ServicePort},
};
use edgemesh_telemetry::Shutdown;
use edgemesh_tunnel::{Accept, Carried, PeerName, Refusal, RefusalReason, Session, StreamHeader, StreamTarget};
use futures::future::BoxFuture;
use tokio::net::TcpStream;

use super::{Standpoint, upstream};
use crate::{datapath::host, island::Reports};

/// A UDP flow without datagrams ends after this time. The dialing side ends it sooner; this is for those that vanished.
const UDP_IDLE: Duration = Duration::from_secs(90);

/// Decides about streams, and connects them.
pub(super) struct Acceptor {
    standpoint: Standpoint,
    catalog: Arc<CatalogStore>,
    reports: Arc<Reports>,
    shutdown: Shutdown,
}

impl Acceptor {
    pub(super) fn new(
        standpoint: Standpoint,
        catalog: Arc<CatalogStore>,
        reports: Arc<Reports>,
        shutdown: Shutdown,
    ) -> Self {
        Self { standpoint, catalog, reports, shutdown }
    }

    async fn connect(&self, peer: &PeerName, header: &StreamHeader) -> Result<Session, Refusal> {
        let catalog = self.catalog.snapshot();
        if header.target == StreamTarget::Island {
            let viewpoint = self.standpoint.viewpoint(&catalog);
            return self.reports.accept(catalog, &viewpoint, peer);
        }
        let host_addresses = || host::addresses().unwrap_or_default();
        let called = check(&catalog, &self.standpoint.node, peer, header, host_addresses)?;
        let failed =
            |error: std::io::Error| Refusal::new(RefusalReason::DialFailed, format!("{}: {error}", header.endpoint));
        match header.protocol {
            Carried::Tcp => {
                // A gateway's connections carry the requests of many clients, one after the other.
                let client = if peer.component == super::COMPONENT { header.source.parse().ok() } else { None };
                let announcement = called
                    .filter(|(service, _)| service.proxy_protocol)
                    .map(|(service, port)| upstream::announcement(&service, &port, client));
                let mut endpoint = upstream::dial(header.endpoint, announcement).await.map_err(failed)?;
                let stop = self.shutdown.forced().clone();
                Ok(Session::new(move |mut stream| async move {
                    let copied = Copied::default();
                    let end = copy_both(&mut stream, &mut endpoint, &copied, &stop).await;
                    if let CopyEnd::Broken { error, .. } = &end {
                        tracing::debug!(%error, to = copied.forward(), from = copied.backward(), "a stream broke");
                    }
                    if end.cuts_off(Side::Second) {
                        reset(&endpoint);
                    }
                }))
            }
            Carried::Udp => {
                let socket = upstream::connected_socket(header.endpoint).await.map_err(failed)?;
                Ok(Session::new(move |stream| async move {
                    let end =
                        pump(upstream::tunnel_end(stream), socket::flow_end(socket), UDP_IDLE, &Traffic::default())
                            .await;
                    tracing::trace!(?end, "a UDP flow ended");
                }))
            }
        }
    }
}

impl Accept for Acceptor {
    fn accept<'a>(&'a self, peer: &'a PeerName, header: &'a StreamHeader) -> BoxFuture<'a, Result<Session, Refusal>> {
        Box::pin(async move {
            tracing::trace!(%peer, target = ?header.target, endpoint = %header.endpoint, source = header.source, "a stream");
            self.connect(peer, header).await
        })
    }
}

/// Makes the peer see a reset and not an orderly end, so that it doesn't take a part for the whole.
pub(super) fn reset(connection: &TcpStream) {
    if let Err(error) = socket2::SockRef::from(connection).set_linger(Some(Duration::ZERO)) {
        tracing::debug!(%error, "can't reset a connection");
    }
}

/// What is called, if that is no pod: a Service and its port.
type CalledService = Option<(Arc<Service>, Arc<ServicePort>)>;

/// Whether the header names a usable endpoint of its Service on this node, or one of its pods. `host_addresses` gives those of this
/// host's interfaces.
fn check(
    catalog: &Catalog,
    own: &str,
    peer: &PeerName,
    header: &StreamHeader,
    host_addresses: impl FnOnce() -> HashSet<IpAddr>,
) -> Result<CalledService, Refusal> {
    let (namespace, service, port_name) = match &header.target {
        StreamTarget::Service { namespace, service, port_name } => (namespace, service, port_name),
        StreamTarget::Pod => {
            let refused = |what| Refusal::new(RefusalReason::NotHere, format!("pod {}: {what}", header.endpoint));
            return check_pod(catalog, own, peer, header, host_addresses).map(|()| None).map_err(refused);
        }
        StreamTarget::Island => return Err(Refusal::new(RefusalReason::NotHere, "nothing is dialled for a report")),
    };
    let not_here = |what: &str| {
        let detail = format!("{namespace}/{service} {}: {what}", header.endpoint);
        Err(Refusal::new(RefusalReason::NotHere, detail))
    };
    let protocol = protocol(header);
    let Some(service) = catalog.service(namespace, service) else {
        return not_here("no such Service");
    };
    let Some(port) = service.port_named(port_name, protocol) else {
        return not_here("the Service has no such port");
    };
    let address = SocketAddr::new(header.endpoint.ip(), header.endpoint.port());
    let there = port.endpoints_at(address);
    if there.is_empty() {
        return not_here("no such endpoint");
    }
    let Some(endpoint) = there.iter().find(|there| catalog.node_of_endpoint(there).as_deref() == Some(own)) else {
        return not_here("the endpoint is on another node");
    };
    // What the choice on the other side may have picked a moment ago.
    let usable = endpoint.ready || endpoint.serving || service.publish_not_ready;
    if usable { Ok(Some((service.clone(), port.clone()))) } else { not_here("the endpoint is not ready") }
}

/// Whether the header names a pod of this node: an address in the node's pod ranges that isn't the host's own, or exactly an
/// endpoint that the catalog places here.
fn check_pod(
    catalog: &Catalog,
    own: &str,
    peer: &PeerName,
    header: &StreamHeader,
    host_addresses: impl FnOnce() -> HashSet<IpAddr>,
) -> Result<(), &'static str> {
    if peer.component != super::COMPONENT {
        return Err("only agents call pods");
    }
    if catalog.is_endpoint_on(header.endpoint, protocol(header), own) {
        return Ok(());
    }
    let ip = header.endpoint.ip();
    let ranges = catalog.node(own).into_iter().flat_map(|node| &node.pod_cidrs);
    let mut ranges = ranges.filter_map(|range| Cidr::parse(range));
    if ip.is_loopback() || ip.is_unspecified() || ip.is_multicast() || !ranges.any(|range| range.contains(ip)) {
        return Err("not in the pod ranges of this node");
    }
    // The first address of the range is the pods' gateway: what listens on the host would answer there. A host without any
    // address can't be: they could not be read.
    let host_addresses = host_addresses();
    if host_addresses.is_empty() || host_addresses.contains(&ip) {
        return Err("it is the host's own address");
    }
    Ok(())
}

fn protocol(header: &StreamHeader) -> Protocol {
    match header.protocol {
        Carried::Tcp => Protocol::Tcp,
        Carried::Udp => Protocol::Udp,
    }
}

#[cfg(test)]
mod tests {
    use edgemesh_mesh::CatalogStore;
    use serde_json::json;

    use super::*;

    fn catalog() -> Arc<Catalog> {
        let store = CatalogStore::new();
        let service = json!({
            "metadata": {"namespace": "default", "name": "web"},
            "spec": {"clusterIP": "10.96.0.9", "clusterIPs": ["10.96.0.9"], "ports": [{"name": "http", "port": 80, "protocol": "TCP"}]},
        });
        let slice = json!({
            "metadata": {"namespace": "default", "name": "web-1", "labels": {"kubernetes.io/service-name": "web"}},
            "addressType": "IPv4",
            "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
            "endpoints": [
                {"addresses": ["10.244.1.2"], "nodeName": "here", "conditions": {"ready": true}},
                {"addresses": ["10.244.1.3"], "nodeName": "here", "conditions": {"ready": false, "serving": false}},
                {"addresses": ["10.244.2.2"], "nodeName": "there", "conditions": {"ready": true}},
                {"addresses": ["192.168.1.10"], "nodeName": "elsewhere", "conditions": {"ready": true}},
                {"addresses": ["192.168.1.10"], "nodeName": "here", "conditions": {"ready": true}},
            ],
        });
        store.apply_service(&serde_json::from_value(service).unwrap());
        store.apply_endpoint_slice(&serde_json::from_value(slice).unwrap());
        store.publish();
        store.snapshot()
    }

    #[test]
    fn only_usable_endpoints_of_this_node_are_dialled() {
        let catalog = catalog();
        let header = |service: &str, port: &str, protocol, endpoint: &str| StreamHeader {
            target: StreamTarget::Service {
                namespace: "default".into(),
                service: service.into(),
                port_name: port.into(),
            },
            protocol,
            endpoint: endpoint.parse().unwrap(),
            source: String::new(),
        };
        let table = [
            (header("web", "http", Carried::Tcp, "10.244.1.2:8080"), None),
            // An address that a node of another network has too.
            (header("web", "http", Carried::Tcp, "192.168.1.10:8080"), None),
            (header("other", "http", Carried::Tcp, "10.244.1.2:8080"), Some("no such Service")),
            (header("web", "metrics", Carried::Tcp, "10.244.1.2:8080"), Some("no such port")),
            (header("web", "http", Carried::Udp, "10.244.1.2:8080"), Some("no such port")),
            (header("web", "http", Carried::Tcp, "10.244.1.2:22"), Some("no such endpoint")),
            (header("web", "http", Carried::Tcp, "127.0.0.1:8080"), Some("no such endpoint")),
            (header("web", "http", Carried::Tcp, "10.244.1.3:8080"), Some("not ready")),
            (header("web", "http", Carried::Tcp, "10.244.2.2:8080"), Some("another node")),
        ];
        for (header, refusal) in table {
            let outcome = check(&catalog, "here", &peer("agent"), &header, HashSet::new);
            match (outcome, refusal) {
                (Ok(_), None) => {}
                (Err(found), Some(wanted)) => assert!(found.detail.contains(wanted), "{found}"),
                (outcome, _) => panic!("{header:?}: {outcome:?}"),
            }
        }
    }

    fn peer(component: &str) -> PeerName {
        PeerName { node: "there".into(), component: component.into() }
    }

    #[test]
    fn only_pods_of_this_node_are_called_and_never_the_host_behind_them() {
        let store = CatalogStore::new();
        for (name, ranges) in [("here", json!(["10.244.1.0/24", "fd00:1::/64"])), ("there", json!(["10.244.2.0/24"]))] {
            let node = json!({"metadata": {"name": name}, "spec": {"podCIDRs": ranges}});
            store.apply_node(&serde_json::from_value(node).unwrap());
        }
        let service = json!({
            "metadata": {"namespace": "default", "name": "web"},
            "spec": {"clusterIP": "None", "ports": [{"name": "http", "port": 80, "protocol": "TCP"}]},
        });
        let slice = json!({
            "metadata": {"namespace": "default", "name": "web-1", "labels": {"kubernetes.io/service-name": "web"}},
            "addressType": "IPv4",
            "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
            "endpoints": [{"addresses": ["192.168.1.11"], "nodeName": "here", "conditions": {"ready": true}}],
        });
        store.apply_service(&serde_json::from_value(service).unwrap());
        store.apply_endpoint_slice(&serde_json::from_value(slice).unwrap());
        store.publish();
        let catalog = store.snapshot();
        let hosts = || ["127.0.0.1", "192.168.1.11", "10.244.1.1"].map(|ip| ip.parse().unwrap()).into();
        let table = [
            ("10.244.1.5:22", Carried::Tcp, "agent", None),
            ("[fd00:1::5]:53", Carried::Udp, "agent", None),
            ("192.168.1.11:8080", Carried::Tcp, "agent", None),
            ("192.168.1.11:8080", Carried::Udp, "agent", Some("not in the pod ranges")),
            ("192.168.1.11:22", Carried::Tcp, "agent", Some("not in the pod ranges")),
            ("10.244.2.5:80", Carried::Tcp, "agent", Some("not in the pod ranges")),
            ("127.0.0.1:80", Carried::Tcp, "agent", Some("not in the pod ranges")),
            ("169.254.169.254:80", Carried::Tcp, "agent", Some("not in the pod ranges")),
            ("10.244.1.1:22", Carried::Tcp, "agent", Some("the host's own")),
            ("10.244.1.5:80", Carried::Tcp, "gateway", Some("only agents")),
        ];
        for (endpoint, protocol, component, refusal) in table {
            let endpoint = endpoint.parse().unwrap();
            let header = StreamHeader { target: StreamTarget::Pod, protocol, endpoint, source: String::new() };
            match (check(&catalog, "here", &peer(component), &header, hosts), refusal) {
                (Ok(None), None) => {}
                (Err(found), Some(wanted)) => assert!(found.detail.contains(wanted), "{endpoint}: {found}"),
                (outcome, _) => panic!("{endpoint}: {outcome:?}"),
            }
        }
        let header = StreamHeader {
            target: StreamTarget::Pod,
            protocol: Carried::Tcp,
            endpoint: "10.244.1.5:22".parse().unwrap(),
            source: String::new(),
        };
        assert!(
            check(&catalog, "here", &peer("agent"), &header, HashSet::new).is_err(),
            "the host's addresses are unknown"
        );
    }
}
