//! RocksDB, opened and set for this use, and the rule that its first failure is its last.
//!
//! Every write of the log goes through [`Engine::write`], its fsyncs through [`Engine::sync`]. When one of
//! them, or a flush, fails, the engine remembers it and refuses all further writes: pages that an fsync
//! could not write may be dropped by the kernel, so a later success would prove nothing (the "fsyncgate"
//! reports of 2018). Readers ask [`Engine::check`] first; the node watches [`Engine::failure`] and stops serving.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rocksdb::{
    BlockBasedIndexType, BlockBasedOptions, BoundColumnFamily, Cache, ColumnFamilyDescriptor,
    DBCompressionType, DBRecoveryMode, DBWithThreadMode, DataBlockIndexType, FlushOptions,
    IngestExternalFileOptions, IteratorMode, LogLevel, MultiThreaded, Options, ReadOptions,
    SstFileWriter, WriteBatch, WriteOptions,
};
use tokio::sync::watch;

use crate::config::StorageConfig;
use crate::types::{ClusterId, NodeId};

use super::{meta, remove_file_if_there, torn};

pub(super) type Db = DBWithThreadMode<MultiThreaded>;
pub(super) type Cf<'a> = Arc<BoundColumnFamily<'a>>;

/// Column family of the Raft log: index (u64, big-endian) to encoded entry.
pub(super) const CF_LOG: &str = "log";
/// Column family of everything that is small and single: see [`meta`].
pub(super) const CF_META: &str = "meta";
/// Column families of the data start with this; a number follows. One of them is active.
pub(super) const CF_DATA_PREFIX: &str = "data-";

/// A block of a data file, of its index and of its filter; and what the cache of blocks is laid out for. It has no
/// lock and no list of what was used last, which were a quarter of a read that finds its row in a file.
const BLOCK_BYTES: usize = 4 << 10;

/// Data files up to this size in all are read through once at start, so that a flipped bit in any of
/// them is found before the node serves. Reading them takes well under a second; a larger store is
/// checked block by block as it is read, and by compaction.
const VERIFY_BYTES_MAX: u64 = 256 << 20;

/// RocksDB's own log files: few and small, so that they never fill a disk.
const INFO_LOG_BYTES_MAX: usize = 4 << 20;
const INFO_LOG_FILES_MAX: usize = 3;

/// RocksDB's list of its files begins anew at this size, in bytes.
const MANIFEST_BYTES_MAX: usize = 4 << 20;

/// One of RocksDB's own memtables, and how many a family may have: the log's entries, and what a
/// snapshot transfer stages. A write that must wait for one holds up consensus, so a few.
const MEMTABLE_BYTES: usize = 16 << 20;
const MEMTABLES_MAX: i32 = 4;

/// RocksDB's own files go to the disk in steps of this size while they are written: an fsync of the log finds
/// no more than this before it in the disk's queue for each of them.
const ROCKSDB_FILE_STEP_BYTES: u64 = 256 << 10;

/// Data files of ours do the same by an fsync, which costs more than a step of RocksDB's: so larger ones.
const OUR_FILE_STEP_BYTES: usize = 1 << 20;

/// The write-ahead log is cut once it holds this much; a restart replays at most that.
pub(super) const WAL_BYTES_MAX: u64 = 64 << 20;

pub(super) struct Engine {
    db: Db,
    path: PathBuf,
    cache: Cache,
    /// `Some` once a write or fsync failed.
    failure: watch::Sender<Option<String>>,
}

impl Engine {
    pub(super) fn open(
        path: &Path,
        storage: &StorageConfig,
        open_files_max: i32,
    ) -> io::Result<Self> {
        let mut options = db_options();
        options.set_max_open_files(open_files_max);
        let cache = Cache::new_hyper_clock_cache(storage.block_cache_bytes, BLOCK_BYTES);
        let names = if path.join("CURRENT").exists() {
            Db::list_cf(&options, path).map_err(to_io)?
        } else {
            vec!["default".to_owned()]
        };
        let missing = [CF_LOG, CF_META].into_iter().filter(|name| !names.iter().any(|n| n == name));
        let all: Vec<&str> = names.iter().map(String::as_str).chain(missing).collect();
        if path.exists()
            && let Some(torn) = torn::cut_torn_end(path)?
        {
            tracing::warn!(?torn, "the last write was not finished when the power failed");
        }
        let families =
            all.iter().map(|name| ColumnFamilyDescriptor::new(*name, family_options(name, &cache)));
        let db = Db::open_cf_descriptors(&options, path, families).map_err(to_io)?;
        let failure = watch::Sender::new(None);
        Ok(Self { db, path: path.into(), cache, failure })
    }

    /// Opens a checkpoint for reading, with little memory: it is read once, in order.
    ///
    /// Not with RocksDB's read-only mode: replaying a write-ahead log there dereferences a null
    /// pointer (11.8.1, `RecoveryContext::UpdateVersionEdits`). A checkpoint is a database of its own,
    /// so opening it for writing harms nothing.
    pub(super) fn open_image(path: &Path) -> io::Result<Db> {
        let mut options = Options::default();
        options.set_max_open_files(64);
        options.set_log_level(LogLevel::Warn);
        // An option of each family. Else the image would rewrite itself: what were links become copies,
        // made at full speed, while the live database's compactions wait for the same thread.
        let mut family = Options::default();
        family.set_disable_auto_compactions(true);
        let names = Db::list_cf(&options, path).map_err(to_io)?;
        let families = names.into_iter().map(|name| (name, family.clone()));
        Db::open_cf_with_opts(&options, path, families).map_err(to_io)
    }

    pub(super) fn db(&self) -> &Db {
        &self.db
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn family(&self, name: &str) -> io::Result<Cf<'_>> {
        family(&self.db, name)
    }

    pub(super) fn create_family(&self, name: &str) -> io::Result<()> {
        self.check()?;
        let options = family_options(name, &self.cache);
        self.db.create_cf(name, &options).map_err(to_io)
    }

    /// Removes a family for good. Not once storage has failed: nobody knows then what the disk names.
    pub(super) fn drop_family(&self, name: &str) -> io::Result<()> {
        self.check()?;
        self.db.drop_cf(name).map_err(to_io)
    }

    /// Applies a batch: readable at once, on disk after the next [`Engine::sync`].
    pub(super) fn write(&self, batch: WriteBatch) -> io::Result<()> {
        self.check()?;
        self.db.write(batch).map_err(|error| self.fail("write", &error))
    }

    /// Applies a batch outside the write-ahead log: for staging, which a crash may lose.
    pub(super) fn write_unlogged(&self, batch: WriteBatch) -> io::Result<()> {
        self.check()?;
        let mut options = WriteOptions::default();
        options.disable_wal(true);
        self.db.write_opt(batch, &options).map_err(|error| self.fail("write", &error))
    }

    /// Fsyncs everything written so far. Blocks for as long as the disk takes.
    pub(super) fn sync(&self) -> io::Result<()> {
        self.check()?;
        self.db.flush_wal(true).map_err(|error| self.fail("fsync", &error))
    }

    /// Writes a column family's memtables to files and fsyncs them.
    pub(super) fn flush_family(&self, name: &str) -> io::Result<()> {
        self.check()?;
        let mut options = FlushOptions::default();
        options.set_wait(true);
        let family = self.family(name)?;
        self.db.flush_cf_opt(&family, &options).map_err(|error| self.fail("flush", &error))
    }

    /// Writes a data file with sorted rows and puts it on top of a family's other files: on disk and
    /// visible, all of it, when this returns, unless `fill` was broken off. `path` lies in the database's file system.
    pub(super) fn add_file(
        &self,
        family: &str,
        path: &Path,
        fill: impl FnOnce(&mut DataFile<'_>) -> io::Result<Fill>,
    ) -> io::Result<Fill> {
        self.check()?;
        let options = family_options(family, &self.cache);
        // RocksDB takes a file over by a link, and only logs it if it cannot remove the old name: written
        // through that, this file would be another's content.
        remove_file_if_there(path)?;
        let mut file = DataFile { writer: SstFileWriter::create(&options), path, unsynced: 0 };
        file.writer.open(path).map_err(to_io)?;
        if fill(&mut file)? == Fill::BrokenOff {
            drop(file);
            remove_file_if_there(path)?;
            return Ok(Fill::BrokenOff);
        }
        file.writer.finish().map_err(to_io)?;
        let mut ingest = IngestExternalFileOptions::default();
        ingest.set_move_files(true);
        let family = self.family(family)?;
        self.db.ingest_external_file_cf_opts(&family, &ingest, vec![path]).map_err(to_io)?;
        Ok(Fill::Done)
    }

    /// One of RocksDB's numbers about a column family; 0 where it knows none.
    pub(super) fn number(&self, family: &str, property: &str) -> io::Result<u64> {
        let family = self.family(family)?;
        Ok(self.db.property_int_value_cf(&family, property).map_err(to_io)?.unwrap_or(0))
    }

    /// An error if the storage has failed.
    pub(super) fn check(&self) -> io::Result<()> {
        match &*self.failure.borrow() {
            None => Ok(()),
            Some(message) => Err(io::Error::other(message.clone())),
        }
    }

    /// Tells of the failure when it comes.
    pub(super) fn failure(&self) -> watch::Receiver<Option<String>> {
        self.failure.subscribe()
    }

    /// Remembers the first failure; returns the error to hand on.
    pub(super) fn fail(&self, verb: &str, error: &dyn std::fmt::Display) -> io::Error {
        let message = format!("{verb} in {} failed: {error}", self.path.display());
        let first = self.failure.send_if_modified(|failure| {
            let first = failure.is_none();
            if first {
                *failure = Some(message.clone());
            }
            first
        });
        if first {
            tracing::error!(%message, "storage has failed; this node stops serving");
        }
        io::Error::other(message)
    }

    /// Writes the owner into a new database; refuses another owner's. The marker beside the database
    /// says the same: this catches a `db` directory that was moved under a foreign marker.
    pub(super) fn check_identity(&self, id: NodeId, cluster: &ClusterId) -> io::Result<()> {
        let mine = meta::encode_identity(id, cluster);
        let family = self.family(CF_META)?;
        match self.db.get_cf(&family, meta::KEY_IDENTITY).map_err(to_io)? {
            Some(found) if found == mine => Ok(()),
            Some(found) => {
                let (id, cluster) = meta::decode_identity(&found)?;
                let text = format!("the database belongs to node {id} of cluster {cluster}");
                Err(io::Error::other(text))
            }
            None => {
                let mut batch = WriteBatch::default();
                batch.put_cf(&family, meta::KEY_IDENTITY, mine);
                self.write(batch)?;
                self.sync()
            }
        }
    }

    /// Reads every block of a small store once, so that a flipped bit is found before it is served.
    /// True if it did.
    pub(super) fn verify_blocks(&self) -> io::Result<bool> {
        let names = Db::list_cf(&Options::default(), &self.path).map_err(to_io)?;
        let mut bytes = 0;
        for name in &names {
            bytes += self.number(name, "rocksdb.total-sst-files-size")?;
        }
        if bytes > VERIFY_BYTES_MAX {
            tracing::info!(bytes, "the store is large: blocks are checked as they are read");
            return Ok(false);
        }
        for name in &names {
            let mut options = ReadOptions::default();
            options.fill_cache(false);
            options.set_verify_checksums(true);
            let family = self.family(name)?;
            for item in self.db.iterator_cf_opt(&family, options, IteratorMode::Start) {
                item.map_err(to_io)?;
            }
        }
        Ok(true)
    }
}

/// Whether a data file has all its rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fill {
    Done,
    /// Nobody wants it any more.
    BrokenOff,
}

/// A data file that is being written, in the order of its keys.
pub(super) struct DataFile<'a> {
    writer: SstFileWriter<'a>,
    path: &'a Path,
    /// Bytes since the last fsync.
    unsynced: usize,
}

impl DataFile<'_> {
    pub(super) fn put(&mut self, key: &[u8], value: &[u8]) -> io::Result<()> {
        self.writer.put(key, value).map_err(to_io)?;
        self.pace(key.len() + value.len())
    }

    pub(super) fn delete(&mut self, key: &[u8]) -> io::Result<()> {
        self.writer.delete(key).map_err(to_io)?;
        self.pace(key.len())
    }

    /// Deletes every key from `from` up to, and without, `to`, that older files have.
    pub(super) fn delete_range(&mut self, from: &[u8], to: &[u8]) -> io::Result<()> {
        self.writer.delete_range(from, to).map_err(to_io)
    }

    /// Sends what was written to the disk now and then. Left to the end, the fsync of a whole file
    /// would hold up those of the log.
    fn pace(&mut self, bytes: usize) -> io::Result<()> {
        self.unsynced += bytes;
        if self.unsynced >= OUR_FILE_STEP_BYTES {
            self.unsynced = 0;
            std::fs::File::open(self.path)?.sync_data()?;
        }
        Ok(())
    }
}

pub(super) fn family<'a>(db: &'a Db, name: &str) -> io::Result<Cf<'a>> {
    db.cf_handle(name)
        .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, format!("no column family {name}")))
}

/// RocksDB's errors name the file; they become plain I/O errors above this module.
pub(super) fn to_io(error: rocksdb::Error) -> io::Error {
    io::Error::other(error.into_string())
}

fn db_options() -> Options {
    // Left to the end, 16 MiB of a memtable went to the disk at once, and every fsync of the log behind them
    // took 26 to 39 ms. `bytes_per_sync` begins to write early but waits for nothing; with
    // `strict_bytes_per_sync`, for which the crate has no function, a step begins when the last one is done.
    let mut options = Options::default()
        .get_options_from_string("strict_bytes_per_sync=true")
        .expect("RocksDB knows its own options");
    options.set_bytes_per_sync(ROCKSDB_FILE_STEP_BYTES);
    options.create_if_missing(true);
    options.create_missing_column_families(true);
    // The default mode opens "ok" after a flipped bit in the middle of the log, without what follows
    // it. This one takes only an unfinished record at the very end for a crash.
    options.set_wal_recovery_mode(DBRecoveryMode::TolerateCorruptedTailRecords);
    // A write-ahead log file that vanished whole is an error, too.
    options.set_track_and_verify_wals_in_manifest(true);
    // Writes reach the file when the flusher asks: one system call for a group.
    options.set_manual_wal_flush(true);
    options.set_max_total_wal_size(WAL_BYTES_MAX);
    // One flush of the log and one compaction at a time: the node's threads need the processor more.
    options.set_max_background_jobs(2);
    // Every image has a copy of it, and opens with all that it says.
    options.set_max_manifest_file_size(MANIFEST_BYTES_MAX);
    options.set_keep_log_file_num(INFO_LOG_FILES_MAX);
    options.set_max_log_file_size(INFO_LOG_BYTES_MAX);
    options.set_log_level(LogLevel::Warn);
    options
}

fn family_options(name: &str, cache: &Cache) -> Options {
    let mut options = Options::default();
    let mut table = BlockBasedOptions::default();
    table.set_block_cache(cache);
    table.set_cache_index_and_filter_blocks(true);
    table.set_pin_l0_filter_and_index_blocks_in_cache(true);
    // Version 6 puts a checksum on the footer as well: every byte of a file is covered.
    table.set_format_version(6);
    if name.starts_with(CF_DATA_PREFIX) {
        // Applied rows come as finished files ([`super::flush`]). A read of a key that is in none of
        // them asks no file: 10 bits a key are wrong once in a hundred times.
        table.set_bloom_filter(10.0, false);
        // Records are small and read one by one: a block that is not in the cache costs a read and a
        // decompression, four times less than with 16 KiB. In a block, a hash finds the key.
        table.set_block_size(BLOCK_BYTES);
        table.set_data_block_index_type(DataBlockIndexType::BinaryAndHash);
        // A file of 64 MiB has an index and a filter of most of a megabyte each. As single blocks they
        // push each other and hundreds of others out of the cache, and are read whole for each key: nine
        // tenths of a read with ten million keys. So they are blocks of 4 KiB, too, under small tops
        // that stay.
        table.set_index_type(BlockBasedIndexType::TwoLevelIndexSearch);
        table.set_partition_filters(true);
        table.set_metadata_block_size(BLOCK_BYTES);
        table.set_pin_top_level_index_and_filter(true);
        options.set_compression_type(DBCompressionType::Lz4);
    } else if name == CF_LOG {
        // Entries live shortly and are read in order: no filter, no compression. Most are purged
        // before their memtable is written, as a range, and never reach a file's second level.
        options.set_compression_type(DBCompressionType::None);
    }
    if name == CF_META {
        options.set_write_buffer_size(1 << 20);
    } else {
        options.set_write_buffer_size(MEMTABLE_BYTES);
        options.set_max_write_buffer_number(MEMTABLES_MAX);
    }
    // RocksDB's brakes on one family's writers hold up those of all, and so the Raft log, whose writes the
    // core of Raft waits for: heartbeats and votes would wait for a compaction. Flushes of data wait by
    // themselves ([`super::flush`]). Staged snapshots come in the order of their keys, in files that need no
    // merging. The log's files are merged or purged as soon as a compaction of data leaves them the thread.
    options.set_level_zero_slowdown_writes_trigger(i32::MAX);
    options.set_level_zero_stop_writes_trigger(i32::MAX);
    options.set_soft_pending_compaction_bytes_limit(0);
    options.set_hard_pending_compaction_bytes_limit(0);
    options.set_block_based_table_factory(&table);
    options
}
