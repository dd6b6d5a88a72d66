//! Service ports that are reached through the tunnel.
