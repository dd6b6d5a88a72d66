//! Names, keys and label values: which are allowed (Kubernetes, "Object Names and IDs", apimachinery `validation`).
//!
//! Each check gives the complaint in Kubernetes' words, or nothing.

const LABEL_RULE: &str = "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and must start and end with an alphanumeric character (e.g. 'my-name',  or '123-abc', regex used for validation is '[a-z0-9]([-a-z0-9]*[a-z0-9])?')";
const SUBDOMAIN_RULE: &str = "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and must start and end with an alphanumeric character (e.g. 'example.com', regex used for validation is '[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')";
const LABEL_1035_RULE: &str = "a DNS-1035 label must consist of lower case alphanumeric characters or '-', start with an alphabetic character, and end with an alphanumeric character (e.g. 'my-name',  or 'abc-123', regex used for validation is '[a-z]([-a-z0-9]*[a-z0-9])?')";
const QUALIFIED_RULE: &str = "must consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric character (e.g. 'MyName',  or 'my.name',  or '123-abc', regex used for validation is '([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]')";
const VALUE_RULE: &str = "a valid label must be an empty string or consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric character (e.g. 'MyValue',  or 'my_value',  or '12345', regex used for validation is '(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?')";
const CONFIG_KEY_RULE: &str = "a valid config key must consist of alphanumeric characters, '-', '_' or '.' (e.g. 'key.name',  or 'KEY_NAME',  or 'key-name', regex used for validation is '[-._a-zA-Z0-9]+')";

fn is_lower_alphanumeric(c: u8) -> bool {
    c.is_ascii_lowercase() || c.is_ascii_digit()
}

fn is_dns_label(name: &str) -> bool {
    let b = name.as_bytes();
    let (Some(first), Some(last)) = (b.first(), b.last()) else { return false };
    is_lower_alphanumeric(*first)
        && is_lower_alphanumeric(*last)
        && b.iter().all(|c| is_lower_alphanumeric(*c) || *c == b'-')
}

fn too_long(name: &str, max: usize) -> Option<String> {
    (name.len() > max).then(|| format!("must be no more than {max} characters"))
}

/// RFC 1123 label: namespaces, containers, volumes.
pub(crate) fn dns_label(name: &str) -> Option<String> {
    too_long(name, 63).or_else(|| (!is_dns_label(name)).then(|| LABEL_RULE.to_owned()))
}

/// RFC 1123 subdomain: most objects.
pub(crate) fn dns_subdomain(name: &str) -> Option<String> {
    too_long(name, 253).or_else(|| (!name.split('.').all(is_dns_label)).then(|| SUBDOMAIN_RULE.to_owned()))
}

/// RFC 1035 label: Services, kinds' plural names.
pub(crate) fn dns_1035_label(name: &str) -> Option<String> {
    let good = is_dns_label(name) && name.as_bytes().first().is_some_and(u8::is_ascii_lowercase);
    too_long(name, 63).or_else(|| (!good).then(|| LABEL_1035_RULE.to_owned()))
}

fn is_name_part(name: &str) -> bool {
    let b = name.as_bytes();
    let (Some(first), Some(last)) = (b.first(), b.last()) else { return false };
    first.is_ascii_alphanumeric()
        && last.is_ascii_alphanumeric()
        && b.iter().all(|c| c.is_ascii_alphanumeric() || matches!(c, b'-' | b'_' | b'.'))
}

/// A key of a label or an annotation, a finalizer, a resource: `name` or `prefix/name`.
pub(crate) fn qualified_name(key: &str) -> Option<String> {
    let (prefix, name) = match key.split_once('/') {
        None => (None, key),
        Some((_, rest)) if rest.contains('/') => {
            return Some(format!(
                "a qualified name {QUALIFIED_RULE} with an optional DNS subdomain prefix and '/' (e.g. 'example.com/MyName')"
            ));
        }
        Some((prefix, name)) => (Some(prefix), name),
    };
    if let Some(prefix) = prefix {
        if prefix.is_empty() {
            return Some("prefix part must be non-empty".to_owned());
        }
        if let Some(problem) = dns_subdomain(prefix) {
            return Some(format!("prefix part {problem}"));
        }
    }
    if name.is_empty() {
        Some("name part must be non-empty".to_owned())
    } else if name.len() > 63 {
        Some("name part must be no more than 63 characters".to_owned())
    } else if is_name_part(name) {
        None
    } else {
        Some(format!("name part {QUALIFIED_RULE}"))
    }
}

/// A label's value.
pub(crate) fn label_value(value: &str) -> Option<String> {
    if value.is_empty() {
        return None;
    }
    too_long(value, 63).or_else(|| (!is_name_part(value)).then(|| VALUE_RULE.to_owned()))
}

/// A key in a ConfigMap or Secret.
pub(crate) fn config_key(key: &str) -> Option<String> {
    if key.is_empty() || !key.bytes().all(|c| c.is_ascii_alphanumeric() || matches!(c, b'-' | b'_' | b'.')) {
        return Some(CONFIG_KEY_RULE.to_owned());
    }
    if key == "." || key == ".." {
        return Some(format!("must not be '{key}'"));
    }
    if key.starts_with("..") {
        return Some("must not start with '..'".to_owned());
    }
    too_long(key, 253)
}

/// The name of an environment variable (relaxed validation, the default since Kubernetes 1.32).
pub(crate) fn environment_name(name: &str) -> Option<String> {
    (name.is_empty() || !name.bytes().all(|c| (0x20..0x7f).contains(&c) && c != b'=')).then(|| {
        "a valid environment variable name must consist only of printable ASCII characters other than '='".to_owned()
    })
}

/// The name of a container port (IANA service name).
pub(crate) fn port_name(name: &str) -> Option<String> {
    let b = name.as_bytes();
    let problem = if b.len() > 15 {
        "must be no more than 15 characters"
    } else if !b.iter().all(|c| is_lower_alphanumeric(*c) || *c == b'-') {
        "must contain only alpha-numeric characters (a-z, 0-9), and hyphens (-)"
    } else if !b.iter().any(u8::is_ascii_lowercase) {
        "must contain at least one letter (a-z)"
    } else if name.contains("--") {
        "must not contain consecutive hyphens"
    } else if b.first() == Some(&b'-') || b.last() == Some(&b'-') {
        "must not begin or end with a hyphen"
    } else {
        return None;
    };
    Some(problem.to_owned())
}

/// A port's number.
pub(crate) fn port_number(port: i64) -> Option<String> {
    (!(1..=65535).contains(&port)).then(|| "must be between 1 and 65535, inclusive".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_accepted_and_rejected_as_kubernetes_does() {
        for good in ["a", "a-b", "0a", &"a".repeat(63)] {
            assert_eq!(dns_label(good), None, "{good}");
        }
        for bad in ["", "-a", "a-", "A", "a.b", "a_b", &"a".repeat(64)] {
            assert!(dns_label(bad).is_some(), "{bad}");
        }
        assert_eq!(dns_subdomain("a.b-c.d"), None);
        assert!(dns_subdomain("a..b").is_some());
        assert!(dns_1035_label("0a").is_some());
        for good in ["app", "example.com/App_1", "a.b"] {
            assert_eq!(qualified_name(good), None, "{good}");
        }
        for bad in ["", "/a", "a/", "a/b/c", "-a", "Exa mple/a"] {
            assert!(qualified_name(bad).is_some(), "{bad}");
        }
        assert_eq!(label_value(""), None);
        assert!(label_value("a b").is_some());
        assert!(config_key("../x").is_some());
        assert_eq!(environment_name("my.var-1"), None);
        assert!(environment_name("a=b").is_some());
        assert_eq!(port_name("http-2"), None);
        for bad in ["1", "a--b", "-a", "verylongportname1"] {
            assert!(port_name(bad).is_some(), "{bad}");
        }
    }
}
