//! Who asks, and how a request wants to be treated.

use edgemesh_api::names::{MASTERS_GROUP, NODE_USER_PREFIX, NODES_GROUP};

/// A user as Kubernetes knows one: a name and groups (Kubernetes, "Authenticating").
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// User name, for example `system:node:edge-a1`.
    pub name: String,
    /// Groups, for example `system:nodes`.
    pub groups: Vec<String>,
}

impl Identity {
    /// An identity from its name and groups.
    pub fn new(name: impl Into<String>, groups: impl IntoIterator<Item = impl Into<String>>) -> Self {
        Self { name: name.into(), groups: groups.into_iter().map(Into::into).collect() }
    }

    /// The identity of a node's own components.
    pub fn node(node: &str) -> Self {
        Self::new(format!("{NODE_USER_PREFIX}{node}"), [NODES_GROUP])
    }

    /// The node whose identity this is, if it is one.
    pub fn node_name(&self) -> Option<&str> {
        let node = self.name.strip_prefix(NODE_USER_PREFIX)?;
        (self.in_group(NODES_GROUP) && !node.is_empty()).then_some(node)
    }

    /// Whether the user is in the group.
    pub fn in_group(&self, group: &str) -> bool {
        self.groups.iter().any(|g| g == group)
    }
}

/// What to do with fields that the kind's schema doesn't know (Kubernetes, "Field validation").
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum FieldValidation {
    /// Keep quiet.
    Ignore,
    /// Accept, and say so in a `Warning` header.
    #[default]
    Warn,
    /// Refuse the request.
    Strict,
}

/// The caller of a store operation and how it wants it done.
#[derive(Debug, Clone)]
pub struct RequestContext {
    /// The authenticated user.
    pub user: Identity,
    /// Run everything, keep nothing (`dryRun=All`).
    pub dry_run: bool,
    /// What to do with unknown fields.
    pub field_validation: FieldValidation,
}

impl RequestContext {
    /// A request of this user.
    pub fn new(user: Identity) -> Self {
        Self { user, dry_run: false, field_validation: FieldValidation::default() }
    }

    /// For callers in the same process: controllers and the daemons themselves.
    pub fn system() -> Self {
        Self::new(Identity::new("system:edgemesh", [MASTERS_GROUP]))
    }
}
