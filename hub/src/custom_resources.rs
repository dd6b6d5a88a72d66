//! The CustomResourceDefinitions that the mesh needs: its own, and those of the Gateway API.

use edgemesh_api::MeshNode;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{
    CustomResourceColumnDefinition, CustomResourceDefinition,
};
use kube::CustomResourceExt;

/// A column: name, type, path in the object.
type Column = (&'static str, &'static str, &'static str);

/// All definitions, with the columns that kubectl shows.
pub(crate) fn definitions() -> Vec<CustomResourceDefinition> {
    let age = ("Age", "date", ".metadata.creationTimestamp");
    vec![
        with_columns(MeshNode::crd(), &[("Agent", "string", ".spec.peers.agent.peerId"), age]),
        with_columns(
            gateway_api::gatewayclasses::GatewayClass::crd(),
            &[
                ("Controller", "string", ".spec.controllerName"),
                ("Accepted", "string", ".status.conditions[?(@.type==\"Accepted\")].status"),
                age,
            ],
        ),
        with_columns(
            gateway_api::gateways::Gateway::crd(),
            &[
                ("Class", "string", ".spec.gatewayClassName"),
                ("Address", "string", ".status.addresses[*].value"),
                ("Programmed", "string", ".status.conditions[?(@.type==\"Programmed\")].status"),
                age,
            ],
        ),
        with_columns(gateway_api::httproutes::HttpRoute::crd(), &[("Hostnames", "string", ".spec.hostnames"), age]),
        with_columns(gateway_api::referencegrants::ReferenceGrant::crd(), &[age]),
    ]
}

fn with_columns(mut definition: CustomResourceDefinition, columns: &[Column]) -> CustomResourceDefinition {
    for version in &mut definition.spec.versions {
        let columns = columns.iter().map(|(name, type_, path)| CustomResourceColumnDefinition {
            name: (*name).to_owned(),
            type_: (*type_).to_owned(),
            json_path: (*path).to_owned(),
            ..CustomResourceColumnDefinition::default()
        });
        version.additional_printer_columns = Some(columns.collect());
    }
    definition
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_that_nodes_get_status_from_has_the_subresource() {
        let all = definitions();
        let names: Vec<_> = all.iter().filter_map(|crd| crd.metadata.name.as_deref()).collect();
        assert!(names.contains(&"meshnodes.edgemesh.dev") && names.contains(&"httproutes.gateway.networking.k8s.io"));
        for crd in &all {
            let name = crd.metadata.name.as_deref().unwrap_or_default();
            let has_status = crd.spec.versions[0].subresources.as_ref().is_some_and(|s| s.status.is_some());
            let wants = ["gateways.", "gatewayclasses.", "httproutes."].iter().any(|prefix| name.starts_with(prefix));
            assert!(has_status || !wants, "{name}");
        }
    }
}
