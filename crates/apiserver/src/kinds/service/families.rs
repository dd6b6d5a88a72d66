//! Address families of a Service (Kubernetes, "IPv4/IPv6 dual-stack"): which ones it gets, and what can't be had.

use std::net::IpAddr;

use serde_json::{Value, json};

use super::{has_cluster_ip, is_headless, list};
use crate::kinds::field_error::Errors;
use crate::kinds::tables::text;

const POLICY: &str = "spec.ipFamilyPolicy";

/// The family of an address, as Services name it.
pub(crate) fn of(address: IpAddr) -> &'static str {
    if address.is_ipv4() { "IPv4" } else { "IPv6" }
}

/// Fills `ipFamilyPolicy` and `ipFamilies` of a Service with cluster addresses, from what it says, what it was before and what the
/// cluster has: `configured`, its own family first. Addresses that a single-stack Service no longer has go.
pub(crate) fn settle(configured: &[&'static str], old: Option<&Value>, spec: &mut Value, errors: &mut Errors) {
    let old = old.filter(|old| has_cluster_ip(old));
    let unchanged = |field: &str| old.is_some_and(|old| old[field] == spec[field]);
    // A cluster that became dual-stack changes no Service that merely prefers it until somebody asks.
    if spec["ipFamilyPolicy"] == json!("PreferDualStack")
        && ["ipFamilyPolicy", "ipFamilies", "clusterIPs"].into_iter().all(unchanged)
    {
        return;
    }
    let (same_addresses, same_families) = (unchanged("clusterIPs"), unchanged("ipFamilies"));
    // Whoever writes such a Service also writes its endpoints, of whatever family.
    let by_hand = is_headless(spec) && spec["selector"].as_object().is_none_or(|selector| selector.is_empty());
    if text(&spec["ipFamilyPolicy"]).is_empty() {
        spec["ipFamilyPolicy"] = match old.map(|old| text(&old["ipFamilyPolicy"])) {
            Some(before) if !before.is_empty() => json!(before),
            _ if by_hand => json!("RequireDualStack"),
            _ => json!("SingleStack"),
        };
    }
    let single = spec["ipFamilyPolicy"] == json!("SingleStack");
    let texts = |list: &[Value]| -> Vec<String> { list.iter().map(|item| text(item).to_owned()).collect() };
    let mut addresses = texts(list(&spec["clusterIPs"]));
    if addresses.is_empty() && !text(&spec["clusterIP"]).is_empty() {
        addresses.push(text(&spec["clusterIP"]).to_owned());
    }
    let mut families = texts(list(&spec["ipFamilies"]));
    contradictions(&addresses, &families, errors);
    if let Some(old) = old {
        let reduced = |field: &str, now: usize| now == 1 && list(&old[field]).len() == 2;
        if single {
            // What was not written anew goes with the policy; the first address is the Service's for good.
            if same_addresses {
                addresses.truncate(1);
            }
            if same_families {
                families.truncate(1);
            }
        } else if reduced("clusterIPs", addresses.len()) {
            errors.invalid(
                POLICY,
                text(&spec["ipFamilyPolicy"]),
                "must be 'SingleStack' to release the secondary cluster IP",
            );
        } else if reduced("ipFamilies", families.len()) {
            errors.invalid(
                POLICY,
                text(&spec["ipFamilyPolicy"]),
                "must be 'SingleStack' to release the secondary IP family",
            );
        }
    }
    for (count, what) in [(addresses.len(), "cluster IPs"), (families.len(), "IP families")] {
        if single && count > 1 {
            let problem = format!("must be 'RequireDualStack' or 'PreferDualStack' when multiple {what} are specified");
            errors.invalid(POLICY, "SingleStack", problem);
        }
    }
    for address in addresses.iter().skip(families.len()).filter_map(|text| text.parse().ok()) {
        families.push(of(address).to_owned());
    }
    if families.is_empty() {
        families.extend(configured.first().map(|family| (*family).to_owned()));
    }
    if !by_hand {
        if spec["ipFamilyPolicy"] == json!("RequireDualStack") && configured.len() < 2 {
            errors.invalid(POLICY, "RequireDualStack", "this cluster is not configured for dual-stack services");
        }
        for (i, family) in families.iter().enumerate() {
            if matches!(family.as_str(), "IPv4" | "IPv6") && !configured.contains(&family.as_str()) {
                errors.invalid(format!("spec.ipFamilies[{i}]"), family.as_str(), "not configured on this cluster");
            }
        }
    }
    if !single && families.len() == 1 && (by_hand || configured.len() == 2) {
        families.push(if families[0] == "IPv4" { "IPv6" } else { "IPv4" }.to_owned());
    }
    spec["ipFamilies"] = json!(families);
    if !addresses.is_empty() {
        spec["clusterIPs"] = json!(addresses);
    }
}

/// What no cluster could give.
fn contradictions(addresses: &[String], families: &[String], errors: &mut Errors) {
    if families.len() > 2 {
        errors.invalid("spec.ipFamilies", json!(families), "may only hold up to 2 values");
    }
    if families.len() == 2 && families[0] == families[1] {
        errors.duplicate("spec.ipFamilies[1]", families[1].as_str());
    }
    let mut found = addresses.iter().map(|text| text.parse().ok().map(of));
    if let (Some(Some(first)), Some(Some(second))) = (found.next(), found.next())
        && first == second
    {
        errors.invalid("spec.clusterIPs", json!(addresses), "may specify no more than one IP for each IP family");
    }
    for (i, (address, family)) in addresses.iter().zip(families).enumerate() {
        if address.parse().is_ok_and(|address| of(address) != family) {
            errors.invalid(
                format!("spec.clusterIPs[{i}]"),
                address.as_str(),
                format!("expected an {family} value as indicated by `ipFamilies[{i}]`"),
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DUAL: &[&str] = &["IPv4", "IPv6"];

    /// What becomes of a Service's families, or what is wrong with it.
    fn settled(configured: &[&'static str], old: Option<&Value>, spec: Value) -> Result<Value, Vec<String>> {
        let (mut spec, mut errors) = (spec, Errors::default());
        settle(configured, old, &mut spec, &mut errors);
        let problems: Vec<_> = errors.0.iter().map(ToString::to_string).collect();
        if problems.is_empty() { Ok(json!([spec["ipFamilyPolicy"], spec["ipFamilies"]])) } else { Err(problems) }
    }

    #[test]
    fn a_service_gets_the_families_that_it_asks_for_as_far_as_the_cluster_has_them() {
        let (four, six) = (json!(["IPv4"]), json!(["IPv6"]));
        for (configured, spec, expected) in [
            (DUAL, json!({}), json!(["SingleStack", four])),
            (DUAL, json!({"ipFamilies": ["IPv6"]}), json!(["SingleStack", six])),
            (DUAL, json!({"clusterIP": "fd00::9", "clusterIPs": ["fd00::9"]}), json!(["SingleStack", six])),
            (DUAL, json!({"ipFamilyPolicy": "PreferDualStack"}), json!(["PreferDualStack", DUAL])),
            (
                DUAL,
                json!({"ipFamilyPolicy": "RequireDualStack", "ipFamilies": ["IPv6"]}),
                json!(["RequireDualStack", ["IPv6", "IPv4"]]),
            ),
            (&DUAL[..1], json!({"ipFamilyPolicy": "PreferDualStack"}), json!(["PreferDualStack", four])),
            (&DUAL[1..], json!({}), json!(["SingleStack", six])),
            // Headless: with pods as the others, without as its endpoints may be.
            (&DUAL[..1], json!({"clusterIP": "None", "selector": {"a": "b"}}), json!(["SingleStack", four])),
            (&DUAL[..1], json!({"clusterIP": "None"}), json!(["RequireDualStack", DUAL])),
            (&DUAL[..1], json!({"clusterIP": "None", "ipFamilyPolicy": "SingleStack"}), json!(["SingleStack", four])),
        ] {
            assert_eq!(settled(configured, None, spec.clone()), Ok(expected), "{configured:?} {spec}");
        }
    }

    #[test]
    fn what_cannot_be_had_is_named() {
        for (configured, spec, expected) in [
            (
                &DUAL[..1],
                json!({"ipFamilyPolicy": "RequireDualStack"}),
                "spec.ipFamilyPolicy: Invalid value: \"RequireDualStack\": this cluster is not configured for dual-stack services",
            ),
            (
                &DUAL[..1],
                json!({"ipFamilies": ["IPv6"]}),
                "spec.ipFamilies[0]: Invalid value: \"IPv6\": not configured on this cluster",
            ),
            (
                DUAL,
                json!({"ipFamilies": ["IPv4", "IPv6"]}),
                "spec.ipFamilyPolicy: Invalid value: \"SingleStack\": must be 'RequireDualStack' or 'PreferDualStack' when multiple IP families are specified",
            ),
            (
                DUAL,
                json!({"ipFamilyPolicy": "PreferDualStack", "ipFamilies": ["IPv4", "IPv4"]}),
                "spec.ipFamilies[1]: Duplicate value: \"IPv4\"",
            ),
            (
                DUAL,
                json!({"ipFamilyPolicy": "PreferDualStack", "clusterIPs": ["10.0.0.1", "10.0.0.2"]}),
                "spec.clusterIPs: Invalid value: [\"10.0.0.1\",\"10.0.0.2\"]: may specify no more than one IP for each IP family",
            ),
            (
                DUAL,
                json!({"ipFamilies": ["IPv6"], "clusterIPs": ["10.0.0.1"]}),
                "spec.clusterIPs[0]: Invalid value: \"10.0.0.1\": expected an IPv6 value as indicated by `ipFamilies[0]`",
            ),
        ] {
            let found = settled(configured, None, spec.clone()).unwrap_err();
            assert_eq!(found[0], expected, "{spec}");
        }
    }

    #[test]
    fn a_service_becomes_dual_stack_and_single_stack_again() {
        let one = json!({"ipFamilyPolicy": "SingleStack", "ipFamilies": ["IPv4"], "clusterIP": "10.0.0.1", "clusterIPs": ["10.0.0.1"]});
        let mut up = one.clone();
        up["ipFamilyPolicy"] = json!("RequireDualStack");
        assert_eq!(settled(DUAL, Some(&one), up.clone()), Ok(json!(["RequireDualStack", DUAL])));

        let both = json!({"ipFamilyPolicy": "RequireDualStack", "ipFamilies": DUAL, "clusterIP": "10.0.0.1", "clusterIPs": ["10.0.0.1", "fd00::1"]});
        let mut down = both.clone();
        down["ipFamilyPolicy"] = json!("SingleStack");
        let mut errors = Errors::default();
        settle(DUAL, Some(&both), &mut down, &mut errors);
        assert_eq!((&down["ipFamilies"], &down["clusterIPs"]), (&json!(["IPv4"]), &json!(["10.0.0.1"])));

        let mut reduced = both.clone();
        reduced["clusterIPs"] = json!(["10.0.0.1"]);
        let found = settled(DUAL, Some(&both), reduced).unwrap_err();
        assert!(found[0].contains("must be 'SingleStack' to release the secondary cluster IP"), "{found:?}");
    }

    #[test]
    fn a_cluster_that_becomes_dual_stack_leaves_services_that_prefer_it_until_they_change() {
        let prefers = json!({"ipFamilyPolicy": "PreferDualStack", "ipFamilies": ["IPv4"], "clusterIPs": ["10.0.0.1"]});
        assert_eq!(settled(DUAL, Some(&prefers), prefers.clone()), Ok(json!(["PreferDualStack", ["IPv4"]])));
        let mut asks = prefers.clone();
        asks["ipFamilyPolicy"] = json!("RequireDualStack");
        assert_eq!(settled(DUAL, Some(&prefers), asks), Ok(json!(["RequireDualStack", DUAL])));
    }
}
