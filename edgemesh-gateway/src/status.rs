//! Writes the verdicts into the objects' status, through the API that is watched, whenever they differ from what is there.

use std::{sync::Arc, time::Duration};

use edgemesh_api::names::GATEWAY_CONTROLLER_NAME;
use edgemesh_telemetry::Shutdown;
use gateway_api::apis::standard::{gatewayclasses::GatewayClass, gateways::Gateway, httproutes::HttpRoute};
use k8s_openapi::{
    NamespaceResourceScope,
    apimachinery::pkg::apis::meta::v1::{Condition, Time},
    jiff::Timestamp,
};
use kube::{
    Api, Client, Resource,
    api::{ObjectMeta, Patch, PatchParams},
};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::sync::watch;

use crate::{
    objects::Name,
    resolve::{GatewayVerdict, ParentVerdict, Resolved, Verdict},
};

const RETRY: Duration = Duration::from_secs(5);
const WRITE_DEADLINE: Duration = Duration::from_secs(10);

/// Writes until the daemon stops. What can't be written is tried again: with no API the gateway serves all the same.
pub async fn write_back(client: Client, mut resolved: watch::Receiver<Arc<Resolved>>, shutdown: Shutdown) {
    loop {
        let current = Arc::clone(&resolved.borrow_and_update());
        let complete = write_all(&client, &current).await;
        tokio::select! {
            changed = resolved.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(RETRY), if !complete => {}
            () = shutdown.stopping().cancelled() => return,
        }
    }
}

async fn write_all(client: &Client, resolved: &Resolved) -> bool {
    let mut complete = true;
    let objects = &resolved.objects;
    for (name, verdicts) in &resolved.statuses.classes {
        let Some(class) = objects.classes.get(name) else { continue };
        let before = class.status.as_ref().and_then(|status| status.conditions.as_deref()).unwrap_or_default();
        if let Some(conditions) = changed(before, verdicts, &class.metadata) {
            let api: Api<GatewayClass> = Api::all(client.clone());
            complete &= write(&api, &name.1, json!({"conditions": conditions})).await;
        }
    }
    for (name, verdict) in &resolved.statuses.gateways {
        let Some(gateway) = objects.gateways.get(name) else { continue };
        if let Some(status) = gateway_status(gateway, verdict) {
            complete &= write(&api::<Gateway>(client, name), &name.1, status).await;
        }
    }
    for (name, parents) in &resolved.statuses.routes {
        let Some(route) = objects.routes.get(name) else { continue };
        if let Some(status) = route_status(route, parents) {
            complete &= write(&api::<HttpRoute>(client, name), &name.1, status).await;
        }
    }
    complete
}

fn api<K>(client: &Client, name: &Name) -> Api<K>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope>,
{
    Api::namespaced(client.clone(), &name.0)
}

async fn write<K>(api: &Api<K>, name: &str, status: Value) -> bool
where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + std::fmt::Debug,
{
    let (kind, patch) = (K::kind(&()), Patch::Merge(json!({"status": status})));
    let parameters = PatchParams::default();
    match tokio::time::timeout(WRITE_DEADLINE, api.patch_status(name, &parameters, &patch)).await {
        Ok(Ok(_)) => true,
        // It was deleted in this moment.
        Ok(Err(kube::Error::Api(status))) if status.code == 404 => true,
        Ok(Err(error)) => {
            tracing::warn!(%kind, name, %error, "status can't be written; trying again");
            false
        }
        Err(_) => {
            tracing::warn!(%kind, name, "status can't be written in time; trying again");
            false
        }
    }
}

/// The conditions to write, or none if those there say the same already.
fn changed(before: &[Condition], verdicts: &[Verdict], metadata: &ObjectMeta) -> Option<Vec<Condition>> {
    let now = Time(Timestamp::now());
    let after: Vec<Condition> = verdicts
        .iter()
        .map(|verdict| {
            let status = if verdict.holds { "True" } else { "False" };
            let known = before.iter().find(|condition| condition.type_ == verdict.kind && condition.status == status);
            Condition {
                type_: verdict.kind.to_owned(),
                status: status.to_owned(),
                reason: verdict.reason.to_owned(),
                message: verdict.message.clone(),
                observed_generation: metadata.generation,
                last_transition_time: known.map_or_else(|| now.clone(), |known| known.last_transition_time.clone()),
            }
        })
        .collect();
    (after != before).then_some(after)
}

/// [`changed`], or what is there.
fn conditions(before: &[Condition], verdicts: &[Verdict], metadata: &ObjectMeta) -> Vec<Condition> {
    changed(before, verdicts, metadata).unwrap_or_else(|| before.to_vec())
}

fn gateway_status(gateway: &Gateway, verdict: &GatewayVerdict) -> Option<Value> {
    let before = gateway.status.clone().unwrap_or_default();
    let metadata = &gateway.metadata;
    let listeners: Vec<Value> = verdict
        .listeners
        .iter()
        .map(|(name, attached, verdicts)| {
            let known = before.listeners.iter().flatten().find(|listener| listener.name == *name);
            let known = known.map(|listener| listener.conditions.as_slice()).unwrap_or_default();
            json!({
                "name": name,
                "attachedRoutes": attached,
                "supportedKinds": [{"group": "gateway.networking.k8s.io", "kind": "HTTPRoute"}],
                "conditions": conditions(known, verdicts, metadata),
            })
        })
        .collect();
    let addresses: Vec<Value> = verdict.addresses.iter().map(|a| json!({"type": "IPAddress", "value": a})).collect();
    let after = json!({
        "conditions": conditions(before.conditions.as_deref().unwrap_or_default(), &verdict.conditions, metadata),
        "addresses": addresses,
        "listeners": listeners,
    });
    let same =
        |key: &str, value: &Value| serde_json::to_value(&before).is_ok_and(|before| before.get(key) == Some(value));
    let unchanged = ["conditions", "addresses", "listeners"].iter().all(|key| same(key, &after[key]));
    (!unchanged).then_some(after)
}

/// Parents of other controllers stay as they are.
fn route_status(route: &HttpRoute, parents: &[ParentVerdict]) -> Option<Value> {
    let before = serde_json::to_value(route.status.as_ref().map(|status| &status.parents)).unwrap_or_default();
    let known = route.status.as_ref().map(|status| status.parents.as_slice()).unwrap_or_default();
    let mut after: Vec<Value> = known
        .iter()
        .filter(|parent| parent.controller_name != GATEWAY_CONTROLLER_NAME)
        .filter_map(|parent| serde_json::to_value(parent).ok())
        .collect();
    for (place, verdicts) in parents {
        let Some(reference) = route.spec.parent_refs.as_ref().and_then(|all| all.get(*place)) else { continue };
        let reference = serde_json::to_value(reference).unwrap_or_default();
        let known = known.iter().find(|parent| {
            parent.controller_name == GATEWAY_CONTROLLER_NAME
                && serde_json::to_value(&parent.parent_ref).is_ok_and(|known| known == reference)
        });
        let known = known.map(|parent| parent.conditions.as_slice()).unwrap_or_default();
        after.push(json!({
            "parentRef": reference,
            "controllerName": GATEWAY_CONTROLLER_NAME,
            "conditions": conditions(known, verdicts, &route.metadata),
        }));
    }
    (before != json!(after)).then(|| json!({"parents": after}))
}
