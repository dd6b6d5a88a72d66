//! Strategic merge: maps merge, lists that have a merge key merge by it, and directives say the rest
//! (Kubernetes, "Strategic merge patch").

use serde_json::{Map, Value};

const PATCH: &str = "$patch";
const RETAIN_KEYS: &str = "$retainKeys";
const DELETE_PRIMITIVES: &str = "$deleteFromPrimitiveList/";
const ELEMENT_ORDER: &str = "$setElementOrder/";

/// Says by which key the list at a dotted path merges: `Some("")` for sets of plain values, `None` for lists that are
/// replaced.
type Keys<'a> = dyn Fn(&str) -> Option<&'static str> + 'a;

/// Merges `patch` into `target`.
pub(super) fn merge(target: &mut Value, patch: &Value, keys: &Keys<'_>) -> Result<(), String> {
    match patch {
        Value::Object(patch) => merge_maps(target, patch, "", keys),
        _ => Err("the patch must be a JSON object".to_owned()),
    }
}

fn merge_maps(target: &mut Value, patch: &Map<String, Value>, path: &str, keys: &Keys<'_>) -> Result<(), String> {
    match patch.get(PATCH).map(|d| d.as_str().unwrap_or_default()) {
        None | Some("merge") => {}
        Some("replace") => {
            *target = without_directives(patch);
            return Ok(());
        }
        Some("delete") => {
            *target = Value::Object(Map::new());
            return Ok(());
        }
        Some(other) => return Err(format!("unknown patch type found: {other}")),
    }
    if !target.is_object() {
        *target = Value::Object(Map::new());
    }
    let Value::Object(target) = target else { return Ok(()) };
    if let Some(retain) = patch.get(RETAIN_KEYS) {
        let retain: Vec<&str> =
            retain.as_array().ok_or("$retainKeys must be a list")?.iter().filter_map(Value::as_str).collect();
        target.retain(|key, _| retain.contains(&key.as_str()));
    }
    for (name, value) in patch {
        if let Some(list) = name.strip_prefix(DELETE_PRIMITIVES) {
            let gone = value.as_array().ok_or_else(|| format!("{name} must be a list"))?;
            if let Some(items) = target.get_mut(list).and_then(Value::as_array_mut) {
                items.retain(|item| !gone.contains(item));
            }
        }
    }
    for (name, value) in patch {
        if name.starts_with('$') {
            continue;
        }
        let here = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
        match value {
            Value::Null => {
                target.shift_remove(name);
            }
            Value::Object(map) => {
                let deletes = map.get(PATCH).is_some_and(|d| d == "delete");
                if deletes {
                    target.shift_remove(name);
                } else {
                    merge_maps(target.entry(name).or_insert(Value::Null), map, &here, keys)?;
                }
            }
            Value::Array(items) => match keys(&here) {
                None => {
                    target.insert(name.clone(), strip_list(items));
                }
                Some("") => merge_sets(target.entry(name).or_insert(Value::Null), items),
                Some(key) => {
                    merge_lists(target.entry(name).or_insert(Value::Null), items, key, &here, keys)?;
                }
            },
            plain => {
                target.insert(name.clone(), plain.clone());
            }
        }
    }
    for (name, order) in patch {
        if let Some(list) = name.strip_prefix(ELEMENT_ORDER) {
            let here = if path.is_empty() { list.to_owned() } else { format!("{path}.{list}") };
            let order = order.as_array().ok_or_else(|| format!("{name} must be a list"))?;
            if let Some(items) = target.get_mut(list).and_then(Value::as_array_mut) {
                reorder(items, order, keys(&here).unwrap_or_default());
            }
        }
    }
    Ok(())
}

fn merge_sets(target: &mut Value, items: &[Value]) {
    if !target.is_array() {
        *target = Value::Array(Vec::new());
    }
    if let Some(list) = target.as_array_mut() {
        for item in items {
            if !list.contains(item) {
                list.push(item.clone());
            }
        }
    }
}

fn merge_lists(target: &mut Value, items: &[Value], key: &str, path: &str, keys: &Keys<'_>) -> Result<(), String> {
    let replaces = items.iter().any(|i| i.get(PATCH).is_some_and(|d| d == "replace") && i.get(key).is_none());
    if replaces || !target.is_array() {
        *target = Value::Array(Vec::new());
    }
    let Some(list) = target.as_array_mut() else { return Ok(()) };
    for item in items {
        let Value::Object(item) = item else {
            return Err(format!("{path}: items of a list that merges by {key} must be objects"));
        };
        let Some(id) = item.get(key) else {
            if item.get(PATCH).is_some_and(|d| d == "replace") && item.len() == 1 {
                continue;
            }
            return Err(format!("map: {} does not contain declared merge key: {key}", Value::Object(item.clone())));
        };
        let found = list.iter().position(|existing| existing.get(key) == Some(id));
        match (item.get(PATCH).and_then(Value::as_str), found) {
            (Some("delete"), _) => list.retain(|existing| existing.get(key) != Some(id)),
            (Some("replace"), Some(at)) => list[at] = without_directives(item),
            (_, Some(at)) => merge_maps(&mut list[at], item, path, keys)?,
            (_, None) => {
                let mut new = Value::Object(Map::new());
                merge_maps(&mut new, item, path, keys)?;
                list.push(new);
            }
        }
    }
    Ok(())
}

/// Puts the items that the order names in that order; the server's others keep their place relative to them.
fn reorder(items: &mut Vec<Value>, order: &[Value], key: &str) {
    let id = |item: &Value| if key.is_empty() { Some(item.clone()) } else { item.get(key).cloned() };
    let wanted: Vec<Value> = order.iter().filter_map(id).collect();
    let rank = |item: &Value| id(item).and_then(|i| wanted.iter().position(|w| *w == i));
    // An item that the order doesn't name stays behind the one that it followed.
    let mut last = None;
    let mut ranked: Vec<(Option<usize>, Value)> = items
        .drain(..)
        .map(|item| {
            if let Some(own) = rank(&item) {
                last = Some(own);
            }
            (last, item)
        })
        .collect();
    let (mut named, others): (Vec<_>, Vec<_>) = ranked.drain(..).partition(|(_, item)| rank(item).is_some());
    named.sort_by_key(|(own, _)| *own);
    for (after, item) in others {
        let at = match after {
            None => named.iter().position(|(_, i)| rank(i).is_some()).unwrap_or(named.len()),
            Some(after) => {
                named.iter().rposition(|(own, _)| *own == Some(after)).map_or(named.len(), |index| index + 1)
            }
        };
        named.insert(at, (after, item));
    }
    items.extend(named.into_iter().map(|(_, item)| item));
}

fn without_directives(map: &Map<String, Value>) -> Value {
    let kept = map.iter().filter(|(name, value)| !name.starts_with('$') && !value.is_null());
    Value::Object(kept.map(|(name, value)| (name.clone(), strip(value))).collect())
}

fn strip(value: &Value) -> Value {
    match value {
        Value::Object(map) => without_directives(map),
        Value::Array(items) => strip_list(items),
        plain => plain.clone(),
    }
}

fn strip_list(items: &[Value]) -> Value {
    let only_directive = |item: &Value| item.as_object().is_some_and(|m| m.len() == 1 && m.contains_key(PATCH));
    Value::Array(items.iter().filter(|i| !only_directive(i)).map(strip).collect())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn keys(path: &str) -> Option<&'static str> {
        match path {
            "spec.containers" | "spec.containers.env" => Some("name"),
            "metadata.finalizers" => Some(""),
            _ => None,
        }
    }

    fn merged(mut target: Value, patch: Value) -> Value {
        merge(&mut target, &patch, &keys).unwrap();
        target
    }

    #[test]
    fn lists_with_a_key_merge_by_it_and_others_are_replaced() {
        let target = json!({"spec": {"containers": [{"name": "a", "image": "1", "args": ["x"]}, {"name": "b"}]}});
        let patch = json!({"spec": {"containers": [{"name": "a", "image": "2", "args": ["y"]}, {"name": "c"}]}});
        assert_eq!(
            merged(target, patch),
            json!({"spec": {"containers": [{"name": "a", "image": "2", "args": ["y"]}, {"name": "b"}, {"name": "c"}]}})
        );
    }

    #[test]
    fn directives_delete_and_replace() {
        let target = json!({"spec": {"containers": [{"name": "a", "image": "1"}, {"name": "b"}], "x": {"k": 1}}});
        let patch =
            json!({"spec": {"containers": [{"name": "a", "$patch": "delete"}], "x": {"$patch": "replace", "n": 2}}});
        assert_eq!(merged(target, patch), json!({"spec": {"containers": [{"name": "b"}], "x": {"n": 2}}}));
        let target = json!({"spec": {"containers": [{"name": "a"}, {"name": "b"}]}});
        let patch = json!({"spec": {"containers": [{"$patch": "replace"}, {"name": "c"}]}});
        assert_eq!(merged(target, patch), json!({"spec": {"containers": [{"name": "c"}]}}));
    }

    #[test]
    fn retain_keys_drops_what_the_patch_does_not_keep() {
        let target = json!({"spec": {"strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1}}}});
        let patch = json!({"spec": {"strategy": {"$retainKeys": ["type"], "type": "Recreate"}}});
        assert_eq!(merged(target, patch), json!({"spec": {"strategy": {"type": "Recreate"}}}));
    }

    #[test]
    fn sets_of_plain_values_merge_and_lose_what_is_deleted_from_them() {
        let target = json!({"metadata": {"finalizers": ["a", "b"]}});
        let patch = json!({"metadata": {"finalizers": ["c"], "$deleteFromPrimitiveList/finalizers": ["a"]}});
        assert_eq!(merged(target, patch), json!({"metadata": {"finalizers": ["b", "c"]}}));
    }

    #[test]
    fn element_order_decides_the_order_and_keeps_the_servers_own_items() {
        let target = json!({"spec": {"containers": [{"name": "a"}, {"name": "own"}, {"name": "b"}]}});
        let patch = json!({"spec": {
            "$setElementOrder/containers": [{"name": "b"}, {"name": "new"}, {"name": "a"}],
            "containers": [{"name": "new", "image": "n"}]}});
        assert_eq!(
            merged(target, patch),
            json!({"spec": {"containers": [{"name": "b"}, {"name": "new", "image": "n"}, {"name": "a"}, {"name": "own"}]}})
        );
    }

    #[test]
    fn null_removes_a_member_and_nested_lists_merge() {
        let target =
            json!({"spec": {"containers": [{"name": "a", "env": [{"name": "X", "value": "1"}], "image": "i"}]}});
        let patch =
            json!({"spec": {"containers": [{"name": "a", "image": null, "env": [{"name": "Y", "value": "2"}]}]}});
        assert_eq!(
            merged(target, patch),
            json!({"spec": {"containers": [{"name": "a", "env": [{"name": "X", "value": "1"}, {"name": "Y", "value": "2"}]}]}})
        );
    }

    #[test]
    fn an_item_without_its_merge_key_is_refused() {
        let mut target = json!({"spec": {"containers": []}});
        assert!(merge(&mut target, &json!({"spec": {"containers": [{"image": "x"}]}}), &keys).is_err());
    }
}
