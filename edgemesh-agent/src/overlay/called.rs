//! What a client called: a Service port, or a pod of another network by its own address.

use std::{fmt, net::SocketAddr, sync::Arc};

use edgemesh_mesh::{IpFamily, model::Protocol};

use crate::node_local::{Allocator, ServicePortName};

/// What was called.
#[derive(Debug, Clone)]
pub(super) enum Called {
    /// A Service port, at a Service address of that family.
    Service(Arc<ServicePortName>, IpFamily),
    /// A pod.
    Pod(SocketAddr, Protocol),
}

impl Called {
    /// Its protocol.
    pub(super) fn protocol(&self) -> Protocol {
        match self {
            Self::Service(port, _) => port.protocol,
            Self::Pod(_, protocol) => *protocol,
        }
    }
}

impl fmt::Display for Called {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Service(port, _) => port.fmt(f),
            Self::Pod(address, Protocol::Tcp) => write!(f, "pod {address}/tcp"),
            Self::Pod(address, Protocol::Udp) => write!(f, "pod {address}/udp"),
        }
    }
}

/// What a listener is for: it says what the local address of a connection means.
#[derive(Debug, Clone)]
pub(super) enum Listening {
    /// At node-local addresses, which stand for Service ports.
    Services(Arc<Allocator>),
    /// For captured connections: their local address is the pod's.
    Pods,
}

impl Listening {
    /// What was called at a local address; nothing if that means nothing.
    pub(super) fn called(&self, local: SocketAddr, protocol: Protocol) -> Option<Called> {
        match self {
            Self::Services(allocator) => {
                let port = allocator.service_of(local.ip())?;
                (port.protocol == protocol).then(|| Called::Service(port, IpFamily::from(local.ip())))
            }
            // What is sent to the listener's own address has not been captured.
            Self::Pods => (!local.ip().is_loopback()).then_some(Called::Pod(local, protocol)),
        }
    }
}
