//! The catalog as JSON, for `/debug/catalog`.

use serde_json::{Value, json};

use crate::{catalog::Catalog, model::Service};

/// Services and nodes, sorted by name.
pub fn view(catalog: &Catalog) -> Value {
    let mut services: Vec<&Service> = catalog.services().map(|service| &**service).collect();
    services.sort_by(|a, b| a.name.cmp(&b.name));
    let mut nodes: Vec<_> = catalog.nodes().collect();
    nodes.sort_by(|a, b| a.name.cmp(&b.name));
    json!({
        "generation": catalog.generation(),
        "synced": catalog.is_synced(),
        "services": services,
        "nodes": nodes,
    })
}
