//! The cache of upstream answers: bounded in entries and bytes, with what was not used lately thrown out first.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use super::wire::{HEADER, Malformed, Name, Query, counts, kind, rcode, read_record, word};

/// What an entry is found by: name in lower case, type, and whether DNSSEC was asked for or switched off.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Key(Box<[u8]>);

impl Key {
    /// The key of a query.
    pub(super) fn of(query: &Query<'_>) -> Self {
        Self::new(&query.name, query.kind, query.dnssec_ok(), query.checking_disabled())
    }

    pub(super) fn new(name: &Name, kind: u16, dnssec_ok: bool, checking_disabled: bool) -> Self {
        let mut bytes = Vec::with_capacity(name.wire().len() + 3);
        bytes.extend_from_slice(name.wire());
        bytes.extend_from_slice(&kind.to_be_bytes());
        bytes.push(u8::from(dnssec_ok) | u8::from(checking_disabled) << 1);
        Self(bytes.into())
    }

    /// The question that an upstream is asked: name, type, class IN.
    pub(super) fn question(&self) -> Vec<u8> {
        let mut question = self.0[..self.0.len() - 1].to_vec();
        question.extend_from_slice(&[0, 1]);
        question
    }

    /// The name that is asked for.
    pub(super) fn name(&self) -> Option<Name> {
        Name::read(&self.0, 0).ok().map(|(name, _)| name)
    }

    pub(super) fn dnssec_ok(&self) -> bool {
        self.0[self.0.len() - 1] & 1 != 0
    }

    pub(super) fn checking_disabled(&self) -> bool {
        self.0[self.0.len() - 1] & 2 != 0
    }
}

/// An entry that was used this often is popular.
const POPULAR: u32 = 3;

/// An upstream's answer, ready to be sent to any client that asks the same.
#[derive(Debug)]
pub(super) struct Entry {
    /// Response code.
    pub(super) rcode: u8,
    /// It was cut for UDP, and the whole couldn't be had over TCP.
    pub(super) truncated: bool,
    /// The root says that the whole top-level domain doesn't exist.
    pub(super) denied_by_root: bool,
    /// Answer, authority and additional records, without OPT.
    pub(super) counts: [u16; 3],
    /// The records in wire form. Their pointers count from the message's begin; the question's length is part of the key.
    pub(super) body: Box<[u8]>,
    /// Where in the body the TTLs are.
    ttls: Box<[u16]>,
    /// How long it is good for.
    lifetime: Duration,
    stored: Instant,
    /// How often it was used.
    uses: AtomicU32,
    /// It is being asked for anew, or was in vain.
    renewed: AtomicBool,
}

/// How an entry is to be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Freshness {
    Fresh,
    /// Past its lifetime, but good enough when no upstream answers (RFC 8767).
    Stale,
}

/// Limits on lifetimes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Lifetimes {
    pub(super) positive: Duration,
    pub(super) negative: Duration,
    /// How long after its lifetime an entry may still be used.
    pub(super) stale: Duration,
}

/// TTL of records in a stale answer (RFC 8767, section 4).
const STALE_TTL: u32 = 30;

impl Entry {
    /// Takes an upstream's answer apart. `question` is the length of the question that was asked; an error may come without it.
    pub(super) fn read(message: &[u8], question: usize, lifetimes: &Lifetimes) -> Result<Self, Malformed> {
        let [questions, answers, authority, additional] = counts(message);
        let begin = if questions == 0 { HEADER } else { HEADER + question };
        let rcode = word(message, 2) as u8 & 0x0f;
        let mut kept = [0_u16; 3];
        let mut ttls = Vec::new();
        let mut lowest = u32::MAX;
        let mut negative_ttl = None;
        let mut denied_by_root = false;
        let mut at = begin;
        'sections: for (section, count) in [answers, authority, additional].into_iter().enumerate() {
            for _ in 0..count {
                let record = read_record(message, at)?;
                if record.kind == kind::OPT {
                    // Always the last in practice. Records behind it would have pointers that are off by its length:
                    // additional ones may be left out.
                    break 'sections;
                }
                // A TTL with the highest bit set counts as 0 (RFC 2181).
                let ttl = if record.ttl > i32::MAX as u32 { 0 } else { record.ttl };
                if section < 2 {
                    lowest = lowest.min(ttl);
                }
                if section == 1 && record.kind == kind::SOA {
                    let minimum = message.get(record.data.end.wrapping_sub(4)..record.data.end).ok_or(Malformed)?;
                    let minimum = u32::from_be_bytes([minimum[0], minimum[1], minimum[2], minimum[3]]);
                    negative_ttl = Some(ttl.min(minimum));
                    // With an alias in front it is the end of the alias that is denied.
                    denied_by_root = rcode == rcode::NXDOMAIN && answers == 0 && message[at] == 0;
                }
                ttls.push(u16::try_from(record.ttl_at - begin).map_err(|_| Malformed)?);
                kept[section] += 1;
                at = record.data.end;
            }
        }
        let negative = rcode != rcode::NOERROR || answers == 0;
        let lifetime = if negative {
            // Without a SOA a negative answer isn't to be cached (RFC 2308, section 5).
            Duration::from_secs(u64::from(negative_ttl.unwrap_or(0))).min(lifetimes.negative)
        } else {
            Duration::from_secs(u64::from(lowest)).min(lifetimes.positive)
        };
        Ok(Self {
            rcode,
            truncated: word(message, 2) & 0x0200 != 0,
            denied_by_root,
            counts: kept,
            body: message.get(begin..at).ok_or(Malformed)?.into(),
            ttls: ttls.into(),
            lifetime,
            stored: Instant::now(),
            uses: AtomicU32::new(0),
            renewed: AtomicBool::new(false),
        })
    }

    /// Notes a use. True once, when it is popular and the last tenth of its lifetime, or the last second, has begun.
    pub(super) fn is_to_be_renewed(&self, now: Instant) -> bool {
        let popular = self.uses.fetch_add(1, Ordering::Relaxed) + 1 >= POPULAR;
        let left = self.lifetime.saturating_sub(now.saturating_duration_since(self.stored));
        popular
            && self.rcode == rcode::NOERROR
            && left <= (self.lifetime / 10).max(Duration::from_secs(1))
            && !self.renewed.swap(true, Ordering::Relaxed)
    }

    /// Whether it can be used at a time, and how.
    pub(super) fn freshness(&self, now: Instant, lifetimes: &Lifetimes) -> Option<Freshness> {
        let age = now.saturating_duration_since(self.stored);
        if age < self.lifetime {
            Some(Freshness::Fresh)
        } else if age < self.lifetime + lifetimes.stale && matches!(self.rcode, rcode::NOERROR | rcode::NXDOMAIN) {
            Some(Freshness::Stale)
        } else {
            None
        }
    }

    /// Sets the TTLs of a copy of the body to what is left of them.
    pub(super) fn age_ttls(&self, body: &mut [u8], now: Instant, freshness: Freshness) {
        let age = now.saturating_duration_since(self.stored).as_secs() as u32;
        let most = self.lifetime.as_secs() as u32;
        for at in &self.ttls {
            let at = usize::from(*at);
            let Some(field) = body.get_mut(at..at + 4) else { continue };
            let ttl = u32::from_be_bytes([field[0], field[1], field[2], field[3]]);
            let left = match freshness {
                Freshness::Fresh => ttl.min(most).saturating_sub(age),
                Freshness::Stale => STALE_TTL,
            };
            field.copy_from_slice(&left.to_be_bytes());
        }
    }

    fn cost(&self, key: &Key) -> usize {
        // The fixed part is what the maps and allocations take.
        self.body.len() + self.ttls.len() * 2 + key.0.len() * 2 + 200
    }
}

/// Entries by key. Throws out by the "second chance" rule: in turn, but not what was used since its last turn.
#[derive(Debug)]
pub(super) struct Cache {
    most_entries: usize,
    most_bytes: usize,
    bytes: usize,
    index: HashMap<Key, usize>,
    slots: Vec<Slot>,
    hand: usize,
}

#[derive(Debug)]
struct Slot {
    key: Key,
    entry: Arc<Entry>,
    used: bool,
}

impl Cache {
    pub(super) fn new(most_entries: usize, most_bytes: usize) -> Self {
        Self { most_entries, most_bytes, bytes: 0, index: HashMap::new(), slots: Vec::new(), hand: 0 }
    }

    pub(super) fn get(&mut self, key: &Key) -> Option<&Arc<Entry>> {
        let slot = self.slots.get_mut(*self.index.get(key)?)?;
        slot.used = true;
        Some(&slot.entry)
    }

    pub(super) fn put(&mut self, key: Key, entry: Arc<Entry>) {
        self.remove(&key);
        let cost = entry.cost(&key);
        // What has no lifetime isn't to be kept, not even for when upstream is gone.
        if self.most_entries == 0 || entry.lifetime.is_zero() || cost > self.most_bytes / 16 {
            return;
        }
        while self.slots.len() >= self.most_entries || self.bytes + cost > self.most_bytes {
            self.throw_out();
        }
        self.bytes += cost;
        self.index.insert(key.clone(), self.slots.len());
        self.slots.push(Slot { key, entry, used: false });
    }

    pub(super) fn len(&self) -> usize {
        self.slots.len()
    }

    fn remove(&mut self, key: &Key) {
        let Some(at) = self.index.remove(key) else { return };
        let slot = self.slots.swap_remove(at);
        self.bytes -= slot.entry.cost(&slot.key);
        if let Some(moved) = self.slots.get(at) {
            self.index.insert(moved.key.clone(), at);
        }
    }

    fn throw_out(&mut self) {
        while !self.slots.is_empty() {
            if self.hand >= self.slots.len() {
                self.hand = 0;
            }
            let slot = &mut self.slots[self.hand];
            if !std::mem::take(&mut slot.used) {
                let key = slot.key.clone();
                self.remove(&key);
                return;
            }
            self.hand += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(name: &str) -> Key {
        Key::new(&Name::from_text(name).unwrap(), kind::A, false, false)
    }

    fn entry(lifetime: u64, size: usize) -> Arc<Entry> {
        Arc::new(Entry {
            rcode: 0,
            truncated: false,
            denied_by_root: false,
            counts: [0; 3],
            body: vec![0; size].into(),
            ttls: Box::default(),
            lifetime: Duration::from_secs(lifetime),
            stored: Instant::now(),
            uses: AtomicU32::new(0),
            renewed: AtomicBool::new(false),
        })
    }

    #[test]
    fn a_popular_entry_is_renewed_once_shortly_before_it_expires() {
        let entry = entry(50, 0);
        let at = |seconds| entry.is_to_be_renewed(entry.stored + Duration::from_secs(seconds));
        assert_eq!([at(46), at(46)], [false, false], "not popular yet");
        assert_eq!([at(44), at(46), at(47)], [false, true, false]);
    }

    #[test]
    fn what_was_used_outlives_what_was_not_and_bounds_hold() {
        let mut cache = Cache::new(100, 1 << 20);
        for i in 0..100 {
            cache.put(key(&format!("n{i}")), entry(5, 10));
        }
        for i in 0..50 {
            assert!(cache.get(&key(&format!("n{i}"))).is_some());
        }
        for i in 100..150 {
            cache.put(key(&format!("n{i}")), entry(5, 10));
        }
        assert_eq!(cache.len(), 100);
        assert_eq!((0..50).filter(|i| cache.get(&key(&format!("n{i}"))).is_some()).count(), 50);
        let mut small = Cache::new(1000, 64 << 10);
        for i in 0..1000 {
            small.put(key(&format!("n{i}")), entry(5, 1000));
        }
        assert!(small.bytes <= 64 << 10 && small.len() > 40, "{} bytes in {}", small.bytes, small.len());
        small.put(key("huge"), entry(5, 60_000));
        assert!(small.get(&key("huge")).is_none());
    }

    #[test]
    fn an_entry_is_fresh_then_stale_then_gone() {
        let limits = Lifetimes {
            positive: Duration::from_secs(60),
            negative: Duration::from_secs(30),
            stale: Duration::from_secs(100),
        };
        let entry = entry(10, 0);
        let at = |seconds| entry.freshness(entry.stored + Duration::from_secs(seconds), &limits);
        assert_eq!(
            [at(9), at(10), at(109), at(110)],
            [Some(Freshness::Fresh), Some(Freshness::Stale), Some(Freshness::Stale), None]
        );
    }
}
