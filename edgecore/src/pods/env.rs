//! The environment of a container, and its command and arguments with references replaced.

use std::collections::BTreeMap;

use k8s_openapi::{
    ByteString,
    api::core::v1::{ConfigMapKeySelector, Container, EnvVar, SecretKeySelector},
};

use super::{
    expansion::expand,
    inputs::{InputError, Inputs, OwnFields},
};

/// A container's variables in the order in which they are defined; a name that is set twice has its last value.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Environment {
    order: Vec<String>,
    values: BTreeMap<String, String>,
}

impl Environment {
    /// The environment of a container (Kubernetes, "Define Environment Variables for a Container").
    pub(crate) fn build(container: &Container, inputs: &Inputs, own: &OwnFields<'_>) -> Result<Self, InputError> {
        let mut environment = Self::default();
        for from in container.env_from.iter().flatten() {
            let prefix = from.prefix.as_deref().unwrap_or_default();
            if let Some(reference) = &from.config_map_ref {
                match inputs.config_maps.get(&reference.name) {
                    Some(map) => {
                        for (key, value) in map.data.iter().flatten() {
                            environment.set_if_valid(format!("{prefix}{key}"), value.clone());
                        }
                    }
                    None if reference.optional == Some(true) => {}
                    None => return Err(missing("configmap", &reference.name)),
                }
            }
            if let Some(reference) = &from.secret_ref {
                match inputs.secrets.get(&reference.name) {
                    Some(secret) => {
                        for (key, value) in secret.data.iter().flatten() {
                            let text = text("secret", &reference.name, key, value)?;
                            environment.set_if_valid(format!("{prefix}{key}"), text);
                        }
                    }
                    None if reference.optional == Some(true) => {}
                    None => return Err(missing("secret", &reference.name)),
                }
            }
        }
        for variable in container.env.iter().flatten() {
            if let Some(value) = environment.value_of(variable, container, inputs, own)? {
                environment.set(variable.name.clone(), value);
            }
        }
        Ok(environment)
    }

    /// The value of a variable.
    pub(crate) fn get(&self, name: &str) -> Option<&str> {
        self.values.get(name).map(String::as_str)
    }

    /// The variables in order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.order.iter().filter_map(|name| Some((name.as_str(), self.get(name)?)))
    }

    /// Words of a command with `$(NAME)` replaced.
    pub(crate) fn expand_all(&self, words: Option<&Vec<String>>) -> Vec<String> {
        words.into_iter().flatten().map(|word| expand(word, |name| self.get(name))).collect()
    }

    fn set(&mut self, name: String, value: String) {
        if self.values.insert(name.clone(), value).is_none() {
            self.order.push(name);
        }
    }

    /// Keys of whole objects that can't be variable names are left out, as the API says.
    fn set_if_valid(&mut self, name: String, value: String) {
        if !name.is_empty() && !name.contains(['=', '\0']) && !name.starts_with(|c: char| c.is_ascii_digit()) {
            self.set(name, value);
        }
    }

    fn value_of(
        &self,
        variable: &EnvVar,
        container: &Container,
        inputs: &Inputs,
        own: &OwnFields<'_>,
    ) -> Result<Option<String>, InputError> {
        let Some(source) = &variable.value_from else {
            let text = variable.value.as_deref().unwrap_or_default();
            return Ok(Some(expand(text, |name| self.get(name))));
        };
        if let Some(field) = &source.field_ref {
            own.field(&field.field_path).map(Some)
        } else if let Some(resource) = &source.resource_field_ref {
            own.resource(resource, Some(container)).map(Some)
        } else if let Some(key) = &source.config_map_key_ref {
            config_map_key(key, inputs)
        } else if let Some(key) = &source.secret_key_ref {
            secret_key(key, inputs)
        } else {
            Ok(Some(String::new()))
        }
    }
}

fn config_map_key(selector: &ConfigMapKeySelector, inputs: &Inputs) -> Result<Option<String>, InputError> {
    let optional = selector.optional == Some(true);
    let Some(map) = inputs.config_maps.get(&selector.name) else {
        return if optional { Ok(None) } else { Err(missing("configmap", &selector.name)) };
    };
    match map.data.as_ref().and_then(|data| data.get(&selector.key)) {
        Some(value) => Ok(Some(value.clone())),
        None if optional => Ok(None),
        None => Err(missing_key("ConfigMap", inputs, &selector.name, &selector.key)),
    }
}

fn secret_key(selector: &SecretKeySelector, inputs: &Inputs) -> Result<Option<String>, InputError> {
    let optional = selector.optional == Some(true);
    let Some(secret) = inputs.secrets.get(&selector.name) else {
        return if optional { Ok(None) } else { Err(missing("secret", &selector.name)) };
    };
    match secret.data.as_ref().and_then(|data| data.get(&selector.key)) {
        Some(value) => text("secret", &selector.name, &selector.key, value).map(Some),
        None if optional => Ok(None),
        None => Err(missing_key("Secret", inputs, &selector.name, &selector.key)),
    }
}

fn text(kind: &'static str, name: &str, key: &str, value: &ByteString) -> Result<String, InputError> {
    String::from_utf8(value.0.clone()).map_err(|_| InputError::NotText {
        kind,
        name: name.to_owned(),
        key: key.to_owned(),
    })
}

fn missing(kind: &'static str, name: &str) -> InputError {
    InputError::MissingObject { kind, name: name.to_owned() }
}

fn missing_key(kind: &'static str, inputs: &Inputs, name: &str, key: &str) -> InputError {
    InputError::MissingKey { kind, namespace: inputs.namespace.clone(), name: name.to_owned(), key: key.to_owned() }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::{ConfigMap, Pod, Secret};
    use serde_json::json;

    use super::{super::resources::Machine, *};

    fn inputs() -> Inputs {
        let map: ConfigMap =
            serde_json::from_value(json!({"data": {"color": "blue", "1st": "no", "mode": "fast"}})).unwrap();
        let secret: Secret =
            serde_json::from_value(json!({"data": {"password": "aHVudGVyMg==", "raw": "/w=="}})).unwrap();
        Inputs {
            namespace: "shop".to_owned(),
            config_maps: BTreeMap::from([("cm".to_owned(), map)]),
            secrets: BTreeMap::from([("s".to_owned(), secret)]),
        }
    }

    fn build(container: serde_json::Value) -> Result<Vec<String>, String> {
        let pod: Pod = serde_json::from_value(json!({
            "metadata": {"name": "web", "namespace": "shop"}, "spec": {"nodeName": "edge-1", "containers": [container]}
        }))
        .unwrap();
        let machine = Machine { memory_bytes: 1, cpus: 1, lowest_oom_score_adj: 0 };
        let own = OwnFields { pod: &pod, pod_ips: &[], host_ips: &[], machine };
        let container = &pod.spec.as_ref().unwrap().containers[0];
        let environment = Environment::build(container, &inputs(), &own).map_err(|e| e.to_string())?;
        Ok(environment.iter().map(|(name, value)| format!("{name}={value}")).collect())
    }

    #[test]
    fn variables_come_from_every_source_and_may_refer_to_earlier_ones() {
        let variables = build(json!({"name": "c",
        "envFrom": [{"configMapRef": {"name": "cm"}}, {"prefix": "P_", "configMapRef": {"name": "cm"}},
            {"secretRef": {"name": "gone", "optional": true}}],
        "env": [
            {"name": "NODE", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
            {"name": "URL", "value": "http://$(NODE)/$(color)?$$(NODE)=$(LATER)"},
            {"name": "LATER", "value": "x"},
            {"name": "color", "value": "red"},
            {"name": "PASSWORD", "valueFrom": {"secretKeyRef": {"name": "s", "key": "password"}}},
            {"name": "NOT_SET", "valueFrom": {"configMapKeyRef": {"name": "cm", "key": "none", "optional": true}}}
        ]}))
        .unwrap();
        assert_eq!(
            variables,
            [
                "color=red",
                "mode=fast",
                "P_1st=no",
                "P_color=blue",
                "P_mode=fast",
                "NODE=edge-1",
                "URL=http://edge-1/blue?$(NODE)=$(LATER)",
                "LATER=x",
                "PASSWORD=hunter2",
            ]
        );
    }

    #[test]
    fn what_is_missing_is_named() {
        let with = |source: serde_json::Value| {
            build(json!({"name": "c", "env": [{"name": "X", "valueFrom": source}]})).unwrap_err()
        };
        assert_eq!(with(json!({"configMapKeyRef": {"name": "no", "key": "k"}})), "configmap \"no\" not found");
        assert_eq!(with(json!({"secretKeyRef": {"name": "no", "key": "k"}})), "secret \"no\" not found");
        assert_eq!(
            with(json!({"configMapKeyRef": {"name": "cm", "key": "k"}})),
            "couldn't find key k in ConfigMap shop/cm"
        );
        assert!(with(json!({"secretKeyRef": {"name": "s", "key": "raw"}})).contains("not text"));
        let from = build(json!({"name": "c", "envFrom": [{"secretRef": {"name": "no"}}]})).unwrap_err();
        assert_eq!(from, "secret \"no\" not found");
    }
}
