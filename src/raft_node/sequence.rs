//! A client's name, and the numbers of its writes.
//!
//! Every write of a client carries its name and a number of its own, so that it may be sent any number
//! of times and happens once ([`crate::once`]). With them goes the client's floor: the lowest number
//! that somebody may still send. A number is in use from [`Sequence::issue`] until its [`Issued`] is
//! dropped, because then nobody is left who would repeat the write, whether it was answered, given up
//! or its future dropped.
//!
//! The floor costs a bit for each number since it, 64 to a word; words that are full fall off the front.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::once::{ClientFloor, ClientName};

/// Random bits in a name are 6 times this: enough that no two clients ever draw the same.
const NAME_CHARS: usize = 16;

/// Base64's URL-safe alphabet: none of it needs escaping anywhere.
const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";

const WORD_BITS: u64 = u64::BITS as u64;

/// The numbers of one client's writes.
#[derive(Debug)]
pub(crate) struct Sequence {
    client: ClientName,
    window: Mutex<Window>,
}

/// Which numbers are done, from the floor on.
#[derive(Debug)]
struct Window {
    /// The next number.
    next: u64,
    /// A bit for each number: set when it is done. The first word is never full.
    words: VecDeque<u64>,
    /// How many words have fallen off the front.
    fallen: u64,
}

/// A number in use.
#[derive(Debug)]
pub(super) struct Issued<'a> {
    sequence: &'a Sequence,
    seq: u64,
}

impl Sequence {
    /// A sequence with a name that nobody has.
    pub(crate) fn new() -> Self {
        let name: [u8; NAME_CHARS] = rand::random();
        let name: String =
            name.iter().map(|random| char::from(ALPHABET[usize::from(random % 64)])).collect();
        let client = name.parse().expect("16 letters of the alphabet are a name");
        Self { client, window: Mutex::new(Window::new()) }
    }

    /// The next number.
    pub(super) fn issue(&self) -> Issued<'_> {
        Issued { sequence: self, seq: self.window().issue() }
    }

    /// Name and floor to go with writes of which `lowest` is the lowest number.
    pub(super) fn client_floor(&self, lowest: u64) -> ClientFloor {
        // Whoever asked for a write that is about to be sent may have gone since it was taken.
        let floor = self.window().floor().min(lowest);
        ClientFloor { client: self.client.clone(), floor }
    }

    fn window(&self) -> MutexGuard<'_, Window> {
        // Nothing inside can be half done: a panic elsewhere is no reason to fail here.
        self.window.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Issued<'_> {
    pub(super) fn seq(&self) -> u64 {
        self.seq
    }

    /// Name and floor to go with this write alone.
    pub(super) fn client_floor(&self) -> ClientFloor {
        self.sequence.client_floor(self.seq)
    }
}

impl Drop for Issued<'_> {
    fn drop(&mut self) {
        self.sequence.window().done(self.seq);
    }
}

impl Window {
    /// Numbers begin with 1: 0 is done from the start.
    fn new() -> Self {
        Self { next: 1, words: VecDeque::from([1]), fallen: 0 }
    }

    fn issue(&mut self) -> u64 {
        let seq = self.next;
        self.next += 1;
        if self.place(seq).0 == self.words.len() {
            self.words.push_back(0);
        }
        seq
    }

    fn done(&mut self, seq: u64) {
        let (word, bit) = self.place(seq);
        self.words[word] |= 1 << bit;
        while self.words.front() == Some(&u64::MAX) {
            self.words.pop_front();
            self.fallen += 1;
        }
    }

    /// The lowest number that is in use, or the next one.
    fn floor(&self) -> u64 {
        let done = self.words.front().map_or(0, |word| u64::from(word.trailing_ones()));
        self.fallen * WORD_BITS + done
    }

    /// The word and the bit in it. Numbers in use lie at or above the floor, so it has not fallen.
    fn place(&self, seq: u64) -> (usize, u32) {
        let word = seq / WORD_BITS - self.fallen;
        (usize::try_from(word).expect("words are in memory"), (seq % WORD_BITS) as u32)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn names_are_random_and_fit_into_a_header() {
        let (a, b) = (Sequence::new().client, Sequence::new().client);
        assert_ne!(a, b);
        assert_eq!(a.as_str().len(), NAME_CHARS);
    }

    #[test]
    fn a_number_is_in_use_until_it_is_dropped() {
        let sequence = Sequence::new();
        let (first, second) = (sequence.issue(), sequence.issue());
        assert_eq!((first.seq(), second.seq()), (1, 2));
        drop(second);
        assert_eq!(first.client_floor().floor, 1);
        drop(first);
        assert_eq!(sequence.client_floor(u64::MAX).floor, 3);
        assert_eq!(sequence.client_floor(2).floor, 2, "never above what is sent");
    }

    proptest! {
        /// The floor is the lowest number in use, and memory that of the numbers since.
        #[test]
        fn the_floor_is_the_lowest_in_use(steps in proptest::collection::vec(any::<u16>(), 0..600)) {
            let mut window = Window::new();
            let mut in_use = std::collections::BTreeSet::new();
            for step in steps {
                if step % 2 == 0 || in_use.is_empty() {
                    in_use.insert(window.issue());
                } else {
                    let at = usize::from(step) % in_use.len();
                    let seq = *in_use.iter().nth(at).unwrap();
                    in_use.remove(&seq);
                    window.done(seq);
                }
                let floor = in_use.first().copied().unwrap_or(window.next);
                prop_assert_eq!(window.floor(), floor);
                prop_assert!(window.words.len() as u64 <= (window.next - floor) / WORD_BITS + 2);
            }
        }
    }
}
