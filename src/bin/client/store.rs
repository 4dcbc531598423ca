//! What a load needs of a store, and how an operation of a mix is done with it.
//!
//! A [`Store`] is what is measured; each client of a load has a [`Session`] of its own with it. Clients
//! are generic over both, so that nothing stands between a client and the library that it measures.

use std::future::Future;

use bytes::Bytes;
use distrib_kv_store::network::error::Outcome;
use distrib_kv_store::types::Revision;

use super::mix::{Operation, key_of};
use super::tally::{Answered, Failure};

/// What is measured.
pub trait Store {
    /// What one client has of it.
    type Session: Session;

    /// The session of the client with this number, counted from 0.
    fn session(&self, client: usize)
    -> impl Future<Output = Result<Self::Session, Failure>> + Send;
}

/// One client's access. Does one thing at a time; goes on after any failure.
pub trait Session: Send + 'static {
    /// Writes a value.
    fn put(&mut self, key: &str, value: Bytes) -> impl Future<Output = Result<(), Failure>> + Send;

    /// Reads a value, all of it, and returns the revision that it has; `None` when there is none.
    fn get(&mut self, key: &str) -> impl Future<Output = Result<Option<Revision>, Failure>> + Send;

    /// Writes a value if the key is still at the revision that was read (`None`: absent); returns
    /// whether it was.
    fn put_if(
        &mut self,
        key: &str,
        value: Bytes,
        seen: Option<Revision>,
    ) -> impl Future<Output = Result<bool, Failure>> + Send;

    /// Reads several values and returns how many there were.
    fn multi_get(&mut self, keys: &[String])
    -> impl Future<Output = Result<usize, Failure>> + Send;
}

/// Does one operation. Asks `value` for bytes when it writes.
pub async fn execute(
    session: &mut impl Session,
    operation: Operation,
    value: Bytes,
) -> Result<Answered, Failure> {
    match operation {
        Operation::Update(key) | Operation::Insert(key) => {
            session.put(&key_of(key), value).await?;
            Ok(Answered::Done)
        }
        Operation::Read(key) => {
            let found = session.get(&key_of(key)).await.map_err(nothing_written)?;
            Ok(if found.is_some() { Answered::Done } else { Answered::Absent })
        }
        Operation::ReadModifyWrite(key) => {
            let key = key_of(key);
            let seen = session.get(&key).await.map_err(nothing_written)?;
            let written = session.put_if(&key, value, seen).await?;
            Ok(if written { Answered::Done } else { Answered::ConditionFailed })
        }
        Operation::MultiGet { first, count } => {
            let keys: Vec<String> = (first..first + count).map(key_of).collect();
            let found = session.multi_get(&keys).await.map_err(nothing_written)?;
            Ok(if found == keys.len() { Answered::Done } else { Answered::Absent })
        }
    }
}

/// A read changes nothing, whatever became of it.
fn nothing_written(failure: Failure) -> Failure {
    Failure { outcome: Outcome::NotApplied, ..failure }
}
