//! The rules of the protocol, one by one.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod objects;

use std::{collections::BTreeMap, sync::Arc};

use edgemesh_api::link::{EdgeFrame, HubFrame, ToHub};
use edgemesh_link::{EdgeEffect, EdgePhase, EdgeSession, HubNode, Limits, Millis, edge_effect::HeldVersion};
use objects::{HubView, key, limits};

/// A node that is in step with an empty hub, after its first connection.
fn live_edge() -> (EdgeSession, HubNode, HubView) {
    let mut hub = HubNode::new("n", limits());
    let view = HubView(BTreeMap::new());
    let mut edge = EdgeSession::new("n", "t", limits(), 1);
    edge.tick(0);
    reconnect(&mut edge, &mut hub, &view, 0, 1);
    edge.digest_loaded(0, Ok(Vec::new()));
    hub.on_frame(0, 1, edge.next_frame(0).unwrap(), &view).unwrap();
    edge.on_frame(0, hub.next_frame(0, 1, &view).unwrap().unwrap());
    assert_eq!(edge.phase(), EdgePhase::Live);
    while edge.next_effect().is_some() {}
    (edge, hub, view)
}

fn reconnect(edge: &mut EdgeSession, hub: &mut HubNode, view: &HubView, now: Millis, epoch: u64) {
    hub.attach(now, epoch);
    edge.connected(now);
    hub.on_frame(now, epoch, edge.next_frame(now).unwrap(), view).unwrap();
    edge.on_frame(now, hub.next_frame(now, epoch, view).unwrap().unwrap());
}

fn asks_for_digest(edge: &mut EdgeSession) -> bool {
    std::iter::from_fn(|| edge.next_effect()).any(|effect| effect == EdgeEffect::LoadDigest)
}

#[test]
fn a_new_connection_says_what_the_node_holds_only_after_the_old_ones_transaction_has_ended() {
    let (mut edge, mut hub, mut view) = live_edge();
    view.set(&key(1), Some((1, 1)));
    hub.changed(&Arc::new(key(1)));
    edge.on_frame(0, hub.next_frame(0, 1, &view).unwrap().unwrap());
    assert!(matches!(edge.next_effect(), Some(EdgeEffect::Apply(_))));
    edge.disconnected(0, "broken");
    edge.tick(5_000);
    reconnect(&mut edge, &mut hub, &view, 5_000, 2);
    assert!(!asks_for_digest(&mut edge), "what is being committed would be missing in it");
    edge.applied(5_000, Ok(Vec::new()));
    assert!(asks_for_digest(&mut edge));
    assert!(edge.next_frame(5_000).is_none(), "an old session's batch must not be acknowledged in the new one");
}

#[test]
fn a_digest_that_was_read_for_an_older_connection_is_read_again() {
    let (mut edge, mut hub, view) = live_edge();
    edge.disconnected(0, "broken");
    edge.tick(5_000);
    reconnect(&mut edge, &mut hub, &view, 5_000, 2);
    assert!(asks_for_digest(&mut edge));
    edge.disconnected(5_000, "broken again");
    edge.tick(10_000);
    reconnect(&mut edge, &mut hub, &view, 10_000, 3);
    assert!(!asks_for_digest(&mut edge), "one is still being read");
    edge.digest_loaded(10_000, Ok(Vec::new()));
    assert!(edge.next_frame(10_000).is_none(), "the old one is not sent");
    assert!(asks_for_digest(&mut edge));
    edge.digest_loaded(10_000, Ok(Vec::new()));
    assert!(matches!(edge.next_frame(10_000).unwrap().frame, Some(HubFrame::Digest(_))));
}

#[test]
fn a_digest_that_names_what_the_hub_lacks_leads_to_its_deletion() {
    let mut hub = HubNode::new("n", limits());
    let view = HubView(BTreeMap::new());
    hub.attach(0, 1);
    let mut edge = EdgeSession::new("n", "t", limits(), 1);
    edge.tick(0);
    edge.connected(0);
    hub.on_frame(0, 1, edge.next_frame(0).unwrap(), &view).unwrap();
    edge.on_frame(0, hub.next_frame(0, 1, &view).unwrap().unwrap());
    let held = HeldVersion { key: key(1), uid: "u".into(), origin_version: "5".into() };
    edge.digest_loaded(0, Ok(vec![held]));
    hub.on_frame(0, 1, edge.next_frame(0).unwrap(), &view).unwrap();
    let frame = hub.next_frame(0, 1, &view).unwrap().unwrap();
    let Some(EdgeFrame::Batch(batch)) = frame.frame else { panic!("{frame:?}") };
    assert_eq!(batch.changes.len(), 1);
    assert_eq!(batch.changes[0].object, None);
}

#[test]
fn a_half_open_connection_is_found_by_both_ends_within_fifteen_seconds() {
    let mut hub = HubNode::new("n", Limits::default());
    let view = HubView(BTreeMap::new());
    hub.attach(0, 1);
    let mut edge = EdgeSession::new("n", "t", Limits::default(), 1);
    edge.tick(0);
    edge.connected(0);
    hub.on_frame(0, 1, edge.next_frame(0).unwrap(), &view).unwrap();
    edge.on_frame(0, hub.next_frame(0, 1, &view).unwrap().unwrap());
    edge.digest_loaded(0, Ok(Vec::new()));
    hub.on_frame(0, 1, edge.next_frame(0).unwrap(), &view).unwrap();
    edge.on_frame(0, hub.next_frame(0, 1, &view).unwrap().unwrap());
    assert_eq!(edge.phase(), EdgePhase::Live);
    let (mut edge_at, mut hub_at) = (None, None);
    for now in (0..15_000).step_by(100) {
        edge.tick(now);
        if edge_at.is_none() && matches!(edge.phase(), EdgePhase::Waiting(_)) {
            edge_at = Some(now);
        }
        if hub_at.is_none() && hub.tick(now, 1).is_err() {
            hub_at = Some(now);
        }
    }
    assert!(edge_at.is_some() && hub_at.is_some(), "{edge_at:?} {hub_at:?}");
}

#[test]
fn an_older_session_of_the_node_is_told_that_it_was_replaced() {
    let mut hub = HubNode::new("n", limits());
    let view = HubView(BTreeMap::new());
    hub.attach(0, 1);
    hub.attach(0, 2);
    let late = ToHub::from(HubFrame::Heartbeat(edgemesh_api::link::Heartbeat {}));
    assert_eq!(hub.on_frame(0, 1, late, &view), Err(edgemesh_link::Fault::Replaced));
    hub.detach(1);
    assert!(hub.current(2), "the end of the old connection must not end the new session");
}
