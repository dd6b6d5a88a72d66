//! A persistent hash map: cloning shares everything, and a change copies one small shard only.

use std::{
    borrow::Borrow,
    collections::HashMap,
    hash::{BuildHasher, Hash, RandomState},
    sync::Arc,
};

/// With 100,000 entries a shard holds about 400, so a change copies a few kilobytes.
const SHARDS: usize = 256;

/// One shard, shared between the versions of the map that have it in common.
type Shard<K, V> = Arc<HashMap<K, V, RandomState>>;

/// A hash map in shards that versions of it share.
pub(crate) struct Shards<K, V> {
    hasher: RandomState,
    shards: Arc<Vec<Shard<K, V>>>,
    len: usize,
}

impl<K, V> Clone for Shards<K, V> {
    fn clone(&self) -> Self {
        Self { hasher: self.hasher.clone(), shards: Arc::clone(&self.shards), len: self.len }
    }
}

impl<K, V> Default for Shards<K, V> {
    fn default() -> Self {
        let hasher = RandomState::new();
        let empty = Arc::new(HashMap::with_hasher(hasher.clone()));
        Self { hasher, shards: Arc::new(vec![empty; SHARDS]), len: 0 }
    }
}

impl<K, V> std::fmt::Debug for Shards<K, V> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shards").field("len", &self.len).finish_non_exhaustive()
    }
}

impl<K: Hash + Eq + Clone, V: Clone> Shards<K, V> {
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn get<Q: Hash + Eq + ?Sized>(&self, key: &Q) -> Option<&V>
    where
        K: Borrow<Q>,
    {
        self.shards[self.shard_of(key)].get(key)
    }

    pub(crate) fn insert(&mut self, key: K, value: V) {
        let at = self.shard_of(&key);
        let shard = Arc::make_mut(&mut Arc::make_mut(&mut self.shards)[at]);
        if shard.insert(key, value).is_none() {
            self.len += 1;
        }
    }

    pub(crate) fn remove<Q: Hash + Eq + ?Sized>(&mut self, key: &Q) -> Option<V>
    where
        K: Borrow<Q>,
    {
        let at = self.shard_of(key);
        // Looked up first: a miss must not copy the shard.
        if !self.shards[at].contains_key(key) {
            return None;
        }
        let removed = Arc::make_mut(&mut Arc::make_mut(&mut self.shards)[at]).remove(key);
        self.len -= usize::from(removed.is_some());
        removed
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (&K, &V)> {
        self.shards.iter().flat_map(|shard| shard.iter())
    }

    /// Keys whose value differs between this version and an older one of the same map; shards in common are skipped.
    pub(crate) fn changed_since(&self, older: &Self, same: impl Fn(&V, &V) -> bool) -> Vec<K> {
        let mut changed = Vec::new();
        for (new, old) in self.shards.iter().zip(older.shards.iter()) {
            if Arc::ptr_eq(new, old) {
                continue;
            }
            changed.extend(
                new.iter()
                    .filter(|(key, value)| !old.get(*key).is_some_and(|o| same(value, o)))
                    .map(|(k, _)| k.clone()),
            );
            changed.extend(old.keys().filter(|key| !new.contains_key(*key)).cloned());
        }
        changed
    }

    fn shard_of<Q: Hash + ?Sized>(&self, key: &Q) -> usize {
        // The low bits choose the bucket inside the shard, so other bits choose the shard.
        (self.hasher.hash_one(key) >> 40) as usize % SHARDS
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_older_version_keeps_its_entries_and_the_difference_is_found() {
        let mut map = Shards::default();
        for i in 0..5000_u32 {
            map.insert(i, Arc::new(i));
        }
        let old = map.clone();
        map.insert(7, Arc::new(70));
        map.remove(&8);
        map.remove(&9999);
        map.insert(6000, Arc::new(6000));
        let mut changed = map.changed_since(&old, Arc::ptr_eq);
        changed.sort_unstable();
        assert_eq!(changed, [7, 8, 6000]);
        assert_eq!((old.get(&7).map(|v| **v), old.len()), (Some(7), 5000));
        assert_eq!((map.get(&7).map(|v| **v), map.get(&8), map.len()), (Some(70), None, 5000));
        assert_eq!(map.iter().count(), 5000);
    }
}
