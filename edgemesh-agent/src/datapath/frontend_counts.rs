//! What a datapath counts by frontend, and which Services have these frontends.

use std::{cell::OnceCell, collections::HashMap, fmt, sync::Arc};

use edgemesh_mesh::{
    Catalog,
    model::{ServiceName, ServicePort},
};

use super::{mode::DatapathError, plan::Frontend, planner};

/// What became of the calls of one frontend since counting began. Calls that were sent to the agent are not among them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct FrontendCounts {
    /// Connections and UDP flows that were sent straight to an endpoint.
    pub flows: u64,
    /// Connections and datagrams that were refused for want of an endpoint.
    pub no_endpoint: u64,
    /// Connections and datagrams that were refused because the Service has no such port.
    pub no_such_port: u64,
}

impl FrontendCounts {
    /// What came since an earlier reading: all of it, if counting began anew meanwhile.
    pub fn since(self, earlier: Self) -> Self {
        let anew = self.flows < earlier.flows
            || self.no_endpoint < earlier.no_endpoint
            || self.no_such_port < earlier.no_such_port;
        let earlier = if anew { Self::default() } else { earlier };
        Self {
            flows: self.flows - earlier.flows,
            no_endpoint: self.no_endpoint - earlier.no_endpoint,
            no_such_port: self.no_such_port - earlier.no_such_port,
        }
    }
}

/// A datapath that counts by frontend.
pub trait CountsFrontends: fmt::Debug + Send + Sync {
    /// Every frontend that was called. Where a frontend passes to another Service, counting begins anew. One at `0.0.0.0` or `::` is a node port at whatever address of the node.
    ///
    /// # Errors
    /// When not all of it can be read.
    fn read(&self) -> Result<HashMap<Frontend, FrontendCounts>, DatapathError>;
}

/// Which Services have which frontends, by a catalog.
#[derive(Debug)]
pub struct Owners<'a> {
    catalog: &'a Catalog,
    /// Those at external addresses, which no index of the catalog leads to; looked for when one is asked for.
    external: OnceCell<HashMap<Frontend, &'a Arc<ServicePort>>>,
}

impl<'a> Owners<'a> {
    /// By this catalog.
    pub fn new(catalog: &'a Catalog) -> Self {
        Self { catalog, external: OnceCell::new() }
    }

    /// The Service that has a frontend, as [`super::plan::plan`] gives them out.
    pub fn of(&self, frontend: Frontend) -> Option<&'a ServiceName> {
        if frontend.address.port() == 0 {
            return self.catalog.service_at(frontend.address.ip()).map(|service| &service.name);
        }
        self.port(frontend).map(|port| &port.service)
    }

    /// The Service port that has a frontend.
    pub fn port(&self, Frontend { address, protocol }: Frontend) -> Option<&'a Arc<ServicePort>> {
        let (ip, port) = (address.ip(), address.port());
        let is_node = || ip.is_unspecified() || ip.is_loopback() || self.catalog.node_of_address(ip).is_some();
        self.catalog
            .port_at(ip, port, protocol)
            .or_else(|| self.catalog.node_port(port, protocol).filter(|_| is_node()))
            .or_else(|| self.external().get(&Frontend { address, protocol }).copied())
    }

    fn external(&self) -> &HashMap<Frontend, &'a Arc<ServicePort>> {
        self.external.get_or_init(|| self.catalog.services().flat_map(|service| planner::external(service)).collect())
    }
}

#[cfg(test)]
mod tests {
    use edgemesh_mesh::{CatalogStore, model::Protocol};
    use serde_json::json;

    use super::*;

    #[test]
    fn what_came_since_is_all_of_it_when_counting_began_anew() {
        let counts = |flows, no_endpoint| FrontendCounts { flows, no_endpoint, no_such_port: 0 };
        assert_eq!(counts(7, 2).since(counts(5, 2)), counts(2, 0));
        assert_eq!(counts(4, 3).since(counts(5, 2)), counts(4, 3));
    }

    #[test]
    fn every_kind_of_address_leads_to_its_service() {
        let store = CatalogStore::new();
        let node = json!({"metadata": {"name": "a1"},
            "status": {"addresses": [{"type": "InternalIP", "address": "192.168.1.11"}]}});
        store.apply_node(&serde_json::from_value(node).unwrap());
        for (name, ip, node_port, external) in
            [("web", "10.96.0.20", 30080, "203.0.113.7"), ("other", "10.96.0.21", 30081, "203.0.113.8")]
        {
            let service = json!({"metadata": {"name": name, "namespace": "d"},
                "spec": {"clusterIP": ip, "externalIPs": [external], "ports": [{"port": 80, "nodePort": node_port}]}});
            store.apply_service(&serde_json::from_value(service).unwrap());
        }
        store.publish();
        let catalog = store.snapshot();
        let owners = Owners::new(&catalog);
        for (address, owner) in [
            ("10.96.0.20:80", Some("web")),
            ("10.96.0.20:0", Some("web")),
            ("10.96.0.20:81", None),
            ("192.168.1.11:30081", Some("other")),
            ("127.0.0.1:30080", Some("web")),
            ("0.0.0.0:30080", Some("web")),
            ("[::]:30081", Some("other")),
            ("198.51.100.1:30080", None),
            ("203.0.113.8:80", Some("other")),
        ] {
            let at = |protocol| owners.of(Frontend { address: address.parse().unwrap(), protocol });
            assert_eq!(at(Protocol::Tcp).map(|name| &*name.name), owner, "{address}");
            assert!(at(Protocol::Udp).is_none() || address.ends_with(":0"), "{address}");
        }
    }
}
