//! Takes out of objects what the mesh never reads, before they are kept in memory or on disk.

use edgemesh_api::{
    MeshNode,
    names::{EDGE_ROLE_LABEL, GATEWAY_NODE_LABEL, NETWORK_LABEL},
};
use edgemesh_mesh::from_kubernetes::{SERVICE_NAME_LABEL, ZONE_LABEL};
use k8s_openapi::{
    api::{
        core::v1::{Node, NodeSpec, NodeStatus, Service},
        discovery::v1::EndpointSlice,
    },
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};

/// Labels that anything reads.
const LABELS: [&str; 5] = [SERVICE_NAME_LABEL, ZONE_LABEL, NETWORK_LABEL, GATEWAY_NODE_LABEL, EDGE_ROLE_LABEL];

pub(crate) fn service(object: &mut Service) {
    metadata(&mut object.metadata);
    object.status = None;
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
    labels.retain(|name, _| LABELS.contains(&name.as_str()));
    *metadata = ObjectMeta {
        name: metadata.name.take(),
        namespace: metadata.namespace.take(),
        labels: (!labels.is_empty()).then_some(labels),
        ..ObjectMeta::default()
    };
}
