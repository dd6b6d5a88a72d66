//! The frontends and backends of one address family in the kernel's maps.

use std::{
    collections::HashMap,
    hash::Hash,
    net::{SocketAddr, SocketAddrV4, SocketAddrV6},
    sync::Arc,
    time::Duration,
};

use aya::{
    Ebpf, Pod,
    maps::{Array, HashMap as BpfHashMap, MapData, PerCpuHashMap},
};
use edgemesh_ebpf_abi as abi;
use edgemesh_mesh::model::Protocol;

use super::{
    ebpf::{EbpfDatapathError, map_error, take_map},
    map_sizes::MapSizes,
    plan::{Frontend, Plan, Target},
    slots::{Run, Slots},
};

/// An address family's maps and the form of what is in them.
pub(super) trait Family {
    /// Key of a frontend.
    type Key: Pod + Eq + Hash;
    /// A backend's slot.
    type Slot: Pod + Eq + Hash;
    /// Address and port.
    type Address: Copy;
    /// Name of the frontends' map.
    const FRONTENDS: &'static str;
    /// Name of the backends' map.
    const BACKENDS: &'static str;
    /// Name of the map of what became of calls.
    const CALLS: &'static str;

    /// The key of a frontend.
    fn key(address: Self::Address, protocol: Protocol) -> Self::Key;
    /// A backend in a slot; nothing for one of the other family.
    fn slot(backend: SocketAddr, generation: u16) -> Option<Self::Slot>;
    /// The slot behind the backends of a frontend with affinity.
    fn timeout(seconds: u32, generation: u16) -> Self::Slot;
    /// The frontend of a key; nothing if it has a protocol that we never write.
    fn frontend(key: Self::Key) -> Option<Frontend>;
    /// The backend in a slot of the generation.
    fn backend(slot: Self::Slot, generation: u16) -> Option<SocketAddr>;
    /// The timeout in the slot behind the backends.
    fn seconds(slot: Self::Slot, generation: u16) -> Option<u32>;
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
    const CALLS: &'static str = abi::CALLS;

    fn key(address: SocketAddrV4, protocol: Protocol) -> u64 {
        let address = abi::SocketAddress::new(address.ip().octets(), address.port());
        abi::FrontendKey::new(address, protocol_number(protocol)).to_bits()
    }

    fn slot(backend: SocketAddr, generation: u16) -> Option<u64> {
        let SocketAddr::V4(backend) = backend else { return None };
        let address = abi::SocketAddress::new(backend.ip().octets(), backend.port());
        Some(abi::Backend::new(address, generation).to_bits())
    }

    fn timeout(seconds: u32, generation: u16) -> u64 {
        abi::Backend::timeout(seconds, generation).to_bits()
    }

    fn frontend(key: u64) -> Option<Frontend> {
        let key = abi::FrontendKey::from_bits(key);
        let address = SocketAddr::from((key.address().octets(), key.address().port()));
        Some(Frontend { address, protocol: protocol(key.protocol())? })
    }

    fn backend(slot: u64, generation: u16) -> Option<SocketAddr> {
        let backend = abi::Backend::from_bits(slot);
        let address = SocketAddr::from((backend.address().octets(), backend.address().port()));
        (backend.generation() == generation).then_some(address)
    }

    fn seconds(slot: u64, generation: u16) -> Option<u32> {
        let slot = abi::Backend::from_bits(slot);
        (slot.generation() == generation).then(|| slot.seconds())
    }
}

impl Family for V6 {
    type Key = [u64; 3];
    type Slot = [u64; 3];
    type Address = SocketAddrV6;
    const FRONTENDS: &'static str = abi::FRONTENDS6;
    const BACKENDS: &'static str = abi::BACKENDS6;
    const CALLS: &'static str = abi::CALLS6;

    fn key(address: SocketAddrV6, protocol: Protocol) -> [u64; 3] {
        let address = abi::SocketAddress6::new(address.ip().octets(), address.port());
        abi::FrontendKey6::new(address, protocol_number(protocol)).to_words()
    }

    fn slot(backend: SocketAddr, generation: u16) -> Option<[u64; 3]> {
        let SocketAddr::V6(backend) = backend else { return None };
        let address = abi::SocketAddress6::new(backend.ip().octets(), backend.port());
        Some(abi::Backend6::new(address, generation).to_words())
    }

    fn timeout(seconds: u32, generation: u16) -> [u64; 3] {
        abi::Backend6::timeout(seconds, generation).to_words()
    }

    fn frontend(key: [u64; 3]) -> Option<Frontend> {
        let key = abi::FrontendKey6::from_words(key);
        let address = SocketAddr::from((key.address().octets(), key.address().port()));
        Some(Frontend { address, protocol: protocol(key.protocol())? })
    }

    fn backend(slot: [u64; 3], generation: u16) -> Option<SocketAddr> {
        let address = abi::Backend6::from_words(slot).address(generation)?;
        Some(SocketAddr::from((address.octets(), address.port())))
    }

    fn seconds(slot: [u64; 3], generation: u16) -> Option<u32> {
        abi::Backend6::from_words(slot).seconds(generation)
    }
}

/// The protocol's number in IP headers, in maps and in rules.
pub(super) fn protocol_number(protocol: Protocol) -> u8 {
    match protocol {
        Protocol::Tcp => abi::TCP,
        Protocol::Udp => abi::UDP,
    }
}

fn protocol(number: u8) -> Option<Protocol> {
    match number {
        abi::TCP => Some(Protocol::Tcp),
        abi::UDP => Some(Protocol::Udp),
        _ => None,
    }
}

/// What a run of slots holds, without its generation.
#[derive(Debug, PartialEq, Eq, Hash)]
struct Contents<S> {
    /// The backends, and behind them the timeout if clients keep theirs.
    slots: Vec<S>,
    sticky: bool,
    listener: bool,
}

impl<S> Contents<S> {
    /// What a target needs, in slots of a generation; no slots if it has no backends of this family.
    fn of<F: Family<Slot = S>>(target: &Target, generation: u16) -> Self {
        let affinity = target.affinity().filter(|timeout| !timeout.is_zero());
        // A Service port with more endpoints than fit in the count uses the first ones: still far more than it needs.
        let most = if affinity.is_some() { abi::MAX_AFFINITY_BACKENDS } else { u16::MAX - 1 };
        let backends = target.backends().iter().filter_map(|&backend| F::slot(backend, generation));
        let mut slots: Vec<S> = backends.take(usize::from(most)).collect();
        let affinity = affinity.filter(|_| !slots.is_empty());
        if let Some(timeout) = affinity {
            slots.push(F::timeout(u32::try_from(timeout.as_secs()).unwrap_or(u32::MAX), generation));
        }
        Self { slots, sticky: affinity.is_some(), listener: matches!(target, Target::Listener(_)) }
    }
}

/// To what a frontend leads, unless it leads nowhere.
type Led<S> = Option<Arc<Contents<S>>>;

/// A run, to which all frontends lead that have the same backends: the cluster address of a Service port and its node ports.
#[derive(Debug)]
struct Shared {
    run: Run,
    /// What leads there.
    frontend: abi::Frontend,
    users: u32,
}

/// What is in the maps of one family.
pub(super) struct Table<F: Family> {
    frontends: BpfHashMap<MapData, F::Key, u64>,
    backends: Array<MapData, F::Slot>,
    calls: PerCpuHashMap<MapData, F::Key, [u64; 2]>,
    slots: Slots,
    generation: u16,
    programmed: HashMap<F::Key, Led<F::Slot>>,
    shared: HashMap<Arc<Contents<F::Slot>>, Shared>,
}

impl<F: Family> Table<F> {
    /// The maps of an object that was just loaded.
    pub(super) fn take(ebpf: &mut Ebpf) -> Result<Self, EbpfDatapathError> {
        let backends = Array::try_from(take_map(ebpf, F::BACKENDS)?).map_err(map_error(F::BACKENDS))?;
        Ok(Self {
            frontends: BpfHashMap::try_from(take_map(ebpf, F::FRONTENDS)?).map_err(map_error(F::FRONTENDS))?,
            slots: Slots::new(backends.len()),
            backends,
            calls: PerCpuHashMap::try_from(take_map(ebpf, F::CALLS)?).map_err(map_error(F::CALLS))?,
            generation: 0,
            programmed: HashMap::new(),
            shared: HashMap::new(),
        })
    }

    /// Takes over what an earlier agent left in the maps, and adds it to `plan`. What can't be read is there as refused, so
    /// that it is written anew or removed. What was counted of frontends that are gone is forgotten.
    pub(super) fn adopt(&mut self, plan: &mut Plan) {
        // There are no more than that: the walk ends, though it begins anew where the frontend at which it stands is removed.
        let most = self.backends.len().max(MapSizes::LEAST_FRONTENDS) as usize;
        let mut runs: HashMap<u64, Option<Target>> = HashMap::new();
        let frontends: Vec<(F::Key, u64)> = self.frontends.iter().take(most).flatten().collect();
        for (key, word) in frontends {
            let frontend = abi::Frontend::from_bits(word);
            // Newer ones than any that is there: no slot is taken for another one's.
            self.generation = self.generation.max(frontend.generation());
            let target = runs.entry(word).or_insert_with(|| self.adopt_run(frontend)).clone();
            let contents = target.as_ref().and_then(|target| self.lead(&Contents::of::<F>(target, 0)));
            let shared = contents.as_ref().and_then(|contents| self.shared.get(contents));
            let leads = shared.map_or(abi::Frontend::new(0, 0, frontend.generation()), |shared| shared.frontend);
            if leads != frontend {
                // What it led to is another one's from now on. If it can't be written, the next change of it will be.
                drop(self.frontends.insert(key, leads.to_bits(), 0));
            }
            self.programmed.insert(key, contents);
            if let Some(adopted) = F::frontend(key) {
                plan.insert(adopted, target.unwrap_or(Target::Refuse));
            }
        }
        let called = self.calls.keys().take(most).flatten();
        let left: Vec<F::Key> = called.filter(|key| !self.programmed.contains_key(key)).collect();
        left.iter().for_each(|key| self.forget_calls(key));
    }

    /// Takes the slots over to which a frontend leads; nothing if there are none, or they are not to be read.
    fn adopt_run(&mut self, frontend: abi::Frontend) -> Option<Target> {
        let slots = frontend.count().saturating_add(u16::from(frontend.has_affinity()));
        let run = if slots > 0 { self.slots.take_at(frontend.first(), slots)? } else { return None };
        let target = self.read(frontend);
        let contents = target.as_ref().map(|target| Contents::of::<F>(target, 0));
        match contents {
            // The second run of these contents is not needed.
            Some(contents) if !self.shared.contains_key(&contents) => {
                self.shared.insert(Arc::new(contents), Shared { run, frontend, users: 0 });
            }
            _ => self.slots.release(run),
        }
        target
    }

    /// Counts one more frontend that leads to what is there, if it is.
    fn lead(&mut self, contents: &Contents<F::Slot>) -> Led<F::Slot> {
        let known = self.shared.get_key_value(contents).map(|(known, _)| Arc::clone(known))?;
        self.shared.get_mut(&known)?.users += 1;
        Some(known)
    }

    /// Forgets what was counted at a frontend.
    pub(super) fn forget_calls(&mut self, key: &F::Key) {
        // Most frontends were never called.
        drop(self.calls.remove(key));
    }

    fn read(&self, frontend: abi::Frontend) -> Option<Target> {
        let slot = |offset: u16| self.backends.get(&(frontend.first() + u32::from(offset)), 0).ok();
        let backend = |offset| F::backend(slot(offset)?, frontend.generation());
        let backends = (0..frontend.count()).map(backend).collect::<Option<Vec<_>>>()?;
        if frontend.is_listener() {
            return backends.first().copied().map(Target::Listener);
        }
        if !frontend.has_affinity() {
            return Some(Target::Direct(backends));
        }
        let seconds = F::seconds(slot(frontend.count())?, frontend.generation())?;
        Some(Target::Sticky(backends, Duration::from_secs(u64::from(seconds))))
    }

    /// How many frontends there are.
    pub(super) fn len(&self) -> usize {
        self.programmed.len()
    }

    /// How many slots are in use, and how many there are.
    pub(super) fn slots(&self) -> (u32, u32) {
        (self.slots.used(), self.backends.len())
    }

    /// Takes a frontend out.
    pub(super) fn remove(&mut self, key: F::Key) -> Result<(), EbpfDatapathError> {
        if self.programmed.contains_key(&key) {
            self.frontends.remove(&key).map_err(map_error(F::FRONTENDS))?;
            self.forget_calls(&key);
            self.release(key);
        }
        Ok(())
    }

    /// Writes one frontend. The backends go to slots of their own, unless they are in some already; then the frontend leads
    /// there, then its old slots are free if no other frontend leads to them. Backends of the other family are left out.
    pub(super) fn set(&mut self, key: F::Key, target: &Target) -> Result<(), EbpfDatapathError> {
        if !self.programmed.contains_key(&key) {
            // A program that had the frontend in hand when it was removed may have counted after that.
            self.forget_calls(&key);
        }
        let wanted = Contents::of::<F>(target, 0);
        let contents = match self.lead(&wanted) {
            None if !wanted.slots.is_empty() => Some(self.write(target, wanted)?),
            there => there,
        };
        let shared = contents.as_ref().and_then(|contents| self.shared.get(contents));
        let frontend = shared.map_or(abi::Frontend::new(0, 0, self.generation), |shared| shared.frontend);
        let led = self.frontends.insert(key, frontend.to_bits(), 0).map_err(map_error(F::FRONTENDS));
        let left = match led {
            Ok(()) => self.programmed.insert(key, contents).flatten(),
            Err(_) => contents,
        };
        self.leave(left);
        led
    }

    /// Writes the backends of a target, whose contents are given, to slots of their own, for one frontend.
    fn write(
        &mut self,
        target: &Target,
        contents: Contents<F::Slot>,
    ) -> Result<Arc<Contents<F::Slot>>, EbpfDatapathError> {
        self.generation = self.generation.wrapping_add(1);
        let Contents { slots, sticky, listener } = Contents::of::<F>(target, self.generation);
        let length = u16::try_from(slots.len()).unwrap_or(u16::MAX);
        let full = || EbpfDatapathError::Full { backends: slots.len(), slots: self.backends.len() };
        let run = self.slots.take(length).ok_or_else(full)?;
        for (at, slot) in (run.first..).zip(&slots) {
            if let Err(error) = self.backends.set(at, slot, 0) {
                self.slots.release(run);
                return Err(map_error(F::BACKENDS)(error));
            }
        }
        let mut frontend = abi::Frontend::new(run.first, length - u16::from(sticky), self.generation);
        if sticky {
            frontend = frontend.with_affinity();
        }
        if listener {
            frontend = frontend.with_listener();
        }
        let contents = Arc::new(contents);
        self.shared.insert(Arc::clone(&contents), Shared { run, frontend, users: 1 });
        Ok(contents)
    }

    fn release(&mut self, key: F::Key) {
        let left = self.programmed.remove(&key).flatten();
        self.leave(left);
    }

    /// Counts one frontend less that leads to some slots. They are free when it was the last.
    fn leave(&mut self, contents: Led<F::Slot>) {
        let Some(contents) = contents else { return };
        let Some(shared) = self.shared.get_mut(&contents) else { return };
        shared.users -= 1;
        if shared.users == 0 {
            self.slots.release(shared.run);
            self.shared.remove(&contents);
        }
    }
}
