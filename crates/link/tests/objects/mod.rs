//! Objects for the tests of the protocol, and the view of them that the hub's end asks.

use std::{collections::BTreeMap, sync::Arc};

use bytes::Bytes;
use edgemesh_api::{ObjectKey, ResourceName};
use edgemesh_link::{HeldObject, Limits, View};

/// Small numbers, so that windows fill and batches end within a difference.
pub(crate) fn limits() -> Limits {
    Limits {
        batch_changes: 3,
        batch_bytes: 2_000,
        window_batches: 3,
        window_bytes: 4_000,
        digest_chunk: 4,
        write_window: 3,
        ..Limits::default()
    }
}

/// One of a few objects.
pub(crate) fn key(n: u64) -> ObjectKey {
    let plural = ["pods", "services", "configmaps"][(n % 3) as usize];
    ObjectKey::new(ResourceName::new("", "v1", plural), "default", format!("o{n}"))
}

/// What the simulated hub thinks that the node should hold.
pub(crate) struct HubView(pub(crate) BTreeMap<Arc<ObjectKey>, Arc<HeldObject>>);

impl HubView {
    pub(crate) fn set(&mut self, key: &ObjectKey, state: Option<(u64, u64)>) {
        match state {
            Some((uid, version)) => {
                let held = HeldObject {
                    uid: uid.to_string(),
                    origin_version: version.to_string(),
                    json: Bytes::from(vec![b'x'; (version % 900) as usize]),
                };
                self.0.insert(Arc::new(key.clone()), Arc::new(held));
            }
            None => {
                self.0.remove(key);
            }
        }
    }
}

impl View for HubView {
    fn get(&self, key: &ObjectKey) -> Option<Arc<HeldObject>> {
        self.0.get(key).cloned()
    }
    fn for_each(&self, each: &mut dyn FnMut(&Arc<ObjectKey>, &HeldObject)) {
        for (key, held) in &self.0 {
            each(key, held);
        }
    }
}
