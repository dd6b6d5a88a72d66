//! Measurements of a subject and its baseline by turns, and what they say about the ratio of the two.

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};

/// A measurement of the subject and one of the baseline, taken one after the other.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(crate) struct Pair {
    /// Through the mesh.
    pub(crate) value: f64,
    /// Without it.
    pub(crate) baseline: f64,
}

/// Measures `rounds` pairs. Every second one begins with the baseline, so that drift of the machine cancels out. The first measurement of
/// each side counts for nothing: it may have to build the path, and warms both up.
///
/// # Errors
/// When a measurement fails.
pub(crate) fn by_turns(
    rounds: u32,
    mut subject: impl FnMut() -> Result<f64>,
    mut baseline: impl FnMut() -> Result<f64>,
) -> Result<Vec<Pair>> {
    subject()?;
    baseline()?;
    let one = |round| {
        if round % 2 == 0 {
            let value = subject()?;
            Ok(Pair { value, baseline: baseline()? })
        } else {
            let baseline = baseline()?;
            Ok(Pair { value: subject()?, baseline })
        }
    };
    (0..rounds).map(one).collect()
}

/// The ratio of subject to baseline, estimated from pairs.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Ratio {
    /// The estimate of Hodges and Lehmann: the median of the means of any two pairs (here of logarithms of ratios). It needs as few pairs as their mean
    /// does, and one pair in four may be disturbed by other work on the machine.
    pub(crate) estimate: f64,
    /// Where the ratio lies with 95 % confidence, by Wilcoxon's signed ranks: no assumption is made about how pairs scatter.
    pub(crate) range: (f64, f64),
}

impl Ratio {
    /// What pairs say.
    ///
    /// # Errors
    /// When there are none, or one has a side that is not above zero.
    pub(crate) fn of(pairs: &[Pair]) -> Result<Self> {
        let logarithms: Vec<_> = pairs.iter().map(|pair| (pair.value / pair.baseline).ln()).collect();
        ensure!(!logarithms.is_empty(), "no samples");
        ensure!(logarithms.iter().all(|log| log.is_finite()), "a sample is not above zero: {pairs:?}");
        let mut means: Vec<_> = (0..logarithms.len())
            .flat_map(|first| logarithms[first..].iter().map(move |second| (first, second)))
            .map(|(first, second)| f64::midpoint(logarithms[first], *second))
            .collect();
        means.sort_by(f64::total_cmp);
        let count = logarithms.len() as f64;
        let half = count * (count + 1.0) / 4.0;
        let deviation = (count * (count + 1.0) * (2.0 * count + 1.0) / 24.0).sqrt();
        let outside = (half - 1.96 * deviation).max(0.0) as usize;
        let (low, high) = (means[outside], means[means.len() - 1 - outside]);
        let middle = means.len() / 2;
        let estimate = f64::midpoint(means[middle], means[(means.len() - 1) / 2]);
        Ok(Self { estimate: estimate.exp(), range: (low.exp(), high.exp()) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pairs(ratios: impl IntoIterator<Item = f64>) -> Vec<Pair> {
        // Baselines that drift, as a machine does.
        ratios
            .into_iter()
            .zip(1..)
            .map(|(ratio, at)| Pair { value: ratio * f64::from(at), baseline: f64::from(at) })
            .collect()
    }

    /// Numbers from 0 to 1 that scatter, the same in each run.
    fn scattered() -> impl Iterator<Item = f64> {
        (0_u64..).map(|number| (number.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 11) as f64 / (1_u64 << 53) as f64)
    }

    #[test]
    fn turns_are_taken_and_the_first_measurements_count_for_nothing() {
        let order = std::cell::RefCell::new(String::new());
        let turn = |side: &'static str| {
            let order = &order;
            move || {
                order.borrow_mut().push_str(side);
                Ok(order.borrow().len() as f64)
            }
        };
        let measured = by_turns(3, turn("s"), turn("b")).unwrap();
        assert_eq!(*order.borrow(), "sb".to_owned() + "sb" + "bs" + "sb");
        assert_eq!(measured[1], Pair { value: 6.0, baseline: 5.0 });
        assert!(by_turns(1, turn("s"), || anyhow::bail!("no")).is_err());
    }

    #[test]
    fn one_pair_and_pairs_that_agree_are_exact() {
        let close = |ratio: Ratio, wanted: f64| {
            [ratio.estimate, ratio.range.0, ratio.range.1].iter().all(|value| (value - wanted).abs() < 1e-9)
        };
        assert!(close(Ratio::of(&pairs([0.9])).unwrap(), 0.9));
        assert!(close(Ratio::of(&pairs([0.5; 20])).unwrap(), 0.5));
    }

    #[test]
    fn scatter_and_disturbed_pairs_move_the_estimate_little() {
        let ratios = scattered().zip(0..).map(|(scatter, number)| {
            // One pair of seven is far off, all to the same side.
            if number % 7 == 0 { 0.3 } else { 0.95 + scatter * 0.1 }
        });
        let ratio = Ratio::of(&pairs(ratios.take(300))).unwrap();
        assert!((0.98..1.0).contains(&ratio.estimate), "{ratio:?}");
        assert!(ratio.range.0 < ratio.estimate && ratio.estimate < ratio.range.1, "{ratio:?}");
    }

    #[test]
    fn the_range_holds_the_truth_and_shrinks_with_more_pairs() {
        let measured =
            |count: usize| Ratio::of(&pairs(scattered().take(count).map(|scatter| 0.9 + scatter * 0.2))).unwrap();
        let (few, many) = (measured(20), measured(600));
        for ratio in [few, many] {
            assert!(ratio.range.0 < 1.0 && 1.0 < ratio.range.1, "{ratio:?}");
        }
        assert!(many.range.1 - many.range.0 < (few.range.1 - few.range.0) / 4.0, "{few:?} {many:?}");
    }

    #[test]
    fn samples_that_give_no_ratio_are_an_error() {
        assert!(Ratio::of(&[]).is_err());
        assert!(Ratio::of(&[Pair { value: 0.0, baseline: 1.0 }]).is_err());
        assert!(Ratio::of(&[Pair { value: 1.0, baseline: 0.0 }]).is_err());
    }
}
