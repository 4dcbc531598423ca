//! The words that every layer shares: ids, addresses, and what a log entry asks for and answers.
//!
//! No I/O and no policy here. The only thing this module ties down is [`TypeConfig`], the set of
//! types that openraft is instantiated with; everything above the store and the peer network speaks
//! of [`Command`] and [`Applied`] and never of openraft's own entry types.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::handoff::{Clean, Done, Import, Refused, Step};
use crate::once::Once;
use crate::ring::Ring;
use crate::writes::Writes;

/// A member of one Raft group. Unique inside its cluster only: every cluster counts from 1.
pub type NodeId = u64;

/// The state machine's own counter: how many changes it has made. Grows with every change, and for
/// one key never goes back. Not the log index.
pub type Revision = u64;

/// The version of the ring that a cluster lives by. 0 means: no ring, the cluster owns every key.
pub type Epoch = u64;

/// The longest allowed cluster id, in bytes: it is part of every peer message and file marker.
pub const CLUSTER_ID_BYTES_MAX: usize = 64;

/// The stable name of a cluster (one Raft group, one member of the ring), such as `c1`.
///
/// 1 to [`CLUSTER_ID_BYTES_MAX`] characters out of `A-Z a-z 0-9 . _ -`, so that it can stand in a
/// path, a header and a log line without escaping. Cloning is cheap.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ClusterId(Arc<str>);

/// A text that is not a [`ClusterId`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is not a cluster id: 1 to {CLUSTER_ID_BYTES_MAX} characters out of A-Z a-z 0-9 . _ - are allowed"
)]
pub struct InvalidClusterId(String);

impl ClusterId {
    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for ClusterId {
    type Err = InvalidClusterId;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
        if text.is_empty() || text.len() > CLUSTER_ID_BYTES_MAX || !text.bytes().all(allowed) {
            let shown: String = text.chars().take(CLUSTER_ID_BYTES_MAX).collect();
            return Err(InvalidClusterId(shown.escape_default().to_string()));
        }
        Ok(Self(text.into()))
    }
}

impl TryFrom<String> for ClusterId {
    type Error = InvalidClusterId;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<ClusterId> for String {
    fn from(id: ClusterId) -> Self {
        id.0.to_string()
    }
}

impl fmt::Display for ClusterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for ClusterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Where a node listens: `http` for clients, `rpc` for its peers. Both are `HOST:PORT`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct NodeAddrs {
    /// The address of the HTTP listener.
    pub http: String,
    /// The address of the peer listener.
    pub rpc: String,
}

impl NodeAddrs {
    /// Whether one of them is a wildcard such as `0.0.0.0`: good for listening, of no use to others.
    pub fn has_wildcard(&self) -> bool {
        let wildcard = |address: &str| {
            address
                .parse::<std::net::SocketAddr>()
                .is_ok_and(|address| address.ip().is_unspecified())
        };
        wildcard(&self.http) || wildcard(&self.rpc)
    }
}

/// How old a read's answer may be, and who gives it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Consistency {
    /// It sees every write that was acknowledged before it began. The leader answers.
    Linearizable,
    /// The same, answered by any node after it asked the leader how far it must have applied.
    LinearizableOnFollower,
    /// Whatever the asked node has applied: it may be old, but is never invented.
    Stale,
}

/// What must hold of a key's current record for a write to take place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Condition {
    /// Write whatever is there.
    #[default]
    Always,
    /// `If-Match`: the key exists at exactly this revision.
    Revision(Revision),
    /// `If-None-Match: *`: the key does not exist.
    Absent,
}

/// What a write does to its key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Stores this value. Any bytes.
    Put(Bytes),
    /// Removes the key.
    Delete,
}

/// One change of one key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Write {
    /// Any bytes, not empty.
    pub key: Bytes,
    /// What happens to it.
    pub action: Action,
    /// Checked at apply, against the state that every replica agrees on.
    pub condition: Condition,
    /// `Some`: it happens at most once, however often the client asks for it.
    pub once: Option<Once>,
}

impl Write {
    /// Stores `value` under `key` if `condition` holds.
    pub fn put(key: Bytes, value: Bytes, condition: Condition) -> Self {
        Self { key, action: Action::Put(value), condition, once: None }
    }

    /// Removes `key` if `condition` holds.
    pub fn delete(key: Bytes, condition: Condition) -> Self {
        Self { key, action: Action::Delete, condition, once: None }
    }

    /// The same write, at most once if `once` says so.
    #[must_use]
    pub fn once(self, once: Option<Once>) -> Self {
        Self { once, ..self }
    }

    /// The bytes of its key and value.
    pub fn bytes(&self) -> usize {
        match &self.action {
            Action::Put(value) => self.key.len() + value.len(),
            Action::Delete => self.key.len(),
        }
    }
}

/// One log entry's request to the state machine.
#[derive(Debug, Clone, PartialEq)]
pub enum Command {
    /// Changes of keys, in this order and each for itself: one may be refused and the next take place.
    /// What many clients ask for at the same moment travels together.
    Write(Writes),
    /// Take the first ring (epoch 0 to 1), or confirm the one that is already there.
    InstallRing(Box<Ring>),
    /// One step of a change of the ring.
    Step(Box<Step>),
    /// A page of a handoff is staged.
    Import(Box<Import>),
    /// Rows that a handoff has made useless are deleted.
    Clean(Box<Clean>),
}

impl fmt::Display for Command {
    /// Shows sizes, never keys or values: log lines are not a place for users' data.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Write(writes) => {
                write!(f, "write({} keys, {} B)", writes.len(), writes.bytes())
            }
            Self::InstallRing(ring) => write!(f, "install-ring(epoch {})", ring.epoch),
            Self::Step(step) => write!(f, "step({})", step.name()),
            Self::Import(import) => {
                let Import { handoff, attempt, page, .. } = &**import;
                write!(f, "import({handoff}, attempt {attempt}, {} B)", page.bytes())
            }
            Self::Clean(clean) => write!(f, "clean({}, {} keys)", clean.handoff, clean.keys.len()),
        }
    }
}

/// What one change of one key came to. The same on every replica.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Written {
    /// The value was stored as this revision.
    Put {
        /// The revision of the key's new record.
        revision: Revision,
    },
    /// A delete was carried out.
    Deleted {
        /// The state machine's revision afterwards; unchanged when nothing was deleted.
        revision: Revision,
        /// Whether there was something to delete.
        deleted: bool,
    },
    /// The condition did not hold; nothing changed.
    ConditionFailed {
        /// The revision of the key's record, `None` when the key is absent.
        current: Option<Revision>,
    },
    /// By the ring of this epoch another cluster owns the key; nothing changed.
    WrongCluster {
        /// The epoch of the ring that decided.
        epoch: Epoch,
    },
    /// The key is on its way to another cluster, and nobody serves it at the moment; nothing changed.
    Frozen,
    /// The client used this sequence for a write of another key, or of another kind; nothing changed.
    OnceReused,
    /// The sequence lies below what is remembered of the client: the write may have taken effect
    /// before, and does not now.
    OnceForgotten,
    /// No more clients can be remembered; nothing changed.
    TooManyClients,
}

/// What applying one entry answered. The same on every replica.
#[derive(Debug, Clone, PartialEq)]
pub enum Applied {
    /// A blank or membership entry: nothing to say.
    Nothing,
    /// One answer for each change, in their order.
    Written(Vec<Written>),
    /// The cluster lives by the given ring, now or since an earlier command.
    RingInstalled {
        /// The epoch of that ring.
        epoch: Epoch,
    },
    /// The ring was refused; nothing changed.
    RingRefused(RingRefusal),
    /// What a step of a change of the ring came to.
    Step(Box<Result<Done, Refused>>),
}

/// Why a cluster did not take a ring. Decided at apply, so every replica agrees.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RingRefusal {
    /// It already lives by a ring with other content.
    #[error(
        "the cluster already lives by a ring of epoch {current}; later rings come only by the handoff protocol"
    )]
    AlreadyInstalled {
        /// The epoch of the ring in force.
        current: Epoch,
    },
    /// Only the first ring can be installed this way.
    #[error("a first ring has epoch 1, not {0}")]
    NotFirst(Epoch),
    /// The cluster does not occur in the ring.
    #[error("the ring does not contain this cluster, {0}")]
    NotAMember(ClusterId),
    /// It breaks a rule of rings. The API refuses such a ring before it is proposed.
    #[error("the ring is not valid")]
    Invalid,
    /// Keys would change hands without a handoff.
    #[error("the cluster holds keys that it would not own under this ring")]
    HoldsForeignKeys,
    /// A client may still repeat a write to another cluster that was carried out here.
    #[error(
        "the cluster remembers writes, for clients that repeat them, to keys that it would not own under this ring; it forgets them 15 minutes after they were made"
    )]
    RemembersForeignWrites,
}

/// A value as it is stored, with the revision that wrote it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// The revision of the write that stored it.
    pub revision: Revision,
    /// The bytes that were written.
    pub value: Bytes,
}

openraft::declare_raft_types!(
    /// The types that openraft works with here.
    pub TypeConfig:
        D = Command,
        R = Applied,
        NodeId = NodeId,
        Node = NodeAddrs,
);

/// openraft's log id: term and node of the leader that proposed the entry, and its index.
pub type LogId = openraft::type_config::alias::LogIdOf<TypeConfig>;
/// openraft's persistent vote: term, candidate, and whether a quorum granted it.
pub type Vote = openraft::type_config::alias::VoteOf<TypeConfig>;
/// openraft's leader id: term and node.
pub type LeaderId = openraft::type_config::alias::LeaderIdOf<TypeConfig>;
/// One log entry.
pub type Entry = openraft::type_config::alias::EntryOf<TypeConfig>;
/// The voters, joint or not, and the addresses of all members.
pub type Membership = openraft::Membership<NodeId, NodeAddrs>;
/// A membership together with the log id of the entry that set it.
pub type StoredMembership = openraft::type_config::alias::StoredMembershipOf<TypeConfig>;
/// What a snapshot covers.
pub type SnapshotMeta = openraft::type_config::alias::SnapshotMetaOf<TypeConfig>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cluster_ids_keep_to_their_alphabet() {
        for good in ["c1", "A.b_c-9", &"x".repeat(CLUSTER_ID_BYTES_MAX)] {
            assert_eq!(good.parse::<ClusterId>().unwrap().as_str(), good);
        }
        for bad in ["", "a b", "ä", "a/b", &"x".repeat(CLUSTER_ID_BYTES_MAX + 1)] {
            assert!(bad.parse::<ClusterId>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_command_shows_no_user_data() {
        let (key, value) = ("secret-key".into(), "secret-value".into());
        let writes = [Write::put(key, value, Condition::Always)];
        let command = Command::Write(Writes::new(1, &writes));
        assert!(!command.to_string().contains("secret"));
    }
}
