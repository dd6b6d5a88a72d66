//! How much room the maps of the eBPF programs have. The kernel gives it to them in full when they are made.

use edgemesh_ebpf_abi as abi;
use nix::sys::sysinfo::sysinfo;

/// Room for 10,000 Services with two ports and ten endpoints each.
const LARGE: u32 = 524_288;
/// Half of that, for small machines.
const SMALL: u32 = LARGE / 2;
/// From so much memory on a machine is not small, in bytes.
const NOT_SMALL: u64 = 2 << 30;

/// How many elements the maps have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MapSizes {
    slots: u32,
}

impl MapSizes {
    /// The numbers of backend slots that can be asked for; they are powers of two.
    pub const SLOTS: std::ops::RangeInclusive<u32> = 16..=abi::Frontend::MAX_SLOT + 1;

    /// There is room for so many frontends however few slots there are.
    pub(super) const LEAST_FRONTENDS: u32 = 64;

    /// With so many slots for IPv4 backends; 0 for as many as suit this machine's memory.
    pub fn new(slots: u32) -> Self {
        let by_memory = || {
            // A machine that doesn't tell is taken for a small one.
            let memory = sysinfo().map_or(0, |known| known.ram_total());
            if memory < NOT_SMALL { SMALL } else { LARGE }
        };
        let slots = if slots == 0 { by_memory() } else { slots };
        Self { slots: slots.next_power_of_two().clamp(*Self::SLOTS.start(), *Self::SLOTS.end()) }
    }

    /// Slots for IPv4 backends.
    pub(super) fn slots(self) -> u32 {
        self.slots
    }

    /// Slots for IPv6 backends: they are three times as large, and fewer Services have such.
    pub(super) fn slots6(self) -> u32 {
        self.slots / 2
    }

    /// Frontends of each family.
    pub(super) fn frontends(self) -> u32 {
        (self.slots / 4).max(Self::LEAST_FRONTENDS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_asked_for_is_given_and_else_what_suits_the_memory() {
        assert_eq!(MapSizes::new(16), MapSizes { slots: 16 });
        assert_eq!(MapSizes::new(u32::MAX / 2), MapSizes { slots: 1 << 24 });
        assert!([SMALL, LARGE].contains(&MapSizes::new(0).slots));
    }
}
