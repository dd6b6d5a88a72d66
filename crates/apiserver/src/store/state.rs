//! What readers see: the committed objects of every resource, and the recent changes that watches resume from.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    sync::Arc,
};

use edgemesh_api::{ObjectKey, ResourceName};
use serde_json::Value;
use tokio::sync::watch;

use super::options::EventKind;
use crate::kinds::allocation::Allocations;

/// An object as it is kept, in its storage version.
#[derive(Debug, Clone)]
pub(crate) struct Stored {
    pub(crate) object: Arc<Value>,
    /// The cloud's version, for what came from there.
    pub(crate) origin_version: Option<Arc<str>>,
}

/// Namespace and name, in the order of lists.
pub(crate) type Slot = (String, String);

/// One committed change.
#[derive(Debug, Clone)]
pub(crate) struct Change {
    pub(crate) rv: u64,
    pub(crate) kind: EventKind,
    pub(crate) slot: Slot,
    /// The state after the change; for deletions the last state.
    pub(crate) object: Arc<Value>,
    pub(crate) previous: Option<Arc<Value>>,
}

/// The objects of one resource.
#[derive(Debug)]
pub(crate) struct Table {
    pub(crate) resource: ResourceName,
    pub(crate) objects: BTreeMap<Slot, Stored>,
    history: VecDeque<Change>,
    /// Changes up to here are forgotten.
    forgotten: u64,
    changed: watch::Sender<u64>,
}

/// All committed objects.
#[derive(Debug)]
pub(crate) struct State {
    /// The last resource version that was given out.
    pub(crate) rv: u64,
    history: usize,
    tables: HashMap<String, Table>,
    /// Addresses and node ports of the Services.
    allocations: Allocations,
    started_at: u64,
}

impl State {
    pub(crate) fn new(rv: u64, history: usize) -> Self {
        Self { rv, history, tables: HashMap::new(), allocations: Allocations::default(), started_at: rv }
    }

    /// The table of a resource by its storage name; several versions share it.
    pub(crate) fn table(&self, resource: &ResourceName) -> Option<&Table> {
        self.tables.get(&resource.to_string())
    }

    pub(crate) fn table_mut(&mut self, resource: &ResourceName) -> &mut Table {
        let started_at = self.started_at;
        self.tables.entry(resource.to_string()).or_insert_with(|| Table {
            resource: resource.clone(),
            objects: BTreeMap::new(),
            history: VecDeque::new(),
            forgotten: started_at,
            changed: watch::Sender::new(started_at),
        })
    }

    pub(crate) fn tables(&self) -> impl Iterator<Item = &Table> {
        self.tables.values()
    }

    pub(crate) fn get(&self, key: &ObjectKey) -> Option<&Stored> {
        self.table(&key.resource)?.objects.get(&(key.namespace.clone(), key.name.clone()))
    }

    /// What all committed Services have.
    pub(crate) fn allocations(&self) -> &Allocations {
        &self.allocations
    }

    /// Takes in an object, or that it is gone.
    pub(crate) fn set(&mut self, resource: &ResourceName, slot: Slot, stored: Option<Stored>) {
        let now = stored.as_ref().map(|stored| Arc::clone(&stored.object));
        let objects = &mut self.table_mut(resource).objects;
        let before = match stored {
            Some(stored) => objects.insert(slot, stored),
            None => objects.remove(&slot),
        };
        if resource.group.is_empty() && resource.plural == "services" {
            before.into_iter().for_each(|before| self.allocations.remove(&before.object));
            now.into_iter().for_each(|now| self.allocations.add(&now));
        }
    }

    /// Makes a change visible. [`State::announce`] then wakes the watchers.
    pub(crate) fn apply(&mut self, resource: &ResourceName, change: Change, stored: Option<Stored>) {
        self.set(resource, change.slot.clone(), stored);
        let keep = self.history;
        let table = self.table_mut(resource);
        table.history.push_back(change);
        while table.history.len() > keep {
            if let Some(old) = table.history.pop_front() {
                table.forgotten = old.rv;
            }
        }
    }

    pub(crate) fn announce(&self, resource: &ResourceName) {
        if let Some(table) = self.table(resource) {
            table.changed.send_replace(self.rv);
        }
    }
}

impl Table {
    /// Wakes when something changed.
    pub(crate) fn subscribe(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// Whether changes after `rv` are all still known.
    pub(crate) fn remembers(&self, rv: u64) -> bool {
        rv >= self.forgotten
    }

    /// Up to `limit` changes after `rv`, oldest first.
    pub(crate) fn after(&self, rv: u64, limit: usize) -> impl Iterator<Item = &Change> {
        let start = self.history.partition_point(|c| c.rv <= rv);
        self.history.iter().skip(start).take(limit)
    }

    /// The objects as they were at `rv`; `None` when that is forgotten.
    pub(crate) fn at(&self, rv: u64) -> Option<BTreeMap<&Slot, &Arc<Value>>> {
        if !self.remembers(rv) {
            return None;
        }
        let mut objects: BTreeMap<_, _> = self.objects.iter().map(|(slot, s)| (slot, &s.object)).collect();
        for change in self.history.iter().rev().take_while(|c| c.rv > rv) {
            match &change.previous {
                Some(previous) => objects.insert(&change.slot, previous),
                None => objects.remove(&change.slot),
            };
        }
        Some(objects)
    }

    /// Whether anything changed after `rv`.
    pub(crate) fn changed_since(&self, rv: u64) -> bool {
        self.history.back().is_some_and(|c| c.rv > rv)
    }
}
