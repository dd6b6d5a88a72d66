//! Writes answers: compact, within the client's size, with the question exactly as the client wrote it.

use std::net::{Ipv4Addr, Ipv6Addr};

use super::wire::{CLASS_IN, Edns, HEADER, Name, Query, kind, rcode};

/// Largest UDP answer: no fragments on any link (DNS flag day 2020).
pub(super) const MAX_UDP: usize = 1232;
/// Largest UDP answer to a client without EDNS.
const PLAIN_UDP: usize = 512;
/// Largest message over TCP.
const MAX_TCP: usize = 65_535;
/// Length of the OPT record that goes with each EDNS answer.
const OPT_LEN: usize = 11;

/// How a query came, and so how large its answer may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Transport {
    Udp,
    Tcp,
}

/// Data of a record that this server makes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Data {
    A(Ipv4Addr),
    Aaaa(Ipv6Addr),
    Cname(Name),
    Ptr(Name),
    Ns(Name),
    Txt(&'static str),
    Srv { weight: u16, port: u16, target: Name },
    Soa(Soa),
}

/// Start of authority of the cluster zone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Soa {
    pub(super) server: Name,
    pub(super) mailbox: Name,
    pub(super) serial: u32,
    /// TTL of negative answers (RFC 2308).
    pub(super) minimum: u32,
}

/// One record of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Record {
    /// Its name; the question's if none is given.
    pub(super) owner: Option<Name>,
    pub(super) ttl: u32,
    pub(super) data: Data,
}

/// The three sections of records.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Section {
    Answer,
    Authority,
    Additional,
}

/// An answer being written.
pub(super) struct Reply<'a> {
    out: &'a mut Vec<u8>,
    limit: usize,
    edns: Option<Edns>,
    rcode: u8,
}

impl<'a> Reply<'a> {
    /// Begins an answer to a query in a buffer, which is cleared.
    pub(super) fn new(query: &Query<'_>, transport: Transport, rcode: u8, out: &'a mut Vec<u8>) -> Self {
        let limit = match (transport, query.edns) {
            (Transport::Tcp, _) => MAX_TCP,
            (Transport::Udp, None) => PLAIN_UDP,
            (Transport::Udp, Some(edns)) => usize::from(edns.payload).clamp(PLAIN_UDP, MAX_UDP),
        };
        let limit = limit - if query.edns.is_some() { OPT_LEN } else { 0 };
        header(query.id, query.flags, rcode, out);
        out[5] = 1;
        out.extend_from_slice(query.question);
        Self { out, limit, edns: query.edns, rcode }
    }

    /// This server is the authority for what it answers.
    pub(super) fn authoritative(&mut self) {
        self.out[2] |= 0x04;
    }

    /// Adds a record. If it doesn't fit the answer is marked as truncated (additional records are just left out), and
    /// false is returned.
    pub(super) fn record(&mut self, section: Section, query: &Query<'_>, record: &Record) -> bool {
        let start = self.out.len();
        match &record.owner {
            None => self.out.extend_from_slice(&[0xc0, HEADER as u8]),
            Some(name) => self.compressed(name, query),
        }
        let (kind, ttl) = (record.data.kind(), record.ttl);
        self.out.extend_from_slice(&kind.to_be_bytes());
        self.out.extend_from_slice(&CLASS_IN.to_be_bytes());
        self.out.extend_from_slice(&ttl.to_be_bytes());
        let length_at = self.out.len();
        self.out.extend_from_slice(&[0, 0]);
        self.data(&record.data, query);
        let length = (self.out.len() - length_at - 2) as u16;
        self.out[length_at..length_at + 2].copy_from_slice(&length.to_be_bytes());
        if self.out.len() > self.limit {
            self.out.truncate(start);
            if section != Section::Additional {
                self.truncated();
            }
            return false;
        }
        self.count(section, 1);
        true
    }

    /// Adds records that are in wire form already, with any pointers right for this place. False if they don't fit.
    pub(super) fn raw(&mut self, body: &[u8], counts: [u16; 3]) -> bool {
        if self.out.len() + body.len() > self.limit {
            self.truncated();
            return false;
        }
        self.out.extend_from_slice(body);
        for (section, count) in [Section::Answer, Section::Authority, Section::Additional].into_iter().zip(counts) {
            self.count(section, count);
        }
        true
    }

    /// Where the next record will begin.
    pub(super) fn position(&self) -> usize {
        self.out.len()
    }

    /// The bytes written so far, to be adjusted in place.
    pub(super) fn bytes(&mut self) -> &mut [u8] {
        self.out
    }

    /// Ends the answer with the OPT record that EDNS asks for. True if records had to be left out.
    pub(super) fn finish(mut self) -> bool {
        let cut = self.out[2] & 0x02 != 0;
        let Some(edns) = self.edns else { return cut };
        let payload = (MAX_UDP as u16).to_be_bytes();
        let flags = if edns.dnssec_ok { 0x80 } else { 0 };
        self.out.extend_from_slice(&[
            0,
            0,
            kind::OPT as u8,
            payload[0],
            payload[1],
            self.rcode >> 4,
            0,
            flags,
            0,
            0,
            0,
        ]);
        self.count(Section::Additional, 1);
        cut
    }

    /// Says that records are left out.
    pub(super) fn truncated(&mut self) {
        self.out[2] |= 0x02;
    }

    fn count(&mut self, section: Section, more: u16) {
        let at = match section {
            Section::Answer => 6,
            Section::Authority => 8,
            Section::Additional => 10,
        };
        let count = u16::from_be_bytes([self.out[at], self.out[at + 1]]) + more;
        self.out[at..at + 2].copy_from_slice(&count.to_be_bytes());
    }

    /// A name, with a pointer to the question for the end that both have in common.
    fn compressed(&mut self, name: &Name, query: &Query<'_>) {
        for start in name.starts() {
            let suffix = &name.wire()[start..];
            if suffix.len() > 1
                && let Some(at) = query.name.suffix_at(suffix)
            {
                self.out.extend_from_slice(&name.wire()[..start]);
                self.out.extend_from_slice(&(0xc000 | (HEADER + at) as u16).to_be_bytes());
                return;
            }
        }
        self.out.extend_from_slice(name.wire());
    }

    fn data(&mut self, data: &Data, query: &Query<'_>) {
        match data {
            Data::A(ip) => self.out.extend_from_slice(&ip.octets()),
            Data::Aaaa(ip) => self.out.extend_from_slice(&ip.octets()),
            Data::Cname(name) | Data::Ptr(name) | Data::Ns(name) => self.compressed(name, query),
            Data::Txt(text) => {
                self.out.push(text.len() as u8);
                self.out.extend_from_slice(text.as_bytes());
            }
            Data::Srv { weight, port, target } => {
                self.out.extend_from_slice(&[0, 0]);
                self.out.extend_from_slice(&weight.to_be_bytes());
                self.out.extend_from_slice(&port.to_be_bytes());
                // Never compressed (RFC 2782).
                self.out.extend_from_slice(target.wire());
            }
            Data::Soa(soa) => {
                self.compressed(&soa.server, query);
                self.compressed(&soa.mailbox, query);
                for number in [soa.serial, 7200, 1800, 86_400, soa.minimum] {
                    self.out.extend_from_slice(&number.to_be_bytes());
                }
            }
        }
    }
}

impl Data {
    fn kind(&self) -> u16 {
        match self {
            Self::A(_) => kind::A,
            Self::Aaaa(_) => kind::AAAA,
            Self::Cname(_) => kind::CNAME,
            Self::Ptr(_) => kind::PTR,
            Self::Ns(_) => kind::NS,
            Self::Txt(_) => kind::TXT,
            Self::Srv { .. } => kind::SRV,
            Self::Soa(_) => kind::SOA,
        }
    }
}

/// An answer without a question, to a query that can't be read.
pub(super) fn format_error(id: u16, flags: u16, out: &mut Vec<u8>) {
    header(id, flags, rcode::FORMERR, out);
}

fn header(id: u16, flags: u16, rcode: u8, out: &mut Vec<u8>) {
    out.clear();
    out.extend_from_slice(&id.to_be_bytes());
    // A response with the client's opcode, "recursion desired" and "checking disabled"; recursion is available.
    let flags = 0x8080 | flags & 0x7910 | u16::from(rcode & 0x0f);
    out.extend_from_slice(&flags.to_be_bytes());
    out.extend_from_slice(&[0; 8]);
}
