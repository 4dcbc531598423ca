//! Sends a snapshot, chunk by chunk, across lost connections.
//!
//! The receiver says after every step where to go on (a cursor that only the store understands), so a
//! transfer that was cut goes on where it stopped, on a new connection, as long as sender and receiver
//! both live. Chunks are sent one by one: the receiver writes each before it asks for the next, so a
//! slow disk is never flooded, and a snapshot has a connection of its own to be slow on.
//!
//! The receiver may be out of order, or mean harm. Each chunk that it asks for lies beyond the one before, and it
//! may begin again only a few times ([`SETBACKS_MAX`]): so a transfer ends, and with it what it costs this node.

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
use crate::store::snapshot::{Chunk, Place, SnapshotImage, StagingPosition};
use crate::types::{SnapshotMeta, Vote};

/// Lost connections in a row, without a chunk between them, before openraft is told. It asks again
/// after a pause, so this only has to bridge a restart of the connection.
const FRUITLESS_ATTEMPTS_MAX: u32 = 5;

/// The pause before trying again. The link's own pauses are of this order.
const RETRY_PAUSE: Duration = Duration::from_millis(100);

/// How often in one transfer a receiver may ask for what it had been sent already: as when it was restarted in the
/// middle. Then openraft is told, pauses and asks again.
const SETBACKS_MAX: u32 = 3;

/// What is sent: an image of the state, read piece by piece.
pub(in crate::network) trait ChunkSource: Send + Sync + 'static {
    fn id(&self) -> u64;

    /// Says that the receiver is about to get it. False if it is not worth to be sent any more.
    fn begin_sending(&self) -> bool;

    /// How far it is from the start to where this cursor points: of two, the one that is further is the greater
    /// one. `None` if no chunk can start there, as far as the cursor's form tells. It is the receiver's: whatever
    /// is wrong with it says nothing about the image.
    fn place_of(&self, cursor: &[u8]) -> Option<Place>;

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

    fn place_of(&self, cursor: &[u8]) -> Option<Place> {
        SnapshotImage::place_of(cursor)
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

/// How far a transfer has come, over all of its connections.
#[derive(Default)]
struct Progress {
    /// Chunks that were sent.
    chunks: u64,
    /// Where the last chunk started that the receiver asked for.
    place: Option<Place>,
    setbacks: u32,
}

impl Progress {
    /// The receiver asks for this place on a new connection.
    fn begun_at(&mut self, place: Place) -> Result<(), SendError> {
        self.setbacks += u32::from(self.place.as_ref() > Some(&place));
        self.place = Some(place);
        if self.setbacks > SETBACKS_MAX {
            return Err(SendError::Senseless("it begins again and again"));
        }
        Ok(())
    }

    /// It asks for this place now that it has the chunk before.
    fn moved_to(&mut self, place: Place) -> Result<(), SendError> {
        if self.place.as_ref() >= Some(&place) {
            return Err(SendError::Senseless("what was written is asked for again"));
        }
        self.place = Some(place);
        Ok(())
    }
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
        let mut progress = Progress::default();
        loop {
            let chunks_before = progress.chunks;
            let error = match self.attempt(link, &mut progress).await {
                Ok(installed) if may_answer(&installed.vote, link.own(), &self.vote) => {
                    return Ok(installed);
                }
                Ok(_) => return Err(SendError::Senseless(NO_ELECTION)),
                Err(error) => error,
            };
            fruitless = if progress.chunks > chunks_before { 0 } else { fruitless + 1 };
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
    async fn attempt(
        &self,
        link: &Arc<Link>,
        progress: &mut Progress,
    ) -> Result<Installed, SendError> {
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
        if !position.complete {
            progress.begun_at(self.place_of(&position)?)?;
        }
        while !position.complete {
            match self.send_chunk(&connection, settings, &position).await? {
                SnapshotStep::Position(next) => position = next,
                SnapshotStep::HigherVote(vote) => return self.refused(link, vote),
            }
            progress.chunks += 1;
            if !position.complete {
                progress.moved_to(self.place_of(&position)?)?;
            }
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

    fn place_of(&self, position: &StagingPosition) -> Result<Place, SendError> {
        let place = self.source.place_of(&position.cursor);
        place.ok_or(SendError::Senseless("it asks for a chunk that starts nowhere"))
    }

    async fn send_chunk(
        &self,
        connection: &Arc<Connection>,
        settings: &PeerSettings,
        position: &StagingPosition,
    ) -> Result<SnapshotStep, SendError> {
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
