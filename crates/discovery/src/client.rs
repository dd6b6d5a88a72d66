//! The client of the Kubernetes API that agent and gateway use: the cluster's API server or the node's metaserver.

use std::{path::Path, time::Duration};

use kube::config::{KubeConfigOptions, Kubeconfig};

/// How long a connection attempt may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Why no client can be made.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The kubeconfig can't be read or lacks something.
    #[error("kubeconfig: {0}")]
    Kubeconfig(#[from] kube::config::KubeconfigError),
    /// The API server's address is no URL.
    #[error("apiServer {url:?}: {error}")]
    Url {
        /// What was configured.
        url: String,
        /// What is wrong with it.
        error: http::uri::InvalidUri,
    },
    /// Neither was configured, and this isn't a pod of the cluster.
    #[error("neither kubeconfig nor apiServer is set, and there is no service account: {0}")]
    NotInCluster(#[from] kube::config::InClusterError),
    /// The certificates or keys can't be used.
    #[error("client: {0}")]
    Client(#[from] kube::Error),
}

/// A client from a kubeconfig file, else for a plain URL (the metaserver's), else from the pod's service account.
/// It doesn't connect yet. Must run in a tokio runtime, with rustls' crypto provider installed.
///
/// # Errors
/// Unreadable files, bad URLs and unusable credentials.
pub async fn api_client(kubeconfig: Option<&Path>, api_server: Option<&str>) -> Result<kube::Client, ClientError> {
    let mut config = match (kubeconfig, api_server) {
        (Some(path), _) => {
            let file = Kubeconfig::read_from(path)?;
            kube::Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await?
        }
        (None, Some(url)) => {
            let uri = url.parse().map_err(|error| ClientError::Url { url: url.to_owned(), error })?;
            kube::Config::new(uri)
        }
        (None, None) => kube::Config::incluster()?,
    };
    config.connect_timeout = Some(CONNECT_TIMEOUT);
    Ok(kube::Client::try_from(config)?)
}
