//! The bounds and times of the peer network: the configured ones, and those that follow from them.

use std::time::Duration;

use super::Purpose;
use super::frame::{FrameBudget, FrameLimits};
use crate::config::{Config, ENTRY_BYTES_MAX};

/// Calls in flight on a control connection. One heartbeat, one vote and one read index are usual;
/// the rest is room for calls that their callers gave up on and that were not answered yet.
const CONTROL_CALLS_MAX: usize = 64;

/// Calls in flight on a snapshot connection. A transfer makes one at a time; the second is room for
/// one that its caller gave up on.
const SNAPSHOT_CALLS_MAX: usize = 2;

/// Calls in flight on a connection for handoffs: a destination asks for one page at a time, and the
/// second is room for one that it gave up on.
const HANDOFF_CALLS_MAX: usize = 2;

/// The longest request for a page: two ids of clusters, and a cursor, which is at most a key (21 KiB)
/// with the name of a client.
const PAGE_REQUEST_BYTES_MAX: usize = 64 << 10;

/// The largest page that is asked for and given, in bytes of records and answers; a single larger
/// record still goes. A destination makes an entry of it, and this is the size of an entry that holds up
/// nobody.
pub(in crate::network) const PAGE_BYTES_MAX: usize = ENTRY_BYTES_MAX;

/// How long a replica of a source may take to answer with a page before another one is asked: much
/// longer than reading one takes, short enough for a handoff that is frozen.
const PAGE_TIMEOUT: Duration = Duration::from_secs(2);

/// The shortest wait for a reply: below it, one slow fsync of a follower would cut connections.
const REPLY_TIMEOUT_MIN: Duration = Duration::from_secs(2);

/// How long one message may take to arrive, as long as it may take to leave.
const FRAME_TIMEOUT: Duration = Duration::from_secs(20);

/// The least budget for members' frames that are being read, however small a frame is.
const FRAME_BUDGET_BYTES_MIN: usize = 64 << 20;

/// How long a follower may take to write one chunk of a snapshot to disk.
const CHUNK_TIMEOUT: Duration = Duration::from_secs(15);

/// How long a follower may take to verify, switch to and install a snapshot after its last chunk.
const INSTALL_TIMEOUT: Duration = Duration::from_secs(300);

/// What the peer network takes from [`Config`].
#[derive(Debug, Clone)]
pub(in crate::network) struct PeerSettings {
    /// The largest frame body.
    pub(in crate::network) frame_bytes_max: usize,
    /// How long a frame that has begun may take.
    pub(in crate::network) frame_timeout: Duration,
    /// Greeted connections of members at once.
    pub(in crate::network) connections_max: usize,
    /// How long a stranger may take to greet.
    pub(in crate::network) greeting_timeout: Duration,
    /// How long connecting and greeting may take. Not longer than an election takes to start, so
    /// that a peer is found soon after a partition heals: a lost SYN is repeated only after a second.
    pub(in crate::network) connect_timeout: Duration,
    /// How long to wait for a reply; for pipelined appends, for the next one.
    pub(in crate::network) reply_timeout: Duration,
    /// How long one chunk of a snapshot may take.
    pub(in crate::network) chunk_timeout: Duration,
    /// How long the end of a snapshot may take.
    pub(in crate::network) install_timeout: Duration,
    /// How long a page of a handoff may take.
    pub(in crate::network) page_timeout: Duration,
    /// Appends in flight to one peer.
    pub(in crate::network) append_pipeline_max: usize,
    /// Entries in one append, in number.
    pub(in crate::network) append_entries_max: u64,
    /// Entries in one append, in bytes; a single larger entry still goes.
    pub(in crate::network) append_bytes_max: usize,
    /// How long entries wait for more on their way to a follower that no majority needs.
    pub(in crate::network) spare_append_pause: Duration,
    /// The size of a snapshot's chunk.
    pub(in crate::network) snapshot_chunk_bytes: usize,
}

impl PeerSettings {
    pub(in crate::network) fn new(config: &Config) -> Self {
        let election_timeout_max = Duration::from_millis(config.raft.election_timeout_max_ms);
        Self {
            frame_bytes_max: config.limits.peer_frame_bytes_max,
            frame_timeout: FRAME_TIMEOUT,
            connections_max: config.limits.peer_connections_max,
            greeting_timeout: Duration::from_millis(config.limits.header_timeout_ms),
            connect_timeout: 2 * election_timeout_max,
            reply_timeout: REPLY_TIMEOUT_MIN.max(2 * election_timeout_max),
            chunk_timeout: CHUNK_TIMEOUT,
            install_timeout: INSTALL_TIMEOUT,
            page_timeout: PAGE_TIMEOUT,
            append_pipeline_max: config.raft.append_pipeline_max,
            append_entries_max: config.raft.append_entries_max,
            append_bytes_max: config.raft.append_bytes_max,
            spare_append_pause: Duration::from_millis(config.raft.spare_append_pause_ms),
            snapshot_chunk_bytes: config.raft.snapshot_chunk_bytes,
        }
    }

    /// Calls in flight on one connection of this purpose. Both ends keep to it.
    pub(in crate::network) fn calls_max(&self, purpose: Purpose) -> usize {
        match purpose {
            Purpose::Append => self.append_pipeline_max,
            Purpose::Control => CONTROL_CALLS_MAX,
            Purpose::Snapshot => SNAPSHOT_CALLS_MAX,
            Purpose::Handoff => HANDOFF_CALLS_MAX,
        }
    }

    /// What the acceptor's reader of frames keeps to: who comes for a handoff sends nothing large.
    pub(in crate::network) fn request_limits(
        &self,
        purpose: Purpose,
        budget: FrameBudget,
    ) -> FrameLimits {
        let bytes_max = match purpose {
            Purpose::Handoff => self.frame_bytes_max.min(PAGE_REQUEST_BYTES_MAX),
            Purpose::Append | Purpose::Control | Purpose::Snapshot => self.frame_bytes_max,
        };
        FrameLimits { bytes_max, timeout: self.frame_timeout, budget: Some(budget) }
    }

    /// What the connector's reader of frames keeps to.
    pub(in crate::network) fn reply_limits(&self) -> FrameLimits {
        FrameLimits { bytes_max: self.frame_bytes_max, timeout: self.frame_timeout, budget: None }
    }

    /// How large a page may be that is asked for as one of `bytes_max`.
    pub(in crate::network) fn page_bytes(&self, bytes_max: u32) -> u32 {
        let limit = PAGE_BYTES_MAX.min(self.frame_bytes_max / 4);
        bytes_max.clamp(1, u32::try_from(limit).unwrap_or(u32::MAX))
    }

    /// Bytes of members' frames that are being read at once: four of the largest, because a node has
    /// one leader that sends it such.
    pub(in crate::network) fn members_budget(&self) -> FrameBudget {
        FrameBudget::new((4 * self.frame_bytes_max).max(FRAME_BUDGET_BYTES_MIN))
    }

    /// The same for strangers, apart, so that what they send half holds up no member.
    pub(in crate::network) fn strangers_budget(&self) -> FrameBudget {
        FrameBudget::new(2 * self.frame_bytes_max)
    }

    /// Bytes of appends in flight to one follower, and one append more: four full ones, because a leader
    /// holds that much for each follower that does not keep up.
    pub(in crate::network) fn appends_in_flight_bytes_max(&self) -> usize {
        4 * self.append_bytes_max
    }

    /// Bytes of calls that an acceptor reads from one connection before it has answered them. The
    /// largest frame must fit, and this node may be configured otherwise than the one that sends.
    pub(in crate::network) fn unanswered_bytes_max(&self) -> usize {
        4 * self.frame_bytes_max
    }
}
