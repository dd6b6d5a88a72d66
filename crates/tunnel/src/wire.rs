//! The frames at the start of a stream: the dialer's header, then the other side's answer. Each is a length-delimited
//! protobuf message of at most [`MAX_FRAME`] bytes; after them the stream carries bytes, or datagrams.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
};

use prost::Message;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::error::{Refusal, RefusalReason};

/// Longest header or answer, in bytes.
pub(crate) const MAX_FRAME: usize = 4096;

/// What a stream carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Carried {
    /// The bytes of a TCP connection, with its half-close.
    Tcp,
    /// The datagrams of one UDP flow, each after its length (u16, big endian).
    Udp,
}

/// What a client called.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StreamTarget {
    /// A Service port. The dialing side has chosen one of its endpoints.
    Service {
        /// Namespace of the Service.
        namespace: String,
        /// Name of the Service.
        service: String,
        /// Name of the Service port; empty for the only port.
        port_name: String,
    },
    /// A pod, by its own address.
    Pod,
    /// The agent itself, to tell it what the dialing side holds of endpoints of its own node. The endpoint is [`NO_ENDPOINT`].
    Island,
}

/// The endpoint in the header of a stream that goes to none.
pub const NO_ENDPOINT: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0);

/// The first frame of a stream: where it goes and for whom.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StreamHeader {
    /// What was called.
    pub target: StreamTarget,
    /// TCP or UDP.
    pub protocol: Carried,
    /// The chosen endpoint, or the pod's address and port; it must be on the node that accepts the stream.
    pub endpoint: SocketAddr,
    /// The client as the dialing side knows it: for the log, and what a Service that wants the PROXY protocol is told.
    pub source: String,
}

#[derive(Clone, PartialEq, Message)]
struct HeaderFrame {
    #[prost(string, tag = "1")]
    namespace: String,
    #[prost(string, tag = "2")]
    service: String,
    #[prost(string, tag = "3")]
    port_name: String,
    /// 1: TCP, 2: UDP.
    #[prost(uint32, tag = "4")]
    protocol: u32,
    /// 4 or 16 bytes.
    #[prost(bytes = "vec", tag = "5")]
    address: Vec<u8>,
    #[prost(uint32, tag = "6")]
    port: u32,
    #[prost(string, tag = "7")]
    source: String,
    /// 0: a Service port, which the first three fields name. 1: a pod, and they are empty, so that an agent that doesn't know
    /// this field looks for a Service without a name and refuses. 2: the agent itself, and there is no endpoint either.
    #[prost(uint32, tag = "8")]
    target: u32,
    /// The dialing side can carry the connection in blocks.
    #[prost(bool, tag = "9")]
    blocks: bool,
}

const SERVICE: u32 = 0;
const POD: u32 = 1;
const ISLAND: u32 = 2;

#[derive(Clone, PartialEq, Message)]
struct AnswerFrame {
    /// 0: accepted, otherwise a refusal.
    #[prost(uint32, tag = "1")]
    code: u32,
    #[prost(string, tag = "2")]
    detail: String,
    /// The connection comes and goes in blocks. Not set by those that know none, nor said to them.
    #[prost(bool, tag = "3")]
    blocks: bool,
}

/// How the connection goes after the answer, if both sides can: in blocks, or as it is.
pub(crate) type InBlocks = bool;

impl StreamHeader {
    /// The encoded frame, or its length if it is too long.
    pub(crate) fn encode(&self) -> Result<Vec<u8>, usize> {
        let (target, [namespace, service, port_name]) = match &self.target {
            StreamTarget::Service { namespace, service, port_name } => {
                (SERVICE, [namespace, service, port_name].map(String::clone))
            }
            StreamTarget::Pod => (POD, Default::default()),
            StreamTarget::Island => (ISLAND, Default::default()),
        };
        let frame = HeaderFrame {
            namespace,
            service,
            port_name,
            target,
            protocol: match self.protocol {
                Carried::Tcp => 1,
                Carried::Udp => 2,
            },
            address: match self.endpoint.ip() {
                IpAddr::V4(address) => address.octets().to_vec(),
                IpAddr::V6(address) => address.octets().to_vec(),
            },
            port: u32::from(self.endpoint.port()),
            source: self.source.clone(),
            blocks: self.protocol == Carried::Tcp,
        };
        if frame.encoded_len() > MAX_FRAME {
            return Err(frame.encoded_len());
        }
        Ok(frame.encode_length_delimited_to_vec())
    }

    /// Reads and checks a header. Says also whether the dialing side can carry the connection in blocks.
    pub(crate) async fn read(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<(Self, InBlocks)> {
        let frame = HeaderFrame::decode(read_frame(stream).await?.as_slice())?;
        let address = if let Ok(v4) = <[u8; 4]>::try_from(frame.address.as_slice()) {
            IpAddr::from(v4)
        } else if let Ok(v6) = <[u8; 16]>::try_from(frame.address.as_slice()) {
            IpAddr::from(v6)
        } else {
            return Err(malformed("the endpoint's address is neither IPv4 nor IPv6"));
        };
        let port = u16::try_from(frame.port).map_err(|_| malformed("the endpoint's port is out of range"))?;
        let protocol = match frame.protocol {
            1 => Carried::Tcp,
            2 => Carried::Udp,
            _ => return Err(malformed("the protocol is neither TCP nor UDP")),
        };
        let HeaderFrame { namespace, service, port_name, blocks, .. } = frame;
        let target = match frame.target {
            SERVICE if namespace.is_empty() || service.is_empty() => {
                return Err(malformed("the Service has no name"));
            }
            SERVICE => StreamTarget::Service { namespace, service, port_name },
            POD | ISLAND if !(namespace.is_empty() && service.is_empty() && port_name.is_empty()) => {
                return Err(malformed("what is no Service comes with the name of one"));
            }
            POD if port == 0 => return Err(malformed("a pod's port is missing")),
            POD => StreamTarget::Pod,
            ISLAND if SocketAddr::new(address, port) != NO_ENDPOINT => {
                return Err(malformed("the agent itself is called with an endpoint"));
            }
            ISLAND => StreamTarget::Island,
            _ => return Err(malformed("what is called is not known")),
        };
        let header = Self { target, protocol, endpoint: SocketAddr::new(address, port), source: frame.source };
        Ok((header, blocks && protocol == Carried::Tcp))
    }
}

/// Answers a header.
pub(crate) async fn write_answer(
    stream: &mut (impl AsyncWrite + Unpin),
    answer: Result<InBlocks, &Refusal>,
) -> io::Result<()> {
    let frame = match answer {
        Ok(blocks) => AnswerFrame { blocks, ..AnswerFrame::default() },
        Err(refusal) => AnswerFrame {
            code: code_of(refusal.reason),
            detail: refusal.detail.chars().take(512).collect(),
            blocks: false,
        },
    };
    stream.write_all(&frame.encode_length_delimited_to_vec()).await?;
    stream.flush().await
}

/// Reads the answer to a header.
pub(crate) async fn read_answer(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Result<InBlocks, Refusal>> {
    let frame = AnswerFrame::decode(read_frame(stream).await?.as_slice())?;
    Ok(match reason_of(frame.code) {
        None => Ok(frame.blocks),
        Some(reason) => Err(Refusal { reason, detail: frame.detail }),
    })
}

fn code_of(reason: RefusalReason) -> u32 {
    match reason {
        RefusalReason::NotHere => 1,
        RefusalReason::DialFailed => 2,
        RefusalReason::Busy => 3,
        RefusalReason::Malformed => 4,
        RefusalReason::NotServing => 5,
    }
}

fn reason_of(code: u32) -> Option<RefusalReason> {
    match code {
        0 => None,
        1 => Some(RefusalReason::NotHere),
        2 => Some(RefusalReason::DialFailed),
        3 => Some(RefusalReason::Busy),
        4 => Some(RefusalReason::Malformed),
        // A newer peer may know more reasons; all mean no.
        _ => Some(RefusalReason::NotServing),
    }
}

async fn read_frame(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Vec<u8>> {
    // Byte by byte, since what follows the frame belongs to the carried connection. The limit fits in two bytes.
    let mut length = 0usize;
    for shift in [0, 7] {
        let byte = stream.read_u8().await?;
        length |= usize::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            if length > MAX_FRAME {
                break;
            }
            let mut frame = vec![0; length];
            stream.read_exact(&mut frame).await?;
            return Ok(frame);
        }
    }
    Err(malformed("the frame is longer than the limit"))
}

fn malformed(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> StreamHeader {
        StreamHeader {
            target: StreamTarget::Service {
                namespace: "default".into(),
                service: "web".into(),
                port_name: "http".into(),
            },
            protocol: Carried::Udp,
            endpoint: "10.244.3.7:8080".parse().unwrap(),
            source: "10.244.1.2:40000".into(),
        }
    }

    #[tokio::test]
    async fn a_header_arrives_as_it_was_sent_and_leaves_the_following_bytes() {
        let mut bytes = header().encode().unwrap();
        bytes.extend_from_slice(b"payload");
        let mut reader = bytes.as_slice();
        assert_eq!(StreamHeader::read(&mut reader).await.unwrap(), (header(), false));
        assert_eq!(reader, b"payload");
    }

    #[tokio::test]
    async fn an_ipv6_endpoint_is_kept() {
        let header = StreamHeader { endpoint: "[fd00::1]:53".parse().unwrap(), ..header() };
        let bytes = header.encode().unwrap();
        assert_eq!(StreamHeader::read(&mut bytes.as_slice()).await.unwrap().0, header);
    }

    #[tokio::test]
    async fn a_pod_is_called_without_a_service_and_never_beside_one() {
        let pod = StreamHeader { target: StreamTarget::Pod, ..header() };
        assert_eq!(StreamHeader::read(&mut pod.encode().unwrap().as_slice()).await.unwrap().0, pod);
        let frame = HeaderFrame {
            protocol: 1,
            address: vec![10, 244, 3, 7],
            port: 8080,
            target: POD,
            ..HeaderFrame::default()
        };
        let service = HeaderFrame { namespace: "ns".into(), service: "s".into(), target: SERVICE, ..frame.clone() };
        let cases = [
            (frame.clone(), true),
            (service.clone(), true),
            (HeaderFrame { target: SERVICE, ..frame.clone() }, false),
            (HeaderFrame { target: POD, ..service.clone() }, false),
            (HeaderFrame { target: ISLAND, ..service.clone() }, false),
            (HeaderFrame { target: ISLAND, ..frame.clone() }, false),
            (HeaderFrame { target: ISLAND, address: vec![0; 4], port: 0, ..frame.clone() }, true),
            (HeaderFrame { target: ISLAND, address: vec![0; 16], port: 0, ..frame.clone() }, false),
            (HeaderFrame { target: 3, ..frame.clone() }, false),
            (HeaderFrame { namespace: String::new(), ..service.clone() }, false),
            (HeaderFrame { port_name: "http".into(), ..frame.clone() }, false),
            (HeaderFrame { port: 0, ..frame.clone() }, false),
            (HeaderFrame { port: 65_536, ..frame.clone() }, false),
            (HeaderFrame { address: vec![10, 244, 3], ..frame.clone() }, false),
            (HeaderFrame { protocol: 3, ..frame.clone() }, false),
        ];
        for (frame, good) in cases {
            let bytes = frame.encode_length_delimited_to_vec();
            assert_eq!(StreamHeader::read(&mut bytes.as_slice()).await.is_ok(), good, "{frame:?}");
        }
    }

    #[tokio::test]
    async fn headers_with_changed_bytes_are_errors_or_headers_that_hold_together() {
        let island = StreamHeader { target: StreamTarget::Island, endpoint: NO_ENDPOINT, ..header() };
        let headers = [header(), StreamHeader { target: StreamTarget::Pod, ..header() }, island];
        let originals = headers.map(|header| header.encode().unwrap());
        for original in originals {
            for at in 0..original.len() {
                for value in 0..=u8::MAX {
                    let mut bytes = original.clone();
                    bytes[at] = value;
                    let Ok((read, _)) = StreamHeader::read(&mut bytes.as_slice()).await else { continue };
                    if let StreamTarget::Service { namespace, service, .. } = &read.target {
                        assert!(!namespace.is_empty() && !service.is_empty(), "{bytes:?}");
                    }
                    assert_eq!(StreamHeader::read(&mut read.encode().unwrap().as_slice()).await.unwrap().0, read);
                }
            }
        }
    }

    #[tokio::test]
    async fn only_tcp_goes_in_blocks_and_only_where_both_sides_say_so() {
        let tcp = StreamHeader { protocol: Carried::Tcp, ..header() };
        for (header, blocks) in [(tcp, true), (header(), false)] {
            assert_eq!(StreamHeader::read(&mut header.encode().unwrap().as_slice()).await.unwrap().1, blocks);
        }
        // From before there were blocks.
        let old = HeaderFrame { protocol: 1, address: vec![0; 4], port: 1, target: POD, ..HeaderFrame::default() };
        assert!(!StreamHeader::read(&mut old.encode_length_delimited_to_vec().as_slice()).await.unwrap().1);
        assert_eq!(read_answer(&mut &[0_u8][..]).await.unwrap(), Ok(false));
        for blocks in [true, false] {
            let mut bytes = Vec::new();
            write_answer(&mut bytes, Ok(blocks)).await.unwrap();
            assert_eq!(read_answer(&mut bytes.as_slice()).await.unwrap(), Ok(blocks));
        }
    }

    #[tokio::test]
    async fn garbage_and_oversized_frames_are_errors() {
        for bytes in [&[0xff; 64][..], &[0x80, 0x7f], &[0x03, 0xff, 0xff, 0xff], b"GET / HTTP/1.1\r\n\r\n"] {
            assert!(StreamHeader::read(&mut &*bytes).await.is_err());
        }
        assert!(StreamHeader { source: "x".repeat(MAX_FRAME), ..header() }.encode().is_err());
    }

    #[tokio::test]
    async fn a_refusal_keeps_its_reason_and_sentence() {
        let refusal = Refusal::new(RefusalReason::NotHere, "no such endpoint");
        let mut bytes = Vec::new();
        write_answer(&mut bytes, Err(&refusal)).await.unwrap();
        assert_eq!(read_answer(&mut bytes.as_slice()).await.unwrap(), Err(refusal));
    }
}
