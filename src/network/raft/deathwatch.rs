//! Finds out that the leader's process has ended, without waiting for an election timeout.
//!
//! A follower that hears nothing cannot know whether its leader is dead, slow or cut off, so it waits
//! (`raft.election_timeout_*`). A process that ends says more: its system closes its connections at once,
//! and refuses new ones to the port where it listened. So when a connection of the leader's ends, this node
//! tries to open one to it. If that is **refused**, it gives up the leader's lease, which is to help nobody
//! to depose it, and asks the other voters whether they would elect this node (Raft's pre-vote; thesis of
//! D. Ongaro, 4.2.3 and 9.6).
//!
//! Those agree only if they have just found the same or have heard nothing for as long as the lease lasts
//! ([`super::lapse`]). So a node that alone is refused, by a firewall between the two, changes nothing. Nor
//! does any promise depend on it: Raft is safe whenever elections are held, and a read is confirmed by
//! voters, or by a lease of theirs, to which they keep whoever is refused (`store/promise.rs`). A machine that is
//! lost as a whole, or a network, refuses nothing: then the timeout decides, as ever.
//!
//! Voters ask in turns, so that they do not stand against each other. One that lacks entries is told so by
//! those who have them, and the next one's turn comes.

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::net::{TcpStream, lookup_host};
use tokio::time::{sleep, timeout};

use crate::network::peer::closer::CloseReason;
use crate::network::peer::handler::{Followed, PeerHandler};
use crate::types::{NodeId, Vote};

/// How often it is tried to connect to an address. A process that is ending may still accept for a moment,
/// and closes what it accepted.
const CONNECTS_MAX: usize = 3;

/// Between two of these tries: a system that closes what a process had open is usually through with it then.
const CONNECT_PAUSE: Duration = Duration::from_millis(5);

/// How long a look-up and a connect may take, and how long an accepted connection is watched: a process that
/// is ending closes it sooner. With the look-up, all tries at one address take 0.36 s at most, less than followers
/// wait by default. Where a round trip takes longer than this, a refusal is not heard in time and the timeout
/// decides.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(50);

/// The time between two voters' turns: for a pre-vote and an election, which is two messages and an fsync
/// on either side. The first waits for a quarter of it, until the others have noticed, too.
const TURN: Duration = Duration::from_millis(20);

/// How often this node asks for votes. Afterwards the election timeout decides.
const ROUNDS_MAX: u32 = 5;

/// Of one node.
pub(super) struct Deathwatch {
    handler: Arc<dyn PeerHandler>,
    /// The leader whose end is being looked into.
    watched: Mutex<Option<Vote>>,
}

impl Deathwatch {
    pub(super) fn new(handler: Arc<dyn PeerHandler>) -> Self {
        Self { handler, watched: Mutex::default() }
    }

    /// A connection of this peer's has ended. Returns when nothing more is to be done about it: with three
    /// nodes after 0.7 s at most, with more voters or addresses later. May be dropped at any time.
    pub(super) async fn connection_ended(&self, peer: NodeId, reason: &CloseReason) {
        if !matches!(reason, CloseReason::PeerClosed | CloseReason::Io(_)) {
            return;
        }
        let Some(leader) = self.handler.followed().filter(|leader| leader.node_id == peer) else {
            return;
        };
        // The leader's other connections end at the same time.
        if self.watched().replace(leader.vote) == Some(leader.vote) {
            return;
        }
        let _watching = Watching { all: self, vote: leader.vote };
        if refuses(&leader.rpc).await {
            tracing::info!(leader = peer, addr = leader.rpc, "the leader refuses connections");
            self.succeed(&leader).await;
        }
    }

    fn watched(&self) -> MutexGuard<'_, Option<Vote>> {
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sees to it that there is a new leader.
    async fn succeed(&self, leader: &Followed) {
        self.handler.give_up_lease(leader.vote).await;
        let Some(turn) = leader.turn else { return };
        sleep(TURN / 4 + turn * TURN).await;
        for _ in 0..ROUNDS_MAX {
            // Another vote than the dead leader's: an election is under way, or over.
            if self.handler.followed().is_none_or(|now| now.vote != leader.vote) {
                return;
            }
            self.handler.ask_for_votes().await;
            sleep(leader.turns * TURN).await;
        }
    }
}

struct Watching<'a> {
    all: &'a Deathwatch,
    vote: Vote,
}

impl Drop for Watching<'_> {
    fn drop(&mut self) {
        // The next leader's end may be looked into already.
        self.all.watched().take_if(|watched| *watched == self.vote);
    }
}

/// Whether nobody listens there, and the system there says so; all of them, if the name has several
/// addresses.
async fn refuses(name: &str) -> bool {
    let Ok(Ok(addrs)) = timeout(CONNECT_TIMEOUT, lookup_host(name)).await else { return false };
    let addrs: Vec<_> = addrs.collect();
    for addr in &addrs {
        if !refuses_at(*addr).await {
            return false;
        }
    }
    !addrs.is_empty()
}

async fn refuses_at(addr: SocketAddr) -> bool {
    for number in 0..CONNECTS_MAX {
        if number > 0 {
            sleep(CONNECT_PAUSE).await;
        }
        let mut stream = match timeout(CONNECT_TIMEOUT, TcpStream::connect(addr)).await {
            Ok(Ok(stream)) => stream,
            // It waited to be accepted, and the port was closed before anybody knew.
            Ok(Err(error)) if error.kind() == ErrorKind::ConnectionReset => continue,
            Ok(Err(error)) => return error.kind() == ErrorKind::ConnectionRefused,
            Err(_) => return false,
        };
        // Nothing is said on it, so all that can come is its end.
        if timeout(CONNECT_TIMEOUT, stream.read_u8()).await.is_err() {
            return false;
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::TcpListener;

    async fn listen() -> (TcpListener, String) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap().to_string();
        (listener, addr)
    }

    #[tokio::test]
    async fn who_accepts_is_not_gone_and_who_has_ended_is() {
        let (listener, addr) = listen().await;
        // Nobody calls accept: the process hangs, or is busy.
        assert!(!refuses(&addr).await);
        drop(listener);
        assert!(refuses(&addr).await);
        assert!(!refuses("no address").await);
    }

    /// The port is closed while a connection to it waits to be accepted: that one is reset, and not refused.
    #[tokio::test]
    async fn who_ends_in_the_middle_of_a_connect_has_ended() {
        let (listener, addr) = listen().await;
        let (gone, ()) = tokio::join!(refuses(&addr), async { drop(listener) });
        assert!(gone);
    }

    /// However many connections that is, in the moment that it takes.
    #[tokio::test]
    async fn who_is_ending_closes_what_it_still_accepts() {
        let (listener, addr) = listen().await;
        let ending = async {
            let accepting = async {
                loop {
                    drop(listener.accept().await.unwrap());
                }
            };
            let moment = CONNECT_PAUSE / 2;
            assert!(timeout(moment, accepting).await.is_err(), "it accepts for ever");
            drop(listener);
        };
        let (gone, ()) = tokio::join!(refuses(&addr), ending);
        assert!(gone);
    }
}
