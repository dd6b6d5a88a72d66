//! Takes out of objects what the mesh never reads, before they are kept in memory or on disk.

use edgemesh_api::{
    MeshNode,
    names::{EDGE_ROLE_LABEL, GATEWAY_NODE_LABEL, NETWORK_LABEL},
};
use edgemesh_mesh::from_kubernetes::{
    EDGEMESH_LABEL, ELSEWHERE_LABELS, ENDPOINT_CHOICE_ANNOTATION, NO_PROXY_LABEL, PROXY_LABEL,
    PROXY_PROTOCOL_ANNOTATION, SERVICE_NAME_LABEL, ZONE_LABEL,
};
use k8s_openapi::{
    api::{
        core::v1::{Node, NodeSpec, NodeStatus, Service, ServiceStatus},
        discovery::v1::EndpointSlice,
    },
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};

/// Labels that anything reads.
const LABELS: [&str; 8] = [
    SERVICE_NAME_LABEL,
    ZONE_LABEL,
    NETWORK_LABEL,
    GATEWAY_NODE_LABEL,
    EDGE_ROLE_LABEL,
    NO_PROXY_LABEL.0,
    PROXY_LABEL,
    EDGEMESH_LABEL,
];
/// Annotations that anything reads.
const ANNOTATIONS: [&str; 2] = [ENDPOINT_CHOICE_ANNOTATION, PROXY_PROTOCOL_ANNOTATION];

pub(crate) fn service(object: &mut Service) {
    metadata(&mut object.metadata);
    let balancer = object.status.take().and_then(|status| status.load_balancer);
    let known = balancer.filter(|balancer| balancer.ingress.is_some());
    object.status = known.map(|balancer| ServiceStatus { load_balancer: Some(balancer), conditions: None });
    if let Some(spec) = &mut object.spec {
        spec.selector = None;
        for port in spec.ports.iter_mut().flatten() {
            port.target_port = None;
        }
    }
}

pub(crate) fn endpoint_slice(object: &mut EndpointSlice) {
    metadata(&mut object.metadata);
    for endpoint in &mut object.endpoints {
        endpoint.deprecated_topology = None;
        if let Some(target) = &mut endpoint.target_ref {
            target.uid = None;
            target.resource_version = None;
            target.field_path = None;
        }
    }
}

pub(crate) fn node(object: &mut Node) {
    metadata(&mut object.metadata);
    let spec = object.spec.take().unwrap_or_default();
    object.spec = Some(NodeSpec { pod_cidr: spec.pod_cidr, pod_cidrs: spec.pod_cidrs, ..NodeSpec::default() });
    let status = object.status.take().unwrap_or_default();
    let mut conditions = status.conditions.unwrap_or_default();
    conditions.retain(|condition| condition.type_ == "Ready");
    for condition in &mut conditions {
        condition.last_heartbeat_time = None;
        condition.last_transition_time = None;
        condition.message = None;
        condition.reason = None;
    }
    object.status =
        Some(NodeStatus { addresses: status.addresses, conditions: Some(conditions), ..NodeStatus::default() });
}

pub(crate) fn mesh_node(object: &mut MeshNode) {
    metadata(&mut object.metadata);
}

fn metadata(metadata: &mut ObjectMeta) {
    let mut labels = metadata.labels.take().unwrap_or_default();
    labels.retain(|name, _| LABELS.contains(&name.as_str()) || ELSEWHERE_LABELS.contains(&name.as_str()));
    let mut annotations = metadata.annotations.take().unwrap_or_default();
    annotations.retain(|name, _| ANNOTATIONS.contains(&name.as_str()));
    *metadata = ObjectMeta {
        name: metadata.name.take(),
        namespace: metadata.namespace.take(),
        labels: (!labels.is_empty()).then_some(labels),
        annotations: (!annotations.is_empty()).then_some(annotations),
        ..ObjectMeta::default()
    };
}

#[cfg(test)]
mod tests {
    use edgemesh_mesh::CatalogStore;
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn a_slim_service_means_the_same_to_the_mesh() {
        let with = |labels: Value| -> Service {
            serde_json::from_value(json!({
                "metadata": {"name": "web", "namespace": "default", "uid": "u", "labels": labels, "annotations": {
                    "edgemesh.dev/endpoint-choice": "kubernetes", "edgemesh.dev/proxy-protocol": "v2",
                    "kubectl.kubernetes.io/last-applied-configuration": "{}"}},
                "spec": {
                    "type": "LoadBalancer", "clusterIP": "10.96.0.20", "clusterIPs": ["10.96.0.20"],
                    "externalIPs": ["192.0.2.1"], "selector": {"app": "web"}, "sessionAffinity": "ClientIP",
                    "internalTrafficPolicy": "Local", "externalTrafficPolicy": "Local", "healthCheckNodePort": 30001,
                    "publishNotReadyAddresses": true, "trafficDistribution": "PreferSameNode",
                    "ports": [{"name": "http", "port": 80, "targetPort": 8080, "nodePort": 30080, "appProtocol": "http"}],
                },
                "status": {"loadBalancer": {"ingress": [{"ip": "203.0.113.7"}]},
                           "conditions": [{"type": "x", "status": "True", "reason": "r", "message": "",
                                           "lastTransitionTime": "2026-01-01T00:00:00Z"}]},
            }))
            .unwrap()
        };
        let seen = |object: &Service| {
            let store = CatalogStore::new();
            store.apply_service(object);
            store.publish();
            store.snapshot().service("default", "web").unwrap().clone()
        };
        for label in ["app", "noproxy", EDGEMESH_LABEL, PROXY_LABEL].into_iter().chain(ELSEWHERE_LABELS) {
            let whole = with(json!({label: "edgemesh"}));
            let mut slim = whole.clone();
            service(&mut slim);
            assert_eq!(seen(&slim), seen(&whole), "{label}");
            assert!(slim.metadata.uid.is_none() && slim.spec.unwrap().selector.is_none());
            assert_eq!(slim.metadata.annotations.unwrap().len(), 2);
        }
    }
}
