//! Strategic merge patch: which lists merge by which key, which maps retain only the patch's keys
//! (Kubernetes, "Notes on the strategic merge patch").
//!
//! The same tables give the `x-kubernetes-patch-…` and `x-kubernetes-list-…` extensions of the OpenAPI documents.

/// How a patch's list or map at one path is merged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MergeRule {
    /// `Some(key)`: a list of objects that merges by this key. The key of a list of plain values is the empty string:
    /// it merges as a set. `None`: not a merged list.
    pub merge_key: Option<&'static str>,
    /// The patch's `$retainKeys` directive is sent for this map (or for this list's items).
    pub retain_keys: bool,
    /// `x-kubernetes-list-map-keys`, for server-side apply and `kubectl explain`; may be empty.
    pub(crate) map_keys: &'static [&'static str],
}

pub(crate) type Rules = &'static [(&'static str, MergeRule)];

/// The rules of one kind. Paths are dotted field names with no list indexes, for example
/// `spec.template.spec.containers.env`. A list that has no rule is replaced as a whole.
#[derive(Debug, Clone, Copy)]
pub struct MergeKeys {
    pub(crate) groups: &'static [(&'static str, Rules)],
    pub(crate) strategic: bool,
}

impl MergeKeys {
    /// Whether the kind takes strategic merge patches at all (custom resources don't: 415).
    pub fn supports_strategic_merge(&self) -> bool {
        self.strategic
    }

    /// The rule at a path, if there is one.
    pub fn rule(&self, path: &str) -> Option<MergeRule> {
        self.groups.iter().find_map(|(prefix, rules)| {
            let rest = path.strip_prefix(prefix)?;
            rules.iter().find(|(name, _)| *name == rest).map(|(_, rule)| *rule)
        })
    }

    /// All paths and their rules.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (String, MergeRule)> {
        self.groups
            .iter()
            .flat_map(|(prefix, rules)| rules.iter().map(move |(name, rule)| (format!("{prefix}{name}"), *rule)))
    }
}

const fn by(key: &'static str) -> MergeRule {
    MergeRule { merge_key: Some(key), retain_keys: false, map_keys: &[] }
}

const fn by_keys(key: &'static str, map_keys: &'static [&'static str]) -> MergeRule {
    MergeRule { merge_key: Some(key), retain_keys: false, map_keys }
}

const SET: MergeRule = by("");
const RETAIN: MergeRule = MergeRule { merge_key: None, retain_keys: true, map_keys: &[] };
const BY_NAME: MergeRule = by_keys("name", &["name"]);
const BY_TYPE: MergeRule = by_keys("type", &["type"]);

const METADATA: Rules = &[("metadata.ownerReferences", by_keys("uid", &["uid"])), ("metadata.finalizers", SET)];

macro_rules! container_rules {
    ($($list:literal),*) => {
        &[$(
            ($list, BY_NAME),
            (concat!($list, ".env"), BY_NAME),
            (concat!($list, ".ports"), by_keys("containerPort", &["containerPort", "protocol"])),
            (concat!($list, ".volumeMounts"), by_keys("mountPath", &["mountPath"])),
            (concat!($list, ".volumeDevices"), by_keys("devicePath", &["devicePath"])),
            (concat!($list, ".resources.claims"), by_keys("name", &["name"])),
        )*]
    };
}

const CONTAINERS: Rules = container_rules!("containers", "initContainers", "ephemeralContainers");

const POD_SPEC: Rules = &[
    ("volumes", MergeRule { merge_key: Some("name"), retain_keys: true, map_keys: &["name"] }),
    ("imagePullSecrets", BY_NAME),
    ("hostAliases", by_keys("ip", &["ip"])),
    ("topologySpreadConstraints", by_keys("topologyKey", &["topologyKey", "whenUnsatisfiable"])),
    ("resourceClaims", MergeRule { merge_key: Some("name"), retain_keys: true, map_keys: &["name"] }),
    ("schedulingGates", BY_NAME),
];

const POD_STATUS: Rules = &[
    ("status.conditions", BY_TYPE),
    ("status.podIPs", by_keys("ip", &["ip"])),
    ("status.hostIPs", by("ip")),
    ("status.resourceClaimStatuses", MergeRule { merge_key: Some("name"), retain_keys: true, map_keys: &["name"] }),
];

const CONDITIONS: Rules = &[("status.conditions", BY_TYPE)];

/// Kinds that have no merged lists but those of their metadata.
pub(crate) const PLAIN: MergeKeys = MergeKeys { groups: &[("", METADATA)], strategic: true };
/// Custom resources.
pub(crate) const CUSTOM: MergeKeys = MergeKeys { groups: &[], strategic: false };
/// Namespaces.
pub(crate) const CONDITIONED: MergeKeys = MergeKeys { groups: &[("", METADATA), ("", CONDITIONS)], strategic: true };
/// Pods.
pub(crate) const POD: MergeKeys = MergeKeys {
    groups: &[("", METADATA), ("spec.", CONTAINERS), ("spec.", POD_SPEC), ("", POD_STATUS)],
    strategic: true,
};
/// Kinds with a pod template.
pub(crate) const WORKLOAD: MergeKeys = MergeKeys {
    groups: &[
        ("", METADATA),
        ("spec.template.", METADATA),
        ("spec.template.spec.", CONTAINERS),
        ("spec.template.spec.", POD_SPEC),
        ("spec.", &[("strategy", RETAIN)]),
        ("", CONDITIONS),
    ],
    strategic: true,
};
/// Services.
pub(crate) const SERVICE: MergeKeys = MergeKeys {
    groups: &[
        ("", METADATA),
        ("", &[("spec.ports", by_keys("port", &["port", "protocol"])), ("status.conditions", BY_TYPE)]),
    ],
    strategic: true,
};
/// Nodes.
pub(crate) const NODE: MergeKeys = MergeKeys {
    groups: &[
        ("", METADATA),
        // Taints are replaced as a whole: `kubectl taint` computes and sends the full list.
        ("", &[("spec.podCIDRs", SET), ("status.addresses", BY_TYPE), ("status.conditions", BY_TYPE)]),
    ],
    strategic: true,
};
/// ServiceAccounts.
pub(crate) const SERVICE_ACCOUNT: MergeKeys =
    MergeKeys { groups: &[("", METADATA), ("", &[("secrets", BY_NAME)])], strategic: true };
