//! Frames on the wire: one protobuf message in one WebSocket binary message, never larger than [`MAX_FRAME_BYTES`].

use bytes::Bytes;
pub use edgemesh_api::link::MAX_FRAME_BYTES;
use edgemesh_api::{ObjectKey, link::ObjectRef};
use prost::Message;

use crate::Fault;

/// Longest name, namespace, group or plural that is accepted in a key, in bytes (Kubernetes, "Object Names and IDs").
pub const MAX_NAME_BYTES: usize = 253;

/// A frame's bytes.
///
/// # Errors
/// When it is larger than the limit; the state machines never build such a frame.
pub fn encode(frame: &impl Message) -> Result<Bytes, Fault> {
    let size = frame.encoded_len();
    if size > MAX_FRAME_BYTES {
        return Err(Fault::protocol(format!("a frame of {size} bytes; the limit is {MAX_FRAME_BYTES}")));
    }
    Ok(Bytes::from(frame.encode_to_vec()))
}

/// The frame in some bytes.
///
/// # Errors
/// When it is too large or no valid message.
pub fn decode<M: Message + Default>(bytes: Bytes) -> Result<M, Fault> {
    if bytes.len() > MAX_FRAME_BYTES {
        return Err(Fault::protocol(format!("a frame of {} bytes; the limit is {MAX_FRAME_BYTES}", bytes.len())));
    }
    M::decode(bytes).map_err(|error| Fault::protocol(format!("not a frame: {error}")))
}

/// The key in a message, checked.
///
/// # Errors
/// When it is missing, incomplete, or has a part that no Kubernetes name has.
pub fn key(reference: Option<ObjectRef>) -> Result<ObjectKey, Fault> {
    let Some(reference) = reference else { return Err(Fault::protocol("an object without a key")) };
    let parts = [&reference.group, &reference.version, &reference.plural, &reference.namespace, &reference.name];
    if parts.iter().any(|part| part.len() > MAX_NAME_BYTES || part.contains(['/', '\0']) || *part == "..") {
        return Err(Fault::protocol("a key with a part that is no name"));
    }
    if reference.version.is_empty() || reference.plural.is_empty() || reference.name.is_empty() {
        return Err(Fault::protocol("a key without version, resource or name"));
    }
    Ok(reference.into())
}

#[cfg(test)]
mod tests {
    use edgemesh_api::link::{EdgeFrame, HubFrame, SyncDone, ToEdge, ToHub};

    use super::*;

    #[test]
    fn garbage_and_oversized_frames_are_refused_with_a_reason() {
        assert!(decode::<ToHub>(Bytes::from_static(b"\xff\xff\xffgarbage")).is_err());
        let error = decode::<ToHub>(Bytes::from(vec![0; MAX_FRAME_BYTES + 1])).unwrap_err();
        assert!(error.to_string().contains("limit"), "{error}");
    }

    #[test]
    fn a_frame_of_an_unknown_kind_is_decoded_as_none_so_that_newer_peers_can_talk() {
        // Field 99, wire type 2, two bytes.
        let unknown = Bytes::from_static(&[0x9a, 0x06, 2, 1, 2]);
        assert_eq!(decode::<ToEdge>(unknown).unwrap().frame, None::<EdgeFrame>);
    }

    #[test]
    fn frames_survive_the_wire() {
        let frame = ToEdge::from(EdgeFrame::SyncDone(SyncDone { seq: 7 }));
        assert_eq!(decode::<ToEdge>(encode(&frame).unwrap()).unwrap(), frame);
        let frame = ToHub::from(HubFrame::Heartbeat(edgemesh_api::link::Heartbeat {}));
        assert_eq!(decode::<ToHub>(encode(&frame).unwrap()).unwrap(), frame);
    }

    #[test]
    fn a_key_with_a_path_in_it_is_refused() {
        let reference =
            ObjectRef { version: "v1".into(), plural: "pods".into(), name: "../x".into(), ..ObjectRef::default() };
        assert!(key(Some(reference)).is_err());
    }
}
