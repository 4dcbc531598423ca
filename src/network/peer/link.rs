//! One peer, one purpose: connects when there is something to say, and again when that broke.
//!
//! Connecting runs in a task of its own and is shared by all who wait for it: openraft gives a
//! heartbeat less time than a connection may take, and drops the future. After a failure the link
//! answers with that failure for a short, growing while, so that a dead peer is not hammered.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::closer::{CloseReason, Closer};
use super::connection::Connection;
use super::greeting::{self, GreetingError, Hello, Refusal};
use super::quiet::Quiet;
use super::rounds::Rounds;
use super::settings::PeerSettings;
use super::thrift::{Seat, Thrift};
use super::{PeerIdentity, Purpose};
use crate::backoff::Backoff;
use crate::store::formation::Formation;
use crate::types::NodeId;

/// The pause after a first failure.
const BACKOFF_MIN: Duration = Duration::from_millis(20);

/// The longest pause. Short, because a healed partition should be found before an election ends;
/// trying a dead address four times a second costs nothing.
const BACKOFF_MAX: Duration = Duration::from_millis(250);

/// Why there is no connection.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(in crate::network) enum ConnectError {
    /// Nobody answers, or not as a peer does.
    #[error("cannot connect to {addr}: {why}")]
    Failed { addr: String, why: String },
    /// It took too long.
    #[error("connecting to {addr} took longer than {after:?}")]
    Timeout { addr: String, after: Duration },
    /// Who lives there does not belong to this node.
    #[error("{addr} refuses this node: {refusal}")]
    Refused { addr: String, refusal: Refusal },
    /// This node is stopping.
    #[error("this node is stopping")]
    Stopping,
}

type Attempt = watch::Receiver<Option<Result<Arc<Connection>, ConnectError>>>;

/// What links share.
#[derive(Clone)]
pub(in crate::network) struct LinkContext {
    pub(in crate::network) identity: PeerIdentity,
    pub(in crate::network) formation: Formation,
    pub(in crate::network) settings: Arc<PeerSettings>,
    pub(in crate::network) shutdown: CancellationToken,
    pub(in crate::network) tracker: TaskTracker,
    pub(in crate::network) quiet: Arc<Quiet>,
    pub(in crate::network) thrift: Arc<Thrift>,
}

impl LinkContext {
    /// Another node of this node's cluster.
    pub(in crate::network) fn colleague(&self, node_id: NodeId) -> PeerIdentity {
        PeerIdentity { cluster: self.identity.cluster.clone(), node_id }
    }
}

/// The way to one peer for one purpose.
pub(in crate::network) struct Link {
    context: LinkContext,
    target: PeerIdentity,
    addr: String,
    purpose: Purpose,
    state: Mutex<State>,
    rounds: Rounds,
}

struct State {
    current: Current,
    /// Whether the last attempt failed, too.
    has_failed: bool,
    backoff: Backoff,
}

enum Current {
    Idle,
    Connecting(Attempt),
    Connected(Arc<Connection>),
    Failed { error: ConnectError, retry_at: Instant },
}

impl Link {
    pub(in crate::network) fn new(
        context: LinkContext,
        target: PeerIdentity,
        addr: String,
        purpose: Purpose,
    ) -> Self {
        let state = Mutex::new(State {
            current: Current::Idle,
            has_failed: false,
            backoff: Backoff::new(BACKOFF_MIN, BACKOFF_MAX),
        });
        Self { context, target, addr, purpose, state, rounds: Rounds::default() }
    }

    /// The node whose link it is.
    pub(in crate::network) fn own(&self) -> NodeId {
        self.context.identity.node_id
    }

    pub(in crate::network) fn addr(&self) -> &str {
        &self.addr
    }

    pub(in crate::network) fn settings(&self) -> &PeerSettings {
        &self.context.settings
    }

    pub(in crate::network) fn tracker(&self) -> &TaskTracker {
        &self.context.tracker
    }

    /// A place among this node's followers for a session of appends.
    pub(in crate::network) fn seat(&self) -> Seat {
        self.context.thrift.seat(self.target.node_id)
    }

    /// The read index calls that wait for this peer.
    pub(in crate::network) fn rounds(&self) -> &Rounds {
        &self.rounds
    }

    /// The open connection, or a new one. Takes `connect_timeout` at most. Cancel safe: an attempt
    /// goes on without its callers.
    pub(in crate::network) async fn connection(
        self: &Arc<Self>,
    ) -> Result<Arc<Connection>, ConnectError> {
        let mut attempt = match self.current_or_attempt()? {
            Ready::Connection(connection) => return Ok(connection),
            Ready::Attempt(attempt) => attempt,
        };
        match attempt.wait_for(Option::is_some).await {
            Ok(outcome) => outcome.clone().unwrap_or(Err(ConnectError::Stopping)),
            Err(_) => Err(ConnectError::Stopping),
        }
    }

    /// Closes the connection, if there is one. The next call opens another.
    pub(in crate::network) fn close(&self) -> bool {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let Current::Connected(connection) = &state.current else { return false };
        let is_open = !connection.closer().is_closed();
        connection.closer().close(CloseReason::Local);
        is_open
    }

    fn current_or_attempt(self: &Arc<Self>) -> Result<Ready, ConnectError> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if self.context.shutdown.is_cancelled() {
            return Err(ConnectError::Stopping);
        }
        match &state.current {
            Current::Connected(connection) if !connection.closer().is_closed() => {
                return Ok(Ready::Connection(Arc::clone(connection)));
            }
            Current::Connecting(attempt) => return Ok(Ready::Attempt(attempt.clone())),
            Current::Failed { error, retry_at } if Instant::now() < *retry_at => {
                return Err(error.clone());
            }
            Current::Connected(connection) => self.log_closed(connection),
            Current::Idle | Current::Failed { .. } => {}
        }
        let (outcome, attempt) = watch::channel(None);
        state.current = Current::Connecting(attempt.clone());
        let link = Arc::clone(self);
        self.context.tracker.spawn(async move {
            let connected = link.connect().await;
            link.settle(&connected);
            outcome.send_replace(Some(connected));
        });
        Ok(Ready::Attempt(attempt))
    }

    async fn connect(&self) -> Result<Arc<Connection>, ConnectError> {
        let after = self.context.settings.connect_timeout;
        let opened = tokio::select! {
            () = self.context.shutdown.cancelled() => return Err(ConnectError::Stopping),
            opened = timeout(after, self.open()) => opened,
        };
        let addr = self.addr.clone();
        match opened {
            Ok(Ok(stream)) => Ok(Arc::new(self.connection_over(stream))),
            Ok(Err(GreetingError::Refused(refusal))) => {
                Err(ConnectError::Refused { addr, refusal })
            }
            Ok(Err(error)) => Err(ConnectError::Failed { addr, why: error.to_string() }),
            Err(_) => Err(ConnectError::Timeout { addr, after }),
        }
    }

    async fn open(&self) -> Result<TcpStream, GreetingError> {
        let mut stream = TcpStream::connect(&self.addr).await?;
        // Without it, Nagle's algorithm and delayed acknowledgements cost 40 ms and more a call.
        stream.set_nodelay(true)?;
        let hello = Hello {
            purpose: self.purpose,
            sender: self.context.identity.clone(),
            target: self.target.clone(),
            formation: self.context.formation.founding(),
            is_voter: self.context.thrift.has_voter(self.target.node_id),
        };
        greeting::connect(&mut stream, &hello).await?;
        Ok(stream)
    }

    fn connection_over(&self, stream: TcpStream) -> Connection {
        let LinkContext { identity, settings, shutdown, tracker, .. } = &self.context;
        let closer = Closer::under(shutdown);
        Connection::new(stream, self.purpose, identity.clone(), settings, closer, tracker.clone())
    }

    fn settle(&self, connected: &Result<Arc<Connection>, ConnectError>) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        match connected {
            Ok(connection) => {
                state.has_failed = false;
                state.backoff.reset();
                state.current = Current::Connected(Arc::clone(connection));
                tracing::debug!(peer = %self.target, addr = self.addr, purpose = ?self.purpose,
                    "connected to peer");
            }
            Err(error) => {
                let retry_at = Instant::now() + state.backoff.pause();
                let is_first = !std::mem::replace(&mut state.has_failed, true);
                state.current = Current::Failed { error: error.clone(), retry_at };
                self.log_failure(error, is_first);
            }
        }
    }

    /// Refusals are mistakes of an operator and worth a line; a peer that is down is not news, its
    /// going down is. A replica that knows of no handoff only lags behind, or is ahead.
    fn log_failure(&self, error: &ConnectError, is_first: bool) {
        if let ConnectError::Refused { refusal: Refusal::NoHandoff { .. }, .. } = error {
            tracing::debug!(peer = %self.target, "{error}");
            return;
        }
        let (peer, purpose) = (&self.target, self.purpose);
        let refused = matches!(error, ConnectError::Refused { .. });
        let news = refused || (is_first && *error != ConnectError::Stopping);
        let Some(suppressed) = news.then(|| self.context.quiet.admit()).flatten() else { return };
        if refused {
            tracing::warn!(%peer, ?purpose, suppressed, "{error}");
        } else {
            tracing::info!(%peer, ?purpose, suppressed, "peer is unreachable: {error}");
        }
    }

    fn log_closed(&self, connection: &Connection) {
        if let Some(suppressed) = self.context.quiet.admit() {
            tracing::info!(peer = %self.target, purpose = ?self.purpose, suppressed,
                reason = %connection.closer().reason(), "connection to peer ended; connecting again");
        }
    }
}

enum Ready {
    Connection(Arc<Connection>),
    Attempt(Attempt),
}
