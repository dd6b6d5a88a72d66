//! Service addresses and node ports: which ones a Service gets, or why it can't have those that it wants.
//!
//! Pure: what is taken is counted from the Services that exist, so nothing is ever released explicitly and nothing leaks.
//! The first part of the address range is used for dynamic allocation only when the rest is full, as in Kubernetes
//! ("Service ClusterIP allocation"): that leaves the API server's and the DNS server's addresses to those who name them.

use std::collections::{HashMap, HashSet, hash_map::Entry};
use std::fmt;
use std::hash::Hash;
use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::str::FromStr;

use edgemesh_api::cidr::Cidr;
use serde_json::{Value, json};

use super::field_error::{Errors, FieldError};
use super::service::{
    can_have_node_ports, families, has_cluster_ip, is_headless, needs_health_check, wants_node_ports,
};
use super::tables::text;

/// A range of Service addresses, such as `10.96.0.0/16` or `fd00:10:96::/112`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ServiceRange(Cidr);

/// A range that Service addresses can't be taken from.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no range for Services: write an address and a prefix, for example 10.96.0.0/16 (IPv4: /8 to /30) or fd00:10:96::/112 (IPv6: /96 to /126)"
)]
pub struct BadServiceRange(String);

impl ServiceRange {
    /// How many addresses can be given out: all but the network's own and the last one, IPv4's broadcast address.
    fn size(self) -> u32 {
        u32::MAX.checked_shr(32 - u32::from(self.0.host_bits())).unwrap_or(0) - 1
    }

    /// The address so far behind the network's own.
    pub fn nth(self, offset: u32) -> Option<IpAddr> {
        self.0.nth(offset.into())
    }

    /// Whether a Service can have the address.
    pub fn contains(self, address: IpAddr) -> bool {
        self.0.contains(address) && address != self.0.network() && address != self.0.last()
    }

    /// How many of the first addresses are kept for those who name them.
    fn static_band(self) -> u32 {
        if self.size() <= 16 { 0 } else { (self.size() / 16).clamp(16, 256) }
    }

    pub(super) fn family(self) -> &'static str {
        families::of(self.0.network())
    }
}

impl FromStr for ServiceRange {
    type Err = BadServiceRange;

    fn from_str(text: &str) -> Result<Self, BadServiceRange> {
        let range = Cidr::parse_network(text).ok_or_else(|| BadServiceRange(text.to_owned()))?;
        let prefixes = if range.network().is_ipv4() { 8..=30 } else { 96..=126 };
        if prefixes.contains(&range.prefix()) { Ok(Self(range)) } else { Err(BadServiceRange(text.to_owned())) }
    }
}

impl fmt::Display for ServiceRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// From where Services get addresses and node ports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServiceRanges {
    /// Their addresses. The family of the first range is that of Services which don't name one; with a second range, of the
    /// other family, Services can be dual-stack.
    pub addresses: Vec<ServiceRange>,
    /// Their node ports, usually 30000 to 32767 (`--service-node-port-range`).
    pub node_ports: RangeInclusive<u16>,
}

impl ServiceRanges {
    fn families(&self) -> Vec<&'static str> {
        self.addresses.iter().map(|range| range.family()).collect()
    }

    fn of(&self, family: &str) -> Option<ServiceRange> {
        self.addresses.iter().copied().find(|range| range.family() == family)
    }
}

/// What Services have, with how many have it. Kept up to date as Services come and go, because with thousands of them
/// every write would read all the others.
#[derive(Debug, Clone, Default)]
pub struct Allocations {
    addresses: HashMap<IpAddr, i64>,
    node_ports: HashMap<u16, i64>,
}

impl Allocations {
    /// Adds what a Service has.
    pub fn add(&mut self, service: &Value) {
        self.count(service, 1);
    }

    /// Takes away what a Service had.
    pub fn remove(&mut self, service: &Value) {
        self.count(service, -1);
    }

    fn count(&mut self, service: &Value, by: i64) {
        let spec = &service["spec"];
        let addresses = spec["clusterIPs"].as_array().into_iter().flatten().chain([&spec["clusterIP"]]);
        let addresses: HashSet<IpAddr> = addresses.filter_map(|address| text(address).parse().ok()).collect();
        let ports = spec["ports"].as_array().into_iter().flatten().map(|port| &port["nodePort"]);
        let ports = ports.chain([&spec["healthCheckNodePort"]]).filter_map(|port| u16::try_from(port.as_i64()?).ok());
        let ports: HashSet<u16> = ports.filter(|port| *port != 0).collect();
        addresses.into_iter().for_each(|address| count(&mut self.addresses, address, by));
        ports.into_iter().for_each(|port| count(&mut self.node_ports, port, by));
    }
}

fn count<K: Eq + Hash>(counts: &mut HashMap<K, i64>, key: K, by: i64) {
    let entry = counts.entry(key);
    match entry {
        Entry::Occupied(entry) if *entry.get() + by == 0 => drop(entry.remove()),
        entry => *entry.or_default() += by,
    }
}

/// What the other Services have, for one that is being written.
#[derive(Debug, Clone)]
pub struct Taken<'a> {
    all: &'a Allocations,
    /// To be added to it; counts below zero take away.
    changes: Allocations,
}

impl<'a> Taken<'a> {
    /// What all Services have.
    pub fn by(all: &'a Allocations) -> Self {
        Self { all, changes: Allocations::default() }
    }

    /// With one more Service.
    pub fn add(&mut self, service: &Value) {
        self.changes.add(service);
    }

    /// Without a Service that is counted.
    pub fn remove(&mut self, service: &Value) {
        self.changes.remove(service);
    }

    fn has_address(&self, address: IpAddr) -> bool {
        let of = |allocations: &Allocations| allocations.addresses.get(&address).copied().unwrap_or_default();
        of(self.all) + of(&self.changes) > 0
    }

    fn has_port(&self, port: u16) -> bool {
        let of = |allocations: &Allocations| allocations.node_ports.get(&port).copied().unwrap_or_default();
        of(self.all) + of(&self.changes) > 0
    }
}

/// Gives a defaulted Service the address families, addresses and node ports that its type has and that it doesn't have yet.
/// `old` is the Service before an update. `seed` decides where the search for free ones starts: pass a random number, so that a
/// deleted Service's address isn't reused at once.
///
/// # Errors
/// The fields that can't be had: out of range, taken, or nothing is free.
pub fn allocate(
    ranges: &ServiceRanges,
    taken: &Taken<'_>,
    old: Option<&Value>,
    service: &mut Value,
    seed: u64,
) -> Result<(), Vec<FieldError>> {
    let mut errors = Errors::default();
    let spec = &mut service["spec"];
    let mut kept = Allocations::default();
    old.into_iter().for_each(|old| kept.add(old));
    if has_cluster_ip(spec) {
        families::settle(&ranges.families(), old.map(|old| &old["spec"]), spec, &mut errors);
        if !is_headless(spec) && errors.0.is_empty() {
            allocate_addresses(ranges, taken, &kept, spec, seed, &mut errors);
        }
    }
    if can_have_node_ports(spec) {
        allocate_ports(ranges, taken, &kept, spec, seed, &mut errors);
    }
    if needs_health_check(spec) {
        allocate_health_check_port(ranges, taken, &kept, spec, seed, &mut errors);
    }
    if errors.0.is_empty() { Ok(()) } else { Err(errors.0) }
}

/// One address for each of the Service's families, in their order. `kept` is what the Service has already: that is not asked for
/// again, as the ranges may be others by now.
fn allocate_addresses(
    ranges: &ServiceRanges,
    taken: &Taken<'_>,
    kept: &Allocations,
    spec: &mut Value,
    seed: u64,
    errors: &mut Errors,
) {
    let texts = |list: &Value| -> Vec<String> {
        list.as_array().into_iter().flatten().map(|item| text(item).to_owned()).collect()
    };
    let mut addresses = texts(&spec["clusterIPs"]);
    for (i, family) in texts(&spec["ipFamilies"]).iter().enumerate() {
        // What isn't configured was refused before.
        let Some(range) = ranges.of(family) else { continue };
        let field = if i == 0 { "spec.clusterIP".to_owned() } else { format!("spec.clusterIPs[{i}]") };
        let wanted = addresses.get(i).cloned().unwrap_or_default();
        if wanted.is_empty() {
            match free_address(range, taken, seed) {
                Some(address) if i < addresses.len() => addresses[i] = address.to_string(),
                Some(address) => addresses.push(address.to_string()),
                None => errors.invalid(field, "", "failed to allocate an IP: range is full"),
            }
            continue;
        }
        // Validation says what isn't an address.
        let Ok(address) = wanted.parse::<IpAddr>() else { continue };
        if kept.addresses.contains_key(&address) {
            continue;
        }
        if !range.contains(address) {
            let problem = format!("provided IP is not in the valid range. The range of valid IPs is {range}");
            errors.invalid(field, wanted, problem);
        } else if taken.has_address(address) {
            errors.invalid(field, wanted, "provided IP is already allocated");
        }
    }
    if let Some(first) = addresses.first() {
        spec["clusterIP"] = json!(first);
        spec["clusterIPs"] = json!(addresses);
    }
}

fn free_address(range: ServiceRange, taken: &Taken<'_>, seed: u64) -> Option<IpAddr> {
    let (size, band) = (range.size(), range.static_band());
    let free = |first: u32, count: u32| {
        let start = seed % u64::from(count.max(1));
        (0..count)
            .filter_map(|i| range.nth(first + u32::try_from((start + u64::from(i)) % u64::from(count)).ok()?))
            .find(|address| !taken.has_address(*address))
    };
    free(1 + band, size - band).or_else(|| free(1, band))
}

fn allocate_ports(
    ranges: &ServiceRanges,
    taken: &Taken<'_>,
    kept: &Allocations,
    spec: &mut Value,
    seed: u64,
    errors: &mut Errors,
) {
    let (first, last) = (*ranges.node_ports.start(), *ranges.node_ports.end());
    let fills_in = wants_node_ports(spec);
    let ports = spec.get_mut("ports").and_then(Value::as_array_mut).map(Vec::as_mut_slice).unwrap_or_default();
    // The same port number in two protocols shares one node port, so what one of them names goes for both.
    let mut by_port: Vec<(i64, u16)> = Vec::new();
    let mut own: HashSet<u16> = HashSet::new();
    for (i, port) in ports.iter().enumerate() {
        let Some(wanted) = port["nodePort"].as_i64().filter(|n| *n != 0) else { continue };
        let field = format!("spec.ports[{i}].nodePort");
        let has = |number: &u16| kept.node_ports.contains_key(number);
        match u16::try_from(wanted).ok().filter(|number| has(number) || ranges.node_ports.contains(number)) {
            None => errors.invalid(
                field,
                wanted,
                format!("provided port is not in the valid range. The range of valid ports is {first}-{last}"),
            ),
            Some(number) if !has(&number) && taken.has_port(number) => {
                errors.invalid(field, wanted, "provided port is already allocated");
            }
            Some(number) => {
                own.insert(number);
                by_port.push((port["port"].as_i64().unwrap_or(0), number));
            }
        }
    }
    if !fills_in {
        return;
    }
    let count = u64::from(last.saturating_sub(first)) + 1;
    for (i, port) in ports.iter_mut().enumerate() {
        if port["nodePort"].as_i64().unwrap_or(0) != 0 {
            continue;
        }
        let number = port["port"].as_i64().unwrap_or(0);
        let shared = by_port.iter().find(|(p, _)| *p == number).map(|(_, node_port)| *node_port);
        let free = shared.or_else(|| {
            (0..count)
                .filter_map(|n| u16::try_from(u64::from(first) + (seed % count + n) % count).ok())
                .find(|n| !taken.has_port(*n) && !own.contains(n))
        });
        match free {
            Some(node_port) => {
                own.insert(node_port);
                by_port.push((number, node_port));
                port["nodePort"] = json!(node_port);
            }
            None => {
                errors.invalid(format!("spec.ports[{i}].nodePort"), 0, "failed to allocate a nodePort: range is full")
            }
        }
    }
}

/// The port at which load balancers learn whether a node has an endpoint (Kubernetes, "Create an External Load Balancer":
/// preserving the client source IP).
fn allocate_health_check_port(
    ranges: &ServiceRanges,
    taken: &Taken<'_>,
    kept: &Allocations,
    spec: &mut Value,
    seed: u64,
    errors: &mut Errors,
) {
    let field = "spec.healthCheckNodePort";
    let own: HashSet<i64> =
        spec["ports"].as_array().into_iter().flatten().filter_map(|port| port["nodePort"].as_i64()).collect();
    let has = |port: &u16| kept.node_ports.contains_key(port);
    let is_free = |port: &u16| (has(port) || !taken.has_port(*port)) && !own.contains(&i64::from(*port));
    let (first, last) = (*ranges.node_ports.start(), *ranges.node_ports.end());
    match spec["healthCheckNodePort"].as_i64().filter(|port| *port != 0) {
        Some(wanted) => match u16::try_from(wanted).ok().filter(|port| has(port) || ranges.node_ports.contains(port)) {
            None => errors.invalid(
                field,
                wanted,
                format!("provided port is not in the valid range. The range of valid ports is {first}-{last}"),
            ),
            Some(port) if !is_free(&port) => errors.invalid(field, wanted, "provided port is already allocated"),
            Some(_) => {}
        },
        None => {
            let count = u64::from(last.saturating_sub(first)) + 1;
            let mut candidates =
                (0..count).filter_map(|n| u16::try_from(u64::from(first) + (seed % count + n) % count).ok());
            match candidates.find(is_free) {
                Some(port) => spec["healthCheckNodePort"] = json!(port),
                None => errors.invalid(field, 0, "failed to allocate a nodePort: range is full"),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_load_balancer_that_keeps_client_addresses_gets_a_health_check_port() {
        let spec = |policy: &str, port: i64| {
            json!({"type": "LoadBalancer", "externalTrafficPolicy": policy, "healthCheckNodePort": port,
                   "allocateLoadBalancerNodePorts": true, "ports": [{"port": 80, "protocol": "TCP"}]})
        };
        let taken = allocations(json!({"healthCheckNodePort": 30001}));
        let given = allocated(&taken, spec("Local", 0), 0).unwrap();
        assert_eq!((&given["ports"][0]["nodePort"], &given["healthCheckNodePort"]), (&json!(30000), &json!(30002)));
        assert_eq!(allocated(&taken, spec("Cluster", 0), 0).unwrap()["healthCheckNodePort"], 0);
        assert_eq!(allocated(&taken, spec("Local", 30003), 0).unwrap()["healthCheckNodePort"], 30003);
        for (wanted, reason) in [(30001, "already allocated"), (30000, "already allocated"), (80, "valid range")] {
            let errors = allocated(&taken, spec("Local", wanted), 0).unwrap_err();
            assert!(errors[0].contains("healthCheckNodePort") && errors[0].contains(reason), "{errors:?}");
        }
    }

    fn ranges(addresses: &[&str]) -> ServiceRanges {
        let addresses = addresses.iter().map(|range| range.parse().unwrap()).collect();
        ServiceRanges { addresses, node_ports: 30000..=30003 }
    }

    fn service(spec: Value) -> Value {
        json!({"metadata": {"name": "a", "namespace": "n"}, "spec": spec})
    }

    fn allocations(spec: Value) -> Allocations {
        let mut allocations = Allocations::default();
        allocations.add(&service(spec));
        allocations
    }

    fn allocated(taken: &Allocations, spec: Value, seed: u64) -> Result<Value, Vec<String>> {
        let mut object = service(spec);
        allocate(&ranges(&["10.96.0.0/16"]), &Taken::by(taken), None, &mut object, seed)
            .map(|()| object["spec"].take())
            .map_err(|e| e.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn dynamic_addresses_leave_the_first_ones_to_those_who_name_them() {
        let spec = allocated(&Allocations::default(), json!({"type": "ClusterIP"}), 0).unwrap();
        assert_eq!((&spec["clusterIP"], &spec["clusterIPs"]), (&json!("10.96.1.1"), &json!(["10.96.1.1"])));
        let last =
            allocated(&Allocations::default(), json!({"type": "ClusterIP"}), u64::from(65534_u32 - 256 - 1)).unwrap();
        assert_eq!(last["clusterIP"], json!("10.96.255.254"));
        let dns =
            allocated(&Allocations::default(), json!({"type": "ClusterIP", "clusterIP": "10.96.0.10"}), 0).unwrap();
        assert_eq!(dns["clusterIP"], json!("10.96.0.10"));
    }

    #[test]
    fn a_small_range_is_used_to_its_last_address() {
        let ranges = ranges(&["10.0.0.0/29"]);
        let none = Allocations::default();
        let mut taken = Taken::by(&none);
        let mut got = HashSet::new();
        for _ in 0..6 {
            let mut object = service(json!({"type": "ClusterIP"}));
            allocate(&ranges, &taken, None, &mut object, 5).unwrap();
            taken.add(&object);
            got.insert(object["spec"]["clusterIP"].as_str().unwrap().to_owned());
        }
        assert_eq!(got.len(), 6);
        let error = allocate(&ranges, &taken, None, &mut service(json!({"type": "ClusterIP"})), 5).unwrap_err();
        assert_eq!(
            error[0].to_string(),
            "spec.clusterIP: Invalid value: \"\": failed to allocate an IP: range is full"
        );
    }

    #[test]
    fn taken_and_foreign_addresses_are_refused() {
        let taken = allocations(json!({"clusterIP": "10.96.0.1", "clusterIPs": ["10.96.0.1"]}));
        assert_eq!(
            allocated(&taken, json!({"type": "ClusterIP", "clusterIP": "10.96.0.1"}), 0).unwrap_err(),
            ["spec.clusterIP: Invalid value: \"10.96.0.1\": provided IP is already allocated"]
        );
        for outside in ["192.168.0.1", "10.96.0.0", "10.96.255.255"] {
            let error = allocated(&taken, json!({"type": "ClusterIP", "clusterIP": outside}), 0).unwrap_err();
            assert!(error[0].contains("not in the valid range. The range of valid IPs is 10.96.0.0/16"), "{error:?}");
        }
    }

    #[test]
    fn headless_and_external_names_have_no_address() {
        let headless = json!({"type": "ClusterIP", "clusterIP": "None", "clusterIPs": ["None"]});
        let given = allocated(&Allocations::default(), headless, 0).unwrap();
        assert_eq!((&given["clusterIP"], &given["clusterIPs"]), (&json!("None"), &json!(["None"])));
        let external = json!({"type": "ExternalName", "externalName": "a"});
        assert_eq!(allocated(&Allocations::default(), external.clone(), 0), Ok(external));
    }

    #[test]
    fn a_dual_stack_service_gets_an_address_of_each_family_in_the_order_that_it_names() {
        let ranges = ranges(&["10.96.0.0/16", "fd00:10:96::/112"]);
        let mut all = Allocations::default();
        let mut given = |families: &[&str]| {
            let spec = json!({"type": "ClusterIP", "ipFamilyPolicy": "PreferDualStack", "ipFamilies": families});
            let mut object = service(spec);
            allocate(&ranges, &Taken::by(&all), None, &mut object, 0).unwrap();
            all.add(&object);
            object["spec"].take()
        };
        assert_eq!(given(&[])["clusterIPs"], json!(["10.96.1.1", "fd00:10:96::101"]));
        let spec = given(&["IPv6", "IPv4"]);
        assert_eq!(
            (&spec["clusterIP"], &spec["clusterIPs"]),
            (&json!("fd00:10:96::102"), &json!(["fd00:10:96::102", "10.96.1.2"]))
        );
        let taken = Taken::by(&all);
        for (wanted, problem) in [
            (
                "fd00:10:96::101",
                "spec.clusterIPs[1]: Invalid value: \"fd00:10:96::101\": provided IP is already allocated",
            ),
            (
                "fd00::1",
                "spec.clusterIPs[1]: Invalid value: \"fd00::1\": provided IP is not in the valid range. The range of valid IPs is fd00:10:96::/112",
            ),
        ] {
            let spec = json!({"type": "ClusterIP", "ipFamilyPolicy": "RequireDualStack", "clusterIP": "10.96.0.9",
                "clusterIPs": ["10.96.0.9", wanted]});
            let errors = allocate(&ranges, &taken, None, &mut service(spec), 0).unwrap_err();
            assert_eq!(errors.iter().map(ToString::to_string).collect::<Vec<_>>(), [problem]);
        }
    }

    #[test]
    fn a_range_that_no_service_fits_in_is_refused() {
        for bad in ["10.96.0.0", "10.96.0.1/16", "10.0.0.0/31", "0.0.0.0/7", "fd00::/64", "fd00::/127", "x/16"] {
            assert!(bad.parse::<ServiceRange>().is_err(), "{bad}");
        }
        let smallest: ServiceRange = "10.0.0.0/30".parse().unwrap();
        assert_eq!((smallest.size(), smallest.static_band()), (2, 0));
        let largest: ServiceRange = "fd00::/96".parse().unwrap();
        assert_eq!(largest.nth(largest.size()), "fd00::ffff:fffe".parse().ok());
    }

    #[test]
    fn node_ports_are_given_checked_and_shared_between_protocols() {
        let taken = allocations(json!({"ports": [{"port": 1, "nodePort": 30000}]}));
        let spec = json!({"type": "NodePort", "ports": [{"port": 53, "protocol": "TCP"}, {"port": 53, "protocol": "UDP"}, {"port": 80}]});
        let spec = allocated(&taken, spec, 0).unwrap();
        let got: Vec<_> = spec["ports"].as_array().unwrap().iter().map(|p| p["nodePort"].as_i64().unwrap()).collect();
        assert_eq!(got, [30001, 30001, 30002]);
        for (port, expected) in [
            (30000, "spec.ports[0].nodePort: Invalid value: 30000: provided port is already allocated"),
            (
                80,
                "spec.ports[0].nodePort: Invalid value: 80: provided port is not in the valid range. The range of valid ports is 30000-30003",
            ),
        ] {
            let spec = json!({"type": "NodePort", "ports": [{"port": 80, "nodePort": port}]});
            assert_eq!(allocated(&taken, spec, 0).unwrap_err(), [expected]);
        }
        // A load balancer that wants no node ports may still name some, and they are like all others.
        for (port, expected) in
            [(30000, Some("already allocated")), (22, Some("valid range")), (30001, None), (0, None)]
        {
            let spec = json!({"type": "LoadBalancer", "allocateLoadBalancerNodePorts": false,
                "ports": [{"port": 80, "nodePort": port}]});
            match (allocated(&taken, spec.clone(), 0), expected) {
                (Ok(given), None) => assert_eq!(given["ports"], spec["ports"]),
                (Err(errors), Some(expected)) => assert!(errors[0].contains(expected), "{errors:?}"),
                (other, _) => panic!("{port}: {other:?}"),
            }
        }
        let many: Vec<_> = (1..5).map(|p| json!({"port": p})).collect();
        let error = allocated(&taken, json!({"type": "NodePort", "ports": many}), 0).unwrap_err();
        assert_eq!(error, ["spec.ports[3].nodePort: Invalid value: 0: failed to allocate a nodePort: range is full"]);
    }

    #[test]
    fn a_service_keeps_what_it_has_when_the_ranges_become_others() {
        let old = service(
            json!({"type": "LoadBalancer", "externalTrafficPolicy": "Local", "healthCheckNodePort": 31001,
            "ipFamilyPolicy": "SingleStack", "ipFamilies": ["IPv4"], "clusterIP": "10.43.0.7", "clusterIPs": ["10.43.0.7"],
            "ports": [{"port": 80, "protocol": "TCP", "nodePort": 31000}]}),
        );
        let mut new = old.clone();
        new["spec"]["selector"] = json!({"app": "web"});
        let none = Allocations::default();
        let ranges = ranges(&["10.96.0.0/16"]);
        assert_eq!(allocate(&ranges, &Taken::by(&none), Some(&old), &mut new, 0), Ok(()));
        assert_eq!(new["spec"]["clusterIPs"], old["spec"]["clusterIPs"]);
        assert_eq!(new["spec"]["ports"], old["spec"]["ports"]);
        // What it asks for anew is checked.
        new["spec"]["ports"][0]["nodePort"] = json!(31002);
        let errors = allocate(&ranges, &Taken::by(&none), Some(&old), &mut new, 0).unwrap_err();
        assert!(errors[0].to_string().starts_with("spec.ports[0].nodePort: Invalid value: 31002"), "{errors:?}");
    }

    #[test]
    fn what_a_service_gives_back_is_free_unless_another_has_it_too() {
        let one = service(json!({"clusterIP": "10.96.0.9", "ports": [{"nodePort": 30001}, {"nodePort": 30001}]}));
        let mut all = Allocations::default();
        all.add(&one);
        let mut taken = Taken::by(&all);
        assert!(taken.has_address([10, 96, 0, 9].into()) && taken.has_port(30001));
        taken.remove(&one);
        assert!(!taken.has_address([10, 96, 0, 9].into()) && !taken.has_port(30001));
        all.add(&one);
        all.remove(&one);
        assert!(Taken::by(&all).has_port(30001));
        all.remove(&one);
        assert!(all.addresses.is_empty() && all.node_ports.is_empty());
    }
}
