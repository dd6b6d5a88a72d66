//! Pod templates of Deployments and ReplicaSets: when two are the same, and the hash that names a ReplicaSet.

use k8s_openapi::api::core::v1::PodTemplateSpec;
use serde_json::Value;

/// Label that ties a ReplicaSet's pods to their template.
pub(crate) const HASH_LABEL: &str = "pod-template-hash";
/// Letters that spell no words, as Kubernetes uses for generated names.
const LETTERS: &[u8; 27] = b"bcdfghjklmnpqrstvwxz2456789";

/// Whether both make the same pods; the hash label doesn't count.
pub(crate) fn same(one: &PodTemplateSpec, other: &PodTemplateSpec) -> bool {
    canonical(one) == canonical(other)
}

/// A short name for the template. `collisions` makes another one where the name is taken by other content.
pub(crate) fn hash(template: &PodTemplateSpec, collisions: i32) -> String {
    let mut text = canonical(template).to_string();
    text.push_str(&collisions.to_string());
    // FNV-1a, 64 bits: no defence against an attacker is needed, a collision is found and counted.
    let mut state = 0xcbf2_9ce4_8422_2325_u64;
    for byte in text.bytes() {
        state = (state ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    }
    let mut name = String::new();
    for _ in 0..10 {
        let at = usize::try_from(state % 27).unwrap_or(0);
        name.push(char::from(LETTERS[at]));
        state /= 27;
    }
    name
}

/// The template as JSON with sorted keys and without what means nothing: nulls, empty maps and lists.
fn canonical(template: &PodTemplateSpec) -> Value {
    let mut template = template.clone();
    if let Some(meta) = &mut template.metadata {
        meta.creation_timestamp = None;
        if let Some(labels) = &mut meta.labels {
            labels.remove(HASH_LABEL);
        }
    }
    strip(serde_json::to_value(&template).unwrap_or(Value::Null)).unwrap_or(Value::Null)
}

fn strip(value: Value) -> Option<Value> {
    match value {
        Value::Null => None,
        Value::Object(map) => {
            let mut entries: Vec<_> =
                map.into_iter().filter_map(|(key, value)| strip(value).map(|value| (key, value))).collect();
            entries.sort_by(|a, b| a.0.cmp(&b.0));
            (!entries.is_empty()).then(|| Value::Object(entries.into_iter().collect()))
        }
        Value::Array(items) => {
            // An empty item keeps its place: lists are positional.
            let items: Vec<_> = items
                .into_iter()
                .map(|item| strip(item).unwrap_or_else(|| Value::Object(Default::default())))
                .collect();
            (!items.is_empty()).then_some(Value::Array(items))
        }
        other => Some(other),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn template(image: &str, labels: Value) -> PodTemplateSpec {
        let value = json!({"metadata": {"labels": labels}, "spec": {"containers": [{"name": "c", "image": image}]}});
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn the_hash_label_and_empty_values_make_no_difference() {
        let plain = template("a:1", json!({"app": "web"}));
        let mut labelled = template("a:1", json!({"app": "web", HASH_LABEL: "x"}));
        labelled.metadata.as_mut().unwrap().annotations = Some(Default::default());
        assert!(same(&plain, &labelled));
        assert_eq!(hash(&plain, 0), hash(&labelled, 0));
    }

    #[test]
    fn another_image_or_a_collision_gives_another_name() {
        let one = template("a:1", json!({"app": "web"}));
        let two = template("a:2", json!({"app": "web"}));
        assert!(!same(&one, &two));
        assert_ne!(hash(&one, 0), hash(&two, 0));
        assert_ne!(hash(&one, 0), hash(&one, 1));
        assert_eq!(hash(&one, 0).len(), 10);
    }
}
