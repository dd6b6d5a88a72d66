//! Volumes of a pod.

use std::collections::HashSet;

use serde_json::Value;

use super::list;
use crate::kinds::field_error::Errors;
use crate::kinds::tables::text;
use crate::kinds::{names, quantity};

/// Checks the volumes and gives their names.
pub(super) fn validate<'a>(volumes: &'a Value, at: &str, errors: &mut Errors) -> HashSet<&'a str> {
    let mut seen = HashSet::new();
    for (i, volume) in list(volumes).iter().enumerate() {
        let field = format!("{at}[{i}]");
        let name = text(&volume["name"]);
        if name.is_empty() {
            errors.required(format!("{field}.name"), "");
        } else if let Some(problem) = names::dns_label(name) {
            errors.invalid(format!("{field}.name"), name, problem);
        } else if seen.contains(&name) {
            errors.duplicate(format!("{field}.name"), name);
        }
        let mut sources = volume.as_object().into_iter().flatten().filter(|(key, _)| *key != "name");
        match sources.next() {
            None => errors.required(&field, "must specify a volume type"),
            Some((kind, source)) => {
                validate_source(kind, source, &format!("{field}.{kind}"), errors);
                for (other, _) in sources {
                    errors.forbidden(format!("{field}.{other}"), "may not specify more than 1 volume type");
                }
            }
        }
        seen.insert(name);
    }
    seen
}

fn validate_source(kind: &str, source: &Value, at: &str, errors: &mut Errors) {
    match kind {
        "hostPath" => {
            let path = text(&source["path"]);
            if path.is_empty() {
                errors.required(format!("{at}.path"), "");
            } else if path.split('/').any(|part| part == "..") {
                errors.invalid(format!("{at}.path"), path, "must not contain '..'");
            }
            errors.one_of(
                format!("{at}.type"),
                &source["type"],
                &["BlockDevice", "CharDevice", "Directory", "DirectoryOrCreate", "File", "FileOrCreate", "Socket"],
            );
        }
        "emptyDir" if !source["sizeLimit"].is_null() => {
            quantity::validate(&source["sizeLimit"], &format!("{at}.sizeLimit"), errors);
        }
        "configMap" => {
            wanted(source, "name", at, errors);
            modes_and_items(source, at, errors);
        }
        "secret" => {
            wanted(source, "secretName", at, errors);
            modes_and_items(source, at, errors);
        }
        "persistentVolumeClaim" => wanted(source, "claimName", at, errors),
        "downwardAPI" => {
            mode(&source["defaultMode"], &format!("{at}.defaultMode"), errors);
            for (i, item) in list(&source["items"]).iter().enumerate() {
                let field = format!("{at}.items[{i}]");
                relative_path(&item["path"], &format!("{field}.path"), errors);
                if item["fieldRef"].is_null() && item["resourceFieldRef"].is_null() {
                    errors.required(&field, "one of fieldRef and resourceFieldRef is required");
                }
                mode(&item["mode"], &format!("{field}.mode"), errors);
            }
        }
        "projected" => {
            mode(&source["defaultMode"], &format!("{at}.defaultMode"), errors);
            for (i, part) in list(&source["sources"]).iter().enumerate() {
                let field = format!("{at}.sources[{i}]");
                let kinds = part.as_object().map_or(0, |m| m.len());
                if kinds == 0 {
                    errors.required(&field, "must specify at least one source");
                } else if kinds > 1 {
                    errors.forbidden(&field, "may not specify more than 1 volume type per source");
                }
                for kind in ["secret", "configMap"] {
                    if part[kind].is_object() {
                        wanted(&part[kind], "name", &format!("{field}.{kind}"), errors);
                        modes_and_items(&part[kind], &format!("{field}.{kind}"), errors);
                    }
                }
            }
        }
        _ => {}
    }
}

fn wanted(source: &Value, name: &str, at: &str, errors: &mut Errors) {
    if text(&source[name]).is_empty() {
        errors.required(format!("{at}.{name}"), "");
    }
}

fn mode(value: &Value, field: &str, errors: &mut Errors) {
    if let Some(mode) = value.as_i64()
        && !(0..=0o777).contains(&mode)
    {
        errors.invalid(field, mode, "must be a number between 0 and 0777 (octal), both inclusive");
    }
}

fn modes_and_items(source: &Value, at: &str, errors: &mut Errors) {
    mode(&source["defaultMode"], &format!("{at}.defaultMode"), errors);
    for (i, item) in list(&source["items"]).iter().enumerate() {
        let field = format!("{at}.items[{i}]");
        wanted(item, "key", &field, errors);
        relative_path(&item["path"], &format!("{field}.path"), errors);
        mode(&item["mode"], &format!("{field}.mode"), errors);
    }
}

/// A path inside a volume.
fn relative_path(path: &Value, field: &str, errors: &mut Errors) {
    let path = text(path);
    if path.is_empty() {
        errors.required(field, "");
    } else if path.starts_with('/') {
        errors.invalid(field, path, "must be a relative path");
    } else if path.split('/').any(|part| part == "..") {
        errors.invalid(field, path, "must not contain '..'");
    } else if path.starts_with("..") {
        errors.invalid(field, path, "must not start with '..'");
    }
}
