//! One transaction: operations see what earlier ones of the same batch did, and each either happens in full or not at all.

use std::{collections::HashMap, sync::Arc};

use edgemesh_api::{ObjectKey, ResourceName};
use serde_json::{Value, json};

use super::{
    Shared,
    database::Database,
    definition::is_definition,
    options::{EventKind, WriteOp},
    state::{Change, Slot, State, Stored},
};
use crate::{
    error::ApiError,
    fields,
    kinds::{KindInfo, Registry},
};

/// How many events wait in the outbox at most, when the cloud is away; the oldest go first.
const MAX_PENDING_EVENTS: usize = 1000;

type TableSlot = (String, Slot);

/// A batch of operations on its way to disk.
pub(crate) struct Transaction<'a> {
    pub(crate) shared: &'a Shared,
    pub(crate) database: &'a Database,
    pub(crate) registry: Registry,
    rv: u64,
    overlay: HashMap<TableSlot, Option<Stored>>,
    changes: Vec<(ResourceName, Change, Option<Stored>)>,
    outbox_last: u64,
    undo: Vec<(TableSlot, Option<Option<Stored>>)>,
}

/// Where an operation began, to go back to.
pub(crate) struct Mark {
    registry: Registry,
    rv: u64,
    changes: usize,
    outbox_last: u64,
}

/// What a batch did, to be shown to readers once it is on disk.
pub(crate) struct Done {
    pub(crate) rv: u64,
    pub(crate) registry: Registry,
    pub(crate) changes: Vec<(ResourceName, Change, Option<Stored>)>,
    pub(crate) outbox_last: u64,
}

impl<'a> Transaction<'a> {
    pub(crate) fn new(shared: &'a Shared, database: &'a Database, outbox_last: u64) -> Self {
        Self {
            shared,
            database,
            registry: shared.registry.read().clone(),
            rv: shared.state.read().rv,
            overlay: HashMap::new(),
            changes: Vec::new(),
            outbox_last,
            undo: Vec::new(),
        }
    }

    pub(crate) fn mark(&mut self) -> Mark {
        self.undo.clear();
        Mark {
            registry: self.registry.clone(),
            rv: self.rv,
            changes: self.changes.len(),
            outbox_last: self.outbox_last,
        }
    }

    /// Forgets what was done since the mark; the database does the same with its savepoint.
    pub(crate) fn reset(&mut self, mark: Mark) {
        for (slot, before) in self.undo.drain(..).rev() {
            match before {
                Some(entry) => self.overlay.insert(slot, entry),
                None => self.overlay.remove(&slot),
            };
        }
        self.changes.truncate(mark.changes);
        self.registry = mark.registry;
        self.rv = mark.rv;
        self.outbox_last = mark.outbox_last;
    }

    pub(crate) fn finish(self) -> Done {
        Done { rv: self.rv, registry: self.registry, changes: self.changes, outbox_last: self.outbox_last }
    }

    /// The kind that is served under this name.
    pub(crate) fn kind(&self, resource: &ResourceName) -> Result<Arc<KindInfo>, ApiError> {
        self.registry.lookup(&resource.group, &resource.version, &resource.plural).ok_or_else(ApiError::no_such_path)
    }

    /// The object under a storage key.
    pub(crate) fn get(&self, key: &ObjectKey) -> Option<Stored> {
        let slot = (key.resource.to_string(), (key.namespace.clone(), key.name.clone()));
        match self.overlay.get(&slot) {
            Some(entry) => entry.clone(),
            None => self.shared.state.read().get(key).cloned(),
        }
    }

    /// All objects of a storage resource.
    pub(crate) fn list(&self, resource: &ResourceName) -> Vec<(Slot, Stored)> {
        let name = resource.to_string();
        let mut out: Vec<(Slot, Stored)> = match self.shared.state.read().table(resource) {
            Some(table) => table
                .objects
                .iter()
                .filter(|(slot, _)| !self.overlay.contains_key(&(name.clone(), (*slot).clone())))
                .map(|(slot, stored)| (slot.clone(), stored.clone()))
                .collect(),
            None => Vec::new(),
        };
        out.extend(
            self.overlay
                .iter()
                .filter(|((table, _), _)| *table == name)
                .filter_map(|((_, slot), entry)| Some((slot.clone(), entry.clone()?))),
        );
        out
    }

    /// What this transaction has changed of a storage resource: each object as it is committed, and as it is now.
    pub(crate) fn written<'s>(
        &'s self,
        state: &'s State,
        resource: &ResourceName,
    ) -> impl Iterator<Item = (Option<&'s Value>, Option<&'s Value>)> {
        let name = resource.to_string();
        let committed = state.table(resource);
        self.overlay.iter().filter(move |((table, _), _)| *table == name).map(move |((_, slot), now)| {
            let object = |stored: &'s Stored| &*stored.object;
            (committed.and_then(|table| table.objects.get(slot)).map(object), now.as_ref().map(object))
        })
    }

    /// Stores an object under its storage key and returns it as stored, with its new resource version.
    pub(crate) fn put(
        &mut self,
        key: &ObjectKey,
        mut object: Value,
        origin_version: Option<Arc<str>>,
    ) -> Result<Arc<Value>, ApiError> {
        self.rv += 1;
        fields::map_in(&mut object, "metadata").insert("resourceVersion".to_owned(), json!(self.rv.to_string()));
        let uid = fields::meta(&object, "uid").to_owned();
        self.database.put(key, &uid, self.rv, origin_version.as_deref(), &object).map_err(ApiError::internal)?;
        let previous = self.get(key).map(|s| s.object);
        let object = Arc::new(object);
        let kind = if previous.is_some() { EventKind::Modified } else { EventKind::Added };
        self.record(key, kind, object.clone(), previous, Some(Stored { object: object.clone(), origin_version }));
        if is_definition(&key.resource) {
            self.registry = self.registry.with_crd(&object);
        }
        Ok(object)
    }

    /// Removes an object and returns its last state, with the resource version of the removal.
    pub(crate) fn remove(&mut self, key: &ObjectKey) -> Result<Arc<Value>, ApiError> {
        let Some(stored) = self.get(key) else { return Err(ApiError::not_found(key)) };
        self.rv += 1;
        self.database.remove(key).map_err(ApiError::internal)?;
        let mut last = (*stored.object).clone();
        fields::map_in(&mut last, "metadata").insert("resourceVersion".to_owned(), json!(self.rv.to_string()));
        let last = Arc::new(last);
        self.record(key, EventKind::Deleted, last.clone(), Some(stored.object), None);
        if is_definition(&key.resource) {
            self.remove_instances(&key.name)?;
        }
        Ok(last)
    }

    /// Notes the cloud's version of an object that is otherwise what it was; nobody needs to hear of it.
    pub(crate) fn set_origin(&mut self, key: &ObjectKey, origin_version: &str) -> Result<(), ApiError> {
        if let Some(mut stored) = self.get(key) {
            self.database.set_origin(key, origin_version).map_err(ApiError::internal)?;
            stored.origin_version = Some(origin_version.into());
            self.overlay_set(key, Some(stored.clone()));
            let slot = (key.namespace.clone(), key.name.clone());
            // Without a change of its own, the committed state must still learn the version.
            self.changes.push((
                key.resource.clone(),
                Change { rv: 0, kind: EventKind::Bookmark, slot, object: stored.object.clone(), previous: None },
                Some(stored),
            ));
        }
        Ok(())
    }

    /// Puts a local write into the outbox, in place of what it makes obsolete.
    pub(crate) fn outbox(&mut self, op: WriteOp, key: &ObjectKey, uid: &str, object: &Value) -> Result<(), ApiError> {
        let database = self.database;
        let run = || {
            match op {
                WriteOp::Create => {}
                WriteOp::Update | WriteOp::UpdateStatus => database.outbox_drop(op, key)?,
                WriteOp::Delete => {
                    database.outbox_drop(WriteOp::Update, key)?;
                    database.outbox_drop(WriteOp::UpdateStatus, key)?;
                }
            }
            let seq = database.outbox_append(op, key, uid, object)?;
            if key.resource.plural == "events" {
                database.outbox_trim(&key.resource, MAX_PENDING_EVENTS)?;
            }
            Ok::<_, super::database::DatabaseError>(seq)
        };
        self.outbox_last = run().map_err(ApiError::internal)?;
        Ok(())
    }

    fn record(
        &mut self,
        key: &ObjectKey,
        kind: EventKind,
        object: Arc<Value>,
        previous: Option<Arc<Value>>,
        stored: Option<Stored>,
    ) {
        self.overlay_set(key, stored.clone());
        let slot = (key.namespace.clone(), key.name.clone());
        self.changes.push((key.resource.clone(), Change { rv: self.rv, kind, slot, object, previous }, stored));
    }

    fn overlay_set(&mut self, key: &ObjectKey, entry: Option<Stored>) {
        let slot = (key.resource.to_string(), (key.namespace.clone(), key.name.clone()));
        let before = self.overlay.insert(slot.clone(), entry);
        self.undo.push((slot, before));
    }

    /// The objects of a definition go with it.
    fn remove_instances(&mut self, definition: &str) -> Result<(), ApiError> {
        let Some((plural, group)) = definition.split_once('.') else { return Ok(()) };
        let kinds = self.registry.all();
        let storage = kinds
            .iter()
            .find(|k| k.is_custom() && k.resource.group == group && k.resource.plural == plural)
            .map(|k| k.storage.clone());
        self.registry = self.registry.without_crd(definition);
        let Some(storage) = storage else { return Ok(()) };
        for ((namespace, name), _) in self.list(&storage) {
            self.remove(&ObjectKey::new(storage.clone(), namespace, name))?;
        }
        Ok(())
    }
}
