//! Connections that are not in use.
//!
//! The one that was used last is used first, so that a burst's others grow old. A task closes what has been
//! idle for too long; it runs while there are idle connections and ends with the last of them. Nobody waits
//! for it: it does not keep the pool, and finds out at its next look when that is gone.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::time::Instant;

use super::connection::Connection;

/// Idle connections kept for each address: more than one client has in flight at one node, so that
/// none is closed only to be opened again.
const IDLE_CONNECTIONS_MAX: usize = 256;

/// Of one client.
pub(super) struct Pool {
    idle_timeout: Duration,
    /// For all addresses together.
    idle_max: usize,
    idle: Mutex<Idle>,
}

#[derive(Default)]
struct Idle {
    /// By address; the one that came back first is in front. None is empty.
    nodes: HashMap<String, VecDeque<(Instant, Box<Connection>)>>,
    /// Whether there is a task that closes what is too old.
    is_tended: bool,
}

impl Pool {
    pub(super) fn new(idle_timeout: Duration, idle_max: usize) -> Self {
        Self { idle_timeout, idle_max, idle: Mutex::default() }
    }

    /// A connection to use now, if there is one. The other side may have closed it.
    pub(super) fn take(&self, address: &str, now: Instant) -> Option<Box<Connection>> {
        let runtime = Handle::current().id();
        let mut idle = self.idle();
        let connections = idle.nodes.get_mut(address)?;
        let at = connections.iter().rposition(|(since, connection)| {
            connection.belongs_to(runtime) && now < *since + self.idle_timeout
        })?;
        let (_, connection) = connections.remove(at)?;
        if connections.is_empty() {
            idle.nodes.remove(address);
        }
        Some(connection)
    }

    /// Keeps a connection for the next request.
    pub(super) fn give_back(self: &Arc<Self>, address: String, connection: Box<Connection>) {
        let now = Instant::now();
        let mut idle = self.idle();
        let connections = idle.nodes.entry(address).or_default();
        connections.push_back((now, connection));
        // Also here: the task may be one of a runtime that nobody runs any more.
        while connections.front().is_some_and(|(since, _)| *since + self.idle_timeout <= now) {
            connections.pop_front();
        }
        if connections.len() > IDLE_CONNECTIONS_MAX {
            connections.pop_front();
        }
        if self.idle_max < usize::MAX && idle.count() > self.idle_max {
            idle.close_oldest();
        }
        let must_start = !std::mem::replace(&mut idle.is_tended, true);
        // A runtime that shuts down drops the task at once, and that one locks, too.
        drop(idle);
        if must_start {
            tokio::spawn(Tender { pool: Arc::downgrade(self) }.run(now + self.idle_timeout));
        }
    }

    fn idle(&self) -> MutexGuard<'_, Idle> {
        // Nothing inside can be half done: a panic elsewhere is no reason to fail here.
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Closes what is too old.
struct Tender {
    pool: Weak<Pool>,
}

impl Tender {
    async fn run(mut self, mut next: Instant) {
        loop {
            tokio::time::sleep_until(next).await;
            let Some(pool) = self.pool.upgrade() else { return };
            let mut idle = pool.idle();
            match idle.close_since(Instant::now() - pool.idle_timeout) {
                Some(oldest) => next = oldest + pool.idle_timeout,
                None => {
                    // Under the same lock: whoever gives one back after this must start another.
                    idle.is_tended = false;
                    self.pool = Weak::new();
                    return;
                }
            }
        }
    }
}

impl Drop for Tender {
    /// Only a runtime that shuts down ends it in any other way than its own.
    fn drop(&mut self) {
        if let Some(pool) = self.pool.upgrade() {
            pool.idle().is_tended = false;
        }
    }
}

impl Idle {
    fn count(&self) -> usize {
        self.nodes.values().map(VecDeque::len).sum()
    }

    fn close_oldest(&mut self) {
        let since =
            |connections: &VecDeque<(Instant, _)>| connections.front().map(|(since, _)| *since);
        let oldest = self.nodes.iter().min_by_key(|(_, connections)| since(connections));
        let Some(address) = oldest.map(|(address, _)| address.clone()) else { return };
        let connections = self.nodes.get_mut(&address);
        if connections
            .is_some_and(|connections| connections.pop_front().is_some() && connections.is_empty())
        {
            self.nodes.remove(&address);
        }
    }

    /// Closes what has been idle since then or for longer. Says since when the oldest of the others has been.
    fn close_since(&mut self, then: Instant) -> Option<Instant> {
        let mut oldest = None;
        self.nodes.retain(|_, connections| {
            while connections.front().is_some_and(|(since, _)| *since <= then) {
                connections.pop_front();
            }
            let since = connections.front().map(|(since, _)| *since);
            oldest = [oldest, since].into_iter().flatten().min();
            since.is_some()
        });
        oldest
    }
}
