//! From a client certificate or a bearer token to a user.

use std::{collections::HashMap, path::Path};

use rustls_pki_types::CertificateDer;
use sha2::{Digest, Sha256};

use crate::context::Identity;

/// The largest token file, in bytes.
const MAX_TOKEN_FILE: u64 = 1 << 20;
/// The longest bearer token that is looked at, in bytes.
const MAX_TOKEN: usize = 4 << 10;
/// The group of every user who proved who it is.
const AUTHENTICATED_GROUP: &str = "system:authenticated";

/// Why tokens can't be loaded.
#[derive(Debug, thiserror::Error)]
pub enum AuthError {
    /// The file can't be read.
    #[error("token file: {0}")]
    File(#[from] std::io::Error),
    /// A line isn't `token,user,uid[,"group1,group2"]`.
    #[error("token file: line {0}: expected token,user,uid[,\"group1,group2\"]")]
    Line(usize),
    /// It is too large.
    #[error("token file: larger than {MAX_TOKEN_FILE} bytes")]
    TooLarge,
}

/// Knows users by their certificate or token. Tokens are held as hashes only.
#[derive(Debug, Clone, Default)]
pub struct Authenticator {
    tokens: HashMap<[u8; 32], Identity>,
    everyone: Option<Identity>,
}

impl Authenticator {
    /// Takes everyone for this user: for plain HTTP on loopback.
    pub fn everyone_is(user: Identity) -> Self {
        Self { everyone: Some(user), ..Self::default() }
    }

    /// Also knows the bearer of this token.
    #[must_use]
    pub fn with_token(mut self, token: &str, user: Identity) -> Self {
        self.tokens.insert(hash(token), user);
        self
    }

    /// Also knows the tokens of a file with lines `token,user,uid[,"group1,group2"]` (Kubernetes, "Static token file").
    ///
    /// # Errors
    /// When the file can't be read or a line is malformed.
    pub fn with_token_file(mut self, path: &Path) -> Result<Self, AuthError> {
        if std::fs::metadata(path)?.len() > MAX_TOKEN_FILE {
            return Err(AuthError::TooLarge);
        }
        for (index, line) in std::fs::read_to_string(path)?.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let mut parts = line.splitn(4, ',').map(str::trim);
            let (Some(token), Some(user), Some(_uid)) = (parts.next(), parts.next(), parts.next()) else {
                return Err(AuthError::Line(index + 1));
            };
            if token.is_empty() || user.is_empty() {
                return Err(AuthError::Line(index + 1));
            }
            let groups = parts.next().unwrap_or_default().trim_matches('"');
            let groups = groups.split(',').map(str::trim).filter(|g| !g.is_empty());
            self = self.with_token(token, Identity::new(user, groups));
        }
        Ok(self)
    }

    /// The user of a request: its token, else its connection's certificate (already verified). `None` is anonymous;
    /// an error is a token that nobody has.
    pub(crate) fn user(&self, bearer: Option<&str>, certificate: Option<&Identity>) -> Result<Option<Identity>, ()> {
        if let Some(user) = &self.everyone {
            return Ok(Some(user.clone()));
        }
        let mut user = match (certificate, bearer) {
            (Some(user), _) => user.clone(),
            (None, Some(token)) if token.len() <= MAX_TOKEN => self.tokens.get(&hash(token)).cloned().ok_or(())?,
            (None, Some(_)) => return Err(()),
            (None, None) => return Ok(None),
        };
        user.groups.push(AUTHENTICATED_GROUP.to_owned());
        Ok(Some(user))
    }
}

/// The user that a verified client certificate names: CN is the user, each O a group.
pub(crate) fn certificate_user(certificate: &CertificateDer<'_>) -> Option<Identity> {
    let (_, parsed) = x509_parser::parse_x509_certificate(certificate).ok()?;
    let subject = parsed.subject();
    let name = subject.iter_common_name().next()?.as_str().ok()?.to_owned();
    let groups: Vec<&str> = subject.iter_organization().filter_map(|o| o.as_str().ok()).collect();
    (!name.is_empty()).then(|| Identity::new(name, groups))
}

fn hash(token: &str) -> [u8; 32] {
    Sha256::digest(token.as_bytes()).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn token_files_name_users_and_groups_and_bad_lines_are_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "# comment\nsecret,alice,1,\"system:masters,dev\"\nother,bob,2\n").unwrap();
        let authenticator = Authenticator::default().with_token_file(file.path()).unwrap();
        let alice = authenticator.user(Some("secret"), None).unwrap().unwrap();
        assert_eq!(alice.name, "alice");
        assert_eq!(alice.groups, ["system:masters", "dev", AUTHENTICATED_GROUP]);
        assert!(authenticator.user(Some("wrong"), None).is_err());
        assert!(authenticator.user(None, None).unwrap().is_none());
        std::fs::write(file.path(), "secret,alice\n").unwrap();
        assert!(Authenticator::default().with_token_file(file.path()).is_err());
    }
}
