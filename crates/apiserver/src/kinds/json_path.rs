//! The JSONPath of printer columns: fields, indexes, `[*]` and `[?(@.type=="Ready")]` filters
//! (Kubernetes, "Additional printer columns").

use serde_json::Value;

#[derive(Debug, Clone, PartialEq)]
enum Step {
    Field(Box<str>),
    Index(i64),
    All,
    Filter { path: Box<[Step]>, equal: bool, value: Value },
}

/// A parsed path.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct JsonPath(Box<[Step]>);

impl JsonPath {
    /// Parses a path such as `.status.conditions[?(@.type=="Ready")].status`; nothing if it isn't one.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let text = text.trim();
        let text = text.strip_prefix('{').and_then(|t| t.strip_suffix('}')).unwrap_or(text);
        steps(text.strip_prefix(['$', '@']).unwrap_or(text)).map(Self)
    }

    /// The first value at the path.
    pub(crate) fn first<'a>(&self, value: &'a Value) -> Option<&'a Value> {
        find(&self.0, value)
    }
}

fn steps(mut rest: &str) -> Option<Box<[Step]>> {
    let mut steps = Vec::new();
    while !rest.is_empty() {
        if let Some(after) = rest.strip_prefix('.') {
            let (name, tail) = field(after);
            match name.as_str() {
                "*" => steps.push(Step::All),
                "" if tail.starts_with('[') || (tail.is_empty() && steps.is_empty()) => {}
                "" => return None,
                _ => steps.push(Step::Field(name.into())),
            }
            rest = tail;
        } else if let Some(after) = rest.strip_prefix("[?(") {
            let end = after.find(")]")?;
            steps.push(filter(&after[..end])?);
            rest = &after[end + 2..];
        } else if let Some(after) = rest.strip_prefix('[') {
            let end = after.find(']')?;
            let inner = after[..end].trim();
            let quoted = ['\'', '"'].iter().find_map(|q| inner.strip_prefix(*q)?.strip_suffix(*q));
            steps.push(match quoted {
                Some(name) => Step::Field(name.into()),
                None if inner == "*" => Step::All,
                None => Step::Index(inner.parse().ok()?),
            });
            rest = &after[end + 1..];
        } else if steps.is_empty() {
            // kubectl takes a path without its leading dot.
            let (name, tail) = field(rest);
            steps.push(Step::Field(name.into()));
            rest = tail;
        } else {
            return None;
        }
    }
    Some(steps.into())
}

/// A field's name up to the next step; `\.` is a dot in it.
fn field(text: &str) -> (String, &str) {
    let mut name = String::new();
    let mut chars = text.char_indices();
    while let Some((i, c)) = chars.next() {
        match c {
            '\\' => name.extend(chars.next().map(|(_, c)| c)),
            '.' | '[' => return (name, &text[i..]),
            _ => name.push(c),
        }
    }
    (name, "")
}

fn filter(text: &str) -> Option<Step> {
    let (at, equal) = match (text.find("=="), text.find("!=")) {
        (Some(at), _) => (at, true),
        (None, Some(at)) => (at, false),
        (None, None) => return None,
    };
    let literal = text[at + 2..].trim();
    let quoted = literal.strip_prefix('\'').and_then(|l| l.strip_suffix('\''));
    let value = match quoted {
        Some(text) => Value::String(text.to_owned()),
        None => serde_json::from_str(literal).ok()?,
    };
    Some(Step::Filter { path: steps(text[..at].trim().strip_prefix('@')?)?, equal, value })
}

fn find<'a>(steps: &[Step], value: &'a Value) -> Option<&'a Value> {
    let Some((step, rest)) = steps.split_first() else { return Some(value) };
    match step {
        Step::Field(name) => find(rest, value.get(name.as_ref())?),
        Step::Index(index) => {
            let items = value.as_array()?;
            let length = i64::try_from(items.len()).ok()?;
            let index = if *index < 0 { length + index } else { *index };
            find(rest, items.get(usize::try_from(index).ok()?)?)
        }
        Step::All => match value {
            Value::Array(items) => items.iter().find_map(|item| find(rest, item)),
            Value::Object(map) => map.values().find_map(|item| find(rest, item)),
            _ => None,
        },
        Step::Filter { path, equal, value: wanted } => value
            .as_array()?
            .iter()
            .filter(|item| (find(path, item) == Some(wanted)) == *equal)
            .find_map(|item| find(rest, item)),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn paths_of_printer_columns_are_followed() {
        let object = json!({"spec": {"hosts": ["a", "b"], "n": 3}, "metadata": {"annotations": {"a.b/c": "x"}},
            "status": {"conditions": [{"type": "Accepted", "status": "False"}, {"type": "Ready", "status": "True"}]}});
        for (path, expected) in [
            (".spec.n", Some(json!(3))),
            ("spec.n", Some(json!(3))),
            ("{.spec.n}", Some(json!(3))),
            (".spec.hosts[1]", Some(json!("b"))),
            (".spec.hosts[-1]", Some(json!("b"))),
            (".spec.hosts[*]", Some(json!("a"))),
            (".status.conditions[?(@.type==\"Ready\")].status", Some(json!("True"))),
            (".status.conditions[?(@.type=='Ready')].status", Some(json!("True"))),
            (".status.conditions[?(@.type!=\"Accepted\")].type", Some(json!("Ready"))),
            (r".metadata.annotations.a\.b/c", Some(json!("x"))),
            (".metadata.annotations['a.b/c']", Some(json!("x"))),
            (".spec.missing.deep", None),
            (".spec.hosts[7]", None),
        ] {
            assert_eq!(JsonPath::parse(path).unwrap().first(&object), expected.as_ref(), "{path}");
        }
        for bad in [".spec[", ".a[?(x)]", ".a[b]"] {
            assert_eq!(JsonPath::parse(bad), None, "{bad}");
        }
    }
}
