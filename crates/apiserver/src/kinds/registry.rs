//! Which kinds there are: the built-in ones, and those that CustomResourceDefinitions add while the server runs.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::Arc;

use edgemesh_api::ResourceName;
use serde_json::Value;

use super::built_in::{BuiltIn, ColumnDef};
use super::{Behaviour, Column, KindInfo, ScalePaths, Subresources, custom_resource};

/// What can be done with objects of every kind here.
pub(crate) const VERBS: &[&str] = &["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"];

static BUILT_IN: &[&BuiltIn] = &[
    &super::config_map::CONFIG_MAP,
    &super::event::EVENT,
    &super::namespace::NAMESPACE,
    &super::node::NODE,
    &super::pod::POD,
    &super::secret::SECRET,
    &super::service_account::SERVICE_ACCOUNT,
    &super::service::SERVICE,
    &super::custom_resource_definition::CUSTOM_RESOURCE_DEFINITION,
    &super::deployment::DEPLOYMENT,
    &super::replica_set::REPLICA_SET,
    &super::lease::LEASE,
    &super::endpoint_slice::ENDPOINT_SLICE,
    &super::event::EVENTS_VIEW,
];

/// The kinds that are served. A value: [`Registry::with_crd`] gives a new one, and clones are cheap.
#[derive(Debug, Clone)]
pub struct Registry {
    built_in: Arc<[Arc<KindInfo>]>,
    /// By name of the definition: one entry for each served version.
    custom: Arc<BTreeMap<String, Vec<Arc<KindInfo>>>>,
}

impl Default for Registry {
    fn default() -> Self {
        Self::built_in()
    }
}

impl Registry {
    /// The built-in kinds only.
    pub fn built_in() -> Self {
        Self { built_in: BUILT_IN.iter().map(|k| Arc::new(info(k))).collect(), custom: Arc::default() }
    }

    /// The kind that is served as this resource.
    pub fn lookup(&self, group: &str, version: &str, plural: &str) -> Option<Arc<KindInfo>> {
        self.iter()
            .find(|k| k.resource.group == group && k.resource.version == version && k.resource.plural == plural)
            .cloned()
    }

    /// The kind of an object that says this `kind` in this group and version.
    pub fn lookup_kind(&self, group: &str, version: &str, kind: &str) -> Option<Arc<KindInfo>> {
        self.iter().find(|k| k.resource.group == group && k.resource.version == version && k.kind == kind).cloned()
    }

    /// All kinds: the built-in ones in the order of Kubernetes' discovery (core, then by group), then the custom ones.
    pub fn all(&self) -> Vec<Arc<KindInfo>> {
        self.iter().cloned().collect()
    }

    /// The groups with their versions, the preferred version first, in discovery order. The core group is empty.
    pub fn groups(&self) -> Vec<(String, Vec<String>)> {
        let mut groups: Vec<(String, Vec<String>)> = Vec::new();
        for kind in self.iter() {
            let name = &kind.resource;
            let at = groups.iter().position(|(group, _)| *group == name.group).unwrap_or_else(|| {
                groups.push((name.group.clone(), Vec::new()));
                groups.len() - 1
            });
            if let Some((_, versions)) = groups.get_mut(at)
                && !versions.contains(&name.version)
            {
                versions.push(name.version.clone());
            }
        }
        for (_, versions) in &mut groups {
            versions.sort_by_key(|v| version_rank(v));
        }
        groups
    }

    /// A registry that also serves the kinds of this CustomResourceDefinition, in place of what it defined before. A
    /// definition that is not valid (see [`super::validate_create`]) adds nothing.
    #[must_use]
    pub fn with_crd(&self, definition: &Value) -> Self {
        let name = definition["metadata"]["name"].as_str().unwrap_or_default().to_owned();
        let mut custom = (*self.custom).clone();
        custom.insert(name, custom_resource::kinds_of(definition).into_iter().map(Arc::new).collect());
        Self { built_in: self.built_in.clone(), custom: Arc::new(custom) }
    }

    /// A registry without the kinds of the CustomResourceDefinition of this name.
    #[must_use]
    pub fn without_crd(&self, name: &str) -> Self {
        let mut custom = (*self.custom).clone();
        custom.remove(name);
        Self { built_in: self.built_in.clone(), custom: Arc::new(custom) }
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Arc<KindInfo>> {
        self.built_in.iter().chain(self.custom.values().flatten())
    }
}

/// Kubernetes' order of versions: stable before beta before alpha, newer first, others by name at the end.
fn version_rank(version: &str) -> (u8, i64, i64, String) {
    let parse = || -> Option<(u8, i64, i64)> {
        let rest = version.strip_prefix('v')?;
        let digits = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
        let major: i64 = rest[..digits].parse().ok()?;
        let (level, minor) = match &rest[digits..] {
            "" => (0, "0"),
            tail if tail.starts_with("beta") => (1, &tail[4..]),
            tail if tail.starts_with("alpha") => (2, &tail[5..]),
            _ => return None,
        };
        Some((level, -major, -minor.parse::<i64>().ok()?))
    };
    match parse() {
        Some((level, major, minor)) => (level, major, minor, String::new()),
        None => (3, 0, 0, version.to_owned()),
    }
}

fn info(kind: &'static BuiltIn) -> KindInfo {
    let resource = ResourceName::new(kind.group, kind.version, kind.plural);
    // Events of both groups are the same objects.
    let storage = if kind.group == "events.k8s.io" { ResourceName::new("", "v1", "events") } else { resource.clone() };
    let borrowed = |names: &'static [&'static str]| names.iter().map(|n| Cow::Borrowed(*n)).collect();
    KindInfo {
        resource,
        storage,
        kind: Cow::Borrowed(kind.kind),
        list_kind: Cow::Owned(format!("{}List", kind.kind)),
        singular: Cow::Borrowed(kind.singular),
        short_names: borrowed(kind.short_names),
        categories: borrowed(kind.categories),
        namespaced: kind.namespaced,
        subresources: Subresources {
            status: kind.status,
            scale: kind.scale.then_some(ScalePaths {
                spec_replicas: Cow::Borrowed("spec.replicas"),
                status_replicas: Cow::Borrowed("status.replicas"),
                label_selector: Cow::Borrowed("spec.selector"),
            }),
        },
        verbs: VERBS,
        columns: kind.columns.iter().map(ColumnDef::to_column).collect(),
        behaviour: Behaviour::BuiltIn(kind),
    }
}

impl ColumnDef {
    fn to_column(&self) -> Column {
        Column {
            name: Cow::Borrowed(self.name),
            r#type: Cow::Borrowed(self.r#type),
            format: Cow::Borrowed(self.format),
            description: Cow::Borrowed(self.description),
            priority: self.priority,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_ordered_as_kubernetes_orders_them() {
        let mut versions = vec!["v1beta1", "foo", "v2alpha1", "v1", "v10", "v1beta2", "v2"];
        versions.sort_by_key(|v| version_rank(v));
        assert_eq!(versions, ["v10", "v2", "v1", "v1beta2", "v1beta1", "v2alpha1", "foo"]);
    }

    #[test]
    fn built_in_kinds_are_found_by_resource_and_by_kind() {
        let registry = Registry::built_in();
        let pods = registry.lookup("", "v1", "pods").unwrap();
        assert_eq!((pods.kind.as_ref(), pods.namespaced, pods.subresources.status), ("Pod", true, true));
        assert!(pods.categories.iter().any(|c| c == "all"));
        let deployments = registry.lookup_kind("apps", "v1", "Deployment").unwrap();
        assert_eq!(deployments.resource.plural, "deployments");
        assert!(deployments.subresources.scale.is_some());
        assert!(registry.lookup("apps", "v1", "pods").is_none());
        assert_eq!(registry.groups().first().map(|g| g.0.as_str()), Some(""));
    }
}
