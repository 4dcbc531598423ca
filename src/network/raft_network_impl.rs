//! stub
#![allow(missing_docs)]
use crate::types::*; use crate::config::Config;
use openraft::errors::*; use openraft::network::*; use openraft::raft::*;
#[derive(Clone)] pub struct PeerIdentity { pub cluster: ClusterId, pub node_id: NodeId }
#[derive(Clone)] pub struct PeerNetwork;
#[derive(Debug)] pub enum ReadIndexError { Timeout, Other }
impl PeerNetwork { pub fn new(_: PeerIdentity, _: &Config) -> Self { Self }
 pub async fn read_index(&self, _l: NodeId, _a: &NodeAddrs, _d: tokio::time::Instant) -> Result<LogId, ReadIndexError> { Err(ReadIndexError::Other) } }
impl RaftNetworkFactory<TypeConfig> for PeerNetwork { type Network = PeerNetwork; async fn new_client(&mut self, _: NodeId, _: &NodeAddrs) -> PeerNetwork { Self } }
fn un() -> Unreachable<TypeConfig> { Unreachable::from_string("stub") }
impl RaftNetworkV2<TypeConfig> for PeerNetwork { type SnapshotData = crate::store::snapshot::SnapshotData;
 async fn append_entries(&mut self, _: AppendEntriesRequest<TypeConfig>, _: RPCOption) -> Result<AppendEntriesResponse<TypeConfig>, RPCError<TypeConfig>> { Err(un().into()) }
 async fn vote(&mut self, _: VoteRequest<TypeConfig>, _: RPCOption) -> Result<VoteResponse<TypeConfig>, RPCError<TypeConfig>> { Err(un().into()) }
 async fn full_snapshot(&mut self, _: Vote, _: openraft::type_config::alias::SnapshotOf<TypeConfig, Self::SnapshotData>, _: impl Future<Output = ReplicationClosed> + openraft::OptionalSend + 'static, _: RPCOption) -> Result<SnapshotResponse<TypeConfig>, StreamingError<TypeConfig>> { Err(un().into()) }
}
