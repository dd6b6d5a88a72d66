//! Many datagrams with one system call each way: `recvmmsg` and `sendmmsg`. Under load most of what an answer about a cluster
//! name costs is the kernel's entry, not the answer.

use std::{
    array, io,
    mem::{self, MaybeUninit},
    net::SocketAddr,
    os::fd::{AsFd, AsRawFd},
    ptr,
};

use socket2::{SockAddr, SockAddrStorage};

/// Datagrams that are taken, or given back, with one call.
const BATCH: usize = 32;

/// What arrived last, in memory that is used again for the next.
pub(super) struct Received {
    /// Room for [`BATCH`] datagrams, `longest` bytes each.
    bytes: Vec<u8>,
    longest: usize,
    /// Length and sender of each that arrived.
    arrived: Vec<(usize, SocketAddr)>,
}

/// Answers that wait to be sent, in memory that is used again.
#[derive(Default)]
pub(super) struct Answers {
    /// Each with room for its bytes; the first `waiting` are to be sent.
    all: Vec<(Vec<u8>, Option<SockAddr>)>,
    waiting: usize,
}

impl Received {
    /// Room for datagrams of up to `longest` bytes. Of a longer one the rest is lost: leave room for one byte more than is allowed.
    pub(super) fn new(longest: usize) -> Self {
        Self { bytes: vec![0; longest * BATCH], longest, arrived: Vec::with_capacity(BATCH) }
    }

    /// Waits for a datagram, takes it with all others that wait, and returns how many that were: none when the socket is shut down.
    ///
    /// # Errors
    /// The socket's; `WouldBlock` when there is nothing and the socket is a nonblocking one.
    pub(super) fn receive(&mut self, socket: &impl AsFd) -> io::Result<usize> {
        self.arrived.clear();
        let mut names: [SockAddrStorage; BATCH] = array::from_fn(|_| SockAddrStorage::zeroed());
        let mut parts = [MaybeUninit::<libc::iovec>::uninit(); BATCH];
        // SAFETY: all zeros is a valid value of these C structures.
        let mut headers: [libc::mmsghdr; BATCH] = unsafe { mem::zeroed() };
        for (((header, part), name), room) in
            headers.iter_mut().zip(&mut parts).zip(&mut names).zip(self.bytes.chunks_exact_mut(self.longest))
        {
            let part = part.write(libc::iovec { iov_base: room.as_mut_ptr().cast(), iov_len: room.len() });
            header.msg_hdr.msg_iov = part;
            header.msg_hdr.msg_iovlen = 1;
            header.msg_hdr.msg_name = ptr::from_mut(name).cast();
            header.msg_hdr.msg_namelen = name.size_of();
        }
        // SAFETY: every header points to memory that lives and is borrowed until the call has returned.
        let count = unsafe {
            libc::recvmmsg(
                socket.as_fd().as_raw_fd(),
                headers.as_mut_ptr(),
                BATCH as libc::c_uint,
                libc::MSG_WAITFORONE,
                ptr::null_mut(),
            )
        };
        let count = usize::try_from(count).map_err(|_| io::Error::last_os_error())?;
        for (header, name) in headers.iter().zip(names).take(count) {
            // SAFETY: the kernel wrote an address of this length.
            let sender = unsafe { SockAddr::new(name, header.msg_hdr.msg_namelen) }.as_socket();
            // From a socket that is shut down the kernel fills every place with a datagram of nobody's.
            self.arrived.extend(sender.map(|sender| (header.msg_len as usize, sender)));
        }
        Ok(self.arrived.len())
    }

    /// The datagrams that arrived, with their senders.
    pub(super) fn datagrams(&self) -> impl Iterator<Item = (&[u8], SocketAddr)> {
        let rooms = self.bytes.chunks_exact(self.longest);
        rooms.zip(&self.arrived).map(|(room, &(length, sender))| (&room[..length.min(room.len())], sender))
    }
}

impl Answers {
    /// Has `write` make an answer to `client`; it waits to be sent if `write` says so.
    pub(super) fn add(&mut self, client: SocketAddr, write: impl FnOnce(&mut Vec<u8>) -> bool) {
        if self.waiting == self.all.len() {
            self.all.push((Vec::with_capacity(512), None));
        }
        let (bytes, to) = &mut self.all[self.waiting];
        if write(bytes) {
            *to = Some(client.into());
            self.waiting += 1;
        }
    }

    /// Sends all that wait. One that the kernel refuses is left out: it says nothing about the others, and a client that is
    /// gone needs no answer. Where the socket's queue stays full for longer than its time limit, the rest is left out too: clients
    /// ask again.
    pub(super) fn send(&mut self, socket: &impl AsFd) {
        let mut begin = 0;
        while begin < self.waiting {
            let some = &mut self.all[begin..self.waiting.min(begin + BATCH)];
            let mut parts = [MaybeUninit::<libc::iovec>::uninit(); BATCH];
            // SAFETY: all zeros is a valid value of these C structures.
            let mut headers: [libc::mmsghdr; BATCH] = unsafe { mem::zeroed() };
            for ((header, part), (bytes, to)) in headers.iter_mut().zip(&mut parts).zip(some.iter_mut()) {
                let part = part.write(libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() });
                header.msg_hdr.msg_iov = part;
                header.msg_hdr.msg_iovlen = 1;
                if let Some(to) = to {
                    header.msg_hdr.msg_name = to.as_ptr().cast_mut().cast();
                    header.msg_hdr.msg_namelen = to.len();
                }
            }
            // SAFETY: the first headers, as many as there are answers, point to memory that lives until the call has
            // returned; the kernel only reads it.
            let sent = unsafe {
                libc::sendmmsg(socket.as_fd().as_raw_fd(), headers.as_mut_ptr(), some.len() as libc::c_uint, 0)
            };
            match usize::try_from(sent) {
                Ok(sent) => begin += sent.max(1),
                Err(_) => match io::Error::last_os_error().kind() {
                    io::ErrorKind::WouldBlock => break,
                    io::ErrorKind::Interrupted => {}
                    // The error is that of the first one.
                    _ => begin += 1,
                },
            }
        }
        self.waiting = 0;
    }
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;

    use super::*;

    fn socket() -> UdpSocket {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.set_nonblocking(true).unwrap();
        socket
    }

    #[test]
    fn datagrams_come_with_their_senders_and_answers_go_back_to_them() {
        let (server, clients) = (socket(), [socket(), socket()]);
        let to = server.local_addr().unwrap();
        for number in 0..BATCH + 3 {
            clients[number % 2].send_to(&vec![7; number], to).unwrap();
        }
        let (mut received, mut answers) = (Received::new(100), Answers::default());
        let mut seen = 0;
        for expected in [BATCH, 3] {
            assert_eq!(received.receive(&server).unwrap(), expected);
            for (bytes, sender) in received.datagrams() {
                assert_eq!((bytes.len(), sender), (seen, clients[seen % 2].local_addr().unwrap()));
                answers.add(sender, |out| {
                    out.clear();
                    out.extend_from_slice(bytes);
                    // Every third gets none.
                    seen % 3 != 0
                });
                seen += 1;
            }
        }
        assert_eq!(received.receive(&server).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        assert_eq!(received.datagrams().count(), 0);
        answers.send(&server);
        assert_eq!(answers.waiting, 0);
        let mut buffer = [0; 100];
        for number in (0..BATCH + 3).filter(|number| number % 3 != 0) {
            assert_eq!(clients[number % 2].recv(&mut buffer).unwrap(), number);
        }
    }

    #[test]
    fn an_answer_that_is_refused_does_not_keep_the_others_back() {
        let (server, client) = (socket(), socket());
        let mut answers = Answers::default();
        let good = client.local_addr().unwrap();
        // Port 0 can't be sent to.
        for to in ["127.0.0.1:0".parse().unwrap(), good, "127.0.0.1:0".parse().unwrap(), good] {
            answers.add(to, |out| {
                out.push(1);
                true
            });
        }
        answers.send(&server);
        assert_eq!(answers.waiting, 0);
        let mut buffer = [0; 10];
        assert!((0..2).all(|_| client.recv(&mut buffer).is_ok_and(|length| length == 1)));
    }

    #[test]
    fn a_socket_that_is_shut_down_has_none_after_those_that_wait() {
        let (server, client) = (socket(), socket());
        server.set_nonblocking(false).unwrap();
        client.send_to(&[1], server.local_addr().unwrap()).unwrap();
        // It says that the socket isn't connected.
        socket2::SockRef::from(&server).shutdown(std::net::Shutdown::Read).unwrap_err();
        let mut received = Received::new(10);
        assert_eq!(received.receive(&server).unwrap(), 1);
        assert_eq!(received.receive(&server).unwrap(), 0);
    }

    #[test]
    fn what_is_too_long_is_cut_where_the_caller_can_see_it() {
        let (server, client) = (socket(), socket());
        client.send_to(&[1; 50], server.local_addr().unwrap()).unwrap();
        let mut received = Received::new(11);
        received.receive(&server).unwrap();
        assert_eq!(received.datagrams().map(|(bytes, _)| bytes.len()).collect::<Vec<_>>(), [11]);
    }
}
