//! Attaches HTTPRoutes to listeners, resolves their backends, and builds the routing table.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use edgemesh_mesh::{
    catalog::Catalog,
    model::{Protocol, ServiceName},
};
use gateway_api::apis::standard::httproutes::{
    HttpRoute, HttpRouteParentRefs, HttpRouteRules, HttpRouteRulesBackendRefs, HttpRouteRulesMatches,
    HttpRouteRulesMatchesHeadersType, HttpRouteRulesMatchesPathType,
};
use http::{HeaderName, Method};

use super::{
    Statuses, Verdict, created,
    grants::{self, End},
    listeners::Judged,
};
use crate::{
    objects::{Name, Objects},
    routing::{
        Backend, Backends, Condition, HostPattern, HostRules, Listener, PathCondition, Port, RoutingTable, Rule,
    },
    tls,
};

const GATEWAY_GROUP: &str = "gateway.networking.k8s.io";

/// A route that is understood, before it is attached.
struct Understood {
    rules: Vec<(Condition, Arc<Backends>, usize)>,
    resolved: Verdict,
}

/// Attaches all routes and builds the table.
pub(super) fn attach(
    objects: &Objects,
    catalog: &Catalog,
    gateways: &mut BTreeMap<Name, Vec<Judged>>,
    statuses: &mut Statuses,
) -> RoutingTable {
    for (name, route) in &objects.routes {
        let understood = understand(name, route, objects, catalog);
        let mut parents = Vec::new();
        for (place, parent) in route.spec.parent_refs.iter().flatten().enumerate() {
            let Some(listeners) = parent_gateway(name, parent).and_then(|gateway| gateways.get_mut(&gateway)) else {
                continue;
            };
            let verdicts = match &understood {
                Err(unsupported) => vec![Verdict::no("Accepted", "UnsupportedValue", unsupported.clone())],
                Ok(understood) => {
                    vec![attach_to(name, route, parent, understood, listeners), understood.resolved.clone()]
                }
            };
            parents.push((place, verdicts));
        }
        if !parents.is_empty() {
            statuses.routes.push((name.clone(), parents));
        }
    }
    table(gateways)
}

fn parent_gateway(route: &Name, parent: &HttpRouteParentRefs) -> Option<Name> {
    let gateway = parent.kind.as_deref().is_none_or(|kind| kind == "Gateway")
        && parent.group.as_deref().is_none_or(|group| group == GATEWAY_GROUP);
    gateway.then(|| (parent.namespace.clone().unwrap_or_else(|| route.0.clone()), parent.name.clone()))
}

/// Puts a route's rules into the listeners that its parent reference names; says whether any took it.
fn attach_to(
    name: &Name,
    route: &HttpRoute,
    parent: &HttpRouteParentRefs,
    understood: &Understood,
    listeners: &mut [Judged],
) -> Verdict {
    let named = |listener: &&mut Judged| {
        parent.section_name.as_ref().is_none_or(|section| *section == listener.name)
            && parent.port.is_none_or(|port| port == i32::from(listener.port))
    };
    let (mut exists, mut allowed, mut attached) = (false, false, false);
    for listener in listeners.iter_mut().filter(named) {
        exists = true;
        if listener.namespaces.as_ref().is_some_and(|namespaces| !namespaces.contains(&name.0)) {
            continue;
        }
        allowed = true;
        let hosts: BTreeSet<HostPattern> = match route.spec.hostnames.as_deref() {
            None | Some([]) => [listener.host.clone()].into(),
            Some(hosts) => hosts.iter().filter_map(|h| listener.host.intersect(&HostPattern::parse(Some(h)))).collect(),
        };
        if hosts.is_empty() {
            continue;
        }
        attached = true;
        listener.attached += 1;
        let full: Arc<str> = format!("{}/{}", name.0, name.1).into();
        for host in hosts {
            let rules = understood.rules.iter().map(|(condition, backends, place)| Rule {
                condition: condition.clone(),
                backends: Arc::clone(backends),
                route: Arc::clone(&full),
                order: (created(&route.metadata), Arc::clone(&full), *place),
            });
            match listener.hosts.iter_mut().find(|known| known.host == host) {
                Some(known) => known.rules.extend(rules),
                None => listener.hosts.push(HostRules { host, rules: rules.collect() }),
            }
        }
    }
    match (exists, allowed, attached) {
        (.., true) => Verdict::yes("Accepted", "Accepted"),
        (false, ..) => Verdict::no("Accepted", "NoMatchingParent", "the Gateway has no such listener"),
        (_, false, _) => Verdict::no(
            "Accepted",
            "NotAllowedByListeners",
            format!("no listener allows routes of namespace {}", name.0),
        ),
        _ => Verdict::no("Accepted", "NoMatchingListenerHostname", "no listener has any of the route's host names"),
    }
}

fn understand(name: &Name, route: &HttpRoute, objects: &Objects, catalog: &Catalog) -> Result<Understood, String> {
    let mut rules = Vec::new();
    let mut resolved = Verdict::yes("ResolvedRefs", "ResolvedRefs");
    for (number, rule) in route.spec.rules.iter().flatten().enumerate() {
        let at = format!("spec.rules[{number}]");
        unsupported(rule).map_or(Ok(()), |field| Err(format!("{at}.{field} isn't supported yet")))?;
        let backends = rule.backend_refs.iter().flatten().map(|reference| {
            let weight = u32::try_from(reference.weight.unwrap_or(1)).unwrap_or(0);
            match backend(name, reference, objects, catalog) {
                Ok(target) => Backend { weight, target: Some(target) },
                Err(verdict) => {
                    resolved = verdict;
                    Backend { weight, target: None }
                }
            }
        });
        let backends = Arc::new(Backends::new(backends.collect()));
        let matches = rule.matches.as_deref().unwrap_or_default();
        if matches.is_empty() {
            let all = Condition { path: PathCondition::prefix("/"), method: None, headers: Vec::new() };
            rules.push((all, Arc::clone(&backends), rules.len()));
        }
        for (place, one) in matches.iter().enumerate() {
            let condition = condition(one).map_err(|problem| format!("{at}.matches[{place}].{problem}"))?;
            rules.push((condition, Arc::clone(&backends), rules.len()));
        }
    }
    Ok(Understood { rules, resolved })
}

/// The first field of a rule that this gateway doesn't know how to serve.
fn unsupported(rule: &HttpRouteRules) -> Option<&'static str> {
    let filters = rule.backend_refs.iter().flatten().any(|b| b.filters.as_ref().is_some_and(|f| !f.is_empty()));
    [
        ("filters", rule.filters.as_ref().is_some_and(|filters| !filters.is_empty())),
        ("backendRefs[].filters", filters),
        ("timeouts", rule.timeouts.is_some()),
    ]
    .into_iter()
    .find_map(|(field, used)| used.then_some(field))
}

fn condition(one: &HttpRouteRulesMatches) -> Result<Condition, String> {
    if one.query_params.as_ref().is_some_and(|params| !params.is_empty()) {
        return Err("queryParams isn't supported yet".to_owned());
    }
    let path = match &one.path {
        None => PathCondition::prefix("/"),
        Some(path) => {
            let value = path.value.as_deref().unwrap_or("/");
            match path.r#type {
                None | Some(HttpRouteRulesMatchesPathType::PathPrefix) => PathCondition::prefix(value),
                Some(HttpRouteRulesMatchesPathType::Exact) => PathCondition::Exact(value.to_owned()),
                Some(_) => return Err("path.type RegularExpression isn't supported".to_owned()),
            }
        }
    };
    let mut headers: Vec<(HeaderName, String)> = Vec::new();
    for header in one.headers.iter().flatten() {
        if header.r#type.as_ref().is_some_and(|kind| *kind != HttpRouteRulesMatchesHeadersType::Exact) {
            return Err("headers[].type RegularExpression isn't supported".to_owned());
        }
        let name: HeaderName =
            header.name.parse().map_err(|_| format!("headers: {:?} is no header name", header.name))?;
        // Of entries with an equivalent name the first counts (HTTPRouteMatch, "headers").
        if headers.iter().all(|(known, _)| *known != name) {
            headers.push((name, header.value.clone()));
        }
    }
    let method = one.method.as_ref().map(|method| {
        let text = serde_json::to_value(method).ok().and_then(|value| value.as_str().map(str::to_owned));
        text.and_then(|text| text.parse::<Method>().ok()).ok_or_else(|| "method isn't known".to_owned())
    });
    Ok(Condition { path, method: method.transpose()?, headers })
}

fn backend(
    route: &Name,
    reference: &HttpRouteRulesBackendRefs,
    objects: &Objects,
    catalog: &Catalog,
) -> Result<(ServiceName, u16), Verdict> {
    let no = |reason, message: String| Verdict::no("ResolvedRefs", reason, message);
    let service = reference.kind.as_deref().is_none_or(|kind| kind == "Service")
        && reference.group.as_deref().is_none_or(|group| group.is_empty() || group == "core");
    if !service {
        return Err(no("InvalidKind", format!("backend {}: only Services are supported", reference.name)));
    }
    let namespace = reference.namespace.as_deref().unwrap_or(&route.0);
    let from = End { group: GATEWAY_GROUP, kind: "HTTPRoute", namespace: &route.0 };
    let to = End { group: "", kind: "Service", namespace };
    let full = format!("{namespace}/{}", reference.name);
    if !grants::allows(objects, from, to, &reference.name) {
        return Err(no("RefNotPermitted", format!("no ReferenceGrant in {namespace} allows Service {full}")));
    }
    let known = catalog.service(namespace, &reference.name);
    let known = known.ok_or_else(|| no("BackendNotFound", format!("there is no Service {full}")))?;
    let port = reference.port.and_then(|port| u16::try_from(port).ok()).unwrap_or(0);
    if !known.ports.iter().any(|one| one.port == port && one.protocol == Protocol::Tcp) {
        return Err(no("BackendNotFound", format!("Service {full} has no TCP port {port}")));
    }
    Ok((known.name.clone(), port))
}

fn table(gateways: &mut BTreeMap<Name, Vec<Judged>>) -> RoutingTable {
    let mut ports: BTreeMap<u16, (Vec<Listener>, Vec<_>)> = BTreeMap::new();
    for (gateway, listeners) in gateways.iter_mut() {
        for judged in listeners.iter_mut().filter(|judged| judged.usable()) {
            let mut hosts = std::mem::take(&mut judged.hosts);
            hosts.sort_by_key(|rules| rules.host.specificity());
            for rules in &mut hosts {
                rules.rules.sort_by_key(Rule::precedence);
            }
            let name = format!("{}/{}/{}", gateway.0, gateway.1, judged.name).into();
            let (all, certificates) = ports.entry(judged.port).or_default();
            all.push(Listener { name, host: judged.host.clone(), hosts });
            certificates.extend(judged.certificate.clone().map(|certificate| (judged.host.clone(), certificate)));
        }
    }
    let ports = ports.into_iter().map(|(number, (mut listeners, certificates))| {
        listeners.sort_by_key(|listener| listener.host.specificity());
        let tls = (!certificates.is_empty()).then(|| tls::server(certificates));
        (number, Arc::new(Port { tls, listeners }))
    });
    RoutingTable { ports: ports.collect() }
}
