//! EndpointSlices.

use std::collections::HashSet;
use std::net::{Ipv4Addr, Ipv6Addr};

use jiff::Timestamp;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use serde_json::{Value, json};

use super::built_in::{AGE, BuiltIn, NAME, column, no_prepare};
use super::field_error::Errors;
use super::{built_in, decode, merge_keys, names, tables};

pub(crate) static ENDPOINT_SLICE: BuiltIn = BuiltIn {
    group: "discovery.k8s.io",
    version: "v1",
    plural: "endpointslices",
    singular: "endpointslice",
    kind: "EndpointSlice",
    short_names: &[],
    categories: &[],
    namespaced: true,
    status: false,
    scale: false,
    generation: true,
    keeps_status_on_create: false,
    graceful: false,
    columns: &[
        NAME,
        column("AddressType", "string", "IPv4, IPv6 or FQDN."),
        column("Ports", "string", "Ports of the endpoints."),
        column("Endpoints", "string", "Addresses of the endpoints."),
        AGE,
    ],
    selectable: &[],
    merge_keys: merge_keys::PLAIN,
    typed: decode::typed::<EndpointSlice>,
    schema: built_in::schema::<EndpointSlice>(),
    default,
    validate,
    prepare_update: no_prepare,
    validate_update,
    cells,
};

fn default(object: &mut Value) {
    for port in object.get_mut("ports").and_then(Value::as_array_mut).into_iter().flatten() {
        if port["name"].is_null() {
            port["name"] = json!("");
        }
        if tables::text(&port["protocol"]).is_empty() {
            port["protocol"] = json!("TCP");
        }
    }
    if object["endpoints"].is_null() {
        object["endpoints"] = json!([]);
    }
}

fn validate(object: &Value, errors: &mut Errors) {
    let address_type = tables::text(&object["addressType"]);
    if address_type.is_empty() {
        errors.required("addressType", "");
    }
    errors.one_of("addressType", &object["addressType"], &["FQDN", "IPv4", "IPv6"]);
    let endpoints = object["endpoints"].as_array().map(Vec::as_slice).unwrap_or_default();
    if endpoints.len() > 1000 {
        errors.too_many("endpoints", endpoints.len(), 1000);
    }
    for (i, endpoint) in endpoints.iter().enumerate() {
        let addresses = endpoint["addresses"].as_array().map(Vec::as_slice).unwrap_or_default();
        if addresses.is_empty() {
            errors.required(format!("endpoints[{i}].addresses"), "must contain at least 1 address");
        }
        if addresses.len() > 100 {
            errors.too_many(format!("endpoints[{i}].addresses"), addresses.len(), 100);
        }
        for (j, address) in addresses.iter().enumerate() {
            let field = format!("endpoints[{i}].addresses[{j}]");
            let text = tables::text(address);
            match address_type {
                "IPv4" => match text.parse::<Ipv4Addr>() {
                    Ok(a) if a.is_unspecified() || a.is_loopback() || a.is_link_local() || a.is_multicast() => {
                        errors.invalid(
                            field,
                            text,
                            "may not be an unspecified, loopback, link-local or multicast address",
                        );
                    }
                    Ok(_) => {}
                    Err(_) => errors.invalid(field, text, "must be a valid IPv4 address"),
                },
                "IPv6" if text.parse::<Ipv6Addr>().is_err() => {
                    errors.invalid(field, text, "must be a valid IPv6 address");
                }
                "FQDN" => {
                    if let Some(problem) = names::dns_subdomain(text) {
                        errors.invalid(field, text, problem);
                    }
                }
                _ => {}
            }
        }
        if let Some(problem) = endpoint["hostname"].as_str().and_then(names::dns_label) {
            errors.invalid(format!("endpoints[{i}].hostname"), endpoint["hostname"].clone(), problem);
        }
        if let Some(problem) = endpoint["nodeName"].as_str().and_then(names::dns_subdomain) {
            errors.invalid(format!("endpoints[{i}].nodeName"), endpoint["nodeName"].clone(), problem);
        }
    }
    validate_ports(&object["ports"], errors);
}

fn validate_ports(ports: &Value, errors: &mut Errors) {
    let mut seen = HashSet::new();
    for (i, port) in ports.as_array().into_iter().flatten().enumerate() {
        let name = tables::text(&port["name"]);
        if seen.contains(&name) {
            errors.duplicate(format!("ports[{i}].name"), name);
        }
        seen.insert(name);
        if !name.is_empty()
            && let Some(problem) = names::dns_label(name)
        {
            errors.invalid(format!("ports[{i}].name"), name, problem);
        }
        if let Some(number) = port["port"].as_i64()
            && let Some(problem) = names::port_number(number)
        {
            errors.invalid(format!("ports[{i}].port"), number, problem);
        }
        errors.one_of(format!("ports[{i}].protocol"), &port["protocol"], &["SCTP", "TCP", "UDP"]);
    }
    if tables::count(ports) > 20_000 {
        errors.too_many("ports", tables::count(ports), 20_000);
    }
}

fn validate_update(old: &Value, new: &Value, errors: &mut Errors) {
    errors.immutable("addressType", &old["addressType"], &new["addressType"]);
}

fn cells(object: &Value, now: Timestamp) -> Vec<Value> {
    let ports = object["ports"].as_array().into_iter().flatten().map(|p| match p["port"].as_i64() {
        Some(port) => port.to_string(),
        None => tables::text(&p["name"]).to_owned(),
    });
    let addresses = object["endpoints"]
        .as_array()
        .into_iter()
        .flatten()
        .flat_map(|e| e["addresses"].as_array().into_iter().flatten())
        .map(|a| tables::text(a).to_owned());
    vec![
        tables::name(object),
        json!(tables::text(&object["addressType"])),
        json!(first_three(ports.collect(), "<unset>")),
        json!(first_three(addresses.collect(), "<unset>")),
        tables::age(object, now),
    ]
}

fn first_three(items: Vec<String>, nothing: &str) -> String {
    match items.len() {
        0 => nothing.to_owned(),
        1..=3 => items.join(","),
        n => format!("{} + {} more...", items[..3].join(","), n - 3),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kinds::{Registry, default_object, table_row, validate_create, validate_update};

    #[test]
    fn slices_are_defaulted_checked_and_shown() {
        let info = Registry::built_in().lookup("discovery.k8s.io", "v1", "endpointslices").unwrap();
        let mut slice = json!({"metadata": {"name": "a", "namespace": "n"}, "addressType": "IPv4", "ports": [{"port": 80}],
            "endpoints": [{"addresses": ["10.0.0.1"]}, {"addresses": ["10.0.0.2"]}, {"addresses": ["10.0.0.3"]},
                {"addresses": ["10.0.0.4"]}]});
        default_object(&info, &mut slice);
        assert_eq!(slice["ports"], json!([{"port": 80, "name": "", "protocol": "TCP"}]));
        assert_eq!(validate_create(&info, &slice), []);
        let row = table_row(&info, &slice, Timestamp::now());
        assert_eq!(row[1..4], [json!("IPv4"), json!("80"), json!("10.0.0.1,10.0.0.2,10.0.0.3 + 1 more...")]);

        let bad = json!({"metadata": {"name": "a", "namespace": "n"}, "addressType": "IPv4",
            "ports": [{"port": 0, "protocol": "X"}], "endpoints": [{"addresses": ["::1"]}, {"addresses": []}, {"addresses": ["127.0.0.1"]}]});
        let fields: Vec<_> = validate_create(&info, &bad).into_iter().map(|e| e.field).collect();
        assert_eq!(
            fields,
            [
                "endpoints[0].addresses[0]",
                "endpoints[1].addresses",
                "endpoints[2].addresses[0]",
                "ports[0].port",
                "ports[0].protocol"
            ]
        );
        let mut other = slice.clone();
        other["addressType"] = json!("IPv6");
        assert!(validate_update(&info, &slice, &other).iter().any(|e| e.field == "addressType"));
    }
}
