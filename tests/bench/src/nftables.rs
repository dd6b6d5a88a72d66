//! The peer of Service addresses: rules of the shape that kube-proxy's nftables mode has (a map from address, protocol and
//! port to a chain for each Service, in it a random choice, and a chain for each endpoint that translates).

use std::{
    fmt::Write,
    fs,
    net::{Ipv4Addr, SocketAddr, SocketAddrV4},
    path::Path,
};

use anyhow::{Context, Result};

/// Name of the table, in the family `ip`.
pub(crate) const TABLE: &str = "bench_services";
/// First address of the Services: a range that the cluster doesn't give out.
const FIRST: u32 = Ipv4Addr::new(10, 112, 0, 0).to_bits();

/// Writes the rules of `services` Services with `endpoints` each, and one more that leads to `server`, whose address is returned.
///
/// # Errors
/// When the file can't be written.
pub(crate) fn write_rules(path: &Path, services: u32, endpoints: u32, server: SocketAddr) -> Result<SocketAddr> {
    let mut chains = String::new();
    let mut map = String::new();
    for service in 0..services {
        writeln!(map, "{} . tcp . 80 : goto service-{service},", Ipv4Addr::from_bits(FIRST + service))?;
        let choices = (0..endpoints).map(|n| format!("{n} : goto endpoint-{service}-{n}")).collect::<Vec<_>>();
        for endpoint in 0..endpoints {
            let address = Ipv4Addr::from_bits(Ipv4Addr::new(10, 128, 0, 0).to_bits() + service * endpoints + endpoint);
            writeln!(chains, "chain endpoint-{service}-{endpoint} {{ meta l4proto tcp dnat to {address}:8080; }}")?;
        }
        let choices = choices.join(", ");
        writeln!(chains, "chain service-{service} {{ numgen random mod {endpoints} vmap {{ {choices} }}; }}")?;
    }
    let last = Ipv4Addr::from_bits(FIRST + services);
    writeln!(map, "{last} . tcp . {} : goto service-server", server.port())?;
    writeln!(chains, "chain endpoint-server {{ meta l4proto tcp dnat to {server}; }}")?;
    writeln!(chains, "chain service-server {{ numgen random mod 1 vmap {{ 0 : goto endpoint-server }}; }}")?;
    let rules = format!(
        "table ip {TABLE} {{\n{chains}\
         map services {{ type ipv4_addr . inet_proto . inet_service : verdict; elements = {{ {map} }} }}\n\
         chain prerouting {{ type nat hook prerouting priority dstnat; ip daddr . meta l4proto . th dport vmap @services; }}\n\
         chain output {{ type nat hook output priority -100; ip daddr . meta l4proto . th dport vmap @services; }}\n\
         }}\n"
    );
    fs::write(path, rules).with_context(|| path.display().to_string())?;
    Ok(SocketAddr::V4(SocketAddrV4::new(last, server.port())))
}
