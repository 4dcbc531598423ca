//! The end of RocksDB's write-ahead log after a power cut.
//!
//! A group of records that was on its way to the disk when the power failed may be there in part. A file that is
//! too short is nothing new to RocksDB. But a file system may have noted the file's new length before all of its
//! pages were written: those that are missing read as zeros. RocksDB takes a record with such a hole for a broken
//! one, as if a bit had flipped in what was fsynced long ago, and refuses to open. Where the hole begins with a
//! record, it passes over the rest of the block, and goes on with what comes after it if that fits.
//!
//! The two can be told apart: the disk writes whole sectors, and a bit that flips makes neither a sector nor a
//! header of zeros. So where the first record that is not whole has a sector of zeros in it, or none of its header,
//! and anything follows, the file is cut before that record. Nobody was told that it was on disk: records of a
//! group that was fsynced have no holes. Everything else stays an error. (etcd tells a torn write from a broken
//! one in the same way.) What a disk that loses whole sectors takes away besides is noticed by the marker, if it
//! is older than a second; and so is a bit that flips in a record which has a sector of zeros of its own, in a value.
//! What is cut off is kept beside the file.
//!
//! Only the newest file is looked at. RocksDB writes an older one to the disk before the newer one, so that has
//! no hole.
//!
//! The format is that of `db/log_format.h`: blocks of 32 KiB, in each a row of fragments with a header of checksum,
//! length and kind, none of which crosses the end of its block; what is too short for a header is zeros.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

const BLOCK: usize = 32 << 10;

/// A checksum of 4 bytes, a length of 2, a kind.
const HEADER: usize = 7;

/// What a disk writes whole or not at all.
const SECTOR: usize = 512;

/// What is kept of the file that is cut.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Torn {
    pub(super) file: PathBuf,
    /// Its length now, in bytes.
    pub(super) kept: u64,
    /// How much was cut off, in bytes.
    pub(super) cut: u64,
}

/// Cuts the newest write-ahead log file of a database before a record that is there in part; `None`, and nothing
/// has changed, if there is none. Blocks on the disk, and reads the whole file, which the database is about to do
/// as well; it is no larger than all of them may be together ([`WAL_BYTES_MAX`](super::engine::WAL_BYTES_MAX)).
///
/// The database must be closed.
pub(super) fn cut_torn_end(db: &Path) -> io::Result<Option<Torn>> {
    let Some(path) = newest_file(db)? else { return Ok(None) };
    let bytes = fs::read(&path)?;
    let Some(end) = torn_at(&bytes) else { return Ok(None) };
    let kept = path.with_extension("torn");
    let keep = || {
        File::create(&kept).and_then(|mut file| {
            file.write_all(&bytes[end..])?;
            file.sync_all()
        })
    };
    if let Err(error) = keep() {
        tracing::warn!(path = %kept.display(), %error, "what is cut off the log cannot be kept");
    }
    let file = File::options().write(true).open(&path)?;
    file.set_len(end as u64)?;
    file.sync_all()?;
    Ok(Some(Torn { file: path, kept: end as u64, cut: (bytes.len() - end) as u64 }))
}

/// Files that are empty do not count: a new one is made before anything is written to it.
fn newest_file(db: &Path) -> io::Result<Option<PathBuf>> {
    let mut newest: Option<(u64, PathBuf)> = None;
    for file in fs::read_dir(db)? {
        let file = file?;
        let path = file.path();
        let is_log = path.extension() == Some(OsStr::new("log"));
        let number = path.file_stem().and_then(OsStr::to_str).and_then(|stem| stem.parse().ok());
        let Some(number) = number.filter(|_| is_log) else { continue };
        let is_newer = newest.as_ref().is_none_or(|(other, _)| number > *other);
        if is_newer && file.metadata()?.len() > 0 {
            newest = Some((number, path));
        }
    }
    Ok(newest.map(|(_, path)| path))
}

/// Where the first record begins that is not whole, if it has a hole.
fn torn_at(bytes: &[u8]) -> Option<usize> {
    let mut at = 0;
    // Where the record begins of which fragments were read, but not the last one.
    let mut begun = None;
    loop {
        let room = BLOCK - at % BLOCK;
        if room < HEADER {
            at += room;
            continue;
        }
        let record = begun.unwrap_or(at);
        // An unfinished end is RocksDB's own business.
        let header = bytes.get(at..at + HEADER)?;
        let length = usize::from(u16::from_le_bytes([header[4], header[5]]));
        let whole = at..at + HEADER + length;
        let kind = Kind::of(header[6]);
        if kind.is_none() || HEADER + length > room {
            let is_missing = header.iter().all(|byte| *byte == 0);
            let is_end = begun.is_none() && bytes[at..].iter().all(|byte| *byte == 0);
            let is_torn = is_missing || has_hole(bytes, at..at + HEADER);
            return (!is_end && is_torn).then_some(record);
        }
        let fragment = bytes.get(whole.clone())?;
        let stored = u32::from_le_bytes([header[0], header[1], header[2], header[3]]);
        if masked(crc32c::crc32c(&fragment[HEADER - 1..])) != stored {
            return has_hole(bytes, whole).then_some(record);
        }
        begun = match kind? {
            Kind::First => Some(at),
            Kind::Middle => begun,
            Kind::Alone | Kind::Last => None,
        };
        at = whole.end;
    }
}

/// What a fragment is of its record.
#[derive(Debug, Clone, Copy)]
enum Kind {
    /// All of it, or something else than a record.
    Alone,
    First,
    Middle,
    Last,
}

impl Kind {
    /// `None` for what no header of these files says: their numbers are not used again.
    fn of(byte: u8) -> Option<Self> {
        match byte {
            // Compression, sizes of timestamps, the file before: each at the beginning of a file. (Elsewhere there
            // could be more zeros before them than are too short for a header; what makes such is switched off.)
            1 | 9 | 10 | 130 => Some(Self::Alone),
            2 => Some(Self::First),
            3 => Some(Self::Middle),
            4 => Some(Self::Last),
            _ => None,
        }
    }
}

/// Whether one of the sectors that these bytes lie in is zeros, or as much of the first as is theirs: what lies
/// before them was on disk already.
fn has_hole(bytes: &[u8], range: Range<usize>) -> bool {
    let first = range.start..range.start.next_multiple_of(SECTOR).min(bytes.len());
    if !first.is_empty() && bytes[first].iter().all(|byte| *byte == 0) {
        return true;
    }
    let sectors = range.start / SECTOR..range.end.div_ceil(SECTOR);
    let mut sectors =
        sectors.filter_map(|n| bytes.get(n * SECTOR..bytes.len().min((n + 1) * SECTOR)));
    sectors.any(|sector| sector.iter().all(|byte| *byte == 0))
}

/// As RocksDB stores a checksum: it may be part of data that is checked again.
fn masked(crc: u32) -> u32 {
    crc.rotate_right(15).wrapping_add(0xa282_ead8)
}
