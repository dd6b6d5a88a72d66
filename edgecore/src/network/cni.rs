//! The CNI configuration that is written when a node has none (CNI specification, "Network configuration format").

use std::{
    fs,
    net::Ipv4Addr,
    path::{Path, PathBuf},
};

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

/// An IPv4 range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// The first address.
    pub network: Ipv4Addr,
    /// The length of the prefix.
    pub prefix: u8,
}

impl std::fmt::Display for Range {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.network, self.prefix)
    }
}

/// Parses a pod range; it must have room for a gateway and a pod.
///
/// # Errors
/// When it is no IPv4 range.
pub fn parse_range(text: &str) -> Result<Range, NetworkError> {
    let invalid = || NetworkError::Range(text.to_owned());
    let (network, prefix) = text.split_once('/').ok_or_else(invalid)?;
    let network: Ipv4Addr = network.parse().map_err(|_| invalid())?;
    let prefix: u8 = prefix.parse().map_err(|_| invalid())?;
    let mask = u32::MAX.checked_shl(32u32.saturating_sub(u32::from(prefix))).unwrap_or(0);
    if !(8..=30).contains(&prefix) || network.to_bits() & !mask != 0 {
        return Err(invalid());
    }
    Ok(Range { network, prefix })
}

/// What the configuration depends on.
#[derive(Debug, Clone)]
pub struct CniConfig {
    /// The pods' range.
    pub range: Range,
    /// Where addresses in use are kept.
    pub ipam_dir: PathBuf,
    /// Whether host ports are mapped.
    pub with_portmap: bool,
    /// The largest packet.
    pub mtu: Option<u32>,
}

/// The network configuration list.
pub fn conflist(config: &CniConfig) -> Value {
    let mut bridge = json!({
        "type": "bridge",
        "bridge": BRIDGE,
        "isGateway": true,
        // Traffic out of the cluster is masqueraded by edgecore's own rules, which know the cluster's ranges.
        "ipMasq": false,
        // A pod may reach itself through a host port.
        "hairpinMode": true,
        "ipam": {
            "type": "host-local",
            "ranges": [[{"subnet": config.range.to_string()}]],
            "routes": [{"dst": "0.0.0.0/0"}],
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

/// Writes the configuration, unless the folder holds one of somebody else or ours is right. Returns whether it was written.
///
/// # Errors
/// When the folder can't be read or written.
pub fn write_if_none(folder: &Path, config: &CniConfig) -> Result<bool, NetworkError> {
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
            return Ok(false);
        }
    }
    let path = folder.join(FILE_NAME);
    let text = format!("{:#}\n", conflist(config));
    if fs::read_to_string(&path).is_ok_and(|present| present == text) {
        return Ok(false);
    }
    // Not a name that a runtime would read before it's complete.
    let partial = folder.join(".edgemesh.partial");
    fs::write(&partial, text).map_err(error(&partial))?;
    fs::rename(&partial, &path).map_err(error(&path))?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(range: &str) -> CniConfig {
        CniConfig {
            range: parse_range(range).unwrap(),
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
    fn a_foreign_configuration_is_respected_and_an_own_one_is_renewed() {
        let folder = tempfile::tempdir().unwrap();
        assert!(write_if_none(folder.path(), &config("10.244.3.0/24")).unwrap());
        assert!(!write_if_none(folder.path(), &config("10.244.3.0/24")).unwrap());
        assert!(write_if_none(folder.path(), &config("10.244.4.0/24")).unwrap());
        assert!(fs::read_to_string(folder.path().join(FILE_NAME)).unwrap().contains("10.244.4.0/24"));
        fs::write(folder.path().join("05-other.conf"), "{}").unwrap();
        assert!(!write_if_none(folder.path(), &config("10.244.5.0/24")).unwrap());
    }

    #[test]
    fn what_is_no_pod_range_is_refused() {
        for bad in ["10.244.0.0", "10.244.0.1/24", "fd00::/64", "10.0.0.0/31", "x/24", "10.0.0.0/99"] {
            assert!(parse_range(bad).is_err(), "{bad}");
        }
    }
}
