//! Request bodies in Kubernetes' protobuf encoding, turned into JSON.
//!
//! Go clients since client-go 0.32, `kubectl create deployment` among them, send built-in kinds this way and don't fall back.
//! Answers are always JSON, which all of them take. The field numbers are in `fields.txt`, one message a line: its name, then
//! `name:number:type` for each field. A type is a letter (s string, i integer, b bool, f double, y bytes, T time, M
//! microtime, Q quantity, I integer or string, R what is skipped) or a message; before it `*` marks an optional
//! value, `?` one that is left out of JSON when it is zero, `^` one whose fields belong to the message around it, then
//! `[]` a list, `{}` a map.

use std::{collections::HashMap, sync::OnceLock};

use base64::{Engine, prelude::BASE64_STANDARD};
use jiff::Timestamp;
use prost::encoding::{WireType, decode_key, decode_varint};
use serde_json::{Map, Value, json};

/// The media type of such bodies.
pub(crate) const MEDIA_TYPE: &str = "application/vnd.kubernetes.protobuf";
/// What every body starts with.
const MAGIC: &[u8] = b"k8s\0";
/// How deep messages may be nested.
const MAX_DEPTH: usize = 64;

static FIELDS: &str = include_str!("fields.txt");

/// Why a body can't be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ProtobufError {
    #[error("it doesn't start with k8s\\0")]
    Magic,
    #[error("malformed protobuf: {0}")]
    Malformed(#[from] prost::DecodeError),
    #[error("malformed protobuf: {0}")]
    Wrong(&'static str),
    #[error("{0} {1} is not known in protobuf here; send JSON")]
    Unknown(String, String),
}

/// The object in a body.
pub(crate) fn object(body: &[u8]) -> Result<Value, ProtobufError> {
    let body = body.strip_prefix(MAGIC).ok_or(ProtobufError::Magic)?;
    // runtime.Unknown: 1 typeMeta {1 apiVersion, 2 kind}, 2 raw.
    let (mut version, mut kind, mut raw) = (String::new(), String::new(), &b""[..]);
    for_each(body, |number, part| {
        match (number, part) {
            (1, Part::Bytes(meta)) => for_each(meta, |number, part| {
                if let Part::Bytes(text) = part {
                    let text = string(text)?;
                    match number {
                        1 => version = text,
                        2 => kind = text,
                        _ => {}
                    }
                }
                Ok(())
            })?,
            (2, Part::Bytes(content)) => raw = content,
            _ => {}
        }
        Ok(())
    })?;
    let unknown = || ProtobufError::Unknown(version.clone(), kind.clone());
    let name = format!("{}.{kind}", package(&version, &kind).ok_or_else(unknown)?);
    let messages = messages();
    let message = messages.get(name.as_str()).ok_or_else(unknown)?;
    let mut out = Map::new();
    out.insert("apiVersion".to_owned(), json!(version));
    out.insert("kind".to_owned(), json!(kind));
    decode(messages, message, raw, &mut out, 0)?;
    Ok(Value::Object(out))
}

/// The package of a kind's message.
fn package(version: &str, kind: &str) -> Option<&'static str> {
    Some(match version {
        _ if kind == "DeleteOptions" => "meta",
        "v1" => "core",
        "apps/v1" => "apps",
        "coordination.k8s.io/v1" => "coordination",
        "discovery.k8s.io/v1" => "discovery",
        "events.k8s.io/v1" => "events",
        "autoscaling/v1" => "autoscaling",
        "policy/v1" => "policy",
        _ => return None,
    })
}

type Messages = HashMap<&'static str, Message>;

#[derive(Debug)]
struct Message(Vec<Field>);

#[derive(Debug)]
struct Field {
    name: &'static str,
    number: u32,
    presence: Presence,
    repeated: Repeated,
    of: &'static str,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Presence {
    /// Always in JSON.
    Always,
    /// In JSON when it was sent.
    Optional,
    /// In JSON when it isn't zero.
    OmitEmpty,
    /// Its fields stand in the message around it.
    Inline,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Repeated {
    Once,
    List,
    Map,
}

fn messages() -> &'static Messages {
    static MESSAGES: OnceLock<Messages> = OnceLock::new();
    MESSAGES.get_or_init(|| FIELDS.lines().filter_map(message).collect())
}

fn message(line: &'static str) -> Option<(&'static str, Message)> {
    let mut words = line.split(' ');
    let name = words.next()?;
    let fields = words.filter_map(|word| {
        let mut parts = word.splitn(3, ':');
        let (name, number, of) = (parts.next()?, parts.next()?.parse().ok()?, parts.next()?);
        let (presence, of) = match of.as_bytes().first()? {
            b'*' => (Presence::Optional, &of[1..]),
            b'?' => (Presence::OmitEmpty, &of[1..]),
            b'^' => (Presence::Inline, &of[1..]),
            _ => (Presence::Always, of),
        };
        let (repeated, of) = if let Some(of) = of.strip_prefix("[]") {
            (Repeated::List, of)
        } else if let Some(of) = of.strip_prefix("{}") {
            (Repeated::Map, of)
        } else {
            (Repeated::Once, of)
        };
        Some(Field { name, number, presence, repeated, of })
    });
    Some((name, Message(fields.collect())))
}

/// One field's value on the wire.
enum Part<'a> {
    Number(u64),
    Bytes(&'a [u8]),
}

/// Calls back for each field of a message.
fn for_each<'a>(
    mut buffer: &'a [u8],
    mut each: impl FnMut(u32, Part<'a>) -> Result<(), ProtobufError>,
) -> Result<(), ProtobufError> {
    while !buffer.is_empty() {
        let (number, wire) = decode_key(&mut buffer)?;
        let mut take = |count: usize| {
            let (taken, rest) = buffer.split_at_checked(count).ok_or(ProtobufError::Wrong("it ends too early"))?;
            buffer = rest;
            Ok::<_, ProtobufError>(taken)
        };
        let part = match wire {
            WireType::Varint => Part::Number(decode_varint(&mut buffer)?),
            WireType::LengthDelimited => {
                let length = decode_varint(&mut buffer)?;
                let length = usize::try_from(length).map_err(|_| ProtobufError::Wrong("a length is too large"))?;
                let (taken, rest) = buffer.split_at_checked(length).ok_or(ProtobufError::Wrong("it ends too early"))?;
                buffer = rest;
                Part::Bytes(taken)
            }
            WireType::SixtyFourBit => Part::Number(little_endian(take(8)?)),
            WireType::ThirtyTwoBit => Part::Number(little_endian(take(4)?)),
            WireType::StartGroup | WireType::EndGroup => return Err(ProtobufError::Wrong("groups are not used")),
        };
        each(number, part)?;
    }
    Ok(())
}

fn little_endian(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

fn decode(
    messages: &Messages,
    message: &Message,
    body: &[u8],
    out: &mut Map<String, Value>,
    depth: usize,
) -> Result<(), ProtobufError> {
    if depth > MAX_DEPTH {
        return Err(ProtobufError::Wrong("it is nested too deep"));
    }
    for_each(body, |number, part| {
        // What isn't known here is of a newer API; the JSON decoder drops such fields too.
        let Some(field) = message.0.iter().find(|f| f.number == number) else { return Ok(()) };
        if field.presence == Presence::Inline {
            let inner = messages.get(field.of).ok_or(ProtobufError::Wrong("a message is not described"))?;
            let Part::Bytes(content) = part else { return Err(ProtobufError::Wrong("a message is a number")) };
            return decode(messages, inner, content, out, depth + 1);
        }
        match field.repeated {
            Repeated::Once => {
                let value = value(messages, field.of, part, depth)?;
                let drop = field.presence == Presence::OmitEmpty && is_zero(&value) || field.of == "R";
                if !drop {
                    out.insert(field.name.to_owned(), value);
                }
            }
            Repeated::List => {
                let value = value(messages, field.of, part, depth)?;
                if let Value::Array(list) = out.entry(field.name).or_insert_with(|| json!([])) {
                    list.push(value);
                }
            }
            Repeated::Map => {
                let Part::Bytes(entry) = part else { return Err(ProtobufError::Wrong("a map entry is a number")) };
                let (mut key, mut item) = (String::new(), None);
                for_each(entry, |number, part| {
                    match (number, part) {
                        (1, Part::Bytes(text)) => key = string(text)?,
                        (2, part) => item = Some(value(messages, field.of, part, depth)?),
                        _ => {}
                    }
                    Ok(())
                })?;
                if let Value::Object(map) = out.entry(field.name).or_insert_with(|| json!({})) {
                    map.insert(key, item.unwrap_or_else(|| json!("")));
                }
            }
        }
        Ok(())
    })
}

fn value(messages: &Messages, of: &str, part: Part<'_>, depth: usize) -> Result<Value, ProtobufError> {
    Ok(match (of, part) {
        ("s", Part::Bytes(text)) => json!(string(text)?),
        ("y", Part::Bytes(bytes)) => json!(BASE64_STANDARD.encode(bytes)),
        ("i", Part::Number(number)) => json!(number.cast_signed()),
        ("b", Part::Number(number)) => json!(number != 0),
        ("f", Part::Number(bits)) => json!(f64::from_bits(bits)),
        ("T", Part::Bytes(time)) => timestamp(time, "%Y-%m-%dT%H:%M:%SZ")?,
        ("M", Part::Bytes(time)) => timestamp(time, "%Y-%m-%dT%H:%M:%S.%6fZ")?,
        ("Q", Part::Bytes(quantity)) => {
            let mut text = String::new();
            for_each(quantity, |number, part| {
                if let (1, Part::Bytes(bytes)) = (number, part) {
                    text = string(bytes)?;
                }
                Ok(())
            })?;
            json!(text)
        }
        ("I", Part::Bytes(choice)) => {
            let (mut is_text, mut number, mut text) = (false, 0, String::new());
            for_each(choice, |field, part| {
                match (field, part) {
                    (1, Part::Number(n)) => is_text = n == 1,
                    (2, Part::Number(n)) => number = n.cast_signed(),
                    (3, Part::Bytes(bytes)) => text = string(bytes)?,
                    _ => {}
                }
                Ok(())
            })?;
            if is_text { json!(text) } else { json!(number) }
        }
        ("R", _) => Value::Null,
        (name, Part::Bytes(content)) => {
            let inner = messages.get(name).ok_or(ProtobufError::Wrong("a field has another type"))?;
            let mut map = Map::new();
            decode(messages, inner, content, &mut map, depth + 1)?;
            Value::Object(map)
        }
        _ => return Err(ProtobufError::Wrong("a field has another type")),
    })
}

/// `metav1.Time`: 1 seconds, 2 nanoseconds. Go's zero time is sent as zeros and means that there is none.
fn timestamp(body: &[u8], format: &str) -> Result<Value, ProtobufError> {
    let (mut seconds, mut nanos) = (0_i64, 0_i32);
    for_each(body, |number, part| {
        if let Part::Number(value) = part {
            match number {
                1 => seconds = value.cast_signed(),
                2 => nanos = i32::try_from(value).unwrap_or(0),
                _ => {}
            }
        }
        Ok(())
    })?;
    if seconds == 0 && nanos == 0 {
        return Ok(Value::Null);
    }
    let time = Timestamp::new(seconds, nanos).map_err(|_| ProtobufError::Wrong("a time is out of range"))?;
    Ok(json!(time.strftime(format).to_string()))
}

/// Whether Go would leave it out of JSON.
fn is_zero(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(flag) => !flag,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => text.is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
    }
}

fn string(bytes: &[u8]) -> Result<String, ProtobufError> {
    String::from_utf8(bytes.to_vec()).map_err(|_| ProtobufError::Wrong("a string is not UTF-8"))
}

#[cfg(test)]
mod tests {
    use prost::encoding::{encode_key, encode_varint};

    use super::*;

    fn bytes(number: u32, content: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        encode_key(number, WireType::LengthDelimited, &mut out);
        encode_varint(content.len() as u64, &mut out);
        out.extend_from_slice(content);
        out
    }

    fn number(number: u32, value: u64) -> Vec<u8> {
        let mut out = Vec::new();
        encode_key(number, WireType::Varint, &mut out);
        encode_varint(value, &mut out);
        out
    }

    fn body(version: &str, kind: &str, raw: &[u8]) -> Vec<u8> {
        let meta = [bytes(1, version.as_bytes()), bytes(2, kind.as_bytes())].concat();
        [MAGIC.to_vec(), bytes(1, &meta), bytes(2, raw)].concat()
    }

    #[test]
    fn a_service_becomes_what_it_is_in_json() {
        let target = [number(1, 1), number(2, 0), bytes(3, b"http")].concat();
        let port = [bytes(1, b""), bytes(2, b"TCP"), number(3, 80), bytes(4, &target), number(5, 0)].concat();
        let selector = [bytes(1, b"app"), bytes(2, b"web")].concat();
        let metadata = [bytes(1, b"web"), bytes(8, &[number(1, 0), number(2, 0)].concat())].concat();
        let raw = [bytes(1, &metadata), bytes(2, &[bytes(1, &port), bytes(2, &selector)].concat())].concat();
        assert_eq!(
            object(&body("v1", "Service", &raw)).unwrap(),
            json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web"},
                "spec": {"ports": [{"protocol": "TCP", "port": 80, "targetPort": "http"}], "selector": {"app": "web"}}})
        );
    }

    #[test]
    fn inlined_messages_stand_in_the_one_around_them() {
        let volume = [bytes(1, b"v"), bytes(2, &bytes(2, &bytes(1, b"")))].concat();
        let raw = bytes(2, &bytes(1, &volume));
        let pod = object(&body("v1", "Pod", &raw)).unwrap();
        assert_eq!(pod["spec"]["volumes"], json!([{"name": "v", "emptyDir": {}}]));
    }

    #[test]
    fn garbage_is_an_error_not_a_crash() {
        assert!(object(b"garbage").is_err());
        assert!(object(&body("v1", "Nothing", b"")).is_err());
        assert!(object(&body("v1", "Pod", b"\xff\xff\xff\xff\xff")).is_err());
        let mut deep = Vec::new();
        for _ in 0..2000 {
            deep = bytes(2, &bytes(1, &deep));
        }
        let _ = object(&body("v1", "Pod", &deep));
        for length in 0..40 {
            let raw: Vec<u8> = (0..length).map(|i| (i * 37 + length) as u8).collect();
            let _ = object(&body("apps/v1", "Deployment", &raw));
        }
    }

    #[test]
    fn every_message_that_is_mentioned_is_described() {
        let messages = messages();
        for (name, message) in messages {
            for field in &message.0 {
                assert!(!field.of.contains('.') || messages.contains_key(field.of), "{name}: {}", field.of);
            }
        }
        assert!(messages.len() > 150);
    }
}
