//! From one frontend with where it leads to the elements that the table's maps must have for it.

use std::{
    collections::BTreeMap,
    hash::{Hash, Hasher},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use edgemesh_mesh::model::Protocol;

use super::{
    super::{
        outside::OutsideTarget,
        plan::{Frontend, Target},
    },
    ruleset::{Chain, Family, Map, Place},
};
use crate::datapath::tables::protocol_number;

/// Two IPv6 addresses, a protocol and a port.
const LONGEST: usize = 40;

/// A key, or a value that is no chain: what is looked up in one, joined as the kernel joins it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Joined {
    bytes: [u8; LONGEST],
    length: usize,
}

impl Default for Joined {
    fn default() -> Self {
        Self { bytes: [0; LONGEST], length: 0 }
    }
}

impl Joined {
    fn with(mut self, part: &[u8]) -> Self {
        if let Some(place) = self.bytes.get_mut(self.length..self.length + part.len()) {
            place.copy_from_slice(part);
            // A part begins in a register of its own, of four bytes.
            self.length += part.len().next_multiple_of(4);
        }
        self
    }

    pub(super) fn address(self, address: IpAddr) -> Self {
        match address {
            IpAddr::V4(address) => self.with(&address.octets()),
            IpAddr::V6(address) => self.with(&address.octets()),
        }
    }

    fn protocol(self, protocol: Protocol) -> Self {
        self.with(&[protocol_number(protocol)])
    }

    fn port(self, port: u16) -> Self {
        self.with(&port.to_be_bytes())
    }

    /// A number in the form of a packet's priority.
    fn priority(self, number: u32) -> Self {
        self.with(&number.to_ne_bytes())
    }

    fn frontend(place: Place, Frontend { address, protocol }: Frontend) -> Self {
        let called = match place {
            Place::Inside | Place::Outside => Self::default().address(address.ip()),
            Place::NodePort => Self::default(),
        };
        called.protocol(protocol).port(address.port())
    }

    /// The frontend that is counted under a key of a map.
    pub(super) fn counted_at(&self, map: Map) -> Option<Frontend> {
        let (family, has_address, has_port) = match map {
            Map::Sent(place, family) | Map::Refused(place, family) => (family, place != Place::NodePort, true),
            Map::ClosedRefused(family) => (family, true, false),
            _ => return None,
        };
        let mut rest = self.as_bytes();
        let ip = match (family, has_address) {
            (_, true) => take_address(&mut rest, family)?,
            (Family::V4, false) => Ipv4Addr::UNSPECIFIED.into(),
            (Family::V6, false) => Ipv6Addr::UNSPECIFIED.into(),
        };
        let number = *rest.split_off(..4)?.first()?;
        let protocol = [Protocol::Tcp, Protocol::Udp].into_iter().find(|known| protocol_number(*known) == number)?;
        let port = if has_port { take_port(&mut rest)? } else { 0 };
        Some(Frontend { address: SocketAddr::new(ip, port), protocol })
    }

    /// The address and port that it begins with.
    pub(super) fn to_backend(self, family: Family) -> Option<SocketAddr> {
        let mut rest = self.as_bytes();
        Some(SocketAddr::new(take_address(&mut rest, family)?, take_port(&mut rest)?))
    }

    fn backend(backend: SocketAddr) -> Self {
        Self::default().address(backend.ip()).port(backend.port())
    }

    pub(super) fn from_bytes(bytes: &[u8]) -> Self {
        Self::default().with(bytes)
    }

    pub(super) fn as_bytes(&self) -> &[u8] {
        self.bytes.get(..self.length).unwrap_or_default()
    }
}

fn take_address(rest: &mut &[u8], family: Family) -> Option<IpAddr> {
    Some(match family {
        Family::V4 => <[u8; 4]>::try_from(rest.split_off(..4)?).ok()?.into(),
        Family::V6 => <[u8; 16]>::try_from(rest.split_off(..16)?).ok()?.into(),
    })
}

fn take_port(rest: &mut &[u8]) -> Option<u16> {
    rest.split_off(..4)?.first_chunk().copied().map(u16::from_be_bytes)
}

/// What a map holds for a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Value {
    Joined(Joined),
    Goto(Chain),
    /// Of a range, whose first key the key is: the last one.
    Last(Joined),
}

/// An element: its key, and its value if the map is no set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Element {
    pub(super) map: Map,
    pub(super) key: Joined,
    pub(super) value: Option<Value>,
}

impl Element {
    /// What is deleted: a value is no part of it.
    pub(super) fn without_value(self) -> Self {
        Self { value: self.value.filter(|value| matches!(value, Value::Last(_))), ..self }
    }
}

/// What one frontend needs.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Needs {
    pub(super) elements: Vec<Element>,
    /// The chain that it leads to.
    pub(super) chain: Option<Chain>,
}

/// The elements of a frontend.
pub(super) fn of(place: Place, frontend: Frontend, target: &OutsideTarget) -> Needs {
    let mut needs = Needs::default();
    let Frontend { address, protocol } = frontend;
    let family = Family::from(address.ip());
    let mut add = |map, key, value| needs.elements.push(Element { map, key, value });
    if address.port() == 0 {
        let key = Joined::default().address(address.ip()).protocol(protocol);
        add(Map::Closed(family), key, None);
        add(Map::ClosedRefused(family), key, None);
        return needs;
    }
    // A packet from 127.0.0.1 can't leave the host, and one that is sent to a pod would have to. What nobody listens on is
    // refused by the host itself.
    let stays_here = matches!(target.target(), Some(Target::Listener(_)));
    if address.ip().is_loopback() && !stays_here {
        return needs;
    }
    let key = Joined::frontend(place, frontend);
    // They stay while endpoints come and go, so that counts do. What is sent to the agent is counted there.
    add(Map::Refused(place, family), key, None);
    if !stays_here {
        add(Map::Sent(place, family), key, None);
    }
    let to = |backend| Some(Value::Joined(Joined::backend(backend)));
    if let OutsideTarget::Within(sources, _) = target {
        add(Map::Guarded(family), key, None);
        for range in sources.iter().filter(|range| Family::from(range.network()) == family) {
            add(Map::Sources(family), key.address(range.network()), Some(Value::Last(key.address(range.last()))));
        }
    }
    let chain = match target.target() {
        None => Chain::Drop,
        Some(target) if target.backends().is_empty() => Chain::Refuse(place, family),
        Some(Target::Sticky(backends, timeout)) => {
            let mut numbers = BTreeMap::new();
            for (&backend, index) in backends.iter().zip(0..) {
                let number = number_of(backend, &mut numbers);
                let choice = Value::Joined(Joined::default().priority(number));
                add(Map::Choices(place, family), key.priority(index), Some(choice));
                add(Map::Kept(place, family), key.priority(number), to(backend));
                add(Map::Live(place, family), key.priority(number), None);
            }
            Chain::Sticky(place, family, backends.len(), *timeout)
        }
        Some(target) => {
            let backends = target.backends();
            for (&backend, index) in backends.iter().zip(0..) {
                add(Map::Backends(place, family), key.priority(index), to(backend));
            }
            Chain::Direct(place, family, backends.len())
        }
    };
    add(Map::Frontends(place, family), key, Some(Value::Goto(chain)));
    needs.chain = Some(chain);
    needs
}

/// The number of a backend. It comes from the address alone, so that the next agent gives it the same and clients keep their
/// backends; never 0, which is no number.
fn number_of(backend: SocketAddr, taken: &mut BTreeMap<u32, SocketAddr>) -> u32 {
    // Fixed keys, so that every process agrees.
    #[allow(deprecated)]
    let mut hasher = std::hash::SipHasher::new();
    backend.hash(&mut hasher);
    let mut number = (hasher.finish() as u32).max(1);
    while taken.get(&number).is_some_and(|other| *other != backend) {
        number = number.wrapping_add(1).max(1);
    }
    taken.insert(number, backend);
    number
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use Family::{V4, V6};
    use Place::{Inside, NodePort};
    use edgemesh_mesh::model::Protocol::{Tcp, Udp};

    use super::*;

    fn at(address: &str) -> SocketAddr {
        address.parse().unwrap()
    }

    fn tcp(address: &str) -> Frontend {
        Frontend { address: at(address), protocol: Tcp }
    }

    fn elements(place: Place, frontend: Frontend, target: Target) -> Vec<Element> {
        of(place, frontend, &OutsideTarget::Target(target)).elements
    }

    fn element(map: Map, key: Joined, value: Value) -> Element {
        Element { map, key, value: Some(value) }
    }

    fn to(backend: &str) -> Value {
        Value::Joined(Joined::backend(at(backend)))
    }

    fn backends(texts: &[&str]) -> Vec<SocketAddr> {
        texts.iter().map(|text| at(text)).collect()
    }

    #[test]
    fn parts_are_joined_as_the_kernel_has_them_in_registers() {
        let key = Joined::frontend(Inside, tcp("10.96.0.20:443")).priority(0x1_0002);
        let number = 0x1_0002_u32.to_ne_bytes();
        assert_eq!(key.as_bytes(), [&[10, 96, 0, 20, 6, 0, 0, 0, 1, 187, 0, 0], &number[..]].concat());
        assert_eq!(Joined::frontend(NodePort, tcp("0.0.0.0:443")).as_bytes(), [6, 0, 0, 0, 1, 187, 0, 0]);
        let six = IpAddr::from([7; 16]);
        assert_eq!(Joined::default().address(six).address(six).as_bytes(), [7; 32]);
    }

    #[test]
    fn a_frontend_leads_to_the_chain_for_its_number_of_backends() {
        let target = Target::Direct(backends(&["10.244.1.5:8080", "10.244.1.6:8080"]));
        let key = Joined::default().address([10, 96, 0, 20].into()).protocol(Tcp).port(80);
        let in_set = |map, key| Element { map, key, value: None };
        let expected = [
            in_set(Map::Refused(Inside, V4), key),
            in_set(Map::Sent(Inside, V4), key),
            element(Map::Backends(Inside, V4), key.priority(0), to("10.244.1.5:8080")),
            element(Map::Backends(Inside, V4), key.priority(1), to("10.244.1.6:8080")),
            element(Map::Frontends(Inside, V4), key, Value::Goto(Chain::Direct(Inside, V4, 2))),
        ];
        assert_eq!(elements(Inside, tcp("10.96.0.20:80"), target), expected);
        let six = Target::Direct(backends(&["[fd00::5]:8080"]));
        let node_port = Joined::default().protocol(Tcp).port(30080);
        let expected = [
            in_set(Map::Refused(NodePort, V6), node_port),
            in_set(Map::Sent(NodePort, V6), node_port),
            element(Map::Backends(NodePort, V6), node_port.priority(0), to("[fd00::5]:8080")),
            element(Map::Frontends(NodePort, V6), node_port, Value::Goto(Chain::Direct(NodePort, V6, 1))),
        ];
        assert_eq!(elements(NodePort, tcp("[::]:30080"), six), expected);
        let udp = Frontend { protocol: Udp, ..tcp("10.96.0.20:80") };
        let key = Joined::default().address([10, 96, 0, 20].into()).protocol(Udp).port(80);
        let refused = element(Map::Frontends(Inside, V4), key, Value::Goto(Chain::Refuse(Inside, V4)));
        let counts = [Map::Refused(Inside, V4), Map::Sent(Inside, V4)].map(|map| in_set(map, key));
        assert_eq!(elements(Inside, udp, Target::Refuse), [counts[0], counts[1], refused]);
        let key = Joined::default().address([10, 96, 0, 20].into()).protocol(Tcp);
        let closed = [Map::Closed(V4), Map::ClosedRefused(V4)].map(|map| in_set(map, key));
        assert_eq!(elements(Inside, tcp("10.96.0.20:0"), Target::Refuse), closed);
    }

    #[test]
    fn a_key_that_counts_leads_back_to_its_frontend() {
        let direct = || Target::Direct(backends(&["10.244.1.5:8080"]));
        for (place, address) in [
            (Inside, "10.96.0.20:443"),
            (Place::Outside, "[fd00:96::20]:443"),
            (NodePort, "0.0.0.0:30080"),
            (NodePort, "[::]:30080"),
            (Inside, "10.96.0.20:0"),
            (Inside, "[fd00:96::20]:0"),
        ] {
            let frontend = Frontend { protocol: Udp, ..tcp(address) };
            let mut elements = elements(place, frontend, direct());
            elements.retain(|element| element.map.counts());
            assert!(!elements.is_empty());
            for Element { map, key, .. } in elements {
                assert_eq!(Joined::from_bytes(key.as_bytes()).counted_at(map), Some(frontend), "{map}");
                assert_eq!(Joined::from_bytes(&key.as_bytes()[4..]).counted_at(map), None, "{map}");
            }
        }
    }

    #[test]
    fn what_can_not_leave_the_host_is_left_to_it() {
        let pod = Target::Direct(backends(&["10.244.1.5:8080"]));
        assert!(elements(Inside, tcp("127.0.0.1:30080"), pod).is_empty());
        let ours = Target::Listener(at("169.254.77.12:15001"));
        let ours = elements(Inside, tcp("127.0.0.1:30080"), ours);
        assert_eq!(ours.len(), 3);
        assert!(!ours.iter().any(|element| matches!(element.map, Map::Sent(..))), "the agent counts it");
    }

    #[test]
    fn backends_that_clients_keep_have_the_same_number_in_every_set() {
        let timeout = Duration::from_secs(7);
        let sticky = |list: &[&str]| elements(Inside, tcp("10.96.0.20:80"), Target::Sticky(backends(list), timeout));
        let (one, two) = (sticky(&["10.244.1.5:8080"]), sticky(&["10.244.1.6:8080", "10.244.1.5:8080"]));
        assert_eq!(one[5].value, Some(Value::Goto(Chain::Sticky(Inside, V4, 1, timeout))));
        let kept = |all: &[Element]| *all.iter().find(|element| element.value == Some(to("10.244.1.5:8080"))).unwrap();
        assert_eq!(kept(&one), kept(&two));
        assert_eq!(two.len(), 3 + 3 * 2);
    }
}
