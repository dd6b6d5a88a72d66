//! Queries over UDP: a thread for each socket, which sleeps in the call that takes datagrams. As a task it would be woken through the
//! runtime's poller, with more switches between threads than an answer from the catalog costs otherwise; and it would wait behind
//! whatever else the runtime does.

use std::{
    io,
    net::{Shutdown as Direction, SocketAddr},
    sync::Arc,
    thread,
    time::Duration,
};

use edgemesh_telemetry::Shutdown;
use socket2::Socket;
use tokio::runtime::Handle;

use super::{
    datagrams::{Answers, Received},
    limits::Limits,
    reply::Transport,
    resolver::{Client, Resolver, Step},
};

/// Queries are short; a longer datagram isn't one.
pub(super) const MAX_QUERY: usize = 4096;
/// Pause after an error of the socket.
const PAUSE: Duration = Duration::from_millis(100);

/// Answers the queries of a blocking socket until shutdown. Must be called in a tokio runtime.
///
/// # Errors
/// When the thread can't be started.
pub(super) fn serve(
    socket: Socket,
    resolver: Arc<Resolver>,
    queries: Arc<Limits>,
    shutdown: &Shutdown,
) -> io::Result<()> {
    let socket = Arc::new(socket);
    let (runtime, stop, counted) = (Handle::current(), shutdown.clone(), shutdown.token());
    let closing = Closing(Arc::clone(&socket));
    thread::Builder::new().name("dns-udp".to_owned()).spawn(move || {
        let _counted = counted;
        let _entered = runtime.enter();
        run(socket, &resolver, &queries, &stop);
    })?;
    let stopping = shutdown.stopping().clone();
    shutdown.spawn(async move {
        let _closing = closing;
        stopping.cancelled().await;
    });
    Ok(())
}

/// Wakes the thread for its end when it is dropped, be it with the runtime.
struct Closing(Arc<Socket>);

impl Drop for Closing {
    fn drop(&mut self) {
        // It says that the socket isn't connected, and wakes who receives from it all the same; answers can still be sent.
        drop(self.0.shutdown(Direction::Read));
    }
}

fn run(socket: Arc<Socket>, resolver: &Arc<Resolver>, queries: &Arc<Limits>, shutdown: &Shutdown) {
    let mut received = Received::new(MAX_QUERY + 1);
    let mut answers = Answers::default();
    while !shutdown.stopping().is_cancelled() {
        match received.receive(&*socket) {
            Ok(0) => return,
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => {
                tracing::warn!(%error, "DNS socket");
                thread::sleep(PAUSE);
                continue;
            }
        }
        for (message, client) in received.datagrams().filter(|(message, _)| message.len() <= MAX_QUERY) {
            let asking = Client { address: client.ip(), transport: Transport::Udp };
            answers.add(client, |out| match resolver.at_once(message, asking, out) {
                Step::Done => true,
                Step::Ignore => false,
                Step::Later => match queries.enter(asking.address) {
                    Err(limit) => resolver.overloaded(message, Transport::Udp, limit, out),
                    Ok(place) => {
                        let (socket, resolver) = (Arc::clone(&socket), Arc::clone(resolver));
                        let message = message.to_vec();
                        shutdown.spawn(async move {
                            let _place = place;
                            later(&socket, &resolver, &message, client).await;
                        });
                        false
                    }
                },
            });
        }
        answers.send(&*socket);
    }
}

/// Answers a query for which an upstream must be asked.
async fn later(socket: &Socket, resolver: &Resolver, message: &[u8], client: SocketAddr) {
    let asking = Client { address: client.ip(), transport: Transport::Udp };
    let mut out = Vec::new();
    if resolver.later(message, asking, &mut out).await {
        // A client that is gone needs no answer; where the queue is full it asks again.
        drop(socket.send_to_with_flags(&out, &client.into(), libc::MSG_DONTWAIT));
    }
}
