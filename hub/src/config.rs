//! Settings of the hub.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::PathBuf,
};

use edgemesh_api::{cidr::Cidr, names};
use edgemesh_apiserver::{BadServiceRange, ServiceRange};
use edgemesh_telemetry::{AdminConfig, LogConfig, Problems, Validate};
use serde::{Deserialize, Serialize};

use crate::controllers::{BadPodRange, PodRange};

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
    /// Its range of IPv6 Service addresses; with it Services can be dual-stack.
    pub service_cidr6: Option<String>,
    /// Range from which `standalone` gives nodes their pod ranges.
    pub pod_cidr: String,
    /// Range from which it gives them those of IPv6.
    pub pod_cidr6: Option<String>,
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
            service_cidr6: None,
            pod_cidr: names::DEFAULT_POD_CIDR.to_owned(),
            pod_cidr6: None,
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
        for (setting, text, is_ipv6) in
            [("serviceCidr", Some(&self.service_cidr), false), ("serviceCidr6", self.service_cidr6.as_ref(), true)]
        {
            check_range(setting, text, is_ipv6, problems, |text| text.parse::<ServiceRange>().map(drop));
        }
        for (setting, text, is_ipv6) in
            [("podCidr", Some(&self.pod_cidr), false), ("podCidr6", self.pod_cidr6.as_ref(), true)]
        {
            check_range(setting, text, is_ipv6, problems, |text| text.parse::<PodRange>().map(drop));
        }
        if self.service_ranges().is_ok_and(|ranges| !ranges.iter().any(|range| range.contains(self.cluster_dns.into())))
        {
            problems.add("clusterDns", format!("{} is not in serviceCidr {}", self.cluster_dns, self.service_cidr));
        }
    }
}

/// Checks a range by its kind and its family.
fn check_range<E: std::fmt::Display>(
    setting: &str,
    text: Option<&String>,
    is_ipv6: bool,
    problems: &mut Problems,
    check: impl Fn(&str) -> Result<(), E>,
) {
    let Some(text) = text else { return };
    if let Err(error) = check(text) {
        problems.add(setting, error);
    } else if Cidr::parse(text).is_some_and(|range| range.network().is_ipv6() != is_ipv6) {
        problems.add(setting, format!("{text} is no range of {}", if is_ipv6 { "IPv6" } else { "IPv4" }));
    }
}

impl Config {
    /// The ranges of Service addresses, that of IPv4 first.
    ///
    /// # Errors
    /// When one can't be used.
    pub fn service_ranges(&self) -> Result<Vec<ServiceRange>, BadServiceRange> {
        [Some(&self.service_cidr), self.service_cidr6.as_ref()]
            .into_iter()
            .flatten()
            .map(|range| range.parse())
            .collect()
    }

    /// The ranges of pod addresses, that of IPv4 first.
    ///
    /// # Errors
    /// When one can't be used.
    pub fn pod_ranges(&self) -> Result<Vec<PodRange>, BadPodRange> {
        [Some(&self.pod_cidr), self.pod_cidr6.as_ref()].into_iter().flatten().map(|range| range.parse()).collect()
    }

    /// The address of the API for the hub's own use: the first of `serviceCidr`, as Kubernetes gives it to the Service `kubernetes`.
    pub fn kubernetes_address(&self) -> Option<IpAddr> {
        self.service_ranges().ok()?.first()?.nth(1)
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
            pod_cidr6: Some("10.245.0.0/16".into()),
            link: EndpointConfig { advertise: vec!["host:10443".into()], ..EndpointConfig::on(1) },
            ..Config::default()
        };
        let mut problems = Problems::default();
        config.validate(&mut problems);
        let all = problems.list().join("\n");
        for setting in ["dataDir", "serviceCidr", "podCidr6", "link.advertise"] {
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
