//! A whole API server in this process, for tests: TLS, a CA, an administrator's kubeconfig.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used, clippy::expect_used)]

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use edgemesh_apiserver::{
    Identity, Mode, ServiceRanges, Store, StoreOptions,
    auth::Authenticator,
    kubeconfig::{Credentials, Kubeconfig},
    pki::CertificateAuthority,
    server::{Server, ServerOptions, TlsOptions},
};
use tokio_util::sync::CancellationToken;

pub const TOKEN: &str = "a-token-for-tests";

/// A running server; its folder and tasks go with it.
pub struct TestServer {
    pub folder: tempfile::TempDir,
    pub store: Store,
    pub address: SocketAddr,
    pub authority: CertificateAuthority,
    pub kubeconfig: PathBuf,
    stop: CancellationToken,
    task: tokio::task::JoinHandle<()>,
}

impl TestServer {
    pub async fn start() -> Self {
        Self::with(ServerOptions::default()).await
    }

    pub async fn with(options: ServerOptions) -> Self {
        // Clients in the tests ask for it; a second time it is there already.
        rustls::crypto::ring::default_provider().install_default().ok();
        let folder = tempfile::tempdir().unwrap();
        let services =
            Some(ServiceRanges { addresses: vec!["10.96.0.0/16".parse().unwrap()], node_ports: 30000..=32767 });
        let store_options = StoreOptions { services, ..StoreOptions::default() };
        let store = Store::open(&folder.path().join("state.db"), Mode::Authoritative, store_options).await.unwrap();
        let authority = CertificateAuthority::load_or_create(&folder.path().join("pki")).unwrap();
        let tls = TlsOptions {
            server: authority.issue_server(&["localhost"], &["127.0.0.1".parse().unwrap()]).unwrap(),
            client_authority: Some(authority.certificate_pem().to_owned()),
        };
        let authenticator = Authenticator::default().with_token(TOKEN, Identity::new("tester", ["system:masters"]));
        let options = ServerOptions { authenticator, ..options };
        let server = Server::bind("127.0.0.1:0".parse().unwrap(), Some(tls), store.clone(), options).await.unwrap();
        let address = server.address;
        let stop = CancellationToken::new();
        let task = tokio::spawn(server.serve(stop.clone()));
        let kubeconfig = folder.path().join("admin.kubeconfig");
        let server = Self { folder, store, address, authority, kubeconfig, stop, task };
        server.kubeconfig_of("kubernetes-admin", &["system:masters"]).write(&server.kubeconfig).unwrap();
        server
    }

    /// The kubeconfig of a user with a client certificate.
    pub fn kubeconfig_of(&self, user: &str, groups: &[&str]) -> Kubeconfig {
        let issued = self.authority.issue_client(user, groups, Duration::from_secs(3600)).unwrap();
        Kubeconfig {
            server: format!("https://{}", self.address),
            authority: Some(self.authority.certificate_pem().to_owned()),
            credentials: Credentials::Certificate(issued),
        }
    }

    pub async fn stop(self) {
        self.stop.cancel();
        tokio::time::timeout(Duration::from_secs(15), self.task).await.expect("the server did not stop").unwrap();
    }
}
