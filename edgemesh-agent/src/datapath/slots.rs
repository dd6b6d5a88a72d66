//! Which slots of the backends' map are in use: runs of slots, in sizes of powers of two (Knuth, "The Art of Computer
//! Programming", 2.5: the buddy system), so that freed runs merge and come back.

use std::collections::BTreeSet;

/// A run of slots.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Run {
    /// The first slot.
    pub(crate) first: u32,
    /// It has two to this power of slots.
    order: u8,
}

/// The free runs of a map.
#[derive(Debug)]
pub(crate) struct Slots {
    /// First slots of the free runs, by order.
    free: Vec<BTreeSet<u32>>,
    used: u32,
}

impl Slots {
    /// All slots free; `len` is a power of two.
    pub(crate) fn new(len: u32) -> Self {
        let top = len.max(1).ilog2();
        let mut free = vec![BTreeSet::new(); top as usize + 1];
        free[top as usize].insert(0);
        Self { free, used: 0 }
    }

    /// How many slots are in runs that were given out.
    pub(crate) fn used(&self) -> u32 {
        self.used
    }

    /// The lowest free run with room for `count` slots; none when there is none.
    pub(crate) fn take(&mut self, count: u16) -> Option<Run> {
        let order = usize::from(count.max(1)).next_power_of_two().ilog2() as usize;
        let found = (order..self.free.len()).find(|&order| !self.free[order].is_empty())?;
        let first = self.free[found].pop_first()?;
        for smaller in (order..found).rev() {
            self.free[smaller].insert(first + (1 << smaller));
        }
        self.used += 1 << order;
        Some(Run { first, order: u8::try_from(order).ok()? })
    }

    /// Takes the run that begins at a slot and has room for `count`, as [`Slots::take`] once gave it out; none if part of it is
    /// in use.
    pub(crate) fn take_at(&mut self, first: u32, count: u16) -> Option<Run> {
        let order = usize::from(count.max(1)).next_power_of_two().ilog2() as usize;
        let start = |order: usize| first >> order << order;
        if start(order) != first {
            return None;
        }
        let found = (order..self.free.len()).find(|&order| self.free[order].contains(&start(order)))?;
        self.free[found].remove(&start(found));
        for smaller in (order..found).rev() {
            // The half in which the run is not.
            self.free[smaller].insert(start(smaller) ^ (1 << smaller));
        }
        self.used += 1 << order;
        Some(Run { first, order: u8::try_from(order).ok()? })
    }

    /// Gives a run back.
    pub(crate) fn release(&mut self, run: Run) {
        let mut order = usize::from(run.order);
        let mut first = run.first;
        self.used -= 1 << order;
        while order + 1 < self.free.len() && self.free[order].remove(&(first ^ (1 << order))) {
            first &= !(1 << order);
            order += 1;
        }
        self.free[order].insert(first);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_never_overlap_and_merge_again_when_freed() {
        let mut slots = Slots::new(1024);
        let mut taken: Vec<(Run, u32)> = Vec::new();
        for round in 0..2000_u32 {
            let count = (round * 7 % 13) as u16;
            if round % 3 == 2 {
                slots.release(taken.swap_remove((round * 31) as usize % taken.len()).0);
            }
            if let Some(run) = slots.take(count) {
                let len = u32::from(count.max(1));
                let free = |&(other, other_len): &(Run, u32)| {
                    run.first + len <= other.first || other.first + other_len <= run.first
                };
                assert!(taken.iter().all(free), "{run:?} overlaps");
                taken.push((run, len));
            }
        }
        assert!(slots.take(1024).is_none());
        // The same runs, taken by their places from a map of which nothing is known.
        let mut again = Slots::new(1024);
        for (run, len) in taken.iter().rev() {
            assert_eq!(again.take_at(run.first, *len as u16), Some(*run));
            assert_eq!(again.take_at(run.first, *len as u16), None, "in use");
        }
        assert_eq!(again.free, slots.free);
        assert_eq!((again.take_at(4096, 1), again.take_at(3, 4)), (None, None), "outside, and where no run begins");
        assert!(again.used() == slots.used() && slots.used() > 0);
        for (run, _) in taken {
            slots.release(run);
        }
        assert_eq!(slots.used(), 0);
        assert_eq!(slots.take(1024), Some(Run { first: 0, order: 10 }));
    }
}
