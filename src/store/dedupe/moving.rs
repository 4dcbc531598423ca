//! Answers on their way to another cluster, with the keys that they are about.
//!
//! An answer travels as it would be given again, under its *place*: the client's name, a zero byte and
//! the sequence. Places ascend as clients and sequences do. When it arrives it is remembered as if it had
//! been given just now: log times of two clusters have nothing to do with each other.

use std::collections::BTreeMap;

use bytes::{BufMut, Bytes};

use super::encoding::{get_written, put_written};
use super::{Answer, CLIENT_IDLE_MIN_MS, Client, Dedupe, Falls, Moves};
use crate::codec::{DecodeError, Reader};
use crate::handoff::{Frozen, Tally};
use crate::once::{ClientName, SEQ_MAX};

/// An answer that fell while it was being copied.
#[derive(Debug, PartialEq, Eq)]
pub(in crate::store) struct Fallen {
    /// What the write was about.
    pub(in crate::store) key: Bytes,
    /// Where the answer lay.
    pub(in crate::store) place: Bytes,
    /// What it had added to a tally.
    pub(in crate::store) hash: u64,
}

impl Fallen {
    pub(super) fn of(name: &ClientName, seq: u64, answer: &Answer) -> Self {
        let place = place(name.as_str(), seq);
        let hash = hash(&place, &travelling(answer));
        Self { key: Bytes::copy_from_slice(&answer.key), place, hash }
    }
}

/// Answers by their place, as they travel.
pub(in crate::store) type Travelling = BTreeMap<Bytes, Bytes>;

impl Dedupe {
    /// The highest clock that any entry has brought.
    pub(in crate::store) fn log_time_ms(&self) -> u64 {
        self.log_time_ms
    }

    /// The answers that fell, of those of which somebody wishes to be told.
    pub(in crate::store) fn take_fallen(&mut self) -> Vec<Fallen> {
        std::mem::take(&mut self.fallen)
    }

    /// The answer at this place fell as soon as it was given: nobody needs to be told that it went,
    /// because nobody was told that it came.
    pub(in crate::store) fn never_was(&mut self, place: &[u8]) {
        self.fallen.retain(|fallen| fallen.place != *place);
    }

    /// Lets go of answers to writes of these keys which are only there because they were pinned.
    pub(in crate::store) fn unpin(&mut self, moves: Moves<'_>) {
        let clients = &mut self.clients;
        self.pinned.retain(|(name, seq)| {
            let Some(client) = clients.get_mut(name) else { return false };
            let stays = client.answers.get(*seq).is_some_and(|answer| !moves(&answer.key));
            if !stays {
                client.answers.remove(*seq);
            }
            stays
        });
        self.list_released();
    }

    /// The answers to writes of keys that move, in one number.
    pub(in crate::store) fn tally(&self, moves: Moves<'_>) -> Tally {
        let mut tally = Tally::default();
        for (name, client) in &self.clients {
            for (seq, answer) in client.answers.iter().filter(|(_, answer)| moves(&answer.key)) {
                tally.add_answer(hash(&place(name.as_str(), seq), &travelling(answer)));
            }
        }
        tally
    }

    /// The floors of all clients but for the idle ones.
    pub(in crate::store) fn floors(&self) -> Vec<(String, u64)> {
        self.floors_of(|client| !self.is_idle(client))
    }

    /// The floors of clients that may be forgotten as soon as there is no room for others; none, when there is
    /// none already. Then they would only take up room elsewhere, too.
    pub(in crate::store) fn idle_floors(&self) -> Vec<(String, u64)> {
        if self.is_full() {
            return Vec::new();
        }
        self.floors_of(|client| self.is_idle(client))
    }

    fn floors_of(&self, is_meant: impl Fn(&Client) -> bool) -> Vec<(String, u64)> {
        let clients = self.clients.iter().filter(|(_, client)| is_meant(client));
        clients.map(|(name, client)| (name.to_string(), client.floor)).collect()
    }

    fn is_idle(&self, client: &Client) -> bool {
        client.answers.is_empty() && self.log_time_ms - client.last_ms >= CLIENT_IDLE_MIN_MS
    }

    /// The answer at this place as it travels, if there is one.
    pub(in crate::store) fn at(&self, place: &[u8]) -> Option<Bytes> {
        let (name, seq) = parse_place(place)?;
        Some(travelling(self.clients.get(&name)?.answers.get(seq)?))
    }

    /// Answers to writes of moving keys after this place, of about `bytes_max`, looking at no more than
    /// `looks_max`; and the place up to which it looked, `None` at the end.
    pub(in crate::store) fn page(
        &self,
        after: &[u8],
        moves: Moves<'_>,
        bytes_max: usize,
        looks_max: usize,
    ) -> (Vec<(Bytes, Option<Bytes>)>, Option<Bytes>) {
        let (mut found, mut bytes, mut looks) = (Vec::new(), 0, 0);
        let start = parse_place(after);
        let clients = match &start {
            Some((name, _)) => self.clients.range(name.clone()..),
            None => self.clients.range::<ClientName, _>(..),
        };
        for (name, client) in clients {
            let first = match &start {
                Some((begun, seq)) if begun == name => seq + 1,
                _ => 0,
            };
            for (seq, answer) in client.answers.from(first) {
                let place = place(name.as_str(), seq);
                looks += 1;
                if moves(&answer.key) {
                    let stored = travelling(answer);
                    bytes += place.len() + stored.len();
                    found.push((place.clone(), Some(stored)));
                }
                if bytes >= bytes_max || looks >= looks_max {
                    return (found, Some(place));
                }
            }
        }
        (found, None)
    }

    /// Forgets the answers to writes of keys that have moved away: their new owner has them.
    pub(in crate::store) fn forget_moved(&mut self, moves: Moves<'_>) {
        for (name, client) in &mut self.clients {
            client.answers.retain(|seq, answer| {
                let stays = !moves(&answer.key);
                if !stays && !self.pinned.remove(&(name.clone(), seq)) {
                    self.live -= 1;
                    self.key_bytes -= answer.key.len();
                }
                stays
            });
        }
        self.list_released();
        self.tidy();
    }

    /// Takes over from another cluster: its floors where they are higher, and answers. Whoever wrote there
    /// counts as having written here, now; who was idle there, as idle for as long as it takes to be forgotten.
    ///
    /// Clients are taken in beyond the usual bound, because one that is left out could have a write
    /// carried out twice; but for idle ones, which need not be known where there is no room. Answers that do
    /// not decode are those of no source: they are left out.
    pub(in crate::store) fn take_over(
        &mut self,
        frozen: &Frozen,
        answers: Travelling,
        falls: Falls<'_>,
    ) {
        for (name, floor) in &frozen.floors {
            let Ok(name) = name.parse::<ClientName>() else { continue };
            self.take_in(&name);
            self.raise_floor(name.as_str(), *floor, falls);
        }
        for (name, floor) in &frozen.idle_floors {
            let Ok(name) = name.parse::<ClientName>() else { continue };
            if !self.clients.contains_key(&name) {
                if self.is_full() {
                    continue;
                }
                self.add(name.clone(), self.log_time_ms.saturating_sub(CLIENT_IDLE_MIN_MS));
            }
            self.raise_floor(name.as_str(), *floor, falls);
        }
        for (place, stored) in answers {
            let Some((name, seq)) = parse_place(&place) else { continue };
            let Ok((kind, written, key)) = decode(stored) else { continue };
            self.take_in(&name);
            let client = &self.clients[&name];
            if seq < client.floor || client.answers.get(seq).is_some() {
                continue;
            }
            let (at_ms, position) = (self.log_time_ms, self.next_position);
            self.next_position += 1;
            self.insert(name.as_str(), seq, Answer { key, kind, written, at_ms, position });
        }
        self.forget_surplus(falls);
        self.tidy();
    }

    fn take_in(&mut self, name: &ClientName) {
        let now = self.log_time_ms;
        if let Some(client) = self.clients.get_mut(name) {
            client.last_ms = now;
            return;
        }
        self.add(name.clone(), now);
    }
}

fn decode(stored: Bytes) -> Result<(super::Kind, crate::types::Written, Box<[u8]>), DecodeError> {
    let mut reader = Reader::new(stored);
    let written = get_written(&mut reader)?;
    reader.end()?;
    Ok(written)
}

fn travelling(answer: &Answer) -> Bytes {
    let mut stored = Vec::with_capacity(16 + answer.key.len());
    put_written(answer, &mut stored);
    stored.into()
}

/// The key that a travelling answer is about; `None` when it is no answer.
pub(in crate::store) fn key_of(stored: &Bytes) -> Option<Box<[u8]>> {
    decode(stored.clone()).ok().map(|(_, _, key)| key)
}

/// Where the answer to a client's write lies.
pub(in crate::store) fn place(name: &str, seq: u64) -> Bytes {
    let mut place = Vec::with_capacity(name.len() + 9);
    place.put_slice(name.as_bytes());
    place.put_u8(0);
    place.put_u64(seq);
    place.into()
}

fn parse_place(place: &[u8]) -> Option<(ClientName, u64)> {
    let (rest, seq) = place.split_last_chunk::<8>()?;
    let (zero, name) = rest.split_last()?;
    let name = std::str::from_utf8(name).ok()?.parse().ok()?;
    let seq = u64::from_be_bytes(*seq);
    (*zero == 0 && seq <= SEQ_MAX).then_some((name, seq))
}

/// What an answer adds to a tally.
pub(in crate::store) fn hash(place: &[u8], stored: &[u8]) -> u64 {
    let mut hash = xxhash_rust::xxh3::Xxh3Default::new();
    hash.update(&(place.len() as u64).to_be_bytes());
    hash.update(place);
    hash.update(stored);
    hash.digest()
}
