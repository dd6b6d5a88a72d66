//! Which listeners of our Gateways can be served, and with which certificates.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use gateway_api::apis::standard::gateways::{
    Gateway, GatewayListeners, GatewayListenersAllowedRoutesNamespacesFrom as From, GatewayListenersTlsMode,
};
use rustls::sign::CertifiedKey;

use super::{
    Verdict,
    grants::{self, End},
};
use crate::{
    objects::{Name, Objects},
    routing::{HostPattern, HostRules},
    tls,
};

const GATEWAY_GROUP: &str = "gateway.networking.k8s.io";

/// Certificates that were read from Secrets, so that each version of a Secret is read once.
#[derive(Debug, Default)]
pub struct Certificates(HashMap<Name, (Option<String>, Arc<CertifiedKey>)>);

/// A listener and what is known of it.
#[derive(Debug)]
pub(super) struct Judged {
    pub(super) name: String,
    pub(super) port: u16,
    pub(super) host: HostPattern,
    pub(super) certificate: Option<Arc<CertifiedKey>>,
    pub(super) tls: bool,
    /// Namespaces whose routes may attach; none is any.
    pub(super) namespaces: Option<Vec<String>>,
    pub(super) attached: i32,
    pub(super) verdicts: Vec<Verdict>,
    pub(super) hosts: Vec<HostRules>,
}

impl Judged {
    /// Whether it is served.
    pub(super) fn usable(&self) -> bool {
        self.verdicts.iter().any(|verdict| verdict.kind == "Programmed" && verdict.holds)
    }
}

/// Judges all listeners of the given Gateways, the ones with precedence first.
pub(super) fn judge(
    gateways: &[(&Name, &Arc<Gateway>)],
    objects: &Objects,
    certificates: &mut Certificates,
) -> BTreeMap<Name, Vec<Judged>> {
    let mut ports: HashMap<u16, bool> = HashMap::new();
    let mut hosts: HashMap<(u16, String), ()> = HashMap::new();
    let mut all = BTreeMap::new();
    for (name, gateway) in gateways {
        let mut judged = Vec::new();
        for listener in &gateway.spec.listeners {
            let mut one = judge_one(name, listener, objects, certificates);
            if one.usable() {
                let host = one.host.to_string();
                let conflict = if *ports.entry(one.port).or_insert(one.tls) != one.tls {
                    Some(("ProtocolConflict", "another listener uses this port with another protocol"))
                } else if hosts.insert((one.port, host), ()).is_some() {
                    Some(("HostnameConflict", "another listener has this port and host name"))
                } else {
                    None
                };
                if let Some((reason, message)) = conflict {
                    one.verdicts = vec![
                        Verdict { holds: true, ..Verdict::no("Conflicted", reason, message) },
                        Verdict::no("Accepted", reason, message),
                        Verdict::no("Programmed", "Invalid", message),
                    ];
                }
            }
            judged.push(one);
        }
        all.insert((*name).clone(), judged);
    }
    all
}

fn judge_one(
    gateway: &Name,
    listener: &GatewayListeners,
    objects: &Objects,
    certificates: &mut Certificates,
) -> Judged {
    let tls = listener.protocol == "HTTPS";
    let mut judged = Judged {
        name: listener.name.clone(),
        port: u16::try_from(listener.port).unwrap_or(0),
        host: HostPattern::parse(listener.hostname.as_deref()),
        certificate: None,
        tls,
        namespaces: Some(vec![gateway.0.clone()]),
        attached: 0,
        verdicts: Vec::new(),
        hosts: Vec::new(),
    };
    let allowed = listener.allowed_routes.as_ref();
    match allowed.and_then(|allowed| allowed.namespaces.as_ref()).and_then(|namespaces| namespaces.from.as_ref()) {
        None | Some(From::Same) => {}
        Some(From::All) => judged.namespaces = None,
        // Namespaces' labels are not among what a node holds: none is allowed rather than all.
        Some(From::Selector) => {
            let message = "allowedRoutes.namespaces.from: Selector isn't supported yet; use Same or All";
            return refuse(judged, "UnsupportedValue", message);
        }
    }
    let kinds = allowed.and_then(|allowed| allowed.kinds.as_ref());
    let other =
        |kind: &str, group: Option<&str>| kind != "HTTPRoute" || group.is_some_and(|group| group != GATEWAY_GROUP);
    if kinds.is_some_and(|kinds| kinds.iter().any(|kind| other(&kind.kind, kind.group.as_deref()))) {
        judged.verdicts.push(Verdict::no("ResolvedRefs", "InvalidRouteKinds", "only HTTPRoute is supported"));
    }
    if judged.port == 0 {
        return refuse(judged, "PortUnavailable", "the port must be from 1 to 65535");
    }
    match (listener.protocol.as_str(), &listener.tls) {
        ("HTTP", _) => {}
        ("HTTPS", Some(settings)) if settings.mode != Some(GatewayListenersTlsMode::Passthrough) => {
            let reference = settings.certificate_refs.as_ref().and_then(|refs| refs.first());
            match reference.map_or_else(
                || Err(("InvalidCertificateRef", "tls.certificateRefs is empty".to_owned())),
                |reference| {
                    let namespace = reference.namespace.as_deref().unwrap_or(&gateway.0);
                    let plain = reference.kind.as_deref().is_none_or(|kind| kind == "Secret")
                        && reference.group.as_deref().is_none_or(str::is_empty);
                    if !plain {
                        return Err(("InvalidCertificateRef", "only Secrets can hold certificates".to_owned()));
                    }
                    let from = End { group: GATEWAY_GROUP, kind: "Gateway", namespace: &gateway.0 };
                    let to = End { group: "", kind: "Secret", namespace };
                    if !grants::allows(objects, from, to, &reference.name) {
                        return Err(("RefNotPermitted", format!("no ReferenceGrant in {namespace} allows this")));
                    }
                    certificates.read(objects, &(namespace.to_owned(), reference.name.clone()))
                },
            ) {
                Ok(certificate) => judged.certificate = Some(certificate),
                Err((reason, message)) => {
                    judged.verdicts.push(Verdict::no("ResolvedRefs", reason, message.clone()));
                    judged.verdicts.push(Verdict::yes("Accepted", "Accepted"));
                    judged.verdicts.push(Verdict::no("Programmed", "Invalid", message));
                    return judged;
                }
            }
        }
        ("HTTPS", _) => return refuse(judged, "UnsupportedProtocol", "HTTPS needs tls with mode Terminate"),
        (other, _) => {
            let message = format!("protocol {other} isn't supported yet; HTTP and HTTPS are");
            return refuse(judged, "UnsupportedProtocol", &message);
        }
    }
    if judged.verdicts.is_empty() {
        judged.verdicts.push(Verdict::yes("ResolvedRefs", "ResolvedRefs"));
    }
    judged.verdicts.push(Verdict::yes("Accepted", "Accepted"));
    judged.verdicts.push(Verdict::yes("Programmed", "Programmed"));
    judged
}

fn refuse(mut judged: Judged, reason: &'static str, message: &str) -> Judged {
    judged.verdicts.push(Verdict::no("Accepted", reason, message));
    judged.verdicts.push(Verdict::no("Programmed", "Invalid", message));
    judged
}

impl Certificates {
    fn read(&mut self, objects: &Objects, name: &Name) -> Result<Arc<CertifiedKey>, (&'static str, String)> {
        let full = format!("{}/{}", name.0, name.1);
        let Some(secret) = objects.secrets.get(name) else {
            self.0.remove(name);
            return Err(("InvalidCertificateRef", format!("there is no Secret {full} of type kubernetes.io/tls")));
        };
        let version = secret.metadata.resource_version.clone();
        if let Some((known, certificate)) = self.0.get(name)
            && *known == version
        {
            return Ok(Arc::clone(certificate));
        }
        let certificate = tls::certificate(secret);
        let certificate = certificate.map_err(|error| ("InvalidCertificateRef", format!("Secret {full}: {error}")))?;
        self.0.insert(name.clone(), (version, Arc::clone(&certificate)));
        Ok(certificate)
    }
}
