#![no_std]
#![no_main]
//! Hands what is sent to pods of other networks to the agent's listeners, on whatever port: it answers the kernel's question
//! which socket a packet is for that belongs to no connection yet. An object of its own, so that the maps of the socket load
//! balancing are not made twice.

use aya_ebpf::{
    EbpfContext,
    bindings::{bpf_sk_lookup, sk_action},
    macros::{map, sk_lookup},
    maps::{LpmTrie, SockMap, lpm_trie::Key},
    programs::SkLookupContext,
};
use edgemesh_ebpf_abi::{CaptureSocket, MAX_CAPTURED, TCP, UDP};

/// IPv4 ranges that are captured.
#[map]
static CAPTURED: LpmTrie<[u8; 4], u8> = LpmTrie::with_max_entries(MAX_CAPTURED, 0);

/// As [`CAPTURED`], for IPv6.
#[map]
static CAPTURED6: LpmTrie<[u8; 16], u8> = LpmTrie::with_max_entries(MAX_CAPTURED, 0);

/// The agent's listeners, by [`CaptureSocket`].
#[map]
static LISTENERS: SockMap = SockMap::with_max_entries(CaptureSocket::ALL.len() as u32, 0);

const AF_INET: u32 = 2;
const AF_INET6: u32 = 10;

/// For a captured address there is our listener or nothing: without the agent, clients are refused and never reach what else
/// listens on this host.
#[sk_lookup]
fn capture(ctx: SkLookupContext) -> u32 {
    let lookup: *const bpf_sk_lookup = ctx.as_ptr().cast();
    // SAFETY: the kernel passes this structure to programs of this type; each field is read as a whole.
    let (family, protocol) = unsafe { ((&raw const (*lookup).family).read(), (&raw const (*lookup).protocol).read()) };
    let (tcp, udp) = match family {
        AF_INET => (CaptureSocket::Tcp4, CaptureSocket::Udp4),
        AF_INET6 => (CaptureSocket::Tcp6, CaptureSocket::Udp6),
        _ => return sk_action::SK_PASS,
    };
    let listener = match protocol {
        protocol if protocol == TCP as u32 => tcp,
        protocol if protocol == UDP as u32 => udp,
        _ => return sk_action::SK_PASS,
    };
    if !is_captured(lookup, family) {
        return sk_action::SK_PASS;
    }
    match LISTENERS.redirect_sk_lookup(&ctx, listener as u32, 0) {
        Ok(()) => sk_action::SK_PASS,
        Err(_) => sk_action::SK_DROP,
    }
}

#[inline(always)]
fn is_captured(lookup: *const bpf_sk_lookup, family: u32) -> bool {
    if family == AF_INET {
        // SAFETY: as above.
        let address = unsafe { (&raw const (*lookup).local_ip4).read() };
        return CAPTURED.get(Key::new(32, address.to_ne_bytes())).is_some();
    }
    let mut address = [0; 16];
    // SAFETY: as above; the kernel wants the words read one by one.
    let words = unsafe {
        let words = (&raw const (*lookup).local_ip6).cast::<u32>();
        [
            words.read_volatile(),
            words.add(1).read_volatile(),
            words.add(2).read_volatile(),
            words.add(3).read_volatile(),
        ]
    };
    address[..4].copy_from_slice(&words[0].to_ne_bytes());
    address[4..8].copy_from_slice(&words[1].to_ne_bytes());
    address[8..12].copy_from_slice(&words[2].to_ne_bytes());
    address[12..].copy_from_slice(&words[3].to_ne_bytes());
    CAPTURED6.get(Key::new(128, address)).is_some()
}

#[cfg(not(test))]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// The helpers that the program calls are for programs under a licence that is compatible with the GPL.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 4] = *b"GPL\0";
