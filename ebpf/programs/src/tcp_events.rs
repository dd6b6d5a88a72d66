//! What befalls TCP sockets that were sent to backends, where no other hook sees it: SYNs that stay unanswered.

use aya_ebpf::{
    EbpfContext,
    bindings::{
        BPF_SOCK_OPS_RTO_CB, BPF_SOCK_OPS_RTO_CB_FLAG, BPF_SOCK_OPS_TCP_CONNECT_CB, BPF_TCP_SYN_SENT, bpf_sock_ops,
    },
    helpers::bpf_get_socket_cookie,
    programs::SockOpsContext,
};
use edgemesh_ebpf_abi::{SocketAddress, SocketAddress6};

use crate::{
    families::{Family, Socket, V4, V6},
    maps::UNANSWERED,
    sockets::{AF_INET, AF_INET6, is_mapped, read},
};

/// One event in the life of a TCP socket.
#[inline(always)]
pub fn note(context: &SockOpsContext) {
    let raw = raw(context);
    match read(&raw const raw.op) {
        BPF_SOCK_OPS_TCP_CONNECT_CB if remote(raw).is_some_and(|remote| remote.is_remembered(socket(context))) => {
            // Beside what other programs asked for. What can't be asked for is not told.
            let _ =
                context.set_cb_flags((read(&raw const raw.bpf_sock_ops_cb_flags) | BPF_SOCK_OPS_RTO_CB_FLAG) as i32);
        }
        BPF_SOCK_OPS_RTO_CB if read(&raw const raw.state) == BPF_TCP_SYN_SENT => {
            if let Some(remote) = remote(raw) {
                // Without room there are enough in it already.
                let _ = UNANSWERED.output::<SocketAddress6>(remote.address(), 0);
            }
        }
        _ => {}
    }
}

/// The other end of a socket.
enum Remote {
    /// Also in mapped form: it is remembered as what it is.
    V4(SocketAddress),
    V6(SocketAddress6),
}

impl Remote {
    #[inline(always)]
    fn is_remembered(&self, socket: Socket) -> bool {
        match *self {
            Self::V4(backend) => V4::service(socket, backend).is_some(),
            Self::V6(backend) => V6::service(socket, backend).is_some(),
        }
    }

    #[inline(always)]
    fn address(&self) -> SocketAddress6 {
        match *self {
            Self::V4(backend) => backend.into(),
            Self::V6(backend) => backend,
        }
    }
}

#[inline(always)]
fn remote(raw: &bpf_sock_ops) -> Option<Remote> {
    // All fields before any branch: from loads in two branches the compiler can make one at a variable offset, which the
    // verifier refuses.
    let word = |at: usize| read(&raw const raw.remote_ip6[at]);
    let (first, last) = ([word(0), word(1), word(2)], word(3));
    let address = read(&raw const raw.remote_ip4);
    // The upper half of the word in memory order.
    let port = (u32::from_be(read(&raw const raw.remote_port)) as u16).to_be();
    match read(&raw const raw.family) {
        AF_INET => Some(Remote::V4(SocketAddress::from_network(address, port))),
        AF_INET6 if is_mapped(first) => Some(Remote::V4(SocketAddress::from_network(last, port))),
        AF_INET6 => Some(Remote::V6(SocketAddress6::from_network([first[0], first[1], first[2], last], port))),
        _ => None,
    }
}

#[inline(always)]
fn socket(context: &SockOpsContext) -> Socket {
    // SAFETY: the helper takes the context of this program type.
    Socket { cookie: unsafe { bpf_get_socket_cookie(context.as_ptr()) }, connected: true }
}

#[inline(always)]
fn raw(context: &SockOpsContext) -> &bpf_sock_ops {
    // SAFETY: the kernel gives a valid context for the length of the program.
    unsafe { &*context.ops }
}
