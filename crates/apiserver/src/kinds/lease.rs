//! Leases: node heartbeats and leader election.

use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::Lease;
use serde_json::{Value, json};

use super::built_in::{AGE, BuiltIn, NAME, column, no_default, no_prepare, no_validate_update};
use super::field_error::Errors;
use super::{built_in, decode, merge_keys, tables};

pub(crate) static LEASE: BuiltIn = BuiltIn {
    group: "coordination.k8s.io",
    version: "v1",
    plural: "leases",
    singular: "lease",
    kind: "Lease",
    short_names: &[],
    categories: &[],
    namespaced: true,
    status: false,
    scale: false,
    generation: false,
    keeps_status_on_create: false,
    graceful: false,
    columns: &[NAME, column("Holder", "string", "Who holds it."), AGE],
    selectable: &[],
    merge_keys: merge_keys::PLAIN,
    typed: decode::typed::<Lease>,
    schema: built_in::schema::<Lease>(),
    default: no_default,
    validate,
    prepare_update: no_prepare,
    validate_update: no_validate_update,
    cells,
};

fn validate(object: &Value, errors: &mut Errors) {
    let spec = &object["spec"];
    if let Some(seconds) = spec["leaseDurationSeconds"].as_i64()
        && seconds <= 0
    {
        errors.invalid("spec.leaseDurationSeconds", seconds, "must be greater than 0");
    }
    if let Some(transitions) = spec["leaseTransitions"].as_i64()
        && transitions < 0
    {
        errors.invalid("spec.leaseTransitions", transitions, "must be greater than or equal to 0");
    }
}

fn cells(object: &Value, now: Timestamp) -> Vec<Value> {
    vec![tables::name(object), json!(tables::text(&object["spec"]["holderIdentity"])), tables::age(object, now)]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kinds::{Registry, validate_create};

    #[test]
    fn a_lease_lasts_longer_than_nothing() {
        let info = Registry::built_in().lookup("coordination.k8s.io", "v1", "leases").unwrap();
        let lease = |seconds: i64| json!({"metadata": {"name": "a", "namespace": "n"}, "spec": {"leaseDurationSeconds": seconds}});
        assert!(validate_create(&info, &lease(40)).is_empty());
        assert_eq!(validate_create(&info, &lease(0))[0].field, "spec.leaseDurationSeconds");
    }
}
