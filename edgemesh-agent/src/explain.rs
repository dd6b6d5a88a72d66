//! Pages that explain, from live state and by the code that decides: which Services there are, what a name resolves to in a pod,
//! and which endpoint of a Service a pod would get, and why not another. The `edgemesh` program shows them.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};

use edgemesh_mesh::{
    Call, Catalog, CatalogStore, Reach, Tier, Viewpoint,
    choice::{Explained, Explanation, IpFamily, PassedOver, Rule},
    health::EndpointKey,
    model::{Endpoint, Protocol, Service, ServiceKind, ServiceName, ServicePort, TrafficDistribution},
};
use edgemesh_telemetry::{AdminRoutes, PageError, Parameters};
use edgemesh_tunnel::Path;
use k8s_openapi::api::core::v1::Pod;
use serde_json::{Value, json};

use crate::{
    config::Config,
    dns::{Asker, Said},
    overlay::Overlay,
};

/// How long the API may take to say where a pod is.
const API_DEADLINE: Duration = Duration::from_secs(2);
/// Entries of one page.
const MAX_SERVICES: usize = 1000;
const MAX_ENDPOINTS: usize = 256;
/// Names that an error suggests.
const MAX_SUGGESTED: usize = 10;

/// What the pages are made from.
pub struct Explainer {
    /// The agent's settings.
    pub config: Arc<Config>,
    /// The catalog.
    pub catalog: Arc<CatalogStore>,
    /// The tunnel, and what is known of endpoints.
    pub overlay: Overlay,
    /// Answers DNS.
    pub dns: Asker,
    /// Knows the node's pods.
    pub client: kube::Client,
    /// What is programmed: the page `/debug/datapath`.
    pub datapath: Box<dyn Fn() -> Value + Send + Sync>,
}

impl std::fmt::Debug for Explainer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Explainer").field("node", &self.config.node_name).finish_non_exhaustive()
    }
}

/// Who calls.
struct Caller {
    namespace: String,
    /// Unknown where the API doesn't answer: then as a process of the node.
    address: IpAddr,
    /// What to know about it.
    view: Value,
}

/// Frontends by `ADDRESS:PORT/PROTOCOL`.
type Programmed = HashMap<String, Value>;

impl Explainer {
    /// The pages `/debug/services`, `/debug/resolve` and `/debug/trace`.
    pub fn pages(self: Arc<Self>, routes: AdminRoutes) -> AdminRoutes {
        let [services, resolve, trace] = [self.clone(), self.clone(), self];
        routes
            .page_of("/debug/services", move |parameters| {
                let this = services.clone();
                async move { this.services(&parameters) }
            })
            .page_of("/debug/resolve", move |parameters| {
                let this = resolve.clone();
                async move { this.resolve(&parameters).await }
            })
            .page_of("/debug/trace", move |parameters| {
                let this = trace.clone();
                async move { this.trace(&parameters).await }
            })
    }

    fn catalog(&self) -> Result<Arc<Catalog>, PageError> {
        let catalog = self.catalog.snapshot();
        if catalog.is_synced() {
            return Ok(catalog);
        }
        Err(PageError::Unavailable("the catalog isn't complete yet: /readyz names what the agent waits for".to_owned()))
    }

    fn programmed(&self) -> Programmed {
        let page = (self.datapath)();
        let frontends = page["frontends"].as_array().cloned().unwrap_or_default();
        let named = |entry: Value| Some((entry["frontend"].as_str()?.to_owned(), entry));
        frontends.into_iter().filter_map(named).collect()
    }

    fn services(&self, parameters: &Parameters) -> Result<Value, PageError> {
        parameters.only(&["namespace"])?;
        let catalog = self.catalog()?;
        let viewpoint = self.config.viewpoint(&catalog);
        let programmed = self.programmed();
        let namespace = parameters.get("namespace");
        if let Some(namespace) = namespace
            && !catalog.has_namespace(namespace)
        {
            return Err(PageError::NotFound(format!("namespace: there is no Service in {namespace:?}")));
        }
        let wanted = |service: &&Arc<Service>| namespace.is_none_or(|namespace| *service.name.namespace == *namespace);
        let mut services: Vec<_> = catalog.services().filter(wanted).collect();
        services.sort_by(|a, b| a.name.cmp(&b.name));
        let count = services.len();
        let shown = services.into_iter().take(MAX_SERVICES).map(|service| {
            let ports = service.ports.iter().map(|port| {
                let explained =
                    Chosen::of(service, |call| viewpoint.explain(&catalog, port, call, &PassedOver::new()));
                let ready = port.endpoints.iter().filter(|endpoint| endpoint.ready).count();
                json!({
                    "name": port.name, "protocol": port.protocol, "port": port.port, "nodePort": port.node_port,
                    "endpoints": port.endpoints.len(), "ready": ready, "chosen": explained.count, "tier": explained.tier,
                    "target": target(&programmed, service, port),
                })
            });
            let mut view = describe(service);
            view["ports"] = ports.collect();
            view
        });
        let shown: Vec<_> = shown.collect();
        Ok(json!({"node": viewpoint.node, "services": shown, "omitted": count.saturating_sub(MAX_SERVICES)}))
    }

    async fn resolve(&self, parameters: &Parameters) -> Result<Value, PageError> {
        parameters.only(&["name", "type", "namespace", "pod"])?;
        let (name, kind) = (parameters.required("name")?, parameters.get("type").unwrap_or("A"));
        let caller = self.caller(parameters).await?;
        let steps = self.steps(name, kind, &caller).await?;
        let found = steps.last().is_some_and(|(_, said)| !said.records.is_empty());
        Ok(
            json!({"name": name, "type": kind.to_uppercase(), "client": caller.view, "steps": view_of(&steps), "found": found}),
        )
    }

    /// What a program in the pod is told, name by name, until there is an answer.
    async fn steps(&self, name: &str, kind: &str, caller: &Caller) -> Result<Vec<(String, Said)>, PageError> {
        if !Asker::kinds().any(|known| known.eq_ignore_ascii_case(kind)) {
            let known: Vec<_> = Asker::kinds().collect();
            return Err(PageError::Parameter(format!("type: {kind:?} is none of {}", known.join(", "))));
        }
        let mut steps = Vec::new();
        for step in self.dns.search(name, &caller.namespace) {
            let said = self.dns.ask(&step, kind, caller.address).await;
            let said = said.ok_or_else(|| PageError::Parameter(format!("name: {step:?} is no DNS name")))?;
            let last = said.ends_search();
            steps.push((step, said));
            if last {
                break;
            }
        }
        Ok(steps)
    }

    /// The pod of the parameters, or a process of this node in a namespace.
    async fn caller(&self, parameters: &Parameters) -> Result<Caller, PageError> {
        let node = IpAddr::V4(Ipv4Addr::LOCALHOST);
        let Some(pod) = parameters.get("pod") else {
            let namespace = parameters.get("namespace").unwrap_or("default").to_owned();
            return Ok(Caller { address: node, view: json!({"namespace": namespace}), namespace });
        };
        let (namespace, name) = pod.split_once('/').unwrap_or((parameters.get("namespace").unwrap_or("default"), pod));
        let mut view = json!({"pod": format!("{namespace}/{name}"), "namespace": namespace});
        let api = kube::Api::<Pod>::namespaced(self.client.clone(), namespace);
        let found = tokio::time::timeout(API_DEADLINE, api.get_opt(name)).await;
        let address = match found {
            Ok(Ok(Some(pod))) => {
                let on = pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref()).unwrap_or_default();
                if on != self.config.node_name {
                    return Err(PageError::NotFound(format!(
                        "pod: {namespace}/{name} runs on node {on:?}, and this is the agent of {:?}: ask the agent there",
                        self.config.node_name
                    )));
                }
                let address =
                    pod.status.as_ref().and_then(|status| status.pod_ip.as_deref()).and_then(|ip| ip.parse().ok());
                if address.is_none() {
                    view["note"] = "the pod has no address yet".into();
                }
                address
            }
            Ok(Ok(None)) => {
                return Err(PageError::NotFound(format!(
                    "pod: this node's API knows no pod {namespace}/{name}; write NAMESPACE/NAME of a pod on {:?}",
                    self.config.node_name
                )));
            }
            // A node may read the pods that are bound to it, and no others.
            Ok(Err(kube::Error::Api(status))) if status.code == 403 => {
                return Err(PageError::NotFound(format!(
                    "pod: {namespace}/{name} is not one of {:?}'s, if there is such a pod: ask the agent of its node",
                    self.config.node_name
                )));
            }
            Ok(Err(error)) => {
                view["note"] = format!("the pod can't be looked up, so its address is not known: {error}").into();
                None
            }
            Err(_) => {
                view["note"] = "the API doesn't answer, so the pod's address is not known".into();
                None
            }
        };
        view["address"] = json!(address);
        Ok(Caller { namespace: namespace.to_owned(), address: address.unwrap_or(node), view })
    }

    async fn trace(&self, parameters: &Parameters) -> Result<Value, PageError> {
        parameters.only(&["pod", "namespace", "service", "port"])?;
        let wanted = parameters.required("service")?;
        let caller = self.caller(parameters).await?;
        let catalog = self.catalog()?;
        let service = find(&catalog, wanted, &caller.namespace)?;
        let ports = ports(&service, parameters.get("port"))?;
        let viewpoint = self.config.viewpoint(&catalog);
        let programmed = self.programmed();
        let name = match *service.name.namespace == *caller.namespace {
            true => service.name.name.to_string(),
            false => format!("{}.{}", service.name.name, service.name.namespace),
        };
        let mut dns = Vec::new();
        for kind in record_types(&service) {
            dns.extend(self.steps(&name, kind, &caller).await?);
        }
        let ports: Vec<_> =
            ports.iter().map(|port| self.explain(&catalog, &viewpoint, &programmed, &service, port)).collect();
        Ok(json!({
            "node": viewpoint.node, "network": viewpoint.network, "zone": viewpoint.zone,
            "client": caller.view, "service": describe(&service),
            "dns": {"name": name, "steps": view_of(&dns)},
            "ports": ports, "counters": self.overlay.counters_of(&service.name),
        }))
    }

    /// One port: where its addresses lead, and what became of each endpoint.
    fn explain(
        &self,
        catalog: &Catalog,
        viewpoint: &Viewpoint,
        programmed: &Programmed,
        service: &Service,
        port: &ServicePort,
    ) -> Value {
        let target = target(programmed, service, port);
        let now = Instant::now();
        let health = self.overlay.health();
        // Ejections are of connections that go through the agent; that an endpoint is silent is part of the catalog.
        let chosen = Chosen::of(service, |call| match target == "listener" {
            true => health.explain(viewpoint, catalog, port, call, now),
            false => viewpoint.explain(catalog, port, call, &PassedOver::new()),
        });
        let ejected: HashMap<_, _> =
            health.ejected(now).into_iter().map(|ejected| (ejected.endpoint, ejected)).collect();
        let endpoints = chosen.endpoints.iter().take(MAX_ENDPOINTS).map(|explained| {
            let endpoint = &explained.endpoint;
            let ejected = ejected.get(&EndpointKey::of(endpoint, port.protocol));
            let why = match explained.removed {
                Some(rule) => why(rule, explained, service, chosen.tier_beside(endpoint)),
                None => "chosen".to_owned(),
            };
            let node = endpoint.node.as_ref().and_then(|name| catalog.node(name));
            let mut view = json!({
                "address": SocketAddr::new(endpoint.address, endpoint.port),
                "pod": endpoint.pod.as_ref().map(|(namespace, name)| format!("{namespace}/{name}")),
                "node": endpoint.node, "network": node.map(|node| &node.network), "zone": endpoint.zone,
                "ready": endpoint.ready, "serving": endpoint.serving, "terminating": endpoint.terminating,
                "silent": endpoint.silent,
                "tier": explained.tier, "chosen": explained.removed.is_none(), "removedBy": explained.removed, "why": why,
            });
            match &explained.reach {
                Reach::Local => view["reach"] = "local".into(),
                Reach::Direct => view["reach"] = "direct".into(),
                Reach::Tunnel { node } => {
                    view["reach"] = "tunnel".into();
                    view["path"] = match self.overlay.tunnel().path(node) {
                        Path::Relayed { via } => format!("relayed via {via}"),
                        Path::None => "no connection now".to_owned(),
                        path @ Path::Direct(_) => format!("direct over {}", path.label()),
                    }
                    .into();
                }
            }
            if let Some(ejected) = ejected {
                view["ejectedSeconds"] = json!(ejected.left.as_secs_f32());
                view["failures"] = json!(ejected.failures);
            }
            view
        });
        let endpoints: Vec<_> = endpoints.collect();
        let mut addresses = Vec::new();
        for ip in &service.cluster_ips {
            let frontend = frontend(*ip, port.port, port.protocol);
            addresses.push(
                programmed.get(&frontend).cloned().unwrap_or_else(|| json!({"frontend": frontend, "target": "none"})),
            );
        }
        json!({
            "name": port.name, "protocol": port.protocol, "port": port.port, "nodePort": port.node_port,
            "target": target, "tier": chosen.tier, "chosen": chosen.count,
            "addresses": addresses, "endpoints": endpoints, "omitted": chosen.endpoints.len().saturating_sub(MAX_ENDPOINTS),
        })
    }
}

/// What is chosen of a port's endpoints by calls at all cluster addresses of its Service.
struct Chosen {
    /// All endpoints, those that are chosen first.
    endpoints: Vec<Explained>,
    /// How many are.
    count: usize,
    /// How near those are, if there are any: of the first family that has some.
    tier: Option<Tier>,
    /// The same by family.
    tiers: Vec<(Option<IpFamily>, Tier)>,
}

impl Chosen {
    /// Of what `explain` says of a call. A call by one family says of an endpoint of the other only that it is of the other.
    fn of(service: &Service, explain: impl Fn(Call) -> Explanation) -> Self {
        let mut families: Vec<Option<IpFamily>> = service.cluster_ips.iter().map(|ip| Some((*ip).into())).collect();
        families.dedup();
        if families.is_empty() {
            families.push(None);
        }
        let (mut endpoints, mut tiers) = (Vec::<Explained>::new(), Vec::new());
        for family in families {
            let Explanation { endpoints: explained, candidates } = explain(Call { family, ..Call::default() });
            if !candidates.endpoints.is_empty() {
                tiers.push((family, candidates.tier));
            }
            if endpoints.is_empty() {
                endpoints = explained;
                continue;
            }
            let of_family = |explained: &Explained| Some(IpFamily::from(explained.endpoint.address)) == family;
            let both = endpoints.iter_mut().zip(explained);
            both.filter(|(_, new)| of_family(new)).for_each(|(known, new)| *known = new);
        }
        endpoints.sort_by_key(|explained| explained.removed.is_some());
        let count = endpoints.iter().filter(|explained| explained.removed.is_none()).count();
        Self { endpoints, count, tier: tiers.first().map(|(_, tier)| *tier), tiers }
    }

    /// How near the chosen endpoints are of which another one could have been.
    fn tier_beside(&self, other: &Endpoint) -> Option<Tier> {
        let beside = |family: &Option<IpFamily>| family.is_none_or(|family| family == other.address.into());
        self.tiers.iter().find(|(family, _)| beside(family)).map(|(_, tier)| *tier)
    }
}

/// The types of the records that lead to a Service: of the families of its cluster addresses, or else of its endpoints.
fn record_types(service: &Service) -> Vec<&'static str> {
    let endpoints = service.ports.iter().flat_map(|port| &port.endpoints).map(|endpoint| endpoint.address);
    let mut addresses = service.cluster_ips.clone();
    if addresses.is_empty() {
        addresses.extend(endpoints);
    }
    let types = [("A", IpAddr::is_ipv4 as fn(&IpAddr) -> bool), ("AAAA", IpAddr::is_ipv6)];
    let mut types: Vec<_> = types.iter().filter(|(_, is)| addresses.iter().any(is)).map(|(kind, _)| *kind).collect();
    if types.is_empty() {
        types.push("A");
    }
    types
}

fn frontend(ip: IpAddr, port: u16, protocol: Protocol) -> String {
    crate::datapath::plan::Frontend { address: SocketAddr::new(ip, port), protocol }.to_string()
}

/// What is programmed at the first cluster address of a port: `direct`, `listener`, `refuse`, or `none`.
fn target(programmed: &Programmed, service: &Service, port: &ServicePort) -> String {
    let entry = service.cluster_ips.first().and_then(|ip| programmed.get(&frontend(*ip, port.port, port.protocol)));
    entry.and_then(|entry| entry["target"].as_str()).unwrap_or("none").to_owned()
}

fn view_of(steps: &[(String, Said)]) -> Vec<Value> {
    steps.iter().map(|(name, said)| json!({"name": name, "code": said.code, "records": said.records})).collect()
}

fn describe(service: &Service) -> Value {
    let mut view = json!({
        "namespace": service.name.namespace, "name": service.name.name, "clusterIPs": service.cluster_ips,
        "kind": match &service.kind {
            ServiceKind::ClusterIp => "ClusterIP",
            ServiceKind::Headless => "Headless",
            ServiceKind::ExternalName(_) => "ExternalName",
        },
    });
    let mut policies = Vec::new();
    if let ServiceKind::ExternalName(target) = &service.kind {
        policies.push(format!("externalName: {target}"));
    }
    if service.internal_traffic_local {
        policies.push("internalTrafficPolicy: Local".to_owned());
    }
    if let Some(timeout) = service.client_ip_affinity {
        policies.push(format!("sessionAffinity: ClientIP, {} s", timeout.as_secs()));
    }
    match service.traffic_distribution {
        TrafficDistribution::Unset => {}
        TrafficDistribution::PreferSameZone => policies.push("trafficDistribution: PreferSameZone".to_owned()),
        TrafficDistribution::PreferSameNode => policies.push("trafficDistribution: PreferSameNode".to_owned()),
    }
    if service.publish_not_ready {
        policies.push("publishNotReadyAddresses: true".to_owned());
    }
    if service.strict_spreading {
        policies.push("edgemesh.dev/endpoint-choice: kubernetes".to_owned());
    }
    if service.proxied_elsewhere {
        policies.push("by its labels something else carries it".to_owned());
    }
    view["policies"] = json!(policies);
    view
}

fn why(rule: Rule, explained: &Explained, service: &Service, nearest: Option<Tier>) -> String {
    let endpoint = &explained.endpoint;
    match rule {
        Rule::Family => "its address is of the other family".to_owned(),
        Rule::Condition if endpoint.terminating && endpoint.serving => {
            "it is terminating: used only when none is ready".to_owned()
        }
        Rule::Condition if endpoint.terminating => "it is terminating and no longer serves".to_owned(),
        Rule::Condition => "it is not ready".to_owned(),
        Rule::TrafficPolicy => "internalTrafficPolicy is Local, and it is on another node".to_owned(),
        Rule::Hints => "topology hints keep it for other zones".to_owned(),
        Rule::Distribution => match service.traffic_distribution {
            TrafficDistribution::PreferSameNode => "trafficDistribution prefers nearer endpoints".to_owned(),
            _ => "trafficDistribution prefers this zone's".to_owned(),
        },
        Rule::Tier => match nearest {
            Some(Tier::Node) => "there are endpoints on this node".to_owned(),
            Some(Tier::Network) => "there are endpoints in this network".to_owned(),
            Some(Tier::Zone | Tier::Remote) | None => "there are endpoints in this zone".to_owned(),
        },
        Rule::NodeNotReady => "its node is not Ready, and those of others are".to_owned(),
        Rule::Ejection if endpoint.silent => "it takes no connections from this node".to_owned(),
        Rule::Ejection => "it could not be reached lately".to_owned(),
    }
}

/// A Service by `NAME`, `NAME.NAMESPACE` or a longer DNS name of it.
fn find(catalog: &Catalog, wanted: &str, namespace: &str) -> Result<Arc<Service>, PageError> {
    let mut labels = wanted.split('.');
    let name = labels.next().unwrap_or_default();
    let namespace = labels.next().filter(|label| !label.is_empty()).unwrap_or(namespace);
    if let Some(service) = catalog.service(namespace, name) {
        return Ok(service.clone());
    }
    let mut others: Vec<_> = catalog
        .services()
        .filter(|service| *service.name.namespace == *namespace || *service.name.name == *name)
        .map(|service| format!("{}.{}", service.name.name, service.name.namespace))
        .collect();
    others.sort();
    others.truncate(MAX_SUGGESTED);
    let others = if others.is_empty() { "no Service there".to_owned() } else { others.join(", ") };
    Err(PageError::NotFound(format!("service: there is no {name}.{namespace}; there is: {others}")))
}

/// All ports, or those of a number or a name.
fn ports(service: &Service, wanted: Option<&str>) -> Result<Vec<Arc<ServicePort>>, PageError> {
    let Some(wanted) = wanted else { return Ok(service.ports.clone()) };
    let is_wanted = |port: &&Arc<ServicePort>| port.port.to_string() == wanted || *port.name == *wanted;
    let found: Vec<_> = service.ports.iter().filter(is_wanted).cloned().collect();
    if found.is_empty() {
        let ServiceName { namespace, name } = &service.name;
        let known: Vec<_> = service.ports.iter().map(|port| format!("{} ({})", port.port, port.name)).collect();
        return Err(PageError::NotFound(format!(
            "port: {name}.{namespace} has no port {wanted}; it has {}",
            known.join(", ")
        )));
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A dual-stack Service that is called from node a1, with endpoints of both families.
    fn chosen(endpoints: &[(&str, &str)]) -> (Chosen, Vec<&'static str>) {
        let store = CatalogStore::new();
        for (name, network) in [("a1", "site-a"), ("b1", "site-b")] {
            let node = json!({"metadata": {"name": name, "labels": {"edgemesh.dev/network": network}}});
            store.apply_node(&serde_json::from_value(node).unwrap());
        }
        let service = json!({"metadata": {"name": "web", "namespace": "default"}, "spec": {
            "clusterIP": "10.96.0.20", "clusterIPs": ["10.96.0.20", "fd00:96::20"], "ports": [{"port": 80}]}});
        store.apply_service(&serde_json::from_value(service).unwrap());
        for (family, is_family) in [("IPv4", false), ("IPv6", true)] {
            let of_family = endpoints.iter().filter(|(address, _)| address.contains(':') == is_family);
            let endpoints: Vec<_> =
                of_family.map(|(address, node)| json!({"addresses": [address], "nodeName": node})).collect();
            let slice = json!({"addressType": family, "ports": [{"port": 8080}], "endpoints": endpoints,
                "metadata": {"name": family, "namespace": "default", "labels": {"kubernetes.io/service-name": "web"}}});
            store.apply_endpoint_slice(&serde_json::from_value(slice).unwrap());
        }
        store.publish();
        let catalog = store.snapshot();
        let (service, viewpoint) = (catalog.service("default", "web").unwrap(), Viewpoint::of(&catalog, "a1"));
        let explain = |call| viewpoint.explain(&catalog, &service.ports[0], call, &PassedOver::new());
        (Chosen::of(service, explain), record_types(service))
    }

    #[test]
    fn endpoints_of_both_families_are_chosen_by_calls_of_their_own() {
        let endpoints = [("10.244.1.5", "a1"), ("10.244.2.5", "b1"), ("fd00:1::5", "b1"), ("fd00:2::5", "b1")];
        let (chosen, types) = chosen(&endpoints);
        assert_eq!((chosen.count, chosen.tier, types), (3, Some(Tier::Node), vec!["A", "AAAA"]));
        let shown: Vec<_> = chosen
            .endpoints
            .iter()
            .map(|explained| (explained.endpoint.address.to_string(), explained.removed))
            .collect();
        assert_eq!(shown.last().unwrap(), &("10.244.2.5".to_owned(), Some(Rule::Tier)), "{shown:?}");
        let beside = |at: usize| chosen.tier_beside(&chosen.endpoints[at].endpoint);
        assert_eq!((beside(3), beside(2)), (Some(Tier::Node), Some(Tier::Remote)), "{shown:?}");
    }

    #[test]
    fn what_is_chosen_is_shown_though_there_is_no_room_for_all() {
        let many: Vec<String> =
            (0..300).map(|number| format!("10.244.{}.{}", number / 250, number % 250 + 1)).collect();
        let mut endpoints: Vec<(&str, &str)> = many.iter().map(|address| (address.as_str(), "b1")).collect();
        endpoints.last_mut().unwrap().1 = "a1";
        let (chosen, _) = chosen(&endpoints);
        assert_eq!((chosen.count, chosen.endpoints.len()), (1, 300));
        let first = &chosen.endpoints[0];
        assert_eq!((first.endpoint.address.to_string().as_str(), first.removed), ("10.244.1.50", None));
    }
}
