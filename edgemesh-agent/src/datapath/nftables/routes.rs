//! Routes of Service addresses for processes of this host: the table translates what they send, but only if the kernel has
//! a route to begin with. A node that lost its uplink has no default route.
//!
//! Two routing tables of our own: one that is asked when no other has a route, and leads to the loopback interface; one
//! that is asked first, and holds the addresses that are refused altogether, since an error on the way back of a packet
//! that connect() is still sending would be lost.

use std::{
    collections::{HashMap, HashSet},
    fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::Path,
    process::{Command, Stdio},
};

use super::super::netlink::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE, Netlink, Request, attribute, attributes};
use crate::routes::PROTOCOL;

const RTM_NEWROUTE: u16 = 24;
const RTM_DELROUTE: u16 = 25;
const RTM_GETROUTE: u16 = 26;
const RTM_NEWRULE: u16 = 32;
const RTM_DELRULE: u16 = 33;
const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_TABLE: u16 = 15;
const FRA_PRIORITY: u16 = 6;
const FRA_TABLE: u16 = 15;
const FRA_PROTOCOL: u16 = 21;
const RTN_UNICAST: u8 = 1;
const RTN_UNREACHABLE: u8 = 7;
const SCOPE_LINK: u8 = 253;
const TO_TABLE: u8 = 1;
/// Length of `struct rtmsg` and of `struct fib_rule_hdr`.
const FIXED: usize = 12;
const LOOPBACK: u32 = 1;
/// The kernel asks its own tables at 0 (local), 32766 (main) and 32767 (default).
const REFUSED: OwnTable = OwnTable { id: 17_600, priority: 30_176 };
const SERVED: OwnTable = OwnTable { id: 17_601, priority: 32_800 };
const BRIDGE: &str = "/proc/sys/net/bridge";

#[derive(Debug, Clone, Copy)]
struct OwnTable {
    id: u32,
    priority: u32,
}

/// What a route says of a Service address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum State {
    Served,
    Refused,
}

impl State {
    fn table(self) -> OwnTable {
        match self {
            Self::Served => SERVED,
            Self::Refused => REFUSED,
        }
    }
}

/// What becomes of calls at a frontend.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Called {
    /// They are led to endpoints.
    Served,
    /// They are refused.
    Refused,
    /// It stands for all ports that its address has no other frontend for: the address is a Service's as a whole.
    Closed,
}

/// How many frontends of each kind an address has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Frontends {
    served: usize,
    refused: usize,
    closed: usize,
}

impl Frontends {
    fn change(&mut self, called: Called, by: isize) {
        let count = match called {
            Called::Served => &mut self.served,
            Called::Refused => &mut self.refused,
            Called::Closed => &mut self.closed,
        };
        *count = count.saturating_add_signed(by);
    }

    /// The route that the address needs. One at which nothing else may be called can be refused as a whole; a load balancer's can be
    /// another host's, with more ports than the Service's, and then only the rules refuse.
    fn state(self) -> Option<State> {
        match self {
            Self { served: 0, refused: 0, .. } => None,
            Self { served: 0, closed: 1.., .. } => Some(State::Refused),
            _ => Some(State::Served),
        }
    }
}

/// The routes, and what asks for them.
#[derive(Debug)]
pub(super) struct ServiceRoutes {
    netlink: Netlink,
    frontends: HashMap<IpAddr, Frontends>,
    /// What is in the kernel.
    present: HashSet<(IpAddr, State)>,
    /// What may differ.
    touched: HashSet<IpAddr>,
}

impl ServiceRoutes {
    /// Has the tables asked, and knows what an earlier agent left in them.
    pub(super) fn open() -> io::Result<Self> {
        let mut netlink = Netlink::open(libc::NETLINK_ROUTE)?;
        have_tables_asked(&mut netlink)?;
        let present = list(&mut netlink)?;
        let touched = present.iter().map(|(address, _)| *address).collect();
        Ok(Self { netlink, frontends: HashMap::new(), present, touched })
    }

    /// What becomes of calls at a frontend of an address, before and now, unless it is absent.
    pub(super) fn exchange(&mut self, address: IpAddr, old: Option<Called>, new: Option<Called>) {
        let frontends = self.frontends.entry(address).or_default();
        if let Some(called) = old {
            frontends.change(called, -1);
        }
        if let Some(called) = new {
            frontends.change(called, 1);
        }
        if *frontends == Frontends::default() {
            self.frontends.remove(&address);
        }
        self.touched.insert(address);
    }

    /// Has the tables asked again, which others can have put an end to, and writes what could not be written.
    pub(super) fn renew(&mut self) -> io::Result<()> {
        have_tables_asked(&mut self.netlink)?;
        self.write()
    }

    /// Brings the kernel's routes to what was exchanged.
    pub(super) fn write(&mut self) -> io::Result<()> {
        let mut changes = Vec::new();
        for &address in &self.touched {
            let wanted = self.frontends.get(&address).and_then(|frontends| frontends.state());
            for state in [State::Served, State::Refused] {
                let (is, shall) = (self.present.contains(&(address, state)), wanted == Some(state));
                if is != shall {
                    changes.push(((address, state), shall));
                }
            }
        }
        // What is new comes first: an address that is served, or refused, has a route at any moment.
        changes.sort_by_key(|(_, shall)| !shall);
        let requests: Vec<Request> = changes
            .iter()
            .map(|&((address, state), shall)| {
                let (kind, flags) =
                    if shall { (RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE) } else { (RTM_DELROUTE, 0) };
                Request { kind, flags, body: route(address, state) }
            })
            .collect();
        let outcomes = self.netlink.send(&requests)?;
        self.touched.clear();
        let mut failed = Ok(());
        for (outcome, (entry, shall)) in outcomes.into_iter().zip(changes) {
            match outcome {
                Err(error) if shall => {
                    self.touched.insert(entry.0);
                    failed = Err(error);
                }
                // A route that vanished by itself is as good as removed.
                _ if shall => drop(self.present.insert(entry)),
                _ => drop(self.present.remove(&entry)),
            }
        }
        failed
    }
}

/// Removes all routes and rules of ours that are for Service addresses.
pub(super) fn remove_all() -> io::Result<()> {
    let mut netlink = Netlink::open(libc::NETLINK_ROUTE)?;
    let routes = list(&mut netlink)?;
    let gone = routes.into_iter().map(|(address, state)| (RTM_DELROUTE, route(address, state)));
    let all = gone.chain(rules().map(|body| (RTM_DELRULE, body)));
    send_all(&mut netlink, all.map(|(kind, body)| Request { kind, flags: 0, body }).collect())
}

/// Has our tables asked, whether they are already or not.
fn have_tables_asked(netlink: &mut Netlink) -> io::Result<()> {
    let flags = NLM_F_CREATE | NLM_F_EXCL;
    send_all(netlink, rules().map(|body| Request { kind: RTM_NEWRULE, flags, body }).collect())
}

/// Sends requests of which none may fail.
fn send_all(netlink: &mut Netlink, requests: Vec<Request>) -> io::Result<()> {
    let outcomes = netlink.send(&requests)?;
    requests.iter().zip(outcomes).try_for_each(|(request, outcome)| match outcome {
        Err(error) if !is_done_anyway(request, &error) => Err(error),
        _ => Ok(()),
    })
}

/// Whether what was asked for is as it shall be though the kernel refused: it is there already, or gone, or of a family that this
/// kernel doesn't have.
fn is_done_anyway(request: &Request, error: &io::Error) -> bool {
    match error.raw_os_error() {
        Some(libc::EEXIST) => request.kind == RTM_NEWRULE,
        Some(libc::ENOENT | libc::ESRCH) => request.kind != RTM_NEWRULE,
        Some(libc::EAFNOSUPPORT) => request.body.first() == Some(&(libc::AF_INET6 as u8)),
        _ => false,
    }
}

/// Our rules, as bodies of requests.
fn rules() -> impl Iterator<Item = Vec<u8>> {
    [libc::AF_INET as u8, libc::AF_INET6 as u8].into_iter().flat_map(|family| {
        [REFUSED, SERVED].map(|table| {
            let mut body = vec![family, 0, 0, 0, 0, 0, 0, TO_TABLE, 0, 0, 0, 0];
            attribute(&mut body, FRA_PRIORITY, &table.priority.to_ne_bytes());
            attribute(&mut body, FRA_TABLE, &table.id.to_ne_bytes());
            attribute(&mut body, FRA_PROTOCOL, &[PROTOCOL.into()]);
            body
        })
    })
}

fn route(address: IpAddr, state: State) -> Vec<u8> {
    let (family, octets): (_, Vec<u8>) = match address {
        IpAddr::V4(address) => (libc::AF_INET as u8, address.octets().to_vec()),
        IpAddr::V6(address) => (libc::AF_INET6 as u8, address.octets().to_vec()),
    };
    let (scope, kind) = match (state, address) {
        (State::Served, IpAddr::V4(_)) => (SCOPE_LINK, RTN_UNICAST),
        (State::Served, IpAddr::V6(_)) => (0, RTN_UNICAST),
        (State::Refused, _) => (0, RTN_UNREACHABLE),
    };
    let mut body = vec![family, (octets.len() * 8) as u8, 0, 0, 0, PROTOCOL.into(), scope, kind, 0, 0, 0, 0];
    attribute(&mut body, RTA_DST, &octets);
    attribute(&mut body, RTA_TABLE, &state.table().id.to_ne_bytes());
    if state == State::Served {
        attribute(&mut body, RTA_OIF, &LOOPBACK.to_ne_bytes());
    }
    body
}

/// The routes in our tables.
fn list(netlink: &mut Netlink) -> io::Result<HashSet<(IpAddr, State)>> {
    let mut found = HashSet::new();
    for family in [libc::AF_INET as u8, libc::AF_INET6 as u8] {
        let mut body = [0; FIXED];
        body[0] = family;
        netlink.dump(RTM_GETROUTE, &body, |body| found.extend(read(body)))?;
    }
    Ok(found)
}

fn read(body: &[u8]) -> Option<(IpAddr, State)> {
    let (mut address, mut state) = (None, None);
    for (kind, value) in attributes(body.get(FIXED..)?) {
        match kind {
            RTA_DST => {
                let four = <[u8; 4]>::try_from(value).map(|octets| IpAddr::V4(Ipv4Addr::from(octets)));
                address = four.ok().or_else(|| Some(Ipv6Addr::from(<[u8; 16]>::try_from(value).ok()?).into()));
            }
            RTA_TABLE => {
                let id = u32::from_ne_bytes(value.try_into().ok()?);
                state = [State::Served, State::Refused].into_iter().find(|state| state.table().id == id);
            }
            _ => {}
        }
    }
    Some((address?, state?))
}

/// Has bridged packets pass the hooks of the addresses' families. Returns whether they do.
pub(super) fn let_bridged_answers_pass() -> bool {
    if !Path::new(BRIDGE).exists() {
        // It may be built in, or loaded by another program's user only.
        let _ = Command::new("modprobe").arg("br_netfilter").stdout(Stdio::null()).stderr(Stdio::null()).status();
    }
    ["bridge-nf-call-iptables", "bridge-nf-call-ip6tables"].iter().all(|name| {
        let path = Path::new(BRIDGE).join(name);
        let is_on = || fs::read_to_string(&path).is_ok_and(|value| value.trim() == "1");
        is_on() || (fs::write(&path, "1").is_ok() && is_on()) || {
            tracing::info!(path = %path.display(), "not on: pods of this node that call one another through a Service seem to be the node");
            false
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_route_is_read_as_it_is_written() {
        for entry in [
            ("10.96.0.20", State::Served),
            ("10.96.0.21", State::Refused),
            ("fd00::1", State::Served),
            ("fd00::2", State::Refused),
        ] {
            let (address, state) = (entry.0.parse().unwrap(), entry.1);
            assert_eq!(read(&route(address, state)), Some((address, state)));
        }
        assert_eq!(read(&[0; FIXED]), None);
    }

    #[test]
    fn a_kernel_without_ipv6_is_no_reason_to_leave_ipv4_alone() {
        let done = |kind, family: i32, error| {
            let request = Request { kind, flags: 0, body: vec![family as u8] };
            is_done_anyway(&request, &io::Error::from_raw_os_error(error))
        };
        for kind in [RTM_NEWRULE, RTM_DELRULE] {
            assert!(done(kind, libc::AF_INET6, libc::EAFNOSUPPORT));
            assert!(!done(kind, libc::AF_INET, libc::EAFNOSUPPORT));
            assert!(!done(kind, libc::AF_INET, libc::EPERM));
        }
        assert!(done(RTM_NEWRULE, libc::AF_INET, libc::EEXIST) && !done(RTM_DELRULE, libc::AF_INET, libc::EEXIST));
        assert!(done(RTM_DELROUTE, libc::AF_INET, libc::ESRCH) && !done(RTM_NEWRULE, libc::AF_INET, libc::ENOENT));
    }

    #[test]
    fn an_address_is_unreachable_only_if_no_other_port_of_it_can_be_anothers() {
        let state = |served, refused, closed| Frontends { served, refused, closed }.state();
        assert_eq!(state(0, 2, 2), Some(State::Refused));
        assert_eq!(state(0, 2, 0), Some(State::Served), "a load balancer's");
        assert_eq!(state(1, 1, 2), Some(State::Served));
        assert_eq!(state(0, 0, 2), None);
    }
}
