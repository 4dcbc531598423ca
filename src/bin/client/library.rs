//! This store through [`KVClient`], as a Rust program would use it: one client shared by all.

use bytes::Bytes;
use distrib_kv_store::client_error::ClientError;
use distrib_kv_store::kvclient::{Consistency, KVClient};
use distrib_kv_store::types::{Condition, Revision};
use futures_util::future::try_join_all;

use super::store::{Session, Store};
use super::tally::Failure;

/// The shared client.
#[derive(Debug, Clone)]
pub struct Library {
    /// Connected.
    pub client: KVClient,
    /// Of reads.
    pub consistency: Consistency,
}

impl Store for Library {
    type Session = Self;

    async fn session(&self, _client: usize) -> Result<Self, Failure> {
        Ok(self.clone())
    }
}

impl Session for Library {
    async fn put(&mut self, key: &str, value: Bytes) -> Result<(), Failure> {
        self.client.write(key, value).await.map_err(failure)?;
        Ok(())
    }

    async fn get(&mut self, key: &str) -> Result<Option<Revision>, Failure> {
        let record = self.client.get(key, self.consistency).await.map_err(failure)?;
        Ok(record.map(|record| record.revision))
    }

    async fn put_if(
        &mut self,
        key: &str,
        value: Bytes,
        seen: Option<Revision>,
    ) -> Result<bool, Failure> {
        let condition = seen.map_or(Condition::Absent, Condition::Revision);
        match self.client.write_if(key, value, condition).await {
            Ok(_) => Ok(true),
            Err(ClientError::ConditionFailed { .. }) => Ok(false),
            Err(error) => Err(failure(error)),
        }
    }

    async fn multi_get(&mut self, keys: &[String]) -> Result<usize, Failure> {
        let gets = keys.iter().map(|key| self.client.get(key, self.consistency));
        let records = try_join_all(gets).await.map_err(failure)?;
        Ok(records.iter().flatten().count())
    }
}

/// The server's code where there is one.
pub fn failure(error: ClientError) -> Failure {
    let code = match &error {
        ClientError::Server { code, .. } => code.clone().into(),
        ClientError::Unreachable { .. } => "UNREACHABLE".into(),
        ClientError::Timeout { .. } => "CLIENT_TIMEOUT".into(),
        ClientError::AnswerLost { .. } => "ANSWER_LOST".into(),
        ClientError::ConditionFailed { .. } => "CONDITION_FAILED".into(),
        ClientError::WrongCluster { .. } => "WRONG_CLUSTER".into(),
        ClientError::TooManyRedirects { .. } => "TOO_MANY_REDIRECTS".into(),
        ClientError::Garbled { .. } => "GARBLED".into(),
        ClientError::TooManyInFlight { .. } => "TOO_MANY_IN_FLIGHT".into(),
        ClientError::TooManyWaiting { .. } => "TOO_MANY_WAITING".into(),
        // Those of setting out, and whatever the library may add.
        _ => "CLIENT".into(),
    };
    let outcome = error.outcome();
    Failure { code, message: error.to_string(), outcome }
}
