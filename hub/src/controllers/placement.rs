//! Which node a pod goes to: the nodes that it fits, what pods require of one another, then the emptiest. No I/O.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, HashMap},
};

use k8s_openapi::{
    api::core::v1::{Pod, PodAffinityTerm, TopologySpreadConstraint},
    apimachinery::pkg::apis::meta::v1::LabelSelector,
};
use kube::{
    ResourceExt,
    core::{Selector, SelectorExt},
};

use super::{
    cache::controller_uid,
    fit::{self, NodeView},
    pod_state,
};

/// Labels of the namespaces, for affinity terms that select by them.
pub(crate) type NamespaceLabels = BTreeMap<String, BTreeMap<String, String>>;

/// The index of the node for the pod, or why there is none.
pub(crate) fn choose(pod: &Pod, nodes: &[NodeView], namespaces: &NamespaceLabels) -> Result<usize, String> {
    let mut refusals: BTreeMap<String, usize> = BTreeMap::new();
    let mut candidates = Vec::new();
    for (at, view) in nodes.iter().enumerate() {
        let refusal = fit::refusal(pod, view).or_else(|| between_pods(pod, view, nodes, namespaces));
        match refusal {
            Some(reason) => *refusals.entry(reason).or_default() += 1,
            None => candidates.push(at),
        }
    }
    let owner = controller_uid(pod);
    let best = candidates.into_iter().min_by_key(|at| {
        let view = &nodes[*at];
        let siblings = view.pods.iter().filter(|other| owner.is_some() && controller_uid(&***other) == owner).count();
        (
            fit::soft_taints(pod, &view.node),
            Reverse(fit::preference(pod, &view.node)),
            siblings,
            view.pods.len(),
            view.node.name_any(),
        )
    });
    best.ok_or_else(|| {
        if nodes.is_empty() {
            return "no nodes available to schedule pods".to_owned();
        }
        let mut reasons: Vec<_> = refusals.into_iter().map(|(reason, count)| format!("{count} {reason}")).collect();
        reasons.sort();
        format!("0/{} nodes are available: {}.", nodes.len(), reasons.join(", "))
    })
}

/// What required (anti-)affinity and DoNotSchedule spreading say against the node.
fn between_pods(pod: &Pod, view: &NodeView, nodes: &[NodeView], namespaces: &NamespaceLabels) -> Option<String> {
    let spec = pod.spec.as_ref()?;
    let affinity = spec.affinity.as_ref();
    let required = |pod: &Pod| -> Vec<PodAffinityTerm> {
        let affinity = pod.spec.as_ref().and_then(|spec| spec.affinity.as_ref()?.pod_anti_affinity.clone());
        affinity.and_then(|terms| terms.required_during_scheduling_ignored_during_execution).unwrap_or_default()
    };
    for term in required(pod) {
        if domain(view, nodes, &term.topology_key).any(|other| term_selects(&term, pod, other, namespaces)) {
            return Some("node(s) didn't match pod anti-affinity rules".to_owned());
        }
    }
    // The anti-affinity of those that are there holds against the new one too.
    for other_view in nodes {
        for other in other_view.pods.iter().filter(|other| has_anti_affinity(other)) {
            for term in required(other) {
                let same = view.node.labels().get(&term.topology_key);
                if same.is_some()
                    && same == other_view.node.labels().get(&term.topology_key)
                    && term_selects(&term, other, pod, namespaces)
                {
                    return Some("node(s) didn't satisfy existing pods anti-affinity rules".to_owned());
                }
            }
        }
    }
    let terms = affinity.and_then(|affinity| affinity.pod_affinity.as_ref());
    let terms = terms.and_then(|terms| terms.required_during_scheduling_ignored_during_execution.as_deref());
    for term in terms.unwrap_or_default() {
        let labelled = view.node.labels().contains_key(&term.topology_key);
        let near = domain(view, nodes, &term.topology_key).any(|other| term_selects(term, pod, other, namespaces));
        // The first of a group that wants to be together may go anywhere.
        let first = || {
            term_selects(term, pod, pod, namespaces)
                && !nodes.iter().flat_map(|view| &view.pods).any(|other| term_selects(term, pod, other, namespaces))
        };
        if !labelled || !(near || first()) {
            return Some("node(s) didn't match pod affinity rules".to_owned());
        }
    }
    let constraints = spec.topology_spread_constraints.as_deref().unwrap_or_default();
    let hard = constraints.iter().filter(|constraint| constraint.when_unsatisfiable == "DoNotSchedule");
    hard.into_iter()
        .any(|constraint| !spreads(pod, view, nodes, constraint))
        .then(|| "node(s) didn't match pod topology spread constraints".to_owned())
}

fn has_anti_affinity(pod: &Pod) -> bool {
    let affinity = pod.spec.as_ref().and_then(|spec| spec.affinity.as_ref());
    affinity.is_some_and(|affinity| affinity.pod_anti_affinity.is_some())
}

/// The pods on nodes with the same value of the label as this node.
fn domain<'a>(view: &'a NodeView, nodes: &'a [NodeView], key: &'a str) -> impl Iterator<Item = &'a Pod> {
    let value = view.node.labels().get(key);
    nodes
        .iter()
        .filter(move |other| value.is_some() && other.node.labels().get(key) == value)
        .flat_map(|other| other.pods.iter().map(|pod| &**pod))
}

fn label_match(selector: Option<&LabelSelector>, pod: &Pod) -> bool {
    let Some(selector) = selector else { return false };
    Selector::try_from(selector.clone()).is_ok_and(|selector| selector.matches(pod.labels()))
}

/// Whether a term of `of` selects `other`.
fn term_selects(term: &PodAffinityTerm, of: &Pod, other: &Pod, namespaces: &NamespaceLabels) -> bool {
    let namespace = other.metadata.namespace.clone().unwrap_or_default();
    let named = term.namespaces.as_deref().unwrap_or_default();
    let by_label = term.namespace_selector.as_ref().map(|selector| {
        let empty = BTreeMap::new();
        let labels = namespaces.get(&namespace).unwrap_or(&empty);
        Selector::try_from(selector.clone()).is_ok_and(|selector| selector.matches(labels))
    });
    let in_scope = match by_label {
        Some(matched) => matched || named.contains(&namespace),
        None if named.is_empty() => of.metadata.namespace == other.metadata.namespace,
        None => named.contains(&namespace),
    };
    in_scope && label_match(term.label_selector.as_ref(), other)
}

/// Whether the pod on this node keeps the difference between the domains within `maxSkew`.
fn spreads(pod: &Pod, view: &NodeView, nodes: &[NodeView], constraint: &TopologySpreadConstraint) -> bool {
    let key = &constraint.topology_key;
    let Some(here) = view.node.labels().get(key) else { return false };
    let mut counts: HashMap<&String, i32> = HashMap::new();
    for other in nodes.iter().filter(|other| fit::matches_affinity(pod, &other.node)) {
        let Some(value) = other.node.labels().get(key) else { continue };
        let matching = other.pods.iter().filter(|one| {
            one.metadata.namespace == pod.metadata.namespace
                && !pod_state::is_terminating(one)
                && label_match(constraint.label_selector.as_ref(), one)
        });
        *counts.entry(value).or_default() += i32::try_from(matching.count()).unwrap_or(i32::MAX);
    }
    let wanted = usize::try_from(constraint.min_domains.unwrap_or(1)).unwrap_or(1);
    let fewest = if counts.len() < wanted { 0 } else { counts.values().min().copied().unwrap_or(0) };
    let own = i32::from(label_match(constraint.label_selector.as_ref(), pod));
    counts.get(here).copied().unwrap_or(0) + own - fewest <= constraint.max_skew
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use serde_json::{Value, json};

    use super::*;

    fn node(name: &str, pods: &[Pod]) -> NodeView {
        let node = json!({
            "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name}},
            "status": {"allocatable": {"cpu": "8", "pods": "10"}, "conditions": [{"type": "Ready", "status": "True"}]}
        });
        let mut view = NodeView::new(Arc::new(serde_json::from_value(node).unwrap()));
        for pod in pods {
            view.add(Arc::new(pod.clone()));
        }
        view
    }

    fn pod(owner: &str, spec: Value) -> Pod {
        let mut pod = json!({
            "metadata": {"name": "p", "namespace": "d", "labels": {"app": owner},
                "ownerReferences": [{"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": owner, "uid": owner, "controller": true}]},
            "spec": {"containers": []}
        });
        for (key, value) in spec.as_object().unwrap() {
            pod["spec"][key] = value.clone();
        }
        serde_json::from_value(pod).unwrap()
    }

    fn chosen(pod: &Pod, nodes: &[NodeView]) -> Result<String, String> {
        choose(pod, nodes, &NamespaceLabels::new()).map(|at| nodes[at].node.name_any())
    }

    #[test]
    fn pods_of_one_owner_spread_before_nodes_fill_evenly() {
        let (web, db) = (pod("web", json!({})), pod("db", json!({})));
        let nodes = [node("a", std::slice::from_ref(&web)), node("b", &[db.clone(), db.clone()]), node("c", &[])];
        assert_eq!(chosen(&web, &nodes).unwrap(), "c");
        assert_eq!(chosen(&web, &nodes[..2]).unwrap(), "b", "b is fuller but has none of this owner");
    }

    #[test]
    fn the_message_counts_the_nodes_by_reason() {
        let picky = pod(
            "web",
            json!({"nodeSelector": {"kubernetes.io/hostname": "b"}, "containers": [
                {"name": "c", "resources": {"requests": {"cpu": "9"}}}
            ]}),
        );
        let nodes = [node("a", &[]), node("b", &[]), node("c", &[])];
        let expected =
            "0/3 nodes are available: 1 Insufficient cpu, 2 node(s) didn't match Pod's node affinity/selector.";
        assert_eq!(chosen(&picky, &nodes).unwrap_err(), expected);
        assert_eq!(chosen(&picky, &[]).unwrap_err(), "no nodes available to schedule pods");
    }

    #[test]
    fn required_anti_affinity_holds_in_both_directions() {
        let term = json!({"labelSelector": {"matchLabels": {"app": "web"}}, "topologyKey": "kubernetes.io/hostname"});
        let alone = |owner: &str| {
            pod(
                owner,
                json!({"affinity": {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [term]}}}),
            )
        };
        let nodes = [node("a", &[pod("web", json!({}))])];
        assert!(chosen(&alone("db"), &nodes).is_err());
        let nodes = [node("a", &[alone("db")])];
        assert!(chosen(&pod("web", json!({})), &nodes).is_err());
        assert!(chosen(&pod("other", json!({})), &nodes).is_ok());
    }

    #[test]
    fn required_affinity_lets_the_first_pod_start_anywhere_and_keeps_the_rest_near() {
        let term = json!({"labelSelector": {"matchLabels": {"app": "web"}}, "topologyKey": "kubernetes.io/hostname"});
        let near = pod(
            "web",
            json!({"affinity": {"podAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [term]}}}),
        );
        assert!(chosen(&near, &[node("a", &[]), node("b", &[])]).is_ok());
        let nodes = [node("a", &[]), node("b", std::slice::from_ref(&near))];
        assert_eq!(chosen(&near, &nodes).unwrap(), "b");
    }

    #[test]
    fn hard_spreading_refuses_a_node_that_would_be_too_far_ahead() {
        let constraint = json!({"maxSkew": 1, "topologyKey": "kubernetes.io/hostname", "whenUnsatisfiable": "DoNotSchedule",
            "labelSelector": {"matchLabels": {"app": "web"}}});
        let even = pod("web", json!({"topologySpreadConstraints": [constraint]}));
        let full = NodeView::new(Arc::new(
            serde_json::from_value(json!({
                "metadata": {"name": "b", "labels": {"kubernetes.io/hostname": "b"}},
                "status": {"allocatable": {"pods": "0"}, "conditions": [{"type": "Ready", "status": "True"}]}
            }))
            .unwrap(),
        ));
        let nodes = [node("a", std::slice::from_ref(&even)), full];
        assert!(chosen(&even, &nodes).unwrap_err().contains("topology spread"));
    }
}
