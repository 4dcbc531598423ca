//! etcd over gRPC, to measure it by the same load.
//!
//! The messages are written by hand after etcd's `rpc.proto`, with the fields that are used; nobody
//! needs `protoc`. As etcd's own client and its benchmark tool do, clients share HTTP/2 connections; how
//! many is the caller's choice.

use std::time::Duration;

use bytes::{Buf, BufMut, Bytes};
use distrib_kv_store::kvclient::Consistency;
use distrib_kv_store::network::error::Outcome;
use distrib_kv_store::types::Revision;
use futures_util::future::try_join_all;
use http::uri::PathAndQuery;
use tonic::client::Grpc;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status};

use super::Ask;
use super::protobuf::{self, Garbled, Writer};
use super::store::{Session, Store};
use super::tally::Failure;

const PUT: &str = "/etcdserverpb.KV/Put";
const RANGE: &str = "/etcdserverpb.KV/Range";
const STATUS: &str = "/etcdserverpb.Maintenance/Status";

/// How long one request may take: as long as through our own clients.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(15);

/// How long a connection may take to be established.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);

/// `PutRequest`: the key is field 1, the value field 2.
fn put_request(key: &str, value: &[u8]) -> Bytes {
    let room = key.len() + value.len() + 16;
    Writer::with_capacity(room).bytes(1, key.as_bytes()).bytes(2, value).finish()
}

/// `RangeRequest` of one key: the key is field 1; field 7 says that the asked member may answer from its
/// own state. Without it the answer is linearizable.
fn range_request(key: &str, serializable: bool) -> Bytes {
    let room = key.len() + 16;
    Writer::with_capacity(room).bytes(1, key.as_bytes()).flag(7, serializable).finish()
}

/// `RangeResponse`: the first pair, in field 2, has its `mod_revision` in field 3.
fn revision_in(range_response: &[u8]) -> Result<Option<Revision>, Garbled> {
    let Some(pair) = protobuf::bytes(range_response, 2)? else { return Ok(None) };
    Ok(Some(protobuf::number(pair, 3)?))
}

/// `StatusResponse`: who answers is field 2 of the header, which is field 1; who leads is field 4.
fn is_leader(status_response: &[u8]) -> Result<bool, Garbled> {
    let header = protobuf::bytes(status_response, 1)?.unwrap_or_default();
    Ok(protobuf::number(header, 2)? == protobuf::number(status_response, 4)?)
}

/// Messages as they are on the wire; the functions above make and read them.
#[derive(Debug, Clone, Copy, Default)]
struct Raw;

impl Codec for Raw {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, message: Bytes, into: &mut EncodeBuf<'_>) -> Result<(), Status> {
        into.put(message);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(from.copy_to_bytes(from.remaining())))
    }
}

/// The connections.
#[derive(Debug, Clone)]
pub struct Etcd {
    channels: Vec<Channel>,
    serializable: bool,
}

impl Etcd {
    /// Connects to the members, or to the one that leads, `connections` times to each.
    pub async fn connect(
        members: &[String],
        ask: Ask,
        connections: usize,
        consistency: Consistency,
    ) -> Result<Self, Failure> {
        let mut asked = Vec::new();
        for member in members {
            let leads = ask == Ask::Given || leads(connect(member).await?).await?;
            if leads {
                asked.push(member);
            }
        }
        let mut channels = Vec::new();
        for _ in 0..connections {
            for member in &asked {
                channels.push(connect(member).await?);
            }
        }
        if channels.is_empty() {
            return Err(Failure::not_applied("NO_LEADER", "none of the members leads"));
        }
        Ok(Self { channels, serializable: consistency == Consistency::Stale })
    }
}

async fn connect(member: &str) -> Result<Channel, Failure> {
    let failed = |error: tonic::transport::Error| {
        Failure::not_applied("UNREACHABLE", format!("{member}: {error}"))
    };
    let endpoint = Endpoint::from_shared(format!("http://{member}")).map_err(failed)?;
    endpoint.connect_timeout(CONNECT_TIMEOUT).tcp_nodelay(true).connect().await.map_err(failed)
}

async fn leads(channel: Channel) -> Result<bool, Failure> {
    let status = call(&mut Grpc::new(channel), STATUS, Bytes::new()).await?;
    is_leader(&status).map_err(garbled)
}

async fn call(
    grpc: &mut Grpc<Channel>,
    path: &'static str,
    message: Bytes,
) -> Result<Bytes, Failure> {
    let exchange = async {
        grpc.ready().await.map_err(|error| Status::unavailable(error.to_string()))?;
        let path = PathAndQuery::from_static(path);
        Ok(grpc.unary(Request::new(message), path, Raw).await?.into_inner())
    };
    let late = |_| Err(Status::new(Code::DeadlineExceeded, "no answer in time"));
    let answer = tokio::time::timeout(REQUEST_TIMEOUT, exchange).await.unwrap_or_else(late);
    answer.map_err(|status| failure(&status))
}

fn garbled(error: Garbled) -> Failure {
    Failure::new("GARBLED", error.to_string(), Outcome::Unknown)
}

/// etcd does not say whether a failed write may still take effect. The code is one of gRPC's seventeen.
fn failure(status: &Status) -> Failure {
    let code = format!("GRPC_{:?}", status.code()).to_ascii_uppercase();
    Failure::new(code, status.message(), Outcome::Unknown)
}

impl Store for Etcd {
    type Session = EtcdSession;

    async fn session(&self, client: usize) -> Result<EtcdSession, Failure> {
        let channel = self.channels[client % self.channels.len()].clone();
        Ok(EtcdSession { grpc: Grpc::new(channel), serializable: self.serializable })
    }
}

/// One client's handle on a connection.
#[derive(Debug, Clone)]
pub struct EtcdSession {
    grpc: Grpc<Channel>,
    serializable: bool,
}

impl EtcdSession {
    async fn range(mut self, key: &str) -> Result<Option<Revision>, Failure> {
        let request = range_request(key, self.serializable);
        revision_in(&call(&mut self.grpc, RANGE, request).await?).map_err(garbled)
    }
}

impl Session for EtcdSession {
    async fn put(&mut self, key: &str, value: Bytes) -> Result<(), Failure> {
        call(&mut self.grpc, PUT, put_request(key, &value)).await?;
        Ok(())
    }

    async fn get(&mut self, key: &str) -> Result<Option<Revision>, Failure> {
        self.clone().range(key).await
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
        let found = try_join_all(keys.iter().map(|key| self.clone().range(key))).await?;
        Ok(found.iter().flatten().count())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The bytes that etcd's own client sends for these requests.
    #[test]
    fn requests_have_etcds_field_numbers() {
        assert_eq!(put_request("k", b"v")[..], [0x0a, 1, b'k', 0x12, 1, b'v']);
        assert_eq!(range_request("k", true)[..], [0x0a, 1, b'k', 0x38, 1]);
        assert_eq!(range_request("k", false)[..], [0x0a, 1, b'k']);
    }

    /// An answer with all the fields that etcd sends, and one without a pair.
    #[test]
    fn the_revision_is_found() {
        let pair = [0x0a, 1, b'k', 0x10, 2, 0x18, 3, 0x20, 1, 0x2a, 1, b'v'];
        let header = [0x0a, 2, 0x10, 9];
        let answer = [&header[..], &[0x12, pair.len() as u8], &pair, &[0x20, 1]].concat();
        assert_eq!(revision_in(&answer), Ok(Some(3)));
        assert_eq!(revision_in(&header), Ok(None));
    }

    #[test]
    fn a_leader_is_who_says_its_own_name() {
        assert_eq!(is_leader(&[0x0a, 2, 0x10, 9, 0x20, 9]), Ok(true));
        assert_eq!(is_leader(&[0x0a, 2, 0x10, 8, 0x20, 9]), Ok(false));
    }
}
