//! The demo's scenes as a test: needs root, cgroup2, containerd and the built programs (`make test` builds them).

use std::path::Path;

use edgemesh_demo::{Stage, play, scenes};

#[test]
fn every_scene_of_the_demo_holds() {
    let demo = Path::new(env!("CARGO_BIN_EXE_demo"));
    // Asked for when it runs: a program that was built from another checkout is no reason to look there.
    let root = Path::new(&std::env::var("CARGO_MANIFEST_DIR").unwrap()).join("../..").canonicalize().unwrap();
    let stage = Stage::new(&root, demo.parent().unwrap(), "test");
    let outcome = play::run_in_a_new_lab(&stage, &scenes::all(), false).unwrap();
    assert!(outcome.failed.is_empty(), "{:#?}", outcome.failed);
}
