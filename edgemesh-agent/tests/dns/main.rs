//! DNS as a client sees it: the whole server on a free port, asked over UDP and TCP.

mod cluster;
mod forwarding;
mod harness;
mod robustness;
