//! Who may do what: authentication by client certificate or bearer token, and the rules for nodes.

mod authenticate;
mod authorize;

pub(crate) use authenticate::certificate_user;
pub use authenticate::{AuthError, Authenticator};
pub(crate) use authorize::admit_node_labels;
pub use authorize::{Attributes, Authorizer, Decision, Visible};
