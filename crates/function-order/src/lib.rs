//! For build scripts: has the linker put the functions that an idle daemon runs side by side.
//!
//! A daemon at rest runs 2,000 of 40,000 functions again and again. Where the compiler leaves them they are spread over all of its code, the
//! kernel maps sixteen pages around each page that is touched, and most of the program is resident for a small part of it.

use std::{env, path::PathBuf};

/// Asks the linker for the order in `lists/PACKAGE.txt`, in optimised builds. A function that is not in the list, or no longer
/// in the program, changes nothing but where others lie. The compiler's names have hashes of its version, of the library's, and, for the
/// workspace's own crates and what is generic and made there, of the folder of the checkout.
pub fn link_in_order() {
    let variable = |name: &str| env::var(name).unwrap_or_default();
    // Names differ by target, and only LLVM's linker, Rust's own on this one, takes such a list.
    let target = variable("TARGET");
    let list = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("lists").join(variable("CARGO_PKG_NAME") + ".txt");
    tell(&format!("rerun-if-changed={}", list.display()));
    if variable("PROFILE") == "release" && target == "x86_64-unknown-linux-gnu" && list.is_file() {
        tell(&format!("rustc-link-arg-bins=-Wl,--symbol-ordering-file={}", list.display()));
        tell("rustc-link-arg-bins=-Wl,--no-warn-symbol-ordering");
    }
}

#[allow(clippy::print_stdout)]
fn tell(instruction: &str) {
    println!("cargo:{instruction}");
}
