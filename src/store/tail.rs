//! The newest log entries in memory, bounded in bytes.
//!
//! A leader reads each entry again once for every follower and once to apply it, nearly always within
//! milliseconds of appending it. The tail serves those reads without touching RocksDB; anything older
//! comes from there. It is a cache of consecutive entries that ends where the log ends, so dropping
//! from its front is always allowed and dropping from its back is not.

use std::collections::VecDeque;

use openraft::entry::RaftEntry;

use crate::types::Entry;

/// What an entry costs besides its key and value.
const ENTRY_OVERHEAD_BYTES: usize = 128;

pub(super) struct Tail {
    entries: VecDeque<(Entry, usize)>,
    bytes: usize,
    bytes_max: usize,
}

impl Tail {
    pub(super) fn new(bytes_max: usize) -> Self {
        Self { entries: VecDeque::new(), bytes: 0, bytes_max }
    }

    /// Adds the log's new last entry. `encoded_bytes` is its size on disk.
    pub(super) fn push(&mut self, entry: Entry, encoded_bytes: usize) {
        // After a snapshot the log goes on beyond what is here.
        if self.entries.back().is_some_and(|(last, _)| last.index() + 1 != entry.index()) {
            self.truncate_after(None);
        }
        let bytes = encoded_bytes + ENTRY_OVERHEAD_BYTES;
        self.bytes += bytes;
        self.entries.push_back((entry, bytes));
        while self.bytes > self.bytes_max && !self.entries.is_empty() {
            self.pop_front();
        }
    }

    /// Forgets the entries above `last` (all, if `None`): the log was cut there.
    pub(super) fn truncate_after(&mut self, last: Option<u64>) {
        while let Some((entry, bytes)) = self.entries.back() {
            if last.is_some_and(|last| entry.index() <= last) {
                return;
            }
            self.bytes -= bytes;
            self.entries.pop_back();
        }
    }

    /// Forgets the entries up to and including `last`: the log was purged up to there.
    pub(super) fn purge(&mut self, last: u64) {
        while self.entries.front().is_some_and(|(entry, _)| entry.index() <= last) {
            self.pop_front();
        }
    }

    /// The entries of `start..end` if `start` is in memory: at least one of them, and no more than
    /// about `bytes_max`. `None` when the disk must be asked.
    pub(super) fn read(&self, start: u64, end: u64, bytes_max: usize) -> Option<Vec<Entry>> {
        let first = self.entries.front()?.0.index();
        if start < first {
            return None;
        }
        let skip = usize::try_from(start - first).ok()?;
        let mut bytes_left = bytes_max;
        let mut found = Vec::new();
        for (entry, bytes) in self.entries.iter().skip(skip) {
            if entry.index() >= end || (*bytes > bytes_left && !found.is_empty()) {
                break;
            }
            bytes_left = bytes_left.saturating_sub(*bytes);
            found.push(entry.clone());
        }
        Some(found)
    }

    fn pop_front(&mut self) {
        if let Some((_, bytes)) = self.entries.pop_front() {
            self.bytes -= bytes;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::LogId;
    use openraft::vote::leader_id_adv::LeaderId;

    fn entry(index: u64) -> Entry {
        Entry::new_blank(LogId { leader_id: LeaderId { term: 1, node_id: 1 }, index })
    }

    fn indexes(entries: Option<Vec<Entry>>) -> Option<Vec<u64>> {
        entries.map(|entries| entries.iter().map(RaftEntry::index).collect())
    }

    #[test]
    fn it_keeps_the_newest_entries_within_its_bound() {
        let mut tail = Tail::new(3 * (ENTRY_OVERHEAD_BYTES + 10));
        (1..=5).for_each(|index| tail.push(entry(index), 10));
        assert_eq!(indexes(tail.read(2, 6, usize::MAX)), None);
        assert_eq!(indexes(tail.read(3, 6, usize::MAX)), Some(vec![3, 4, 5]));
        assert_eq!(indexes(tail.read(4, 5, usize::MAX)), Some(vec![4]));
        assert_eq!(indexes(tail.read(3, 6, 1)), Some(vec![3]));
        tail.truncate_after(Some(4));
        tail.purge(3);
        assert_eq!(indexes(tail.read(4, 9, usize::MAX)), Some(vec![4]));
        tail.truncate_after(None);
        assert_eq!(indexes(tail.read(4, 9, usize::MAX)), None);
    }
}
