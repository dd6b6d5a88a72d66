//! What Deployments and ReplicaSets share: replicas, selector and pod template.

use serde_json::{Value, json};

use super::field_error::Errors;
use super::{metadata, names, pod, tables};

pub(crate) fn default(object: &mut Value) {
    let spec = &mut object["spec"];
    if spec["replicas"].is_null() {
        spec["replicas"] = json!(1);
    }
    if spec["template"].is_object() {
        pod::default_spec(&mut spec["template"]["spec"]);
    }
}

pub(crate) fn validate(object: &Value, errors: &mut Errors) {
    let spec = &object["spec"];
    not_negative(&spec["replicas"], "spec.replicas", errors);
    not_negative(&spec["minReadySeconds"], "spec.minReadySeconds", errors);
    let selector = &spec["selector"];
    if selector.is_null() {
        errors.required("spec.selector", "");
    } else {
        validate_selector(selector, "spec.selector", errors);
        if tables::count(&selector["matchLabels"]) + tables::count(&selector["matchExpressions"]) == 0 {
            errors.invalid("spec.selector", selector.clone(), "empty selector is invalid for deployment");
        }
    }
    let template = &spec["template"];
    if !template.is_object() {
        errors.required("spec.template", "");
        return;
    }
    let labels = &template["metadata"]["labels"];
    metadata::labels(labels, "spec.template.metadata.labels", errors);
    metadata::annotations(&template["metadata"]["annotations"], "spec.template.metadata.annotations", errors);
    if !selector.is_null() && !matches(selector, labels) {
        errors.invalid(
            "spec.template.metadata.labels",
            if labels.is_null() { json!({}) } else { labels.clone() },
            "`selector` does not match template `labels`",
        );
    }
    pod::validate_spec(&template["spec"], "spec.template.spec", errors);
    let restart = &template["spec"]["restartPolicy"];
    if restart.as_str().is_some_and(|r| r != "Always") {
        errors.not_supported("spec.template.spec.restartPolicy", restart.clone(), &["Always"]);
    }
    if !template["spec"]["activeDeadlineSeconds"].is_null() {
        errors.forbidden(
            "spec.template.spec.activeDeadlineSeconds",
            "activeDeadlineSeconds in ReplicaSet is not Supported",
        );
    }
}

/// Checks a number that may not be negative.
pub(crate) fn not_negative(value: &Value, field: &str, errors: &mut Errors) {
    if let Some(number) = value.as_i64()
        && number < 0
    {
        errors.invalid(field, number, "must be greater than or equal to 0");
    }
}

/// Checks a LabelSelector.
pub(crate) fn validate_selector(selector: &Value, field: &str, errors: &mut Errors) {
    metadata::labels(&selector["matchLabels"], &format!("{field}.matchLabels"), errors);
    for (i, expression) in selector["matchExpressions"].as_array().into_iter().flatten().enumerate() {
        let field = format!("{field}.matchExpressions[{i}]");
        let values = expression["values"].as_array().map(Vec::as_slice).unwrap_or_default();
        match tables::text(&expression["operator"]) {
            "In" | "NotIn" if values.is_empty() => {
                errors.required(format!("{field}.values"), "must be specified when `operator` is 'In' or 'NotIn'");
            }
            "Exists" | "DoesNotExist" if !values.is_empty() => {
                errors.forbidden(
                    format!("{field}.values"),
                    "may not be specified when `operator` is 'Exists' or 'DoesNotExist'",
                );
            }
            "In" | "NotIn" | "Exists" | "DoesNotExist" => {}
            other => errors.invalid(format!("{field}.operator"), other, "not a valid selector operator"),
        }
        let key = tables::text(&expression["key"]);
        if let Some(problem) = names::qualified_name(key) {
            errors.invalid(format!("{field}.key"), key, problem);
        }
        for (j, value) in values.iter().enumerate() {
            if let Some(problem) = names::label_value(tables::text(value)) {
                errors.invalid(format!("{field}.values[{j}]"), value.clone(), problem);
            }
        }
    }
}

/// Whether a LabelSelector matches a set of labels.
pub(crate) fn matches(selector: &Value, labels: &Value) -> bool {
    let equal = selector["matchLabels"].as_object().into_iter().flatten().all(|(k, v)| labels.get(k) == Some(v));
    equal
        && selector["matchExpressions"].as_array().into_iter().flatten().all(|expression| {
            let value = labels.get(tables::text(&expression["key"]));
            let listed = || value.is_some_and(|v| expression["values"].as_array().is_some_and(|a| a.contains(v)));
            match tables::text(&expression["operator"]) {
                "In" => listed(),
                "NotIn" => !listed(),
                "Exists" => value.is_some(),
                "DoesNotExist" => value.is_none(),
                _ => false,
            }
        })
}

/// Names and images of the template's containers, as the wide columns show them.
pub(crate) fn containers_and_images(object: &Value) -> (String, String) {
    let list = |part: &str| {
        let containers = object["spec"]["template"]["spec"]["containers"].as_array().into_iter().flatten();
        containers.map(|c| tables::text(&c[part])).collect::<Vec<_>>().join(",")
    };
    (list("name"), list("image"))
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;

    use super::*;
    use crate::kinds::{Registry, decode, default_object, table_row, validate_create, validate_update};

    fn deployment() -> Value {
        json!({"metadata": {"name": "web", "namespace": "n"}, "spec": {"selector": {"matchLabels": {"app": "web"}},
            "template": {"metadata": {"labels": {"app": "web"}}, "spec": {"containers": [{"name": "c", "image": "i:1"}]}}}})
    }

    #[test]
    fn deployments_get_the_defaults_of_kubernetes() {
        let info = Registry::built_in().lookup("apps", "v1", "deployments").unwrap();
        let mut object = deployment();
        default_object(&info, &mut object);
        let spec = &object["spec"];
        assert_eq!((&spec["replicas"], &spec["revisionHistoryLimit"]), (&json!(1), &json!(10)));
        assert_eq!(spec["progressDeadlineSeconds"], json!(600));
        assert_eq!(
            spec["strategy"],
            json!({"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": "25%", "maxSurge": "25%"}})
        );
        assert_eq!(spec["template"]["spec"]["restartPolicy"], json!("Always"));
        assert_eq!(validate_create(&info, &object), []);
        let again = object.clone();
        default_object(&info, &mut object);
        assert_eq!(object, again, "defaults change nothing the second time");
        object["status"] = json!({"readyReplicas": 1, "updatedReplicas": 2, "availableReplicas": 1});
        let row = table_row(&info, &object, Timestamp::now());
        assert_eq!(row[1..4], [json!("1/1"), json!(2), json!(1)]);
        assert_eq!(row[5..], [json!("c"), json!("i:1"), json!("app=web")]);
    }

    #[test]
    fn bad_workloads_are_named() {
        for (plural, path, value, expected) in [
            (
                "deployments",
                "/spec/replicas",
                json!(-1),
                "spec.replicas: Invalid value: -1: must be greater than or equal to 0",
            ),
            (
                "replicasets",
                "/spec/selector/matchLabels/app",
                json!("other"),
                "spec.template.metadata.labels: Invalid value: {\"app\":\"web\"}: `selector` does not match template `labels`",
            ),
            ("replicasets", "/spec/selector", Value::Null, "spec.selector: Required value"),
            (
                "deployments",
                "/spec/template/spec/containers",
                json!([]),
                "spec.template.spec.containers: Required value",
            ),
            (
                "deployments",
                "/spec/template/spec/containers/0/image",
                json!(""),
                "spec.template.spec.containers[0].image: Required value",
            ),
            (
                "deployments",
                "/spec/template/spec/restartPolicy",
                json!("Never"),
                "spec.template.spec.restartPolicy: Unsupported value: \"Never\": supported values: \"Always\"",
            ),
            (
                "deployments",
                "/spec/strategy/type",
                json!("Big"),
                "spec.strategy.type: Unsupported value: \"Big\": supported values: \"Recreate\", \"RollingUpdate\"",
            ),
            (
                "deployments",
                "/spec/strategy/rollingUpdate",
                json!({"maxSurge": 0, "maxUnavailable": "0%"}),
                "spec.strategy.rollingUpdate.maxUnavailable: Invalid value: \"0%\": may not be 0 when `maxSurge` is 0",
            ),
        ] {
            let info = Registry::built_in().lookup("apps", "v1", plural).unwrap();
            let mut object = deployment();
            default_object(&info, &mut object);
            *object.pointer_mut(path).unwrap() = value;
            let found: Vec<_> = validate_create(&info, &object).iter().map(ToString::to_string).collect();
            assert!(found.iter().any(|f| f == expected), "{expected}: {found:?}");
        }
    }

    #[test]
    fn a_selector_is_for_good() {
        let info = Registry::built_in().lookup("apps", "v1", "deployments").unwrap();
        let mut old = deployment();
        default_object(&info, &mut old);
        let mut new = old.clone();
        new["spec"]["selector"]["matchLabels"]["app"] = json!("b");
        new["spec"]["template"]["metadata"]["labels"]["app"] = json!("b");
        let found = validate_update(&info, &old, &new);
        assert_eq!(found.len(), 1, "{found:?}");
        assert_eq!(
            found[0].to_string(),
            "spec.selector: Invalid value: {\"matchLabels\":{\"app\":\"b\"}}: field is immutable"
        );
        assert!(decode(&info, json!({"spec": {"replicas": "x"}})).is_err());
    }
}
