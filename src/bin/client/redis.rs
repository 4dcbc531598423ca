//! One Redis, to measure it by the same load.
//!
//! Clients either share pipelined connections or have one each. Redis has no followers here that a
//! read could be stale by, and no revisions: the consistency of reads is what one process gives.

use std::borrow::Cow;
use std::time::Duration;

use bytes::Bytes;
use distrib_kv_store::network::error::Outcome;
use distrib_kv_store::types::Revision;
use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, RedisError};

use super::store::{Session, Store};
use super::tally::Failure;

/// How long one command may take: as long as a request to our own nodes.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(15);

/// How long a connection may take to be established.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);

/// The server and the shared connections.
#[derive(Debug, Clone)]
pub struct Redis {
    server: redis::Client,
    /// Empty: one for each client.
    shared: Vec<MultiplexedConnection>,
}

impl Redis {
    /// Connects to `HOST:PORT`. No shared connections: each client gets its own.
    pub async fn connect(server: &str, shared_connections: usize) -> Result<Self, Failure> {
        let server = redis::Client::open(format!("redis://{server}/")).map_err(failure)?;
        let mut shared = Vec::new();
        for _ in 0..shared_connections {
            shared.push(connection(&server).await?);
        }
        Ok(Self { server, shared })
    }
}

async fn connection(server: &redis::Client) -> Result<MultiplexedConnection, Failure> {
    let config = AsyncConnectionConfig::new()
        .set_connection_timeout(Some(CONNECT_TIMEOUT))
        .set_response_timeout(Some(COMMAND_TIMEOUT));
    server.get_multiplexed_async_connection_with_config(&config).await.map_err(failure)
}

fn failure(error: RedisError) -> Failure {
    let refused = error.is_connection_refusal();
    let code: Cow<str> = match error.code() {
        Some(code) => format!("REDIS_{code}").into(),
        None if refused => "UNREACHABLE".into(),
        None if error.is_timeout() => "CLIENT_TIMEOUT".into(),
        None => "REDIS".into(),
    };
    let outcome = if refused { Outcome::NotApplied } else { Outcome::Unknown };
    Failure::new(code, error.to_string(), outcome)
}

impl Store for Redis {
    type Session = RedisSession;

    async fn session(&self, client: usize) -> Result<RedisSession, Failure> {
        let connection = match self.shared.len() {
            0 => connection(&self.server).await?,
            count => self.shared[client % count].clone(),
        };
        Ok(RedisSession { connection })
    }
}

/// One client's handle on a connection.
#[derive(Debug)]
pub struct RedisSession {
    connection: MultiplexedConnection,
}

impl Session for RedisSession {
    async fn put(&mut self, key: &str, value: Bytes) -> Result<(), Failure> {
        let mut command = redis::cmd("SET");
        command.arg(key).arg(&value[..]);
        command.query_async(&mut self.connection).await.map_err(failure)
    }

    /// Redis has no revisions: any value counts as the first.
    async fn get(&mut self, key: &str) -> Result<Option<Revision>, Failure> {
        let mut command = redis::cmd("GET");
        command.arg(key);
        let answer = command.query_async(&mut self.connection).await;
        let value: Option<Vec<u8>> = answer.map_err(failure)?;
        Ok(value.map(|_| 1))
    }

    async fn put_if(
        &mut self,
        _key: &str,
        _value: Bytes,
        _seen: Option<Revision>,
    ) -> Result<bool, Failure> {
        Err(Failure::not_applied("UNSUPPORTED", "no read-modify-writes here"))
    }

    async fn multi_get(&mut self, keys: &[String]) -> Result<usize, Failure> {
        let mut command = redis::cmd("MGET");
        command.arg(keys);
        let answer = command.query_async(&mut self.connection).await;
        let values: Vec<Option<Vec<u8>>> = answer.map_err(failure)?;
        Ok(values.iter().flatten().count())
    }
}
