//! Sends a snapshot, chunk by chunk, across lost connections.
//!
//! The receiver says after every step where to go on (a cursor that only the store understands), so a
//! transfer that was cut goes on where it stopped, on a new connection, as long as sender and receiver
//! both live. Chunks are sent one by one: the receiver writes each before it asks for the next, so a
//! slow disk is never flooded, and a snapshot has a connection of its own to be slow on.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinError;
use tokio::time::sleep;

use super::connection::{CallError, Connection};
use super::link::{ConnectError, Link};
use super::settings::PeerSettings;
use super::votes::{NO_ELECTION, may_answer, may_refuse};
use super::wire::{BeginSnapshot, FinishSnapshot, Installed, SnapshotChunk, SnapshotStep};
use crate::store::snapshot::{Chunk, SnapshotImage, StagingPosition};
use crate::types::{SnapshotMeta, Vote};

/// Lost connections in a row, without a chunk between them, before openraft is told. It asks again
/// after a pause, so this only has to bridge a restart of the connection.
const FRUITLESS_ATTEMPTS_MAX: u32 = 5;

/// The pause before trying again. The link's own pauses are of this order.
const RETRY_PAUSE: Duration = Duration::from_millis(100);

/// What is sent: an image of the state, read piece by piece.
pub(in crate::network) trait ChunkSource: Send + Sync + 'static {
    fn id(&self) -> u64;

    /// Says that the receiver is about to get it. False if it is not worth to be sent any more.
    fn begin_sending(&self) -> bool;

    /// Whether a chunk can start there, as far as the cursor's form tells. It is the receiver's: whatever is wrong
    /// with it says nothing about the image.
    fn is_cursor(&self, cursor: &[u8]) -> bool;

    /// Blocks.
    fn read_chunk(&self, cursor: &[u8], bytes_max: usize) -> io::Result<Chunk>;
}

impl ChunkSource for SnapshotImage {
    fn id(&self) -> u64 {
        SnapshotImage::id(self)
    }

    fn begin_sending(&self) -> bool {
        SnapshotImage::begin_sending(self)
    }

    fn is_cursor(&self, cursor: &[u8]) -> bool {
        SnapshotImage::is_cursor(cursor)
    }

    fn read_chunk(&self, cursor: &[u8], bytes_max: usize) -> io::Result<Chunk> {
        SnapshotImage::read_chunk(self, cursor, bytes_max)
    }
}

/// Why a snapshot could not be sent.
#[derive(Debug, thiserror::Error)]
pub(in crate::network) enum SendError {
    #[error("{0}")]
    Connect(#[from] ConnectError),
    #[error("{0}")]
    Call(#[from] CallError),
    /// This node cannot read its own snapshot.
    #[error("reading the snapshot failed: {0}")]
    Read(io::Error),
    /// The task that reads it did not end by itself, which says nothing about the disk.
    #[error("reading the snapshot was broken off: {0}")]
    BrokenOff(JoinError),
    /// There is a newer snapshot, and the receiver had nothing of this one yet.
    #[error("a newer snapshot has taken its place")]
    Replaced,
    /// The receiver answered what makes no sense.
    #[error("the peer's answer makes no sense: {0}")]
    Senseless(&'static str),
}

/// One snapshot on its way to one peer.
pub(in crate::network) struct Transfer<C> {
    pub(in crate::network) source: Arc<C>,
    pub(in crate::network) vote: Vote,
    pub(in crate::network) meta: SnapshotMeta,
}

impl<C: ChunkSource> Transfer<C> {
    /// Sends it and waits until it is installed, or refused because of a higher vote: then that vote
    /// is in the answer. Dropping the future stops the transfer after the step in flight.
    pub(in crate::network) async fn send(&self, link: &Arc<Link>) -> Result<Installed, SendError> {
        let mut fruitless = 0;
        loop {
            let mut chunks = 0;
            let error = match self.attempt(link, &mut chunks).await {
                Ok(installed) if may_answer(&installed.vote, link.own(), &self.vote) => {
                    return Ok(installed);
                }
                Ok(_) => return Err(SendError::Senseless(NO_ELECTION)),
                Err(error) => error,
            };
            fruitless = if chunks > 0 { 0 } else { fruitless + 1 };
            let connection_lost = matches!(
                error,
                SendError::Connect(_)
                    | SendError::Call(CallError::Closed(_) | CallError::Timeout(_))
            );
            if !connection_lost || fruitless == FRUITLESS_ATTEMPTS_MAX {
                return Err(error);
            }
            sleep(RETRY_PAUSE).await;
        }
    }

    /// Sends what the receiver still lacks over one connection.
    async fn attempt(&self, link: &Arc<Link>, chunks: &mut u64) -> Result<Installed, SendError> {
        let connection = link.connection().await?;
        let settings = link.settings();
        let (vote, id) = (self.vote, self.source.id());
        let begin = BeginSnapshot { vote, id, meta: self.meta.clone() };
        let mut position = match connection.call(&begin, settings.chunk_timeout).await? {
            SnapshotStep::Position(position) => position,
            SnapshotStep::HigherVote(vote) => return self.refused(link, vote),
        };
        if !position.complete && !self.source.begin_sending() {
            return Err(SendError::Replaced);
        }
        while !position.complete {
            match self.send_chunk(&connection, settings, &position).await? {
                SnapshotStep::Position(next) => position = next,
                SnapshotStep::HigherVote(vote) => return self.refused(link, vote),
            }
            *chunks += 1;
        }
        let finish = FinishSnapshot { vote, id, meta: self.meta.clone() };
        Ok(connection.call(&finish, settings.install_timeout).await?)
    }

    /// The receiver follows somebody else.
    fn refused(&self, link: &Link, vote: Vote) -> Result<Installed, SendError> {
        if may_refuse(&vote, link.own(), &self.vote) {
            return Ok(Installed::new(vote));
        }
        Err(SendError::Senseless(NO_ELECTION))
    }

    async fn send_chunk(
        &self,
        connection: &Arc<Connection>,
        settings: &PeerSettings,
        position: &StagingPosition,
    ) -> Result<SnapshotStep, SendError> {
        if !self.source.is_cursor(&position.cursor) {
            return Err(SendError::Senseless("it asks for a chunk that starts nowhere"));
        }
        let chunk = self.read_chunk(position, settings.snapshot_chunk_bytes).await?;
        let seq = position.next_seq;
        let message =
            SnapshotChunk { vote: self.vote, id: self.source.id(), seq, bytes: chunk.bytes };
        let step = connection.call(&message, settings.chunk_timeout).await?;
        match &step {
            SnapshotStep::Position(next) if next.next_seq <= seq => {
                Err(SendError::Senseless("a chunk was written and is asked for again"))
            }
            SnapshotStep::Position(next) if next.complete != chunk.last => {
                Err(SendError::Senseless("it does not agree on which chunk is the last"))
            }
            _ => Ok(step),
        }
    }

    async fn read_chunk(&self, at: &StagingPosition, bytes_max: usize) -> Result<Chunk, SendError> {
        let source = Arc::clone(&self.source);
        let cursor = at.cursor.clone();
        let read = tokio::task::spawn_blocking(move || source.read_chunk(&cursor, bytes_max));
        read.await.map_err(SendError::BrokenOff)?.map_err(SendError::Read)
    }
}
