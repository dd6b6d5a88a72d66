//! A row of the result: a value, what it is compared with, its budget; as a line of the table and as a JSON file.

use std::{fs, io::ErrorKind, path::Path};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::pairs::{Pair, Ratio};

/// What a row should reach.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Budget {
    /// The ratio to the baseline, at least.
    RatioAtLeast(f64),
    /// The ratio to the baseline, at most.
    RatioAtMost(f64),
    /// The value itself, at most.
    ValueAtMost(f64),
}

/// A measured row.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Row {
    /// Name; also of its file.
    pub(crate) name: String,
    /// Unit of its values.
    pub(crate) unit: String,
    /// Median of the samples.
    pub(crate) value: f64,
    /// What it is compared with.
    pub(crate) baseline: Option<Baseline>,
    /// What it should reach.
    pub(crate) budget: Option<Budget>,
    /// Every sample as measured.
    pub(crate) samples: Value,
}

/// What a row is compared with.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Baseline {
    name: String,
    /// Median of its samples.
    value: f64,
    ratio: Ratio,
}

impl Row {
    /// A row of a subject and its baseline.
    ///
    /// # Errors
    /// When there are no samples, or one is not above zero.
    pub(crate) fn compared(
        name: &str,
        unit: &str,
        baseline: &str,
        pairs: &[Pair],
        budget: Option<Budget>,
    ) -> Result<Self> {
        let value = median(pairs.iter().map(|pair| pair.value)).context("no samples")?;
        let base = median(pairs.iter().map(|pair| pair.baseline)).context("no samples")?;
        Ok(Self {
            name: name.to_owned(),
            unit: unit.to_owned(),
            value,
            baseline: Some(Baseline { name: baseline.to_owned(), value: base, ratio: Ratio::of(pairs)? }),
            budget,
            samples: pairs
                .iter()
                .map(|p| json!({"value": rounded(p.value), "baseline": rounded(p.baseline)}))
                .collect(),
        })
    }

    /// A row with nothing to compare to.
    ///
    /// # Errors
    /// When there are no samples.
    pub(crate) fn alone(name: &str, unit: &str, samples: &[f64], budget: Option<Budget>) -> Result<Self> {
        Ok(Self {
            name: name.to_owned(),
            unit: unit.to_owned(),
            value: median(samples.iter().copied()).context("no samples")?,
            baseline: None,
            budget,
            samples: samples.iter().copied().map(rounded).collect(),
        })
    }

    /// Subject to baseline.
    fn ratio(&self) -> Option<Ratio> {
        self.baseline.as_ref().map(|baseline| baseline.ratio)
    }

    /// Whether the budget is met; none without a budget.
    pub(crate) fn met(&self) -> Option<bool> {
        match (self.budget?, self.ratio()) {
            (Budget::RatioAtLeast(least), Some(ratio)) => Some(ratio.estimate >= least),
            (Budget::RatioAtMost(most), Some(ratio)) => Some(ratio.estimate <= most),
            (Budget::ValueAtMost(most), _) => Some(self.value <= most),
            (_, None) => None,
        }
    }

    fn budget_text(&self) -> Option<String> {
        Some(match self.budget? {
            Budget::RatioAtLeast(least) => format!("ratio >= {least}"),
            Budget::RatioAtMost(most) => format!("ratio <= {most}"),
            Budget::ValueAtMost(most) => format!("value <= {most}"),
        })
    }

    fn json(&self) -> Value {
        let baseline =
            self.baseline.as_ref().map(|baseline| json!({"name": baseline.name, "value": rounded(baseline.value)}));
        json!({
            "name": self.name, "unit": self.unit, "value": rounded(self.value), "baseline": baseline,
            "ratio": self.ratio().map(|ratio| rounded(ratio.estimate)),
            "ratio_range": self.ratio().map(|ratio| [rounded(ratio.range.0), rounded(ratio.range.1)]),
            "budget": self.budget_text(), "met": self.met(), "samples": self.samples,
        })
    }

    /// Writes the row's file.
    ///
    /// # Errors
    /// When it can't be written.
    pub(crate) fn save(&self, folder: &Path) -> Result<()> {
        fs::create_dir_all(folder)?;
        let path = folder.join(format!("{}.json", self.name));
        fs::write(&path, format!("{:#}\n", self.json())).with_context(|| path.display().to_string())
    }
}

/// Removes the file of an earlier run, so that it is not taken for a result of this one.
///
/// # Errors
/// When it is there and can't be removed.
pub(crate) fn forget(folder: &Path, name: &str) -> Result<()> {
    match fs::remove_file(folder.join(format!("{name}.json"))) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error.into()),
        _ => Ok(()),
    }
}

/// The table of the measured rows.
pub(crate) fn table(rows: &[Row]) -> String {
    let mut lines =
        vec![["row", "value", "unit", "baseline", "of", "ratio", "range", "budget", "met"].map(str::to_owned)];
    for row in rows {
        let compared = row.baseline.as_ref();
        let met = row.met().map_or("", |met| if met { "yes" } else { "no" });
        lines.push([
            row.name.clone(),
            shown(row.value),
            row.unit.clone(),
            compared.map(|baseline| shown(baseline.value)).unwrap_or_default(),
            compared.map(|baseline| baseline.name.clone()).unwrap_or_default(),
            row.ratio().map(|ratio| format!("{:.3}", ratio.estimate)).unwrap_or_default(),
            row.ratio().map(|Ratio { range, .. }| format!("{:.3}-{:.3}", range.0, range.1)).unwrap_or_default(),
            row.budget_text().unwrap_or_default(),
            met.to_owned(),
        ]);
    }
    let width = |column: usize| lines.iter().map(|line| line[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<_> = (0..9).map(width).collect();
    let pad = |line: &[String; 9]| {
        let cells = line.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}"));
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    lines.iter().map(pad).collect::<Vec<_>>().join("\n")
}

fn shown(value: f64) -> String {
    if value >= 1000.0 { format!("{value:.0}") } else { format!("{value:.2}") }
}

fn rounded(value: f64) -> f64 {
    (value * 10_000.0).round() / 10_000.0
}

fn median(values: impl Iterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<_> = values.collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        length if length % 2 == 1 => Some(values[middle]),
        _ => Some(f64::midpoint(values[middle - 1], values[middle])),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(value: f64, baseline: f64) -> Pair {
        Pair { value, baseline }
    }

    #[test]
    fn a_compared_row_has_medians_a_ratio_and_says_whether_the_budget_is_met() {
        let pairs = [pair(9.0, 10.0), pair(1.8, 2.0), pair(27.0, 30.0), pair(40.0, 20.0)];
        let row = Row::compared("x", "Gbit/s", "direct", &pairs, Some(Budget::RatioAtLeast(0.98))).unwrap();
        let json = row.json();
        assert_eq!(json["value"], 18.0);
        assert_eq!(json["baseline"], json!({"name": "direct", "value": 15.0}));
        assert_eq!(json["ratio"], 0.9, "that of the pairs, not of the medians");
        assert_eq!(json["ratio_range"], json!([0.9, 2.0]));
        assert_eq!(json["met"], false);
        assert_eq!(json["samples"].as_array().unwrap().len(), 4);
    }

    #[test]
    fn a_row_without_baseline_and_budget_says_so_with_nulls() {
        let json = Row::alone("x", "s", &[1.0, 2.0], None).unwrap().json();
        assert_eq!(json["value"], 1.5);
        assert!(["baseline", "ratio", "ratio_range", "budget", "met"].iter().all(|key| json[key].is_null()), "{json}");
        let keys: Vec<_> = json.as_object().unwrap().keys().cloned().collect();
        assert_eq!(keys, ["name", "unit", "value", "baseline", "ratio", "ratio_range", "budget", "met", "samples"]);
    }

    #[test]
    fn a_row_with_no_samples_is_an_error() {
        assert!(Row::alone("x", "s", &[], None).is_err());
        assert!(Row::compared("x", "s", "y", &[], None).is_err());
    }
}
