//! The CNI configuration that is written when a node has none (CNI specification, "Network configuration format").

use std::{
    fs,
    path::{Path, PathBuf},
};

use edgemesh_api::cidr::Cidr;
use serde_json::{Value, json};

use super::NetworkError;

/// The node's bridge. Interface names have at most 15 characters.
pub const BRIDGE: &str = "edgemesh0";
/// The network's name; the IPAM plugin keeps its addresses in a folder of this name.
pub const NETWORK: &str = "edgemesh";
/// The file that is ours in the configuration folder.
pub const FILE_NAME: &str = "10-edgemesh.conflist";
/// The version that every plugin and runtime since 2020 speaks.
const CNI_VERSION: &str = "0.4.0";

/// Parses a pod range of a setting; it must have room for a gateway and a pod.
///
/// # Errors
/// When it is no range, or of a size that can't be meant.
pub fn parse_range(text: &str) -> Result<Cidr, NetworkError> {
    of_usable_size(text, Cidr::parse_network(text))
}

/// Parses a pod range of a Node, where Kubernetes allows bits behind the prefix.
///
/// # Errors
/// As [`parse_range`].
pub fn parse_node_range(text: &str) -> Result<Cidr, NetworkError> {
    of_usable_size(text, Cidr::parse(text))
}

fn of_usable_size(text: &str, range: Option<Cidr>) -> Result<Cidr, NetworkError> {
    let usable = |range: &Cidr| {
        let prefixes = if range.network().is_ipv4() { 8..=30 } else { 16..=126 };
        prefixes.contains(&range.prefix())
    };
    range.filter(usable).ok_or_else(|| NetworkError::Range(text.to_owned()))
}

/// What the configuration depends on.
#[derive(Debug, Clone)]
pub struct CniConfig {
    /// The pods' ranges: one, or one of each family with IPv4 first.
    pub ranges: Vec<Cidr>,
    /// Where addresses in use are kept.
    pub ipam_dir: PathBuf,
    /// Whether host ports are mapped.
    pub with_portmap: bool,
    /// The largest packet.
    pub mtu: Option<u32>,
}

/// The network configuration list.
pub fn conflist(config: &CniConfig) -> Value {
    // Each range in a list of its own: a pod gets an address of every one.
    let subnets: Vec<_> = config.ranges.iter().map(|range| json!([{"subnet": range}])).collect();
    let everywhere = |range: &Cidr| json!({"dst": if range.network().is_ipv4() { "0.0.0.0/0" } else { "::/0" }});
    let routes: Vec<_> = config.ranges.iter().map(everywhere).collect();
    let mut bridge = json!({
        "type": "bridge",
        "bridge": BRIDGE,
        "isGateway": true,
        // A Node that registers again may get another range than the bridge has its address from.
        "forceAddress": true,
        // Traffic out of the cluster is masqueraded by edgecore's own rules, which know the cluster's ranges.
        "ipMasq": false,
        // A pod may reach itself through a host port.
        "hairpinMode": true,
        "ipam": {
            "type": "host-local",
            "ranges": subnets,
            "routes": routes,
            "dataDir": config.ipam_dir,
        },
    });
    if let (Some(mtu), Some(fields)) = (config.mtu, bridge.as_object_mut()) {
        fields.insert("mtu".to_owned(), json!(mtu));
    }
    let mut plugins = vec![bridge];
    if config.with_portmap {
        plugins.push(json!({"type": "portmap", "capabilities": {"portMappings": true}, "snat": true}));
    }
    json!({"cniVersion": CNI_VERSION, "name": NETWORK, "plugins": plugins})
}

/// Whose configuration is in the folder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    /// Somebody else's: nothing was written.
    Foreign,
    /// Ours, and it was right.
    Own,
    /// Ours, written just now.
    Written,
}

/// Writes the configuration, unless the folder holds one of somebody else or ours is right.
///
/// # Errors
/// When the folder can't be read or written.
pub fn write_if_none(folder: &Path, config: &CniConfig) -> Result<Found, NetworkError> {
    let error = |path: &Path| {
        let path = path.to_owned();
        move |source| NetworkError::File { path, source }
    };
    fs::create_dir_all(folder).map_err(error(folder))?;
    for entry in fs::read_dir(folder).map_err(error(folder))? {
        let name = entry.map_err(error(folder))?.file_name();
        let name = name.to_string_lossy();
        let is_configuration = [".conf", ".conflist", ".json"].iter().any(|end| name.ends_with(end));
        if is_configuration && name != FILE_NAME {
            return Ok(Found::Foreign);
        }
    }
    let path = folder.join(FILE_NAME);
    let text = format!("{:#}\n", conflist(config));
    if fs::read_to_string(&path).is_ok_and(|present| present == text) {
        return Ok(Found::Own);
    }
    // Not a name that a runtime would read before it's complete.
    let partial = folder.join(".edgemesh.partial");
    fs::write(&partial, text).map_err(error(&partial))?;
    fs::rename(&partial, &path).map_err(error(&path))?;
    Ok(Found::Written)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(range: &str) -> CniConfig {
        CniConfig {
            ranges: vec![parse_range(range).unwrap()],
            ipam_dir: "/var/lib/x/ipam".into(),
            with_portmap: true,
            mtu: Some(1400),
        }
    }

    #[test]
    fn the_bridge_is_in_the_pod_range_and_maps_host_ports() {
        let list = conflist(&config("10.244.3.0/24"));
        let bridge = &list["plugins"][0];
        assert!(bridge["bridge"].as_str().unwrap().len() <= 15);
        assert_eq!(bridge["ipam"]["ranges"][0][0]["subnet"], "10.244.3.0/24");
        assert_eq!(
            (&bridge["isGateway"], &bridge["ipMasq"], &bridge["mtu"]),
            (&json!(true), &json!(false), &json!(1400))
        );
        assert_eq!(list["plugins"][1]["capabilities"]["portMappings"], true);
    }

    #[test]
    fn pods_of_a_dual_stack_node_get_an_address_and_a_way_out_of_each_family() {
        let mut config = config("10.244.3.0/24");
        config.ranges.push(parse_range("fd00:10:244:3::/64").unwrap());
        let ipam = &conflist(&config)["plugins"][0]["ipam"];
        assert_eq!(ipam["ranges"], json!([[{"subnet": "10.244.3.0/24"}], [{"subnet": "fd00:10:244:3::/64"}]]));
        assert_eq!(ipam["routes"], json!([{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]));
    }

    #[test]
    fn a_foreign_configuration_is_respected_and_an_own_one_is_renewed() {
        let folder = tempfile::tempdir().unwrap();
        let write = |range| write_if_none(folder.path(), &config(range)).unwrap();
        assert_eq!(write("10.244.3.0/24"), Found::Written);
        assert_eq!(write("10.244.3.0/24"), Found::Own);
        assert_eq!(write("10.244.4.0/24"), Found::Written);
        assert!(fs::read_to_string(folder.path().join(FILE_NAME)).unwrap().contains("10.244.4.0/24"));
        fs::write(folder.path().join("05-other.conf"), "{}").unwrap();
        assert_eq!(write("10.244.5.0/24"), Found::Foreign);
    }

    #[test]
    fn what_is_no_pod_range_is_refused() {
        for bad in ["10.244.0.0", "10.244.0.1/24", "fd00::/127", "fd00::1/64", "10.0.0.0/31", "x/24", "10.0.0.0/99"] {
            assert!(parse_range(bad).is_err(), "{bad}");
        }
    }
}
