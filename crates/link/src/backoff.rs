//! Delays between attempts to connect: exponential, capped, and jittered, so that a fleet doesn't return all at once.

use rand::{Rng, SeedableRng, rngs::SmallRng};

use crate::Millis;

/// The delays of one link.
#[derive(Debug)]
pub struct Backoff {
    first: Millis,
    cap: Millis,
    attempt: u32,
    random: SmallRng,
}

impl Backoff {
    /// Delays from `first`, doubling up to `cap`; `seed` makes the jitter repeatable.
    pub fn new(first: Millis, cap: Millis, seed: u64) -> Self {
        Self { first: first.max(1), cap: cap.max(first.max(1)), attempt: 0, random: SmallRng::seed_from_u64(seed) }
    }

    /// The next delay: between half and all of the current step.
    pub fn next_delay(&mut self) -> Millis {
        let step = self.first.saturating_mul(1 << self.attempt.min(20)).min(self.cap);
        self.attempt = self.attempt.saturating_add(1);
        self.jitter(step)
    }

    /// A delay between half and all of `step`, whatever came before.
    pub fn jitter(&mut self, step: Millis) -> Millis {
        self.random.random_range(step / 2..=step)
    }

    /// Starts again from the first delay.
    pub fn reset(&mut self) {
        self.attempt = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_double_to_the_cap_within_their_jitter_and_start_again_after_a_reset() {
        let mut backoff = Backoff::new(200, 2_000, 7);
        for step in [200, 400, 800, 1_600, 2_000, 2_000] {
            let delay = backoff.next_delay();
            assert!((step / 2..=step).contains(&delay), "{delay} for {step}");
        }
        backoff.reset();
        assert!(backoff.next_delay() <= 200);
    }
}
