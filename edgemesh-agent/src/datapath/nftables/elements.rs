//! From one frontend with where it leads to the elements that the table's maps must have for it.

use std::{
    collections::BTreeMap,
    hash::{Hash, Hasher},
    net::{IpAddr, SocketAddr},
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

/// Two IPv6 addresses.
const LONGEST: usize = 32;

/// A key, or a value that is no chain: what is looked up in one, joined as the kernel joins it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub(super) struct Joined {
    bytes: [u8; LONGEST],
    length: usize,
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

    fn backend(backend: SocketAddr) -> Self {
        Self::default().address(backend.ip()).port(backend.port())
    }

    pub(super) fn as_bytes(&self) -> &[u8] {
        self.bytes.get(..self.length).unwrap_or_default()
    }
}

/// What a map holds for a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Value {
    Joined(Joined),
    Goto(Chain),
}

/// An element: its key, and its value if the map is no set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Element {
    pub(super) map: Map,
    pub(super) key: Joined,
    pub(super) value: Option<Value>,
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
        add(Map::Closed(family), Joined::default().address(address.ip()).protocol(protocol), None);
        return needs;
    }
    // A packet from 127.0.0.1 can't leave the host, and one that is sent to a pod would have to. What nobody listens on is
    // refused by the host itself.
    let stays_here = matches!(target, OutsideTarget::Target(Target::Listener(_)));
    if address.ip().is_loopback() && !stays_here {
        return needs;
    }
    let key = Joined::frontend(place, frontend);
    let to = |backend| Some(Value::Joined(Joined::backend(backend)));
    let chain = match target {
        OutsideTarget::Drop => Chain::Drop,
        OutsideTarget::Target(target) if target.backends().is_empty() => Chain::Refuse,
        OutsideTarget::Target(Target::Sticky(backends, timeout)) => {
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
        OutsideTarget::Target(target) => {
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
        assert_eq!(Joined::default().address(six).address(six).as_bytes(), [7; LONGEST]);
    }

    #[test]
    fn a_frontend_leads_to_the_chain_for_its_number_of_backends() {
        let target = Target::Direct(backends(&["10.244.1.5:8080", "10.244.1.6:8080"]));
        let key = Joined::default().address([10, 96, 0, 20].into()).protocol(Tcp).port(80);
        let expected = [
            element(Map::Backends(Inside, V4), key.priority(0), to("10.244.1.5:8080")),
            element(Map::Backends(Inside, V4), key.priority(1), to("10.244.1.6:8080")),
            element(Map::Frontends(Inside, V4), key, Value::Goto(Chain::Direct(Inside, V4, 2))),
        ];
        assert_eq!(elements(Inside, tcp("10.96.0.20:80"), target), expected);
        let six = Target::Direct(backends(&["[fd00::5]:8080"]));
        let node_port = Joined::default().protocol(Tcp).port(30080);
        let expected = [
            element(Map::Backends(NodePort, V6), node_port.priority(0), to("[fd00::5]:8080")),
            element(Map::Frontends(NodePort, V6), node_port, Value::Goto(Chain::Direct(NodePort, V6, 1))),
        ];
        assert_eq!(elements(NodePort, tcp("[::]:30080"), six), expected);
        let udp = Frontend { protocol: Udp, ..tcp("10.96.0.20:80") };
        let key = Joined::default().address([10, 96, 0, 20].into()).protocol(Udp).port(80);
        let refused = element(Map::Frontends(Inside, V4), key, Value::Goto(Chain::Refuse));
        assert_eq!(elements(Inside, udp, Target::Refuse), [refused]);
        let key = Joined::default().address([10, 96, 0, 20].into()).protocol(Tcp);
        let closed = Element { map: Map::Closed(V4), key, value: None };
        assert_eq!(elements(Inside, tcp("10.96.0.20:0"), Target::Refuse), [closed]);
    }

    #[test]
    fn what_can_not_leave_the_host_is_left_to_it() {
        let pod = Target::Direct(backends(&["10.244.1.5:8080"]));
        assert!(elements(Inside, tcp("127.0.0.1:30080"), pod).is_empty());
        let ours = Target::Listener(at("169.254.77.12:15001"));
        assert_eq!(elements(Inside, tcp("127.0.0.1:30080"), ours).len(), 2);
    }

    #[test]
    fn backends_that_clients_keep_have_the_same_number_in_every_set() {
        let timeout = Duration::from_secs(7);
        let sticky = |list: &[&str]| elements(Inside, tcp("10.96.0.20:80"), Target::Sticky(backends(list), timeout));
        let (one, two) = (sticky(&["10.244.1.5:8080"]), sticky(&["10.244.1.6:8080", "10.244.1.5:8080"]));
        assert_eq!(one[3].value, Some(Value::Goto(Chain::Sticky(Inside, V4, 1, timeout))));
        let kept = |all: &[Element]| *all.iter().find(|element| element.value == Some(to("10.244.1.5:8080"))).unwrap();
        assert_eq!(kept(&one), kept(&two));
        assert_eq!(two.len(), 1 + 3 * 2);
    }
}
