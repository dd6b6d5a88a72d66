//! Executes the nodes' writes with the hub's client, after checking that the node may make them.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use edgemesh_api::{
    ObjectKey,
    link::WriteVerb,
    names::{GATEWAY_NODE_LABEL, NODE_LEASE_NAMESPACE},
};
use edgemesh_link::hub_session::{NodeWrite, WriteOutcome};
use edgemesh_telemetry::Shutdown;
use kube::{
    Api, Client,
    api::{ApiResource, DeleteParams, DynamicObject, PostParams, Preconditions},
};
use serde_json::{Value, json};
use tokio::{sync::Semaphore, time::timeout};

use crate::{
    metrics::{Metrics, Outcome},
    nodes::{Nodes, Slot},
};

/// How many requests for nodes are under way at the API at once, over all nodes.
const MAX_CONCURRENT: usize = 64;
/// How long one request may take.
const REQUEST_DEADLINE: Duration = Duration::from_secs(15);
/// First and longest delay before a failed write is tried again.
const RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));
/// How often a write is repeated at once after a conflict, with the latest version.
const CONFLICT_RETRIES: usize = 8;

/// Why a write did not happen now.
#[derive(Debug)]
enum Failure {
    /// It never will.
    Refused(String, String),
    /// It may later.
    Retry(String),
}

impl From<kube::Error> for Failure {
    fn from(error: kube::Error) -> Self {
        match error {
            // 401 is about the hub's own credentials, which may be renewed.
            kube::Error::Api(status)
                if (400..500).contains(&status.code) && !matches!(status.code, 401 | 408 | 409 | 429) =>
            {
                Self::Refused(status.reason.clone(), status.message.clone())
            }
            other => Self::Retry(other.to_string()),
        }
    }
}

fn refused(reason: &str, message: impl Into<String>) -> Failure {
    Failure::Refused(reason.to_owned(), message.into())
}

/// The kinds that nodes write: group, plural, kind.
const KINDS: &[(&str, &str, &str)] = &[
    ("", "nodes", "Node"),
    ("", "pods", "Pod"),
    ("", "events", "Event"),
    ("events.k8s.io", "events", "Event"),
    ("coordination.k8s.io", "leases", "Lease"),
    ("edgemesh.dev", "meshnodes", "MeshNode"),
    ("gateway.networking.k8s.io", "gatewayclasses", "GatewayClass"),
    ("gateway.networking.k8s.io", "gateways", "Gateway"),
    ("gateway.networking.k8s.io", "httproutes", "HTTPRoute"),
];

/// Executes writes, a bounded number at a time.
#[derive(Clone)]
pub(crate) struct Writer {
    client: Client,
    nodes: Arc<Nodes>,
    metrics: Metrics,
    slots: Arc<Semaphore>,
    shutdown: Shutdown,
}

impl Writer {
    pub(crate) fn new(client: Client, nodes: Arc<Nodes>, metrics: Metrics, shutdown: Shutdown) -> Self {
        Self { client, nodes, metrics, slots: Arc::new(Semaphore::new(MAX_CONCURRENT)), shutdown }
    }

    /// Executes a write in a task of its own, until it is done, refused, or its session is over.
    pub(crate) fn spawn(&self, slot: Arc<Slot>, write: NodeWrite) {
        let writer = self.clone();
        let stopping = self.shutdown.stopping().clone();
        self.shutdown.spawn(async move {
            let outcome = tokio::select! {
                outcome = writer.run(&slot, &write) => outcome,
                () = stopping.cancelled() => WriteOutcome::Abandoned,
            };
            let result = match &outcome {
                WriteOutcome::Done => "done",
                WriteOutcome::Refused { reason, message } => {
                    tracing::warn!(
                        node = slot.node, key = %write.key, verb = ?write.verb, reason, message,
                        "a node's write was refused"
                    );
                    "refused"
                }
                WriteOutcome::Abandoned => "abandoned",
            };
            writer.metrics.writes.get_or_create(&Outcome { result }).inc();
            slot.state.lock().executed(&write, outcome);
            slot.wake.notify_one();
            writer.nodes.forget_idle(&slot);
        });
    }

    async fn run(&self, slot: &Slot, write: &NodeWrite) -> WriteOutcome {
        let resource = match self.admit(&slot.node, write) {
            Ok(resource) => resource,
            Err(message) => return WriteOutcome::Refused { reason: "Forbidden".to_owned(), message },
        };
        let mut body: Value = match serde_json::from_slice(&write.body) {
            Ok(body @ Value::Object(_)) => body,
            Ok(_) => return bad_request("the body is no object"),
            Err(error) => return bad_request(&error.to_string()),
        };
        // Whether a node is a gateway, and sees certificates, is not the node's to say.
        if resource.kind == "Node"
            && let Some(labels) = body["metadata"]["labels"].as_object_mut()
        {
            labels.remove(GATEWAY_NODE_LABEL);
        }
        let mut delay = RETRY.0;
        while slot.state.lock().current(write.epoch) {
            let attempt = async {
                // The permit is held for one attempt only, so writes that wait for better times hold nobody up.
                let _permit = self.slots.acquire().await;
                timeout(REQUEST_DEADLINE, self.attempt(&resource, write, &body)).await
            };
            let failure = match attempt.await {
                Ok(Ok(())) => return WriteOutcome::Done,
                Ok(Err(Failure::Refused(reason, message))) => return WriteOutcome::Refused { reason, message },
                Ok(Err(Failure::Retry(error))) => error,
                Err(_) => format!("no answer within {REQUEST_DEADLINE:?}"),
            };
            self.metrics.write_retries.inc();
            tracing::debug!(node = slot.node, key = %write.key, failure, ?delay, "a write failed; trying again");
            tokio::time::sleep(delay).await;
            delay = (delay * 2).min(RETRY.1);
        }
        WriteOutcome::Abandoned
    }

    /// Whether the node may make this write, and how the API names its kind (Kubernetes, "Using Node Authorization").
    fn admit(&self, node: &str, write: &NodeWrite) -> Result<ApiResource, String> {
        let key = &write.key;
        let name = (key.resource.group.as_str(), key.resource.plural.as_str());
        let own = key.name == node;
        let upsert = matches!(write.verb, WriteVerb::Create | WriteVerb::Update);
        let status = write.verb == WriteVerb::UpdateStatus;
        let allowed = match name {
            ("", "nodes") => own && key.namespace.is_empty() && (upsert || status),
            ("coordination.k8s.io", "leases") => own && key.namespace == NODE_LEASE_NAMESPACE && upsert,
            ("edgemesh.dev", "meshnodes") => own && key.namespace.is_empty() && (upsert || status),
            ("" | "events.k8s.io", "events") => upsert && self.is_about(node, &write.body),
            ("", "pods") => {
                // A pod that is gone from the index is gone from the cluster: the write then has nothing to change.
                let known = self.nodes.desired.has_pod(node, key);
                known && (status || write.verb == WriteVerb::Delete)
                    || (write.verb == WriteVerb::Delete && !write.uid.is_empty())
                    || (status && !write.uid.is_empty())
            }
            ("gateway.networking.k8s.io", _) => status && self.nodes.desired.is_gateway_node(node),
            _ => false,
        };
        let kind = KINDS.iter().find(|(group, plural, _)| (*group, *plural) == name).filter(|_| allowed);
        let Some((group, plural, kind)) = kind else {
            return Err(format!("node {node} may not do this to {key}"));
        };
        Ok(ApiResource {
            group: (*group).to_owned(),
            version: key.resource.version.clone(),
            api_version: key.resource.api_version(),
            kind: (*kind).to_owned(),
            plural: (*plural).to_owned(),
        })
    }

    /// Whether an event is about the node or one of its pods.
    fn is_about(&self, node: &str, body: &[u8]) -> bool {
        let Ok(event) = serde_json::from_slice::<Value>(body) else { return false };
        let about = if event["involvedObject"].is_object() { &event["involvedObject"] } else { &event["regarding"] };
        let text = |field: &str| about[field].as_str().unwrap_or_default();
        match text("kind") {
            "Node" => text("name") == node,
            "Pod" => {
                let resource = edgemesh_api::ResourceName::new("", "v1", "pods");
                let from_here = event["source"]["host"] == node || event["reportingInstance"] == node;
                // The last events of a pod may come after it is gone.
                from_here
                    || self.nodes.desired.has_pod(node, &ObjectKey::new(resource, text("namespace"), text("name")))
            }
            _ => event["source"]["host"] == node || event["reportingInstance"] == node,
        }
    }

    async fn attempt(&self, resource: &ApiResource, write: &NodeWrite, body: &Value) -> Result<(), Failure> {
        let key = &write.key;
        let api: Api<DynamicObject> = if key.namespace.is_empty() {
            Api::all_with(self.client.clone(), resource)
        } else {
            Api::namespaced_with(self.client.clone(), &key.namespace, resource)
        };
        for _ in 0..CONFLICT_RETRIES {
            let result = match write.verb {
                WriteVerb::Create | WriteVerb::Update => upsert(&api, resource, key, body).await,
                WriteVerb::UpdateStatus => update_status(&api, key, &write.uid, body).await,
                WriteVerb::Delete => return delete(&api, key, &write.uid, body).await,
                WriteVerb::Unspecified => return Err(refused("BadRequest", "a write without a verb")),
            };
            match result {
                Err(kube::Error::Api(status)) if status.code == 409 => {}
                Err(error) => return Err(error.into()),
                Ok(outcome) => return outcome,
            }
        }
        Err(Failure::Retry("the object changes too often".to_owned()))
    }
}

fn bad_request(message: &str) -> WriteOutcome {
    WriteOutcome::Refused { reason: "BadRequest".to_owned(), message: message.to_owned() }
}

/// Conflicts are errors of the outer result; the inner one is what became of the write.
type Attempt = Result<Result<(), Failure>, kube::Error>;

/// Creates the object, or brings the present one up to date. So it does no harm to do it twice.
async fn upsert(api: &Api<DynamicObject>, resource: &ApiResource, key: &ObjectKey, body: &Value) -> Attempt {
    let Some(mut present) = api.get_opt(&key.name).await? else {
        let fresh = match fresh(resource, key, body) {
            Ok(fresh) => fresh,
            Err(error) => return Ok(Err(refused("BadRequest", error.to_string()))),
        };
        let made = api.create(&PostParams::default(), &fresh).await?;
        // The status of a new object is dropped where it is a subresource.
        if resource.kind == "Node" && body["status"].is_object() && made.data["status"] != body["status"] {
            return update_status(api, key, "", body).await;
        }
        return Ok(Ok(()));
    };
    let before = present.clone();
    for part in ["labels", "annotations"] {
        let Some(own) = body["metadata"][part].as_object() else { continue };
        let own = own.iter().filter_map(|(name, value)| Some((name.clone(), value.as_str()?.to_owned())));
        let target = match part {
            "labels" => &mut present.metadata.labels,
            _ => &mut present.metadata.annotations,
        };
        target.get_or_insert_with(BTreeMap::new).extend(own);
    }
    // The spec of a Node is the cluster's (podCIDR, taints); all else that a node writes is its own.
    if resource.kind != "Node"
        && let (Some(present), Some(own)) = (present.data.as_object_mut(), body.as_object())
    {
        let fields =
            own.iter().filter(|(name, _)| !matches!(name.as_str(), "metadata" | "status" | "apiVersion" | "kind"));
        present.extend(fields.map(|(name, value)| (name.clone(), value.clone())));
    }
    if present != before {
        api.replace(&key.name, &PostParams::default(), &present).await?;
    }
    Ok(Ok(()))
}

/// The object as it is sent for creation: without what only the server gives.
fn fresh(resource: &ApiResource, key: &ObjectKey, body: &Value) -> Result<DynamicObject, serde_json::Error> {
    let mut object = body.clone();
    object["apiVersion"] = json!(resource.api_version);
    object["kind"] = json!(resource.kind);
    let mut metadata = json!({"name": key.name});
    if !key.namespace.is_empty() {
        metadata["namespace"] = json!(key.namespace);
    }
    for part in ["labels", "annotations"] {
        if body["metadata"][part].is_object() {
            metadata[part] = body["metadata"][part].clone();
        }
    }
    object["metadata"] = metadata;
    serde_json::from_value(object)
}

async fn update_status(api: &Api<DynamicObject>, key: &ObjectKey, uid: &str, body: &Value) -> Attempt {
    let Some(mut present) = api.get_opt(&key.name).await? else {
        return Ok(Err(refused("NotFound", format!("{key} is gone"))));
    };
    // A pod of the same name may be another one. Other objects of a node have one uid there and another in the cluster
    // until the node has seen what became of its own.
    if key.resource.plural == "pods" && present.metadata.uid.as_deref() != Some(uid) {
        return Ok(Err(refused("NotFound", format!("{key} is another object now"))));
    }
    let Some(data) = present.data.as_object_mut() else {
        return Ok(Err(refused("BadRequest", "the object has no fields")));
    };
    if data.get("status") == body.get("status") {
        return Ok(Ok(()));
    }
    data.insert("status".to_owned(), body["status"].clone());
    api.replace_status(&key.name, &PostParams::default(), &present).await?;
    Ok(Ok(()))
}

/// The final delete of a pod: it has ended at the node. Doing it twice does no harm.
async fn delete(api: &Api<DynamicObject>, key: &ObjectKey, uid: &str, options: &Value) -> Result<(), Failure> {
    if uid.is_empty() {
        return Err(refused("BadRequest", "a delete must name the uid"));
    }
    let grace = options["gracePeriodSeconds"].as_u64().and_then(|seconds| u32::try_from(seconds).ok());
    let mut parameters = DeleteParams { grace_period_seconds: Some(grace.unwrap_or(0)), ..DeleteParams::default() };
    parameters = parameters.preconditions(Preconditions { uid: Some(uid.to_owned()), resource_version: None });
    match api.delete(&key.name, &parameters).await {
        Ok(_) => Ok(()),
        // Gone, or another pod of the same name: what the node wanted gone is gone.
        Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => Ok(()),
        Err(error) => Err(error.into()),
    }
}
