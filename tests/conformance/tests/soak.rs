//! The soak in its short form: twenty seconds in one datapath mode. `make soak` is the long one, in all modes.

#![allow(clippy::unwrap_used, reason = "a test ends where something fails")]

use std::time::Duration;

use edgemesh_conformance::{Field, field::MODES, soak};

#[test]
fn endpoints_come_and_go_under_load_and_no_call_of_a_healthy_service_fails() {
    let field = Field::up_for_test("soaktest", MODES[0]).unwrap();
    let report = soak::run(&field, Duration::from_secs(20));
    field.down().unwrap();
    let report = report.unwrap();
    assert!(report.violations().is_empty(), "{:#?}\n{}", report.violations(), report.text());
}
