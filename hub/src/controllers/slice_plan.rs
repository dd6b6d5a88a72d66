//! From Service and pods to EndpointSlices, and from the slices that exist to the writes that make them so. No I/O.
//!
//! Follows <https://kubernetes.io/docs/concepts/services-networking/endpoint-slices/>.

use std::{
    collections::{BTreeMap, HashMap},
    net::IpAddr,
};

use k8s_openapi::{
    api::{
        core::v1::{ObjectReference, Pod, Service, ServicePort},
        discovery::v1::{Endpoint, EndpointConditions, EndpointPort, EndpointSlice},
    },
    apimachinery::pkg::{
        apis::meta::v1::{ObjectMeta, OwnerReference},
        util::intstr::IntOrString,
    },
};
use kube::ResourceExt;

use super::pod_state;

/// Label that names a slice's Service.
pub(crate) const SERVICE_NAME: &str = "kubernetes.io/service-name";
/// Label that names who writes a slice, and the value for this controller's (the cluster's own is off in standalone).
pub(crate) const MANAGED_BY: &str = "endpointslice.kubernetes.io/managed-by";
pub(crate) const MANAGER: &str = "endpointslice-controller.k8s.io";
/// Label of the slices of a headless Service.
const HEADLESS: &str = "service.kubernetes.io/headless";
/// Kubernetes' default and ours.
const MAX_ENDPOINTS: usize = 100;

/// Endpoints that share their ports, for one address family.
pub(crate) type Groups = BTreeMap<(String, PortSet), Vec<Endpoint>>;

/// The ports of a slice in a canonical form: name, protocol, number, application protocol.
pub(crate) type PortSet = Vec<(String, String, i32, String)>;

/// The writes that bring the slices in line.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Plan {
    pub(crate) create: Vec<EndpointSlice>,
    pub(crate) update: Vec<EndpointSlice>,
    pub(crate) delete: Vec<EndpointSlice>,
}

/// Whether slices are made for the Service: it selects pods and isn't an alias.
pub(crate) fn selects_pods(service: &Service) -> bool {
    let Some(spec) = &service.spec else { return false };
    spec.type_.as_deref() != Some("ExternalName") && spec.selector.as_ref().is_some_and(|labels| !labels.is_empty())
}

/// Whether a pod with these labels belongs to the Service.
pub(crate) fn selects(service: &Service, labels: &BTreeMap<String, String>) -> bool {
    let Some(selector) = service.spec.as_ref().and_then(|spec| spec.selector.as_ref()) else { return false };
    !selector.is_empty() && selector.iter().all(|(key, value)| labels.get(key) == Some(value))
}

/// The endpoints that the Service should have. `zone` finds a node's zone.
pub(crate) fn groups(service: &Service, pods: &[impl AsRef<Pod>], zone: impl Fn(&str) -> Option<String>) -> Groups {
    let mut groups = Groups::new();
    let Some(spec) = &service.spec else { return groups };
    let families = spec.ip_families.clone().filter(|families| !families.is_empty());
    let families = families.unwrap_or_else(|| vec!["IPv4".to_owned()]);
    for pod in pods {
        let pod = pod.as_ref();
        if pod_state::is_terminal(pod) {
            continue;
        }
        for family in &families {
            let Some(address) = pod_address(pod, family) else { continue };
            let ports = port_set(spec.ports.as_deref().unwrap_or_default(), pod);
            groups.entry((family.clone(), ports)).or_default().push(endpoint(service, pod, address, &zone));
        }
    }
    // A Service without endpoints keeps one empty slice per family, so that clients see that it is known.
    for family in families {
        if !groups.keys().any(|(known, _)| *known == family) {
            groups.insert((family, PortSet::new()), Vec::new());
        }
    }
    groups
}

fn pod_address(pod: &Pod, family: &str) -> Option<String> {
    let status = pod.status.as_ref()?;
    let listed = status.pod_ips.iter().flatten().map(|ip| ip.ip.as_str());
    listed
        .chain(status.pod_ip.as_deref())
        .filter_map(|text| text.parse::<IpAddr>().ok())
        .find(|ip| ip.is_ipv6() == (family == "IPv6"))
        .map(|ip| ip.to_string())
}

fn port_set(ports: &[ServicePort], pod: &Pod) -> PortSet {
    let mut set: PortSet = ports
        .iter()
        .filter_map(|port| {
            let protocol = port.protocol.as_deref().unwrap_or("TCP");
            let number = target_port(port, protocol, pod)?;
            let application = port.app_protocol.clone().unwrap_or_default();
            Some((port.name.clone().unwrap_or_default(), protocol.to_owned(), number, application))
        })
        .collect();
    set.sort();
    set
}

/// The number behind a Service port on this pod; a name that no container of the pod has gives none.
fn target_port(port: &ServicePort, protocol: &str, pod: &Pod) -> Option<i32> {
    match &port.target_port {
        None => Some(port.port),
        Some(IntOrString::Int(0)) => Some(port.port),
        Some(IntOrString::Int(number)) => Some(*number),
        Some(IntOrString::String(name)) => {
            let spec = pod.spec.as_ref()?;
            let sidecars = spec.init_containers.iter().flatten();
            let sidecars = sidecars.filter(|container| container.restart_policy.as_deref() == Some("Always"));
            spec.containers
                .iter()
                .chain(sidecars)
                .flat_map(|container| container.ports.iter().flatten())
                .find(|candidate| {
                    candidate.name.as_deref() == Some(name)
                        && candidate.protocol.as_deref().unwrap_or("TCP") == protocol
                })
                .map(|found| found.container_port)
        }
    }
}

fn endpoint(service: &Service, pod: &Pod, address: String, zone: &impl Fn(&str) -> Option<String>) -> Endpoint {
    let spec = service.spec.as_ref();
    let publish = spec.and_then(|spec| spec.publish_not_ready_addresses).unwrap_or(false);
    let serving = pod_state::is_ready(pod);
    let terminating = pod_state::is_terminating(pod);
    let node_name = pod_state::node(pod).map(str::to_owned);
    let pod_spec = pod.spec.as_ref();
    let named = pod_spec.filter(|pod| pod.subdomain.is_some() && pod.subdomain == service.metadata.name);
    Endpoint {
        addresses: vec![address],
        conditions: Some(EndpointConditions {
            ready: Some(publish || (serving && !terminating)),
            serving: Some(serving),
            terminating: Some(terminating),
        }),
        hostname: named.and_then(|pod| pod.hostname.clone()).filter(|hostname| !hostname.is_empty()),
        zone: node_name.as_deref().and_then(zone),
        node_name,
        target_ref: Some(ObjectReference {
            kind: Some("Pod".to_owned()),
            namespace: pod.metadata.namespace.clone(),
            name: pod.metadata.name.clone(),
            uid: pod.metadata.uid.clone(),
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// The writes that turn `existing` (the controller's slices of this Service) into `groups`, with as few changed slices as
/// possible: an endpoint stays in its slice, new ones fill free places, and a slice that ends up empty is deleted.
pub(crate) fn plan(service: &Service, existing: &[impl AsRef<EndpointSlice>], mut groups: Groups) -> Plan {
    let mut plan = Plan::default();
    let labels = labels(service);
    // Slices still to be used, by group.
    let mut slices: BTreeMap<(String, PortSet), Vec<EndpointSlice>> = BTreeMap::new();
    for slice in existing {
        let slice = slice.as_ref();
        let group = (slice.address_type.clone(), ports_of(slice));
        if slice.metadata.deletion_timestamp.is_some() {
            continue;
        }
        if groups.contains_key(&group) {
            slices.entry(group).or_default().push(slice.clone());
        } else {
            plan.delete.push(slice.clone());
        }
    }
    for (group, endpoints) in &mut groups {
        let mut missing: Vec<(String, Endpoint)> = endpoints.drain(..).map(|one| (identity(&one), one)).collect();
        missing.sort_by(|a, b| a.0.cmp(&b.0));
        missing.dedup_by(|a, b| a.0 == b.0);
        let mut wanted: HashMap<String, Endpoint> = missing.iter().cloned().collect();
        let mut kept: Vec<(EndpointSlice, EndpointSlice)> = Vec::new();
        let mut own = slices.remove(group).unwrap_or_default();
        own.sort_by_key(|slice| slice.metadata.name.clone());
        for before in own {
            let mut after = before.clone();
            after.endpoints = before.endpoints.iter().filter_map(|old| wanted.remove(&identity(old))).collect();
            after.endpoints.truncate(MAX_ENDPOINTS);
            after.metadata.labels = Some(labels.clone());
            kept.push((before, after));
        }
        missing.retain(|(id, _)| wanted.contains_key(id));
        let mut missing = missing.into_iter().map(|(_, endpoint)| endpoint);
        // Fullest first, so that holes close.
        kept.sort_by_key(|(_, after)| std::cmp::Reverse(after.endpoints.len()));
        for (_, after) in &mut kept {
            let free = MAX_ENDPOINTS.saturating_sub(after.endpoints.len());
            after.endpoints.extend(missing.by_ref().take(free));
        }
        let mut used = kept.iter().filter(|(_, after)| !after.endpoints.is_empty()).count();
        let rest: Vec<Endpoint> = missing.collect();
        for chunk in rest.chunks(MAX_ENDPOINTS) {
            plan.create.push(new_slice(service, &labels, group, chunk.to_vec()));
            used += 1;
        }
        for (before, after) in kept {
            if after.endpoints.is_empty() && used > 0 {
                plan.delete.push(before);
                continue;
            }
            used += 1;
            if before != after {
                plan.update.push(after);
            }
        }
        if used == 0 {
            plan.create.push(new_slice(service, &labels, group, Vec::new()));
        }
    }
    plan
}

/// What makes two entries the same endpoint: its pod and address.
fn identity(endpoint: &Endpoint) -> String {
    let uid = endpoint.target_ref.as_ref().and_then(|target| target.uid.as_deref()).unwrap_or_default();
    format!("{uid}/{}", endpoint.addresses.first().map_or("", String::as_str))
}

fn ports_of(slice: &EndpointSlice) -> PortSet {
    let mut set: PortSet = slice
        .ports
        .iter()
        .flatten()
        .map(|port| {
            (
                port.name.clone().unwrap_or_default(),
                port.protocol.clone().unwrap_or_else(|| "TCP".to_owned()),
                port.port.unwrap_or(0),
                port.app_protocol.clone().unwrap_or_default(),
            )
        })
        .collect();
    set.sort();
    set
}

fn labels(service: &Service) -> BTreeMap<String, String> {
    let mut labels = service.metadata.labels.clone().unwrap_or_default();
    labels.insert(SERVICE_NAME.to_owned(), service.name_any());
    labels.insert(MANAGED_BY.to_owned(), MANAGER.to_owned());
    labels.remove(HEADLESS);
    if service.spec.as_ref().is_some_and(|spec| spec.cluster_ip.as_deref() == Some("None")) {
        labels.insert(HEADLESS.to_owned(), String::new());
    }
    labels
}

fn new_slice(
    service: &Service,
    labels: &BTreeMap<String, String>,
    (family, ports): &(String, PortSet),
    endpoints: Vec<Endpoint>,
) -> EndpointSlice {
    let ports = ports.iter().map(|(name, protocol, number, application)| EndpointPort {
        name: Some(name.clone()),
        protocol: Some(protocol.clone()),
        port: Some(*number),
        app_protocol: Some(application.clone()).filter(|protocol| !protocol.is_empty()),
    });
    EndpointSlice {
        address_type: family.clone(),
        endpoints,
        ports: Some(ports.collect()),
        metadata: ObjectMeta {
            generate_name: Some(format!("{}-", service.name_any())),
            namespace: service.metadata.namespace.clone(),
            labels: Some(labels.clone()),
            owner_references: Some(vec![OwnerReference {
                api_version: "v1".to_owned(),
                kind: "Service".to_owned(),
                name: service.name_any(),
                uid: service.uid().unwrap_or_default(),
                controller: Some(true),
                block_owner_deletion: Some(true),
            }]),
            ..Default::default()
        },
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use serde_json::json;

    use super::*;

    fn service(ports: serde_json::Value) -> Service {
        serde_json::from_value(json!({
            "metadata": {"name": "web", "namespace": "d", "uid": "svc", "labels": {"team": "a"}},
            "spec": {"selector": {"app": "web"}, "ports": ports, "clusterIP": "10.96.0.7"}
        }))
        .unwrap()
    }

    fn pod(number: usize, ready: bool) -> Arc<Pod> {
        let value = json!({
            "metadata": {"name": format!("web-{number}"), "namespace": "d", "uid": format!("uid-{number:04}"), "labels": {"app": "web"}},
            "spec": {"nodeName": "n1", "containers": [{"name": "c", "ports": [{"name": "http", "containerPort": 8000 + (number as i32 % 2)}]}]},
            "status": {"phase": "Running", "podIP": format!("10.244.{}.{}", number / 200, number % 200 + 1),
                "conditions": [{"type": "Ready", "status": if ready { "True" } else { "False" }}]}
        });
        Arc::new(serde_json::from_value(value).unwrap())
    }

    fn stored(plan: &Plan) -> Vec<Arc<EndpointSlice>> {
        let named = plan.create.iter().enumerate().map(|(number, slice)| {
            let mut slice = slice.clone();
            slice.metadata.name = Some(format!("web-{number}"));
            Arc::new(slice)
        });
        named.collect()
    }

    fn number_80() -> serde_json::Value {
        json!([{"name": "p", "port": 80, "targetPort": 8080}])
    }

    fn zone(node: &str) -> Option<String> {
        (node == "n1").then(|| "z1".to_owned())
    }

    #[test]
    fn at_most_a_hundred_endpoints_share_a_slice() {
        let pods: Vec<_> = (0..250).map(|number| pod(number, true)).collect();
        let service = service(number_80());
        let plan = plan(&service, &[] as &[Arc<EndpointSlice>], groups(&service, &pods, zone));
        let mut sizes: Vec<_> = plan.create.iter().map(|slice| slice.endpoints.len()).collect();
        sizes.sort_unstable();
        assert_eq!(sizes, [50, 100, 100]);
        assert_eq!(plan.create[0].labels()[SERVICE_NAME], "web");
        assert_eq!(plan.create[0].labels()["team"], "a");
        assert_eq!(plan.create[0].endpoints[0].zone.as_deref(), Some("z1"));
    }

    #[test]
    fn a_pod_that_becomes_unready_changes_one_slice_in_place() {
        let service = service(number_80());
        let mut pods: Vec<_> = (0..150).map(|number| pod(number, true)).collect();
        let none: &[Arc<EndpointSlice>] = &[];
        let first = stored(&plan(&service, none, groups(&service, &pods, zone)));
        assert_eq!(
            plan(&service, &first, groups(&service, &pods, zone)),
            Plan::default(),
            "nothing to do a second time"
        );
        pods[3] = pod(3, false);
        let second = plan(&service, &first, groups(&service, &pods, zone));
        assert_eq!((second.create.len(), second.update.len(), second.delete.len()), (0, 1, 0));
        let changed = second.update[0].endpoints.iter().find(|one| identity(one).starts_with("uid-0003")).unwrap();
        let conditions = changed.conditions.as_ref().unwrap();
        assert_eq!((conditions.ready, conditions.serving), (Some(false), Some(false)));
    }

    #[test]
    fn named_ports_resolve_for_each_pod_and_pods_with_equal_ports_share_slices() {
        let service = service(json!([{"name": "p", "port": 80, "targetPort": "http"}]));
        let pods: Vec<_> = (0..4).map(|number| pod(number, true)).collect();
        let plan = plan(&service, &[] as &[Arc<EndpointSlice>], groups(&service, &pods, zone));
        let mut ports: Vec<_> = plan.create.iter().map(|slice| slice.ports.as_ref().unwrap()[0].port).collect();
        ports.sort_unstable();
        assert_eq!(ports, [Some(8000), Some(8001)]);
    }

    #[test]
    fn a_terminating_pod_that_still_serves_is_kept_as_not_ready() {
        let service = service(number_80());
        let mut going = (*pod(1, true)).clone();
        going.metadata.deletion_timestamp = Some(crate::controllers::now());
        let groups = groups(&service, &[Arc::new(going)], zone);
        let conditions = groups.values().next().unwrap()[0].conditions.clone().unwrap();
        assert_eq!(
            (conditions.ready, conditions.serving, conditions.terminating),
            (Some(false), Some(true), Some(true))
        );
    }

    #[test]
    fn unready_addresses_are_published_as_ready_when_the_service_asks_for_it() {
        let mut service = service(number_80());
        service.spec.as_mut().unwrap().publish_not_ready_addresses = Some(true);
        let groups = groups(&service, &[pod(1, false)], zone);
        let conditions = groups.values().next().unwrap()[0].conditions.clone().unwrap();
        assert_eq!((conditions.ready, conditions.serving), (Some(true), Some(false)));
    }

    #[test]
    fn a_service_without_endpoints_keeps_one_empty_slice() {
        let service = service(number_80());
        let none: &[Arc<EndpointSlice>] = &[];
        let empty = plan(&service, none, groups(&service, &[] as &[Arc<Pod>], zone));
        assert_eq!((empty.create.len(), empty.create[0].endpoints.len()), (1, 0));
        // Its ports differ from those of the first real endpoint: the empty slice makes way.
        let first = plan(&service, &stored(&empty), groups(&service, &[pod(1, true)], zone));
        assert_eq!((first.create.len(), first.delete.len()), (1, 1));
    }

    #[test]
    fn the_hostname_is_published_only_under_the_pods_own_subdomain() {
        let service = service(number_80());
        let mut named = (*pod(1, true)).clone();
        let spec = named.spec.as_mut().unwrap();
        spec.hostname = Some("first".into());
        spec.subdomain = Some("other".into());
        let other = groups(&service, &[Arc::new(named.clone())], zone);
        assert_eq!(other.values().next().unwrap()[0].hostname, None);
        named.spec.as_mut().unwrap().subdomain = Some("web".into());
        let own = groups(&service, &[Arc::new(named)], zone);
        assert_eq!(own.values().next().unwrap()[0].hostname.as_deref(), Some("first"));
    }
}
