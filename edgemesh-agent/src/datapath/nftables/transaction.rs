//! Elements that go and come in one transaction, without a process: a batch of netlink messages (linux/netfilter/nf_tables.h).
//! What they are elements of is made by the program `nft`.

use std::{
    collections::{BTreeMap, HashMap},
    io,
};

use super::{
    super::netlink::{NLM_F_CREATE, Netlink, Refused, Request, attribute, attributes, nested, nfgenmsg},
    elements::{Element, Joined, Value},
    nft::NftError,
    ruleset::{Map, TABLE},
};

const SUBSYSTEM: u16 = 10;
const GETTABLE: u16 = SUBSYSTEM << 8 | 1;
const DELTABLE: u16 = SUBSYSTEM << 8 | 2;
const NEWSETELEM: u16 = SUBSYSTEM << 8 | 12;
const GETSETELEM: u16 = SUBSYSTEM << 8 | 13;
const DELSETELEM: u16 = SUBSYSTEM << 8 | 14;
/// Family of tables for IPv4 and IPv6.
const INET: u8 = 1;
const TABLE_NAME: u16 = 1;
const ELEMENTS_TABLE: u16 = 1;
const ELEMENTS_SET: u16 = 2;
const ELEMENTS: u16 = 3;
const ELEMENT: u16 = 1;
const KEY: u16 = 1;
const DATA: u16 = 2;
const EXPRESSION: u16 = 7;
const KEY_END: u16 = 10;
const EXPRESSION_DATA: u16 = 2;
const COUNTER_PACKETS: u16 = 2;
const VALUE: u16 = 1;
const VERDICT: u16 = 2;
const VERDICT_CODE: u16 = 1;
const VERDICT_CHAIN: u16 = 2;
const GOTO: i32 = -4;
/// How often a map is read until nobody changes it meanwhile.
const ATTEMPTS: usize = 20;
/// Bytes of elements in one message.
const FULL: usize = 30 << 10;

/// Elements by map, encoded, in pieces for a message each.
#[derive(Debug, Default)]
pub(super) struct Elements(BTreeMap<Map, Vec<Vec<u8>>>);

impl Elements {
    pub(super) fn push(&mut self, Element { map, key, value }: &Element) {
        let pieces = self.0.entry(*map).or_default();
        if pieces.last().is_none_or(|piece| piece.len() > FULL) {
            pieces.push(Vec::new());
        }
        let Some(piece) = pieces.last_mut() else { return };
        nested(piece, ELEMENT, |element| {
            nested(element, KEY, |data| attribute(data, VALUE, key.as_bytes()));
            match value {
                None => {}
                Some(Value::Last(last)) => nested(element, KEY_END, |data| attribute(data, VALUE, last.as_bytes())),
                Some(Value::Joined(joined)) => {
                    nested(element, DATA, |data| attribute(data, VALUE, joined.as_bytes()));
                }
                Some(Value::Goto(chain)) => nested(element, DATA, |data| {
                    nested(data, VERDICT, |verdict| {
                        attribute(verdict, VERDICT_CODE, &GOTO.to_be_bytes());
                        attribute(verdict, VERDICT_CHAIN, &name(&chain.to_string()));
                    });
                }),
            }
        });
    }

    /// A key without a value, which is enough to delete an element, and to add one to a set.
    pub(super) fn push_key(&mut self, map: Map, key: Joined) {
        self.push(&Element { map, key, value: None });
    }
}

/// What is to be done.
#[derive(Debug, Default)]
pub(super) struct Transaction {
    requests: Vec<Request>,
    /// The map of each request.
    maps: Vec<Map>,
}

impl Transaction {
    /// Has a map lose all of its elements.
    pub(super) fn empty(&mut self, map: Map) {
        self.push(map, DELSETELEM, 0, None);
    }

    pub(super) fn delete(&mut self, elements: Elements) {
        self.push_all(elements, DELSETELEM, 0);
    }

    pub(super) fn add(&mut self, elements: Elements) {
        self.push_all(elements, NEWSETELEM, NLM_F_CREATE);
    }

    fn push_all(&mut self, elements: Elements, kind: u16, flags: u16) {
        for (map, pieces) in elements.0 {
            for piece in pieces {
                self.push(map, kind, flags, Some(piece));
            }
        }
    }

    fn push(&mut self, map: Map, kind: u16, flags: u16, piece: Option<Vec<u8>>) {
        let mut body = body_about(map);
        if let Some(piece) = piece {
            nested(&mut body, ELEMENTS, |elements| elements.extend_from_slice(&piece));
        }
        self.requests.push(Request { kind, flags, body });
        self.maps.push(map);
    }
}

/// What is asked of the kernel without a process.
///
/// The socket stays open: to close one waits until the kernel has freed what was deleted, some 15 ms.
#[derive(Debug, Default)]
pub(super) struct Kernel(Option<Netlink>);

impl Kernel {
    /// Has a transaction in force, in the network namespace in which the calling thread was at the first call.
    ///
    /// # Errors
    /// When none of it is.
    pub(super) fn commit(&mut self, transaction: &Transaction) -> Result<(), NftError> {
        self.send(&transaction.requests, |request| {
            let map = request.and_then(|request| transaction.maps.get(request));
            map.map_or_else(|| TABLE.to_owned(), Map::to_string)
        })
    }

    /// The tables whose names begin so.
    ///
    /// # Errors
    /// When they can't be listed.
    pub(super) fn tables(&mut self, prefix: &str) -> Result<Vec<String>, NftError> {
        let mut names = Vec::new();
        let listed = self.with_socket(|socket| {
            socket.dump(GETTABLE, &nfgenmsg(INET, 0), |body| {
                let of_name = attributes(body.get(4..).unwrap_or_default()).find(|(kind, _)| *kind == TABLE_NAME);
                let text = of_name.and_then(|(_, value)| std::str::from_utf8(value.strip_suffix(&[0])?).ok());
                names.extend(text.filter(|text| text.starts_with(prefix)).map(str::to_owned));
            })
        });
        match listed {
            // So a kernel says that it has no nftables, or nothing that they could be asked for with.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EPROTONOSUPPORT)) => Ok(names),
            Err(error) => Err(NftError::Kernel { what: "tables".to_owned(), error }),
            Ok(()) => Ok(names),
        }
    }

    /// What the elements of a map have counted, in packets. Nothing if there is no such map.
    ///
    /// # Errors
    /// When they can't be read, or others don't let up changing them.
    pub(super) fn counted(&mut self, map: Map) -> Result<HashMap<Joined, u64>, NftError> {
        let failed = |error| NftError::Kernel { what: map.to_string(), error };
        for _ in 0..ATTEMPTS {
            let (mut counted, mut generation, mut is_whole) = (HashMap::new(), None, true);
            let read = self.with_socket(|socket| {
                socket.dump(GETSETELEM, &body_about(map), |body| {
                    let Some((head, list)) = body.split_first_chunk::<4>() else { return };
                    is_whole &= *generation.get_or_insert(*head) == *head;
                    // An element that comes twice has been moved by the kernel while it was read, and others were passed over.
                    for (key, packets) in elements_in(list).filter_map(counter) {
                        is_whole &= counted.insert(key, packets).is_none();
                    }
                })
            });
            match read {
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(HashMap::new()),
                Err(error) => return Err(failed(error)),
                Ok(()) if is_whole => return Ok(counted),
                Ok(()) => {}
            }
        }
        Err(failed(io::ErrorKind::Interrupted.into()))
    }

    /// The keys in a set. Nothing if there is no such set.
    ///
    /// # Errors
    /// When they can't be read.
    pub(super) fn keys(&mut self, map: Map) -> Result<Vec<Joined>, NftError> {
        let mut keys = Vec::new();
        let read = self.with_socket(|socket| {
            socket.dump(GETSETELEM, &body_about(map), |body| {
                keys.extend(elements_in(body.get(4..).unwrap_or_default()).filter_map(key));
            })
        });
        match read {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(Vec::new()),
            Err(error) => Err(NftError::Kernel { what: map.to_string(), error }),
            Ok(()) => Ok(keys),
        }
    }

    /// Removes tables, all or none.
    ///
    /// # Errors
    /// When they are still there.
    pub(super) fn remove(&mut self, tables: &[String]) -> Result<(), NftError> {
        let request = |table: &String| {
            let mut body = nfgenmsg(INET, 0).to_vec();
            attribute(&mut body, TABLE_NAME, &name(table));
            Request { kind: DELTABLE, flags: 0, body }
        };
        let requests: Vec<Request> = tables.iter().map(request).collect();
        self.send(&requests, |_| tables.join(", "))
    }

    /// Sends requests, of which `what` says what they are about.
    fn send(&mut self, requests: &[Request], what: impl FnOnce(Option<usize>) -> String) -> Result<(), NftError> {
        self.with_socket(|socket| socket.send_batch(SUBSYSTEM, requests))
            .map_err(|Refused { request, error }| NftError::Kernel { what: what(request), error })
    }

    fn with_socket<T, E: From<io::Error>>(&mut self, ask: impl FnOnce(&mut Netlink) -> Result<T, E>) -> Result<T, E> {
        let mut socket = match self.0.take() {
            Some(socket) => socket,
            None => Netlink::open(libc::NETLINK_NETFILTER)?,
        };
        let answer = ask(&mut socket)?;
        // After an error, answers that nobody waits for can be left in a socket.
        self.0 = Some(socket);
        Ok(answer)
    }
}

/// The begin of a message about elements.
fn body_about(map: Map) -> Vec<u8> {
    let mut body = nfgenmsg(INET, 0).to_vec();
    attribute(&mut body, ELEMENTS_TABLE, &name(TABLE));
    attribute(&mut body, ELEMENTS_SET, &name(&map.to_string()));
    body
}

/// The elements in the attributes of a message about some.
fn elements_in(list: &[u8]) -> impl Iterator<Item = &[u8]> {
    let elements = attributes(list).filter(|(kind, _)| *kind == ELEMENTS);
    elements.flat_map(|(_, elements)| attributes(elements)).map(|(_, element)| element)
}

/// The key of an element, and how many packets it has counted.
fn counter(element: &[u8]) -> Option<(Joined, u64)> {
    let packets = within(within(within(element, EXPRESSION)?, EXPRESSION_DATA)?, COUNTER_PACKETS)?;
    Some((key(element)?, u64::from_be_bytes(packets.try_into().ok()?)))
}

/// The key of an element.
fn key(element: &[u8]) -> Option<Joined> {
    Some(Joined::from_bytes(within(within(element, KEY)?, VALUE)?))
}

fn within(body: &[u8], wanted: u16) -> Option<&[u8]> {
    attributes(body).find(|(kind, _)| *kind == wanted).map(|(_, value)| value)
}

/// Names end with a zero.
fn name(text: &str) -> Vec<u8> {
    [text.as_bytes(), &[0]].concat()
}
