//! Kubernetes Events (core/v1) about what the controllers did, bounded in number and rate.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use edgemesh_telemetry::Shutdown;
use k8s_openapi::{
    api::core::v1::{Event, EventSource, ObjectReference},
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use kube::{
    Api, Client, Resource,
    api::{Patch, PatchParams, PostParams},
};
use tokio::sync::mpsc;

/// Events that wait to be written; more are dropped, as an event is only a note.
const QUEUE: usize = 512;
/// Events that are remembered, to count a repeated one up instead of writing it again.
const REMEMBERED: usize = 2048;
/// A repeated event is counted at most this often.
const REPEAT_EVERY: Duration = Duration::from_secs(10);
/// Longest message (Kubernetes' limit).
const MAX_MESSAGE: usize = 1024;

/// Takes events; cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Recorder(mpsc::Sender<Note>);

#[derive(Debug)]
struct Note {
    about: ObjectReference,
    component: &'static str,
    warning: bool,
    reason: &'static str,
    message: String,
}

/// Writes what the [`Recorder`]s take.
pub(crate) struct EventTask {
    client: Client,
    notes: mpsc::Receiver<Note>,
    written: HashMap<(String, &'static str, String), Written>,
}

struct Written {
    name: String,
    count: i32,
    at: Instant,
}

pub(crate) fn recorder(client: Client) -> (Recorder, EventTask) {
    let (sender, notes) = mpsc::channel(QUEUE);
    (Recorder(sender), EventTask { client, notes, written: HashMap::new() })
}

impl Recorder {
    pub(crate) fn normal<K>(&self, component: &'static str, about: &K, reason: &'static str, message: String)
    where
        K: Resource<DynamicType = ()>,
    {
        self.send(component, about, false, reason, message);
    }

    pub(crate) fn warning<K>(&self, component: &'static str, about: &K, reason: &'static str, message: String)
    where
        K: Resource<DynamicType = ()>,
    {
        self.send(component, about, true, reason, message);
    }

    fn send<K>(&self, component: &'static str, about: &K, warning: bool, reason: &'static str, mut message: String)
    where
        K: Resource<DynamicType = ()>,
    {
        if message.len() > MAX_MESSAGE {
            let cut = (0..=MAX_MESSAGE).rev().find(|at| message.is_char_boundary(*at)).unwrap_or(0);
            message.truncate(cut);
        }
        let note = Note { about: about.object_ref(&()), component, warning, reason, message };
        if self.0.try_send(note).is_err() {
            tracing::debug!(reason, "event dropped: too many at once");
        }
    }
}

impl EventTask {
    pub(crate) async fn run(mut self, shutdown: Shutdown) {
        loop {
            let note = tokio::select! {
                note = self.notes.recv() => note,
                () = shutdown.stopping().cancelled() => return,
            };
            let Some(note) = note else { return };
            if let Err(error) = self.write(note).await {
                tracing::debug!(%error, "event not written");
            }
        }
    }

    async fn write(&mut self, note: Note) -> Result<(), kube::Error> {
        let namespace = note.about.namespace.clone().unwrap_or_else(|| "default".to_owned());
        let api: Api<Event> = Api::namespaced(self.client.clone(), &namespace);
        let identity = note.about.uid.clone().or_else(|| note.about.name.clone()).unwrap_or_default();
        let key = (identity, note.reason, note.message);
        let now = super::now();
        if let Some(written) = self.written.get_mut(&key) {
            if written.at.elapsed() < REPEAT_EVERY {
                return Ok(());
            }
            written.count += 1;
            written.at = Instant::now();
            let patch = serde_json::json!({"count": written.count, "lastTimestamp": now});
            let patched = api.patch(&written.name, &PatchParams::default(), &Patch::Merge(&patch)).await;
            match patched {
                Ok(_) => return Ok(()),
                // Expired: written anew below.
                Err(error) if super::worker::is_not_found(&error) => {}
                Err(error) => return Err(error),
            }
        }
        if self.written.len() >= REMEMBERED {
            let oldest = self.written.iter().min_by_key(|(_, written)| written.at).map(|(key, _)| key.clone());
            if let Some(oldest) = oldest {
                self.written.remove(&oldest);
            }
        }
        let event = Event {
            metadata: ObjectMeta {
                generate_name: Some(format!("{}.", note.about.name.as_deref().unwrap_or("object"))),
                namespace: Some(namespace),
                ..Default::default()
            },
            involved_object: note.about,
            reason: Some(note.reason.to_owned()),
            message: Some(key.2.clone()),
            type_: Some(if note.warning { "Warning" } else { "Normal" }.to_owned()),
            source: Some(EventSource { component: Some(note.component.to_owned()), ..Default::default() }),
            reporting_component: Some(note.component.to_owned()),
            reporting_instance: Some(String::new()),
            first_timestamp: Some(now.clone()),
            last_timestamp: Some(now),
            count: Some(1),
            ..Default::default()
        };
        let created = api.create(&PostParams::default(), &event).await?;
        let name = created.metadata.name.unwrap_or_default();
        self.written.insert(key, Written { name, count: 1, at: Instant::now() });
        Ok(())
    }
}
