//! stub
use crate::config::Config; use crate::node::Raft; use crate::store::snapshot::SnapshotStager; use super::raft_network_impl::PeerIdentity;
/// stub
pub struct PeerServer;
impl PeerServer {
    /// stub
    pub fn serve(_l: tokio::net::TcpListener, _i: PeerIdentity, _r: Raft, _s: SnapshotStager, _c: &Config, _t: tokio_util::sync::CancellationToken) -> Self { Self }
    /// stub
    pub async fn join(self) {}
}
