//! The table as bytes: for the disk, and for followers that the log no longer reaches.
//!
//! ```text
//! chunk   = version:u8 (1), item, item, ...
//! item    = 0, log time:u64, next position:u64, clients:u64, answers:u64    first, and only there
//!         | 1, name:(length:u8, bytes), floor:u64, last write's log time:u64
//!         | 2, seq:u64, position:u64, log time:u64, kind, key:(length:u32, bytes)
//! kind    = 1 revision:u64                a put was carried out
//!         | 2 revision:u64 deleted:u8     a delete was carried out
//!         | 3 current                     a put whose condition failed
//!         | 4 current                     a delete whose condition failed
//! current = 0 | 1 revision:u64
//! ```
//! Integers are big-endian. An answer (2) belongs to the client (1) before it, which may be in an
//! earlier chunk. A chunk ends with an item and has at least one; it is closed once it holds
//! [`CHUNK_BYTES`]. Clients ascend by name and answers by sequence, so equal tables have equal bytes.
//!
//! The decoder takes one chunk after the other and checks everything that the table relies on: orders,
//! floors, positions, and that as much is there as the first item announces.

use std::collections::BTreeMap;
use std::io;

use bytes::{BufMut, Bytes};

use super::super::meta::corrupt;
use super::{Answer, Client, Dedupe, Kind, Placed};
use crate::codec::{self, Reader, get_client_name, put_bytes, put_client_name, put_option};
use crate::once::ClientName;
use crate::types::{Revision, Written};

const VERSION: u8 = 1;

const ITEM_TABLE: u8 = 0;
const ITEM_CLIENT: u8 = 1;
const ITEM_ANSWER: u8 = 2;

const KIND_PUT: u8 = 1;
const KIND_DELETED: u8 = 2;
const KIND_PUT_REFUSED: u8 = 3;
const KIND_DELETE_REFUSED: u8 = 4;

/// A chunk is closed once it holds this many bytes; the item that fills it may be one key longer.
/// Each is a row in a data file and travels to a follower in one message.
pub(in crate::store) const CHUNK_BYTES: usize = 256 << 10;

impl Dedupe {
    /// The whole table, in chunks: at least one.
    pub(in crate::store) fn encode(&self) -> Vec<Bytes> {
        let mut chunks = Chunks::default();
        chunks.item(|out| {
            out.put_u8(ITEM_TABLE);
            out.put_u64(self.log_time_ms);
            out.put_u64(self.next_position);
            out.put_u64(self.clients.len() as u64);
            out.put_u64((self.live + self.pinned.len()) as u64);
        });
        for (name, client) in &self.clients {
            chunks.item(|out| {
                out.put_u8(ITEM_CLIENT);
                put_client_name(name.as_str(), out);
                out.put_u64(client.floor);
                out.put_u64(client.last_ms);
            });
            for (seq, answer) in client.answers.iter() {
                chunks.item(|out| {
                    out.put_u8(ITEM_ANSWER);
                    out.put_u64(seq);
                    put_answer(answer, out);
                });
            }
        }
        chunks
            .done
            .into_iter()
            .chain((!chunks.open.is_empty()).then_some(chunks.open))
            .map(Bytes::from)
            .collect()
    }
}

#[derive(Default)]
struct Chunks {
    done: Vec<Vec<u8>>,
    open: Vec<u8>,
}

impl Chunks {
    fn item(&mut self, put: impl FnOnce(&mut Vec<u8>)) {
        if self.open.is_empty() {
            self.open.put_u8(VERSION);
        }
        put(&mut self.open);
        if self.open.len() >= CHUNK_BYTES {
            self.done.push(std::mem::take(&mut self.open));
        }
    }
}

fn put_answer(answer: &Answer, out: &mut Vec<u8>) {
    out.put_u64(answer.position);
    out.put_u64(answer.at_ms);
    put_written(answer, out);
}

/// Kind and key: what an answer is wherever it goes, without the place and time that it has here.
pub(super) fn put_written(answer: &Answer, out: &mut Vec<u8>) {
    let Answer { key, kind, written, .. } = answer;
    let put_current = |current: &Option<Revision>, out: &mut Vec<u8>| {
        put_option(current.as_ref(), out, |revision, out| out.put_u64(*revision));
    };
    match (kind, written) {
        (Kind::Put, Written::Put { revision }) => {
            out.put_u8(KIND_PUT);
            out.put_u64(*revision);
        }
        (Kind::Delete, Written::Deleted { revision, deleted }) => {
            out.put_u8(KIND_DELETED);
            out.put_u64(*revision);
            out.put_u8(u8::from(*deleted));
        }
        (Kind::Put, Written::ConditionFailed { current }) => {
            out.put_u8(KIND_PUT_REFUSED);
            put_current(current, out);
        }
        (Kind::Delete, Written::ConditionFailed { current }) => {
            out.put_u8(KIND_DELETE_REFUSED);
            put_current(current, out);
        }
        (_, other) => unreachable!("{other:?} is never recorded"),
    }
    put_bytes(key, out);
}

/// Puts a table together again, chunk by chunk.
#[derive(Default)]
pub(in crate::store) struct Decoder {
    announced: Option<Announced>,
    table: Dedupe,
    clients: BTreeMap<ClientName, Client>,
    /// The client that answers belong to.
    name: Option<ClientName>,
}

struct Announced {
    clients: u64,
    answers: u64,
}

impl Decoder {
    /// Takes the next chunk.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidData`] for what [`Dedupe::encode`] would not have made.
    pub(in crate::store) fn chunk(&mut self, bytes: Bytes) -> io::Result<()> {
        let mut reader = Reader::new(bytes);
        reader.version(VERSION).map_err(bad)?;
        while reader.end().is_err() {
            self.item(&mut reader)?;
        }
        Ok(())
    }

    /// The table, when all chunks were taken.
    ///
    /// # Errors
    /// As [`Self::chunk`]: something is missing.
    pub(in crate::store) fn finish(self) -> io::Result<Dedupe> {
        let Self { announced, mut table, clients, .. } = self;
        let Some(Announced { clients: clients_announced, answers }) = announced else {
            return Err(bad("it is empty"));
        };
        table.order.make_contiguous().sort_unstable_by_key(|placed| placed.position);
        let there = table.live + table.pinned.len();
        if (clients.len() as u64, there as u64) != (clients_announced, answers) {
            return Err(bad("clients or answers are missing"));
        }
        if table.order.back().is_some_and(|last| last.position >= table.next_position) {
            return Err(bad("an answer lies beyond the last position"));
        }
        let mut before: Option<&Placed> = None;
        for placed in &table.order {
            if before.is_some_and(|before| before.position == placed.position) {
                return Err(bad("two answers have one position"));
            }
            let newest_ms = before.map_or(0, |before| before.at_ms);
            if placed.at_ms < newest_ms || placed.at_ms > table.log_time_ms {
                return Err(bad("log time goes back"));
            }
            before = Some(placed);
        }
        table.idle = clients.iter().map(|(name, c)| (c.last_ms, name.clone())).collect();
        table.clients = clients;
        Ok(table)
    }

    fn item(&mut self, reader: &mut Reader) -> io::Result<()> {
        match (reader.u8().map_err(bad)?, self.announced.is_some()) {
            (ITEM_TABLE, false) => self.table(reader).map_err(bad),
            (ITEM_CLIENT, true) => self.client(reader),
            (ITEM_ANSWER, true) => self.answer(reader),
            (item, _) => Err(bad(format_args!("an item {item} is not expected"))),
        }
    }

    fn table(&mut self, reader: &mut Reader) -> Result<(), codec::DecodeError> {
        self.table.log_time_ms = reader.u64()?;
        self.table.next_position = reader.u64()?;
        let announced = Announced { clients: reader.u64()?, answers: reader.u64()? };
        self.announced = Some(announced);
        Ok(())
    }

    fn client(&mut self, reader: &mut Reader) -> io::Result<()> {
        let name = get_client_name(reader).map_err(bad)?;
        let floor = reader.u64().map_err(bad)?;
        let last_ms = reader.u64().map_err(bad)?;
        if self.name.as_ref().is_some_and(|last| *last >= name) {
            return Err(bad("clients do not ascend"));
        }
        if last_ms > self.table.log_time_ms {
            return Err(bad("a client from the future"));
        }
        self.clients.insert(name.clone(), Client { floor, last_ms, ..Client::default() });
        self.name = Some(name);
        Ok(())
    }

    fn answer(&mut self, reader: &mut Reader) -> io::Result<()> {
        let name = self.name.as_ref().ok_or_else(|| bad("an answer of no client"))?;
        let client = self.clients.get_mut(name).expect("named clients are there");
        let seq = reader.u64().map_err(bad)?;
        let answer = get_answer(reader).map_err(bad)?;
        let last = client.answers.last();
        if seq > crate::once::SEQ_MAX || last >= Some(seq) {
            return Err(bad("sequences do not ascend"));
        }
        if seq < client.floor {
            // Only a pinned answer outlives the floor.
            self.table.pinned.insert((name.clone(), seq));
            client.answers.insert(seq, answer);
            return Ok(());
        }
        self.table.key_bytes += answer.key.len();
        self.table.live += 1;
        let Answer { position, at_ms, .. } = answer;
        self.table.order.push_back(Placed { position, at_ms, client: name.clone(), seq });
        client.answers.insert(seq, answer);
        Ok(())
    }
}

fn get_answer(reader: &mut Reader) -> Result<Answer, codec::DecodeError> {
    let (position, at_ms) = (reader.u64()?, reader.u64()?);
    let (kind, written, key) = get_written(reader)?;
    Ok(Answer { key, kind, written, at_ms, position })
}

/// What [`put_written`] put.
pub(super) fn get_written(
    reader: &mut Reader,
) -> Result<(Kind, Written, Box<[u8]>), codec::DecodeError> {
    let (kind, written) = match reader.u8()? {
        KIND_PUT => (Kind::Put, Written::Put { revision: reader.u64()? }),
        KIND_DELETED => {
            let (revision, deleted) = (reader.u64()?, reader.flag()?);
            (Kind::Delete, Written::Deleted { revision, deleted })
        }
        KIND_PUT_REFUSED => {
            (Kind::Put, Written::ConditionFailed { current: reader.option(Reader::u64)? })
        }
        KIND_DELETE_REFUSED => {
            (Kind::Delete, Written::ConditionFailed { current: reader.option(Reader::u64)? })
        }
        found => return Err(codec::DecodeError::Tag { what: "kind of an answer", found }),
    };
    // Copied: a slice would keep the whole chunk alive.
    Ok((kind, written, reader.bytes()?.as_ref().into()))
}

fn bad(why: impl std::fmt::Display) -> io::Error {
    corrupt("the table of answers", why)
}
