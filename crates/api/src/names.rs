//! Well-known names: labels, namespaces, identities, ports and default addresses.

/// Label of a Node: the network in which its pods reach one another directly. Nodes of other networks are reached
/// through the tunnel; nodes without the label are in [`DEFAULT_NETWORK`].
pub const NETWORK_LABEL: &str = "edgemesh.dev/network";
/// The network of nodes that carry no [`NETWORK_LABEL`].
pub const DEFAULT_NETWORK: &str = "default";
/// Label of a Node (any value) that runs a gateway: it receives Gateways, their routes and their TLS Secrets.
pub const GATEWAY_NODE_LABEL: &str = "edgemesh.dev/gateway";
/// Label that marks an edge node, as KubeEdge sets it too.
pub const EDGE_ROLE_LABEL: &str = "node-role.kubernetes.io/edge";
/// `spec.controllerName` of the GatewayClasses that edgemesh-gateway serves.
pub const GATEWAY_CONTROLLER_NAME: &str = "edgemesh.dev/gateway-controller";

/// Namespace of the mesh's own objects in the cluster.
pub const SYSTEM_NAMESPACE: &str = "edgemesh-system";
/// Namespace of node leases (Kubernetes, "Node heartbeats").
pub const NODE_LEASE_NAMESPACE: &str = "kube-node-lease";

/// Group of a node's client certificate (Kubernetes, "Using Node Authorization").
pub const NODES_GROUP: &str = "system:nodes";
/// Prefix of the user name in a node's client certificate.
pub const NODE_USER_PREFIX: &str = "system:node:";
/// Group that may do everything (Kubernetes, "Default roles").
pub const MASTERS_GROUP: &str = "system:masters";

/// Default zone of cluster names (Kubernetes DNS specification).
pub const DEFAULT_CLUSTER_DOMAIN: &str = "cluster.local";
/// Default range of Service addresses.
pub const DEFAULT_SERVICE_CIDR: &str = "10.96.0.0/16";
/// Default range from which nodes get their pod ranges.
pub const DEFAULT_POD_CIDR: &str = "10.244.0.0/16";
/// Range from which the nodes of a dual-stack cluster get those of IPv6, unless its settings say otherwise.
pub const DEFAULT_POD_CIDR6: &str = "fd00:10:244::/48";
/// Default cluster DNS address, the tenth of [`DEFAULT_SERVICE_CIDR`].
pub const DEFAULT_CLUSTER_DNS: &str = "10.96.0.10";

/// Port of the Kubernetes API that `hub --standalone` serves.
pub const API_PORT: u16 = 6443;
/// Port of the hub's link: joining and the node connections.
pub const LINK_PORT: u16 = 10443;
/// Port of the Kubernetes API on a node, on loopback only. The same as KubeEdge's metaServer.
pub const METASERVER_PORT: u16 = 10550;
/// Port of the tunnel, UDP (QUIC) and TCP.
pub const TUNNEL_PORT: u16 = 4001;
/// Port of the gateway's tunnel endpoint, UDP (QUIC) and TCP.
pub const GATEWAY_TUNNEL_PORT: u16 = 4002;
/// Admin ports (metrics, readiness, debug), on loopback unless configured.
pub const HUB_ADMIN_PORT: u16 = 9440;
/// Admin port of edgecore.
pub const EDGECORE_ADMIN_PORT: u16 = 9441;
/// Admin port of edgemesh-agent.
pub const AGENT_ADMIN_PORT: u16 = 9442;
/// Admin port of edgemesh-gateway.
pub const GATEWAY_ADMIN_PORT: u16 = 9443;

/// Addresses that exist on each node for itself: the DNS listener and one address per Service port that needs the agent.
/// A local route delivers the range; it is in the link-local block (RFC 3927) and clear of the metadata address.
pub const DEFAULT_NODE_LOCAL_CIDR: &str = "169.254.64.0/18";

/// Largest Kubernetes object that is accepted anywhere, in bytes of JSON. The API server's own limit for a request is 3 MiB
/// and etcd's for a value 1.5 MiB.
pub const MAX_OBJECT_BYTES: usize = 3 << 20;

/// Path at which a node's metaserver says whether its copy is in step with the cloud: `{"connected": true}`. It is not part of the
/// Kubernetes API, whose servers answer 404.
pub const CLOUD_STATUS_PATH: &str = "/edgemesh/v1/cloud";
