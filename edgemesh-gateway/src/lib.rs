//! edgemesh-gateway: ingress for edge applications. It serves the Gateways of its class on this node's own addresses, and reaches
//! Services on any node, directly in its own network and through the tunnel in others. It starts and works from disk alone.

pub mod app;
pub mod config;
pub mod listeners;
pub mod metrics;
pub mod objects;
pub mod overlay;
pub mod proxy;
pub mod resolve;
pub mod routing;
pub mod status;
pub mod tls;
pub mod upstream;
