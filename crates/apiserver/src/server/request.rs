//! What a request is about: its path and query (Kubernetes, "Resource URIs").

use std::collections::HashMap;

use edgemesh_api::ResourceName;
use http::Method;

use crate::error::ApiError;

/// The longest path with query that is read, in bytes.
const MAX_URI: usize = 16 << 10;

/// What a path names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Target {
    /// `/healthz`, `/readyz`, `/livez`.
    Health,
    /// `/version`.
    Version,
    /// [`edgemesh_api::names::CLOUD_STATUS_PATH`].
    Cloud,
    /// `/api`.
    CoreVersions,
    /// `/apis`.
    Groups,
    /// `/apis/g`.
    Group(String),
    /// `/api/v1`, `/apis/g/v`.
    GroupVersion(String, String),
    /// `/openapi/v2`.
    OpenApiV2,
    /// `/openapi/v3`.
    OpenApiV3,
    /// `/openapi/v3/api/v1`, `/openapi/v3/apis/g/v`.
    OpenApiV3Of(String, String),
    /// Objects.
    Resource(Place),
}

/// Objects, or a part of one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) resource: ResourceName,
    /// Empty for cluster-scoped objects and all namespaces.
    pub(crate) namespace: String,
    /// Empty for collections.
    pub(crate) name: String,
    pub(crate) subresource: String,
}

impl Target {
    /// What this path names; `None` when nothing.
    pub(crate) fn parse(path: &str) -> Option<Self> {
        if path.len() > MAX_URI {
            return None;
        }
        let decoded: Vec<String> =
            path.split('/').filter(|s| !s.is_empty()).map(|s| decode(s, false)).collect::<Option<_>>()?;
        let parts: Vec<&str> = decoded.iter().map(String::as_str).collect();
        let owned = |s: &str| s.to_owned();
        Some(match parts.as_slice() {
            ["healthz" | "readyz" | "livez", ..] => Self::Health,
            ["version"] => Self::Version,
            ["edgemesh", "v1", "cloud"] => Self::Cloud,
            ["api"] => Self::CoreVersions,
            ["apis"] => Self::Groups,
            ["api", version] => Self::GroupVersion(String::new(), owned(version)),
            ["apis", group] => Self::Group(owned(group)),
            ["apis", group, version] => Self::GroupVersion(owned(group), owned(version)),
            ["openapi", "v2"] => Self::OpenApiV2,
            ["openapi", "v3"] => Self::OpenApiV3,
            ["openapi", "v3", "api", version] => Self::OpenApiV3Of(String::new(), owned(version)),
            ["openapi", "v3", "apis", group, version] => Self::OpenApiV3Of(owned(group), owned(version)),
            ["api", version, rest @ ..] => Self::Resource(Place::parse("", version, rest)?),
            ["apis", group, version, rest @ ..] => Self::Resource(Place::parse(group, version, rest)?),
            _ => return None,
        })
    }
}

impl Place {
    fn parse(group: &str, version: &str, rest: &[&str]) -> Option<Self> {
        let place = |plural: &str, namespace: &str, name: &str, subresource: &str| Self {
            resource: ResourceName::new(group, version, plural),
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            subresource: subresource.to_owned(),
        };
        Some(match rest {
            // A namespace itself, not what is in it.
            ["namespaces", name] => place("namespaces", "", name, ""),
            ["namespaces", name, sub @ ("status" | "finalize")] => place("namespaces", "", name, sub),
            ["namespaces", namespace, plural] => place(plural, namespace, "", ""),
            ["namespaces", namespace, plural, name] => place(plural, namespace, name, ""),
            ["namespaces", namespace, plural, name, sub] => place(plural, namespace, name, sub),
            [plural] => place(plural, "", "", ""),
            [plural, name] => place(plural, "", name, ""),
            [plural, name, sub] => place(plural, "", name, sub),
            _ => return None,
        })
    }
}

/// The query's parameters; of a repeated one the first.
#[derive(Debug, Clone, Default)]
pub(crate) struct Query(HashMap<String, String>);

impl Query {
    pub(crate) fn parse(query: &str) -> Result<Self, ApiError> {
        if query.len() > MAX_URI {
            return Err(ApiError::bad_request("the query is too long"));
        }
        let mut all = HashMap::new();
        for pair in query.split('&').filter(|p| !p.is_empty()) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            let (Some(name), Some(value)) = (decode(name, true), decode(value, true)) else {
                return Err(ApiError::bad_request("the query is not percent-encoded UTF-8"));
            };
            all.entry(name).or_insert(value);
        }
        Ok(Self(all))
    }

    /// A parameter that is there and not empty.
    pub(crate) fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str).filter(|v| !v.is_empty())
    }

    pub(crate) fn has(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    /// A switch: `1`, `true`, or there without a value.
    pub(crate) fn flag(&self, name: &str) -> bool {
        self.0.get(name).is_some_and(|v| matches!(v.as_str(), "" | "1" | "t" | "T" | "true" | "TRUE" | "True"))
    }

    pub(crate) fn number(&self, name: &str) -> Result<Option<u64>, ApiError> {
        self.get(name)
            .map(|v| v.parse().map_err(|_| ApiError::bad_request(format!("invalid value {v:?} for parameter {name}"))))
            .transpose()
    }
}

/// Kubernetes' verb for a request on objects.
pub(crate) fn verb(method: &Method, place: &Place, query: &Query) -> Option<&'static str> {
    let one = !place.name.is_empty();
    Some(match *method {
        Method::GET | Method::HEAD if query.flag("watch") => "watch",
        Method::GET | Method::HEAD if one => "get",
        Method::GET | Method::HEAD => "list",
        Method::POST => "create",
        Method::PUT if one => "update",
        Method::PATCH if one => "patch",
        Method::DELETE if one => "delete",
        Method::DELETE => "deletecollection",
        _ => return None,
    })
}

/// Percent-decoding (RFC 3986 section 2.1); in queries `+` is a space.
fn decode(text: &str, query: bool) -> Option<String> {
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        match byte {
            b'%' => {
                let mut digit = || char::from(bytes.next()?).to_digit(16);
                let (high, low) = (digit()?, digit()?);
                out.push(u8::try_from(high * 16 + low).ok()?);
            }
            b'+' if query => out.push(b' '),
            other => out.push(other),
        }
    }
    String::from_utf8(out).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(path: &str) -> (String, String, String, String) {
        match Target::parse(path) {
            Some(Target::Resource(p)) => (p.resource.to_string(), p.namespace, p.name, p.subresource),
            other => panic!("{path}: {other:?}"),
        }
    }

    fn text(a: &str, b: &str, c: &str, d: &str) -> (String, String, String, String) {
        (a.to_owned(), b.to_owned(), c.to_owned(), d.to_owned())
    }

    #[test]
    fn paths_name_resources_objects_and_subresources() {
        assert_eq!(place("/api/v1/pods"), text("pods", "", "", ""));
        assert_eq!(place("/api/v1/namespaces"), text("namespaces", "", "", ""));
        assert_eq!(place("/api/v1/namespaces/a"), text("namespaces", "", "a", ""));
        assert_eq!(place("/api/v1/namespaces/a/finalize"), text("namespaces", "", "a", "finalize"));
        assert_eq!(place("/api/v1/namespaces/a/pods/b/status"), text("pods", "a", "b", "status"));
        assert_eq!(place("/apis/apps/v1/namespaces/a/deployments"), text("deployments.apps", "a", "", ""));
        assert_eq!(place("/apis/edgemesh.dev/v1alpha1/meshnodes/x%2dy"), text("meshnodes.edgemesh.dev", "", "x-y", ""));
        assert_eq!(Target::parse("/apis/apps/v1/"), Some(Target::GroupVersion("apps".to_owned(), "v1".to_owned())));
        assert_eq!(Target::parse(edgemesh_api::names::CLOUD_STATUS_PATH), Some(Target::Cloud));
        assert_eq!(Target::parse("/nothing"), None);
        assert_eq!(Target::parse("/api/v1/a/b/c/d/e/f"), None);
    }

    #[test]
    fn queries_are_decoded_and_malformed_ones_refused() {
        let query = Query::parse("labelSelector=a%20in+%28b%2Cc%29&watch&limit=5&limit=7").unwrap();
        assert_eq!(query.get("labelSelector"), Some("a in (b,c)"));
        assert!(query.flag("watch"));
        assert_eq!(query.number("limit").unwrap(), Some(5));
        assert!(Query::parse("a=%zz").is_err());
        assert!(Query::parse("limit=x").unwrap().number("limit").is_err());
    }
}
