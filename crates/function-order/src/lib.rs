//! For build scripts: has the linker put the functions that an idle daemon runs side by side.
//!
//! A daemon at rest runs 2,000 of 40,000 functions again and again. Where the compiler leaves them they are spread over all of its code, the
//! kernel maps sixteen pages around each page that is touched, and most of the program is resident for a small part of it.

use std::{env, fmt::Write as _, fs, path::PathBuf};

/// Puts the functions that `lists/PACKAGE.txt` names into a section of their own, in its order, in optimised builds. A name that is not,
/// or no longer, in the program changes nothing but where others lie.
///
/// # Panics
/// When the list can't be read or the linker's script not be written: the build ends and says why.
pub fn link_in_order() {
    let variable = |name: &str| env::var(name).unwrap_or_default();
    // Names differ by target, and the script is one that LLVM's linker takes, Rust's own on this one.
    let target = variable("TARGET");
    let list = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("lists").join(variable("CARGO_PKG_NAME") + ".txt");
    tell(&format!("rerun-if-changed={}", list.display()));
    if variable("PROFILE") == "release" && target == "x86_64-unknown-linux-gnu" && list.is_file() {
        let names = fs::read_to_string(&list).unwrap_or_else(|error| panic!("{}: {error}", list.display()));
        let to = PathBuf::from(variable("OUT_DIR")).join("function-order.ld");
        fs::write(&to, script(&names)).unwrap_or_else(|error| panic!("{}: {error}", to.display()));
        tell(&format!("rustc-link-arg-bins=-Wl,--script={}", to.display()));
    }
}

/// What is added to the linker's own layout. The compiler gives each function a section of its name, another one if it takes it for
/// unlikely to be run, and adds a number to the name that the folder of the checkout decides about where another part
/// of the program calls what was private.
fn script(names: &str) -> String {
    let mut script = String::from("SECTIONS { .text.idle : { *(\n");
    for name in names.lines() {
        for section in [".text", ".text.unlikely"] {
            let _ = writeln!(script, "{section}.{name} {section}.{name}.llvm.*");
        }
    }
    script + ") } } INSERT BEFORE .text;\n"
}

#[allow(clippy::print_stdout)]
fn tell(instruction: &str) {
    println!("cargo:{instruction}");
}

#[cfg(test)]
mod tests {
    use super::script;

    #[test]
    fn each_name_stands_for_itself_and_for_what_was_private_likely_or_not() {
        let expected = "SECTIONS { .text.idle : { *(\n\
                        .text._ZN1a17h*E .text._ZN1a17h*E.llvm.*\n\
                        .text.unlikely._ZN1a17h*E .text.unlikely._ZN1a17h*E.llvm.*\n\
                        ) } } INSERT BEFORE .text;\n";
        assert_eq!(script("_ZN1a17h*E\n"), expected);
    }
}
