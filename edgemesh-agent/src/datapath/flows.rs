//! Ends what came through rules of nftables to an endpoint that is gone. UDP flows are forgotten, so that the next datagram
//! gets another endpoint; of TCP connections the sockets are ended, in whichever network namespace they are.

use std::{
    collections::HashSet,
    fs::File,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::PathBuf,
};

use edgemesh_mesh::model::Protocol;
use nix::sched::{CloneFlags, setns};

use super::{
    conntrack::Conntrack,
    namespaces,
    nftables::Served,
    plan::Frontend,
    sock_diag::{Connected, Diagnostics},
    stale::{Sweep, Swept},
};

/// Finds and ends flows. Entering network namespaces changes the calling thread for good, so it gets one of its own.
#[derive(Debug)]
pub struct FlowSweeper {
    /// The namespace of the rules.
    home: File,
    /// Where sockets are looked for; everywhere if unknown.
    cgroup: Option<PathBuf>,
    served: Served,
}

impl FlowSweeper {
    /// For the rules of the calling thread's network namespace.
    pub(super) fn new(served: Served, cgroup: Option<PathBuf>) -> io::Result<Self> {
        Ok(Self { home: File::open("/proc/thread-self/ns/net")?, cgroup, served })
    }

    /// Ends every flow that came through a Service to a backend for which `is_gone(service, backend, protocol)` holds.
    pub fn sweep(&mut self, is_gone: &dyn Fn(SocketAddr, SocketAddr, Protocol) -> bool) -> Swept {
        let mut swept = Swept::default();
        // The kernel's whole table would be read.
        if self.served.read().is_empty() {
            return swept;
        }
        let mut connections = HashSet::new();
        if let Err(error) = self.sweep_flows(is_gone, &mut connections, &mut swept) {
            tracing::warn!(%error, "flows of endpoints that are gone could not be ended");
            swept.failed += 1;
        }
        if connections.is_empty() {
            return swept;
        }
        let namespaces = match &self.cgroup {
            Some(cgroup) => namespaces::of_cgroup(cgroup),
            None => namespaces::of_all(),
        };
        for namespace in namespaces {
            let entered = setns(namespace, CloneFlags::CLONE_NEWNET).map_err(io::Error::from);
            if let Err(error) = entered.and_then(|()| end_connections(&connections, &mut swept)) {
                tracing::debug!(%error, "a network namespace could not be swept");
                swept.failed += 1;
            }
        }
        // A pod's namespace would stay with this thread after its pod.
        if let Err(error) = setns(&self.home, CloneFlags::CLONE_NEWNET) {
            tracing::debug!(%error, "the thread that ends flows stays in a pod's network namespace until the next time");
        }
        swept
    }

    fn sweep_flows(
        &self,
        is_gone: &dyn Fn(SocketAddr, SocketAddr, Protocol) -> bool,
        connections: &mut HashSet<(SocketAddr, SocketAddr)>,
        swept: &mut Swept,
    ) -> io::Result<()> {
        setns(&self.home, CloneFlags::CLONE_NEWNET)?;
        let mut conntrack = Conntrack::open()?;
        let (served, mut forget) = (self.served.read(), Vec::new());
        conntrack.flows(|flow| {
            let translated = flow.server != flow.called;
            if translated
                && is_served(&served, flow.called, flow.protocol)
                && is_gone(flow.called, flow.server, flow.protocol)
            {
                swept.suspects += 1;
                match flow.protocol {
                    Protocol::Tcp => drop(connections.insert((flow.client, flow.called))),
                    Protocol::Udp => forget.push(flow),
                }
            }
        })?;
        drop(served);
        conntrack.forget(&forget)?;
        swept.udp += forget.len();
        Ok(())
    }
}

impl Sweep for FlowSweeper {
    fn sweep(&mut self, is_gone: &dyn Fn(SocketAddr, SocketAddr, Protocol) -> bool) -> Swept {
        Self::sweep(self, is_gone)
    }
}

/// Others translate addresses too: their flows are not ours to end.
fn is_served(served: &HashSet<Frontend>, called: SocketAddr, protocol: Protocol) -> bool {
    let own = match called.ip() {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    [called.ip(), own]
        .into_iter()
        .any(|ip| served.contains(&Frontend { address: SocketAddr::new(ip, called.port()), protocol }))
}

fn end_connections(connections: &HashSet<(SocketAddr, SocketAddr)>, swept: &mut Swept) -> io::Result<()> {
    let mut diagnostics = Diagnostics::open()?;
    let mut stale: Vec<Connected> = Vec::new();
    diagnostics.connected(Protocol::Tcp, |socket| {
        if connections.contains(&(socket.local, socket.peer)) {
            stale.push(socket);
        }
    })?;
    for socket in stale {
        match diagnostics.destroy(&socket) {
            Ok(()) => swept.tcp += 1,
            // It was closed meanwhile.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
            Err(error) => {
                tracing::debug!(%error, peer = %socket.peer, "a socket could not be ended");
                swept.failed += 1;
            }
        }
    }
    Ok(())
}
