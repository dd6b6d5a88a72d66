//! Quantities: `100m`, `1.5Gi`, `2e3` (Kubernetes API, "Quantity").

use serde_json::Value;

use super::field_error::Errors;
use super::{names, tables};

const RULE: &str = "quantities must match the regular expression '^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$'";

/// A quantity in thousandths (rounded up), or nothing when the text isn't one. Values beyond the range are cut to it.
pub(crate) fn parse_milli(text: &str) -> Option<i128> {
    let digits_end = text
        .char_indices()
        .find(|(i, c)| !(c.is_ascii_digit() || *c == '.' || (*i == 0 && matches!(c, '+' | '-'))))
        .map_or(text.len(), |(i, _)| i);
    let (number, suffix) = text.split_at(digits_end);
    let (negative, number) = match number.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, number.strip_prefix('+').unwrap_or(number)),
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if (whole.is_empty() && fraction.is_empty()) || fraction.contains('.') || whole.len() + fraction.len() > 30 {
        return None;
    }
    let mantissa: i128 = format!("{whole}{fraction}").parse().ok()?;
    let (numerator, exponent): (i128, i32) = match suffix {
        "" => (1, 0),
        "n" => (1, -9),
        "u" => (1, -6),
        "m" => (1, -3),
        "k" => (1, 3),
        "M" => (1, 6),
        "G" => (1, 9),
        "T" => (1, 12),
        "P" => (1, 15),
        "E" => (1, 18),
        "Ki" => (1 << 10, 0),
        "Mi" => (1 << 20, 0),
        "Gi" => (1 << 30, 0),
        "Ti" => (1 << 40, 0),
        "Pi" => (1 << 50, 0),
        "Ei" => (1 << 60, 0),
        _ => (1, suffix.strip_prefix(['e', 'E'])?.parse::<i16>().ok()?.into()),
    };
    let exponent = exponent - i32::try_from(fraction.len()).ok()? + 3;
    let scaled = mantissa.checked_mul(numerator).unwrap_or(i128::MAX);
    let power = 10_i128.checked_pow(exponent.unsigned_abs()).unwrap_or(i128::MAX);
    let milli =
        if exponent >= 0 { scaled.saturating_mul(power) } else { scaled / power + i128::from(scaled % power != 0) };
    Some(if negative { -milli } else { milli })
}

/// Checks one quantity that may not be negative.
pub(crate) fn validate(value: &Value, field: &str, errors: &mut Errors) {
    match parse_milli(tables::text(value)) {
        None => errors.invalid(field, value.clone(), RULE),
        Some(milli) if milli < 0 => errors.invalid(field, value.clone(), "must be greater than or equal to 0"),
        Some(_) => {}
    }
}

/// Checks a list of resources by name, for example `limits`.
pub(crate) fn validate_list(list: &Value, field: &str, errors: &mut Errors) {
    for (name, amount) in list.as_object().into_iter().flatten() {
        let field = format!("{field}[{name}]");
        if let Some(problem) = names::qualified_name(name) {
            errors.invalid(&field, name.as_str(), problem);
        }
        validate(amount, &field, errors);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_are_read_as_kubernetes_reads_them() {
        for (text, milli) in [
            ("1", 1000),
            ("100m", 100),
            ("0.1m", 1),
            ("1.5", 1500),
            ("-2", -2000),
            ("1Ki", 1_024_000),
            ("1.5Gi", 1_610_612_736_000),
            ("2e3", 2_000_000),
            ("1E", 1_000_000_000_000_000_000_000),
            (".5", 500),
            ("1e-32768", 1),
            ("0e32767", 0),
        ] {
            assert_eq!(parse_milli(text), Some(milli), "{text}");
        }
        for bad in ["", "a", "1x", "1.2.3", "1 Gi", "--1", "1KiB", "m", "1e99999"] {
            assert_eq!(parse_milli(bad), None, "{bad}");
        }
    }
}
