//! The files of a volume that is made from objects: configMap, secret, downwardAPI and projected.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{ConfigMap, DownwardAPIVolumeFile, KeyToPath, ProjectedVolumeSource, Secret, Volume};

use super::VolumeError;
use crate::pods::inputs::{InputError, Inputs, OwnFields};

/// Permissions of files when nothing else is said (Kubernetes, "defaultMode").
const DEFAULT_MODE: i32 = 0o644;

/// One file of a volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PayloadFile {
    pub(crate) data: Vec<u8>,
    pub(crate) mode: u32,
}

/// All files of a volume by their relative path.
pub(crate) type Payload = BTreeMap<String, PayloadFile>;

/// The files of a volume; `None` if it is no such volume.
pub(crate) fn payload(volume: &Volume, inputs: &Inputs, own: &OwnFields<'_>) -> Result<Option<Payload>, VolumeError> {
    let mut files = Payload::new();
    if let Some(source) = &volume.config_map {
        let mode = source.default_mode.unwrap_or(DEFAULT_MODE);
        let from = From { name: &source.name, items: source.items.as_ref(), optional: source.optional, mode };
        config_map(&mut files, &from, inputs)?;
    } else if let Some(source) = &volume.secret {
        let mode = source.default_mode.unwrap_or(DEFAULT_MODE);
        let name = source.secret_name.as_deref().unwrap_or_default();
        secret(&mut files, &From { name, items: source.items.as_ref(), optional: source.optional, mode }, inputs)?;
    } else if let Some(source) = &volume.downward_api {
        let mode = source.default_mode.unwrap_or(DEFAULT_MODE);
        downward_api(&mut files, source.items.as_ref(), mode, own)?;
    } else if let Some(source) = &volume.projected {
        projected(&mut files, source, inputs, own)?;
    } else {
        return Ok(None);
    }
    Ok(Some(files))
}

/// An object, or some of its keys, as files.
struct From<'a> {
    name: &'a str,
    items: Option<&'a Vec<KeyToPath>>,
    optional: Option<bool>,
    mode: i32,
}

fn projected(
    files: &mut Payload,
    source: &ProjectedVolumeSource,
    inputs: &Inputs,
    own: &OwnFields<'_>,
) -> Result<(), VolumeError> {
    let mode = source.default_mode.unwrap_or(DEFAULT_MODE);
    for part in source.sources.iter().flatten() {
        if let Some(map) = &part.config_map {
            let from = From { name: &map.name, items: map.items.as_ref(), optional: map.optional, mode };
            config_map(files, &from, inputs)?;
        }
        if let Some(part) = &part.secret {
            let from = From { name: &part.name, items: part.items.as_ref(), optional: part.optional, mode };
            secret(files, &from, inputs)?;
        }
        if let Some(part) = &part.downward_api {
            downward_api(files, part.items.as_ref(), mode, own)?;
        }
        // serviceAccountToken: the link doesn't carry tokens yet; the pod runs without one (docs/pods.md).
    }
    Ok(())
}

fn config_map(files: &mut Payload, from: &From<'_>, inputs: &Inputs) -> Result<(), VolumeError> {
    let Some(map) = inputs.config_maps.get(from.name) else { return absent(from, "configmap") };
    add(files, from, "ConfigMap", &inputs.namespace, config_map_data(map))
}

fn secret(files: &mut Payload, from: &From<'_>, inputs: &Inputs) -> Result<(), VolumeError> {
    let Some(secret) = inputs.secrets.get(from.name) else { return absent(from, "secret") };
    add(files, from, "Secret", &inputs.namespace, secret_data(secret))
}

fn absent(from: &From<'_>, kind: &'static str) -> Result<(), VolumeError> {
    if from.optional == Some(true) {
        return Ok(());
    }
    Err(InputError::MissingObject { kind, name: from.name.to_owned() }.into())
}

fn config_map_data(map: &ConfigMap) -> BTreeMap<&str, &[u8]> {
    let text = map.data.iter().flatten().map(|(key, value)| (key.as_str(), value.as_bytes()));
    let binary = map.binary_data.iter().flatten().map(|(key, value)| (key.as_str(), value.0.as_slice()));
    text.chain(binary).collect()
}

fn secret_data(secret: &Secret) -> BTreeMap<&str, &[u8]> {
    secret.data.iter().flatten().map(|(key, value)| (key.as_str(), value.0.as_slice())).collect()
}

fn add(
    files: &mut Payload,
    from: &From<'_>,
    kind: &'static str,
    namespace: &str,
    data: BTreeMap<&str, &[u8]>,
) -> Result<(), VolumeError> {
    let Some(items) = from.items.filter(|items| !items.is_empty()) else {
        for (key, value) in data {
            insert(files, key, value, from.mode)?;
        }
        return Ok(());
    };
    for item in items {
        match data.get(item.key.as_str()) {
            Some(value) => insert(files, &item.path, value, item.mode.unwrap_or(from.mode))?,
            None if from.optional == Some(true) => {}
            None => {
                return Err(InputError::MissingKey {
                    kind,
                    namespace: namespace.to_owned(),
                    name: from.name.to_owned(),
                    key: item.key.clone(),
                }
                .into());
            }
        }
    }
    Ok(())
}

fn downward_api(
    files: &mut Payload,
    items: Option<&Vec<DownwardAPIVolumeFile>>,
    mode: i32,
    own: &OwnFields<'_>,
) -> Result<(), VolumeError> {
    for item in items.into_iter().flatten() {
        let text = if let Some(field) = &item.field_ref {
            own.field(&field.field_path)?
        } else if let Some(resource) = &item.resource_field_ref {
            own.resource(resource, None)?
        } else {
            continue;
        };
        insert(files, &item.path, text.as_bytes(), item.mode.unwrap_or(mode))?;
    }
    Ok(())
}

/// Paths come from outside: they stay inside of the volume, and clear of the names that the atomic swap uses.
fn insert(files: &mut Payload, path: &str, data: &[u8], mode: i32) -> Result<(), VolumeError> {
    let good = !path.is_empty()
        && path.len() <= 4096
        && !path.starts_with("..")
        && path.split('/').all(|part| !part.is_empty() && part != "." && part != ".." && !part.contains('\0'));
    if !good {
        return Err(VolumeError::Path(path.to_owned()));
    }
    let mode = u32::try_from(mode).unwrap_or(0o644) & 0o7777;
    files.insert(path.to_owned(), PayloadFile { data: data.to_vec(), mode });
    Ok(())
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::Pod;
    use serde_json::json;

    use super::*;
    use crate::pods::resources::Machine;

    fn files(volume: serde_json::Value) -> Result<Vec<String>, String> {
        let mut volume = volume;
        volume["name"] = json!("v");
        let volume: Volume = serde_json::from_value(volume).unwrap();
        let pod: Pod = serde_json::from_value(json!({"metadata": {"name": "web", "labels": {"a": "b"}}})).unwrap();
        let inputs = Inputs {
            namespace: "shop".to_owned(),
            config_maps: BTreeMap::from([(
                "cm".to_owned(),
                serde_json::from_value(json!({"data": {"a": "1", "b": "2"}, "binaryData": {"c": "/w=="}})).unwrap(),
            )]),
            secrets: BTreeMap::from([(
                "s".to_owned(),
                serde_json::from_value(json!({"data": {"key": "aGk="}})).unwrap(),
            )]),
        };
        let machine = Machine { memory_bytes: 1, cpus: 1, lowest_oom_score_adj: 0 };
        let own = OwnFields { pod: &pod, pod_ips: &[], host_ips: &[], machine };
        let files = payload(&volume, &inputs, &own).map_err(|e| e.to_string())?.expect("no such volume");
        Ok(files
            .iter()
            .map(|(path, file)| format!("{path} {:o} {}", file.mode, String::from_utf8_lossy(&file.data)))
            .collect())
    }

    #[test]
    fn keys_become_files_with_their_modes() {
        assert_eq!(files(json!({"configMap": {"name": "cm"}})).unwrap(), ["a 644 1", "b 644 2", "c 644 \u{fffd}"]);
        let items = json!({"configMap": {"name": "cm", "defaultMode": 0o600, "items":
            [{"key": "a", "path": "x/y"}, {"key": "b", "path": "z", "mode": 0o755}]}});
        assert_eq!(files(items).unwrap(), ["x/y 600 1", "z 755 2"]);
        assert_eq!(files(json!({"secret": {"secretName": "s"}})).unwrap(), ["key 644 hi"]);
    }

    #[test]
    fn projected_volumes_join_their_sources() {
        let volume = json!({"projected": {"sources": [
            {"configMap": {"name": "cm", "items": [{"key": "a", "path": "a"}]}},
            {"secret": {"name": "s"}},
            {"downwardAPI": {"items": [{"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}}]}},
            {"configMap": {"name": "gone", "optional": true}},
            {"serviceAccountToken": {"path": "token"}}
        ]}});
        assert_eq!(files(volume).unwrap(), ["a 644 1", "key 644 hi", "labels 644 a=\"b\""]);
    }

    #[test]
    fn missing_and_escaping_things_are_refused() {
        assert_eq!(files(json!({"configMap": {"name": "no"}})).unwrap_err(), "configmap \"no\" not found");
        assert_eq!(files(json!({"configMap": {"name": "no", "optional": true}})).unwrap(), Vec::<String>::new());
        let key = json!({"secret": {"secretName": "s", "items": [{"key": "k", "path": "p"}]}});
        assert_eq!(files(key).unwrap_err(), "couldn't find key k in Secret shop/s");
        for path in ["../x", "a/../../x", "/x", "..data", "a//b", ""] {
            let volume = json!({"configMap": {"name": "cm", "items": [{"key": "a", "path": path}]}});
            assert!(files(volume).unwrap_err().contains("path"), "{path}");
        }
    }
}
