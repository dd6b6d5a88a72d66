//! From one frontend with where it leads to the elements that the table's maps must have for it.

use std::{
    collections::BTreeMap,
    hash::{Hash, Hasher},
    net::SocketAddr,
};

use super::{
    super::{
        outside::OutsideTarget,
        plan::{Frontend, Target},
    },
    ruleset::{Chain, Family, Map, Place, element_key},
};
use crate::datapath::tables::protocol_number;

/// An element: its key, and its value if the map is no set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Element {
    pub(super) map: Map,
    pub(super) key: String,
    pub(super) value: Option<String>,
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
    if address.port() == 0 {
        let key = format!("{} . {}", address.ip(), protocol_number(protocol));
        needs.elements.push(Element { map: Map::Closed(family), key, value: None });
        return needs;
    }
    // A packet from 127.0.0.1 can't leave the host, and one that is sent to a pod would have to. What nobody listens on is
    // refused by the host itself.
    let stays_here = matches!(target, OutsideTarget::Target(Target::Listener(_)));
    if address.ip().is_loopback() && !stays_here {
        return needs;
    }
    let key = element_key(place, address, protocol);
    let mut add = |map, key, value| needs.elements.push(Element { map, key, value });
    let chain = match target {
        OutsideTarget::Drop => Chain::Drop,
        OutsideTarget::Target(target) if target.backends().is_empty() => Chain::Refuse,
        OutsideTarget::Target(Target::Sticky(backends, timeout)) => {
            let mut numbers = BTreeMap::new();
            for (index, &backend) in backends.iter().enumerate() {
                let number = number_of(backend, &mut numbers);
                add(Map::Choices(place, family), format!("{key} . {}", priority(index as u32)), Some(number.clone()));
                let numbered = format!("{key} . {number}");
                add(Map::Kept(place, family), numbered.clone(), Some(element_value(backend)));
                add(Map::Live(place, family), numbered, None);
            }
            Chain::Sticky(place, family, backends.len(), *timeout)
        }
        OutsideTarget::Target(target) => {
            let backends = target.backends();
            for (index, &backend) in backends.iter().enumerate() {
                add(
                    Map::Backends(place, family),
                    format!("{key} . {}", priority(index as u32)),
                    Some(element_value(backend)),
                );
            }
            Chain::Direct(place, family, backends.len())
        }
    };
    add(Map::Frontends(place, family), key, Some(format!("goto {chain}")));
    needs.chain = Some(chain);
    needs
}

fn element_value(backend: SocketAddr) -> String {
    format!("{} . {}", backend.ip(), backend.port())
}

/// The number of a backend, in the form of a packet priority. It comes from the address alone, so that the next agent
/// gives it the same and clients keep their backends; never 0, which is no number.
fn number_of(backend: SocketAddr, taken: &mut BTreeMap<u32, SocketAddr>) -> String {
    // Fixed keys, so that every process agrees.
    #[allow(deprecated)]
    let mut hasher = std::hash::SipHasher::new();
    backend.hash(&mut hasher);
    let mut number = (hasher.finish() as u32).max(1);
    while taken.get(&number).is_some_and(|other| *other != backend) {
        number = number.wrapping_add(1).max(1);
    }
    taken.insert(number, backend);
    priority(number)
}

/// A number as nft writes a packet's priority.
fn priority(number: u32) -> String {
    format!("{:x}:{:x}", number >> 16, number & 0xffff)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use edgemesh_mesh::model::Protocol::{Tcp, Udp};

    use super::*;

    fn tcp(address: &str) -> Frontend {
        Frontend { address: address.parse().unwrap(), protocol: Tcp }
    }

    fn elements(place: Place, frontend: Frontend, target: Target) -> Vec<String> {
        let needs = of(place, frontend, &OutsideTarget::Target(target));
        let text = |Element { map, key, value }: Element| match value {
            Some(value) => format!("{map} {key} : {value}"),
            None => format!("{map} {key}"),
        };
        needs.elements.into_iter().map(text).collect()
    }

    fn backends(texts: &[&str]) -> Vec<SocketAddr> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn a_frontend_leads_to_the_chain_for_its_number_of_backends() {
        let target = Target::Direct(backends(&["10.244.1.5:8080", "10.244.1.6:8080"]));
        let expected = [
            "services4_backends 10.96.0.20 . 6 . 80 . 0:0 : 10.244.1.5 . 8080",
            "services4_backends 10.96.0.20 . 6 . 80 . 0:1 : 10.244.1.6 . 8080",
            "services4 10.96.0.20 . 6 . 80 : goto services4_of_2",
        ];
        assert_eq!(elements(Place::Inside, tcp("10.96.0.20:80"), target), expected);
        let six = Target::Direct(backends(&["[fd00::5]:8080"]));
        let expected =
            ["nodeports6_backends 6 . 30080 . 0:0 : fd00::5 . 8080", "nodeports6 6 . 30080 : goto nodeports6_of_1"];
        assert_eq!(elements(Place::NodePort, tcp("[::]:30080"), six), expected);
        let udp = Frontend { protocol: Udp, ..tcp("10.96.0.20:80") };
        assert_eq!(elements(Place::Inside, udp, Target::Refuse), ["services4 10.96.0.20 . 17 . 80 : goto refuse"]);
        assert_eq!(elements(Place::Inside, tcp("10.96.0.20:0"), Target::Refuse), ["closed4 10.96.0.20 . 6"]);
    }

    #[test]
    fn what_can_not_leave_the_host_is_left_to_it() {
        let pod = Target::Direct(backends(&["10.244.1.5:8080"]));
        assert!(elements(Place::Inside, tcp("127.0.0.1:30080"), pod).is_empty());
        let ours = Target::Listener("169.254.77.12:15001".parse().unwrap());
        assert_eq!(elements(Place::Inside, tcp("127.0.0.1:30080"), ours).len(), 2);
    }

    #[test]
    fn backends_that_clients_keep_have_the_same_number_in_every_set() {
        let sticky = |list: &[&str]| {
            let target = Target::Sticky(backends(list), Duration::from_secs(7));
            elements(Place::Inside, tcp("10.96.0.20:80"), target)
        };
        let (one, two) = (sticky(&["10.244.1.5:8080"]), sticky(&["10.244.1.6:8080", "10.244.1.5:8080"]));
        assert_eq!(one[3], "services4 10.96.0.20 . 6 . 80 : goto services4_of_1_for_7s");
        let kept = |all: &[String]| all.iter().find(|text| text.ends_with("10.244.1.5 . 8080")).cloned().unwrap();
        assert_eq!(kept(&one), kept(&two));
        assert_eq!(two.len(), 1 + 3 * 2);
    }
}
