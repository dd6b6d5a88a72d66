//! Asks the resolver without a socket, as a client at an address would, for pages that explain what pods are told.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::PathBuf,
    sync::Arc,
};

use super::{
    reply::Transport,
    resolv_conf,
    resolver::{Client, Resolver, Step},
    wire::{CLASS_IN, HEADER, Malformed, Name, counts, kind, rcode, read_record, word},
};

/// Record types that can be asked for, by name.
const KINDS: [(&str, u16); 8] = [
    ("A", kind::A),
    ("AAAA", kind::AAAA),
    ("CNAME", kind::CNAME),
    ("SRV", kind::SRV),
    ("PTR", kind::PTR),
    ("TXT", kind::TXT),
    ("NS", kind::NS),
    ("SOA", kind::SOA),
];
/// Records of one answer that are shown.
const MAX_RECORDS: usize = 64;

/// Asks in place of clients.
#[derive(Clone)]
pub struct Asker {
    resolver: Arc<Resolver>,
    resolv_conf: PathBuf,
}

/// An answer, for people.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize)]
pub struct Said {
    /// Response code by its name (RFC 6895).
    pub code: String,
    /// The answer section, a line for each record: owner, TTL, type, data.
    pub records: Vec<String>,
}

impl Said {
    /// Whether a client that searches stops here: the name has records of the type.
    pub fn ends_search(&self) -> bool {
        !self.records.is_empty() || !matches!(self.code.as_str(), "NXDOMAIN" | "NOERROR")
    }
}

impl std::fmt::Debug for Asker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Asker").field("resolv_conf", &self.resolv_conf).finish_non_exhaustive()
    }
}

impl Asker {
    pub(super) fn new(resolver: Arc<Resolver>, resolv_conf: PathBuf) -> Self {
        Self { resolver, resolv_conf }
    }

    /// The types that can be asked for.
    pub fn kinds() -> impl Iterator<Item = &'static str> {
        KINDS.into_iter().map(|(name, _)| name)
    }

    /// The names that a pod of a namespace asks for, in order, when a program looks a name up (resolv.conf(5): `search` and
    /// `ndots:5`, as pods have them). A name that ends with a dot is asked for as it is.
    pub fn search(&self, name: &str, namespace: &str) -> Vec<String> {
        if name.ends_with('.') {
            return vec![name.to_owned()];
        }
        let zone = self.resolver.zone.name().to_string();
        let zone = zone.trim_end_matches('.');
        let mut ends = vec![format!("{namespace}.svc.{zone}"), format!("svc.{zone}"), zone.to_owned()];
        // A file that can't be read has no domains.
        ends.extend(resolv_conf::read(&self.resolv_conf).map(|host| host.searches).unwrap_or_default());
        let mut names: Vec<_> = ends.into_iter().map(|end| format!("{name}.{end}.")).collect();
        let as_it_is = format!("{name}.");
        if name.matches('.').count() >= 5 {
            names.insert(0, as_it_is)
        } else {
            names.push(as_it_is)
        }
        names
    }

    /// What a client at an address is told about a name; nothing if the name or the type can't be asked for.
    pub async fn ask(&self, name: &str, asked: &str, client: IpAddr) -> Option<Said> {
        let name = Name::from_text(name)?;
        let (_, asked) = KINDS.into_iter().find(|(known, _)| known.eq_ignore_ascii_case(asked))?;
        let mut query = vec![0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        query.extend_from_slice(name.wire());
        query.extend_from_slice(&asked.to_be_bytes());
        query.extend_from_slice(&CLASS_IN.to_be_bytes());
        let mut message = Vec::new();
        let client = Client { address: client, transport: Transport::Tcp };
        if self.resolver.at_once(&query, client, &mut message) == Step::Later {
            message.clear();
            self.resolver.later(&query, client, &mut message).await;
        }
        read(&message).ok()
    }
}

fn read(message: &[u8]) -> Result<Said, Malformed> {
    if message.len() < HEADER {
        return Err(Malformed);
    }
    let code = match message[3] & 15 {
        rcode::NOERROR => "NOERROR".to_owned(),
        rcode::FORMERR => "FORMERR".to_owned(),
        rcode::SERVFAIL => "SERVFAIL".to_owned(),
        rcode::NXDOMAIN => "NXDOMAIN".to_owned(),
        rcode::NOTIMP => "NOTIMP".to_owned(),
        rcode::REFUSED => "REFUSED".to_owned(),
        other => format!("RCODE{other}"),
    };
    let [questions, answers, ..] = counts(message);
    let mut at = HEADER;
    for _ in 0..questions {
        at = Name::read(message, at)?.1 + 4;
    }
    let mut records = Vec::new();
    for _ in 0..usize::from(answers).min(MAX_RECORDS) {
        let (owner, _) = Name::read(message, at)?;
        let record = read_record(message, at)?;
        let data = data(message, record.kind, record.data.clone())?;
        let kind = KINDS.into_iter().find(|(_, number)| *number == record.kind);
        let kind = kind.map_or_else(|| format!("TYPE{}", record.kind), |(name, _)| name.to_owned());
        records.push(format!("{owner} {} {kind} {data}", record.ttl));
        at = record.data.end;
    }
    Ok(Said { code, records })
}

fn data(message: &[u8], kind: u16, at: std::ops::Range<usize>) -> Result<String, Malformed> {
    let bytes = message.get(at.clone()).ok_or(Malformed)?;
    Ok(match kind {
        kind::A => Ipv4Addr::from(<[u8; 4]>::try_from(bytes).map_err(|_| Malformed)?).to_string(),
        kind::AAAA => Ipv6Addr::from(<[u8; 16]>::try_from(bytes).map_err(|_| Malformed)?).to_string(),
        kind::CNAME | kind::PTR | kind::NS => Name::read(message, at.start)?.0.to_string(),
        kind::SRV if bytes.len() > 6 => {
            let [priority, weight, port] = [0, 2, 4].map(|offset| word(bytes, offset));
            format!("{priority} {weight} {port} {}", Name::read(message, at.start + 6)?.0)
        }
        kind::TXT => {
            // Strings, each behind its length (RFC 1035, section 3.3.14).
            let mut left = bytes;
            let mut texts = Vec::new();
            while let Some((length, rest)) = left.split_first() {
                let text = rest.get(..usize::from(*length)).ok_or(Malformed)?;
                texts.push(format!("{:?}", String::from_utf8_lossy(text)));
                left = &rest[text.len()..];
            }
            texts.join(" ")
        }
        _ => format!("({} bytes)", bytes.len()),
    })
}
