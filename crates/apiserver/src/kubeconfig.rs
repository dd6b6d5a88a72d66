//! Kubeconfig files with everything embedded, for kubectl and every Kubernetes client.

use std::path::Path;

use base64::{Engine, prelude::BASE64_STANDARD};
use serde_json::{Value, json};

use crate::pki::{Issued, PkiError, write_file};

/// How the user of a kubeconfig proves who it is.
#[derive(Debug, Clone)]
pub enum Credentials {
    /// A client certificate.
    Certificate(Issued),
    /// A bearer token.
    Token(String),
    /// None: a server on loopback that asks for nothing.
    None,
}

/// What a kubeconfig says.
#[derive(Debug, Clone)]
pub struct Kubeconfig {
    /// For example `https://203.0.113.10:6443`.
    pub server: String,
    /// The authority that signed the server's certificate, PEM; `None` for plain HTTP.
    pub authority: Option<String>,
    /// Who.
    pub credentials: Credentials,
}

impl Kubeconfig {
    /// The file's content: YAML (as its subset JSON, which every reader of kubeconfigs takes).
    pub fn to_yaml(&self) -> String {
        let mut cluster = json!({"server": self.server});
        if let Some(authority) = &self.authority {
            cluster["certificate-authority-data"] = json!(BASE64_STANDARD.encode(authority));
        }
        let user = match &self.credentials {
            Credentials::Certificate(issued) => json!({
                "client-certificate-data": BASE64_STANDARD.encode(&issued.certificate),
                "client-key-data": BASE64_STANDARD.encode(&issued.key),
            }),
            Credentials::Token(token) => json!({"token": token}),
            Credentials::None => Value::Object(serde_json::Map::new()),
        };
        let config = json!({
            "apiVersion": "v1", "kind": "Config", "preferences": {},
            "clusters": [{"name": "edgemesh", "cluster": cluster}],
            "users": [{"name": "edgemesh", "user": user}],
            "contexts": [{"name": "edgemesh", "context": {"cluster": "edgemesh", "user": "edgemesh"}}],
            "current-context": "edgemesh",
        });
        format!("{config:#}\n")
    }

    /// Writes the file, readable by its owner only.
    ///
    /// # Errors
    /// When the disk fails.
    pub fn write(&self, path: &Path) -> Result<(), PkiError> {
        write_file(path, self.to_yaml().as_bytes(), 0o600)
    }
}
