//! What a destination copies from a source: snapshots of replicas, and the pages read from them.

use std::collections::BTreeSet;

use bytes::Bytes;
use distrib_kv_store::handoff::{Attempt, Cursor, Handoff, Position};

use super::cluster::{Answer, Key, Logged, OpId, Record, Rules};
use super::mutation::Mutation;

/// What a source offers to copy, as one of its replicas had it at some time. A lagging replica is one
/// whose snapshot is old; so is a page that stays on its way for long.
#[derive(Debug, Clone, PartialEq, Hash)]
pub struct Replica {
    pub handoff: Handoff,
    pub attempt: Attempt,
    pub start: Position,
    pub position: Position,
    pub rows: Vec<(Key, Record)>,
    pub answers: Vec<(OpId, Answer)>,
    pub log: Vec<Logged>,
}

/// A stretch of a copy: a record or answer of `None` is one that is gone.
pub struct Page {
    pub to: Cursor,
    pub records: Vec<(Key, Option<Record>)>,
    pub answers: Vec<(OpId, Option<Answer>)>,
}

impl Replica {
    /// What follows `from`, and how far it goes; `None` when there is nothing more.
    pub fn page(&self, from: &Cursor, rules: &Rules) -> Option<Page> {
        match from {
            Cursor::Records { after } => Some(self.records_page(after)),
            Cursor::Answers { .. } => Some(Page {
                to: Cursor::Changes { position: self.start },
                records: Vec::new(),
                answers: self
                    .answers
                    .iter()
                    .filter(|(_, a)| self.scans(a, rules))
                    .map(|(op, answer)| (*op, Some(answer.clone())))
                    .collect(),
            }),
            Cursor::Changes { position } => self.changes_page(*position),
        }
    }

    /// One record a page, so that a scan can be interrupted.
    fn records_page(&self, after: &[u8]) -> Page {
        let next = self.rows.iter().find(|(key, _)| &key[..] > after);
        Page {
            to: match next {
                Some((key, _)) => Cursor::Records { after: key.clone() },
                None => Cursor::Answers { after: Bytes::new() },
            },
            records: next.map(|(key, record)| (key.clone(), Some(*record))).into_iter().collect(),
            answers: Vec::new(),
        }
    }

    /// Each changed key as it is now, not as it was then.
    fn changes_page(&self, position: Position) -> Option<Page> {
        if position >= self.position {
            return None;
        }
        let lines = self.log.iter().filter(|line| line.position >= position);
        let (mut records, mut answers) = (Vec::new(), Vec::new());
        for line in lines {
            let record = self.rows.iter().find(|(key, _)| *key == line.key);
            records.push((line.key.clone(), record.map(|(_, record)| *record)));
            let answer = self.answers.iter().find(|(op, _)| *op == line.op);
            answers.push((line.op, answer.map(|(_, answer)| answer.clone())));
        }
        Some(Page { to: Cursor::Changes { position: self.position }, records, answers })
    }

    fn scans(&self, answer: &Answer, rules: &Rules) -> bool {
        let exists = || self.rows.iter().any(|(key, _)| *key == answer.key);
        !rules.breaks(Mutation::AbsentAnswersSkipped) || exists()
    }

    /// The cursors that a driver may have read of a copy from here that has reached `reached`.
    pub fn cursors(&self, reached: &Cursor) -> BTreeSet<Cursor> {
        let records = self.rows.iter().map(|(key, _)| Cursor::Records { after: key.clone() });
        let changes = (self.start..=self.position).map(|position| Cursor::Changes { position });
        let answers = Cursor::Answers { after: Bytes::new() };
        let others = [Cursor::start(), answers, reached.clone()];
        let all = others.into_iter().chain(records).chain(changes);
        all.filter(|cursor| cursor <= reached).collect()
    }
}
