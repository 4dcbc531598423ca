//! The answers of one client, by sequence.
//!
//! A client counts upwards and takes its answers from below, so nearly all that happens here happens at
//! the two ends of a short queue, which is cheaper than a tree then. But it may also send sequences in
//! any order, and leave many answers where they are, and an answer must not be dearer to insert for that.
//! So the queue is short by force, and what does not fit into it stands in a tree:
//!
//! ```text
//! older: a tree of any size  <  recent: a sorted queue of at most RECENT_MAX
//! ```
//! Every sequence in `older` is lower than every one in `recent`.

use std::collections::{BTreeMap, VecDeque};

use super::Answer;

/// How long the queue may get. In the middle of a full one an answer costs some microseconds to insert;
/// a client of this store has rarely more under way at one cluster.
const RECENT_MAX: usize = 1024;

/// See the module.
#[derive(Debug)]
pub(super) struct Answers<T = Answer> {
    older: BTreeMap<u64, T>,
    recent: VecDeque<(u64, T)>,
}

impl<T> Default for Answers<T> {
    fn default() -> Self {
        Self { older: BTreeMap::new(), recent: VecDeque::new() }
    }
}

impl<T> Answers<T> {
    pub(super) fn is_empty(&self) -> bool {
        self.older.is_empty() && self.recent.is_empty()
    }

    pub(super) fn get(&self, seq: u64) -> Option<&T> {
        match self.place(seq) {
            Ok(place) => Some(&self.recent[place].1),
            Err(_) => self.older.get(&seq),
        }
    }

    /// The highest sequence.
    pub(super) fn last(&self) -> Option<u64> {
        let older = || self.older.last_key_value().map(|(seq, _)| *seq);
        self.recent.back().map(|(seq, _)| *seq).or_else(older)
    }

    /// The answer that was there, if one was.
    pub(super) fn insert(&mut self, seq: u64, answer: T) -> Option<T> {
        // The usual case.
        if self.recent.back().is_some_and(|(last, _)| *last < seq) {
            self.recent.push_back((seq, answer));
        } else {
            match self.place(seq) {
                Ok(place) => {
                    return Some(std::mem::replace(&mut self.recent[place].1, answer));
                }
                // Below the queue there may be something of the tree in between.
                Err(0) if self.older.last_key_value().is_some_and(|(last, _)| *last >= seq) => {
                    return self.older.insert(seq, answer);
                }
                Err(place) => self.recent.insert(place, (seq, answer)),
            }
        }
        if self.recent.len() > RECENT_MAX {
            self.older.extend(self.recent.drain(..RECENT_MAX / 2));
        }
        None
    }

    pub(super) fn remove(&mut self, seq: u64) -> Option<T> {
        match self.place(seq) {
            Ok(place) => self.recent.remove(place).map(|(_, answer)| answer),
            Err(_) => self.older.remove(&seq),
        }
    }

    /// The lowest answer at or above this sequence.
    pub(super) fn next(&self, from: u64) -> Option<(u64, &T)> {
        self.from(from).next()
    }

    /// All of them, ascending.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u64, &T)> {
        self.from(0)
    }

    /// Those at or above this sequence, ascending.
    pub(super) fn from(&self, from: u64) -> impl Iterator<Item = (u64, &T)> {
        let older = self.older.range(from..).map(|(seq, answer)| (*seq, answer));
        let start = self.place(from).unwrap_or_else(|place| place);
        older.chain(self.recent.range(start..).map(|(seq, answer)| (*seq, answer)))
    }

    pub(super) fn retain(&mut self, mut stays: impl FnMut(u64, &T) -> bool) {
        self.older.retain(|seq, answer| stays(*seq, answer));
        self.recent.retain(|(seq, answer)| stays(*seq, answer));
    }

    /// Where in the queue it is, or would be.
    fn place(&self, seq: u64) -> Result<usize, usize> {
        match self.recent.front() {
            // Nearly everything is taken from the front.
            Some((first, _)) if *first == seq => Ok(0),
            Some((first, _)) if *first < seq => {
                self.recent.binary_search_by_key(&seq, |(seq, _)| *seq)
            }
            _ => Err(0),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// It is a map, whatever the order of what comes and goes, also when the queue runs over.
        #[test]
        fn it_is_a_map(steps in vec((0u8..8, 0u64..6000), 0..6000)) {
            let (mut answers, mut map) = (Answers::default(), BTreeMap::new());
            let mut next = 3000;
            for (n, (what, seq)) in steps.into_iter().enumerate() {
                match what {
                    0..4 => {
                        next += seq % 3;
                        prop_assert_eq!(answers.insert(next, n), map.insert(next, n));
                    }
                    4 | 5 => prop_assert_eq!(answers.insert(seq, n), map.insert(seq, n)),
                    6 => prop_assert_eq!(answers.remove(seq), map.remove(&seq)),
                    _ => {
                        let lowest = answers.next(seq).map(|(seq, _)| seq);
                        prop_assert_eq!(lowest, map.range(seq..).next().map(|(seq, _)| *seq));
                        if let Some(seq) = lowest {
                            prop_assert_eq!(answers.remove(seq), map.remove(&seq));
                        }
                    }
                }
                prop_assert_eq!(answers.get(seq), map.get(&seq));
                prop_assert_eq!(answers.last(), map.last_key_value().map(|(seq, _)| *seq));
                prop_assert_eq!(answers.is_empty(), map.is_empty());
                prop_assert!(answers.recent.len() <= RECENT_MAX);
            }
            answers.retain(|seq, _| seq % 5 != 0);
            map.retain(|seq, _| seq % 5 != 0);
            let all: Vec<_> = answers.iter().map(|(seq, n)| (seq, *n)).collect();
            prop_assert_eq!(&all, &map.iter().map(|(seq, n)| (*seq, *n)).collect::<Vec<_>>());
            let some = answers.from(3100).map(|(seq, _)| seq).collect::<Vec<_>>();
            prop_assert_eq!(some, map.range(3100..).map(|(seq, _)| *seq).collect::<Vec<_>>());
        }
    }
}
