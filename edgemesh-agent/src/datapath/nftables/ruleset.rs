//! The text of the table: maps that hold what is planned, and a few chains that look there. Nothing in the chains depends on
//! how many Services there are, so that a change is one of elements only.

use std::{fmt::Write as _, net::IpAddr, time::Duration};

use edgemesh_mesh::cidr::Cidr;

/// What names of the agent's tables begin with, of family `inet`.
pub(super) const NAME: &str = "edgemesh_services";
/// The table of this layout. It gets another name with every change of the maps, so that an agent can fill its own table
/// while an older one's still serves.
pub const TABLE: &str = "edgemesh_services";
/// Bit of the packet mark between the hooks, of the first packet of a flow that was sent to a backend. Those of
/// kube-proxy (0x4000, 0x8000) and of the CNI port mappings (0x2000) are others.
const MARK: u32 = 0x1000;
/// Bits of a tracked flow's status (linux/netfilter/nf_conntrack_common.h): it was answered, its first packet has passed, and
/// its destination was translated.
const SEEN_REPLY: u32 = 0x2;
const CONFIRMED: u32 = 0x8;
const DST_NAT: u32 = 0x20;
/// Clients that session affinity remembers at one time, for each kind of frontend and family.
const CLIENTS: u32 = 65_536;
/// Before kube-proxy's and others' chains at the same hook (-100), so that an address that both know is ours.
const BEFORE_OTHERS: i32 = -101;

/// Where packets come from for which a frontend holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Place {
    /// This node and its pods; others too, where nothing else is said for them.
    Inside,
    /// Outside of this node, to an address that is not a NodePort's.
    Outside,
    /// Outside of this node, to a port of any of the host's addresses.
    NodePort,
}

impl Place {
    pub(super) const ALL: [Self; 3] = [Self::Inside, Self::Outside, Self::NodePort];

    fn name(self) -> &'static str {
        match self {
            Self::Inside => "services",
            Self::Outside => "outside",
            Self::NodePort => "nodeports",
        }
    }
}

/// An address family of the maps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Family {
    V4,
    V6,
}

impl Family {
    pub(super) const ALL: [Self; 2] = [Self::V4, Self::V6];

    /// As nft names the header and the statement.
    pub(super) fn ip(self) -> &'static str {
        match self {
            Self::V4 => "ip",
            Self::V6 => "ip6",
        }
    }

    /// The type of its addresses.
    fn address(self) -> &'static str {
        match self {
            Self::V4 => "ipv4_addr",
            Self::V6 => "ipv6_addr",
        }
    }

    fn number(self) -> u8 {
        match self {
            Self::V4 => 4,
            Self::V6 => 6,
        }
    }
}

impl From<IpAddr> for Family {
    fn from(address: IpAddr) -> Self {
        if address.is_ipv4() { Self::V4 } else { Self::V6 }
    }
}

/// A map or set of elements that are planned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Map {
    /// Frontend to the chain for its number of backends.
    Frontends(Place, Family),
    /// Frontend and index to a backend.
    Backends(Place, Family),
    /// Frontend and index to the number of a backend that clients keep.
    Choices(Place, Family),
    /// Frontend and number of a backend to the backend.
    Kept(Place, Family),
    /// Frontend and number of a backend: those that are still there.
    Live(Place, Family),
    /// Frontends that lead to endpoints: counts the flows that are sent there.
    Sent(Place, Family),
    /// Frontends: counts what is refused for want of an endpoint.
    Refused(Place, Family),
    /// Service address and protocol whose other ports are refused.
    Closed(Family),
    /// The same: counts what is refused.
    ClosedRefused(Family),
    /// Frontends that not everybody may call.
    Guarded(Family),
    /// Frontend and a range of sources that may.
    Sources(Family),
    /// Backends on this node.
    Local(Family),
    /// Backends on this node, as source and destination: a pod that calls itself.
    Hairpin(Family),
    /// Ranges of this node's pods.
    Pods(Family),
    /// Endpoints that left a SYN unanswered a moment ago.
    Unanswered(Family),
}

impl Map {
    /// All of them.
    pub(super) fn all() -> Vec<Self> {
        let mut all = Vec::new();
        for family in Family::ALL {
            for place in Place::ALL {
                all.extend(
                    [Self::Frontends, Self::Backends, Self::Choices, Self::Kept, Self::Live, Self::Sent, Self::Refused]
                        .map(|of| of(place, family)),
                );
            }
            all.extend(
                [
                    Self::Closed,
                    Self::ClosedRefused,
                    Self::Guarded,
                    Self::Sources,
                    Self::Local,
                    Self::Hairpin,
                    Self::Pods,
                    Self::Unanswered,
                ]
                .map(|of| of(family)),
            );
        }
        all
    }

    /// Those whose elements count.
    pub(super) fn all_that_count() -> impl Iterator<Item = Self> {
        Self::all().into_iter().filter(|map| map.counts())
    }

    /// Whether its elements count the packets that they are found for.
    pub(super) fn counts(self) -> bool {
        matches!(self, Self::Sent(..) | Self::Refused(..) | Self::ClosedRefused(_))
    }

    fn is_map(self) -> bool {
        matches!(self, Self::Frontends(..) | Self::Backends(..) | Self::Choices(..) | Self::Kept(..))
    }

    /// What its elements are, as nft declares it. Indexes and numbers have the type of the packet's priority, which carries them
    /// from one lookup to the next: an index has no type that nft 1.0.6 could name in a map.
    fn declaration(self) -> String {
        match self {
            Self::Frontends(place, family) => format!("type {} : verdict", key_type(place, family)),
            Self::Choices(place, family) => format!("type {} . classid : classid", key_type(place, family)),
            Self::Backends(place, family) | Self::Kept(place, family) => {
                format!("type {} . classid : {} . inet_service", key_type(place, family), family.address())
            }
            Self::Live(place, family) => format!("type {} . classid", key_type(place, family)),
            Self::Sent(place, family) | Self::Refused(place, family) => {
                format!("type {}; counter", key_type(place, family))
            }
            Self::Closed(family) => format!("type {} . inet_proto", family.address()),
            Self::ClosedRefused(family) => format!("type {} . inet_proto; counter", family.address()),
            Self::Guarded(family) => format!("type {}", key_type(Place::Outside, family)),
            Self::Sources(family) => {
                format!("type {} . {}; flags interval", key_type(Place::Outside, family), family.address())
            }
            Self::Local(family) => format!("type {}", family.address()),
            Self::Hairpin(family) => format!("type {0} . {0}", family.address()),
            Self::Pods(family) => format!("type {}; flags interval; auto-merge", family.address()),
            Self::Unanswered(family) => {
                format!("type {} . inet_service; flags dynamic,timeout; timeout 5s; size 1024", family.address())
            }
        }
    }
}

impl std::fmt::Display for Map {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (place, family, what) = match *self {
            Self::Frontends(place, family) => (place.name(), family, ""),
            Self::Backends(place, family) => (place.name(), family, "_backends"),
            Self::Choices(place, family) => (place.name(), family, "_choices"),
            Self::Kept(place, family) => (place.name(), family, "_kept"),
            Self::Live(place, family) => (place.name(), family, "_live"),
            Self::Sent(place, family) => (place.name(), family, "_sent"),
            Self::Refused(place, family) => (place.name(), family, "_refused"),
            Self::Closed(family) => ("closed", family, ""),
            Self::ClosedRefused(family) => ("closed", family, "_refused"),
            Self::Guarded(family) => ("guarded", family, ""),
            Self::Sources(family) => ("sources", family, ""),
            Self::Local(family) => ("local", family, ""),
            Self::Hairpin(family) => ("hairpin", family, ""),
            Self::Pods(family) => ("pods", family, ""),
            Self::Unanswered(family) => ("unanswered", family, ""),
        };
        write!(f, "{place}{}{what}", family.number())
    }
}

/// A chain that frontends lead to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Chain {
    /// To one of so many backends.
    Direct(Place, Family, usize),
    /// The same, and clients keep theirs until they have not called for the time.
    Sticky(Place, Family, usize, Duration),
    /// Refuses as unreachable.
    Refuse(Place, Family),
    /// Drops.
    Drop,
}

impl std::fmt::Display for Chain {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match *self {
            Self::Direct(place, family, count) => write!(f, "{}{}_of_{count}", place.name(), family.number()),
            Self::Sticky(place, family, count, timeout) => {
                write!(f, "{}{}_of_{count}_for_{}s", place.name(), family.number(), timeout.as_secs())
            }
            Self::Refuse(place, family) => write!(f, "{}{}_refuse", place.name(), family.number()),
            Self::Drop => f.write_str("discard"),
        }
    }
}

impl Chain {
    /// Whether it is made when a frontend first needs it.
    pub(super) fn is_made_on_demand(self) -> bool {
        matches!(self, Self::Direct(..) | Self::Sticky(..))
    }

    /// Makes it, or makes it anew.
    pub(super) fn write(self, script: &mut String) {
        let _ = writeln!(script, "add chain inet {TABLE} {self}\nflush chain inet {TABLE} {self}");
        let (Self::Direct(place, family, _) | Self::Sticky(place, family, ..)) = self else { return };
        let mut rule = |text: &str| {
            let _ = writeln!(script, "add rule inet {TABLE} {self} {text}");
        };
        let (key, ip) = (key(place, family), family.ip());
        rule(&format!("meta mark set meta mark | {MARK:#x}"));
        rule(&format!("{key} @{}", Map::Sent(place, family)));
        match self {
            Self::Direct(_, _, count) => {
                let backends = Map::Backends(place, family);
                let to = |count| {
                    format!(
                        "meta priority set numgen random mod {count} dnat {ip} to {key} . meta priority map @{backends}"
                    )
                };
                rule(&to(count));
                // A change can come between the two lookups, and leave fewer backends: the first is there if any is.
                rule(&to(1));
            }
            Self::Sticky(_, _, count, timeout) => {
                let (choices, kept) = (Map::Choices(place, family), Map::Kept(place, family));
                let (live, clients) = (Map::Live(place, family), clients(place, family));
                let client = client(place, family).0;
                let remember =
                    format!("update @{clients} {{ {client} timeout {}s : meta priority }}", timeout.as_secs().max(1));
                let go = format!("dnat {ip} to {key} . meta priority map @{kept}");
                let choose = |count| {
                    format!(
                        "meta priority set numgen random mod {count} meta priority set {key} . meta priority map @{choices}"
                    )
                };
                rule(&format!(
                    "meta priority set {client} map @{clients} {key} . meta priority @{live} {remember} {go}"
                ));
                // What is remembered is gone, and an update would not replace it.
                rule(&format!("delete @{clients} {{ {client} : meta priority }}"));
                rule(&format!("{} {remember} {go}", choose(count)));
                // No room for more clients, or fewer backends since.
                rule(&format!("{} {go}", choose(1)));
            }
            Self::Refuse(..) | Self::Drop => {}
        }
    }
}

/// The map that remembers clients: its elements come from packets.
fn clients(place: Place, family: Family) -> String {
    format!("{}{}_clients", place.name(), family.number())
}

/// What a packet is looked up by.
fn key(place: Place, family: Family) -> String {
    match place {
        Place::Inside | Place::Outside => format!("{} daddr . meta l4proto . th dport", family.ip()),
        Place::NodePort => "meta l4proto . th dport".to_owned(),
    }
}

/// The type of [`key`].
fn key_type(place: Place, family: Family) -> String {
    match place {
        Place::Inside | Place::Outside => format!("{} . inet_proto . inet_service", family.address()),
        Place::NodePort => "inet_proto . inet_service".to_owned(),
    }
}

/// A client of a frontend, with the type by which it is remembered. nft 1.0.6 takes no more than 16 bytes where a rule adds
/// to a map, so of IPv6 ones it is 64 bits of hashes.
fn client(place: Place, family: Family) -> (String, String) {
    let (ip, key) = (family.ip(), key(place, family));
    let whole = format!("{ip} saddr . {key}");
    match family {
        Family::V4 => (whole, format!("type {} . {} : classid", family.address(), key_type(place, family))),
        Family::V6 => {
            let hash = |seed| format!("jhash {whole} mod 0xffffffff seed {seed}");
            let types = "typeof numgen random mod 2 . numgen random mod 2 : meta priority".to_owned();
            (format!("{} . {}", hash(1), hash(2)), types)
        }
    }
}

/// What the chains do beside looking up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Scope {
    /// Whether the node's own sockets and its pods are served here, or only callers from outside, and all where not everybody
    /// may call.
    pub(super) inside: bool,
    /// Whether answers between two pods of this node pass these hooks (`br_netfilter`): if not, callers are masqueraded,
    /// since answers that go from pod to pod would come from an address that was not called.
    pub(super) bridged_answers: bool,
}

/// Writes the table without the elements that frontends need. What is in a table that is there stays, with the clients that
/// it remembers and what it counted, but for the pods' ranges.
pub(super) fn write_base(script: &mut String, scope: Scope, pods: &[Cidr]) {
    let _ = writeln!(script, "add table inet {TABLE}");
    for map in Map::all() {
        let kind = if map.is_map() { "map" } else { "set" };
        let _ = writeln!(script, "add {kind} inet {TABLE} {map} {{ {}; }}", map.declaration());
    }
    for family in Family::ALL {
        let _ = writeln!(script, "flush set inet {TABLE} {}", Map::Pods(family));
    }
    for range in pods {
        let (map, prefix) = (Map::Pods(range.network().into()), range.prefix());
        let _ = writeln!(script, "add element inet {TABLE} {map} {{ {}/{prefix} }}", range.network());
    }
    for family in Family::ALL {
        for place in Place::ALL {
            let (types, clients) = (client(place, family).1, clients(place, family));
            let _ = writeln!(
                script,
                "add map inet {TABLE} {clients} {{ {types}; flags dynamic,timeout; size {CLIENTS}; }}"
            );
        }
    }
    let mut chain = |name: &str, hook: &str, rules: &[&str]| {
        let _ = writeln!(script, "add chain inet {TABLE} {name} {hook}\nflush chain inet {TABLE} {name}");
        for rule in rules {
            let _ = writeln!(script, "add rule inet {TABLE} {name} {rule}");
        }
    };
    chain(
        "refuse",
        "",
        &[
            // Sockets that are not told how they want errors learn of no other code.
            "meta l4proto udp reject with icmpx port-unreachable",
            // From this host: an error that comes while connect() sends would be lost.
            "meta iif 0 reject with tcp reset",
            "reject with icmpx host-unreachable",
        ],
    );
    for family in Family::ALL {
        for place in Place::ALL {
            let count = format!("{} @{}", key(place, family), Map::Refused(place, family));
            chain(&Chain::Refuse(place, family).to_string(), "", &[&count, "goto refuse"]);
        }
    }
    chain("discard", "", &["drop"]);
    chain("close", "", &["meta l4proto tcp reject with tcp reset", "reject with icmpx port-unreachable"]);
    let mut guards = Vec::new();
    for family in Family::ALL {
        let (key, ip, number) = (key(Place::Outside, family), family.ip(), family.number());
        guards.push(format!("{key} @{} goto admit{number}", Map::Guarded(family)));
        let admitted = format!("{key} . {ip} saddr @{} return", Map::Sources(family));
        chain(&format!("admit{number}"), "", &[&admitted, "drop"]);
    }
    chain("guard", "", &guards.iter().map(String::as_str).collect::<Vec<_>>());
    chain(
        "inside",
        "",
        &[
            &format!("{} vmap @services4", key(Place::Inside, Family::V4)),
            &format!("{} vmap @services6", key(Place::Inside, Family::V6)),
            "ip daddr . meta l4proto @closed4_refused",
            "ip6 daddr . meta l4proto @closed6_refused",
            "ip daddr . meta l4proto @closed4 goto close",
            "ip6 daddr . meta l4proto @closed6 goto close",
        ],
    );
    let node_ports = key(Place::NodePort, Family::V4);
    chain(
        "outside",
        "",
        &[
            "ip saddr @pods4 return",
            "ip6 saddr @pods6 return",
            &format!("{} vmap @outside4", key(Place::Outside, Family::V4)),
            &format!("{} vmap @outside6", key(Place::Outside, Family::V6)),
            "fib daddr type != local return",
            &format!("ip daddr != 127.0.0.0/8 {node_ports} vmap @nodeports4"),
            &format!("ip6 daddr != ::1 {node_ports} vmap @nodeports6"),
        ],
    );
    let carried = "meta l4proto != { tcp, udp } return";
    let hook = |hook: &str| format!("{{ type nat hook {hook} priority {BEFORE_OTHERS}; policy accept; }}");
    chain("prerouting", &hook("prerouting"), &[carried, "jump guard", "jump outside", "jump inside"]);
    chain("output", &hook("output"), &[carried, "jump guard", "jump inside"]);
    // A segment that is ahead of its window is not translated back: its receiver would answer the endpoint with a reset, and end the
    // connection. Both ways of a pod's connections pass here, so that no other ones are taken for such.
    let to_pods: &[&str] = if scope.inside { &["ip daddr @pods4 drop", "ip6 daddr @pods6 drop"] } else { &[] };
    let from_endpoints = ["ip saddr @local4 drop", "ip6 saddr @local6 drop"];
    chain(
        "forward",
        "{ type filter hook forward priority filter; policy accept; }",
        &[&["ct state != invalid return", "meta l4proto != tcp return"], to_pods, &from_endpoints].concat(),
    );
    // A SYN of a flow that was sent to an endpoint and is already known, and not answered yet.
    chain(
        "unanswered",
        "{ type filter hook postrouting priority 98; policy accept; }",
        &[
            "tcp flags & (fin | syn | rst | ack) != syn return",
            &format!("ct status & {:#x} != {:#x} return", SEEN_REPLY | CONFIRMED | DST_NAT, CONFIRMED | DST_NAT),
            "add @unanswered4 { ip daddr . tcp dport }",
            "add @unanswered6 { ip6 daddr . tcp dport }",
        ],
    );
    let unbridged: &[&str] = if !scope.bridged_answers {
        &[
            "ip saddr @pods4 ip daddr @local4 masquerade fully-random",
            "ip6 saddr @pods6 ip6 daddr @local6 masquerade fully-random",
        ]
    } else {
        &[]
    };
    let unmarked = format!("meta mark & {MARK:#x} == 0 return");
    let unmark = format!("meta mark set meta mark & {:#x}", !MARK);
    let rules = [
        &[
            unmarked.as_str(),
            &unmark,
            "meta priority set 0",
            "ip saddr . ip daddr @hairpin4 masquerade fully-random",
            "ip6 saddr . ip6 daddr @hairpin6 masquerade fully-random",
            // A host process chose its source address by the route to the Service address: where the endpoint's route
            // leaves by another interface, a connection to the endpoint itself would have that one's.
            "fib saddr type local oifname != \"lo\" fib saddr . oif type != local masquerade fully-random",
            "fib saddr type local return",
        ],
        unbridged,
        &[
            "ip saddr @pods4 return",
            "ip6 saddr @pods6 return",
            "ip daddr @local4 return",
            "ip6 daddr @local6 return",
            // From outside to another node: its answer must come back through this one.
            "masquerade fully-random",
        ],
    ];
    chain("postrouting", "{ type nat hook postrouting priority 99; policy accept; }", &rules.concat());
}

/// Writes the removal of the table, whether there is one or not.
pub(super) fn write_removal(script: &mut String) {
    let _ = writeln!(script, "add table inet {TABLE}\ndelete table inet {TABLE}");
}
