//! The node's disk: Raft log, vote, state machine and snapshots in one RocksDB.
//!
//! ```text
//! DATA-DIR/
//!   node.lock    held (flock) while a process uses the directory
//!   marker       who owns it and how much must be in it, fsynced apart from RocksDB
//!   db/          RocksDB: column families log, meta and data-N
//!   flush.sst    a data file on its way into db/; removed at every start
//!   snapshots/   images for followers that lag too far; removed at every start
//! ```
//!
//! **One write-ahead log** orders votes, entries and purges, and a crash cuts off a suffix of it. The
//! **state** is not in it: applied rows stand in memory ([`memtable`]) until a flush writes them to a
//! data file together with the last applied id ([`flush`]). A flush fsyncs the write-ahead log first,
//! and the log keeps every entry that is not flushed. So log and state cannot disagree, applying needs
//! neither a write nor an fsync, and after a crash the log brings the state forward.
//!
//! Invariants:
//! 1. Nothing is acknowledged, neither to a leader nor to a client, before `flush_wal(sync)` covered
//!    it ([`flusher`]). The first failed write or fsync is final: the store refuses everything after
//!    it ([`engine`]), because a second fsync may claim what the first one lost. What was on its way when
//!    the power failed is cut off ([`torn`]).
//! 2. Data, last applied log id, membership, ring and what is remembered of writes that happen at most
//!    once ([`machine`]) change together, for readers ([`memtable`]) and on
//!    disk ([`flush`]); entries are purged only when the state on disk contains them.
//! 3. The log has no holes between the last purged index and its end ([`log`]).
//! 4. What does not decode is an error, never "absent". Each stored value starts with a version byte.
//! 5. The marker never claims more than is on disk, and a store that holds less than its marker
//!    claims does not open ([`marker`]).
//!
//! Only this module and the ones below it know RocksDB.

mod dedupe;
mod digest;
mod engine;
mod flush;
mod flusher;
pub mod formation;
mod handoffs;
mod image;
pub mod log;
mod machine;
mod marker;
mod memtable;
mod meta;
mod moving;
mod promise;
mod reader;
mod round;
pub mod snapshot;
mod staging;
pub mod state_machine;
mod tail;
#[cfg(test)]
mod tests;
mod torn;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::config::{RaftConfig, StorageConfig};
use crate::types::{ClusterId, NodeId};

pub use digest::StateDigest;
use engine::{Engine, WAL_BYTES_MAX};
use flusher::Flusher;
use formation::Formation;
pub use log::LogStore;
use marker::Marker;
pub use memtable::RowCacheStats;
pub use promise::{LEASE_MAX, Promise};
pub use reader::{LogSize, Lookup, StateReader};
pub use state_machine::StateMachine;

/// RocksDB's directory, in a node's.
const DB_DIR: &str = "db";

/// The directory of images, in a node's.
const SNAPSHOTS_DIR: &str = "snapshots";

/// Everything that can be wrong with a data directory when a node starts.
///
/// Each message names the path. A directory that is in use, not a node's or another node's is left as
/// it was; for the other errors RocksDB may have replayed its log before they showed.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The directory or a file in it cannot be made or read.
    #[error("data directory {path}: {source}")]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Another process, or another node of this process, has it open.
    #[error("data directory {path} is in use by another node")]
    InUse {
        /// The directory.
        path: PathBuf,
    },
    /// It holds something, but not a node's data.
    #[error(
        "{path} is not empty and has no marker file: it is not a node's data directory, or its marker was lost"
    )]
    NotOurs {
        /// The directory.
        path: PathBuf,
    },
    /// It is another node's.
    #[error(
        "{path} belongs to node {found_id} of cluster {found_cluster}, not to node {id} of cluster {cluster}"
    )]
    OtherNode {
        /// The marker file.
        path: PathBuf,
        /// Whose it is.
        found_id: NodeId,
        /// Whose it is.
        found_cluster: ClusterId,
        /// Who asked.
        id: NodeId,
        /// Who asked.
        cluster: ClusterId,
    },
    /// The marker does not decode.
    #[error("{path} is corrupt: {message}. {REPLACE_HINT}")]
    MarkerCorrupt {
        /// The marker file.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },
    /// Less is on disk than the node has vouched for.
    #[error("{path} has lost data: {message}. {REPLACE_HINT}")]
    LostData {
        /// The database directory.
        path: PathBuf,
        /// What is missing.
        message: String,
    },
    /// RocksDB does not open it, or its content does not decode.
    #[error("{path}: {message}. {REPLACE_HINT}")]
    Engine {
        /// The database directory.
        path: PathBuf,
        /// What RocksDB or the decoder said; RocksDB names the file.
        message: String,
    },
}

/// What an operator does about lost or corrupt data: the other replicas have it.
pub(crate) const REPLACE_HINT: &str = "To replace the node, remove it from its cluster's membership, start it \
     with an empty data directory under a new id, and add it as a learner";

/// What [`Store::open`] needs to know.
#[derive(Debug, Clone)]
pub struct StoreOptions {
    /// The data directory; made if absent.
    pub dir: PathBuf,
    /// The node's id.
    pub node_id: NodeId,
    /// The node's cluster.
    pub cluster: ClusterId,
    /// Memory bounds.
    pub storage: StorageConfig,
    /// Batch sizes.
    pub raft: RaftConfig,
    /// How many data files RocksDB keeps open.
    pub open_files_max: i32,
}

/// An open data directory. Owns the flusher thread; [`Store::close`] ends it.
pub struct Store {
    engine: Arc<Engine>,
    flusher: Flusher,
    log: LogStore,
    state: StateMachine,
    formation: Formation,
    /// Held for its lock only.
    _lock: std::fs::File,
}

impl Store {
    /// Opens a data directory, or makes a new one. Blocks for as long as RocksDB replays its log.
    pub fn open(options: &StoreOptions) -> Result<Self, OpenError> {
        let dir = &options.dir;
        let fresh = is_fresh(dir)?;
        let marker_path = dir.join(marker::FILE_NAME);
        if !fresh && !marker_path.exists() {
            return Err(OpenError::NotOurs { path: dir.clone() });
        }
        create_dir(dir).map_err(|source| io_error(dir, source))?;
        let lock = lock(dir)?;
        let marker = Marker::open(&marker_path, options.node_id, &options.cluster)?;
        let snapshots = dir.join(SNAPSHOTS_DIR);
        remove_dir_if_there(&snapshots).map_err(|source| io_error(&snapshots, source))?;
        let unfinished = dir.join(flush::FILE_NAME);
        remove_file_if_there(&unfinished).map_err(|source| io_error(&unfinished, source))?;

        let db_path = dir.join(DB_DIR);
        let failed = |error: io::Error| OpenError::Engine {
            path: db_path.clone(),
            message: error.to_string(),
        };
        let engine = Arc::new(
            Engine::open(&db_path, &options.storage, options.open_files_max).map_err(failed)?,
        );
        engine.check_identity(options.node_id, &options.cluster).map_err(failed)?;
        let verified = engine.verify_blocks().map_err(failed)?;
        let marker = Arc::new(marker);
        let flusher = Flusher::spawn(engine.clone(), marker.clone());
        let log = LogStore::open(engine.clone(), flusher.handle(), marker.clone(), options)
            .map_err(failed)?;
        // What a replay of the write-ahead log can have spoilt lies at the end, with room to spare.
        let checked_bytes = if verified { u64::MAX } else { 2 * WAL_BYTES_MAX };
        log.check_end(checked_bytes).map_err(failed)?;
        let state = StateMachine::open(engine.clone(), snapshots, options).map_err(failed)?;
        let applied = state.last_applied();
        if log.last_purged() > applied {
            let text = "entries were purged that the state does not contain";
            return Err(failed(meta::corrupt("the log", text)));
        }
        let durable = log.last_log_id().max(applied);
        marker
            .check_kept(log.vote(), durable)
            .map_err(|message| OpenError::LostData { path: db_path.clone(), message })?;
        if let Some(applied) = applied {
            log.catch_up_with(applied).map_err(failed)?;
        }
        if log.vote().is_none() && durable.is_none() {
            marker.forget_formation().map_err(|source| io_error(&marker_path, source))?;
        }
        let formation = Formation::new(marker);
        Ok(Self { engine, flusher, log, state, formation, _lock: lock })
    }

    /// The log half, for openraft. Clones share one log.
    pub fn log(&self) -> LogStore {
        self.log.clone()
    }

    /// The state machine half, for openraft. There must be one user of it at a time.
    pub fn state_machine(&self) -> StateMachine {
        self.state.clone()
    }

    /// The read side of the state machine.
    pub fn reader(&self) -> StateReader {
        self.state.reader()
    }

    /// Which forming of its cluster the node belongs to.
    pub fn formation(&self) -> Formation {
        self.formation.clone()
    }

    /// To whom the node has promised its vote.
    pub fn promise(&self) -> Promise {
        self.log.promise()
    }

    /// The receiving end of snapshot transfers.
    pub fn stager(&self) -> snapshot::SnapshotStager {
        self.state.stager()
    }

    /// Flushes state and log, writes the marker, ends the flusher and closes RocksDB. Blocks.
    ///
    /// Other holders of the store's parts must be dropped by now; it waits a little for stragglers,
    /// because the directory can be opened again only when the last of them is gone.
    pub fn close(self) -> io::Result<()> {
        let Self { engine, flusher, log, state, formation: _, _lock } = self;
        state.images.close();
        // In this order: the state's flush syncs the log, too.
        let flushed = state.end();
        let flushed = flusher.stop().and(flushed);
        drop(log);
        drop(state);
        let deadline = Instant::now() + CLOSE_WAIT_MAX;
        while Arc::strong_count(&engine) > 1 && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
        if Arc::strong_count(&engine) > 1 {
            return Err(io::Error::other("the store is still in use by a task that did not end"));
        }
        flushed
    }
}

/// How long [`Store::close`] waits for other holders: tasks that are ending need milliseconds.
const CLOSE_WAIT_MAX: Duration = Duration::from_secs(5);

fn io_error(path: &Path, source: io::Error) -> OpenError {
    OpenError::Io { path: path.into(), source }
}

/// Whether the directory is absent, empty, or was only just begun: the marker is not there yet.
fn is_fresh(dir: &Path) -> Result<bool, OpenError> {
    match std::fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(true),
        Err(error) => Err(io_error(dir, error)),
        Ok(entries) => {
            for entry in entries {
                let entry = entry.map_err(|source| io_error(dir, source))?;
                if ![LOCK_FILE_NAME, marker::TEMPORARY_NAME]
                    .map(Into::into)
                    .contains(&entry.file_name())
                {
                    return Ok(false);
                }
            }
            Ok(true)
        }
    }
}

/// Makes the directory, and makes sure that it is still there after a power loss: it will hold votes.
fn create_dir(dir: &Path) -> io::Result<()> {
    std::fs::create_dir_all(dir)?;
    for parent in std::path::absolute(dir)?.ancestors().skip(1) {
        // Directories of others may not be readable; what was made here is.
        if std::fs::File::open(parent).and_then(|parent| parent.sync_all()).is_err() {
            break;
        }
    }
    Ok(())
}

const LOCK_FILE_NAME: &str = "node.lock";

fn lock(dir: &Path) -> Result<std::fs::File, OpenError> {
    let path = dir.join(LOCK_FILE_NAME);
    let file = std::fs::OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .map_err(|source| io_error(&path, source))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(std::fs::TryLockError::WouldBlock) => Err(OpenError::InUse { path: dir.into() }),
        Err(std::fs::TryLockError::Error(source)) => Err(io_error(&path, source)),
    }
}

fn remove_dir_if_there(path: &Path) -> io::Result<()> {
    match std::fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn remove_file_if_there(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
