//! `hub --standalone`: the Kubernetes API in this process, and what every cluster has from its first moment.

use std::{net::IpAddr, ops::RangeInclusive, path::Path, time::Duration};

use anyhow::Context;
use edgemesh_apiserver::{
    Mode, ServiceRanges, StoreOptions,
    auth::{Authenticator, Authorizer},
    kubeconfig::{Credentials, Kubeconfig},
    pki::CertificateAuthority,
    server::{Server, ServerOptions, TlsOptions},
    store::Store,
};
use k8s_openapi::{
    api::{core::v1::Service, discovery::v1::EndpointSlice},
    apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition,
};
use kube::{
    Api, Client,
    api::PostParams,
    config::{KubeConfigOptions, Kubeconfig as ClientConfig},
};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::json;

use crate::{config::Config, custom_resources};

/// Node ports, as in Kubernetes.
const NODE_PORTS: RangeInclusive<u16> = 30_000..=32_767;
/// How long the administrator's certificate is valid; each start writes a new one.
const ADMIN_TTL: Duration = Duration::from_secs(365 * 86_400);
/// The identity of the hub's own requests, and of the administrator's.
const ADMIN: (&str, &str) = ("kubernetes-admin", "system:masters");

/// The bound API, and a client for it.
pub(crate) struct Standalone {
    pub(crate) server: Server,
    pub(crate) client: Client,
    /// Where nodes reach the API.
    pub(crate) public_url: String,
}

/// Opens the store, binds the API and writes the administrator's kubeconfig. The API must be served before the client is used.
///
/// # Errors
/// When the folder, the store or the port can't be used.
pub(crate) async fn bind(config: &Config, authority: &CertificateAuthority) -> anyhow::Result<Standalone> {
    let options = StoreOptions {
        services: Some(ServiceRanges { addresses: config.service_ranges()?, node_ports: NODE_PORTS }),
        ..StoreOptions::default()
    };
    let database = config.data_dir.join("state.db");
    let store = Store::open(&database, Mode::Authoritative, options)
        .await
        .with_context(|| format!("the store {} can't be opened", database.display()))?;
    let (mut names, mut addresses) = config.api.subject_names();
    for name in ["kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local"] {
        names.push(name.to_owned());
    }
    addresses.extend(config.kubernetes_address());
    let names: Vec<_> = names.iter().map(String::as_str).collect();
    let tls = TlsOptions {
        server: authority.issue_server(&names, &addresses)?,
        client_authority: Some(authority.certificate_pem().to_owned()),
    };
    let options = ServerOptions {
        authenticator: Authenticator::default(),
        authorizer: Authorizer::Cluster,
        ..ServerOptions::default()
    };
    let server = Server::bind(config.api.listen, Some(tls), store, options).await?;
    let port = server.address.port();
    let host = config.api.public_host();
    let public_url = url(&host, port);
    kubeconfig(authority, &public_url)?.write(&config.data_dir.join("admin.kubeconfig"))?;
    let local = match server.address.ip() {
        ip if ip.is_unspecified() => "127.0.0.1".to_owned(),
        ip => ip.to_string(),
    };
    let client = client(&kubeconfig(authority, &url(&local, port))?).await?;
    Ok(Standalone { server, client, public_url })
}

fn kubeconfig(authority: &CertificateAuthority, server: &str) -> anyhow::Result<Kubeconfig> {
    Ok(Kubeconfig {
        server: server.to_owned(),
        authority: Some(authority.certificate_pem().to_owned()),
        credentials: Credentials::Certificate(authority.issue_client(ADMIN.0, &[ADMIN.1], ADMIN_TTL)?),
    })
}

async fn client(kubeconfig: &Kubeconfig) -> anyhow::Result<Client> {
    let file = ClientConfig::from_yaml(&kubeconfig.to_yaml())?;
    client_of(file).await
}

/// A client for a kubeconfig file.
///
/// # Errors
/// When it can't be read or used.
pub(crate) async fn client_from(path: &Path) -> anyhow::Result<Client> {
    let file = ClientConfig::read_from(path).with_context(|| format!("kubeconfig {}", path.display()))?;
    client_of(file).await
}

async fn client_of(file: ClientConfig) -> anyhow::Result<Client> {
    let mut config = kube::Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await?;
    config.connect_timeout = Some(Duration::from_secs(5));
    Ok(Client::try_from(config)?)
}

fn url(host: &str, port: u16) -> String {
    if host.contains(':') { format!("https://[{host}]:{port}") } else { format!("https://{host}:{port}") }
}

/// Creates what every cluster has: the definitions of the mesh, the Service `kubernetes` and the cluster's DNS Service.
///
/// # Errors
/// When the API refuses one of them; the message says which.
pub(crate) async fn bootstrap(client: &Client, config: &Config, api_port: u16) -> anyhow::Result<()> {
    for definition in custom_resources::definitions() {
        ensure(&Api::<CustomResourceDefinition>::all(client.clone()), definition, |present, wanted| {
            let same = serde_json::to_value(&present.spec).ok() == serde_json::to_value(&wanted.spec).ok();
            wanted.status.clone_from(&present.status);
            same
        })
        .await?;
    }
    let kubernetes: Service = serde_json::from_value(json!({
        "metadata": {"name": "kubernetes", "namespace": "default", "labels": {"component": "apiserver", "provider": "kubernetes"}},
        "spec": {
            "clusterIP": config.kubernetes_address(),
            "ports": [{"name": "https", "port": 443, "targetPort": api_port, "protocol": "TCP"}],
        },
    }))?;
    // A Service that is there is left as it is: its address can't change, and the rest is the administrator's.
    ensure(&Api::<Service>::namespaced(client.clone(), "default"), kubernetes, |_, _| true).await?;
    // An address of loopback is no endpoint: pods couldn't reach the API there, and it refuses such a slice.
    if let Some(address) = config.api.public_host().parse::<IpAddr>().ok().filter(|address| !address.is_loopback()) {
        let slice: EndpointSlice = serde_json::from_value(json!({
            "metadata": {"name": "kubernetes", "namespace": "default", "labels": {"kubernetes.io/service-name": "kubernetes"}},
            "addressType": if address.is_ipv4() { "IPv4" } else { "IPv6" },
            "endpoints": [{"addresses": [address], "conditions": {"ready": true}}],
            "ports": [{"name": "https", "port": api_port, "protocol": "TCP"}],
        }))?;
        ensure(&Api::<EndpointSlice>::namespaced(client.clone(), "default"), slice, |present, wanted| {
            present.endpoints == wanted.endpoints && present.ports == wanted.ports
        })
        .await?;
    }
    let dns: Service = serde_json::from_value(json!({
        "metadata": {
            "name": "kube-dns", "namespace": "kube-system",
            "labels": {"k8s-app": "kube-dns", "kubernetes.io/name": "CoreDNS"},
        },
        "spec": {
            "clusterIP": config.cluster_dns,
            "ports": [
                {"name": "dns", "port": 53, "targetPort": 53, "protocol": "UDP"},
                {"name": "dns-tcp", "port": 53, "targetPort": 53, "protocol": "TCP"},
            ],
        },
    }))?;
    // Without a selector: the agent of each node answers for it.
    ensure(&Api::<Service>::namespaced(client.clone(), "kube-system"), dns, |_, _| true).await
}

/// Creates an object, or replaces the present one unless `is_current` says that it is as wanted.
async fn ensure<K>(api: &Api<K>, mut wanted: K, is_current: impl Fn(&K, &mut K) -> bool) -> anyhow::Result<()>
where
    K: kube::Resource + Clone + std::fmt::Debug + Serialize + DeserializeOwned,
{
    let name = wanted.meta().name.clone().unwrap_or_default();
    let result = match api.get_opt(&name).await? {
        None => api.create(&PostParams::default(), &wanted).await,
        Some(present) if is_current(&present, &mut wanted) => return Ok(()),
        Some(present) => {
            wanted.meta_mut().resource_version = present.meta().resource_version.clone();
            api.replace(&name, &PostParams::default(), &wanted).await
        }
    };
    result.map(drop).with_context(|| format!("{name} can't be set up"))
}
