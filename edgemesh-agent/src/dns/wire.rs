//! DNS messages as they come over the wire (RFC 1035, EDNS: RFC 6891). Everything is checked: it comes from anyone.

use std::{fmt, ops::Range};

/// Length of a message's header.
pub(super) const HEADER: usize = 12;
/// Longest name, in bytes on the wire.
const MAX_NAME: usize = 255;
/// Longest label.
const MAX_LABEL: usize = 63;

/// Record types (IANA, "DNS Parameters").
pub(super) mod kind {
    pub(in crate::dns) const A: u16 = 1;
    pub(in crate::dns) const NS: u16 = 2;
    pub(in crate::dns) const CNAME: u16 = 5;
    pub(in crate::dns) const SOA: u16 = 6;
    pub(in crate::dns) const PTR: u16 = 12;
    pub(in crate::dns) const MX: u16 = 15;
    pub(in crate::dns) const TXT: u16 = 16;
    pub(in crate::dns) const AAAA: u16 = 28;
    pub(in crate::dns) const SRV: u16 = 33;
    pub(in crate::dns) const OPT: u16 = 41;
    pub(in crate::dns) const HTTPS: u16 = 65;
    pub(in crate::dns) const IXFR: u16 = 251;
    pub(in crate::dns) const AXFR: u16 = 252;
    pub(in crate::dns) const ANY: u16 = 255;
}

/// Response codes.
pub(super) mod rcode {
    pub(in crate::dns) const NOERROR: u8 = 0;
    pub(in crate::dns) const FORMERR: u8 = 1;
    pub(in crate::dns) const SERVFAIL: u8 = 2;
    pub(in crate::dns) const NXDOMAIN: u8 = 3;
    pub(in crate::dns) const NOTIMP: u8 = 4;
    pub(in crate::dns) const REFUSED: u8 = 5;
    /// Its low four bits go into the header, the rest into the OPT record (RFC 6891, section 6.1.3).
    pub(in crate::dns) const BADVERS: u8 = 16;
}

/// Class IN.
pub(super) const CLASS_IN: u16 = 1;

/// A message that can't be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("malformed DNS message")]
pub(super) struct Malformed;

/// A name in lower case, in wire form without compression, the root label included.
#[derive(Clone, PartialEq, Eq, Hash)]
pub(super) struct Name(Vec<u8>);

impl Name {
    /// A name from text, for example `cluster.local`.
    pub(super) fn from_text(text: &str) -> Option<Self> {
        let mut wire = Vec::with_capacity(text.len() + 2);
        for label in text.trim_end_matches('.').split('.').filter(|_| !text.trim_end_matches('.').is_empty()) {
            if label.is_empty() || label.len() > MAX_LABEL {
                return None;
            }
            wire.push(label.len() as u8);
            wire.extend(label.bytes().map(|b| b.to_ascii_lowercase()));
        }
        wire.push(0);
        (wire.len() <= MAX_NAME).then_some(Self(wire))
    }

    /// A name of labels in front of another name.
    pub(super) fn under<L: AsRef<[u8]>>(labels: &[L], parent: &Self) -> Option<Self> {
        let mut wire = Vec::with_capacity(parent.0.len() + 64);
        for label in labels {
            let label = label.as_ref();
            if label.is_empty() || label.len() > MAX_LABEL {
                return None;
            }
            wire.push(label.len() as u8);
            wire.extend(label.iter().map(u8::to_ascii_lowercase));
        }
        wire.extend_from_slice(&parent.0);
        (wire.len() <= MAX_NAME).then_some(Self(wire))
    }

    /// The root.
    pub(super) fn root() -> Self {
        Self(vec![0])
    }

    /// A name of labels in wire form, without the root, in front of another name.
    pub(super) fn joined(labels: &[u8], parent: &Self) -> Option<Self> {
        let wire = [labels, &parent.0].concat();
        (wire.len() <= MAX_NAME).then_some(Self(wire))
    }

    /// Reads a name, compressed or not. Returns it with the position after it.
    pub(super) fn read(message: &[u8], start: usize) -> Result<(Self, usize), Malformed> {
        let mut wire = Vec::with_capacity(64);
        let mut at = start;
        let mut end = None;
        loop {
            let length = *message.get(at).ok_or(Malformed)? as usize;
            match length >> 6 {
                0 => {
                    let label = message.get(at + 1..at + 1 + length).ok_or(Malformed)?;
                    if wire.len() + 1 + length > MAX_NAME - usize::from(length != 0) {
                        return Err(Malformed);
                    }
                    wire.push(length as u8);
                    wire.extend(label.iter().map(u8::to_ascii_lowercase));
                    at += 1 + length;
                    if length == 0 {
                        return Ok((Self(wire), end.unwrap_or(at)));
                    }
                }
                3 => {
                    let low = *message.get(at + 1).ok_or(Malformed)? as usize;
                    let target = (length & 0x3f) << 8 | low;
                    end.get_or_insert(at + 2);
                    // Only backwards, so that it ends.
                    if target >= at {
                        return Err(Malformed);
                    }
                    at = target;
                }
                _ => return Err(Malformed),
            }
        }
    }

    /// The name without its first label; the root is its own parent.
    pub(super) fn parent(&self) -> Self {
        let at = self.starts().nth(1).unwrap_or(0);
        Self(self.0[at..].to_vec())
    }

    /// The wire form.
    pub(super) fn wire(&self) -> &[u8] {
        &self.0
    }

    /// The labels, without the root.
    pub(super) fn labels(&self) -> impl Iterator<Item = &[u8]> {
        let mut rest = &self.0[..];
        std::iter::from_fn(move || {
            let (length, tail) = rest.split_first()?;
            if *length == 0 {
                return None;
            }
            let (label, tail) = tail.split_at(usize::from(*length));
            rest = tail;
            Some(label)
        })
    }

    /// Positions in the wire form at which labels begin, the root label last.
    pub(super) fn starts(&self) -> impl Iterator<Item = usize> {
        let mut at = Some(0);
        std::iter::from_fn(move || {
            let now = at?;
            let length = usize::from(self.0[now]);
            at = (length != 0).then_some(now + 1 + length);
            Some(now)
        })
    }

    /// Where in the wire form a suffix begins, if the name ends with it.
    pub(super) fn suffix_at(&self, suffix: &[u8]) -> Option<usize> {
        let at = self.0.len().checked_sub(suffix.len())?;
        (self.0[at..] == *suffix && self.starts().any(|start| start == at)).then_some(at)
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for label in self.labels() {
            write!(f, "{}.", label.escape_ascii())?;
        }
        if self.0.len() == 1 { f.write_str(".") } else { Ok(()) }
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// What a client's OPT record says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Edns {
    /// Largest UDP answer that it takes.
    pub(super) payload: u16,
    /// It wants DNSSEC records.
    pub(super) dnssec_ok: bool,
    /// EDNS version; only 0 exists.
    pub(super) version: u8,
}

/// A query with one question.
#[derive(Debug)]
pub(super) struct Query<'a> {
    /// Message id.
    pub(super) id: u16,
    /// The second word of the header.
    pub(super) flags: u16,
    /// The name that is asked for, in lower case.
    pub(super) name: Name,
    /// Record type.
    pub(super) kind: u16,
    /// Class.
    pub(super) class: u16,
    /// The question as the client wrote it.
    pub(super) question: &'a [u8],
    /// Its OPT record, if any.
    pub(super) edns: Option<Edns>,
}

impl Query<'_> {
    /// The operation; 0 is a standard query.
    pub(super) fn opcode(&self) -> u8 {
        (self.flags >> 11) as u8 & 0x0f
    }

    /// "Checking disabled" (RFC 4035).
    pub(super) fn checking_disabled(&self) -> bool {
        self.flags & 0x0010 != 0
    }

    /// The client wants DNSSEC records.
    pub(super) fn dnssec_ok(&self) -> bool {
        self.edns.is_some_and(|edns| edns.dnssec_ok)
    }
}

/// Why a query isn't answered as one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unreadable {
    /// Not a query: no answer, or answers would bounce between two servers.
    Ignore,
    /// A query whose header can be read, but not the rest.
    FormErr {
        /// Message id.
        id: u16,
        /// The second word of the header.
        flags: u16,
    },
}

/// Reads a query.
pub(super) fn read_query(message: &[u8]) -> Result<Query<'_>, Unreadable> {
    if message.len() < HEADER {
        return Err(Unreadable::Ignore);
    }
    let id = word(message, 0);
    let flags = word(message, 2);
    if flags & 0x8000 != 0 {
        return Err(Unreadable::Ignore);
    }
    let bad = Unreadable::FormErr { id, flags };
    let [questions, answers, authority, additional] = counts(message);
    if questions != 1 {
        return Err(bad);
    }
    let (name, name_end) = Name::read(message, HEADER).map_err(|Malformed| bad)?;
    // A question has nothing before it that it could point to.
    if name_end - HEADER != name.wire().len() || message.len() < name_end + 4 {
        return Err(bad);
    }
    let end = name_end + 4;
    let mut edns = None;
    let mut at = end;
    // Only the OPT record matters. More records than a query can sensibly have are not worth reading.
    let others = usize::from(answers) + usize::from(authority) + usize::from(additional);
    if others > 16 {
        return Err(bad);
    }
    for _ in 0..others {
        let record = read_record(message, at).map_err(|Malformed| bad)?;
        if record.kind == kind::OPT {
            if edns.is_some() || message[at] != 0 {
                return Err(bad);
            }
            edns = Some(Edns {
                payload: record.class,
                dnssec_ok: record.ttl & 0x8000 != 0,
                version: (record.ttl >> 16) as u8,
            });
        }
        at = record.data.end;
    }
    let question = &message[HEADER..end];
    Ok(Query { id, flags, name, kind: word(message, name_end), class: word(message, name_end + 2), question, edns })
}

/// Where a record's parts are in a message.
#[derive(Debug, Clone)]
pub(super) struct RecordView {
    /// Record type.
    pub(super) kind: u16,
    /// Class.
    pub(super) class: u16,
    /// Position of the TTL.
    pub(super) ttl_at: usize,
    /// The TTL, in seconds.
    pub(super) ttl: u32,
    /// Position of the data.
    pub(super) data: Range<usize>,
}

/// Reads the record that begins at a position; the next begins where its data ends.
pub(super) fn read_record(message: &[u8], at: usize) -> Result<RecordView, Malformed> {
    let fixed = skip_name(message, at)?;
    if message.len() < fixed + 10 {
        return Err(Malformed);
    }
    let length = usize::from(word(message, fixed + 8));
    let data = fixed + 10..fixed + 10 + length;
    if message.len() < data.end {
        return Err(Malformed);
    }
    let ttl = u32::from(word(message, fixed + 4)) << 16 | u32::from(word(message, fixed + 6));
    Ok(RecordView { kind: word(message, fixed), class: word(message, fixed + 2), ttl_at: fixed + 4, ttl, data })
}

/// Numbers of questions, answers, authority and additional records. The header must be there.
pub(super) fn counts(message: &[u8]) -> [u16; 4] {
    [4, 6, 8, 10].map(|at| word(message, at))
}

/// Two bytes in network order; the caller has checked the length.
pub(super) fn word(message: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([message[at], message[at + 1]])
}

fn skip_name(message: &[u8], mut at: usize) -> Result<usize, Malformed> {
    for _ in 0..=MAX_NAME / 2 {
        let length = *message.get(at).ok_or(Malformed)? as usize;
        match length >> 6 {
            0 if length == 0 => return Ok(at + 1),
            0 => at += 1 + length,
            3 => return Ok(at + 2),
            _ => return Err(Malformed),
        }
    }
    Err(Malformed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_in_lower_case_and_never_loop_or_overrun() {
        let mut message = vec![0; HEADER];
        message.extend_from_slice(b"\x03WwW\x07example\x00\x01a\xc0\x10\xc0\x1e\xc0\x40\x40x\x3fy");
        let text = |at| Name::read(&message, at).map(|(name, end)| (name.to_string(), end));
        assert_eq!(text(12), Ok(("www.example.".to_owned(), 25)));
        assert_eq!(text(25), Ok(("a.example.".to_owned(), 29)));
        assert_eq!(text(29), Err(Malformed), "a pointer to itself or forward");
        assert_eq!(text(31), Err(Malformed));
        assert_eq!(text(33), Err(Malformed), "a reserved label type");
        assert_eq!(text(35), Err(Malformed), "a label past the end");
        assert_eq!(text(999), Err(Malformed));
        let long = [b"\x3f".as_slice(), &[b'a'; 63]].concat().repeat(4);
        assert_eq!(Name::read(&[&long[..], b"\0"].concat(), 0), Err(Malformed), "257 bytes");
    }

    #[test]
    fn a_suffix_begins_at_a_label() {
        let name = Name::from_text("web.default.svc.cluster.local").unwrap();
        let zone = Name::from_text("Cluster.Local.").unwrap();
        assert_eq!(name.suffix_at(zone.wire()), Some(16));
        assert_eq!(zone.suffix_at(zone.wire()), Some(0));
        assert_eq!(Name::from_text("xcluster.local").unwrap().suffix_at(zone.wire()), None);
        // The last bytes of the first label spell the zone, length bytes included.
        let trick = Name(b"\x10aa\x07cluster\x05local\x00".to_vec());
        assert_eq!(trick.suffix_at(zone.wire()), None);
    }

    #[test]
    fn names_that_are_too_long_or_have_empty_labels_are_refused() {
        assert_eq!(Name::from_text("").map(|n| n.to_string()).as_deref(), Some("."));
        assert_eq!(Name::from_text("a..b"), None);
        assert_eq!(Name::from_text(&"a".repeat(64)), None);
        assert_eq!(Name::from_text(&["a"; 130].join(".")), None);
    }
}
