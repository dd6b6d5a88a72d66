//! Serves one connection of a node: carries frames between the connection and the node's protocol state.

use std::{sync::Arc, time::Duration};

use edgemesh_api::link::{EdgeFrame, ToEdge, ToHub};
use edgemesh_link::{
    Fault, frames,
    hub_session::{HubEvent, refusal},
    transport::{Connection, Event},
};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_util::sync::CancellationToken;

use crate::{
    desired::NodeView,
    metrics::{Metrics, Outcome},
    nodes::{Nodes, Slot},
    writes::Writer,
};

/// How long saying goodbye may take.
const CLOSE_DEADLINE: Duration = Duration::from_secs(1);

/// What serving a connection needs.
#[derive(Clone)]
pub(crate) struct Sessions {
    pub(crate) nodes: Arc<Nodes>,
    pub(crate) writer: Writer,
    pub(crate) metrics: Metrics,
    pub(crate) stopping: CancellationToken,
}

impl Sessions {
    /// Serves the node's connection until it ends.
    pub(crate) async fn serve<S>(&self, node: &str, mut connection: Connection<S>)
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let (slot, epoch) = self.nodes.attach(node);
        self.metrics.sessions_started.inc();
        tracing::info!(node, epoch, "a node connected");
        let fault = self.drive(&slot, epoch, &mut connection).await;
        self.nodes.detach(&slot, epoch);
        // A wake-up that this task took may have been meant for the session that replaced this one.
        slot.wake.notify_one();
        self.metrics.sessions_ended.get_or_create(&Outcome { result: fault.label() }).inc();
        tracing::info!(node, epoch, %fault, "a node's connection ended");
        let goodbye = (!matches!(fault, Fault::Transport(_) | Fault::Silent(_))).then(|| refusal(&fault));
        connection.close(goodbye.as_ref(), CLOSE_DEADLINE).await;
    }

    async fn drive<S>(&self, slot: &Arc<Slot>, epoch: u64, connection: &mut Connection<S>) -> Fault
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let view = NodeView { desired: &self.nodes.desired, node: &slot.node };
        let mut ready: Option<ToEdge> = None;
        loop {
            // Made before the state is looked at, so that a session that replaces this one in between is noticed.
            let replaced = slot.replaced.notified();
            let (writes, events, deadline) = {
                let mut state = slot.state.lock();
                if let Err(fault) = state.tick(self.nodes.now(), epoch) {
                    return fault;
                }
                if ready.is_none() {
                    match state.next_frame(self.nodes.now(), epoch, &view) {
                        Ok(frame) => ready = frame,
                        Err(fault) => return fault,
                    }
                }
                let writes: Vec<_> = std::iter::from_fn(|| state.next_write(epoch)).collect();
                let events: Vec<_> = std::iter::from_fn(|| state.next_event()).collect();
                (writes, events, state.deadline())
            };
            for write in writes {
                self.writer.spawn(Arc::clone(slot), write);
            }
            for event in events {
                self.note(&slot.node, event);
            }
            let deadline = deadline.map_or_else(
                || tokio::time::Instant::now() + Duration::from_secs(1),
                |at| self.nodes.instant(at).into(),
            );
            tokio::select! {
                event = connection.next(ready.is_some()) => match event {
                    Ok(Event::Writable) => if let Some(frame) = ready.take() {
                        if let Some(EdgeFrame::Batch(batch)) = &frame.frame {
                            self.metrics.changes_sent.inc_by(batch.changes.len() as u64);
                        }
                        if let Err(fault) = connection.send(&frame) {
                            return fault;
                        }
                    },
                    Ok(Event::Frame(bytes)) => {
                        self.metrics.frames_received.inc();
                        let result = frames::decode::<ToHub>(bytes).and_then(|frame| {
                            slot.state.lock().on_frame(self.nodes.now(), epoch, frame, &view)
                        });
                        if let Err(fault) = result {
                            return fault;
                        }
                    }
                    Err(fault) => return fault,
                },
                () = slot.wake.notified() => {}
                () = replaced => {}
                () = tokio::time::sleep_until(deadline) => {}
                () = self.stopping.cancelled() => return Fault::Refused {
                    code: edgemesh_api::link::RefuseCode::Unavailable,
                    message: "the hub stops".to_owned(),
                },
            }
        }
    }

    fn note(&self, node: &str, event: HubEvent) {
        match event {
            HubEvent::Synced { changes } => tracing::info!(node, changes, "a node is in step"),
            HubEvent::Rejected { key, reason, message } => {
                self.metrics.changes_rejected.inc();
                tracing::warn!(node, %key, reason, message, "an object did not reach the node");
            }
        }
    }
}
