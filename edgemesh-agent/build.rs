//! Builds the eBPF programs with a compiler that has the BPF targets, and hands the object to the crate; puts functions that run
//! while nothing happens side by side.
//!
//! Two ways lead there: Debian's rustc, which carries a precompiled `core` for BPF, or a rustup nightly with `rust-src`.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
};

const HOW_TO: &str = "\
The eBPF programs of edgemesh-agent need a Rust compiler for the BPF target and bpf-linker. Either
  Debian:  apt-get install rustc-web libstd-rust-web-dev-bpf llvm-22-dev libpolly-22-dev
           LLVM_PREFIX=/usr/lib/llvm-22 PATH=/usr/lib/llvm-22/bin:$PATH \\
             cargo install bpf-linker --version 0.13.0 --locked --no-default-features --features llvm-22
  rustup:  rustup toolchain install nightly --component rust-src
           cargo install bpf-linker --locked
EDGEMESH_BPF_RUSTC names another rustc that has the target bpfel-unknown-none.";

/// A compiler for the BPF target.
enum Compiler {
    /// A rustc with `core` for BPF.
    Precompiled(PathBuf),
    /// A rustup nightly that builds `core` from `rust-src`.
    Nightly,
}

#[allow(clippy::print_stderr)]
fn main() -> ExitCode {
    edgemesh_function_order::link_in_order();
    match build() {
        Ok(()) => ExitCode::SUCCESS,
        Err(problem) => {
            eprintln!("{problem}");
            ExitCode::FAILURE
        }
    }
}

fn build() -> Result<(), String> {
    let manifest_dir = PathBuf::from(variable("CARGO_MANIFEST_DIR")?);
    let out_dir = PathBuf::from(variable("OUT_DIR")?);
    let ebpf = manifest_dir.parent().ok_or("edgemesh-agent has no parent folder")?.join("ebpf");
    for watched in ["abi/src", "abi/Cargo.toml", "programs/src", "programs/Cargo.toml", "programs/Cargo.lock"] {
        println!("cargo:rerun-if-changed={}", ebpf.join(watched).display());
    }
    println!("cargo:rerun-if-env-changed=EDGEMESH_BPF_RUSTC");

    let target = match variable("CARGO_CFG_TARGET_ENDIAN")?.as_str() {
        "big" => "bpfeb-unknown-none",
        _ => "bpfel-unknown-none",
    };
    let linker = find_linker().ok_or_else(|| format!("bpf-linker was not found.\n{HOW_TO}"))?;
    let compiler = find_compiler(target).ok_or_else(|| format!("No compiler for {target} was found.\n{HOW_TO}"))?;

    let target_dir = out_dir.join("ebpf");
    let mut cargo = match compiler {
        Compiler::Precompiled(rustc) => {
            let mut cargo = Command::new(variable("CARGO")?);
            clean(&mut cargo);
            // The BPF target is not a stable one.
            cargo.env("RUSTC", rustc).env("RUSTC_BOOTSTRAP", "1");
            cargo.arg("build");
            cargo
        }
        Compiler::Nightly => {
            let mut rustup = Command::new("rustup");
            clean(&mut rustup);
            rustup.args(["run", "nightly", "cargo", "build", "-Zbuild-std=core"]);
            rustup
        }
    };
    let flags = [
        format!("--cfg=bpf_target_arch=\"{}\"", variable("CARGO_CFG_TARGET_ARCH")?),
        "-Cdebuginfo=2".to_owned(),
        "-Clink-arg=--btf".to_owned(),
        format!("-Clinker={}", linker.display()),
    ];
    cargo
        .args(["--release", "--locked", "--target", target, "--target-dir"])
        .arg(&target_dir)
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"))
        .current_dir(ebpf.join("programs"));
    let output = cargo.output().map_err(|error| format!("cargo for the eBPF programs did not start: {error}"))?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr);
        return Err(format!("The eBPF programs did not build ({}):\n{text}\n{HOW_TO}", output.status));
    }
    for program in ["edgemesh-ebpf", "edgemesh-capture"] {
        let built = target_dir.join(target).join("release").join(program);
        let object = out_dir.join(format!("{program}.o"));
        fs::copy(&built, &object).map_err(|error| format!("{}: {error}", built.display()))?;
    }
    Ok(())
}

/// Takes out what cargo and rustup set for this build: it is about another target and another compiler.
fn clean(command: &mut Command) {
    for (name, _) in env::vars_os() {
        let Some(text) = name.to_str() else { continue };
        let kept = ["CARGO_HOME", "CARGO_NET_", "CARGO_HTTP_", "CARGO_REGISTR", "RUSTUP_HOME"];
        let about_the_build = ["CARGO", "RUST", "__CARGO"].iter().any(|prefix| text.starts_with(prefix));
        if about_the_build && !kept.iter().any(|prefix| text.starts_with(prefix)) {
            command.env_remove(&name);
        }
    }
}

fn find_compiler(target: &str) -> Option<Compiler> {
    let named = env::var_os("EDGEMESH_BPF_RUSTC").map(PathBuf::from);
    let candidates = named.into_iter().chain(["/usr/bin/rustc".into()]).chain(on_path("rustc"));
    for rustc in candidates {
        let mut command = Command::new(&rustc);
        clean(&mut command);
        let Ok(output) = command.args(["--print", "target-libdir", "--target", target]).output() else { continue };
        let folder = PathBuf::from(String::from_utf8_lossy(&output.stdout).trim());
        if output.status.success() && has_core(&folder) {
            return Some(Compiler::Precompiled(rustc));
        }
    }
    let mut command = Command::new("rustup");
    clean(&mut command);
    let output = command.args(["run", "nightly", "rustc", "--print", "sysroot"]).output().ok()?;
    let sysroot = PathBuf::from(String::from_utf8_lossy(&output.stdout).trim());
    let source = sysroot.join("lib/rustlib/src/rust/library/core/Cargo.toml");
    (output.status.success() && source.is_file()).then_some(Compiler::Nightly)
}

fn has_core(folder: &Path) -> bool {
    let Ok(entries) = fs::read_dir(folder) else { return false };
    entries.flatten().any(|entry| entry.file_name().to_string_lossy().starts_with("libcore-"))
}

fn find_linker() -> Option<PathBuf> {
    let home = env::var_os("CARGO_HOME").map(PathBuf::from);
    let home = home.or_else(|| env::var_os("HOME").map(|home| PathBuf::from(home).join(".cargo")));
    on_path("bpf-linker").or_else(|| home.map(|home| home.join("bin/bpf-linker")).filter(|linker| linker.is_file()))
}

fn on_path(program: &str) -> Option<PathBuf> {
    env::split_paths(&env::var_os("PATH")?).map(|folder| folder.join(program)).find(|path| path.is_file())
}

fn variable(name: &str) -> Result<String, String> {
    env::var(name).map_err(|error| format!("{name}: {error}"))
}
