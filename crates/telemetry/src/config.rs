//! Typed configuration: a YAML file, then environment variables, then `--set` flags; every error is reported at once.
//!
//! A daemon's settings are one `serde` struct with `#[serde(default, deny_unknown_fields, rename_all = "camelCase")]`.
//! The sources are merged as YAML values before the struct is read, so all of them obey the same names and types.

use std::{fmt, path::Path};

use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Map, Value};

/// The largest configuration file that is read, in bytes.
pub const MAX_CONFIG_BYTES: u64 = 1 << 20;

/// The exit code for a configuration that can't be used (`EX_USAGE` of sysexits.h).
pub const EXIT_USAGE: u8 = 64;

/// What is wrong with a configuration: each problem names the setting and the fix.
#[derive(Debug, Default)]
pub struct Problems(Vec<String>);

impl Problems {
    /// Notes a problem with one setting, for example `("dataDir", "must be an absolute path")`.
    pub fn add(&mut self, setting: &str, problem: impl fmt::Display) {
        self.0.push(format!("{setting}: {problem}"));
    }

    /// The problems found so far.
    pub fn list(&self) -> &[String] {
        &self.0
    }
}

/// Checks that go beyond the type of a setting.
pub trait Validate {
    /// Adds every problem to `problems`; none means that the configuration can be used.
    fn validate(&self, problems: &mut Problems);
}

/// A configuration that can't be used, with every reason found.
#[derive(Debug, thiserror::Error)]
#[error("the configuration can't be used:\n  {}", .0.join("\n  "))]
pub struct ConfigError(pub Vec<String>);

/// Reads the configuration from `file` (if given), then `{env_prefix}_{SETTING}` variables (`__` between levels,
/// SCREAMING_SNAKE_CASE), then `overrides` (`some.setting=value`, value in YAML). A later source wins.
///
/// # Errors
/// Every unreadable source, unknown setting, wrong type and failed check, all in one error.
pub fn load<T>(file: Option<&Path>, env_prefix: &str, overrides: &[String]) -> Result<T, ConfigError>
where
    T: DeserializeOwned + Serialize + Validate,
{
    let environment = std::env::vars_os().filter_map(|(k, v)| Some((k.into_string().ok()?, v.into_string().ok()?)));
    load_from(file, env_prefix, environment, overrides)
}

/// [`load`] with the environment given by the caller.
///
/// # Errors
/// As [`load`].
pub fn load_from<T>(
    file: Option<&Path>,
    env_prefix: &str,
    environment: impl Iterator<Item = (String, String)>,
    overrides: &[String],
) -> Result<T, ConfigError>
where
    T: DeserializeOwned + Serialize + Validate,
{
    let mut errors = Vec::new();
    let mut merged = Value::Object(Map::new());
    if let Some(path) = file {
        match read_file(path) {
            Ok(value) => merged = value,
            Err(error) => errors.push(error),
        }
    }
    let prefix = format!("{env_prefix}_");
    let mut variables: Vec<_> = environment.filter(|(name, _)| name.starts_with(&prefix)).collect();
    variables.sort();
    for (name, value) in variables {
        let path: Vec<String> = name[prefix.len()..].split("__").map(camel_case).collect();
        set_path(&mut merged, &path, yaml_scalar(&value));
    }
    for item in overrides {
        match item.split_once('=') {
            Some((path, value)) if !path.is_empty() => {
                let path: Vec<String> = path.split('.').map(str::to_owned).collect();
                set_path(&mut merged, &path, yaml_scalar(value));
            }
            _ => errors.push(format!("--set {item}: expected setting=value")),
        }
    }
    match serde_json::from_value::<T>(merged) {
        Ok(config) => {
            let mut problems = Problems::default();
            config.validate(&mut problems);
            errors.extend(problems.0);
            if errors.is_empty() {
                return Ok(config);
            }
        }
        Err(error) => errors.push(error.to_string()),
    }
    Err(ConfigError(errors))
}

/// The configuration in force as YAML, for `--print-config`.
///
/// # Errors
/// When a value has no YAML form.
pub fn to_yaml<T: Serialize>(config: &T) -> Result<String, ConfigError> {
    serde_saphyr::to_string(config).map_err(|error| ConfigError(vec![error.to_string()]))
}

fn read_file(path: &Path) -> Result<Value, String> {
    let name = path.display();
    let size = std::fs::metadata(path).map_err(|error| format!("{name}: {error}"))?.len();
    if size > MAX_CONFIG_BYTES {
        return Err(format!("{name}: {size} bytes, the limit is {MAX_CONFIG_BYTES}"));
    }
    let text = std::fs::read_to_string(path).map_err(|error| format!("{name}: {error}"))?;
    if text.trim().is_empty() {
        return Ok(Value::Object(Map::new()));
    }
    match serde_saphyr::from_str::<Value>(&text) {
        Ok(value @ Value::Object(_)) => Ok(value),
        Ok(_) => Err(format!("{name}: expected a map of settings")),
        Err(error) => Err(format!("{name}: {error}")),
    }
}

/// A flag's or variable's text as the YAML value that it spells, or as plain text where it spells none.
fn yaml_scalar(text: &str) -> Value {
    serde_saphyr::from_str::<Value>(text).unwrap_or_else(|_| Value::String(text.to_owned()))
}

fn camel_case(name: &str) -> String {
    let mut out = String::with_capacity(name.len());
    let mut upper = false;
    for c in name.chars() {
        match c {
            '_' => upper = true,
            c if upper => {
                out.push(c.to_ascii_uppercase());
                upper = false;
            }
            c => out.push(c.to_ascii_lowercase()),
        }
    }
    out
}

fn set_path(root: &mut Value, path: &[String], value: Value) {
    let Some((last, parents)) = path.split_last() else { return };
    let mut at = root;
    for key in parents {
        if !at.is_object() {
            *at = Value::Object(Map::new());
        }
        let Value::Object(map) = at else { return };
        at = map.entry(key.clone()).or_insert_with(|| Value::Object(Map::new()));
    }
    if !at.is_object() {
        *at = Value::Object(Map::new());
    }
    if let Value::Object(map) = at {
        map.insert(last.clone(), value);
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Debug, Default, Serialize, Deserialize)]
    #[serde(default, deny_unknown_fields, rename_all = "camelCase")]
    struct Sample {
        data_dir: String,
        limits: Limits,
    }

    #[derive(Debug, Default, Serialize, Deserialize)]
    #[serde(default, deny_unknown_fields, rename_all = "camelCase")]
    struct Limits {
        max_streams: u32,
    }

    impl Validate for Sample {
        fn validate(&self, problems: &mut Problems) {
            if self.data_dir.is_empty() {
                problems.add("dataDir", "must be set");
            }
            if self.limits.max_streams == 0 {
                problems.add("limits.maxStreams", "must be at least 1");
            }
        }
    }

    fn env(pairs: &[(&str, &str)]) -> impl Iterator<Item = (String, String)> {
        pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect::<Vec<_>>().into_iter()
    }

    #[test]
    fn flags_win_over_environment_and_environment_over_file() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("c.yaml");
        std::fs::write(&file, "dataDir: /file\nlimits: {maxStreams: 1}\n").unwrap();
        let variables = [("T_DATA_DIR", "/env"), ("T_LIMITS__MAX_STREAMS", "2")];
        let config: Sample = load_from(Some(&file), "T", env(&variables), &["limits.maxStreams=3".to_owned()]).unwrap();
        assert_eq!(config.data_dir, "/env");
        assert_eq!(config.limits.max_streams, 3);
    }

    #[test]
    fn every_failed_check_is_reported_at_once() {
        let error = load_from::<Sample>(None, "T", env(&[]), &["nonsense".to_owned()]).unwrap_err();
        assert_eq!(error.0.len(), 3, "{error}");
    }

    #[test]
    fn an_unknown_setting_is_refused_by_name() {
        let error = load_from::<Sample>(None, "T", env(&[]), &["limits.maxStream=1".to_owned()]).unwrap_err();
        assert!(error.to_string().contains("maxStream"), "{error}");
    }
}
