//! Label and field selectors (Kubernetes, "Labels and Selectors" and "Field Selectors").

use serde_json::Value;

use crate::{
    error::ApiError,
    fields,
    kinds::{self, KindInfo},
};

/// How long a selector may be, in bytes.
const MAX_SELECTOR: usize = 64 << 10;

/// What a list or a watch filters by.
#[derive(Debug, Clone, Default)]
pub(crate) struct Filter {
    namespace: Option<String>,
    labels: LabelSelector,
    fields: Vec<FieldRequirement>,
}

impl Filter {
    pub(crate) fn new(
        info: &KindInfo,
        namespace: Option<&str>,
        labels: Option<&str>,
        fields: Option<&str>,
    ) -> Result<Self, ApiError> {
        Ok(Self {
            namespace: namespace.filter(|n| !n.is_empty()).map(str::to_owned),
            labels: labels.map(LabelSelector::parse).transpose()?.unwrap_or_default(),
            fields: fields.map(|f| parse_fields(info, f)).transpose()?.unwrap_or_default(),
        })
    }

    /// The namespace that it is limited to.
    pub(crate) fn namespace(&self) -> Option<&str> {
        self.namespace.as_deref()
    }

    /// Whether every object of the namespace passes.
    pub(crate) fn is_everything(&self) -> bool {
        self.labels.0.is_empty() && self.fields.is_empty()
    }

    pub(crate) fn matches(&self, info: &KindInfo, namespace: &str, object: &Value) -> bool {
        self.namespace.as_deref().is_none_or(|n| n == namespace)
            && self.labels.matches(object)
            && self.fields.iter().all(|f| f.matches(info, object))
    }
}

#[derive(Debug, Clone)]
enum LabelTest {
    In(Vec<String>),
    NotIn(Vec<String>),
    Exists,
    Missing,
    Above(i64),
    Below(i64),
}

/// A parsed label selector; the empty one matches everything.
#[derive(Debug, Clone, Default)]
pub(crate) struct LabelSelector(Vec<(String, LabelTest)>);

impl LabelSelector {
    /// Parses the `labelSelector` query parameter: equality- and set-based requirements.
    pub(crate) fn parse(text: &str) -> Result<Self, ApiError> {
        let bad = |why: &str| ApiError::bad_request(format!("unable to parse requirement: {why} in {text:?}"));
        if text.len() > MAX_SELECTOR {
            return Err(ApiError::bad_request("the label selector is too long"));
        }
        let mut requirements = Vec::new();
        for part in split_outside_parentheses(text) {
            let part = part.trim();
            if part.is_empty() {
                continue;
            }
            let (key, test) = if let Some(key) = part.strip_prefix('!') {
                (key.trim(), LabelTest::Missing)
            } else if let Some((key, value)) = part.split_once("!=") {
                (key.trim(), LabelTest::NotIn(vec![value.trim().to_owned()]))
            } else if let Some((key, value)) = part.split_once("==").or_else(|| part.split_once('=')) {
                (key.trim(), LabelTest::In(vec![value.trim().to_owned()]))
            } else if let Some((key, value)) = part.split_once('>') {
                (key.trim(), LabelTest::Above(value.trim().parse().map_err(|_| bad("not a number"))?))
            } else if let Some((key, value)) = part.split_once('<') {
                (key.trim(), LabelTest::Below(value.trim().parse().map_err(|_| bad("not a number"))?))
            } else if let Some((head, set)) = part.split_once('(') {
                let set = set.strip_suffix(')').ok_or_else(|| bad("found no ')'"))?;
                let values = set.split(',').map(|v| v.trim().to_owned()).collect();
                match head.split_whitespace().collect::<Vec<_>>()[..] {
                    [key, "in"] => (key, LabelTest::In(values)),
                    [key, "notin"] => (key, LabelTest::NotIn(values)),
                    _ => return Err(bad("expected 'in' or 'notin'")),
                }
            } else {
                (part, LabelTest::Exists)
            };
            if key.is_empty() || key.contains(|c: char| c.is_whitespace() || "(),!=<>".contains(c)) {
                return Err(bad("found a malformed key"));
            }
            requirements.push((key.to_owned(), test));
        }
        Ok(Self(requirements))
    }

    pub(crate) fn matches(&self, object: &Value) -> bool {
        let labels = fields::at(object, &["metadata", "labels"]);
        self.0.iter().all(|(key, test)| {
            let value = labels.and_then(|l| l.get(key)).and_then(Value::as_str);
            match test {
                LabelTest::In(values) => value.is_some_and(|v| values.iter().any(|w| w == v)),
                LabelTest::NotIn(values) => !value.is_some_and(|v| values.iter().any(|w| w == v)),
                LabelTest::Exists => value.is_some(),
                LabelTest::Missing => value.is_none(),
                LabelTest::Above(n) => value.and_then(|v| v.parse::<i64>().ok()).is_some_and(|v| v > *n),
                LabelTest::Below(n) => value.and_then(|v| v.parse::<i64>().ok()).is_some_and(|v| v < *n),
            }
        })
    }
}

fn split_outside_parentheses(text: &str) -> impl Iterator<Item = &str> {
    let mut depth = 0_i32;
    text.split(move |c| {
        match c {
            '(' => depth += 1,
            ')' => depth -= 1,
            _ => {}
        }
        c == ',' && depth == 0
    })
}

#[derive(Debug, Clone)]
struct FieldRequirement {
    field: String,
    value: String,
    equal: bool,
}

impl FieldRequirement {
    fn matches(&self, info: &KindInfo, object: &Value) -> bool {
        (kinds::field_value(info, object, &self.field).unwrap_or_default() == self.value) == self.equal
    }
}

fn parse_fields(info: &KindInfo, text: &str) -> Result<Vec<FieldRequirement>, ApiError> {
    if text.len() > MAX_SELECTOR {
        return Err(ApiError::bad_request("the field selector is too long"));
    }
    let mut requirements = Vec::new();
    for part in text.split(',').filter(|p| !p.trim().is_empty()) {
        let (field, value, equal) = if let Some((field, value)) = part.split_once("!=") {
            (field, value, false)
        } else if let Some((field, value)) = part.split_once("==").or_else(|| part.split_once('=')) {
            (field, value, true)
        } else {
            return Err(ApiError::bad_request(format!(
                "Unable to find {:?} that match label selector \"\", field selector {text:?}: invalid selector: {part:?}; can't understand {part:?}",
                info.resource.to_string()
            )));
        };
        let (field, value) = (field.trim().to_owned(), value.trim().to_owned());
        if kinds::field_value(info, &Value::Null, &field).is_none() {
            return Err(ApiError::bad_request(format!("field label not supported: {field}")));
        }
        requirements.push(FieldRequirement { field, value, equal });
    }
    Ok(requirements)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn matches(selector: &str, labels: Value) -> bool {
        LabelSelector::parse(selector).unwrap().matches(&json!({"metadata": {"labels": labels}}))
    }

    #[test]
    fn label_selectors_understand_equality_sets_existence_and_order() {
        assert!(matches("app=web,tier!=db", json!({"app": "web"})));
        assert!(!matches("app==web,tier!=db", json!({"app": "web", "tier": "db"})));
        assert!(matches("app in (web, api),!legacy", json!({"app": "api"})));
        assert!(!matches("app in (web,api)", json!({"app": "x"})));
        assert!(matches("app notin (web,api)", json!({})));
        assert!(matches("app", json!({"app": ""})));
        assert!(matches("gen>3,gen<5", json!({"gen": "4"})));
        assert!(!matches("gen>3", json!({"gen": "x"})));
        assert!(matches("", json!({})));
    }

    #[test]
    fn malformed_label_selectors_are_refused() {
        for bad in ["a in (b", "a within (b)", "a>b", "=x", "a b"] {
            assert!(LabelSelector::parse(bad).is_err(), "{bad}");
        }
    }
}
