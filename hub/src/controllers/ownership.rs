//! Which objects belong to a controller object: by owner reference, with adoption and release by selector
//! (Kubernetes, "Owners and Dependents" and "ReplicaSet: Non-Template Pod acquisitions").

use std::{collections::BTreeMap, sync::Arc};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, OwnerReference};
use kube::{
    Api, Resource, ResourceExt,
    api::{Patch, PatchParams},
    core::{Selector, SelectorExt},
};
use serde::de::DeserializeOwned;
use serde_json::json;

use super::{
    cache::{Cache, Cached, controller_uid},
    worker::{self, Failure},
};

/// A LabelSelector ready to match; one that can't be read or is empty selects nothing.
pub(crate) fn selector(selector: &LabelSelector) -> Option<Selector> {
    let selector = Selector::try_from(selector.clone()).ok()?;
    (!selector.selects_all()).then_some(selector)
}

/// Whether the selector matches the object's labels.
pub(crate) fn matches<K: Resource>(selector: &Selector, object: &K) -> bool {
    static NONE: BTreeMap<String, String> = BTreeMap::new();
    selector.matches(object.meta().labels.as_ref().unwrap_or(&NONE))
}

/// The reference that makes `owner` the controller of another object.
pub(crate) fn controller_reference<K: Resource<DynamicType = ()>>(owner: &K) -> OwnerReference {
    OwnerReference {
        api_version: K::api_version(&()).into_owned(),
        kind: K::kind(&()).into_owned(),
        name: owner.name_any(),
        uid: owner.uid().unwrap_or_default(),
        controller: Some(true),
        block_owner_deletion: Some(true),
    }
}

/// The name of the controlling owner, if it is of this kind.
pub(crate) fn controller_name<K: Resource, O: Resource<DynamicType = ()>>(object: &K) -> Option<String> {
    let owners = object.meta().owner_references.as_deref()?;
    let owner = owners.iter().find(|owner| owner.controller == Some(true))?;
    (owner.kind == O::kind(&())).then(|| owner.name.clone())
}

/// The objects of `owner` among `candidates` (all of its namespace). Those without a controller that the selector
/// matches are adopted, own ones that it doesn't match any more are released.
pub(crate) async fn claim<O, K>(
    owners: &Api<O>,
    owner: &O,
    selector: &Selector,
    candidates: Vec<Arc<K>>,
    api: &Api<K>,
    cache: &Cache<K>,
) -> Result<Vec<Arc<K>>, Failure>
where
    O: Cached,
    K: Cached,
{
    let uid = owner.uid().unwrap_or_default();
    let going = owner.meta().deletion_timestamp.is_some();
    let mut mine = Vec::new();
    let mut checked = false;
    for object in candidates {
        let matched = matches(selector, &*object);
        match controller_uid(&*object) {
            Some(other) if other != uid => {}
            Some(_) if matched || going => mine.push(object),
            Some(_) => {
                let mut references = object.owner_references().to_vec();
                references.retain(|reference| reference.uid != uid);
                set_owners(api, cache, &object, &references).await?;
            }
            None if matched && !going && object.meta().deletion_timestamp.is_none() => {
                if !checked {
                    // The cache may not know yet that the owner is being deleted.
                    let live = worker::ignore_not_found(owners.get(&owner.name_any()).await)
                        .map_err(Failure::api("look at the owner before adopting"))?;
                    let same = live.is_some_and(|live| {
                        live.uid().as_ref() == Some(&uid) && live.meta().deletion_timestamp.is_none()
                    });
                    if !same {
                        continue;
                    }
                    checked = true;
                }
                let mut references = object.owner_references().to_vec();
                references.push(controller_reference(owner));
                if let Some(adopted) = set_owners(api, cache, &object, &references).await? {
                    mine.push(adopted);
                }
            }
            None => {}
        }
    }
    Ok(mine)
}

async fn set_owners<K: Cached + DeserializeOwned>(
    api: &Api<K>,
    cache: &Cache<K>,
    object: &K,
    references: &[OwnerReference],
) -> Result<Option<Arc<K>>, Failure> {
    let meta = object.meta();
    let patch = json!({"metadata": {
        "uid": meta.uid,
        "resourceVersion": meta.resource_version,
        "ownerReferences": references,
    }});
    match api.patch(&object.name_any(), &PatchParams::default(), &Patch::Merge(&patch)).await {
        Ok(changed) => {
            cache.wrote(changed.clone());
            Ok(Some(Arc::new(changed)))
        }
        Err(error) if worker::is_not_found(&error) => {
            cache.gone(object);
            Ok(None)
        }
        Err(error) => Err(Failure::api("change the owner of an object")(error)),
    }
}
