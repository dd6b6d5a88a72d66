//! The account of a proxied connection or flow: a line in the log and the counters of its Service, when it ends. Calls of pods
//! have a line too, and no counters of their own: there can be any number of pods.

use std::{net::SocketAddr, sync::Arc, time::Instant};

use edgemesh_mesh::{
    CatalogStore,
    l4::{
        copy::{Copied, CopyEnd},
        udp::{FlowEnded, Traffic},
    },
    model::Protocol,
};

use super::{
    called::Called,
    service_metrics::{ServiceCounters, ServiceMetrics},
    upstream::Route,
};

/// Where accounts are written.
#[derive(Debug, Clone)]
pub(super) struct Accounts {
    pub(super) services: ServiceMetrics,
    pub(super) catalog: Arc<CatalogStore>,
}

/// One connection or flow. It is written when it is dropped, however the connection ends.
#[derive(Debug)]
pub(super) struct Account {
    accounts: Accounts,
    counters: Arc<ServiceCounters>,
    called: Called,
    client: SocketAddr,
    begin: Instant,
    route: Option<Route>,
    /// What a TCP connection has carried so far.
    pub(super) copied: Copied,
    datagrams: (u64, u64),
    result: &'static str,
}

impl Accounts {
    /// Begins an account. Without any further news its result is `stopped`: nothing but the agent's end leaves it so.
    pub(super) fn begin(&self, called: Called, client: SocketAddr) -> Account {
        Account {
            accounts: self.clone(),
            counters: match &called {
                Called::Service(port, _) => self.services.of(&port.service),
                Called::Pod(..) => Arc::default(),
            },
            called,
            client,
            begin: Instant::now(),
            route: None,
            copied: Copied::default(),
            datagrams: (0, 0),
            result: "stopped",
        }
    }

    /// The account of a flow that has ended; `opened` is nothing if it ended before opening it had an outcome.
    pub(super) fn flow(
        &self,
        (called, client): (Called, SocketAddr),
        begin: Instant,
        opened: Option<Result<Route, &'static str>>,
        end: &FlowEnded,
        traffic: &Traffic,
    ) {
        let mut account = self.begin(called, client);
        account.begin = begin;
        match opened {
            Some(Err(reason)) => return account.failed(reason),
            Some(Ok(route)) => account.connected(route),
            None => {}
        }
        account.datagrams = (traffic.to_far(), traffic.to_near());
        match end {
            FlowEnded::Idle => account.result = "idle",
            FlowEnded::Evicted => account.result = "evicted",
            FlowEnded::Closed => account.result = "closed",
            FlowEnded::Stopped => account.result = "stopped",
            FlowEnded::NotOpened(_) => account.failed("unreachable"),
            FlowEnded::Failed(_) => account.failed("broken"),
        }
    }
}

impl Account {
    /// An endpoint is connected.
    pub(super) fn connected(&mut self, route: Route) {
        self.counters.connected(route.path);
        self.route = Some(route);
    }

    /// No endpoint was reached, or the connection broke.
    pub(super) fn failed(&mut self, reason: &'static str) {
        self.counters.failed(reason);
        self.result = reason;
    }

    /// A connection has ended, or the agent ends.
    pub(super) fn ended(&mut self, end: &CopyEnd) {
        self.result = match end {
            CopyEnd::Closed => "closed",
            CopyEnd::Stopped => "stopped",
            CopyEnd::Broken { .. } => return self.failed("broken"),
        };
    }

    /// Bytes to the endpoint and to the client.
    fn carried(&self) -> (u64, u64) {
        (self.copied.forward() + self.datagrams.0, self.copied.backward() + self.datagrams.1)
    }

    /// The number of the port that was called; 0 if it was a Service port that is gone.
    fn number(&self) -> u16 {
        let name = match &self.called {
            Called::Service(name, _) => name,
            Called::Pod(address, _) => return address.port(),
        };
        let catalog = self.accounts.catalog.peek();
        let service = catalog.service_named(&name.service);
        let port = service.and_then(|service| service.port_named(&name.port, name.protocol));
        port.map_or(0, |port| port.port)
    }

    /// The pod that was called by its own address: namespace and name if a Service has it as an endpoint, else the address.
    fn pod(&self) -> Option<String> {
        let Called::Pod(address, _) = &self.called else { return None };
        let catalog = self.accounts.catalog.peek();
        let name = catalog.services_of_endpoint(address.ip()).find_map(|service| {
            let mut endpoints = service.hosts.iter().chain(service.ports.iter().flat_map(|port| &port.endpoints));
            endpoints.find(|endpoint| endpoint.address == address.ip()).and_then(|endpoint| endpoint.pod.clone())
        });
        Some(name.map_or_else(|| address.ip().to_string(), |(namespace, name)| format!("{namespace}/{name}")))
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        let (to_endpoint, to_client) = self.carried();
        self.counters.carried(to_endpoint, to_client);
        let route = self.route.as_ref();
        let service = match &self.called {
            Called::Service(port, _) => Some(&port.service),
            Called::Pod(..) => None,
        };
        tracing::info!(
            target: "access",
            namespace = service.map(|service| &*service.namespace),
            service = service.map(|service| &*service.name),
            pod = self.pod(),
            port = self.number(),
            protocol = match self.called.protocol() {
                Protocol::Tcp => "tcp",
                Protocol::Udp => "udp",
            },
            client = %self.client,
            endpoint = route.map(|route| tracing::field::display(route.endpoint)),
            node = route.and_then(|route| route.node.as_deref()),
            path = route.map_or("none", |route| route.path),
            to_endpoint,
            to_client,
            seconds = self.begin.elapsed().as_secs_f64(),
            result = self.result,
        );
    }
}
