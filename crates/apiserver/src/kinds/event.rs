//! Events: core/v1, and events.k8s.io/v1 as another view of the same objects.

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Event as CoreEvent;
use k8s_openapi::api::events::v1::Event as EventsEvent;
use serde_json::{Value, json};

use super::built_in::{BuiltIn, ColumnDef, NAME, column, no_prepare, no_validate_update, wide};
use super::field_error::Errors;
use super::{built_in, decode, merge_keys, names, tables};

const COLUMNS: &[ColumnDef] = &[
    column("Last Seen", "string", "Time since it was last seen."),
    column("Type", "string", "Normal or Warning."),
    column("Reason", "string", "Why, in one word."),
    column("Object", "string", "What it is about."),
    wide("Subobject", "The part of it."),
    wide("Source", "Who reported it."),
    column("Message", "string", "What happened."),
    wide("First Seen", "Time since it was first seen."),
    wide("Count", "How often."),
    ColumnDef { priority: 1, ..NAME },
];

pub(crate) static EVENT: BuiltIn = BuiltIn {
    group: "",
    version: "v1",
    plural: "events",
    singular: "event",
    kind: "Event",
    short_names: &["ev"],
    categories: &[],
    namespaced: true,
    status: false,
    scale: false,
    generation: false,
    keeps_status_on_create: false,
    graceful: false,
    columns: COLUMNS,
    selectable: &[
        "involvedObject.kind",
        "involvedObject.namespace",
        "involvedObject.name",
        "involvedObject.uid",
        "involvedObject.apiVersion",
        "involvedObject.resourceVersion",
        "involvedObject.fieldPath",
        "reason",
        "reportingComponent",
        "source",
        "type",
    ],
    merge_keys: merge_keys::PLAIN,
    typed: decode::typed::<CoreEvent>,
    schema: built_in::schema::<CoreEvent>(),
    default: default_type,
    validate: |object, errors| validate(object, "involvedObject", errors),
    prepare_update: no_prepare,
    validate_update: no_validate_update,
    cells,
};

pub(crate) static EVENTS_VIEW: BuiltIn = BuiltIn {
    group: "events.k8s.io",
    selectable: &["reason", "type", "regarding.kind", "regarding.namespace", "regarding.name", "regarding.uid"],
    typed: decode::typed::<EventsEvent>,
    schema: built_in::schema::<EventsEvent>(),
    validate: |object, errors| validate(object, "regarding", errors),
    cells: |object, now| {
        let mut core = object.clone();
        to_core(&mut core);
        cells(&core, now)
    },
    ..EVENT
};

/// Field names of the two views: core, events.k8s.io.
const RENAMED: &[(&str, &str)] = &[
    ("involvedObject", "regarding"),
    ("message", "note"),
    ("source", "deprecatedSource"),
    ("firstTimestamp", "deprecatedFirstTimestamp"),
    ("lastTimestamp", "deprecatedLastTimestamp"),
    ("count", "deprecatedCount"),
    ("reportingComponent", "reportingController"),
];

/// From the view of events.k8s.io to what is kept.
pub(crate) fn to_core(object: &mut Value) {
    let Some(map) = object.as_object_mut() else { return };
    for (core, view) in RENAMED {
        if let Some(value) = map.shift_remove(*view) {
            map.insert((*core).to_owned(), value);
        }
    }
}

/// From what is kept to the view of events.k8s.io.
pub(crate) fn from_core(object: &mut Value) {
    let Some(map) = object.as_object_mut() else { return };
    for (core, view) in RENAMED {
        if let Some(value) = map.shift_remove(*core) {
            map.insert((*view).to_owned(), value);
        }
    }
}

fn default_type(object: &mut Value) {
    if tables::text(&object["type"]).is_empty() {
        object["type"] = json!("Normal");
    }
}

/// An event lives in the namespace of what it is about; those about cluster-scoped objects in `default`.
fn validate(object: &Value, about: &str, errors: &mut Errors) {
    let namespace = tables::text(&object["metadata"]["namespace"]);
    let about_namespace = tables::text(&object[about]["namespace"]);
    if about_namespace.is_empty() {
        if namespace != "default" && namespace != "kube-system" {
            errors.invalid(format!("{about}.namespace"), about_namespace, "does not match event.namespace");
        }
    } else if about_namespace != namespace {
        errors.invalid(format!("{about}.namespace"), about_namespace, "does not match event.namespace");
    }
    if let Some(problem) = names::dns_label(namespace) {
        errors.invalid("metadata.namespace", namespace, problem);
    }
}

fn cells(object: &Value, now: Timestamp) -> Vec<Value> {
    let about = &object["involvedObject"];
    let first = if object["firstTimestamp"].is_null() { &object["eventTime"] } else { &object["firstTimestamp"] };
    let last = if object["lastTimestamp"].is_null() { first } else { &object["lastTimestamp"] };
    let series = &object["series"];
    let last = if series.is_object() { &series["lastObservedTime"] } else { last };
    let count = series["count"].as_i64().or_else(|| object["count"].as_i64()).unwrap_or(1);
    let component = match tables::text(&object["source"]["component"]) {
        "" => tables::text(&object["reportingComponent"]),
        component => component,
    };
    let source = match tables::text(&object["source"]["host"]) {
        "" => component.to_owned(),
        host => format!("{component}, {host}"),
    };
    let target = format!("{}/{}", tables::text(&about["kind"]).to_lowercase(), tables::text(&about["name"]));
    vec![
        json!(tables::since(last, now)),
        json!(tables::text(&object["type"])),
        json!(tables::text(&object["reason"])),
        json!(target),
        json!(tables::text(&about["fieldPath"])),
        json!(source),
        json!(tables::text(&object["message"]).trim()),
        json!(tables::since(first, now)),
        json!(count),
        tables::name(object),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kinds::{Registry, from_storage, table_row, to_storage, validate_create};

    fn event() -> Value {
        json!({"apiVersion": "v1", "kind": "Event", "metadata": {"name": "a.1", "namespace": "n"},
            "involvedObject": {"kind": "Pod", "namespace": "n", "name": "a"}, "type": "Warning", "reason": "Failed",
            "message": "no image\n", "count": 3, "source": {"component": "edgecore", "host": "e1"},
            "firstTimestamp": "2024-01-01T00:00:00Z", "lastTimestamp": "2024-01-01T00:01:00Z"})
    }

    #[test]
    fn an_event_is_shown_with_its_object_and_times() {
        let info = Registry::built_in().lookup("", "v1", "events").unwrap();
        assert!(validate_create(&info, &event()).is_empty());
        let row = table_row(&info, &event(), "2024-01-01T00:01:30Z".parse().unwrap());
        assert_eq!(
            json!(row),
            json!(["30s", "Warning", "Failed", "pod/a", "", "edgecore, e1", "no image", "90s", 3, "a.1"])
        );
        let mut other = event();
        other["involvedObject"]["namespace"] = json!("m");
        assert_eq!(
            validate_create(&info, &other)[0].to_string(),
            "involvedObject.namespace: Invalid value: \"m\": does not match event.namespace"
        );
    }

    #[test]
    fn both_views_show_the_same_event() {
        let view = Registry::built_in().lookup("events.k8s.io", "v1", "events").unwrap();
        let mut object = event();
        from_storage(&view, &mut object);
        assert_eq!((&object["note"], &object["apiVersion"]), (&json!("no image\n"), &json!("events.k8s.io/v1")));
        assert_eq!(object["regarding"]["name"], json!("a"));
        to_storage(&view, &mut object);
        assert_eq!(object, event());
    }
}
