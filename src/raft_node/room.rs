//! Room: how much the operations of one client may take in memory, from the moment they are made to their
//! answer.
//!
//! It is one for all clusters, and each of several has a share of it, which it cannot exceed: the operations of a
//! cluster that does not answer stay for as long as their deadlines, and would take all of it from those that
//! do. Whoever waits for room has made nothing yet.

use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::Instant;

/// How many bytes the operations of one client may take together while they wait or are in flight.
const ROOM_BYTES: usize = 64 << 20;

/// What the smallest operation counts for: the room is for 65,536 of them. Far more than keep a
/// cluster busy; without a bound, callers that are faster than the cluster would fill the memory.
const OPERATION_BYTES_MIN: usize = 1 << 10;

/// The smallest share: 4096 small operations are still more than keep a cluster busy. From 17 clusters on
/// their shares are more than all there is, which then takes so many of them to be silent at a time.
const SHARE_BYTES_MIN: usize = 4 << 20;

/// What the operations for all clusters take.
#[derive(Debug)]
pub(super) struct Room(Semaphore);

/// What those for one cluster may take of it.
#[derive(Debug)]
pub(super) struct Share {
    bytes: usize,
    /// `None`: all of it.
    free: Option<Semaphore>,
}

/// An operation's room, which is free again when this is dropped.
#[derive(Debug)]
pub(super) struct Taken<'a> {
    _of_share: Option<SemaphorePermit<'a>>,
    _of_all: SemaphorePermit<'a>,
}

impl Default for Room {
    fn default() -> Self {
        Self(Semaphore::new(ROOM_BYTES))
    }
}

impl Room {
    /// In bytes.
    pub(super) fn free(&self) -> usize {
        self.0.available_permits()
    }

    /// Waits until there is room for an operation with so many bytes of key and value. `None` when there is none by
    /// the deadline. Safe to cancel.
    pub(super) async fn take<'a>(
        &'a self,
        share: &'a Share,
        bytes: usize,
        deadline: Instant,
    ) -> Option<Taken<'a>> {
        // A larger one than there is room for gets all of it, alone.
        let bytes = bytes.clamp(OPERATION_BYTES_MIN, share.bytes) as u32;
        // The share first: who waits for it keeps nothing from others.
        let of_share = match &share.free {
            Some(free) => Some(permits(free, bytes, deadline).await?),
            None => None,
        };
        Some(Taken { _of_share: of_share, _of_all: permits(&self.0, bytes, deadline).await? })
    }
}

impl Share {
    /// That of one of so many clusters.
    pub(super) fn of(clusters: usize) -> Self {
        let bytes = (ROOM_BYTES / clusters.max(1)).max(SHARE_BYTES_MIN);
        Self { bytes, free: (clusters > 1).then(|| Semaphore::new(bytes)) }
    }

    pub(super) fn is_as_large_as(&self, other: &Self) -> bool {
        self.bytes == other.bytes
    }
}

async fn permits(free: &Semaphore, bytes: u32, deadline: Instant) -> Option<SemaphorePermit<'_>> {
    if let Ok(permit) = free.try_acquire_many(bytes) {
        return Some(permit);
    }
    tokio::time::timeout_at(deadline, free.acquire_many(bytes)).await.ok()?.ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Takes room for small operations until there is none.
    async fn fill<'a>(room: &'a Room, share: &'a Share) -> Vec<Taken<'a>> {
        let mut all = Vec::new();
        while let Some(taken) = room.take(share, 1, Instant::now()).await {
            all.push(taken);
        }
        all
    }

    #[tokio::test]
    async fn room_is_free_again_when_it_is_given_back() {
        let (room, share) = (Room::default(), Share::of(1));
        let now = Instant::now();
        let all = room.take(&share, 2 * ROOM_BYTES, now).await.unwrap();
        assert!(room.take(&share, 1, now).await.is_none(), "{room:?}");
        drop(all);
        assert_eq!(fill(&room, &share).await.len(), 65_536);
        assert_eq!(room.free(), ROOM_BYTES);
    }

    #[tokio::test]
    async fn a_cluster_that_keeps_its_share_leaves_the_others_theirs() {
        let room = Room::default();
        let shares = [(); 3].map(|()| Share::of(3));
        let mut taken = Vec::new();
        for share in &shares {
            let small = fill(&room, share).await;
            assert_eq!(small.len(), 65_536 / 3);
            taken.push(small);
            let huge = room.take(share, ROOM_BYTES, Instant::now()).await;
            assert!(huge.is_none(), "{share:?}");
        }
        drop(taken);
        let huge = room.take(&shares[0], ROOM_BYTES, Instant::now()).await;
        assert!(huge.is_some_and(|_| room.free() < ROOM_BYTES));
    }

    /// A ring that grows leaves a cluster less than it had when it was alone.
    #[tokio::test]
    async fn a_client_that_gets_company_takes_less_and_forgets_nothing() {
        let alone = super::super::RaftNode::new(vec!["a:1".into()]);
        alone.change_view(|view| view.led_by("a:2"));
        let one_of_two = alone.sharing_with(2);
        assert_eq!(one_of_two.shared.share.bytes, ROOM_BYTES / 2);
        assert_eq!(one_of_two.nodes(), ["a:1", "a:2"]);
        let same = one_of_two.sharing_with(2);
        assert!(std::sync::Arc::ptr_eq(&same.shared, &one_of_two.shared));
    }

    #[tokio::test]
    async fn many_clusters_share_what_there_is() {
        let room = Room::default();
        let shares: Vec<_> = (0..100).map(|_| Share::of(100)).collect();
        let mut taken = Vec::new();
        for share in &shares {
            taken.extend(fill(&room, share).await);
        }
        assert_eq!(taken.len(), 65_536);
    }
}
