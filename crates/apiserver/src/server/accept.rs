//! What form of an answer the client takes (Kubernetes, "Alternate representations of resources" and "Receiving resources
//! as Tables").

use crate::error::{ApiError, Reason};

/// The form of objects in an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    /// As they are.
    Plain,
    /// As rows of a table, in this version of `meta.k8s.io`.
    Table(&'static str),
    /// Their metadata only, in this version of `meta.k8s.io`.
    Metadata(&'static str),
}

/// The version of aggregated discovery that the client asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Discovery {
    /// `/api` and `/apis` as always.
    Plain,
    /// Everything in one document of this version.
    Aggregated(&'static str),
}

struct Media<'a> {
    name: &'a str,
    parameters: Vec<(&'a str, &'a str)>,
}

impl<'a> Media<'a> {
    fn get(&self, name: &str) -> Option<&'a str> {
        self.parameters.iter().find(|(n, _)| *n == name).map(|(_, v)| *v)
    }
}

/// The media types of an `Accept` header in the order of preference.
fn media(accept: &str) -> Vec<Media<'_>> {
    let mut all: Vec<(u32, Media<'_>)> = accept
        .split(',')
        .filter(|part| !part.trim().is_empty())
        .map(|part| {
            let mut pieces = part.split(';').map(str::trim);
            let name = pieces.next().unwrap_or_default();
            let parameters: Vec<_> =
                pieces.filter_map(|p| p.split_once('=')).map(|(n, v)| (n.trim(), v.trim().trim_matches('"'))).collect();
            let quality = parameters.iter().find(|(n, _)| *n == "q").and_then(|(_, v)| v.parse::<f32>().ok());
            // Thousandths, as RFC 9110 section 12.4.2 allows them.
            #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
            let quality = (quality.unwrap_or(1.0).clamp(0.0, 1.0) * 1000.0) as u32;
            (quality, Media { name, parameters })
        })
        .filter(|(quality, _)| *quality > 0)
        .collect();
    all.sort_by_key(|(quality, _)| std::cmp::Reverse(*quality));
    all.into_iter().map(|(_, media)| media).collect()
}

fn is_json(name: &str) -> bool {
    matches!(name, "application/json" | "application/*" | "*/*")
}

/// The form of objects that the client likes best of those that there are.
pub(crate) fn form(accept: Option<&str>) -> Result<Form, ApiError> {
    let Some(accept) = accept.filter(|a| !a.trim().is_empty()) else { return Ok(Form::Plain) };
    for media in media(accept) {
        if !is_json(media.name) {
            continue;
        }
        let version = match media.get("v") {
            Some("v1beta1") => "v1beta1",
            _ => "v1",
        };
        let ours = media.get("g").is_none_or(|g| g == "meta.k8s.io");
        match media.get("as") {
            None => return Ok(Form::Plain),
            Some("Table") if ours => return Ok(Form::Table(version)),
            Some("PartialObjectMetadata" | "PartialObjectMetadataList") if ours => return Ok(Form::Metadata(version)),
            Some(_) => {}
        }
    }
    Err(ApiError::new(
        Reason::NotAcceptable,
        "only the following media types are accepted: application/json, application/json;as=Table, \
         application/json;as=PartialObjectMetadata",
    ))
}

/// The form of discovery that the client likes best.
pub(crate) fn discovery(accept: Option<&str>) -> Discovery {
    for media in media(accept.unwrap_or_default()) {
        if !is_json(media.name) {
            continue;
        }
        match (media.get("as"), media.get("g"), media.get("v")) {
            (None, ..) => return Discovery::Plain,
            (Some("APIGroupDiscoveryList"), Some("apidiscovery.k8s.io"), Some("v2")) => {
                return Discovery::Aggregated("v2");
            }
            (Some("APIGroupDiscoveryList"), Some("apidiscovery.k8s.io"), Some("v2beta1")) => {
                return Discovery::Aggregated("v2beta1");
            }
            _ => {}
        }
    }
    Discovery::Plain
}

/// Whether the client takes the protobuf form of the OpenAPI v2 document, and rather than JSON.
pub(crate) fn openapi_v2_protobuf(accept: Option<&str>) -> bool {
    media(accept.unwrap_or_default())
        .iter()
        .find_map(|media| match media.name {
            name if is_json(name) => Some(false),
            name if name.starts_with("application/com.github.proto-openapi.spec.v2") => Some(true),
            _ => None,
        })
        .unwrap_or(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_form_that_there_is_wins() {
        let kubectl = "application/json;as=Table;v=v1;g=meta.k8s.io,application/json;as=Table;v=v1beta1;g=meta.k8s.io,application/json";
        assert_eq!(form(Some(kubectl)).unwrap(), Form::Table("v1"));
        assert_eq!(form(Some("application/vnd.kubernetes.protobuf,application/json")).unwrap(), Form::Plain);
        assert_eq!(
            form(Some("application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1")).unwrap(),
            Form::Metadata("v1")
        );
        assert_eq!(
            form(Some("application/json;q=0.5, application/json;as=Table;g=meta.k8s.io;v=v1;q=0.9")).unwrap(),
            Form::Table("v1")
        );
        assert_eq!(form(None).unwrap(), Form::Plain);
        assert_eq!(form(Some("*/*")).unwrap(), Form::Plain);
        assert_eq!(form(Some("application/vnd.kubernetes.protobuf")).unwrap_err().code(), 406);
    }

    #[test]
    fn aggregated_discovery_is_given_to_those_who_ask() {
        let kubectl = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList,application/json;g=apidiscovery.k8s.io;v=v2beta1;as=APIGroupDiscoveryList,application/json";
        assert_eq!(discovery(Some(kubectl)), Discovery::Aggregated("v2"));
        assert_eq!(discovery(Some("application/json, */*")), Discovery::Plain);
    }

    #[test]
    fn old_kubectl_gets_openapi_as_protobuf() {
        assert!(openapi_v2_protobuf(Some("application/com.github.proto-openapi.spec.v2@v1.0+protobuf")));
        assert!(!openapi_v2_protobuf(Some("application/json")));
    }
}
