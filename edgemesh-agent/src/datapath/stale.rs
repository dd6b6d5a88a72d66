//! Ends sockets that came through a Service to an endpoint that is gone: they would wait for it for ever.
//!
//! The programs remember which socket was sent where by which Service. A socket is ended only if it is remembered for the
//! backend and still has it as its peer, so none that called the pod by its own address is.

use std::{
    collections::HashMap,
    io,
    net::SocketAddr,
    path::PathBuf,
    sync::{
        Arc,
        mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel},
    },
    thread,
    time::{Duration, Instant},
};

use arc_swap::ArcSwapOption;
use edgemesh_mesh::{
    Catalog,
    model::{Protocol, ServicePort},
};
use nix::sched::{CloneFlags, setns};

use super::{
    counters::{Peer, Peers},
    frontend_counts::Owners,
    namespaces,
    plan::Frontend,
    sock_diag::{Connected, Diagnostics},
};
use crate::metrics::DatapathMetrics;

/// When sockets are looked at again: one that connected while the endpoint went may have been missed. TCP connections are ended
/// only then: the pod may live, and what is under way in them gets time to end by itself.
const SECOND_LOOK: Duration = Duration::from_secs(2);
/// How long after the start sockets are looked at that an earlier run left, unless endpoints go before.
pub(super) const FIRST_LOOK: Duration = Duration::from_secs(10);
/// How long sockets have from when their endpoint went: answers that are under way arrive, if its pod lives. It is also the least
/// time between two looks, so that a storm of changes costs little more than one.
const PAUSE: Duration = Duration::from_millis(100);

/// Finds and ends sockets. Entering their network namespaces changes the calling thread for good, so it gets one of its own.
pub struct Sweeper {
    peers: Peers,
    cgroup: PathBuf,
}

/// Remembered sockets whose endpoint is gone, by cookie and backend.
type Suspects = HashMap<(u64, SocketAddr), Protocol>;

/// Ends what came through a Service to an endpoint that is gone.
pub(super) trait Sweep: Send {
    /// Ends what came to a backend for which `is_gone(service, backend, protocol)` holds.
    fn sweep(&mut self, is_gone: &dyn Fn(SocketAddr, SocketAddr, Protocol) -> bool) -> Swept;
}

/// What a sweep did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Swept {
    /// Remembered sockets, or flows, whose endpoint is gone.
    pub suspects: usize,
    /// TCP sockets that were ended.
    pub tcp: usize,
    /// UDP sockets, or flows, that were ended.
    pub udp: usize,
    /// Sockets and namespaces that could not be dealt with.
    pub failed: usize,
}

impl Sweeper {
    pub(super) fn new(peers: Peers, cgroup: PathBuf) -> Self {
        Self { peers, cgroup }
    }

    /// Ends every socket that came through a Service to a backend for which `is_gone(service, backend, protocol)` holds.
    /// Walks what the programs remember, and if there is anything gone, all connected sockets of the node.
    pub fn sweep(&mut self, is_gone: &dyn Fn(SocketAddr, SocketAddr, Protocol) -> bool) -> Swept {
        let mut suspects: Suspects = HashMap::new();
        let read = self.peers.each(|Peer { cookie, backend, service }| {
            if is_gone(service.address, backend, service.protocol) {
                suspects.insert((cookie, backend), service.protocol);
            }
        });
        let mut swept = Swept { suspects: suspects.len(), ..Swept::default() };
        if let Err(error) = read {
            tracing::debug!(%error, "not all remembered sockets could be looked at");
            swept.failed += 1;
        }
        if suspects.is_empty() {
            return swept;
        }
        for namespace in namespaces::of_cgroup(&self.cgroup) {
            let entered = setns(namespace, CloneFlags::CLONE_NEWNET).map_err(io::Error::from);
            if let Err(error) = entered.and_then(|()| self.sweep_namespace(&suspects, &mut swept)) {
                tracing::debug!(%error, "a network namespace could not be swept");
                swept.failed += 1;
            }
        }
        // What is left has another peer now, or none: no need to look for it each time. Unless it was not looked for everywhere.
        if swept.failed == 0 {
            for (cookie, backend) in suspects.into_keys() {
                self.peers.forget(cookie, backend);
            }
        }
        swept
    }

    fn sweep_namespace(&mut self, suspects: &Suspects, swept: &mut Swept) -> io::Result<()> {
        let mut diagnostics = Diagnostics::open()?;
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            if !suspects.values().any(|of| *of == protocol) {
                continue;
            }
            let mut stale: Vec<Connected> = Vec::new();
            diagnostics.connected(protocol, |socket| {
                if suspects.contains_key(&(socket.cookie, socket.peer)) {
                    stale.push(socket);
                }
            })?;
            for socket in stale {
                match (diagnostics.destroy(&socket), protocol) {
                    (Ok(()), Protocol::Tcp) => swept.tcp += 1,
                    (Ok(()), Protocol::Udp) => swept.udp += 1,
                    // It was closed meanwhile.
                    (Err(error), _) if error.raw_os_error() == Some(libc::ENOENT) => {}
                    (Err(error), _) => {
                        tracing::debug!(%error, peer = %socket.peer, "a socket could not be ended");
                        swept.failed += 1;
                        continue;
                    }
                }
                self.peers.forget(socket.cookie, socket.peer);
            }
        }
        Ok(())
    }
}

impl Sweep for Sweeper {
    fn sweep(&mut self, is_gone: &dyn Fn(SocketAddr, SocketAddr, Protocol) -> bool) -> Swept {
        Self::sweep(self, is_gone)
    }
}

impl Swept {
    fn add(&mut self, other: Self) {
        self.suspects += other.suspects;
        self.tcp += other.tcp;
        self.udp += other.udp;
        self.failed += other.failed;
    }
}

/// Whether the endpoint behind a backend's address is gone for a socket that came through a Service.
///
/// A UDP socket has lost it when it no longer serves, as kube-proxy forgets UDP flows then; a TCP connection, which would end
/// by itself with its pod, only when the Service port is there without it.
pub fn is_gone(
    catalog: &Catalog,
    owners: &Owners<'_>,
    service: SocketAddr,
    backend: SocketAddr,
    protocol: Protocol,
) -> bool {
    let port = owners.port(Frontend { address: service, protocol });
    let endpoint = match port {
        Some(port) => port.endpoint(backend),
        // Of a Service that is gone.
        None => catalog.endpoint_at(backend, protocol),
    };
    match (protocol, endpoint) {
        (Protocol::Tcp, endpoint) => port.is_some() && endpoint.is_none(),
        (Protocol::Udp, None) => true,
        (Protocol::Udp, Some(endpoint)) => {
            let publish_not_ready = port
                .and_then(|port| catalog.service_named(&port.service))
                .is_some_and(|service| service.publish_not_ready);
            !(endpoint.ready || endpoint.serving || publish_not_ready)
        }
    }
}

/// Sweeps in a thread of its own, when it is told that endpoints went. The thread ends with this.
#[derive(Debug)]
pub(super) struct Reaper {
    /// The catalog to sweep by: the newest only.
    newest: Arc<ArcSwapOption<Catalog>>,
    wake: SyncSender<()>,
}

impl Reaper {
    /// Starts the thread, which looks for the first time so long after it was told to. Backends for which `is_ours` holds are the
    /// agent's own listeners, and never gone.
    pub(super) fn start(
        sweepers: Vec<Box<dyn Sweep>>,
        is_ours: impl Fn(SocketAddr) -> bool + Send + 'static,
        metrics: DatapathMetrics,
        first_look: Duration,
    ) -> io::Result<Self> {
        let newest = Arc::<ArcSwapOption<Catalog>>::default();
        let (wake, woken) = sync_channel(1);
        let mailbox = Arc::clone(&newest);
        thread::Builder::new().name("stale-sockets".to_owned()).spawn(move || {
            // The first catalog is the copy on disk. It can lack an endpoint that the run before still learned of, so it gets time
            // to be brought up to date.
            if woken.recv().is_ok() && !matches!(woken.recv_timeout(first_look), Err(RecvTimeoutError::Disconnected)) {
                run(sweepers, &mailbox, &woken, &is_ours, &metrics);
            }
        })?;
        Ok(Self { newest, wake })
    }

    /// Takes note of a catalog: the next look is by the newest.
    pub(super) fn note(&self, catalog: Arc<Catalog>) {
        self.newest.store(Some(catalog));
    }

    /// Has sockets looked at: endpoints are gone from the newest catalog.
    pub(super) fn look(&self) {
        // Full: it is about to look, and will see that catalog.
        let _ = self.wake.try_send(());
    }
}

fn run(
    mut sweepers: Vec<Box<dyn Sweep>>,
    mailbox: &ArcSwapOption<Catalog>,
    woken: &Receiver<()>,
    is_ours: &dyn Fn(SocketAddr) -> bool,
    metrics: &DatapathMetrics,
) {
    let mut second: Option<(Arc<Catalog>, Instant)> = None;
    loop {
        let Some(catalog) = mailbox.load_full() else { return };
        thread::sleep(PAUSE);
        let Some(newest) = mailbox.load_full() else { return };
        let first = second.take_if(|(_, at)| *at <= Instant::now()).map(|(first, _)| first);
        let (now, before) = (Owners::new(&newest), Owners::new(&catalog));
        let long_before = first.as_deref().map(|first| (first, Owners::new(first)));
        let gone = |service, backend, protocol| {
            let by = |catalog: &Catalog, owners: &Owners<'_>| is_gone(catalog, owners, service, backend, protocol);
            let long_enough = || match protocol {
                Protocol::Udp => by(&catalog, &before),
                Protocol::Tcp => long_before.as_ref().is_some_and(|(first, owners)| by(first, owners)),
            };
            !is_ours(backend) && by(&newest, &now) && long_enough()
        };
        let mut swept = Swept::default();
        sweepers.iter_mut().for_each(|sweeper| swept.add(sweeper.sweep(&gone)));
        metrics.swept(swept);
        if swept.suspects > 0 {
            tracing::info!(?swept, "sockets of endpoints that are gone");
        }
        // What has changed since the first look gets a second one, too.
        if second.is_none() && first.is_none_or(|first| !Arc::ptr_eq(&first, &catalog)) {
            second = Some((catalog, Instant::now() + SECOND_LOOK));
        }
        let next = match &second {
            Some((_, at)) => woken.recv_timeout(at.saturating_duration_since(Instant::now())),
            None => woken.recv().map_err(|_| RecvTimeoutError::Disconnected),
        };
        if next == Err(RecvTimeoutError::Disconnected) {
            return;
        }
    }
}

/// Whether a newer catalog lacks endpoints that an older one had, or that may no longer be used.
pub(super) fn any_gone(older: &Catalog, newer: &Catalog) -> bool {
    newer.changed_services(older).iter().any(|name| {
        let Some(old) = older.service_named(name) else { return false };
        let new = newer.service_named(name);
        old.ports.iter().any(|port| {
            let same = |other: &&Arc<ServicePort>| other.name == port.name && other.protocol == port.protocol;
            let new = new.and_then(|service| service.ports.iter().find(same));
            port.endpoints.iter().any(|endpoint| {
                let still = new.and_then(|port| port.endpoint(SocketAddr::new(endpoint.address, endpoint.port)));
                still.is_none_or(|still| (endpoint.serving || endpoint.ready) && !(still.serving || still.ready))
            })
        })
    })
}

#[cfg(test)]
mod tests {
    use edgemesh_mesh::CatalogStore;
    use serde_json::{Value, json};

    use super::*;

    fn store(endpoints: &Value) -> Arc<CatalogStore> {
        let store = CatalogStore::new();
        let node = json!({"metadata": {"name": "a1"},
            "status": {"addresses": [{"type": "InternalIP", "address": "192.168.1.11"}]}});
        store.apply_node(&serde_json::from_value(node).unwrap());
        // The load balancer's port is another Service's node port.
        for (name, ip, port, node_port, balanced) in
            [("web", "10.96.0.20", 80, 30080, "203.0.113.6"), ("other", "10.96.0.21", 30080, 30081, "203.0.113.7")]
        {
            let service = json!({"metadata": {"name": name, "namespace": "d"}, "spec": {"clusterIP": ip, "ports": [
                {"name": "tcp", "port": port, "nodePort": node_port},
                {"name": "udp", "port": port, "nodePort": node_port, "protocol": "UDP"}]},
                "status": {"loadBalancer": {"ingress": [{"ip": balanced}]}}});
            store.apply_service(&serde_json::from_value(service).unwrap());
        }
        set(&store, "web", endpoints);
        set(&store, "other", &json!([{"addresses": ["10.244.1.9"]}]));
        store
    }

    fn set(store: &CatalogStore, service: &str, endpoints: &Value) {
        let slice = json!({"metadata": {"name": service, "namespace": "d", "labels": {"kubernetes.io/service-name": service}},
            "addressType": "IPv4", "endpoints": endpoints,
            "ports": [{"name": "tcp", "port": 8080}, {"name": "udp", "port": 8080, "protocol": "UDP"}]});
        store.apply_endpoint_slice(&serde_json::from_value(slice).unwrap());
        store.publish();
    }

    #[test]
    fn the_first_look_is_by_what_has_come_since() {
        let (sender, looks) = sync_channel(16);
        let metrics = DatapathMetrics::new(&mut prometheus_client::registry::Registry::default());
        let reaper = Reaper::start(vec![Box::new(Looks(sender))], |_| false, metrics, Duration::from_secs(1)).unwrap();
        let catalogs = store(&json!([{"addresses": ["10.244.1.6"]}]));
        reaper.note(catalogs.snapshot());
        reaper.look();
        // An endpoint comes to which sockets are connected before anything is looked at.
        set(&catalogs, "web", &json!([{"addresses": ["10.244.1.5"]}]));
        reaper.note(catalogs.snapshot());
        assert_eq!(looks.recv_timeout(Duration::from_secs(20)).unwrap(), [false; 2]);
    }

    #[test]
    fn an_endpoint_is_gone_for_udp_when_it_serves_no_more_and_for_tcp_when_it_is_deleted() {
        let ready = json!([{"addresses": ["10.244.1.5"]}]);
        let terminating = json!([{"addresses": ["10.244.1.5"], "conditions": {"ready": false, "serving": true, "terminating": true}}]);
        let dead = json!([{"addresses": ["10.244.1.5"], "conditions": {"ready": false, "serving": false, "terminating": true}}]);
        for (endpoints, tcp, udp) in
            [(ready, false, false), (terminating, false, false), (dead, false, true), (json!([]), true, true)]
        {
            let catalog = store(&endpoints).snapshot();
            let owners = Owners::new(&catalog);
            let gone = |service: &str, backend: &str, protocol| {
                is_gone(&catalog, &owners, service.parse().unwrap(), backend.parse().unwrap(), protocol)
            };
            for (protocol, expected) in [(Protocol::Tcp, tcp), (Protocol::Udp, udp)] {
                for called in ["10.96.0.20:80", "192.168.1.11:30080", "127.0.0.1:30080", "203.0.113.6:80"] {
                    let case = format!("{called} {endpoints} {protocol:?}");
                    assert_eq!(gone(called, "10.244.1.5:8080", protocol), expected, "{case}");
                    assert!(gone(called, "10.244.1.9:8080", protocol), "it is not this Service's any more: {case}");
                }
                for called in ["10.96.0.21:30080", "203.0.113.7:30080"] {
                    assert!(!gone(called, "10.244.1.9:8080", protocol), "another Service's, at {called}");
                }
            }
            // A Service that was deleted ends no connection of a pod.
            assert!(!gone("10.96.9.9:80", "10.244.1.5:8080", Protocol::Tcp));
        }
    }

    #[test]
    fn only_changes_that_take_endpoints_away_are_reason_to_look() {
        let store = store(&json!([{"addresses": ["10.244.1.5"]}]));
        let first = store.snapshot();
        set(&store, "web", &json!([{"addresses": ["10.244.1.5"]}, {"addresses": ["10.244.1.6"]}]));
        let more = store.snapshot();
        assert!(!any_gone(&first, &more) && any_gone(&more, &first));
        let terminating = json!({"ready": false, "serving": true, "terminating": true});
        set(
            &store,
            "web",
            &json!([{"addresses": ["10.244.1.5"], "conditions": terminating}, {"addresses": ["10.244.1.6"]}]),
        );
        assert!(!any_gone(&more, &store.snapshot()), "it still serves");
        let dead = json!({"ready": false, "serving": false});
        set(&store, "web", &json!([{"addresses": ["10.244.1.5"], "conditions": dead}, {"addresses": ["10.244.1.6"]}]));
        assert!(any_gone(&more, &store.snapshot()));
        store.delete_service("d", "web");
        store.publish();
        assert!(any_gone(&more, &store.snapshot()));
    }

    /// Says of each look whether the first endpoint is gone for UDP, and for TCP.
    struct Looks(SyncSender<[bool; 2]>);

    impl Sweep for Looks {
        fn sweep(&mut self, is_gone: &dyn Fn(SocketAddr, SocketAddr, Protocol) -> bool) -> Swept {
            let (service, backend) = ("10.96.0.20:80".parse().unwrap(), "10.244.1.5:8080".parse().unwrap());
            // Nobody asks any more when the test has ended.
            let _ = self.0.send([Protocol::Udp, Protocol::Tcp].map(|protocol| is_gone(service, backend, protocol)));
            Swept::default()
        }
    }

    #[test]
    fn udp_sockets_are_ended_soon_and_connections_of_an_endpoint_that_stays_away_later() {
        let (sender, looks) = sync_channel(16);
        let metrics = DatapathMetrics::new(&mut prometheus_client::registry::Registry::default());
        let reaper = Reaper::start(vec![Box::new(Looks(sender))], |_| false, metrics, FIRST_LOOK).unwrap();
        let there = json!([{"addresses": ["10.244.1.5"]}]);
        let store = store(&there);
        let look = |endpoints: &Value| {
            set(&store, "web", endpoints);
            reaper.note(store.snapshot());
            reaper.look();
        };
        let next = || looks.recv_timeout(Duration::from_secs(20)).unwrap();
        look(&there);
        // The catalog is taken from the disk until something goes.
        while reaper.wake.try_send(()).is_err() {
            thread::yield_now();
        }
        assert_eq!([next(), next()], [[false; 2]; 2]);
        look(&json!([]));
        assert_eq!(next(), [true, false], "soon");
        assert_eq!(next(), [true, true], "after a while");
        look(&there);
        assert_eq!(next(), [false; 2]);
        look(&json!([]));
        assert_eq!(next(), [true, false], "the look after this begins while it is away");
        look(&there);
        assert_eq!([next(), next()], [[false; 2]; 2], "it is back");
    }
}
