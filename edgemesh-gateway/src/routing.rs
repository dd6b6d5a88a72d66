//! Which rule a request matches: listeners by host name, then routes by the precedence of the Gateway API (HTTPRouteRule, "matches").

use std::{cmp::Reverse, collections::BTreeMap, fmt, sync::Arc};

use edgemesh_mesh::model::ServiceName;
use http::{HeaderMap, HeaderName, Method};
use rustls::ServerConfig;

/// All open ports.
#[derive(Debug, Clone, Default)]
pub struct RoutingTable {
    /// By port number.
    pub ports: BTreeMap<u16, Arc<Port>>,
}

/// One port and the listeners that share it.
#[derive(Debug, Clone)]
pub struct Port {
    /// TLS is terminated with this, chosen by server name.
    pub tls: Option<Arc<ServerConfig>>,
    /// Listeners, the most specific host name first.
    pub listeners: Vec<Listener>,
}

/// A listener's routes.
#[derive(Debug, Clone)]
pub struct Listener {
    /// `NAMESPACE/GATEWAY/LISTENER`, for logs and debug pages.
    pub name: Arc<str>,
    /// Host names that it serves.
    pub host: HostPattern,
    /// Rules by host name, the most specific first.
    pub hosts: Vec<HostRules>,
}

/// Rules of one host name.
#[derive(Debug, Clone)]
pub struct HostRules {
    /// The host names.
    pub host: HostPattern,
    /// In order of precedence: the first that matches is used.
    pub rules: Vec<Rule>,
}

/// A match, and where it leads.
#[derive(Debug, Clone)]
pub struct Rule {
    /// What the request must be like.
    pub condition: Condition,
    /// Where it goes.
    pub backends: Arc<Backends>,
    /// `NAMESPACE/ROUTE`, for metrics and logs.
    pub route: Arc<str>,
    /// Age of the route and its place in it, for ties: older first, then by name, then by order.
    pub order: (i64, Arc<str>, usize),
}

/// Host names: any, one, or all below a suffix.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum HostPattern {
    /// Every name.
    Any,
    /// `*.example`, kept as `.example`. At least one label must precede it.
    Below(String),
    /// One name.
    Exact(String),
}

/// What a request must be like.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Condition {
    /// Path.
    pub path: PathCondition,
    /// Method, if any.
    pub method: Option<Method>,
    /// Headers with exact values; all must match.
    pub headers: Vec<(HeaderName, String)>,
}

/// A path match.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PathCondition {
    /// The whole path.
    Exact(String),
    /// Whole elements at its begin; kept without a trailing slash, so `/` is empty.
    Prefix(String),
}

/// Weighted backends.
#[derive(Debug, Clone, Default)]
pub struct Backends {
    /// In the route's order.
    pub all: Vec<Backend>,
    total: u64,
}

/// One backend.
#[derive(Debug, Clone)]
pub struct Backend {
    /// Share of the requests.
    pub weight: u32,
    /// The Service port; none for a reference that can't be used, which answers 500 to its share (HTTPRouteRule, "backendRefs").
    pub target: Option<(ServiceName, u16)>,
}

impl HostPattern {
    /// A listener's or route's host name; none is any.
    pub fn parse(text: Option<&str>) -> Self {
        match text.map(str::to_ascii_lowercase) {
            None => Self::Any,
            Some(name) if name.is_empty() => Self::Any,
            Some(name) => match name.strip_prefix('*') {
                Some(suffix) => Self::Below(suffix.to_owned()),
                None => Self::Exact(name),
            },
        }
    }

    /// Whether a (lower-case) host name is among them.
    pub fn matches(&self, host: &str) -> bool {
        match self {
            Self::Any => true,
            Self::Exact(name) => name == host,
            Self::Below(suffix) => host.len() > suffix.len() && host.ends_with(suffix.as_str()),
        }
    }

    /// The names that are in both; the more specific of the two, or none.
    pub fn intersect(&self, other: &Self) -> Option<Self> {
        match (self, other) {
            (Self::Any, one) | (one, Self::Any) => Some(one.clone()),
            (Self::Exact(name), pattern) | (pattern, Self::Exact(name)) => {
                pattern.matches(name).then(|| Self::Exact(name.clone()))
            }
            (Self::Below(a), Self::Below(b)) => {
                let (long, short) = if a.len() >= b.len() { (a, b) } else { (b, a) };
                long.ends_with(short.as_str()).then(|| Self::Below(long.clone()))
            }
        }
    }

    /// Sorts the most specific first.
    pub fn specificity(&self) -> impl Ord + use<> {
        Reverse(match self {
            Self::Exact(name) => (2, name.len()),
            Self::Below(suffix) => (1, suffix.len()),
            Self::Any => (0, 0),
        })
    }
}

impl fmt::Display for HostPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Any => f.write_str("*"),
            Self::Below(suffix) => write!(f, "*{suffix}"),
            Self::Exact(name) => f.write_str(name),
        }
    }
}

impl PathCondition {
    /// A prefix match of whole path elements.
    pub fn prefix(text: &str) -> Self {
        Self::Prefix(text.trim_end_matches('/').to_owned())
    }

    fn matches(&self, path: &str) -> bool {
        match self {
            Self::Exact(whole) => whole == path,
            Self::Prefix(prefix) => {
                path.strip_prefix(prefix.as_str()).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
            }
        }
    }
}

impl Condition {
    fn matches(&self, method: &Method, path: &str, headers: &HeaderMap) -> bool {
        self.path.matches(path)
            && self.method.as_ref().is_none_or(|wanted| wanted == method)
            && self
                .headers
                .iter()
                .all(|(name, value)| headers.get(name).is_some_and(|found| found.as_bytes() == value.as_bytes()))
    }
}

impl Rule {
    /// Sorts by precedence: exact path, longest prefix, a method, most headers; then the oldest route, its name, its order.
    pub fn precedence(&self) -> impl Ord + use<> {
        let path = match &self.condition.path {
            PathCondition::Exact(path) => (1, path.len()),
            PathCondition::Prefix(path) => (0, path.len()),
        };
        let request = (path, self.condition.method.is_some(), self.condition.headers.len());
        (Reverse(request), self.order.clone())
    }
}

impl Backends {
    /// Backends with their weights.
    pub fn new(all: Vec<Backend>) -> Self {
        let total = all.iter().map(|backend| u64::from(backend.weight)).sum();
        Self { all, total }
    }

    /// The backend for a random number; none when no backend has a weight.
    pub fn pick(&self, random: u64) -> Option<&Backend> {
        let mut at = random.checked_rem(self.total)?;
        self.all.iter().find(|backend| {
            let weight = u64::from(backend.weight);
            let hit = at < weight;
            at = at.saturating_sub(weight);
            hit
        })
    }
}

impl Port {
    /// The rule for a request. `host` is lower-case and without port.
    pub fn route(&self, host: &str, method: &Method, path: &str, headers: &HeaderMap) -> Option<&Rule> {
        let listener = self.listeners.iter().find(|listener| listener.host.matches(host))?;
        let candidates = listener.hosts.iter().filter(|rules| rules.host.matches(host));
        candidates.flat_map(|rules| &rules.rules).find(|rule| rule.condition.matches(method, path, headers))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(route: &str, condition: Condition) -> Rule {
        Rule { condition, backends: Arc::default(), route: route.into(), order: (0, route.into(), 0) }
    }

    fn path(path: PathCondition) -> Condition {
        Condition { path, method: None, headers: Vec::new() }
    }

    fn port(mut rules: Vec<Rule>) -> Port {
        rules.sort_by_key(Rule::precedence);
        let hosts = vec![HostRules { host: HostPattern::Any, rules }];
        Port { tls: None, listeners: vec![Listener { name: "l".into(), host: HostPattern::Any, hosts }] }
    }

    fn matched(port: &Port, path: &str, headers: &[(&str, &str)]) -> Option<String> {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.insert(name.parse::<HeaderName>().unwrap(), value.parse().unwrap());
        }
        port.route("any", &Method::GET, path, &map).map(|rule| rule.route.to_string())
    }

    #[test]
    fn exact_paths_beat_long_prefixes_beat_short_ones_beat_headers() {
        let with_header =
            Condition { headers: vec![("x".parse().unwrap(), "1".into())], ..path(PathCondition::prefix("/")) };
        let port = port(vec![
            rule("root", path(PathCondition::prefix("/"))),
            rule("header", with_header),
            rule("a", path(PathCondition::prefix("/a/"))),
            rule("ab", path(PathCondition::prefix("/a/b"))),
            rule("exact", path(PathCondition::Exact("/a/b".into()))),
        ]);
        for (at, headers, expected) in [
            ("/", [].as_slice(), "root"),
            ("/", &[("x", "1")], "header"),
            ("/", &[("x", "2")], "root"),
            ("/a", &[("x", "1")], "a"),
            ("/ab", &[], "root"),
            ("/a/b", &[], "exact"),
            ("/a/b/", &[], "ab"),
            ("/a/b/c", &[], "ab"),
        ] {
            assert_eq!(matched(&port, at, headers).as_deref(), Some(expected), "{at} {headers:?}");
        }
    }

    #[test]
    fn host_patterns_match_and_intersect_as_the_gateway_api_says() {
        let parse = |text| HostPattern::parse(Some(text));
        for (pattern, host, expected) in [
            ("*.example.com", "a.example.com", true),
            ("*.example.com", "a.b.example.com", true),
            ("*.example.com", "example.com", false),
            ("Example.com", "example.com", true),
            ("example.com", "a.example.com", false),
        ] {
            assert_eq!(parse(pattern).matches(host), expected, "{pattern} {host}");
        }
        let both = |a, b| parse(a).intersect(&parse(b)).map(|both| both.to_string());
        assert_eq!(both("*.example.com", "a.example.com").as_deref(), Some("a.example.com"));
        assert_eq!(both("*.example.com", "*.b.example.com").as_deref(), Some("*.b.example.com"));
        assert_eq!(both("*.example.com", "other.org"), None);
        assert_eq!(parse("a.b").intersect(&HostPattern::Any), Some(parse("a.b")));
    }

    #[test]
    fn weights_share_requests_exactly_and_zero_gets_none() {
        let backend = |weight| Backend { weight, target: None };
        let backends = Backends::new(vec![backend(3), backend(0), backend(1)]);
        let mut counts = [0; 3];
        for random in 0..400 {
            let chosen = backends.pick(random).unwrap();
            let at = backends.all.iter().position(|one| std::ptr::eq(one, chosen)).unwrap();
            counts[at] += 1;
        }
        assert_eq!(counts, [300, 0, 100]);
        assert!(Backends::new(vec![backend(0)]).pick(7).is_none());
    }
}
