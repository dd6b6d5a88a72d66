//! Answers on the `healthCheckNodePort` of Services: whether a load balancer should send traffic to this node (Kubernetes,
//! "Create an External Load Balancer": preserving the client source IP). It does where an endpoint is ready here.

use std::{
    collections::{BTreeMap, HashSet, VecDeque},
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use edgemesh_mesh::{
    Catalog, CatalogStore,
    model::{Service, ServiceName},
};
use edgemesh_telemetry::Shutdown;
use serde_json::json;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::{AbortHandle, JoinHandle, JoinSet},
};

/// Changes of the catalog that come close together are handled together.
const DEBOUNCE: Duration = Duration::from_millis(50);
/// How soon a port is tried again that another program has.
const RETRY: Duration = Duration::from_secs(5);
/// How long a request may take, with its answer.
const DEADLINE: Duration = Duration::from_secs(5);
/// The largest request that is read, in bytes.
const MAX_REQUEST: usize = 8 << 10;
/// Requests of one port at one time; the oldest makes room for more. Whoever asks is answered within milliseconds, so it is
/// one that asks nothing.
const MAX_REQUESTS: usize = 32;

/// What is answered for a Service.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Check {
    service: ServiceName,
    /// Addresses of ready endpoints on this node.
    local: usize,
}

/// A port that is answered.
#[derive(Debug)]
struct Answered {
    service: ServiceName,
    local: Arc<AtomicUsize>,
    task: JoinHandle<()>,
}

/// Answers for the Services of the catalog, as seen from a node, until shutdown.
pub async fn keep(node: String, catalog: Arc<CatalogStore>, shutdown: Shutdown) {
    let mut generations = catalog.subscribe();
    let mut answered: BTreeMap<u16, Answered> = BTreeMap::new();
    let mut complained = HashSet::new();
    loop {
        generations.mark_unchanged();
        let mut all_bound = true;
        if catalog.is_synced() {
            let wanted = wanted(&catalog.snapshot(), &node);
            for port in answered.keys().copied().collect::<Vec<_>>() {
                let same = |found: &Answered| wanted.get(&port).is_some_and(|check| check.service == found.service);
                if !answered.get(&port).is_some_and(same)
                    && let Some(gone) = answered.remove(&port)
                {
                    // The port is free when the task has ended.
                    gone.task.abort();
                    let _ = gone.task.await;
                }
            }
            complained.retain(|port| wanted.contains_key(port));
            for (port, check) in wanted {
                if let Some(found) = answered.get(&port) {
                    found.local.store(check.local, Ordering::Relaxed);
                    continue;
                }
                match bind(port).await {
                    Ok(listener) => {
                        let local = Arc::new(AtomicUsize::new(check.local));
                        let task = tokio::spawn(answer(listener, check.service.clone(), Arc::clone(&local)));
                        answered.insert(port, Answered { service: check.service, local, task });
                        complained.remove(&port);
                    }
                    Err(error) => {
                        all_bound = false;
                        if complained.insert(port) {
                            let ServiceName { namespace, name } = &check.service;
                            tracing::warn!(%namespace, service = %name, port, %error, "healthCheckNodePort can't be answered; trying again");
                        }
                    }
                }
            }
        }
        tokio::select! {
            changed = generations.changed() => if changed.is_err() {
                shutdown.stopping().cancelled().await;
                break;
            },
            () = tokio::time::sleep(RETRY), if !all_bound => {}
            () = shutdown.stopping().cancelled() => break,
        }
        tokio::time::sleep(DEBOUNCE).await;
    }
    // Load balancers see it at once: new connections go elsewhere while the agent drains.
    for (_, gone) in answered {
        gone.task.abort();
    }
}

fn wanted(catalog: &Catalog, node: &str) -> BTreeMap<u16, Check> {
    let mut wanted = BTreeMap::new();
    for service in catalog.services() {
        let Some(port) = service.health_check_node_port.filter(|_| !service.proxied_elsewhere) else { continue };
        let check = Check { service: service.name.clone(), local: local(catalog, service, node) };
        // The API gives each port to one Service; if it doesn't, the same one is answered each time.
        let first = wanted.entry(port).or_insert_with(|| check.clone());
        if check.service < first.service {
            *first = check;
        }
    }
    wanted
}

/// Terminating endpoints don't count, though they still serve while there are no others.
fn local(catalog: &Catalog, service: &Service, node: &str) -> usize {
    let ready = service.ports.iter().flat_map(|port| &port.endpoints).filter(|endpoint| {
        (endpoint.ready || service.publish_not_ready)
            && !endpoint.terminating
            && catalog.node_of_endpoint(endpoint).is_some_and(|found| *found == *node)
    });
    ready.map(|endpoint| endpoint.address).collect::<HashSet<_>>().len()
}

/// On all addresses of the host, of both families where it has both.
async fn bind(port: u16) -> io::Result<TcpListener> {
    match TcpListener::bind(SocketAddr::from((Ipv6Addr::UNSPECIFIED, port))).await {
        Err(error) if error.kind() != io::ErrorKind::AddrInUse => {
            TcpListener::bind(SocketAddr::from((Ipv4Addr::UNSPECIFIED, port))).await
        }
        bound => bound,
    }
}

async fn answer(listener: TcpListener, service: ServiceName, local: Arc<AtomicUsize>) {
    let mut requests = JoinSet::new();
    let mut by_age: VecDeque<AbortHandle> = VecDeque::new();
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let response = response(&service, local.load(Ordering::Relaxed));
                if by_age.len() >= MAX_REQUESTS {
                    // After a pause of this process many come at once, and those before may be about to be answered.
                    tokio::task::yield_now().await;
                }
                while requests.try_join_next().is_some() {}
                by_age.retain(|request| !request.is_finished());
                if by_age.len() >= MAX_REQUESTS
                    && let Some(oldest) = by_age.pop_front()
                {
                    oldest.abort();
                }
                let request = async move { tokio::time::timeout(DEADLINE, respond(stream, response)).await };
                by_age.push_back(requests.spawn(request));
            }
            // Out of descriptors, for example.
            Err(error) => {
                tracing::debug!(%error, "a health check could not be accepted");
                tokio::time::sleep(DEBOUNCE).await;
            }
        }
    }
}

/// Any method and path: load balancers have their own.
fn response(service: &ServiceName, local: usize) -> String {
    let body = json!({
        "service": {"namespace": &*service.namespace, "name": &*service.name},
        "localEndpoints": local,
        "serviceProxyHealthy": true,
    })
    .to_string();
    let status = if local > 0 { "200 OK" } else { "503 Service Unavailable" };
    format!(
        "HTTP/1.1 {status}\r\nContent-Type: application/json\r\nX-Content-Type-Options: nosniff\r\n\
         X-Load-Balancing-Endpoint-Weight: {local}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    )
}

async fn respond(mut stream: TcpStream, response: String) -> io::Result<()> {
    let mut request = Vec::new();
    let mut piece = [0; 1024];
    while !request.windows(4).any(|end| end == b"\r\n\r\n") {
        let length = stream.read(&mut piece).await?;
        if length == 0 || request.len() + length > MAX_REQUEST {
            return Ok(());
        }
        request.extend_from_slice(&piece[..length]);
    }
    stream.write_all(response.as_bytes()).await?;
    stream.shutdown().await
}
