//! ReplicaSets.

use jiff::Timestamp;
use k8s_openapi::api::apps::v1::ReplicaSet;
use serde_json::{Value, json};

use super::built_in::{AGE, BuiltIn, NAME, column, no_prepare, wide};
use super::field_error::Errors;
use super::{built_in, decode, merge_keys, tables, workload};

pub(crate) static REPLICA_SET: BuiltIn = BuiltIn {
    group: "apps",
    version: "v1",
    plural: "replicasets",
    singular: "replicaset",
    kind: "ReplicaSet",
    short_names: &["rs"],
    categories: &["all"],
    namespaced: true,
    status: true,
    scale: true,
    generation: true,
    keeps_status_on_create: false,
    graceful: false,
    columns: &[
        NAME,
        column("Desired", "integer", "Pods that are wanted."),
        column("Current", "integer", "Pods that there are."),
        column("Ready", "integer", "Pods that are ready."),
        AGE,
        wide("Containers", "Names of each container in the template."),
        wide("Images", "Images referenced by each container in the template."),
        wide("Selector", "Which pods belong to it."),
    ],
    selectable: &["status.replicas"],
    merge_keys: merge_keys::WORKLOAD,
    typed: decode::typed::<ReplicaSet>,
    schema: built_in::schema::<ReplicaSet>(),
    default: workload::default,
    validate: workload::validate,
    prepare_update: no_prepare,
    validate_update,
    cells,
};

fn validate_update(old: &Value, new: &Value, errors: &mut Errors) {
    errors.immutable("spec.selector", &old["spec"]["selector"], &new["spec"]["selector"]);
}

fn cells(object: &Value, now: Timestamp) -> Vec<Value> {
    let (spec, status) = (&object["spec"], &object["status"]);
    let number = |value: &Value| json!(value.as_i64().unwrap_or(0));
    let (containers, images) = workload::containers_and_images(object);
    vec![
        tables::name(object),
        number(&spec["replicas"]),
        number(&status["replicas"]),
        number(&status["readyReplicas"]),
        tables::age(object, now),
        json!(containers),
        json!(images),
        json!(tables::selector(&spec["selector"])),
    ]
}
