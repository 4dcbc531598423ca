//! The Toy-RPC service: one for each connection, because order and sender belong to a connection.
//!
//! Toy-RPC aborts a handler when its connection ends, and sends nothing when a handler fails or
//! panics. So the work runs in a task of its own, and a handler always answers bytes, which say
//! whether it went well. What a peer may not send closes the connection and gets no answer.

use std::collections::HashMap;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use serde::Deserialize;
use serde_bytes::ByteBuf;
use tokio::net::TcpStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use toy_rpc::Server;
use toy_rpc::service::{AsyncHandler, HandlerResult};
use toy_rpc::util::RegisterService;

use super::closer::{CloseReason, Closer};
use super::envelope::{open_request, seal_reply};
use super::frame::FrameBudget;
use super::greeting::Hello;
use super::handler::PeerHandler;
use super::lane::{Lane, LaneError};
use super::settings::PeerSettings;
use super::toy_codec::{Admission, PeerCodec};
use super::wire::{
    Append, BeginSnapshot, Call, Confirm, Failure, FinishSnapshot, Heartbeat, PreVote, ReadIndex,
    SnapshotChunk, TransferRequest, VoteRequest,
};
use crate::codec::DecodeError;
use crate::handoff::PageRequest;

/// One greeted connection.
pub(in crate::network) struct Session {
    pub(in crate::network) stream: TcpStream,
    pub(in crate::network) hello: Hello,
    /// What its frames share with those of others.
    pub(in crate::network) budget: FrameBudget,
    pub(in crate::network) closer: Closer,
}

/// Serves one greeted connection until it is closed. Never fails: why it ended is in `closer`.
pub(in crate::network) async fn serve(
    session: Session,
    handler: Arc<dyn PeerHandler>,
    settings: Arc<PeerSettings>,
    tracker: TaskTracker,
    shutdown: CancellationToken,
) {
    let Session { stream, hello, budget, closer } = session;
    let calls_max = settings.calls_max(hello.purpose);
    let admission = Admission::new(calls_max, settings.unanswered_bytes_max());
    let codec = PeerCodec::new(
        stream.into_split(),
        settings.request_limits(hello.purpose, budget),
        Some(admission),
        closer.clone(),
        &tracker,
    );
    let lane = Lane::new(Arc::clone(&handler), closer.clone(), tracker.clone(), calls_max);
    let peer = Arc::new(PeerService { hello, handler, settings, lane, closer, tracker, shutdown });
    let server = Server::builder().register(peer).build();
    // Toy-RPC returns nothing but `Ok` here.
    let _ = server.serve_codec(codec).await;
}

/// What Toy-RPC calls.
struct PeerService {
    hello: Hello,
    handler: Arc<dyn PeerHandler>,
    settings: Arc<PeerSettings>,
    lane: Lane,
    closer: Closer,
    tracker: TaskTracker,
    shutdown: CancellationToken,
}

/// A message that no peer sends.
#[derive(Debug, thiserror::Error)]
enum Breach {
    #[error("{0}")]
    Decode(#[from] DecodeError),
    #[error("{0}")]
    Lane(#[from] LaneError),
    #[error("a procedure that this connection is not for")]
    Purpose,
    #[error("a page of a handoff between other clusters")]
    Handoff,
}

impl PeerService {
    /// Takes a request apart, if this connection is for it.
    fn open<T: Call>(&self, request: Bytes) -> Result<(u64, T), Breach> {
        if T::METHOD.purpose() != self.hello.purpose {
            return Err(Breach::Purpose);
        }
        let (sequence, mut reader) = open_request(request, &self.hello.sender)?;
        let message = T::decode(&mut reader)?;
        reader.end()?;
        Ok((sequence, message))
    }

    /// Does a call's work in a task that outlives the connection, and puts the reply together.
    async fn work<T, F, W>(self: Arc<Self>, request: Bytes, start: F) -> Result<Vec<u8>, Breach>
    where
        T: Call,
        T::Reply: Send + 'static,
        F: FnOnce(Arc<dyn PeerHandler>, T) -> W,
        W: Future<Output = Result<T::Reply, Failure>> + Send + 'static,
    {
        let (sequence, message) = self.open::<T>(request)?;
        Ok(self.run(sequence, message, start).await)
    }

    /// Does the work of a call that was taken apart.
    async fn run<T, F, W>(&self, sequence: u64, message: T, start: F) -> Vec<u8>
    where
        T: Call,
        T::Reply: Send + 'static,
        F: FnOnce(Arc<dyn PeerHandler>, T) -> W,
        W: Future<Output = Result<T::Reply, Failure>> + Send + 'static,
    {
        let work = start(Arc::clone(&self.handler), message);
        let shutdown = self.shutdown.clone();
        let task = self.tracker.spawn(async move {
            tokio::select! {
                outcome = work => outcome,
                () = shutdown.cancelled() => Err(Failure::Stopped),
            }
        });
        let outcome = task.await.unwrap_or_else(|error| Err(Failure::refused(error)));
        seal_reply(sequence, &outcome)
    }

    /// The sender may ask for what comes to its own cluster from this node's, and for no more at a time
    /// than is good for both.
    async fn page(self: Arc<Self>, request: Bytes) -> Result<Vec<u8>, Breach> {
        let (sequence, mut request) = self.open::<PageRequest>(request)?;
        let (from, to) = (&self.hello.target.cluster, &self.hello.sender.cluster);
        if request.handoff.from != *from || request.handoff.to != *to {
            return Err(Breach::Handoff);
        }
        request.bytes_max = self.settings.page_bytes(request.bytes_max);
        Ok(self.run(sequence, request, |h, m| async move { h.page(m).await }).await)
    }

    /// A leader asks with every round of reads: no task, no turn in Raft's queue.
    fn confirm(&self, request: Bytes) -> Result<Vec<u8>, Breach> {
        let (sequence, Confirm { leader, lease_ms }) = self.open(request)?;
        let lease = Duration::from_millis(lease_ms.into());
        Ok(seal_reply(sequence, &Ok(self.handler.confirm(leader, lease))))
    }

    async fn append(self: Arc<Self>, request: Bytes) -> Result<Vec<u8>, Breach> {
        let (sequence, append) = self.open::<Append>(request)?;
        let reply = self.lane.enqueue(sequence, append)?;
        // The lane drops a call only when the connection ends.
        let outcome = reply.await.unwrap_or(Err(Failure::SessionEnded));
        Ok(seal_reply(sequence, &outcome))
    }

    /// The bytes for Toy-RPC to send. After a breach nothing is sent any more.
    fn finish(&self, outcome: Result<Vec<u8>, Breach>) -> HandlerResult {
        let reply = outcome.unwrap_or_else(|breach| {
            self.closer.close(CloseReason::Protocol(breach.to_string()));
            Vec::new()
        });
        Ok(Box::new(ByteBuf::from(reply)))
    }
}

/// A handler for Toy-RPC: takes the bytes out, runs the method, wraps the answer.
macro_rules! handler {
    (|$service:ident, $request:ident| $run:expr) => {
        |service, body| {
            Box::pin(async move {
                let $service = Arc::clone(&service);
                // The codec gives bytes and nothing else, so this cannot fail for a peer's doing.
                let $request = Bytes::from(ByteBuf::deserialize(body)?.into_vec());
                let outcome = $run.await;
                service.finish(outcome)
            })
        }
    };
}

impl RegisterService for PeerService {
    fn default_name() -> &'static str {
        "peer"
    }

    fn handlers() -> HashMap<&'static str, AsyncHandler<Self>> {
        let mut handlers: HashMap<&'static str, AsyncHandler<Self>> = HashMap::new();
        handlers.insert("append", handler!(|s, r| s.append(r)));
        handlers.insert(
            "heartbeat",
            handler!(|s, r| s.work(r, |h, m: Heartbeat| async move { h.heartbeat(m.0).await })),
        );
        handlers.insert(
            "vote",
            handler!(|s, r| s.work(r, |h, m: VoteRequest| async move { h.vote(m).await })),
        );
        handlers.insert(
            "pre_vote",
            handler!(|s, r| s.work(r, |h, m: PreVote| async move { h.pre_vote(m.0).await })),
        );
        handlers.insert(
            "transfer_leader",
            handler!(
                |s, r| s.work(r, |h, m: TransferRequest| async move { h.transfer_leader(m).await })
            ),
        );
        handlers.insert(
            "read_index",
            handler!(|s, r| {
                let follower = s.hello.sender.node_id;
                s.work(r, move |h, _: ReadIndex| async move { h.read_index(follower).await })
            }),
        );
        handlers.insert("confirm", handler!(|s, r| std::future::ready(s.confirm(r))));
        handlers.insert(
            "begin_snapshot",
            handler!(
                |s, r| s.work(r, |h, m: BeginSnapshot| async move { h.begin_snapshot(m).await })
            ),
        );
        handlers.insert(
            "snapshot_chunk",
            handler!(
                |s, r| s.work(r, |h, m: SnapshotChunk| async move { h.snapshot_chunk(m).await })
            ),
        );
        handlers.insert(
            "finish_snapshot",
            handler!(
                |s, r| s.work(r, |h, m: FinishSnapshot| async move { h.finish_snapshot(m).await })
            ),
        );
        handlers.insert("page", handler!(|s, r| s.page(r)));
        handlers
    }
}
