//! Which way Service addresses are translated on this node: what the settings ask for, and what the kernel offers.

use std::path::PathBuf;

use super::{
    ebpf::{Counters, EbpfDatapathError, Nowhere, Programs, cgroup_path},
    map_sizes::MapSizes,
    nftables::{NftError, Rules},
};
use crate::config::{Config, DatapathMode};

/// Why Service addresses can't be translated.
#[derive(Debug, thiserror::Error)]
pub enum DatapathError {
    /// The programs can't serve, and nothing else was asked for.
    #[error("datapath: ebpf: {0}")]
    Ebpf(#[from] EbpfDatapathError),
    /// The rules can't serve, and nothing else was asked for.
    #[error("datapath: nftables: {0}")]
    Nftables(#[from] NftError),
    /// Neither can.
    #[error("datapath: neither eBPF ({ebpf}) nor nftables ({nftables}) can be used")]
    Neither {
        /// Why not by eBPF.
        ebpf: Box<EbpfDatapathError>,
        /// Why not by nftables.
        nftables: NftError,
    },
}

/// What serves on this node.
pub(super) struct Chosen {
    /// The programs, unless it is the rules that serve all.
    pub(super) programs: Option<Programs>,
    pub(super) counters: Option<Counters>,
    /// For all, or for callers from outside.
    pub(super) rules: Rules,
    /// Where sockets are looked for, if that is known.
    pub(super) cgroup: Option<PathBuf>,
    /// `ebpf` or `nftables`.
    pub(super) mode: &'static str,
    /// Why.
    pub(super) reason: String,
}

/// Starts what the settings ask for; `auto` means eBPF, and nftables where that is not to be had.
pub(super) fn choose(config: &Config) -> Result<Chosen, DatapathError> {
    let chosen = match config.datapath {
        DatapathMode::Ebpf => ebpf(config, "set in the configuration".to_owned())?,
        DatapathMode::Nftables => nftables(config, "set in the configuration".to_owned())?,
        DatapathMode::Auto => match ebpf(config, "the programs could be loaded".to_owned()) {
            Ok(chosen) => chosen,
            // What the kernel lacks has errors of its own: here falling back would hide a wrong setting.
            Err(error @ EbpfDatapathError::Io { .. }) => return Err(error.into()),
            Err(ebpf) => {
                let reason = format!("no eBPF: {ebpf}");
                nftables(config, reason)
                    .map_err(|nftables| DatapathError::Neither { ebpf: Box::new(ebpf), nftables })?
            }
        },
    };
    tracing::info!(mode = chosen.mode, reason = chosen.reason, cgroup = ?chosen.cgroup, "datapath");
    Ok(chosen)
}

fn ebpf(config: &Config, reason: String) -> Result<Chosen, EbpfDatapathError> {
    let sizes = MapSizes::new(config.backend_slots);
    let nowhere = Nowhere::new(config.node_local_cidr, config.node_local_cidr6);
    let (programs, counters) = match Programs::start_pinned(&config.cgroup, &config.bpffs, sizes, nowhere) {
        Err(error @ EbpfDatapathError::Pins { .. }) => {
            tracing::warn!(%error, "nothing will be served while the agent is away");
            Programs::start(&config.cgroup, sizes, nowhere)?
        }
        started => started?,
    };
    let cgroup = Some(programs.cgroup().to_owned());
    let rules = Rules::for_outside();
    Ok(Chosen { programs: Some(programs), counters: Some(counters), rules, cgroup, mode: "ebpf", reason })
}

fn nftables(config: &Config, reason: String) -> Result<Chosen, NftError> {
    // A cgroup is needed only to look for sockets; without one, all are looked at.
    let cgroup = cgroup_path(&config.cgroup).ok().filter(|folder| folder.is_dir());
    let rules = Rules::for_all()?;
    Ok(Chosen { programs: None, counters: None, rules, cgroup, mode: "nftables", reason })
}

/// Removes what a datapath of either mode leaves in the kernel.
///
/// # Errors
/// When something can't be removed.
pub fn uninstall(config: &Config) -> Result<(), DatapathError> {
    let programs = match Programs::uninstall(&config.cgroup, &config.bpffs) {
        // No programs were ever attached there.
        Err(EbpfDatapathError::NoCgroup2) => Ok(()),
        removed => removed,
    };
    Rules::uninstall()?;
    Ok(programs?)
}
