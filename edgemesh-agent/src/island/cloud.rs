//! Whether the cloud is there. A node's metaserver always answers, so it is asked whether its copy is in step with the cloud; an
//! API server doesn't know that question, and is the cloud itself.

use std::time::Duration;

use edgemesh_api::names::CLOUD_STATUS_PATH;
use serde::Deserialize;
use tokio::time::timeout;

/// How long an answer may take.
const DEADLINE: Duration = Duration::from_secs(3);

/// Who answers the question.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Cloud {
    /// A metaserver: in step with the cloud, or not.
    Metaserver(bool),
    /// The API server.
    ApiServer,
    /// Nobody.
    Away,
}

impl Cloud {
    /// Whether what the API says about endpoints is of this moment.
    pub(super) fn is_there(self) -> bool {
        matches!(self, Self::Metaserver(true) | Self::ApiServer)
    }
}

#[derive(Deserialize)]
struct Status {
    connected: bool,
}

/// Asks once.
pub(super) async fn ask(client: &kube::Client) -> Cloud {
    let Ok(request) = http::Request::get(CLOUD_STATUS_PATH).body(Vec::new()) else { return Cloud::Away };
    match timeout(DEADLINE, client.request::<Status>(request)).await {
        Ok(Ok(status)) => Cloud::Metaserver(status.connected),
        // Whatever it thinks of the question, it is there.
        Ok(Err(kube::Error::Api(refusal))) if refusal.code < 500 => Cloud::ApiServer,
        Ok(Err(error)) => {
            tracing::trace!(%error, "the API is away");
            Cloud::Away
        }
        Err(_) => Cloud::Away,
    }
}
