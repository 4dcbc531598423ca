//! The first bytes of a peer connection: who calls whom, and for what.
//!
//! A node must never feed its Raft with the messages of another cluster, of another version, or meant
//! for another node that had its address before. So the connector says all of it, the acceptor
//! compares, and answers either that it is welcome or, typed, what differs. Nor must two clusters of
//! one name be mixed, so it also says to which forming of the cluster it belongs
//! ([`crate::store::formation`]).
//!
//! A blank node adopts the formation of whoever calls it, unless that says that it is a voter: then it has lost
//! its data, and does not know any more for whom it voted and what it acknowledged. Taken back as if nothing had
//! happened, it could make a leader that lacks acknowledged writes. Voters are never blank otherwise: nobody
//! becomes one before it has caught up as a learner. (A caller that does not know yet that the node became a voter
//! cannot say so; nor does it help against a learner that loses its data.)
//!
//! Nodes of different clusters talk for one purpose only, [`Purpose::Handoff`]: the target's cluster
//! gives keys to the sender's. That it does is the acceptor's to know, from the change of the ring
//! that it takes part in; who is not a destination of it is refused. Formations say nothing between
//! clusters, and are not compared.
//!
//! ```text
//! hello  = magic:8, version:u16, purpose:u8, sender:node, target:node, formation:u64, ring:u8, voter:u8
//! answer = magic:8, version:u16, verdict:u8, own:node
//! node   = id:u64, cluster:text8
//! text8  = length:u8, bytes
//! ```
//! Integers are big-endian. What follows `version` may change with it, so a reader stops there when
//! the version is not its own. Who does not start with the magic is not a peer and gets no answer.

use std::io;
use std::num::NonZeroU64;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::{PeerIdentity, Purpose};
use crate::store::formation::{BeforeRing, Founding};
use crate::types::{CLUSTER_ID_BYTES_MAX, ClusterId, NodeId};

/// Says that this is a peer connection of this program.
const MAGIC: [u8; 8] = *b"dkv-peer";

/// The version of the protocol: greeting, frames and messages together. In 1, entries had no time and
/// no clients, a hello did not name the target's cluster, and there were no handoffs. In 2, a hello did
/// not say what the cluster serves before it has a ring. In 3, it did not say whether the target is a voter.
/// In 4, there were no leases. In 5, the messages were these, but a change of the ring took keys that none can have, and
/// a client with a pinned answer kept new ones out: replicas that apply by different rules must not meet.
pub(in crate::network) const PROTOCOL_VERSION: u16 = 6;

const WELCOME: u8 = 0;
const OTHER_VERSION: u8 = 1;
const OTHER_CLUSTER: u8 = 2;
const OTHER_NODE: u8 = 3;
const FULL: u8 = 4;
const OTHER_FORMATION: u8 = 5;
const NO_HANDOFF: u8 = 6;
const LOST: u8 = 7;

/// What the connector says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::network) struct Hello {
    pub(in crate::network) purpose: Purpose,
    pub(in crate::network) sender: PeerIdentity,
    /// The node that the connector believes to live at this address.
    pub(in crate::network) target: PeerIdentity,
    /// To which forming of its cluster the sender belongs. A node that belongs to none calls nobody.
    pub(in crate::network) formation: Option<Founding>,
    /// Whether the target is a voter of the cluster, as far as the sender knows.
    pub(in crate::network) is_voter: bool,
}

/// Why a node does not talk to another. Each names what the other side said about itself.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(in crate::network) enum Refusal {
    /// The two programs are too far apart.
    #[error("it speaks version {theirs} of the peer protocol, this node {PROTOCOL_VERSION}")]
    Version { theirs: u16 },
    /// The address belongs to another cluster.
    #[error("it belongs to cluster {theirs}, this node to {ours}")]
    Cluster { theirs: ClusterId, ours: ClusterId },
    /// The address belongs to another cluster than the one that keys are to come from.
    #[error("the connection is meant for cluster {meant}, and cluster {found} answers there")]
    Elsewhere { meant: ClusterId, found: ClusterId },
    /// The address belongs to another node of the cluster.
    #[error("the connection is meant for node {meant}, and node {found} answers there")]
    Node { meant: NodeId, found: NodeId },
    /// Both clusters have the same name, and are two.
    #[error("it belongs to another cluster of the same name: the two were initialized apart")]
    Formation,
    /// The acceptor is a voter and blank.
    #[error(
        "node {node} is a voter of the cluster and has lost its data, and with it what it promised; it has to be \
         replaced"
    )]
    Lost { node: NodeId },
    /// As far as the acceptor knows, which may lag behind, its cluster gives no keys to the sender's.
    #[error("cluster {from} gives no keys to cluster {to} at the moment")]
    NoHandoff { from: ClusterId, to: ClusterId },
    /// The acceptor holds as many connections as it may.
    #[error("it has too many connections")]
    Full,
}

/// What went wrong in a greeting.
#[derive(Debug, thiserror::Error)]
pub(in crate::network) enum GreetingError {
    /// The two do not belong together.
    #[error("{0}")]
    Refused(Refusal),
    /// The other end is no peer, or a broken one.
    #[error("not a peer: {0}")]
    Malformed(&'static str),
    /// The connection failed.
    #[error("{0}")]
    Io(#[from] io::Error),
}

/// Says hello and waits for the answer. The caller bounds the time.
pub(in crate::network) async fn connect<S>(
    stream: &mut S,
    hello: &Hello,
) -> Result<(), GreetingError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut out = Vec::with_capacity(128);
    put_start(&mut out);
    out.push(hello.purpose.number());
    put_node(&hello.sender, &mut out);
    put_node(&hello.target, &mut out);
    out.extend(hello.formation.map_or(0, |founding| founding.id.get()).to_be_bytes());
    out.push(hello.formation.map_or(BeforeRing::Serves, |founding| founding.before_ring).number());
    out.push(u8::from(hello.is_voter));
    stream.write_all(&out).await?;
    read_answer(stream, hello).await
}

async fn read_answer<S>(stream: &mut S, hello: &Hello) -> Result<(), GreetingError>
where
    S: AsyncRead + Unpin,
{
    let theirs = read_start(stream).await?;
    if theirs != PROTOCOL_VERSION {
        return Err(GreetingError::Refused(Refusal::Version { theirs }));
    }
    let verdict = stream.read_u8().await?;
    let PeerIdentity { cluster, node_id: found } = read_node(stream).await?;
    let (sender, target) = (&hello.sender, &hello.target);
    let refusal = match verdict {
        WELCOME => return Ok(()),
        OTHER_VERSION => Refusal::Version { theirs },
        OTHER_CLUSTER if hello.purpose == Purpose::Handoff => {
            Refusal::Elsewhere { meant: target.cluster.clone(), found: cluster }
        }
        OTHER_CLUSTER => Refusal::Cluster { theirs: cluster, ours: sender.cluster.clone() },
        OTHER_NODE => Refusal::Node { meant: target.node_id, found },
        FULL => Refusal::Full,
        OTHER_FORMATION => Refusal::Formation,
        LOST => Refusal::Lost { node: found },
        NO_HANDOFF => Refusal::NoHandoff { from: cluster, to: sender.cluster.clone() },
        _ => return Err(GreetingError::Malformed("unknown verdict")),
    };
    Err(GreetingError::Refused(refusal))
}

/// Reads a hello and compares who calls whom. A refusal is answered here; a welcome is the caller's to
/// answer, with [`answer`], once it has a place for the connection, and has compared the formation or
/// knows of the handoff. The caller bounds the time.
pub(in crate::network) async fn accept<S>(
    stream: &mut S,
    own: &PeerIdentity,
) -> Result<Hello, GreetingError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let theirs = read_start(stream).await?;
    if theirs != PROTOCOL_VERSION {
        let refusal = Refusal::Version { theirs };
        answer(stream, own, Some(&refusal)).await?;
        return Err(GreetingError::Refused(refusal));
    }
    let purpose = Purpose::from_number(stream.read_u8().await?)
        .map_err(|_| GreetingError::Malformed("unknown purpose"))?;
    let (sender, target) = (read_node(stream).await?, read_node(stream).await?);
    let id = NonZeroU64::new(stream.read_u64().await?);
    let before_ring = BeforeRing::from_number(stream.read_u8().await?)
        .ok_or(GreetingError::Malformed("unknown number before the ring"))?;
    let formation = id.map(|id| Founding { id, before_ring });
    let is_voter = match stream.read_u8().await? {
        voter @ (0 | 1) => voter == 1,
        _ => return Err(GreetingError::Malformed("it is a voter or not")),
    };
    let hello = Hello { purpose, sender, target, formation, is_voter };
    let Some(refusal) = refusal_of(&hello, own) else { return Ok(hello) };
    answer(stream, own, Some(&refusal)).await?;
    Err(GreetingError::Refused(refusal))
}

/// What keeps the two apart, as far as a greeting alone tells.
fn refusal_of(hello: &Hello, own: &PeerIdentity) -> Option<Refusal> {
    let (sender, target) = (&hello.sender, &hello.target);
    if hello.purpose == Purpose::Handoff {
        if target.cluster != own.cluster {
            let (meant, found) = (target.cluster.clone(), own.cluster.clone());
            return Some(Refusal::Elsewhere { meant, found });
        }
        if sender.cluster == own.cluster {
            let (from, to) = (own.cluster.clone(), own.cluster.clone());
            return Some(Refusal::NoHandoff { from, to });
        }
    } else if let Some(other) =
        [sender, target].into_iter().find(|node| node.cluster != own.cluster)
    {
        let (theirs, ours) = (other.cluster.clone(), own.cluster.clone());
        return Some(Refusal::Cluster { theirs, ours });
    }
    let (meant, found) = (target.node_id, own.node_id);
    (meant != found).then_some(Refusal::Node { meant, found })
}

/// Answers a hello: welcome, or what differs.
pub(in crate::network) async fn answer<S>(
    stream: &mut S,
    own: &PeerIdentity,
    refusal: Option<&Refusal>,
) -> io::Result<()>
where
    S: AsyncWrite + Unpin,
{
    let mut out = Vec::with_capacity(128);
    put_start(&mut out);
    out.push(match refusal {
        None => WELCOME,
        Some(Refusal::Version { .. }) => OTHER_VERSION,
        Some(Refusal::Cluster { .. } | Refusal::Elsewhere { .. }) => OTHER_CLUSTER,
        Some(Refusal::Node { .. }) => OTHER_NODE,
        Some(Refusal::Full) => FULL,
        Some(Refusal::Formation) => OTHER_FORMATION,
        Some(Refusal::Lost { .. }) => LOST,
        Some(Refusal::NoHandoff { .. }) => NO_HANDOFF,
    });
    put_node(own, &mut out);
    stream.write_all(&out).await
}

fn put_start(out: &mut Vec<u8>) {
    out.extend(MAGIC);
    out.extend(PROTOCOL_VERSION.to_be_bytes());
}

fn put_node(node: &PeerIdentity, out: &mut Vec<u8>) {
    out.extend(node.node_id.to_be_bytes());
    let text = node.cluster.as_str();
    out.push(u8::try_from(text.len()).expect("a cluster id has at most 64 bytes"));
    out.extend(text.as_bytes());
}

async fn read_start<S: AsyncRead + Unpin>(stream: &mut S) -> Result<u16, GreetingError> {
    let mut magic = [0; MAGIC.len()];
    stream.read_exact(&mut magic).await?;
    if magic != MAGIC {
        return Err(GreetingError::Malformed("wrong magic"));
    }
    Ok(stream.read_u16().await?)
}

async fn read_node<S: AsyncRead + Unpin>(stream: &mut S) -> Result<PeerIdentity, GreetingError> {
    let node_id = stream.read_u64().await?;
    Ok(PeerIdentity { cluster: read_cluster(stream).await?, node_id })
}

async fn read_cluster<S: AsyncRead + Unpin>(stream: &mut S) -> Result<ClusterId, GreetingError> {
    let length = usize::from(stream.read_u8().await?);
    if length > CLUSTER_ID_BYTES_MAX {
        return Err(GreetingError::Malformed("cluster id too long"));
    }
    let mut text = [0; CLUSTER_ID_BYTES_MAX];
    let text = &mut text[..length];
    stream.read_exact(text).await?;
    let text = std::str::from_utf8(text).map_err(|_| GreetingError::Malformed("cluster id"))?;
    text.parse().map_err(|_| GreetingError::Malformed("cluster id"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(cluster: &str, node_id: NodeId) -> PeerIdentity {
        PeerIdentity { cluster: cluster.parse().unwrap(), node_id }
    }

    fn hello(purpose: Purpose, sender: PeerIdentity) -> Hello {
        let target = identity("c1", 1);
        let founding = |id| Founding { id, before_ring: BeforeRing::Waits };
        let formation = NonZeroU64::new(5).map(founding);
        Hello { purpose, sender, target, formation, is_voter: true }
    }

    async fn greet(hello: Hello, own: PeerIdentity) -> (Option<Hello>, Result<(), GreetingError>) {
        let (mut near, mut far) = tokio::io::duplex(1024);
        let acceptor = async {
            let hello = accept(&mut far, &own).await.ok()?;
            answer(&mut far, &own, None).await.unwrap();
            Some(hello)
        };
        tokio::join!(acceptor, connect(&mut near, &hello))
    }

    #[tokio::test]
    async fn members_of_one_cluster_are_welcome() {
        let hello = hello(Purpose::Snapshot, identity("c1", 2));
        let (accepted, connected) = greet(hello.clone(), identity("c1", 1)).await;
        assert_eq!(accepted, Some(hello));
        connected.unwrap();
    }

    #[tokio::test]
    async fn what_differs_is_named() {
        let hello = hello(Purpose::Append, identity("c1", 2));
        let (_, other_cluster) = greet(hello.clone(), identity("c2", 1)).await;
        let Err(GreetingError::Refused(Refusal::Cluster { theirs, .. })) = other_cluster else {
            panic!("{other_cluster:?}");
        };
        assert_eq!(theirs.as_str(), "c2");
        let (_, other_node) = greet(hello, identity("c1", 7)).await;
        let Err(GreetingError::Refused(refusal)) = other_node else { panic!("{other_node:?}") };
        assert_eq!(refusal, Refusal::Node { meant: 1, found: 7 });
    }

    /// Another cluster's nodes get through for a handoff and for nothing else, and only to the node
    /// and the cluster that they mean.
    #[tokio::test]
    async fn nodes_of_other_clusters_come_for_handoffs_only() {
        let hello = |purpose| hello(purpose, identity("c2", 1));
        let (accepted, connected) = greet(hello(Purpose::Handoff), identity("c1", 1)).await;
        assert_eq!(accepted, Some(hello(Purpose::Handoff)));
        connected.unwrap();
        for purpose in [Purpose::Append, Purpose::Control, Purpose::Snapshot] {
            // The acceptor is of the sender's cluster, or of the target's.
            for own in [identity("c1", 1), identity("c2", 1)] {
                let (accepted, _) = greet(hello(purpose), own).await;
                assert_eq!(accepted, None);
            }
        }
        for (own, expected) in [
            (identity("c1", 7), Refusal::Node { meant: 1, found: 7 }),
            (identity("c3", 1), Refusal::Elsewhere { meant: id("c1"), found: id("c3") }),
            (identity("c2", 1), Refusal::Elsewhere { meant: id("c1"), found: id("c2") }),
        ] {
            let (_, refused) = greet(hello(Purpose::Handoff), own).await;
            let Err(GreetingError::Refused(refusal)) = refused else { panic!("{refused:?}") };
            assert_eq!(refusal, expected);
        }
        let (_, within) = greet(hello_within(), identity("c1", 1)).await;
        let Err(GreetingError::Refused(refusal)) = within else { panic!("{within:?}") };
        assert_eq!(refusal, Refusal::NoHandoff { from: id("c1"), to: id("c1") });
    }

    fn id(cluster: &str) -> ClusterId {
        cluster.parse().unwrap()
    }

    /// A handoff within one cluster, which there is not.
    fn hello_within() -> Hello {
        hello(Purpose::Handoff, identity("c1", 2))
    }

    #[tokio::test]
    async fn another_version_is_answered_without_reading_on() {
        let (mut near, mut far) = tokio::io::duplex(1024);
        near.write_all(b"dkv-peer\x00\x09").await.unwrap();
        let accepted = accept(&mut far, &identity("c1", 1)).await;
        assert!(matches!(accepted, Err(GreetingError::Refused(Refusal::Version { theirs: 9 }))));
        assert_eq!(read_start(&mut near).await.unwrap(), PROTOCOL_VERSION);
        assert_eq!(near.read_u8().await.unwrap(), OTHER_VERSION);
    }

    #[tokio::test]
    async fn strangers_get_no_answer() {
        let (mut near, mut far) = tokio::io::duplex(1024);
        near.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
        let accepted = accept(&mut far, &identity("c1", 1)).await;
        assert!(matches!(accepted, Err(GreetingError::Malformed(_))));
        drop(far);
        let mut answer = Vec::new();
        near.read_to_end(&mut answer).await.unwrap();
        assert!(answer.is_empty());
    }
}
