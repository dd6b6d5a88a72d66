//! Streams that other nodes open: accepted only for endpoints that the catalog places on this node.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use edgemesh_mesh::{
    Catalog, CatalogStore,
    l4::{
        copy::{Copied, CopyLimits, copy_both},
        udp::{Traffic, pump, socket},
    },
    model::{Protocol, Service, ServicePort},
};
use edgemesh_telemetry::Shutdown;
use edgemesh_tunnel::{Accept, Carried, PeerName, Refusal, RefusalReason, Session, StreamHeader};
use futures::future::BoxFuture;
use tokio::net::TcpStream;

use super::upstream;

/// A UDP flow without datagrams ends after this time. The dialing side ends it sooner; this is for those that vanished.
const UDP_IDLE: Duration = Duration::from_secs(90);

/// Decides about streams, and connects them.
pub(super) struct Acceptor {
    node: Arc<str>,
    catalog: Arc<CatalogStore>,
    shutdown: Shutdown,
}

impl Acceptor {
    pub(super) fn new(node: Arc<str>, catalog: Arc<CatalogStore>, shutdown: Shutdown) -> Self {
        Self { node, catalog, shutdown }
    }

    async fn connect(&self, peer: &PeerName, header: &StreamHeader) -> Result<Session, Refusal> {
        let (service, port) = check(&self.catalog.snapshot(), &self.node, header)?;
        let failed =
            |error: std::io::Error| Refusal::new(RefusalReason::DialFailed, format!("{}: {error}", header.endpoint));
        match header.protocol {
            Carried::Tcp => {
                // A gateway's connections carry the requests of many clients, one after the other.
                let client = if peer.component == super::COMPONENT { header.source.parse().ok() } else { None };
                let announcement = service.proxy_protocol.then(|| upstream::announcement(&service, &port, client));
                let mut endpoint = upstream::dial(header.endpoint, announcement).await.map_err(failed)?;
                let limits = CopyLimits { idle: None, stop: self.shutdown.forced().clone() };
                Ok(Session::new(move |mut stream| async move {
                    let copied = Copied::default();
                    if let Err(error) = copy_both(&mut stream, &mut endpoint, &copied, &limits).await {
                        tracing::debug!(%error, to = copied.forward(), from = copied.backward(), "a stream broke");
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
            tracing::trace!(%peer, service = header.service, endpoint = %header.endpoint, source = header.source, "a stream");
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

/// Whether the header names a usable endpoint of its Service on this node; gives that Service and its port.
fn check(catalog: &Catalog, own: &str, header: &StreamHeader) -> Result<(Arc<Service>, Arc<ServicePort>), Refusal> {
    let not_here = |what: &str| {
        let detail = format!("{}/{} {}: {what}", header.namespace, header.service, header.endpoint);
        Err(Refusal::new(RefusalReason::NotHere, detail))
    };
    let protocol = match header.protocol {
        Carried::Tcp => Protocol::Tcp,
        Carried::Udp => Protocol::Udp,
    };
    let Some(service) = catalog.service(&header.namespace, &header.service) else {
        return not_here("no such Service");
    };
    let Some(port) = service.ports.iter().find(|port| *port.name == *header.port_name && port.protocol == protocol)
    else {
        return not_here("the Service has no such port");
    };
    let address = SocketAddr::new(header.endpoint.ip(), header.endpoint.port());
    let Some(endpoint) = port.endpoint(address) else { return not_here("no such endpoint") };
    if catalog.node_of_endpoint(endpoint).as_deref() != Some(own) {
        return not_here("the endpoint is on another node");
    }
    // What the choice on the other side may have picked a moment ago.
    let usable = endpoint.ready || endpoint.serving || service.publish_not_ready;
    if usable { Ok((service.clone(), port.clone())) } else { not_here("the endpoint is not ready") }
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
            namespace: "default".into(),
            service: service.into(),
            port_name: port.into(),
            protocol,
            endpoint: endpoint.parse().unwrap(),
            source: String::new(),
        };
        let table = [
            (header("web", "http", Carried::Tcp, "10.244.1.2:8080"), None),
            (header("other", "http", Carried::Tcp, "10.244.1.2:8080"), Some("no such Service")),
            (header("web", "metrics", Carried::Tcp, "10.244.1.2:8080"), Some("no such port")),
            (header("web", "http", Carried::Udp, "10.244.1.2:8080"), Some("no such port")),
            (header("web", "http", Carried::Tcp, "10.244.1.2:22"), Some("no such endpoint")),
            (header("web", "http", Carried::Tcp, "127.0.0.1:8080"), Some("no such endpoint")),
            (header("web", "http", Carried::Tcp, "10.244.1.3:8080"), Some("not ready")),
            (header("web", "http", Carried::Tcp, "10.244.2.2:8080"), Some("another node")),
        ];
        for (header, refusal) in table {
            let outcome = check(&catalog, "here", &header);
            match (outcome, refusal) {
                (Ok(_), None) => {}
                (Err(found), Some(wanted)) => assert!(found.detail.contains(wanted), "{found}"),
                (outcome, _) => panic!("{header:?}: {outcome:?}"),
            }
        }
    }
}
