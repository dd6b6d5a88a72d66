//! ServiceAccounts.

use jiff::Timestamp;
use k8s_openapi::api::core::v1::ServiceAccount;
use serde_json::{Value, json};

use super::built_in::{AGE, BuiltIn, NAME, column, no_default, no_prepare, no_validate, no_validate_update};
use super::{built_in, decode, merge_keys, tables};

pub(crate) static SERVICE_ACCOUNT: BuiltIn = BuiltIn {
    group: "",
    version: "v1",
    plural: "serviceaccounts",
    singular: "serviceaccount",
    kind: "ServiceAccount",
    short_names: &["sa"],
    categories: &[],
    namespaced: true,
    status: false,
    scale: false,
    generation: false,
    keeps_status_on_create: false,
    graceful: false,
    columns: &[NAME, column("Secrets", "string", "Number of Secrets that it may use."), AGE],
    selectable: &[],
    merge_keys: merge_keys::SERVICE_ACCOUNT,
    typed: decode::typed::<ServiceAccount>,
    schema: built_in::schema::<ServiceAccount>(),
    default: no_default,
    validate: no_validate,
    prepare_update: no_prepare,
    validate_update: no_validate_update,
    cells,
};

fn cells(object: &Value, now: Timestamp) -> Vec<Value> {
    vec![tables::name(object), json!(tables::count(&object["secrets"])), tables::age(object, now)]
}
