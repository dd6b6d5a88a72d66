//! Service addresses and node ports: which ones a Service gets, or why it can't have those that it wants.
//!
//! Pure: what is taken is counted from the Services that exist, so nothing is ever released explicitly and nothing leaks.
//! The first part of the address range is used for dynamic allocation only when the rest is full, as in Kubernetes
//! ("Service ClusterIP allocation"): that leaves the API server's and the DNS server's addresses to those who name them.

use std::collections::{HashMap, HashSet, hash_map::Entry};
use std::hash::Hash;
use std::net::{IpAddr, Ipv4Addr};
use std::ops::RangeInclusive;

use serde_json::{Value, json};

use super::field_error::{Errors, FieldError};
use super::service::{has_cluster_ip, has_node_ports, is_headless, needs_health_check};
use super::tables::text;

/// From where Services get addresses and node ports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServiceRanges {
    network: u32,
    prefix: u8,
    node_ports: RangeInclusive<u16>,
}

impl ServiceRanges {
    /// The usual node ports (`--service-node-port-range`).
    pub const DEFAULT_NODE_PORTS: RangeInclusive<u16> = 30000..=32767;

    /// Ranges from an IPv4 range such as `10.96.0.0/16` and node ports.
    ///
    /// # Errors
    /// A sentence that says what is wrong with the address range.
    pub fn new(service_cidr: &str, node_ports: RangeInclusive<u16>) -> Result<Self, String> {
        let bad = || format!("{service_cidr:?} is not an IPv4 address range such as 10.96.0.0/16");
        let (address, prefix) = service_cidr.split_once('/').ok_or_else(bad)?;
        let address: Ipv4Addr = address.parse().map_err(|_| bad())?;
        let prefix: u8 = prefix.parse().map_err(|_| bad())?;
        if !(8..=30).contains(&prefix) {
            return Err(format!("the service range {service_cidr} must have a prefix length from 8 to 30"));
        }
        let network = u32::from(address) & (u32::MAX << (32 - prefix));
        Ok(Self { network, prefix, node_ports })
    }

    /// How many addresses can be given out: all but the network's own and the broadcast address.
    fn size(&self) -> u32 {
        (1_u32 << (32 - self.prefix)) - 2
    }

    fn contains(&self, address: Ipv4Addr) -> bool {
        let offset = u32::from(address).wrapping_sub(self.network);
        (1..=self.size()).contains(&offset)
    }

    /// How many of the first addresses are kept for those who name them.
    fn static_band(&self) -> u32 {
        if self.size() <= 16 { 0 } else { (self.size() / 16).clamp(16, 256) }
    }
}

/// What Services have, with how many have it. Kept up to date as Services come and go, because with thousands of them
/// every write would read all the others.
#[derive(Debug, Clone, Default)]
pub struct Allocations {
    addresses: HashMap<Ipv4Addr, i64>,
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
        let addresses: HashSet<Ipv4Addr> = addresses.filter_map(|address| text(address).parse().ok()).collect();
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

    fn has_address(&self, address: Ipv4Addr) -> bool {
        let of = |allocations: &Allocations| allocations.addresses.get(&address).copied().unwrap_or_default();
        of(self.all) + of(&self.changes) > 0
    }

    fn has_port(&self, port: u16) -> bool {
        let of = |allocations: &Allocations| allocations.node_ports.get(&port).copied().unwrap_or_default();
        of(self.all) + of(&self.changes) > 0
    }
}

/// Gives a defaulted Service the address and the node ports that its type has and that it doesn't have yet. `seed` decides
/// where the search for free ones starts: pass a random number, so that a deleted Service's address isn't reused at once.
///
/// # Errors
/// The fields that can't be had: out of range, taken, or nothing is free.
pub fn allocate(
    ranges: &ServiceRanges,
    taken: &Taken<'_>,
    service: &mut Value,
    seed: u64,
) -> Result<(), Vec<FieldError>> {
    let mut errors = Errors::default();
    let spec = &mut service["spec"];
    if has_cluster_ip(spec) {
        families(spec, &mut errors);
        if !is_headless(spec) && errors.0.is_empty() {
            allocate_address(ranges, taken, spec, seed, &mut errors);
        }
    }
    if has_node_ports(spec) {
        allocate_ports(ranges, taken, spec, seed, &mut errors);
    }
    if needs_health_check(spec) {
        allocate_health_check_port(ranges, taken, spec, seed, &mut errors);
    }
    if errors.0.is_empty() { Ok(()) } else { Err(errors.0) }
}

/// Clusters here have IPv4 service addresses only.
fn families(spec: &Value, errors: &mut Errors) {
    if spec["ipFamilyPolicy"] == json!("RequireDualStack") {
        errors.invalid(
            "spec.ipFamilyPolicy",
            "RequireDualStack",
            "this cluster is not configured for dual-stack services",
        );
    }
    for (i, family) in spec["ipFamilies"].as_array().into_iter().flatten().enumerate() {
        if family == &json!("IPv6") {
            errors.invalid(format!("spec.ipFamilies[{i}]"), "IPv6", "not configured on this cluster");
        }
    }
}

fn allocate_address(ranges: &ServiceRanges, taken: &Taken<'_>, spec: &mut Value, seed: u64, errors: &mut Errors) {
    let wanted = text(&spec["clusterIP"]);
    if !wanted.is_empty() {
        match wanted.parse::<IpAddr>() {
            Ok(IpAddr::V4(address)) if ranges.contains(address) => {
                if taken.has_address(address) {
                    errors.invalid("spec.clusterIP", wanted, "provided IP is already allocated");
                }
            }
            Ok(_) => {
                let range = format!("{}/{}", Ipv4Addr::from(ranges.network), ranges.prefix);
                errors.invalid(
                    "spec.clusterIP",
                    wanted,
                    format!("provided IP is not in the valid range. The range of valid IPs is {range}"),
                );
            }
            // Validation says so already.
            Err(_) => {}
        }
        return;
    }
    let (size, band) = (ranges.size(), ranges.static_band());
    let free = |first: u32, count: u32| {
        let start = u32::try_from(seed % u64::from(count.max(1))).unwrap_or(0);
        (0..count)
            .map(|i| Ipv4Addr::from(ranges.network + first + (start + i) % count))
            .find(|address| !taken.has_address(*address))
    };
    match free(1 + band, size - band).or_else(|| free(1, band)) {
        Some(address) => {
            spec["clusterIP"] = json!(address.to_string());
            spec["clusterIPs"] = json!([address.to_string()]);
        }
        None => errors.invalid("spec.clusterIP", "", "failed to allocate an IP: range is full"),
    }
}

fn allocate_ports(ranges: &ServiceRanges, taken: &Taken<'_>, spec: &mut Value, seed: u64, errors: &mut Errors) {
    let (first, last) = (*ranges.node_ports.start(), *ranges.node_ports.end());
    let ports = spec.get_mut("ports").and_then(Value::as_array_mut).map(Vec::as_mut_slice).unwrap_or_default();
    // The same port number in two protocols shares one node port, so what one of them names goes for both.
    let mut by_port: Vec<(i64, u16)> = Vec::new();
    let mut own: HashSet<u16> = HashSet::new();
    for (i, port) in ports.iter().enumerate() {
        let Some(wanted) = port["nodePort"].as_i64().filter(|n| *n != 0) else { continue };
        let field = format!("spec.ports[{i}].nodePort");
        match u16::try_from(wanted).ok().filter(|n| ranges.node_ports.contains(n)) {
            None => errors.invalid(
                field,
                wanted,
                format!("provided port is not in the valid range. The range of valid ports is {first}-{last}"),
            ),
            Some(number) if taken.has_port(number) => {
                errors.invalid(field, wanted, "provided port is already allocated");
            }
            Some(number) => {
                own.insert(number);
                by_port.push((port["port"].as_i64().unwrap_or(0), number));
            }
        }
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
    spec: &mut Value,
    seed: u64,
    errors: &mut Errors,
) {
    let field = "spec.healthCheckNodePort";
    let own: HashSet<i64> =
        spec["ports"].as_array().into_iter().flatten().filter_map(|port| port["nodePort"].as_i64()).collect();
    let is_free = |port: &u16| !taken.has_port(*port) && !own.contains(&i64::from(*port));
    let (first, last) = (*ranges.node_ports.start(), *ranges.node_ports.end());
    match spec["healthCheckNodePort"].as_i64().filter(|port| *port != 0) {
        Some(wanted) => match u16::try_from(wanted).ok().filter(|port| ranges.node_ports.contains(port)) {
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

    fn ranges(cidr: &str) -> ServiceRanges {
        ServiceRanges::new(cidr, 30000..=30003).unwrap()
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
        allocate(&ranges("10.96.0.0/16"), &Taken::by(taken), &mut object, seed)
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
        let ranges = ranges("10.0.0.0/29");
        let none = Allocations::default();
        let mut taken = Taken::by(&none);
        let mut got = HashSet::new();
        for _ in 0..6 {
            let mut object = service(json!({"type": "ClusterIP"}));
            allocate(&ranges, &taken, &mut object, 5).unwrap();
            taken.add(&object);
            got.insert(object["spec"]["clusterIP"].as_str().unwrap().to_owned());
        }
        assert_eq!(got.len(), 6);
        let error = allocate(&ranges, &taken, &mut service(json!({"type": "ClusterIP"})), 5).unwrap_err();
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
        for outside in ["192.168.0.1", "10.96.0.0", "10.96.255.255", "fd00::1"] {
            let error = allocated(&taken, json!({"type": "ClusterIP", "clusterIP": outside}), 0).unwrap_err();
            assert!(error[0].contains("not in the valid range. The range of valid IPs is 10.96.0.0/16"), "{error:?}");
        }
    }

    #[test]
    fn headless_and_external_names_have_no_address() {
        for spec in
            [json!({"type": "ClusterIP", "clusterIP": "None"}), json!({"type": "ExternalName", "externalName": "a"})]
        {
            assert_eq!(allocated(&Allocations::default(), spec.clone(), 0), Ok(spec));
        }
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
        let many: Vec<_> = (1..5).map(|p| json!({"port": p})).collect();
        let error = allocated(&taken, json!({"type": "NodePort", "ports": many}), 0).unwrap_err();
        assert_eq!(error, ["spec.ports[3].nodePort: Invalid value: 0: failed to allocate a nodePort: range is full"]);
    }

    #[test]
    fn what_a_service_gives_back_is_free_unless_another_has_it_too() {
        let one = service(json!({"clusterIP": "10.96.0.9", "ports": [{"nodePort": 30001}, {"nodePort": 30001}]}));
        let mut all = Allocations::default();
        all.add(&one);
        let mut taken = Taken::by(&all);
        assert!(taken.has_address(Ipv4Addr::new(10, 96, 0, 9)) && taken.has_port(30001));
        taken.remove(&one);
        assert!(!taken.has_address(Ipv4Addr::new(10, 96, 0, 9)) && !taken.has_port(30001));
        all.add(&one);
        all.remove(&one);
        assert!(Taken::by(&all).has_port(30001));
        all.remove(&one);
        assert!(all.addresses.is_empty() && all.node_ports.is_empty());
    }
}
