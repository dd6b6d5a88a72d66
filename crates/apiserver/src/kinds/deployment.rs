//! Deployments.

use jiff::Timestamp;
use k8s_openapi::api::apps::v1::Deployment;
use serde_json::{Value, json};

use super::built_in::{AGE, BuiltIn, NAME, column, no_prepare, wide};
use super::field_error::Errors;
use super::{built_in, decode, merge_keys, tables, workload};

pub(crate) static DEPLOYMENT: BuiltIn = BuiltIn {
    group: "apps",
    version: "v1",
    plural: "deployments",
    singular: "deployment",
    kind: "Deployment",
    short_names: &["deploy"],
    categories: &["all"],
    namespaced: true,
    status: true,
    scale: true,
    generation: true,
    keeps_status_on_create: false,
    graceful: false,
    columns: &[
        NAME,
        column("Ready", "string", "Number of the pod with ready state"),
        column("Up-to-date", "string", "Pods of the newest template."),
        column("Available", "string", "Pods that are available."),
        AGE,
        wide("Containers", "Names of each container in the template."),
        wide("Images", "Images referenced by each container in the template."),
        wide("Selector", "Which pods belong to it."),
    ],
    selectable: &[],
    merge_keys: merge_keys::WORKLOAD,
    typed: decode::typed::<Deployment>,
    schema: built_in::schema::<Deployment>(),
    default,
    validate,
    prepare_update: no_prepare,
    validate_update,
    cells,
};

fn default(object: &mut Value) {
    workload::default(object);
    let spec = &mut object["spec"];
    if tables::text(&spec["strategy"]["type"]).is_empty() {
        spec["strategy"]["type"] = json!("RollingUpdate");
    }
    if spec["strategy"]["type"] == json!("RollingUpdate") {
        for part in ["maxUnavailable", "maxSurge"] {
            if spec["strategy"]["rollingUpdate"][part].is_null() {
                spec["strategy"]["rollingUpdate"][part] = json!("25%");
            }
        }
    }
    for (field, value) in [("revisionHistoryLimit", 10), ("progressDeadlineSeconds", 600)] {
        if spec[field].is_null() {
            spec[field] = json!(value);
        }
    }
}

fn validate(object: &Value, errors: &mut Errors) {
    workload::validate(object, errors);
    let spec = &object["spec"];
    let strategy = &spec["strategy"];
    errors.one_of("spec.strategy.type", &strategy["type"], &["Recreate", "RollingUpdate"]);
    let rolling = &strategy["rollingUpdate"];
    if strategy["type"] == json!("Recreate") && !rolling.is_null() {
        errors.forbidden("spec.strategy.rollingUpdate", "may not be specified when strategy `type` is 'Recreate'");
    }
    let mut zero = true;
    for part in ["maxUnavailable", "maxSurge"] {
        let value = &rolling[part];
        match amount(value) {
            Some((number, percent)) => {
                zero &= number == 0;
                if number < 0 {
                    errors.invalid(format!("spec.strategy.rollingUpdate.{part}"), value.clone(), "must be greater than or equal to 0");
                }
                if percent && number > 100 && part == "maxUnavailable" {
                    errors.invalid(format!("spec.strategy.rollingUpdate.{part}"), value.clone(), "must not be greater than 100%");
                }
            }
            None if value.is_null() => {}
            None => errors.invalid(
                format!("spec.strategy.rollingUpdate.{part}"),
                value.clone(),
                "a valid percent string must be a numeric string followed by an ending '%' (e.g. '1%',  or '93%', regex used for validation is '[0-9]+%')",
            ),
        }
    }
    if zero && rolling.is_object() {
        errors.invalid(
            "spec.strategy.rollingUpdate.maxUnavailable",
            rolling["maxUnavailable"].clone(),
            "may not be 0 when `maxSurge` is 0",
        );
    }
    for field in ["revisionHistoryLimit", "progressDeadlineSeconds"] {
        workload::not_negative(&spec[field], &format!("spec.{field}"), errors);
    }
    if let (Some(deadline), Some(ready)) =
        (spec["progressDeadlineSeconds"].as_i64(), Some(spec["minReadySeconds"].as_i64().unwrap_or(0)))
        && deadline <= ready
    {
        errors.invalid("spec.progressDeadlineSeconds", deadline, "must be greater than minReadySeconds");
    }
}

/// A count or a percentage, and which of them it is.
fn amount(value: &Value) -> Option<(i64, bool)> {
    match value {
        Value::Number(n) => Some((n.as_i64()?, false)),
        Value::String(text) => Some((text.strip_suffix('%')?.parse::<u32>().ok()?.into(), true)),
        _ => None,
    }
}

fn validate_update(old: &Value, new: &Value, errors: &mut Errors) {
    errors.immutable("spec.selector", &old["spec"]["selector"], &new["spec"]["selector"]);
}

fn cells(object: &Value, now: Timestamp) -> Vec<Value> {
    let (spec, status) = (&object["spec"], &object["status"]);
    let number = |value: &Value| value.as_i64().unwrap_or(0);
    let (containers, images) = workload::containers_and_images(object);
    vec![
        tables::name(object),
        json!(format!("{}/{}", number(&status["readyReplicas"]), number(&spec["replicas"]))),
        json!(number(&status["updatedReplicas"])),
        json!(number(&status["availableReplicas"])),
        tables::age(object, now),
        json!(containers),
        json!(images),
        json!(tables::selector(&spec["selector"])),
    ]
}
