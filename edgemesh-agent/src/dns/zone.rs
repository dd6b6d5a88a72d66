//! Names of the cluster zone and of cluster addresses, answered from the catalog (Kubernetes DNS specification 1.1.0).

use std::{
    collections::HashSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::atomic::{AtomicUsize, Ordering},
};

use edgemesh_mesh::{
    Catalog,
    model::{Endpoint, Protocol, Service, ServiceKind, ServicePort},
};

use super::{
    reply::{Data, Record, Soa},
    wire::{Name, kind, rcode},
};

/// Schema version that `dns-version` tells.
const SCHEMA_VERSION: &str = "1.1.0";
/// A name of the zone has at most this many labels before it (`_port._proto.service.namespace.svc`).
const MAX_LABELS: usize = 5;

/// An answer from the catalog.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Answer {
    /// Response code.
    pub(super) rcode: u8,
    /// Answer section.
    pub(super) answers: Vec<Record>,
    /// Additional section.
    pub(super) additional: Vec<Record>,
    /// The name at which the answer goes on, after a CNAME.
    pub(super) chase: Option<Name>,
    /// Records are left out that nobody could give.
    pub(super) truncated: bool,
    /// It completes a search in the cluster.
    pub(super) completed: bool,
}

impl Answer {
    /// The name exists, but not with that type; or with the records given.
    fn found(answers: Vec<Record>) -> Self {
        Self { answers, ..Self::default() }
    }

    fn no_such_name() -> Self {
        Self { rcode: rcode::NXDOMAIN, ..Self::default() }
    }
}

/// The cluster zone.
#[derive(Debug)]
pub(super) struct Zone {
    name: Name,
    /// Addresses under which the zone's own server name is found.
    server: Vec<IpAddr>,
    ttl: u32,
    /// Added to the catalog's generation for the SOA's serial, so that it grows over restarts.
    serial_base: u32,
    /// Turn the order of the endpoints of headless Services, each family on its own: clients ask for both at once.
    turns: [AtomicUsize; 2],
}

impl Zone {
    pub(super) fn new(name: Name, server: Vec<IpAddr>, ttl: u32) -> Self {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        Self { name, server, ttl, serial_base: now.as_secs() as u32, turns: Default::default() }
    }

    /// The zone's own name.
    pub(super) fn name(&self) -> &Name {
        &self.name
    }

    /// Where in a name the zone begins; none for names outside of it.
    pub(super) fn holds(&self, name: &Name) -> Option<usize> {
        name.suffix_at(self.name.wire())
    }

    /// The SOA record that goes with negative answers about names of the zone.
    pub(super) fn soa(&self, catalog: &Catalog) -> Record {
        self.soa_of(self.name.clone(), catalog)
    }

    /// The same for a reverse name. Its zone is what is above it: the ranges of Services and pods are in no zone of this server's.
    pub(super) fn reverse_soa(&self, name: &Name, catalog: &Catalog) -> Record {
        self.soa_of(name.parent(), catalog)
    }

    fn soa_of(&self, owner: Name, catalog: &Catalog) -> Record {
        let under = |labels: &[&str]| Name::under(labels, &self.name).unwrap_or_else(|| self.name.clone());
        let soa = Soa {
            server: under(&["ns", "dns"]),
            mailbox: under(&["hostmaster"]),
            serial: self.serial_base.wrapping_add(catalog.generation() as u32),
            minimum: self.ttl,
        };
        Record { owner: Some(owner), ttl: self.ttl, data: Data::Soa(soa) }
    }

    /// Answers a name of the zone, which begins at `zone_at` in it.
    pub(super) fn answer(&self, catalog: &Catalog, name: &Name, zone_at: usize, asked: u16) -> Answer {
        let mut labels: [&str; MAX_LABELS] = [""; MAX_LABELS];
        let mut count = 0;
        let mut at = 0;
        for label in name.labels() {
            if at == zone_at {
                break;
            }
            at += label.len() + 1;
            // Cluster names are ASCII; anything else doesn't exist.
            let Ok(text) = std::str::from_utf8(label) else { return Answer::no_such_name() };
            let Some(slot) = labels.get_mut(count) else { return Answer::no_such_name() };
            *slot = text;
            count += 1;
        }
        match labels[..count] {
            [] => self.apex(catalog, asked),
            ["dns-version"] => Answer::found(self.only(asked == kind::TXT, || Data::Txt(SCHEMA_VERSION))),
            ["ns", "dns"] => self.addresses(asked, self.server.iter().copied()),
            ["svc" | "pod" | "dns"] => Answer::found(Vec::new()),
            [namespace, "svc" | "pod"] => self.namespace(catalog, namespace),
            [service, namespace, "svc"] => match catalog.service(namespace, service) {
                Some(service) => self.service(service, asked),
                None => Answer::no_such_name(),
            },
            [host, service, namespace, "svc"] => match catalog.service(namespace, service) {
                Some(service) => self.host_or_protocol(service, host, asked),
                None => Answer::no_such_name(),
            },
            [port, protocol, service, namespace, "svc"] => match catalog.service(namespace, service) {
                Some(service) => self.named_port(service, port, protocol, asked),
                None => Answer::no_such_name(),
            },
            [address, namespace, "pod"] => self.pod(catalog, address, namespace, asked),
            _ => Answer::no_such_name(),
        }
    }

    /// An alias for a name, to be followed.
    pub(super) fn alias(&self, target: Name) -> Answer {
        Answer { chase: Some(target.clone()), ..Answer::found(vec![self.record(None, Data::Cname(target))]) }
    }

    /// Answers a reverse name, if its address is the cluster's: of a Service, a published endpoint, or in a node's pod range.
    pub(super) fn reverse(&self, catalog: &Catalog, name: &Name, asked: u16) -> Option<Answer> {
        let ip = reverse_address(name)?;
        if let Some(service) = catalog.service_at(ip) {
            return Some(Answer::found(self.only(asked == kind::PTR, || Data::Ptr(self.service_name(service)))));
        }
        let mut names = Vec::new();
        for service in catalog.services_of_endpoint(ip) {
            let endpoints = hosts(service).filter(|endpoint| endpoint.address == ip && published(service, endpoint));
            let of_service = endpoints.filter_map(|endpoint| self.host_name(service, endpoint));
            names.extend(of_service.map(|name| (!service.is_headless(), name)));
        }
        if names.is_empty() {
            // Not to be asked of upstream: it can't know pods. The nodes themselves, and what else there is in the site, it may know.
            let in_pod_range = catalog.node_of_address(ip).is_some_and(|node| !node.addresses.contains(&ip));
            return in_pod_range.then(Answer::no_such_name);
        }
        names.sort_by(|a, b| (a.0, a.1.wire()).cmp(&(b.0, b.1.wire())));
        names.dedup();
        // Endpoints have names by their headless Services; those of other Services help only where there is none.
        let headless = names.iter().any(|(other, _)| !other);
        let names = names.into_iter().filter(|(other, _)| !(headless && *other));
        let records = names.map(|(_, name)| self.record(None, Data::Ptr(name))).collect();
        Some(Answer::found(if asked == kind::PTR || asked == kind::ANY { records } else { Vec::new() }))
    }

    fn apex(&self, catalog: &Catalog, asked: u16) -> Answer {
        match asked {
            kind::SOA => Answer::found(vec![Record { owner: None, ..self.soa(catalog) }]),
            kind::NS | kind::ANY => {
                let Some(server) = Name::under(&["ns", "dns"], &self.name) else { return Answer::found(Vec::new()) };
                let own = self.server.iter().map(|ip| self.record(Some(server.clone()), address(*ip)));
                let additional = own.collect();
                Answer { additional, ..Answer::found(vec![self.record(None, Data::Ns(server))]) }
            }
            _ => Answer::found(Vec::new()),
        }
    }

    fn namespace(&self, catalog: &Catalog, namespace: &str) -> Answer {
        if catalog.has_namespace(namespace) { Answer::found(Vec::new()) } else { Answer::no_such_name() }
    }

    fn service(&self, service: &Service, asked: u16) -> Answer {
        match &service.kind {
            ServiceKind::ExternalName(target) => {
                let Some(target) = Name::from_text(target) else {
                    return Answer { rcode: rcode::SERVFAIL, ..Answer::default() };
                };
                let alias = self.alias(target);
                if asked == kind::CNAME { Answer { chase: None, ..alias } } else { alias }
            }
            ServiceKind::ClusterIp if asked == kind::SRV => {
                self.services_records(service, service.ports.iter().map(|port| &**port))
            }
            ServiceKind::ClusterIp => self.addresses(asked, service.cluster_ips.iter().copied()),
            ServiceKind::Headless => {
                let mut published = hosts(service).filter(|e| published(service, e)).peekable();
                if published.peek().is_none() {
                    return Answer::no_such_name();
                }
                if asked == kind::SRV {
                    return self.services_records(service, service.ports.iter().map(|port| &**port));
                }
                let turn = match asked {
                    kind::A => self.turns[0].fetch_add(1, Ordering::Relaxed),
                    kind::AAAA => self.turns[1].fetch_add(1, Ordering::Relaxed),
                    _ => 0,
                };
                // Only among those that are in the answer does each get its turn.
                let addresses = published.map(|endpoint| endpoint.address).filter(|ip| is_asked_for(asked, *ip));
                let mut addresses: Vec<IpAddr> = addresses.collect();
                // Endpoints with host names of their own may share one.
                addresses.sort_unstable();
                addresses.dedup();
                let turn = turn.checked_rem(addresses.len()).unwrap_or(0);
                addresses.rotate_left(turn);
                self.addresses(asked, addresses.into_iter())
            }
        }
    }

    /// `_tcp.web…` is a step on the way to `_http._tcp.web…`; anything else must be an endpoint.
    fn host_or_protocol(&self, service: &Service, label: &str, asked: u16) -> Answer {
        if label.starts_with('_') {
            let exists = service.ports.iter().any(|port| !port.name.is_empty() && protocol_label(port) == label);
            return if exists { Answer::found(Vec::new()) } else { Answer::no_such_name() };
        }
        let mut found = hosts(service).filter(|e| published(service, e) && is_host(e, label)).peekable();
        if found.peek().is_none() {
            return Answer::no_such_name();
        }
        // Of a Service with several ports an endpoint comes with each of them.
        let mut addresses: Vec<IpAddr> = found.map(|endpoint| endpoint.address).collect();
        addresses.sort_unstable();
        addresses.dedup();
        if asked == kind::SRV {
            let Some(target) = Name::under(&[label.as_bytes()], &self.service_name(service)) else {
                return Answer::found(Vec::new());
            };
            let ports: Vec<&ServicePort> = service.ports.iter().map(|port| &**port).collect();
            let weight = weight(ports.len());
            let srv = |port: &&ServicePort| {
                let number = port.endpoints.iter().find(|e| is_host(e, label)).map_or(port.port, |e| e.port);
                self.record(None, Data::Srv { weight, port: number, target: target.clone() })
            };
            let additional = addresses.into_iter().map(|ip| self.record(Some(target.clone()), address(ip))).collect();
            return Answer { additional, ..Answer::found(ports.iter().map(srv).collect()) };
        }
        self.addresses(asked, addresses.into_iter())
    }

    fn named_port(&self, service: &Service, port: &str, protocol: &str, asked: u16) -> Answer {
        let (Some(name), true) = (port.strip_prefix('_'), protocol.starts_with('_')) else {
            return Answer::no_such_name();
        };
        let matching = |p: &&ServicePort| *p.name == *name && protocol_label(p) == protocol;
        let Some(port) = service.ports.iter().map(|port| &**port).find(matching).filter(|_| !name.is_empty()) else {
            return Answer::no_such_name();
        };
        if service.is_headless() && !port.endpoints.iter().any(|endpoint| published(service, endpoint)) {
            return Answer::no_such_name();
        }
        if asked == kind::SRV || asked == kind::ANY {
            self.services_records(service, std::iter::once(port))
        } else {
            Answer::found(Vec::new())
        }
    }

    /// SRV records with the addresses of their targets: one per port, of a headless Service one per port and endpoint.
    fn services_records<'a>(&self, service: &Service, ports: impl Iterator<Item = &'a ServicePort>) -> Answer {
        let mut answer = Answer::default();
        if service.is_headless() {
            let all: Vec<(&ServicePort, &Endpoint)> = ports
                .flat_map(|port| port.endpoints.iter().map(move |endpoint| (port, &**endpoint)))
                .filter(|(_, endpoint)| published(service, endpoint))
                .collect();
            let weight = weight(all.len());
            let mut shared: HashSet<(u16, Name)> = HashSet::new();
            let mut targets: Vec<(Name, IpAddr)> = Vec::new();
            for (_, endpoint) in &all {
                let Some(target) = self.host_name(service, endpoint) else { continue };
                // Endpoints that share a host name share the record (RFC 2181, section 5).
                if endpoint.hostname.is_none() || shared.insert((endpoint.port, target.clone())) {
                    let srv = Data::Srv { weight, port: endpoint.port, target: target.clone() };
                    answer.answers.push(self.record(None, srv));
                }
                targets.push((target, endpoint.address));
            }
            targets.sort_by(|a, b| (a.0.wire(), a.1).cmp(&(b.0.wire(), b.1)));
            targets.dedup();
            answer.additional = targets.into_iter().map(|(t, ip)| self.record(Some(t), address(ip))).collect();
        } else {
            let target = self.service_name(service);
            let ports: Vec<&ServicePort> = ports.collect();
            let weight = weight(ports.len());
            let srv = |port: &&ServicePort| Data::Srv { weight, port: port.port, target: target.clone() };
            answer.answers = ports.iter().map(|port| self.record(None, srv(port))).collect();
            let addresses = service.cluster_ips.iter();
            answer.additional = addresses.map(|ip| self.record(Some(target.clone()), address(*ip))).collect();
        }
        answer
    }

    /// `10-244-1-7.default.pod`: exists for addresses in the nodes' pod ranges and of the nodes themselves, if the catalog doesn't
    /// know the pod there to be of another namespace.
    fn pod(&self, catalog: &Catalog, label: &str, namespace: &str, asked: u16) -> Answer {
        let dotted: Option<Ipv4Addr> = label.replace('-', ".").parse().ok();
        let ip = dotted.map(IpAddr::V4).or_else(|| label.replace('-', ":").parse::<Ipv6Addr>().ok().map(IpAddr::V6));
        match ip.filter(|ip| catalog.node_of_address(*ip).is_some() && may_have_pod(catalog, *ip, namespace)) {
            Some(ip) => self.addresses(asked, [ip].into_iter()),
            None => Answer::no_such_name(),
        }
    }

    fn addresses(&self, asked: u16, addresses: impl Iterator<Item = IpAddr>) -> Answer {
        let wanted = addresses.filter(|ip| is_asked_for(asked, *ip));
        Answer::found(wanted.map(|ip| self.record(None, address(ip))).collect())
    }

    fn only(&self, wanted: bool, data: impl FnOnce() -> Data) -> Vec<Record> {
        if wanted { vec![self.record(None, data())] } else { Vec::new() }
    }

    fn record(&self, owner: Option<Name>, data: Data) -> Record {
        Record { owner, ttl: self.ttl, data }
    }

    fn service_name(&self, service: &Service) -> Name {
        let labels = [&*service.name.name, &*service.name.namespace, "svc"];
        // Names of the API are DNS labels; one that is too long for the zone can't be asked for either.
        Name::under(&labels, &self.name).unwrap_or_else(|| self.name.clone())
    }

    fn host_name(&self, service: &Service, endpoint: &Endpoint) -> Option<Name> {
        let dashed;
        let host = match &endpoint.hostname {
            Some(hostname) => &**hostname,
            None => {
                dashed = dashed_address(endpoint.address);
                &dashed
            }
        };
        Name::under(&[host, &*service.name.name, &*service.name.namespace, "svc"], &self.name)
    }
}

/// Whether a pod of a namespace may be at an address: the catalog knows it to be, or knows no pod there. It knows those behind Services.
pub(super) fn may_have_pod(catalog: &Catalog, address: IpAddr, namespace: &str) -> bool {
    // Pods of any namespace may live in the node's own network.
    if catalog.node_of_address(address).is_some_and(|node| node.addresses.contains(&address)) {
        return true;
    }
    let of_service = |service| hosts(service).filter(|e| e.address == address).find_map(|e| e.pod.as_ref());
    let mut known = catalog.services_of_endpoint(address).filter_map(|service| of_service(service)).peekable();
    known.peek().is_none() || known.any(|(theirs, _)| **theirs == *namespace)
}

/// Each endpoint of a Service; of one with several ports an address may come more than once.
fn hosts(service: &Service) -> impl Iterator<Item = &Endpoint> {
    let of_ports = service.ports.iter().filter(|_| !service.is_headless()).flat_map(|port| port.endpoints.iter());
    service.hosts.iter().chain(of_ports).map(|endpoint| &**endpoint)
}

fn published(service: &Service, endpoint: &Endpoint) -> bool {
    endpoint.ready || service.publish_not_ready
}

fn is_host(endpoint: &Endpoint, label: &str) -> bool {
    match &endpoint.hostname {
        Some(hostname) => hostname.eq_ignore_ascii_case(label),
        None => dashed_address(endpoint.address) == label,
    }
}

fn dashed_address(ip: IpAddr) -> String {
    let mut dashed = ip.to_string().replace(['.', ':'], "-");
    if dashed.ends_with('-') {
        // As CoreDNS spells `…::`: no host name ends with a dash.
        dashed.push('0');
    }
    dashed
}

fn protocol_label(port: &ServicePort) -> &'static str {
    match port.protocol {
        Protocol::Tcp => "_tcp",
        Protocol::Udp => "_udp",
    }
}

/// Whether an address is in the answer to a question of this type.
fn is_asked_for(asked: u16, ip: IpAddr) -> bool {
    match asked {
        kind::A => ip.is_ipv4(),
        kind::AAAA => ip.is_ipv6(),
        _ => asked == kind::ANY,
    }
}

fn address(ip: IpAddr) -> Data {
    match ip {
        IpAddr::V4(ip) => Data::A(ip),
        IpAddr::V6(ip) => Data::Aaaa(ip),
    }
}

/// All SRV records of an answer weigh the same.
fn weight(count: usize) -> u16 {
    (100 / count.max(1)).max(1) as u16
}

/// The address that a name under `in-addr.arpa` (RFC 1035) or `ip6.arpa` (RFC 3596) stands for.
fn reverse_address(name: &Name) -> Option<IpAddr> {
    let mut labels = [&b""[..]; 34];
    let mut count = 0;
    for label in name.labels() {
        *labels.get_mut(count)? = label;
        count += 1;
    }
    match &labels[..count] {
        [d, c, b, a, b"in-addr", b"arpa"] => {
            let octet = |label: &[u8]| -> Option<u8> {
                let text = std::str::from_utf8(label).ok()?;
                // One spelling per number, so that no other name means the same.
                let number: u8 = text.parse().ok()?;
                (number.to_string() == text).then_some(number)
            };
            Some(IpAddr::V4(Ipv4Addr::new(octet(a)?, octet(b)?, octet(c)?, octet(d)?)))
        }
        [nibbles @ .., b"ip6", b"arpa"] if nibbles.len() == 32 => {
            let mut number = 0_u128;
            for nibble in nibbles.iter().rev() {
                let [digit] = nibble else { return None };
                number = number << 4 | u128::from((*digit as char).to_digit(16)?);
            }
            Some(IpAddr::V6(number.into()))
        }
        _ => None,
    }
}
