//! The client's end of one connection: calls and their replies.
//!
//! Every call holds one of a bounded number of permits from before it is sent until its reply is
//! there. A caller that loses patience does not give its permit back: the reply is still waited for,
//! apart, and if that takes too long too the connection is closed, because nobody can tell whether the
//! peer hangs or the reply is only late.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use serde_bytes::ByteBuf;
use tokio::net::TcpStream;
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;
use tokio_util::task::TaskTracker;
use toy_rpc::Client;
use toy_rpc::pubsub::AckModeNone;

use super::closer::{CloseReason, Closer};
use super::envelope::{encode_message, open_reply, seal_request};
use super::settings::PeerSettings;
use super::toy_codec::{NEVER, PeerCodec};
use super::wire::{Call, Failure, Method, Wire};
use super::{PeerIdentity, Purpose};

/// Why a call has no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(in crate::network) enum CallError {
    /// The connection ended first. Whether the peer did what was asked is not known.
    #[error("{0}")]
    Closed(CloseReason),
    /// The answer did not come in time. Whether the peer did what was asked is not known.
    #[error("no answer within {0:?}")]
    Timeout(Duration),
    /// It is larger than any message may be, and was not sent.
    #[error("a message of {bytes} bytes, where {allowed} are allowed")]
    TooLarge {
        /// Its size.
        bytes: usize,
        /// The limit.
        allowed: usize,
    },
    /// The peer answered that it could not.
    #[error("{0}")]
    Failed(Failure),
}

/// A greeted connection that this node makes calls on.
pub(in crate::network) struct Connection {
    client: Client<AckModeNone>,
    identity: PeerIdentity,
    reply_timeout: Duration,
    message_bytes_max: usize,
    permits: Arc<Semaphore>,
    sequence: AtomicU64,
    sessions: AtomicU64,
    closer: Closer,
    tracker: TaskTracker,
    runtime: Handle,
}

impl Connection {
    /// Makes calls over a greeted stream. Needs a Tokio runtime.
    pub(in crate::network) fn new(
        stream: TcpStream,
        purpose: Purpose,
        identity: PeerIdentity,
        settings: &PeerSettings,
        closer: Closer,
        tracker: TaskTracker,
    ) -> Self {
        let halves = stream.into_split();
        let codec = PeerCodec::new(halves, settings.reply_limits(), None, closer.clone(), &tracker);
        let mut client = Client::with_codec(codec);
        client.set_default_timeout(NEVER);
        Self {
            client,
            identity,
            reply_timeout: settings.reply_timeout,
            message_bytes_max: settings.frame_bytes_max,
            permits: Arc::new(Semaphore::new(settings.calls_max(purpose))),
            sequence: AtomicU64::new(0),
            sessions: AtomicU64::new(0),
            closer,
            tracker,
            runtime: Handle::current(),
        }
    }

    pub(in crate::network) fn closer(&self) -> &Closer {
        &self.closer
    }

    /// The number of a new append session: higher than all before on this connection.
    pub(in crate::network) fn next_session(&self) -> u64 {
        self.sessions.fetch_add(1, Ordering::Relaxed)
    }

    /// Waits for a permit to make one call. Cancel safe; callers are served in order.
    pub(in crate::network) async fn permit(&self) -> Result<OwnedSemaphorePermit, CallError> {
        tokio::select! {
            biased;
            () = self.closer.closed() => Err(self.closed()),
            permit = Arc::clone(&self.permits).acquire_owned() => {
                Ok(permit.expect("the semaphore is never closed"))
            }
        }
    }

    /// Makes a call and waits for its reply, `patience` in all; then the connection is closed.
    pub(in crate::network) async fn call<T: Call>(
        self: &Arc<Self>,
        message: &T,
        patience: Duration,
    ) -> Result<T::Reply, CallError> {
        let message = encode_message(message);
        let (bytes, allowed) = (message.len(), self.message_bytes_max);
        if bytes > allowed {
            return Err(CallError::TooLarge { bytes, allowed });
        }
        let exchange = async {
            let permit = self.permit().await?;
            self.start(T::METHOD, message, permit).reply().await
        };
        match timeout(patience, exchange).await {
            Ok(answered) => answered,
            Err(_) => {
                self.closer.close(CloseReason::Timeout);
                Err(CallError::Timeout(patience))
            }
        }
    }

    /// Sends a call, at once: two calls started one after the other are sent in this order.
    /// `message` comes from [`encode_message`] or the like, and is not larger than a frame may be.
    pub(in crate::network) fn start(
        self: &Arc<Self>,
        method: Method,
        message: Vec<u8>,
        permit: OwnedSemaphorePermit,
    ) -> PendingCall {
        let sequence = self.sequence.fetch_add(1, Ordering::Relaxed);
        let request = ByteBuf::from(seal_request(sequence, &self.identity, message));
        let call = self.client.call::<ByteBuf, ByteBuf>(method.full_name(), request);
        let waiting = Waiting { call: Box::pin(call), permit };
        PendingCall { waiting: Some(waiting), sequence, connection: Arc::clone(self) }
    }

    fn closed(&self) -> CallError {
        CallError::Closed(self.closer.reason())
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.closer.close(CloseReason::Local);
    }
}

struct Waiting {
    call: Pin<Box<toy_rpc::client::Call<ByteBuf>>>,
    permit: OwnedSemaphorePermit,
}

/// A call that was sent. Dropping it abandons the reply, not the call.
pub(in crate::network) struct PendingCall {
    waiting: Option<Waiting>,
    sequence: u64,
    connection: Arc<Connection>,
}

impl PendingCall {
    /// Waits for the reply. The caller bounds the time. Cancel safe in that an abandoned reply is
    /// waited for apart.
    pub(in crate::network) async fn reply<T: Wire>(mut self) -> Result<T, CallError> {
        let Some(waiting) = self.waiting.as_mut() else {
            return Err(self.connection.closed());
        };
        let closer = &self.connection.closer;
        let answered = tokio::select! {
            biased;
            answered = &mut waiting.call => answered,
            () = closer.closed() => return Err(self.abandon_closed()),
        };
        self.waiting = None;
        let Ok(bytes) = answered else {
            // Toy-RPC's own errors come of a connection that ends, or of a peer that breaks rules.
            closer.close(CloseReason::Protocol("Toy-RPC gave a call up".into()));
            return Err(self.connection.closed());
        };
        match open_reply(Bytes::from(bytes.into_vec()), self.sequence) {
            Ok(Ok(message)) => Ok(message),
            Ok(Err(failure)) => Err(CallError::Failed(failure)),
            Err(error) => {
                closer.close(CloseReason::Protocol(error.to_string()));
                Err(self.connection.closed())
            }
        }
    }

    fn abandon_closed(&mut self) -> CallError {
        self.waiting = None;
        self.connection.closed()
    }
}

impl Drop for PendingCall {
    fn drop(&mut self) {
        let Some(waiting) = self.waiting.take() else { return };
        let closer = self.connection.closer.clone();
        if closer.is_closed() {
            return;
        }
        let patience = self.connection.reply_timeout;
        let late = async move {
            tokio::select! {
                () = closer.closed() => {}
                answered = timeout(patience, waiting.call) => {
                    if answered.is_err() {
                        closer.close(CloseReason::Timeout);
                    }
                }
            }
            drop(waiting.permit);
        };
        // Not `tokio::spawn`: this may run where no runtime is entered.
        self.connection.tracker.spawn_on(late, &self.connection.runtime);
    }
}
