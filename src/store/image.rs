//! Images: the sender's side of a snapshot.
//!
//! An image is a RocksDB checkpoint (hard links to data files, so it costs no copy), opened for
//! reading. It is a view of one moment: what was applied then, with the data that goes with it. Making
//! one stops neither reads nor writes. There is at most one current image; an older one lives on while
//! a transfer reads it, and its directory goes when the last holder lets go.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use openraft::type_config::alias::SnapshotOf;
use rocksdb::checkpoint::Checkpoint;
use rocksdb::{Direction, IteratorMode, ReadOptions};

use crate::types::TypeConfig;

use super::engine::{self, CF_META, Db, Engine, to_io};
use super::meta;
use super::reader::StateShared;
use super::snapshot::{Chunk, ChunkWriter, Cursor, Head, Place, SnapshotData};

/// How long a follower that has part of an image may be away before the image can be replaced. Between two
/// attempts to send it nobody holds it, and with a newer one the follower would begin again.
const BETWEEN_ATTEMPTS_MAX: Duration = Duration::from_secs(60);

/// The images of one store.
pub(super) struct Images {
    shared: Arc<StateShared>,
    dir: PathBuf,
    state: Mutex<ImagesState>,
    /// One image is made at a time: two would only share the disk.
    building: Mutex<()>,
    aside: Mutex<Aside>,
}

/// What makes images after installations.
#[derive(Default)]
struct Aside {
    /// Each installation's, until it is seen to have ended.
    threads: Vec<JoinHandle<()>>,
    /// The store is being closed, so nobody will use another image. An installation may go on longer than
    /// Raft.
    is_closed: bool,
}

#[derive(Default)]
struct ImagesState {
    made: u64,
    current: Option<Arc<SnapshotImage>>,
    /// How many snapshots were installed, and how many of them the current image has for certain.
    installed: u64,
    covered: u64,
}

impl ImagesState {
    /// Whether there should be a newer one: a follower that gets the current one would have to begin again, since
    /// the log does not begin where it ends.
    fn is_outdated(&self) -> bool {
        self.covered < self.installed
    }
}

/// A view of the whole state at one moment, on disk.
pub struct SnapshotImage {
    id: u64,
    /// Closed before the directory goes: fields drop in this order.
    db: Db,
    data: String,
    head: Head,
    sending: Arc<Mutex<Sending>>,
    _dir: ImageDir,
}

/// How far the transfers of an image are.
#[derive(Debug, Clone, Copy, Default)]
enum Sending {
    #[default]
    NotBegun,
    /// The last chunk that was read, but for the end, was read then.
    Since(Instant),
    /// Somebody has read the end.
    Ended,
    /// Nobody had any of it when a newer one took its place: nobody is to begin with it now.
    Replaced,
}

/// An image as others than its holders see it.
#[derive(Default)]
pub(super) struct NewestImage {
    image: Weak<SnapshotImage>,
    sending: Arc<Mutex<Sending>>,
}

impl NewestImage {
    fn new(image: &Arc<SnapshotImage>) -> Self {
        Self { image: Arc::downgrade(image), sending: image.sending.clone() }
    }

    /// Whether a follower is getting it, or has part of it and can be expected to get the rest.
    pub(super) fn is_being_sent(&self, now: Instant) -> bool {
        // One is that of the images themselves.
        let is_held = self.image.strong_count() > 1;
        match *self.sending.lock().unwrap_or_else(PoisonError::into_inner) {
            Sending::NotBegun | Sending::Replaced => false,
            Sending::Since(last) => is_held || now < last + BETWEEN_ATTEMPTS_MAX,
            // What was sent is being installed.
            Sending::Ended => is_held,
        }
    }
}

impl fmt::Debug for SnapshotImage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SnapshotImage({:x} up to {:?})", self.id, self.head.applied())
    }
}

/// A directory that goes with its owner.
struct ImageDir(PathBuf);

impl Drop for ImageDir {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.0) {
            tracing::warn!(path = %self.0.display(), %error, "cannot remove a snapshot image");
        }
    }
}

impl Images {
    pub(super) fn new(shared: Arc<StateShared>, dir: PathBuf) -> Self {
        let (state, building, aside) = (Mutex::default(), Mutex::new(()), Mutex::default());
        Self { shared, dir, state, building, aside }
    }

    /// An error if the storage has failed, or is being closed.
    pub(super) fn check(&self) -> io::Result<()> {
        self.shared.engine.check()?;
        match self.lock_aside().is_closed {
            true => Err(io::Error::other("the store is closed")),
            false => Ok(()),
        }
    }

    /// While this is held, no image is made.
    pub(super) fn one_at_a_time(&self) -> MutexGuard<'_, ()> {
        self.building.lock().expect("no code panics while it holds this lock")
    }

    /// Makes a new image of the present state and makes it the current one, unless a follower has begun to get the
    /// current one while the new one was made, and newer ones are to wait for that: then the current one stays, but
    /// for `force`. Returns the current one. Blocks.
    pub(super) fn build_newer(
        &self,
        force: bool,
    ) -> io::Result<SnapshotOf<TypeConfig, SnapshotData>> {
        let _one_at_a_time = self.one_at_a_time();
        let (image, covered) = self.make()?;
        if !force && let Some(current) = self.to_be_kept() {
            tracing::info!("the snapshot image before it is being sent, and stays");
            return Ok(current);
        }
        let snapshot = as_snapshot(&image);
        self.replace(image, covered);
        Ok(snapshot)
    }

    /// The current image, if a newer one is not to take its place. If it is, nobody begins with this one any more.
    fn to_be_kept(&self) -> Option<SnapshotOf<TypeConfig, SnapshotData>> {
        let state = self.lock_state();
        let current = state.current.as_ref()?;
        let is_kept = !state.is_outdated() && !current.give_way() && self.shared.puts_off_images();
        is_kept.then(|| as_snapshot(current))
    }

    fn replace(&self, image: Arc<SnapshotImage>, covered: u64) {
        let replaced = {
            let mut state = self.lock_state();
            state.covered = covered;
            if let Some(current) = &state.current {
                current.give_way();
            }
            *self.shared.image.lock().unwrap_or_else(PoisonError::into_inner) =
                NewestImage::new(&image);
            state.current.replace(image)
        };
        // Closing it, and removing its files, takes its time: outside the lock.
        drop(replaced);
    }

    /// An image, and how many of the installed snapshots it has at least. Needs `building`, or an older image could
    /// come after a newer one.
    fn make(&self) -> io::Result<(Arc<SnapshotImage>, u64)> {
        self.check()?;
        let (made, covered) = {
            let mut state = self.lock_state();
            state.made += 1;
            (state.made, state.installed)
        };
        // A checkpoint holds what is in files: with this, all that was applied before.
        self.shared.flush()?;
        // That may have waited for a compaction.
        self.check()?;
        std::fs::create_dir_all(&self.dir)?;
        let path = self.dir.join(made.to_string());
        let checkpoint = Checkpoint::new(self.shared.engine.db()).map_err(to_io)?;
        let dir = ImageDir(path.clone());
        checkpoint.create_checkpoint(&path).map_err(to_io)?;
        let image = Arc::new(SnapshotImage::open(dir)?);
        tracing::info!(up_to = ?image.head.applied(), "made a snapshot image");
        Ok((image, covered))
    }

    /// A snapshot was installed: the current image is of no use any more.
    pub(super) fn outdate(&self) {
        self.lock_state().installed += 1;
    }

    /// Whether the current image is of no use.
    pub(super) fn is_outdated(&self) -> bool {
        self.lock_state().is_outdated()
    }

    /// Makes an image if the current one is of no use. Blocks.
    pub(super) fn renew(&self) {
        let _one_at_a_time = self.one_at_a_time();
        if !self.is_outdated() {
            return;
        }
        match self.make() {
            Ok((image, covered)) => self.replace(image, covered),
            Err(_) if self.lock_aside().is_closed => {}
            Err(error) => {
                tracing::warn!(%error, "cannot make an image of the installed snapshot");
            }
        }
    }

    /// As [`Self::renew`], on a thread that [`Self::close`] joins.
    pub(super) fn renew_aside(self: &Arc<Self>) {
        let mut aside = self.lock_aside();
        if aside.is_closed {
            return;
        }
        aside.threads.retain(|thread| !thread.is_finished());
        let images = self.clone();
        match std::thread::Builder::new().name("image".into()).spawn(move || images.renew()) {
            Ok(thread) => aside.threads.push(thread),
            // Whoever asks for an image makes it, then.
            Err(error) => tracing::warn!(%error, "cannot start a thread that makes an image"),
        }
    }

    /// No image is begun from now on; waits until none is made aside any more. Blocks.
    pub(super) fn close(&self) {
        let threads = {
            let mut aside = self.lock_aside();
            aside.is_closed = true;
            std::mem::take(&mut aside.threads)
        };
        for thread in threads {
            // A panic in it has been reported by the panic hook.
            let _ = thread.join();
        }
    }

    fn lock_aside(&self) -> MutexGuard<'_, Aside> {
        self.aside.lock().expect("no code panics while it holds this lock")
    }

    /// The newest image, if one was made since the start.
    pub(super) fn current(&self) -> Option<SnapshotOf<TypeConfig, SnapshotData>> {
        self.lock_state().current.as_ref().map(as_snapshot)
    }

    fn lock_state(&self) -> MutexGuard<'_, ImagesState> {
        self.state.lock().expect("no code panics while it holds this lock")
    }
}

fn as_snapshot(image: &Arc<SnapshotImage>) -> SnapshotOf<TypeConfig, SnapshotData> {
    SnapshotOf::<TypeConfig, SnapshotData> {
        meta: image.head.meta(),
        snapshot: SnapshotData::Image(image.clone()),
    }
}

impl SnapshotImage {
    fn open(dir: ImageDir) -> io::Result<Self> {
        let db = Engine::open_image(&dir.0)?;
        let data = {
            let family = engine::family(&db, CF_META)?;
            let name = db.get_cf(&family, meta::KEY_DATA).map_err(to_io)?;
            meta::decode_data_family(&name.ok_or_else(|| {
                meta::corrupt("a snapshot image", "it does not name its data family")
            })?)?
        };
        let head = {
            let family = engine::family(&db, &data)?;
            let head = db.get_cf(&family, meta::KEY_HEAD).map_err(to_io)?;
            head.map_or(Ok(Head::default()), |bytes| meta::decode_head(&bytes))?
        };
        Ok(Self { id: rand::random(), db, data, head, sending: Arc::default(), _dir: dir })
    }

    /// Tells this image from every other, on any node.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Says that a follower is about to get it: newer ones wait from now on. False if a newer one has taken its
    /// place already: who gets this one would have to begin again.
    pub fn begin_sending(&self) -> bool {
        let mut sending = self.lock_sending();
        let may_begin = !matches!(*sending, Sending::Replaced);
        if may_begin {
            *sending = Sending::Since(Instant::now());
        }
        may_begin
    }

    /// Whether nobody has any of it; then nobody gets any from now on.
    fn give_way(&self) -> bool {
        let mut sending = self.lock_sending();
        let gives_way = matches!(*sending, Sending::NotBegun | Sending::Replaced);
        if gives_way {
            *sending = Sending::Replaced;
        }
        gives_way
    }

    fn lock_sending(&self) -> MutexGuard<'_, Sending> {
        self.sending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where a cursor points. `None` if these bytes are no cursor of this format: those of a receiver may be
    /// anything.
    pub fn place_of(cursor: &[u8]) -> Option<Place> {
        Cursor::decode(cursor).ok().map(|cursor| cursor.place())
    }

    /// Reads the chunk that starts at `cursor` (empty: the first one), of about `bytes_max` bytes and
    /// at least one row. Blocks on the disk.
    ///
    /// # Errors
    /// The cursor is not one of this format, or the image cannot be read.
    pub fn read_chunk(&self, cursor: &[u8], bytes_max: usize) -> io::Result<Chunk> {
        let chunk = self.chunk_at(cursor, bytes_max)?;
        let sending = if chunk.last { Sending::Ended } else { Sending::Since(Instant::now()) };
        *self.lock_sending() = sending;
        Ok(chunk)
    }

    fn chunk_at(&self, cursor: &[u8], bytes_max: usize) -> io::Result<Chunk> {
        let mut cursor = Cursor::decode(cursor)?;
        if !cursor.head_done {
            return Ok(Chunk { bytes: ChunkWriter::head(&self.head), last: false });
        }
        let family = engine::family(&self.db, &self.data)?;
        let mut options = ReadOptions::default();
        options.fill_cache(false);
        let mode = IteratorMode::From(&cursor.key, Direction::Forward);
        let mut chunk = None;
        for item in self.db.iterator_cf_opt(&family, options, mode) {
            let (stored, row) = item.map_err(to_io)?;
            if *stored == *cursor.key || *stored == *meta::KEY_HEAD {
                continue;
            }
            let writer = chunk.get_or_insert_with(ChunkWriter::rows);
            writer.row(&stored, &row);
            if writer.len() >= bytes_max {
                break;
            }
        }
        if let Some(writer) = chunk {
            return Ok(Chunk { bytes: writer.seal(), last: false });
        }
        cursor.key.clear();
        Ok(Chunk { bytes: ChunkWriter::end(&cursor), last: true })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Who has part of an image is waited for, but not for ever.
    #[test]
    fn an_image_that_nobody_holds_is_kept_for_a_while() {
        let begun = Instant::now();
        let sending =
            |sending| NewestImage { sending: Arc::new(Mutex::new(sending)), ..Default::default() };
        let image = sending(Sending::Since(begun));
        assert!(image.is_being_sent(begun + BETWEEN_ATTEMPTS_MAX - Duration::from_millis(1)));
        assert!(!image.is_being_sent(begun + BETWEEN_ATTEMPTS_MAX));
        assert!(!sending(Sending::NotBegun).is_being_sent(begun));
        assert!(!sending(Sending::Ended).is_being_sent(begun));
    }
}
