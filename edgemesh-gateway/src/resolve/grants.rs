//! References across namespaces: only where a ReferenceGrant of the target's namespace allows them.

use crate::objects::Objects;

/// One end of a reference.
#[derive(Debug, Clone, Copy)]
pub(super) struct End<'a> {
    pub(super) group: &'a str,
    pub(super) kind: &'a str,
    pub(super) namespace: &'a str,
}

/// Whether an object may refer to another.
pub(super) fn allows(objects: &Objects, from: End<'_>, to: End<'_>, name: &str) -> bool {
    if from.namespace == to.namespace {
        return true;
    }
    let in_namespace = objects.grants.iter().filter(|((namespace, _), _)| namespace == to.namespace);
    in_namespace.map(|(_, grant)| &grant.spec).any(|grant| {
        grant.from.iter().any(|f| f.group == from.group && f.kind == from.kind && f.namespace == from.namespace)
            && grant
                .to
                .iter()
                .any(|t| t.group == to.group && t.kind == to.kind && t.name.as_deref().is_none_or(|only| only == name))
    })
}
