//! Whether a pod fits a node: readiness, node affinity, taints, host ports and resources. No I/O.
//!
//! Follows <https://kubernetes.io/docs/concepts/scheduling-eviction/assign-pod-node/> and the pages on taints and resources.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use k8s_openapi::{
    api::core::v1::{
        Container, Node, NodeSelectorRequirement, NodeSelectorTerm, Pod, ResourceRequirements, Taint, Toleration,
    },
    apimachinery::pkg::api::resource::Quantity,
};
use kube::ResourceExt;

use super::{node_lifecycle, pod_state};

/// Pods that a node takes when it doesn't say (kubelet's default).
const DEFAULT_MAX_PODS: i128 = 110;

/// A node and what runs on it.
#[derive(Debug)]
pub(crate) struct NodeView {
    pub(crate) node: Arc<Node>,
    /// Pods that are bound to it and not at their end.
    pub(crate) pods: Vec<Arc<Pod>>,
    used: BTreeMap<String, i128>,
    ports: BTreeSet<HostPort>,
}

/// Protocol, port and address; an empty address is every address.
type HostPort = (String, i32, String);

impl NodeView {
    pub(crate) fn new(node: Arc<Node>) -> Self {
        Self { node, pods: Vec::new(), used: BTreeMap::new(), ports: BTreeSet::new() }
    }

    pub(crate) fn add(&mut self, pod: Arc<Pod>) {
        for (resource, amount) in requests(&pod) {
            *self.used.entry(resource).or_default() += amount;
        }
        self.ports.extend(host_ports(&pod));
        self.pods.push(pod);
    }
}

/// Why the pod can't run on the node, in the words of Kubernetes' scheduler; `None` when it can.
pub(crate) fn refusal(pod: &Pod, view: &NodeView) -> Option<String> {
    let node = &view.node;
    if !node_lifecycle::is_ready(node) {
        return Some("node(s) were not ready".to_owned());
    }
    let empty = Vec::new();
    let tolerations = pod.spec.as_ref().and_then(|spec| spec.tolerations.as_ref()).unwrap_or(&empty);
    let unschedulable = Taint {
        key: "node.kubernetes.io/unschedulable".to_owned(),
        effect: "NoSchedule".to_owned(),
        ..Default::default()
    };
    let spec = node.spec.as_ref();
    if spec.and_then(|spec| spec.unschedulable) == Some(true) && !tolerated(&unschedulable, tolerations) {
        return Some("node(s) were unschedulable".to_owned());
    }
    if !matches_affinity(pod, node) {
        return Some("node(s) didn't match Pod's node affinity/selector".to_owned());
    }
    let taints = spec.and_then(|spec| spec.taints.as_deref()).unwrap_or_default();
    let hard = taints.iter().filter(|taint| matches!(taint.effect.as_str(), "NoSchedule" | "NoExecute"));
    if let Some(taint) = hard.into_iter().find(|taint| !tolerated(taint, tolerations)) {
        let value = taint.value.as_deref().unwrap_or_default();
        return Some(format!("node(s) had untolerated taint {{{}: {value}}}", taint.key));
    }
    if host_ports(pod).iter().any(|port| view.ports.iter().any(|used| ports_collide(port, used))) {
        return Some("node(s) didn't have free ports for the requested pod ports".to_owned());
    }
    let allocatable = node.status.as_ref().and_then(|status| status.allocatable.as_ref());
    let room = |resource: &str| allocatable.and_then(|map| map.get(resource)).and_then(amount);
    let pods = i128::try_from(view.pods.len()).unwrap_or(i128::MAX);
    if (pods + 1) * 1000 > room("pods").unwrap_or(DEFAULT_MAX_PODS * 1000) {
        return Some("Too many pods".to_owned());
    }
    requests(pod).into_iter().find_map(|(resource, wanted)| {
        let used = view.used.get(&resource).copied().unwrap_or(0);
        (wanted > 0 && used + wanted > room(&resource).unwrap_or(0)).then(|| format!("Insufficient {resource}"))
    })
}

/// The sum of the weights of the preferred node affinity terms that match.
pub(crate) fn preference(pod: &Pod, node: &Node) -> i32 {
    let affinity = pod.spec.as_ref().and_then(|spec| spec.affinity.as_ref()?.node_affinity.as_ref());
    let terms = affinity.and_then(|affinity| affinity.preferred_during_scheduling_ignored_during_execution.as_deref());
    let terms = terms.unwrap_or_default().iter();
    terms.filter(|term| term_matches(&term.preference, node)).map(|term| term.weight).sum()
}

/// How many PreferNoSchedule taints of the node the pod doesn't tolerate.
pub(crate) fn soft_taints(pod: &Pod, node: &Node) -> usize {
    let empty = Vec::new();
    let tolerations = pod.spec.as_ref().and_then(|spec| spec.tolerations.as_ref()).unwrap_or(&empty);
    let taints = node.spec.as_ref().and_then(|spec| spec.taints.as_deref()).unwrap_or_default().iter();
    taints.filter(|taint| taint.effect == "PreferNoSchedule" && !tolerated(taint, tolerations)).count()
}

/// The pod's nodeSelector and required node affinity hold.
pub(crate) fn matches_affinity(pod: &Pod, node: &Node) -> bool {
    let Some(spec) = &pod.spec else { return true };
    let labels = node.labels();
    if !spec.node_selector.iter().flatten().all(|(key, value)| labels.get(key) == Some(value)) {
        return false;
    }
    let affinity = spec.affinity.as_ref().and_then(|affinity| affinity.node_affinity.as_ref());
    match affinity.and_then(|affinity| affinity.required_during_scheduling_ignored_during_execution.as_ref()) {
        Some(required) => required.node_selector_terms.iter().any(|term| term_matches(term, node)),
        None => true,
    }
}

/// A term without requirements matches nothing.
fn term_matches(term: &NodeSelectorTerm, node: &Node) -> bool {
    let expressions = term.match_expressions.as_deref().unwrap_or_default();
    let fields = term.match_fields.as_deref().unwrap_or_default();
    if expressions.is_empty() && fields.is_empty() {
        return false;
    }
    let name = node.name_any();
    expressions.iter().all(|one| requirement_holds(one, node.labels().get(&one.key).map(String::as_str)))
        && fields.iter().all(|one| one.key == "metadata.name" && requirement_holds(one, Some(&name)))
}

fn requirement_holds(requirement: &NodeSelectorRequirement, actual: Option<&str>) -> bool {
    let values = requirement.values.as_deref().unwrap_or_default();
    let listed = || actual.is_some_and(|actual| values.iter().any(|value| value == actual));
    let numbers = || Some((actual?.parse::<i64>().ok()?, values.first()?.parse::<i64>().ok()?));
    match requirement.operator.as_str() {
        "In" => listed(),
        "NotIn" => !listed(),
        "Exists" => actual.is_some(),
        "DoesNotExist" => actual.is_none(),
        "Gt" => numbers().is_some_and(|(actual, limit)| actual > limit),
        "Lt" => numbers().is_some_and(|(actual, limit)| actual < limit),
        _ => false,
    }
}

fn tolerated(taint: &Taint, tolerations: &[Toleration]) -> bool {
    tolerations.iter().any(|toleration| {
        let effect = toleration.effect.as_deref().unwrap_or_default();
        if !effect.is_empty() && effect != taint.effect {
            return false;
        }
        let key = toleration.key.as_deref().unwrap_or_default();
        let exists = toleration.operator.as_deref() == Some("Exists");
        if key.is_empty() {
            return exists;
        }
        key == taint.key
            && (exists || toleration.value.as_deref().unwrap_or_default() == taint.value.as_deref().unwrap_or_default())
    })
}

fn host_ports(pod: &Pod) -> Vec<HostPort> {
    let Some(spec) = &pod.spec else { return Vec::new() };
    let ports = spec.containers.iter().flat_map(|container| container.ports.iter().flatten());
    ports
        .filter_map(|port| {
            let number = port.host_port.filter(|number| *number > 0)?;
            let protocol = port.protocol.clone().unwrap_or_else(|| "TCP".to_owned());
            let address = port.host_ip.clone().filter(|ip| ip != "0.0.0.0" && ip != "::").unwrap_or_default();
            Some((protocol, number, address))
        })
        .collect()
}

fn ports_collide(one: &HostPort, other: &HostPort) -> bool {
    one.0 == other.0 && one.1 == other.1 && (one.2.is_empty() || other.2.is_empty() || one.2 == other.2)
}

/// What the pod asks for, in thousandths: the larger of its containers together and each init container, with sidecars
/// (restartable init containers) counted to the end.
fn requests(pod: &Pod) -> BTreeMap<String, i128> {
    let Some(spec) = &pod.spec else { return BTreeMap::new() };
    let mut total = BTreeMap::new();
    for container in &spec.containers {
        add(&mut total, &of_container(container));
    }
    let mut sidecars = BTreeMap::new();
    let mut peak: BTreeMap<String, i128> = BTreeMap::new();
    for container in spec.init_containers.iter().flatten() {
        let own = of_container(container);
        let mut now = sidecars.clone();
        add(&mut now, &own);
        for (resource, amount) in now {
            let known = peak.entry(resource).or_default();
            *known = (*known).max(amount);
        }
        if container.restart_policy.as_deref() == Some("Always") {
            add(&mut sidecars, &own);
        }
    }
    add(&mut total, &sidecars);
    for (resource, amount) in peak {
        let known = total.entry(resource).or_default();
        *known = (*known).max(amount);
    }
    for (resource, quantity) in spec.overhead.iter().flatten() {
        *total.entry(resource.clone()).or_default() += amount(quantity).unwrap_or(0);
    }
    if !pod_state::is_terminal(pod) {
        total.retain(|_, amount| *amount > 0);
    }
    total
}

fn add(total: &mut BTreeMap<String, i128>, more: &BTreeMap<String, i128>) {
    for (resource, amount) in more {
        *total.entry(resource.clone()).or_default() += amount;
    }
}

fn of_container(container: &Container) -> BTreeMap<String, i128> {
    let Some(ResourceRequirements { requests, limits, .. }) = &container.resources else { return BTreeMap::new() };
    // A limit without a request is the request.
    let mut amounts = BTreeMap::new();
    for (resource, quantity) in limits.iter().flatten().chain(requests.iter().flatten()) {
        amounts.insert(resource.clone(), amount(quantity).unwrap_or(0));
    }
    amounts
}

/// A Kubernetes quantity in thousandths, rounded up; `None` when it isn't one.
fn amount(quantity: &Quantity) -> Option<i128> {
    let text = quantity.0.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.' && c != '+' && c != '-').unwrap_or(text.len());
    let (number, suffix) = text.split_at(digits);
    let (multiplier, divisor): (i128, i128) = match suffix {
        "" => (1, 1),
        "n" => (1, 1_000_000_000),
        "u" => (1, 1_000_000),
        "m" => (1, 1000),
        "k" => (1000, 1),
        "M" => (1_000_000, 1),
        "G" => (1_000_000_000, 1),
        "T" => (1_000_000_000_000, 1),
        "P" => (1_000_000_000_000_000, 1),
        "E" => (1_000_000_000_000_000_000, 1),
        "Ki" => (1 << 10, 1),
        "Mi" => (1 << 20, 1),
        "Gi" => (1 << 30, 1),
        "Ti" => (1 << 40, 1),
        "Pi" => (1 << 50, 1),
        "Ei" => (1 << 60, 1),
        exponent => {
            let power: i32 = exponent.strip_prefix(['e', 'E'])?.parse().ok()?;
            let scale = 10_i128.checked_pow(power.unsigned_abs().min(18))?;
            if power >= 0 { (scale, 1) } else { (1, scale) }
        }
    };
    let negative = number.starts_with('-');
    let (whole, fraction) =
        number.trim_start_matches(['+', '-']).split_once('.').unwrap_or((number.trim_start_matches(['+', '-']), ""));
    if whole.len() + fraction.len() == 0 || whole.len() + fraction.len() > 18 {
        return None;
    }
    let scale = 10_i128.checked_pow(u32::try_from(fraction.len()).ok()?)?;
    let digits: i128 = format!("{whole}{fraction}").parse().ok()?;
    let (top, bottom) = (digits.checked_mul(multiplier)?.checked_mul(1000)?, divisor.checked_mul(scale)?);
    let rounded = top.checked_add(bottom - 1)? / bottom;
    Some(if negative { -rounded } else { rounded })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn view(spec: Value, labels: Value, pods: &[Pod]) -> NodeView {
        let node = json!({
            "metadata": {"name": "n", "labels": labels}, "spec": spec,
            "status": {"allocatable": {"cpu": "2", "memory": "1Gi", "pods": "3"}, "conditions": [{"type": "Ready", "status": "True"}]}
        });
        let mut view = NodeView::new(Arc::new(serde_json::from_value(node).unwrap()));
        for pod in pods {
            view.add(Arc::new(pod.clone()));
        }
        view
    }

    fn pod(spec: Value) -> Pod {
        let mut pod = json!({"metadata": {"name": "p"}, "spec": {"containers": []}});
        for (key, value) in spec.as_object().unwrap() {
            pod["spec"][key] = value.clone();
        }
        serde_json::from_value(pod).unwrap()
    }

    fn asking(cpu: &str) -> Pod {
        pod(json!({"containers": [{"name": "c", "resources": {"requests": {"cpu": cpu}}}]}))
    }

    #[test]
    fn quantities_are_read_as_kubernetes_writes_them() {
        let read = |text: &str| amount(&Quantity(text.to_owned()));
        assert_eq!(read("100m"), Some(100));
        assert_eq!(read("1.5"), Some(1500));
        assert_eq!(read("128Mi"), Some(128 * 1024 * 1024 * 1000));
        assert_eq!(read("1e3"), Some(1_000_000));
        assert_eq!(read("1E"), Some(1_000_000_000_000_000_000_000));
        assert_eq!(read("1u"), Some(1), "rounded up");
        assert_eq!(read(""), None);
        assert_eq!(read("much"), None);
    }

    #[test]
    fn a_pod_fits_while_the_sum_of_requests_does() {
        let one = asking("1500m");
        assert_eq!(refusal(&asking("500m"), &view(json!({}), json!({}), std::slice::from_ref(&one))), None);
        let full = refusal(&asking("501m"), &view(json!({}), json!({}), &[one]));
        assert_eq!(full.as_deref(), Some("Insufficient cpu"));
        let empty = pod(json!({}));
        let three = [empty.clone(), empty.clone(), empty.clone()];
        assert_eq!(refusal(&empty, &view(json!({}), json!({}), &three)).as_deref(), Some("Too many pods"));
    }

    #[test]
    fn an_init_container_counts_only_where_it_asks_for_more_than_the_rest() {
        let init = pod(json!({
            "initContainers": [{"name": "i", "resources": {"requests": {"cpu": "2"}}}],
            "containers": [{"name": "c", "resources": {"limits": {"cpu": "1"}}}]
        }));
        assert_eq!(requests(&init)["cpu"], 2000);
    }

    #[test]
    fn taints_keep_pods_off_unless_tolerated() {
        let tainted = json!({"taints": [{"key": "edge", "value": "a", "effect": "NoSchedule"}]});
        let refused = refusal(&pod(json!({})), &view(tainted.clone(), json!({}), &[]));
        assert_eq!(refused.as_deref(), Some("node(s) had untolerated taint {edge: a}"));
        for toleration in [
            json!({"key": "edge", "operator": "Equal", "value": "a", "effect": "NoSchedule"}),
            json!({"key": "edge", "operator": "Exists"}),
            json!({"operator": "Exists"}),
        ] {
            let tolerant = pod(json!({"tolerations": [toleration]}));
            assert_eq!(refusal(&tolerant, &view(tainted.clone(), json!({}), &[])), None);
        }
        let other = pod(json!({"tolerations": [{"key": "edge", "value": "b"}]}));
        assert!(refusal(&other, &view(tainted, json!({}), &[])).is_some());
    }

    #[test]
    fn node_affinity_operators_hold_as_documented() {
        let labels = json!({"disk": "ssd", "cores": "8"});
        let fits = |operator: &str, key: &str, values: Value| {
            let expression = json!({"key": key, "operator": operator, "values": values});
            let pod = pod(json!({"affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution":
                {"nodeSelectorTerms": [{"matchExpressions": [expression]}]}}}}));
            refusal(&pod, &view(json!({}), labels.clone(), &[])).is_none()
        };
        assert!(fits("In", "disk", json!(["hdd", "ssd"])) && !fits("In", "disk", json!(["hdd"])));
        assert!(fits("NotIn", "disk", json!(["hdd"])) && fits("NotIn", "none", json!(["x"])));
        assert!(fits("Exists", "disk", json!([])) && !fits("Exists", "none", json!([])));
        assert!(fits("DoesNotExist", "none", json!([])) && !fits("DoesNotExist", "disk", json!([])));
        assert!(fits("Gt", "cores", json!(["4"])) && !fits("Gt", "cores", json!(["8"])));
        assert!(fits("Lt", "cores", json!(["9"])) && !fits("Lt", "disk", json!(["9"])));
    }

    #[test]
    fn a_silent_node_takes_no_pod_even_if_the_pod_tolerates_everything() {
        let node =
            json!({"metadata": {"name": "n"}, "status": {"conditions": [{"type": "Ready", "status": "Unknown"}]}});
        let silent = NodeView::new(Arc::new(serde_json::from_value(node).unwrap()));
        let tolerant = pod(json!({"tolerations": [{"operator": "Exists"}]}));
        assert_eq!(refusal(&tolerant, &silent).as_deref(), Some("node(s) were not ready"));
    }

    #[test]
    fn one_host_port_is_taken_once_on_each_address() {
        let on = |address: &str| {
            pod(
                json!({"containers": [{"name": "c", "ports": [{"containerPort": 80, "hostPort": 80, "hostIP": address}]}]}),
            )
        };
        let fits = |used: &str, asked: &str| refusal(&on(asked), &view(json!({}), json!({}), &[on(used)])).is_none();
        assert!(!fits("", "10.0.0.1") && !fits("0.0.0.0", "") && !fits("10.0.0.1", "10.0.0.1"));
        assert!(fits("10.0.0.1", "10.0.0.2"));
    }
}
