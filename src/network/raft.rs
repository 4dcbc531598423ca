//! The peer listener: accepts this node's peers and passes their messages to its Raft.
//!
//! The life of a connection: it is accepted, greets within a time ([`super::peer`]), gets a place, and
//! is served over Toy-RPC until one end closes it or the node stops. When it was the leader's, its end may be
//! the leader's: [`deathwatch`] finds out.
//!
//! Strangers must not keep peers out, and cannot: who has not greeted yet holds one of
//! [`GREETINGS_MAX`] places, and when those are full **the oldest has to go** - a peer greets within one
//! round trip, so it is never the oldest for long, however many idle connections there are. Who has
//! greeted holds a place for its node and purpose: a newer connection replaces the older one, which
//! after a partition may be dead without knowing it. Members of the cluster have
//! `limits.peer_connections_max` of them; who greets and is not a member shares a few ([`admit`]). Nodes
//! of other clusters, which come for handoffs, share some of their own, and get one only while this
//! node's cluster gives keys to theirs.
//!
//! Accepting never ends because of an error; it pauses, because the usual error is having no file
//! descriptors left, and that lasts.

mod admit;
#[cfg(test)]
mod cluster_test;
mod deathwatch;
mod handler;
mod lapse;
mod visitors;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use openraft::Raft;
use openraft::storage::RaftStateMachine;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use super::peer::PeerIdentity;

use super::peer::Purpose;
use super::peer::closer::Closer;
use super::peer::frame::FrameBudget;
use super::peer::greeting::{self, GreetingError, Hello, Refusal};
use super::peer::handler::PeerHandler;
use super::peer::quiet::Quiet;
use super::peer::service::{self, Session};
use super::peer::settings::PeerSettings;
use crate::backoff::Backoff;
use crate::config::Config;
use crate::read_gate::ReadGate;
use crate::store::REPLACE_HINT;
use crate::store::Store;
use crate::store::formation::{Formation, Joined};
use crate::store::snapshot::SnapshotData;
use crate::types::TypeConfig;
use admit::{Greeted, Greetings, Place};
use deathwatch::Deathwatch;
use handler::RaftHandler;
use visitors::Visitors;

/// Connections that have not greeted yet. Enough for all peers of a cluster to reconnect at once, few
/// enough that strangers cost nothing.
const GREETINGS_MAX: usize = 64;

/// The pause after a first failed accept, and the longest one.
const ACCEPT_PAUSE_MIN: Duration = Duration::from_millis(10);
const ACCEPT_PAUSE_MAX: Duration = Duration::from_secs(1);

/// A running peer listener.
pub struct PeerServer {
    tracker: TaskTracker,
}

impl PeerServer {
    /// Serves peers until `shutdown` is cancelled: then it stops accepting and closes every
    /// connection. Returns at once; needs a Tokio runtime.
    pub fn serve<SM>(
        listener: TcpListener,
        identity: PeerIdentity,
        raft: Raft<TypeConfig, SM>,
        gate: ReadGate,
        store: &Store,
        config: &Config,
        shutdown: CancellationToken,
    ) -> Self
    where
        SM: RaftStateMachine<TypeConfig, SnapshotData = SnapshotData>,
    {
        let settings = Arc::new(PeerSettings::new(config));
        // A leader that cannot confirm itself says so while the asking node still listens.
        let read_index_timeout = settings.reply_timeout / 2;
        let lease = Duration::from_millis(config.raft.election_timeout_max_ms);
        let handler = RaftHandler::new(&identity, raft, store, gate, read_index_timeout, lease);
        let (formation, handler) = (store.formation(), Arc::new(handler));
        Self::serve_handler(listener, identity, formation, handler, settings, shutdown)
    }

    /// [`Self::serve`] with any handler.
    pub(super) fn serve_handler(
        listener: TcpListener,
        identity: PeerIdentity,
        formation: Formation,
        handler: Arc<dyn PeerHandler>,
        settings: Arc<PeerSettings>,
        shutdown: CancellationToken,
    ) -> Self {
        let tracker = TaskTracker::new();
        let acceptor = Arc::new(Acceptor {
            identity,
            formation,
            deathwatch: Deathwatch::new(Arc::clone(&handler)),
            handler,
            greetings: Greetings::new(GREETINGS_MAX),
            greeted: Greeted::new(settings.connections_max),
            visitors: Visitors::default(),
            members_budget: settings.members_budget(),
            strangers_budget: settings.strangers_budget(),
            settings,
            shutdown,
            tracker: tracker.clone(),
            quiet: Quiet::default(),
            members_quiet: Quiet::default(),
            lost_quiet: Quiet::default(),
        });
        tracker.spawn(acceptor.run(listener));
        Self { tracker }
    }

    /// Waits until everything that [`Self::serve`] started has ended, which it does only after its
    /// `shutdown` is cancelled.
    pub async fn join(self) {
        self.tracker.close();
        self.tracker.wait().await;
    }
}

struct Acceptor {
    identity: PeerIdentity,
    formation: Formation,
    handler: Arc<dyn PeerHandler>,
    deathwatch: Deathwatch,
    settings: Arc<PeerSettings>,
    greetings: Greetings,
    greeted: Greeted,
    visitors: Visitors,
    members_budget: FrameBudget,
    strangers_budget: FrameBudget,
    shutdown: CancellationToken,
    tracker: TaskTracker,
    quiet: Quiet,
    /// Apart, so that strangers cannot hide what happens to members.
    members_quiet: Quiet,
    /// For saying that this node has lost its data.
    lost_quiet: Quiet,
}

impl Acceptor {
    async fn run(self: Arc<Self>, listener: TcpListener) {
        let mut backoff = Backoff::new(ACCEPT_PAUSE_MIN, ACCEPT_PAUSE_MAX);
        loop {
            let accepted = tokio::select! {
                biased;
                () = self.shutdown.cancelled() => return,
                accepted = listener.accept() => accepted,
            };
            match accepted {
                Ok((stream, addr)) => {
                    backoff.reset();
                    let addr = addr.to_string();
                    self.tracker.spawn(Arc::clone(&self).serve_connection(stream, addr));
                }
                Err(error) => {
                    if let Some(suppressed) = self.quiet.admit() {
                        tracing::warn!(suppressed, %error, "accepting a peer connection failed");
                    }
                    tokio::select! {
                        () = self.shutdown.cancelled() => return,
                        () = tokio::time::sleep(backoff.pause()) => {}
                    }
                }
            }
        }
    }

    async fn serve_connection(self: Arc<Self>, mut stream: TcpStream, addr: String) {
        let Some(greeted) = self.greet(&mut stream).await else { return };
        let (hello, place) = match greeted {
            Ok(greeted) => greeted,
            Err(error) => {
                if let Some(suppressed) = self.quiet.admit() {
                    tracing::info!(addr, suppressed, "refused a peer connection: {error}");
                }
                return;
            }
        };
        let (peer, purpose) = (hello.sender.clone(), hello.purpose);
        tracing::debug!(%peer, ?purpose, addr, "serving a peer connection");
        let (budget, quiet) = if place.is_member() {
            (self.members_budget.clone(), &self.members_quiet)
        } else {
            (self.strangers_budget.clone(), &self.quiet)
        };
        let session = Session { stream, hello, budget, closer: place.closer().clone() };
        let (tracker, shutdown) = (self.tracker.clone(), self.shutdown.clone());
        let handler = Arc::clone(&self.handler);
        let settings = Arc::clone(&self.settings);
        service::serve(session, handler, settings, tracker, shutdown).await;
        let reason = place.closer().reason();
        if reason.is_orderly() {
            tracing::debug!(%peer, ?purpose, addr, %reason, "a peer connection ended");
        } else if let Some(suppressed) = quiet.admit() {
            tracing::info!(%peer, ?purpose, addr, suppressed, %reason, "a peer connection ended");
        }
        drop(place);
        if purpose != Purpose::Handoff {
            tokio::select! {
                () = self.shutdown.cancelled() => {}
                () = self.deathwatch.connection_ended(peer.node_id, &reason) => {}
            }
        }
    }

    /// Hears who it is, within the time for it, and gives it a place. `None` when the node stops or
    /// the connection had to make room for another.
    async fn greet(
        &self,
        stream: &mut TcpStream,
    ) -> Option<Result<(Hello, Place<'_>), GreetingError>> {
        let waiting = self.greetings.enter();
        let greeting = timeout(self.settings.greeting_timeout, self.exchange(stream));
        tokio::select! {
            biased;
            () = self.shutdown.cancelled() => None,
            () = waiting.evicted() => None,
            greeted = greeting => Some(greeted.unwrap_or(Err(GreetingError::Malformed("too slow")))),
        }
    }

    async fn exchange(&self, stream: &mut TcpStream) -> Result<(Hello, Place<'_>), GreetingError> {
        stream.set_nodelay(true)?;
        let hello = greeting::accept(stream, &self.identity).await?;
        if hello.sender == self.identity {
            return Err(GreetingError::Malformed("it says that it is this node"));
        }
        let entered = match hello.purpose {
            Purpose::Handoff => self.enter_visitor(&hello),
            Purpose::Append | Purpose::Control | Purpose::Snapshot => {
                self.enter_peer(&hello).await?
            }
        };
        greeting::answer(stream, &self.identity, entered.as_ref().err()).await?;
        entered.map(|place| (hello, place)).map_err(GreetingError::Refused)
    }

    /// A place for a node that says it is of this node's cluster.
    async fn enter_peer(&self, hello: &Hello) -> Result<Result<Place<'_>, Refusal>, GreetingError> {
        if hello.is_voter && self.is_blank() {
            self.formation.note_lost();
            if self.lost_quiet.admit().is_some() {
                let sender = &hello.sender;
                tracing::error!(%sender, "this node is a voter, and has no data. {REPLACE_HINT}");
            }
            return Ok(Err(Refusal::Lost { node: self.identity.node_id }));
        }
        if !self.belongs_together(hello).await? {
            return Ok(Err(Refusal::Formation));
        }
        let closer = Closer::under(&self.shutdown);
        let key = (hello.sender.node_id, hello.purpose);
        let place = self.greeted.enter(key, closer, &self.handler.members());
        Ok(place.map(Place::Peer).ok_or(Refusal::Full))
    }

    /// A place for a node of another cluster, which has one only as the destination of a handoff.
    fn enter_visitor(&self, hello: &Hello) -> Result<Place<'_>, Refusal> {
        let to = &hello.sender.cluster;
        if !self.handler.gives_to(to) {
            return Err(Refusal::NoHandoff { from: self.identity.cluster.clone(), to: to.clone() });
        }
        let closer = Closer::under(&self.shutdown);
        Ok(Place::Visitor(self.visitors.enter(hello.sender.clone(), closer)))
    }

    /// Whether this node has no log: it may have adopted a formation from a peer that knows nothing of its vote yet.
    fn is_blank(&self) -> bool {
        self.formation.founding().is_none() || self.handler.members().is_empty()
    }

    /// Compares the formations. A blank node adopts the peer's, on disk, before a message can reach Raft.
    async fn belongs_together(&self, hello: &Hello) -> Result<bool, GreetingError> {
        let (own, theirs) = (self.formation.founding(), hello.formation);
        let Some(theirs) = theirs.filter(|_| own.is_none()) else { return Ok(own == theirs) };
        let formation = self.formation.clone();
        let joined = tokio::task::spawn_blocking(move || formation.join(theirs)).await;
        Ok(joined.map_err(io::Error::other)?? != Joined::Other)
    }
}
