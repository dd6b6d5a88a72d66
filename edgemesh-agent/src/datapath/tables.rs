//! The frontends and backends of one address family in the kernel's maps.

use std::{
    collections::HashMap,
    hash::Hash,
    net::{SocketAddr, SocketAddrV4, SocketAddrV6},
};

use aya::{
    Ebpf, Pod,
    maps::{Array, HashMap as BpfHashMap, MapData},
};
use edgemesh_ebpf_abi as abi;
use edgemesh_mesh::model::Protocol;

use super::{
    ebpf::{EbpfDatapathError, map_error, take_map},
    slots::{Run, Slots},
};

/// An address family's maps and the form of what is in them.
pub(super) trait Family {
    /// Key of a frontend.
    type Key: Pod + Eq + Hash;
    /// A backend's slot.
    type Slot: Pod;
    /// Address and port.
    type Address: Copy;
    /// Name of the frontends' map.
    const FRONTENDS: &'static str;
    /// Name of the backends' map.
    const BACKENDS: &'static str;

    /// The key of a frontend.
    fn key(address: Self::Address, protocol: Protocol) -> Self::Key;
    /// A backend in a slot; nothing for one of the other family.
    fn slot(backend: SocketAddr, generation: u16) -> Option<Self::Slot>;
}

/// IPv4.
#[derive(Debug)]
pub(super) struct V4;

/// IPv6.
#[derive(Debug)]
pub(super) struct V6;

impl Family for V4 {
    type Key = u64;
    type Slot = u64;
    type Address = SocketAddrV4;
    const FRONTENDS: &'static str = abi::FRONTENDS;
    const BACKENDS: &'static str = abi::BACKENDS;

    fn key(address: SocketAddrV4, protocol: Protocol) -> u64 {
        let address = abi::SocketAddress::new(address.ip().octets(), address.port());
        abi::FrontendKey::new(address, protocol_number(protocol)).to_bits()
    }

    fn slot(backend: SocketAddr, generation: u16) -> Option<u64> {
        let SocketAddr::V4(backend) = backend else { return None };
        let address = abi::SocketAddress::new(backend.ip().octets(), backend.port());
        Some(abi::Backend::new(address, generation).to_bits())
    }
}

impl Family for V6 {
    type Key = [u64; 3];
    type Slot = [u64; 3];
    type Address = SocketAddrV6;
    const FRONTENDS: &'static str = abi::FRONTENDS6;
    const BACKENDS: &'static str = abi::BACKENDS6;

    fn key(address: SocketAddrV6, protocol: Protocol) -> [u64; 3] {
        let address = abi::SocketAddress6::new(address.ip().octets(), address.port());
        abi::FrontendKey6::new(address, protocol_number(protocol)).to_words()
    }

    fn slot(backend: SocketAddr, generation: u16) -> Option<[u64; 3]> {
        let SocketAddr::V6(backend) = backend else { return None };
        let address = abi::SocketAddress6::new(backend.ip().octets(), backend.port());
        Some(abi::Backend6::new(address, generation).to_words())
    }
}

fn protocol_number(protocol: Protocol) -> u8 {
    match protocol {
        Protocol::Tcp => abi::TCP,
        Protocol::Udp => abi::UDP,
    }
}

/// What is in the maps of one family.
pub(super) struct Table<F: Family> {
    frontends: BpfHashMap<MapData, F::Key, u64>,
    backends: Array<MapData, F::Slot>,
    slots: Slots,
    generation: u16,
    programmed: HashMap<F::Key, Option<Run>>,
}

impl<F: Family> Table<F> {
    /// The maps of an object that was just loaded.
    pub(super) fn take(ebpf: &mut Ebpf) -> Result<Self, EbpfDatapathError> {
        let backends = Array::try_from(take_map(ebpf, F::BACKENDS)?).map_err(map_error(F::BACKENDS))?;
        Ok(Self {
            frontends: BpfHashMap::try_from(take_map(ebpf, F::FRONTENDS)?).map_err(map_error(F::FRONTENDS))?,
            slots: Slots::new(backends.len()),
            backends,
            generation: 0,
            programmed: HashMap::new(),
        })
    }

    /// How many frontends there are.
    pub(super) fn len(&self) -> usize {
        self.programmed.len()
    }

    /// Takes a frontend out.
    pub(super) fn remove(&mut self, key: F::Key) -> Result<(), EbpfDatapathError> {
        if self.programmed.contains_key(&key) {
            self.frontends.remove(&key).map_err(map_error(F::FRONTENDS))?;
            self.release(key);
        }
        Ok(())
    }

    /// Writes one frontend. The backends go to slots of their own, then the frontend leads there, then the old slots are
    /// free. Backends of the other family are left out.
    pub(super) fn set(&mut self, key: F::Key, backends: &[SocketAddr]) -> Result<(), EbpfDatapathError> {
        self.generation = self.generation.wrapping_add(1);
        let generation = self.generation;
        // A Service port with more endpoints than fit in the count uses the first ones: still far more than it needs.
        let slots: Vec<F::Slot> =
            backends.iter().filter_map(|&backend| F::slot(backend, generation)).take(usize::from(u16::MAX)).collect();
        let count = u16::try_from(slots.len()).unwrap_or(u16::MAX);
        let mut run = None;
        if count > 0 {
            let full = || EbpfDatapathError::Full { backends: slots.len(), slots: self.backends.len() };
            run = Some(self.slots.take(count).ok_or_else(full)?);
        }
        if let Err(error) = self.write(key, run, &slots, count) {
            if let Some(run) = run {
                self.slots.release(run);
            }
            return Err(error);
        }
        self.release(key);
        self.programmed.insert(key, run);
        Ok(())
    }

    fn write(&mut self, key: F::Key, run: Option<Run>, slots: &[F::Slot], count: u16) -> Result<(), EbpfDatapathError> {
        let first = run.map_or(0, |run| run.first);
        for (at, slot) in (first..).zip(slots) {
            self.backends.set(at, slot, 0).map_err(map_error(F::BACKENDS))?;
        }
        let word = abi::Frontend::new(first, count, self.generation).to_bits();
        self.frontends.insert(key, word, 0).map_err(map_error(F::FRONTENDS))
    }

    fn release(&mut self, key: F::Key) {
        if let Some(Some(run)) = self.programmed.remove(&key) {
            self.slots.release(run);
        }
    }
}
