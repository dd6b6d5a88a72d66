//! Names of functions for the linker's list (`crates/function-order`), without what differs from build to build.

use std::collections::{HashMap, HashSet};

/// Length of the hash at the end of a name in the older scheme, in hexadecimal digits.
const HASH: usize = 16;

/// Patterns for what was begun, in the same order. Of all functions with one name but for hashes, which are the same generic one
/// for different types, at least half must have been begun for the pattern to take them all; else it takes the
/// one, by its hash, which the compiler's version and libraries' versions decide about.
pub(crate) fn patterns(begun: &[String], others: &[String]) -> Vec<String> {
    let count = |names: &[String]| {
        let mut counts = HashMap::<String, usize>::new();
        for name in names {
            *counts.entry(without_hashes(name)).or_default() += 1;
        }
        counts
    };
    let (counts, of_others) = (count(begun), count(others));
    let mut given = HashSet::new();
    let pattern = |name: &String| {
        let common = without_hashes(name);
        if of_others.get(&common).copied().unwrap_or(0) <= counts[&common] {
            common
        } else {
            without_suffix(name).to_owned()
        }
    };
    begun.iter().map(pattern).filter(|pattern| given.insert(pattern.clone())).collect()
}

/// Optimisation across parts of the program adds a number to names that were private to one.
fn without_suffix(name: &str) -> &str {
    name.split_once(".llvm.").map_or(name, |(name, _)| name)
}

/// A `*` for each hash, as in the linker's patterns.
fn without_hashes(name: &str) -> String {
    let name = without_suffix(name);
    let legacy = name.strip_suffix('E').and_then(|name| name.split_at_checked(name.len().checked_sub(HASH)?));
    if let Some((path, hash)) = legacy
        && path.ends_with("17h")
        && hash.bytes().all(|byte| byte.is_ascii_hexdigit())
    {
        return format!("{path}*E");
    }
    // The newer scheme names each crate `Cs`, its hash in letters and digits, `_`, and the length and text of its name.
    let mut parts = name.split("Cs");
    let mut common = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let named = part.split_once('_').filter(|(hash, name)| {
            hash.bytes().all(|byte| byte.is_ascii_alphanumeric())
                && name.starts_with(|first: char| first.is_ascii_digit())
        });
        common.push_str("Cs");
        match named {
            Some((_, name)) => common.extend(["*_", name]),
            None => common.push_str(part),
        }
    }
    common
}

#[cfg(test)]
mod tests {
    use super::*;

    const STD: &str = "_RNvMs5_NtNtCsjrHSEGnQ3l9_3std2io5errorNtB5_5Error4kind";
    const NEXT: &str = "_ZN4iter4next17h27814a561d6845f6E";

    fn names<const N: usize>(names: [&str; N]) -> Vec<String> {
        names.map(str::to_owned).to_vec()
    }

    #[test]
    fn names_lose_what_differs_from_build_to_build() {
        let std = "_RNvMs5_NtNtCs*_3std2io5errorNtB5_5Error4kind";
        let begun = names([STD, "_ZN5tokio4wake17h27814a561d6845f6E.llvm.12559299848907232443", "_ZN5clock3nowE"]);
        assert_eq!(patterns(&begun, &[]), [std, "_ZN5tokio4wake17h*E", "_ZN5clock3nowE"]);
        assert_eq!(without_hashes("_RNvCs_Csa_1aCs"), "_RNvCs_Cs*_1aCs");
    }

    #[test]
    fn a_generic_function_is_named_whole_where_half_of_it_is_run() {
        let other = names(["_ZN4iter4next17h0000000000000001E"]);
        assert_eq!(patterns(&names([NEXT]), &other), ["_ZN4iter4next17h*E"]);
        let others = [other, names(["_ZN4iter4next17h0000000000000002E.llvm.1"])].concat();
        assert_eq!(patterns(&names([NEXT]), &others), [NEXT]);
        let two = names([NEXT, "_ZN4iter4next17h0000000000000003E"]);
        assert_eq!(patterns(&two, &others), ["_ZN4iter4next17h*E"]);
    }
}
