//! Images: when they are pulled, and with whose credentials (Kubernetes, "Images").

use base64::{Engine, engine::general_purpose::STANDARD};
use k8s_cri::v1::AuthConfig;
use k8s_openapi::api::core::v1::{Container, Pod, Secret};
use serde::Deserialize;

use super::inputs::Inputs;

/// When an image is pulled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PullPolicy {
    Always,
    IfNotPresent,
    Never,
}

impl PullPolicy {
    /// A container's policy; by default `Always` for the tag `latest`, else `IfNotPresent`.
    pub(crate) fn of(container: &Container) -> Self {
        match container.image_pull_policy.as_deref() {
            Some("Always") => Self::Always,
            Some("Never") => Self::Never,
            Some("IfNotPresent") => Self::IfNotPresent,
            _ if is_latest(container.image.as_deref().unwrap_or_default()) => Self::Always,
            _ => Self::IfNotPresent,
        }
    }
}

fn is_latest(image: &str) -> bool {
    if image.contains('@') {
        return false;
    }
    let name = image.rsplit('/').next().unwrap_or(image);
    name.split_once(':').is_none_or(|(_, tag)| tag == "latest")
}

/// The registry of an image, as Docker's configuration names it.
fn registry(image: &str) -> &str {
    match image.split_once('/') {
        Some((first, _)) if first.contains(['.', ':']) || first == "localhost" => first,
        _ => "docker.io",
    }
}

#[derive(Deserialize)]
struct DockerConfigJson {
    auths: std::collections::BTreeMap<String, DockerAuth>,
}

#[derive(Deserialize)]
struct DockerAuth {
    username: Option<String>,
    password: Option<String>,
    auth: Option<String>,
    identitytoken: Option<String>,
    registrytoken: Option<String>,
}

/// The credentials for an image from the pod's image pull secrets.
pub(crate) fn credentials(pod: &Pod, image: &str, inputs: &Inputs) -> Option<AuthConfig> {
    let names = pod.spec.iter().flat_map(|s| s.image_pull_secrets.iter().flatten());
    names.filter_map(|reference| inputs.secrets.get(&reference.name)).find_map(|secret| from_secret(secret, image))
}

fn from_secret(secret: &Secret, image: &str) -> Option<AuthConfig> {
    let data = secret.data.as_ref()?;
    let auths = if let Some(config) = data.get(".dockerconfigjson") {
        serde_json::from_slice::<DockerConfigJson>(&config.0).ok()?.auths
    } else {
        serde_json::from_slice(&data.get(".dockercfg")?.0).ok()?
    };
    let wanted = registry(image);
    let host = |key: &str| {
        let key = key.trim_start_matches("https://").trim_start_matches("http://");
        let host = key.split('/').next().unwrap_or(key).to_owned();
        if host == "index.docker.io" || host == "registry-1.docker.io" { "docker.io".to_owned() } else { host }
    };
    let (key, auth) = auths.into_iter().find(|(key, _)| host(key) == wanted)?;
    let (mut username, mut password) = (auth.username.unwrap_or_default(), auth.password.unwrap_or_default());
    if username.is_empty()
        && let Some(decoded) = auth.auth.as_deref().and_then(|text| STANDARD.decode(text.trim()).ok())
        && let Ok(decoded) = String::from_utf8(decoded)
        && let Some((name, secret)) = decoded.split_once(':')
    {
        (username, password) = (name.to_owned(), secret.to_owned());
    }
    Some(AuthConfig {
        username,
        password,
        server_address: key,
        identity_token: auth.identitytoken.unwrap_or_default(),
        registry_token: auth.registrytoken.unwrap_or_default(),
        ..Default::default()
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_default_policy_depends_on_the_tag() {
        let policy = |image: &str, set: Option<&str>| {
            PullPolicy::of(
                &serde_json::from_value(json!({"name": "c", "image": image, "imagePullPolicy": set})).unwrap(),
            )
        };
        assert_eq!(policy("demo", None), PullPolicy::Always);
        assert_eq!(policy("host:5000/demo", None), PullPolicy::Always);
        assert_eq!(policy("demo:latest", None), PullPolicy::Always);
        assert_eq!(policy("host:5000/demo:1", None), PullPolicy::IfNotPresent);
        assert_eq!(policy("demo@sha256:00", None), PullPolicy::IfNotPresent);
        assert_eq!(policy("demo:latest", Some("Never")), PullPolicy::Never);
    }

    #[test]
    fn credentials_are_found_by_registry() {
        let config = json!({"auths": {
            "https://index.docker.io/v1/": {"auth": STANDARD.encode("me:pa:ss")},
            "registry.example:5000": {"username": "you", "password": "word"}
        }});
        let secret: Secret =
            serde_json::from_value(json!({"data": {".dockerconfigjson": STANDARD.encode(config.to_string())}}))
                .unwrap();
        let inputs = Inputs { secrets: [("pull".to_owned(), secret)].into(), ..Inputs::default() };
        let pod: Pod = serde_json::from_value(
            json!({"spec": {"containers": [], "imagePullSecrets": [{"name": "gone"}, {"name": "pull"}]}}),
        )
        .unwrap();
        let found = |image: &str| credentials(&pod, image, &inputs).map(|a| (a.username, a.password));
        assert_eq!(found("library/demo:1"), Some(("me".to_owned(), "pa:ss".to_owned())));
        assert_eq!(found("demo"), Some(("me".to_owned(), "pa:ss".to_owned())));
        assert_eq!(found("registry.example:5000/a/b"), Some(("you".to_owned(), "word".to_owned())));
        assert_eq!(found("other.example/a"), None);
    }
}
