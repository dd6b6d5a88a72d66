//! Kubernetes quantities (`100m`, `1.5Gi`, `2e3`) as numbers (API conventions, "Resource quantities").

use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

/// The quantity times 1000, rounded up: milli-CPU. `None` for what is no quantity.
pub(crate) fn milli(quantity: &Quantity) -> Option<i64> {
    scaled(&quantity.0, 1_000)
}

/// The quantity as a whole number, rounded up: bytes, or cores. `None` for what is no quantity.
pub(crate) fn whole(quantity: &Quantity) -> Option<i64> {
    scaled(&quantity.0, 1)
}

/// `text * scale`, rounded up, computed in integers so that large byte counts stay exact.
fn scaled(text: &str, scale: i128) -> Option<i64> {
    let text = text.trim();
    let split = text.find(|c: char| !(c.is_ascii_digit() || matches!(c, '.' | '+' | '-'))).unwrap_or(text.len());
    let (number, suffix) = text.split_at(split);
    let (multiplier, divisor) = suffix_factor(suffix)?;
    let (integer, fraction) = number.split_once('.').unwrap_or((number, ""));
    if fraction.len() > 12 || integer.len() > 20 || !fraction.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let digits = format!("{integer}{fraction}");
    let unscaled: i128 = digits.parse().ok()?;
    let numerator = unscaled.checked_mul(multiplier)?.checked_mul(scale)?;
    let denominator = 10i128.pow(u32::try_from(fraction.len()).ok()?).checked_mul(divisor)?;
    let quotient = numerator.div_euclid(denominator) + i128::from(numerator.rem_euclid(denominator) != 0);
    i64::try_from(quotient).ok()
}

fn suffix_factor(suffix: &str) -> Option<(i128, i128)> {
    let power_of_two = |exponent: u32| Some((1i128 << exponent, 1));
    match suffix {
        "" => Some((1, 1)),
        "n" => Some((1, 1_000_000_000)),
        "u" => Some((1, 1_000_000)),
        "m" => Some((1, 1_000)),
        "k" => Some((1_000, 1)),
        "M" => Some((1_000_000, 1)),
        "G" => Some((1_000_000_000, 1)),
        "T" => Some((1_000_000_000_000, 1)),
        "P" => Some((1_000_000_000_000_000, 1)),
        "E" => Some((1_000_000_000_000_000_000, 1)),
        "Ki" => power_of_two(10),
        "Mi" => power_of_two(20),
        "Gi" => power_of_two(30),
        "Ti" => power_of_two(40),
        "Pi" => power_of_two(50),
        "Ei" => power_of_two(60),
        _ => {
            let exponent: i32 = suffix.strip_prefix(['e', 'E'])?.parse().ok()?;
            let factor = 10i128.checked_pow(exponent.unsigned_abs().min(18))?;
            Some(if exponent < 0 { (1, factor) } else { (factor, 1) })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_of_every_form_become_numbers() {
        for (text, expected) in [
            ("100m", Some(1)),
            ("1", Some(1)),
            ("1.5Gi", Some(1_610_612_736)),
            ("128Mi", Some(134_217_728)),
            ("2e3", Some(2_000)),
            ("1E", Some(1_000_000_000_000_000_000)),
            ("12E2", Some(1_200)),
            ("0.5", Some(1)),
            ("", None),
            ("abc", None),
            ("1Zi", None),
            ("9999999999999999999999E", None),
        ] {
            assert_eq!(whole(&Quantity(text.to_owned())), expected, "{text}");
        }
        assert_eq!(milli(&Quantity("250m".to_owned())), Some(250));
        assert_eq!(milli(&Quantity("0.1".to_owned())), Some(100));
        assert_eq!(milli(&Quantity("2".to_owned())), Some(2000));
        assert_eq!(milli(&Quantity("1u".to_owned())), Some(1), "rounds up, never to nothing");
    }
}
