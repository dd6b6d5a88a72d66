//! A short form of `make soak`. Needs root, cgroup2, containerd and the built programs (`make test` builds them).

use std::{path::Path, time::Duration};

use edgemesh_conformance::{Field, field::MODES, soak};

#[test]
fn endpoints_that_come_and_go_under_load_fail_no_call_and_leave_nothing() {
    let soak_program = Path::new(env!("CARGO_BIN_EXE_soak"));
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap();
    let field = Field::up("soaktest", MODES[0], soak_program.parent().unwrap(), &root).unwrap();
    let report = soak::run(&field, Duration::from_secs(20));
    field.down().unwrap();
    let report = report.unwrap();
    assert!(report.violations().is_empty(), "{:#?}\n{}", report.violations(), report.text());
}
