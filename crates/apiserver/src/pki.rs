//! The certificate authority: one key on disk that signs server, user and node certificates.

use std::{
    fs,
    io::{self, Write},
    net::IpAddr,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType, SerialNumber,
};
use rustls_pki_types::{CertificateDer, pem::PemObject};
use sha2::{Digest, Sha256};

/// How long the authority itself is valid: ten years, as kubeadm's.
const AUTHORITY_TTL: Duration = Duration::from_secs(10 * 365 * 86400);
/// How long server certificates are valid: one year; they are issued anew at each start.
const SERVER_TTL: Duration = Duration::from_secs(365 * 86400);
/// Certificates are valid a little before now, for clocks that are behind.
const CLOCK_SKEW: Duration = Duration::from_secs(300);
/// The largest certificate signing request that is read, in bytes.
const MAX_CSR: usize = 16 << 10;

/// What goes wrong with keys and certificates.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    /// A file can't be read or written.
    #[error("{path}: {error}")]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// A key or certificate can't be made or understood.
    #[error("certificate: {0}")]
    Certificate(#[from] rcgen::Error),
    /// PEM that isn't.
    #[error("certificate: not PEM: {0}")]
    Pem(#[from] rustls_pki_types::pem::Error),
    /// The request asks for something that isn't signed.
    #[error("certificate signing request: {0}")]
    Request(&'static str),
}

/// A certificate with its key, both PEM.
#[derive(Clone)]
pub struct Issued {
    /// The certificate.
    pub certificate: String,
    /// The private key (PKCS #8).
    pub key: String,
}

impl std::fmt::Debug for Issued {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Issued").field("certificate", &self.certificate).finish_non_exhaustive()
    }
}

/// The authority that all parts of one cluster trust.
pub struct CertificateAuthority {
    certificate: String,
    der: CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
}

impl std::fmt::Debug for CertificateAuthority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CertificateAuthority").field("fingerprint", &self.fingerprint_sha256()).finish_non_exhaustive()
    }
}

impl CertificateAuthority {
    /// Loads `ca.crt` and `ca.key` from a folder, or makes them.
    ///
    /// # Errors
    /// When the files can't be read, written or understood, or only one of them is there.
    pub fn load_or_create(folder: &Path) -> Result<Self, PkiError> {
        let (certificate_file, key_file) = (folder.join("ca.crt"), folder.join("ca.key"));
        match (read(&certificate_file)?, read(&key_file)?) {
            (Some(certificate), Some(key)) => Self::from_pem(&certificate, &key),
            // A key alone is what a crash between the two writes leaves: no certificate was ever given out.
            (None, _) => {
                fs::create_dir_all(folder).map_err(|error| PkiError::File { path: folder.to_owned(), error })?;
                let (authority, key) = Self::create()?;
                write_file(&key_file, key.as_bytes(), 0o600)?;
                write_file(&certificate_file, authority.certificate.as_bytes(), 0o644)?;
                Ok(authority)
            }
            (Some(_), None) => Err(PkiError::File {
                path: key_file,
                error: io::Error::new(io::ErrorKind::NotFound, "the key is missing"),
            }),
        }
    }

    /// An authority from its certificate and key, both PEM.
    ///
    /// # Errors
    /// When they can't be understood.
    pub fn from_pem(certificate: &str, key: &str) -> Result<Self, PkiError> {
        let der = CertificateDer::from_pem_slice(certificate.as_bytes())?;
        let issuer = Issuer::from_ca_cert_der(&der, KeyPair::from_pem(key)?)?;
        Ok(Self { certificate: certificate.to_owned(), der: der.into_owned(), issuer })
    }

    fn create() -> Result<(Self, String), PkiError> {
        let key = KeyPair::generate()?;
        let mut params = params("edgemesh-ca", &[], AUTHORITY_TTL)?;
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages =
            vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign, KeyUsagePurpose::DigitalSignature];
        let certificate = params.self_signed(&key)?;
        let pem = key.serialize_pem();
        let authority =
            Self { certificate: certificate.pem(), der: certificate.der().clone(), issuer: Issuer::new(params, key) };
        Ok((authority, pem))
    }

    /// The authority's certificate, PEM.
    pub fn certificate_pem(&self) -> &str {
        &self.certificate
    }

    /// SHA-256 of the authority's certificate (DER), in lower-case hexadecimal: what a join token pins.
    pub fn fingerprint_sha256(&self) -> String {
        fingerprint_sha256(&self.der)
    }

    /// A server certificate for these names and addresses, valid for a year.
    ///
    /// # Errors
    /// When a name isn't one that a certificate can hold.
    pub fn issue_server(&self, names: &[&str], addresses: &[IpAddr]) -> Result<Issued, PkiError> {
        let mut params = params(names.first().unwrap_or(&"edgemesh"), &[], SERVER_TTL)?;
        for name in names {
            params.subject_alt_names.push(SanType::DnsName((*name).try_into()?));
        }
        params.subject_alt_names.extend(addresses.iter().map(|a| SanType::IpAddress(*a)));
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        self.issue(params)
    }

    /// A client certificate: the common name is the user, the organisation its group (Kubernetes, "X509 client
    /// certificates").
    ///
    /// # Errors
    /// When there is more than one organisation, or a name can't be encoded.
    pub fn issue_client(&self, common_name: &str, organisations: &[&str], ttl: Duration) -> Result<Issued, PkiError> {
        let mut params = params(common_name, organisations, ttl)?;
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        self.issue(params)
    }

    /// Signs the key of a certificate signing request (PEM) as a client certificate with this name; of the request only the
    /// key counts. Returns the certificate, PEM.
    ///
    /// # Errors
    /// When the request can't be understood or isn't signed by its key.
    pub fn sign_csr(
        &self,
        request: &str,
        common_name: &str,
        organisations: &[&str],
        ttl: Duration,
    ) -> Result<String, PkiError> {
        if request.len() > MAX_CSR {
            return Err(PkiError::Request("too large"));
        }
        let mut request = CertificateSigningRequestParams::from_pem(request)?;
        request.params = params(common_name, organisations, ttl)?;
        request.params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        Ok(request.signed_by(&self.issuer)?.pem())
    }

    fn issue(&self, params: CertificateParams) -> Result<Issued, PkiError> {
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &self.issuer)?;
        Ok(Issued { certificate: certificate.pem(), key: key.serialize_pem() })
    }
}

/// SHA-256 of a certificate (DER), in lower-case hexadecimal.
pub fn fingerprint_sha256(certificate: &[u8]) -> String {
    Sha256::digest(certificate).iter().map(|b| format!("{b:02x}")).collect()
}

/// Writes a file so that it is there in full or not at all, with these permissions.
///
/// # Errors
/// When the folder isn't there or the disk fails.
pub fn write_file(path: &Path, content: &[u8], mode: u32) -> Result<(), PkiError> {
    let draft = path.with_extension("new");
    let run = || {
        let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(mode).open(&draft)?;
        file.write_all(content)?;
        file.sync_all()?;
        fs::rename(&draft, path)
    };
    run().map_err(|error| PkiError::File { path: path.to_owned(), error })
}

fn read(path: &Path) -> Result<Option<String>, PkiError> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(PkiError::File { path: path.to_owned(), error }),
    }
}

fn params(common_name: &str, organisations: &[&str], ttl: Duration) -> Result<CertificateParams, PkiError> {
    let mut params = CertificateParams::new(Vec::<String>::new())?;
    let mut name = DistinguishedName::new();
    match organisations {
        [] => {}
        [one] => name.push(DnType::OrganizationName, *one),
        // rcgen writes each kind of name once.
        _ => return Err(PkiError::Request("more than one organisation")),
    }
    name.push(DnType::CommonName, common_name);
    params.distinguished_name = name;
    let now = SystemTime::now();
    params.not_before = (now - CLOCK_SKEW).into();
    params.not_after = (now + ttl).into();
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    let mut serial: [u8; 16] = rand::random();
    // A positive number, as RFC 5280 section 4.1.2.2 wants it.
    serial[0] &= 0x7f;
    params.serial_number = Some(SerialNumber::from_slice(&serial));
    Ok(params)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_authority_survives_a_restart_and_its_key_is_private() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let first = CertificateAuthority::load_or_create(folder.path()).unwrap();
        let again = CertificateAuthority::load_or_create(folder.path()).unwrap();
        assert_eq!(first.fingerprint_sha256(), again.fingerprint_sha256());
        assert_eq!(first.fingerprint_sha256().len(), 64);
        let mode = fs::metadata(folder.path().join("ca.key")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn a_signed_request_gets_the_name_that_we_give_not_the_one_that_it_asks_for() {
        let folder = tempfile::tempdir().unwrap();
        let authority = CertificateAuthority::load_or_create(folder.path()).unwrap();
        let key = KeyPair::generate().unwrap();
        let mut asked = CertificateParams::new(vec!["evil.example".to_owned()]).unwrap();
        asked.distinguished_name.push(DnType::CommonName, "system:admin");
        asked.distinguished_name.push(DnType::OrganizationName, "system:masters");
        let request = asked.serialize_request(&key).unwrap().pem().unwrap();
        let ttl = Duration::from_secs(3600);
        let signed = authority.sign_csr(&request, "system:node:a", &["system:nodes"], ttl).unwrap();
        let der = CertificateDer::from_pem_slice(signed.as_bytes()).unwrap();
        let (_, parsed) = x509_parser::parse_x509_certificate(&der).unwrap();
        assert_eq!(parsed.subject().to_string(), "O=system:nodes, CN=system:node:a");
        assert!(parsed.subject_alternative_name().unwrap().is_none());
        assert!(!parsed.is_ca());
    }

    #[test]
    fn garbage_is_not_signed() {
        let folder = tempfile::tempdir().unwrap();
        let authority = CertificateAuthority::load_or_create(folder.path()).unwrap();
        assert!(authority.sign_csr("garbage", "a", &[], Duration::from_secs(60)).is_err());
        assert!(authority.sign_csr(&"x".repeat(MAX_CSR + 1), "a", &[], Duration::from_secs(60)).is_err());
    }
}
