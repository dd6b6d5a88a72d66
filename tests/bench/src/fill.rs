//! Fills a cluster with many Services and their endpoints, through its API.

use std::{path::Path, time::Duration};

use anyhow::{Context, Result};
use futures::{TryStreamExt, stream};
use k8s_openapi::api::{core::v1::Service, discovery::v1::EndpointSlice};
use kube::{
    Api, Client, Config,
    api::{Patch, PatchParams, PostParams},
    config::{KubeConfigOptions, Kubeconfig},
};
use serde_json::json;

/// Objects that are created at one time.
const AT_ONCE: usize = 32;
const NAMESPACE: &str = "default";

/// Creates the Services `many-FROM` up to `many-TO` (not including it) with an EndpointSlice of `endpoints` each.
///
/// # Errors
/// When the API refuses one.
pub(crate) fn create(kubeconfig: &Path, from: u32, to: u32, endpoints: u32) -> Result<()> {
    run(kubeconfig, async |client| {
        let (services, slices) = (
            Api::<Service>::namespaced(client.clone(), NAMESPACE),
            Api::<EndpointSlice>::namespaced(client, NAMESPACE),
        );
        let parameters = PostParams::default();
        stream::iter((from..to).map(Ok))
            .try_for_each_concurrent(AT_ONCE, async |number| {
                services.create(&parameters, &serde_json::from_value(service(number))?).await?;
                slices.create(&parameters, &serde_json::from_value(slice(number, endpoints, 0))?).await?;
                anyhow::Ok(())
            })
            .await
    })
}

/// Gives `many-0` other endpoints, `times` times, one change every `milliseconds`.
///
/// # Errors
/// When the API refuses one.
pub(crate) fn change(kubeconfig: &Path, endpoints: u32, times: u32, milliseconds: u64) -> Result<()> {
    run(kubeconfig, async |client| {
        let slices = Api::<EndpointSlice>::namespaced(client, NAMESPACE);
        let mut pace = tokio::time::interval(Duration::from_millis(milliseconds));
        for shift in 1..=times {
            pace.tick().await;
            let wanted = Patch::Merge(json!({"endpoints": slice(0, endpoints, shift)["endpoints"]}));
            slices.patch("many-0", &PatchParams::default(), &wanted).await?;
        }
        Ok(())
    })
}

fn run(kubeconfig: &Path, work: impl AsyncFnOnce(Client) -> Result<()>) -> Result<()> {
    // Of the two that are built in, TLS takes the one that is named; another call may have named it.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let file = Kubeconfig::read_from(kubeconfig).context("kubeconfig")?;
        let config = Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await?;
        work(Client::try_from(config)?).await
    })
}

fn service(number: u32) -> serde_json::Value {
    json!({
        "metadata": {"name": format!("many-{number}")},
        "spec": {"ports": [{"port": 80}]},
    })
}

/// Endpoints that nobody calls: addresses of 10.128.0.0/9, which belong to no node.
fn slice(number: u32, endpoints: u32, shift: u32) -> serde_json::Value {
    let address = |endpoint: u32| {
        let [_, b, c, d] = (number * endpoints + endpoint + shift * 7).to_be_bytes();
        json!({"addresses": [format!("10.{}.{c}.{d}", 128 | b)], "conditions": {"ready": true}})
    };
    json!({
        "metadata": {"name": format!("many-{number}"), "labels": {"kubernetes.io/service-name": format!("many-{number}")}},
        "addressType": "IPv4",
        "ports": [{"name": "", "port": 8080, "protocol": "TCP"}],
        "endpoints": (0..endpoints).map(address).collect::<Vec<_>>(),
    })
}
