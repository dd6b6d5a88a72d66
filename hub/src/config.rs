//! Settings of the hub.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::PathBuf,
};

use edgemesh_api::names;
use edgemesh_telemetry::{AdminConfig, LogConfig, Problems, Validate};
use serde::{Deserialize, Serialize};

use crate::controllers::PodRange;

/// All settings. Where a setting is left out, its default holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Config {
    /// Folder of what the hub keeps: `pki/` and, with `standalone`, `state.db` and `admin.kubeconfig`.
    pub data_dir: PathBuf,
    /// Serve the Kubernetes API and run its controllers in this process. Also `--standalone`.
    pub standalone: bool,
    /// Kubeconfig of the cluster; without it and without `standalone`, the pod's service account.
    pub kubeconfig: Option<PathBuf>,
    /// The Kubernetes API of `standalone`.
    pub api: EndpointConfig,
    /// The nodes' side: joining and the link.
    pub link: EndpointConfig,
    /// Range of Service addresses of `standalone`.
    pub service_cidr: String,
    /// Range from which `standalone` gives nodes their pod ranges.
    pub pod_cidr: String,
    /// Cluster DNS address of `standalone`; must be in `serviceCidr`.
    pub cluster_dns: Ipv4Addr,
    /// `/metrics`, `/readyz`, `/livez` and debug pages.
    pub admin: AdminConfig,
    /// Logging.
    pub log: LogConfig,
    /// How long work in flight may take when the hub stops, in seconds.
    pub drain_seconds: u64,
}

/// A TLS endpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct EndpointConfig {
    /// Where it listens.
    pub listen: SocketAddr,
    /// Names and addresses under which it is reached: they go into its certificate; the first one is what nodes are told.
    #[serde(default)]
    pub advertise: Vec<String>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            data_dir: PathBuf::from("/var/lib/edgemesh/hub"),
            standalone: false,
            kubeconfig: None,
            api: EndpointConfig::on(names::API_PORT),
            link: EndpointConfig::on(names::LINK_PORT),
            service_cidr: names::DEFAULT_SERVICE_CIDR.to_owned(),
            pod_cidr: names::DEFAULT_POD_CIDR.to_owned(),
            cluster_dns: Ipv4Addr::new(10, 96, 0, 10),
            admin: AdminConfig::on(names::HUB_ADMIN_PORT),
            log: LogConfig::default(),
            drain_seconds: 5,
        }
    }
}

impl EndpointConfig {
    fn on(port: u16) -> Self {
        Self { listen: SocketAddr::from((Ipv4Addr::UNSPECIFIED, port)), advertise: Vec::new() }
    }

    /// The host under which others reach it.
    pub fn public_host(&self) -> String {
        match (self.advertise.first(), self.listen.ip()) {
            (Some(name), _) => name.clone(),
            (None, ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.to_string(),
            (None, ip) => ip.to_string(),
        }
    }

    /// The names and the addresses that its certificate must hold; loopback is always among them.
    pub fn subject_names(&self) -> (Vec<String>, Vec<IpAddr>) {
        let mut names = vec!["localhost".to_owned()];
        let mut addresses = vec![IpAddr::from(Ipv4Addr::LOCALHOST)];
        if !self.listen.ip().is_unspecified() && !addresses.contains(&self.listen.ip()) {
            addresses.push(self.listen.ip());
        }
        for name in &self.advertise {
            match name.parse() {
                Ok(address) if !addresses.contains(&address) => addresses.push(address),
                Ok(_) => {}
                Err(_) if !names.contains(name) => names.push(name.clone()),
                Err(_) => {}
            }
        }
        (names, addresses)
    }
}

impl Default for EndpointConfig {
    fn default() -> Self {
        Self::on(0)
    }
}

impl Validate for Config {
    fn validate(&self, problems: &mut Problems) {
        if !self.data_dir.is_absolute() {
            problems.add("dataDir", "must be an absolute path");
        }
        if self.standalone && self.kubeconfig.is_some() {
            problems.add("kubeconfig", "can't be set together with standalone, which serves the API itself");
        }
        for (setting, endpoint) in [("api.advertise", &self.api), ("link.advertise", &self.link)] {
            for name in &endpoint.advertise {
                let is_name = !name.is_empty()
                    && name.len() <= 253
                    && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_'));
                if !is_name && name.parse::<IpAddr>().is_err() {
                    problems.add(setting, format!("{name:?} is neither a host name nor an address (without a port)"));
                }
            }
        }
        if let Err(error) = self.pod_cidr.parse::<PodRange>() {
            problems.add("podCidr", error);
        }
        match parse_range(&self.service_cidr) {
            Err(problem) => problems.add("serviceCidr", problem),
            Ok((network, bits)) => {
                let shift = 32 - u32::from(bits);
                if u32::from(self.cluster_dns) >> shift != u32::from(network) >> shift {
                    problems
                        .add("clusterDns", format!("{} is not in serviceCidr {}", self.cluster_dns, self.service_cidr));
                }
            }
        }
    }
}

/// An IPv4 range such as `10.96.0.0/16`, of a size that Service ranges have.
fn parse_range(text: &str) -> Result<(Ipv4Addr, u8), String> {
    let (address, bits) = text.split_once('/').ok_or_else(|| format!("{text:?} is no range such as 10.96.0.0/16"))?;
    let address: Ipv4Addr = address.parse().map_err(|_| format!("{address:?} is no IPv4 address"))?;
    match bits.parse::<u8>() {
        Ok(bits @ 8..=28) => Ok((address, bits)),
        _ => Err(format!("the prefix of {text:?} must be from 8 to 28")),
    }
}

impl Config {
    /// The address of the API for the hub's own use: the first of `serviceCidr`, as Kubernetes gives it to the Service `kubernetes`.
    pub fn kubernetes_address(&self) -> Option<Ipv4Addr> {
        let (network, _) = parse_range(&self.service_cidr).ok()?;
        Some(Ipv4Addr::from(u32::from(network) + 1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_wrong_setting_is_named() {
        let config = Config {
            data_dir: "relative".into(),
            service_cidr: "10.96.0.0".into(),
            link: EndpointConfig { advertise: vec!["host:10443".into()], ..EndpointConfig::on(1) },
            ..Config::default()
        };
        let mut problems = Problems::default();
        config.validate(&mut problems);
        let all = problems.list().join("\n");
        for setting in ["dataDir", "serviceCidr", "link.advertise"] {
            assert!(all.contains(setting), "{all}");
        }
    }

    #[test]
    fn the_default_settings_are_valid() {
        let mut problems = Problems::default();
        Config::default().validate(&mut problems);
        assert!(problems.list().is_empty(), "{:?}", problems.list());
    }
}
