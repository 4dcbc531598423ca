//! The first bytes of a peer connection: who calls whom, and for what.
//!
//! A node must never feed its Raft with the messages of another cluster, of another version, or meant
//! for another node that had its address before. So the connector says all of it, the acceptor
//! compares, and answers either that it is welcome or, typed, what differs. Nor must two clusters of
//! one name be mixed, so it also says to which forming of the cluster it belongs
//! ([`crate::store::formation`]).
//!
//! ```text
//! hello  = magic:8, version:u16, purpose:u8, sender:u64, target:u64, formation:u64, cluster:text8
//! answer = magic:8, version:u16, verdict:u8, node:u64, cluster:text8     the acceptor's own
//! text8  = length:u8, bytes
//! ```
//! Integers are big-endian. What follows `version` may change with it, so a reader stops there when
//! the version is not its own. Who does not start with the magic is not a peer and gets no answer.

use std::io;
use std::num::NonZeroU64;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::{PeerIdentity, Purpose};
use crate::types::{CLUSTER_ID_BYTES_MAX, ClusterId, NodeId};

/// Says that this is a peer connection of this program.
const MAGIC: [u8; 8] = *b"dkv-peer";

/// The version of the protocol: greeting, frames and messages together. In 1, entries had no time and
/// no clients.
pub(in crate::network) const PROTOCOL_VERSION: u16 = 2;

const WELCOME: u8 = 0;
const OTHER_VERSION: u8 = 1;
const OTHER_CLUSTER: u8 = 2;
const OTHER_NODE: u8 = 3;
const FULL: u8 = 4;
const OTHER_FORMATION: u8 = 5;

/// What the connector says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::network) struct Hello {
    pub(in crate::network) purpose: Purpose,
    pub(in crate::network) sender: PeerIdentity,
    /// The node that the connector believes to live at this address.
    pub(in crate::network) target: NodeId,
    /// To which forming of its cluster the sender belongs. A node that belongs to none calls nobody.
    pub(in crate::network) formation: Option<NonZeroU64>,
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
    /// The address belongs to another node of the cluster.
    #[error("the connection is meant for node {meant}, and node {found} answers there")]
    Node { meant: NodeId, found: NodeId },
    /// Both clusters have the same name, and are two.
    #[error("it belongs to another cluster of the same name: the two were initialized apart")]
    Formation,
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
    out.extend(hello.sender.node_id.to_be_bytes());
    out.extend(hello.target.to_be_bytes());
    out.extend(hello.formation.map_or(0, NonZeroU64::get).to_be_bytes());
    put_cluster(&hello.sender.cluster, &mut out);
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
    let found = stream.read_u64().await?;
    let cluster = read_cluster(stream).await?;
    let refusal = match verdict {
        WELCOME => return Ok(()),
        OTHER_VERSION => Refusal::Version { theirs },
        OTHER_CLUSTER => Refusal::Cluster { theirs: cluster, ours: hello.sender.cluster.clone() },
        OTHER_NODE => Refusal::Node { meant: hello.target, found },
        FULL => Refusal::Full,
        OTHER_FORMATION => Refusal::Formation,
        _ => return Err(GreetingError::Malformed("unknown verdict")),
    };
    Err(GreetingError::Refused(refusal))
}

/// Reads a hello and compares who calls whom. A refusal is answered here; a welcome is the caller's to
/// answer, with [`answer`], once it has compared the formation and has a place for the connection. The caller bounds the time.
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
    let node_id = stream.read_u64().await?;
    let target = stream.read_u64().await?;
    let formation = NonZeroU64::new(stream.read_u64().await?);
    let cluster = read_cluster(stream).await?;
    let refusal = if cluster != own.cluster {
        Refusal::Cluster { theirs: cluster, ours: own.cluster.clone() }
    } else if target != own.node_id {
        Refusal::Node { meant: target, found: own.node_id }
    } else {
        return Ok(Hello { purpose, sender: PeerIdentity { cluster, node_id }, target, formation });
    };
    answer(stream, own, Some(&refusal)).await?;
    Err(GreetingError::Refused(refusal))
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
        Some(Refusal::Cluster { .. }) => OTHER_CLUSTER,
        Some(Refusal::Node { .. }) => OTHER_NODE,
        Some(Refusal::Full) => FULL,
        Some(Refusal::Formation) => OTHER_FORMATION,
    });
    out.extend(own.node_id.to_be_bytes());
    put_cluster(&own.cluster, &mut out);
    stream.write_all(&out).await
}

fn put_start(out: &mut Vec<u8>) {
    out.extend(MAGIC);
    out.extend(PROTOCOL_VERSION.to_be_bytes());
}

fn put_cluster(cluster: &ClusterId, out: &mut Vec<u8>) {
    let text = cluster.as_str();
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
        let hello = Hello {
            purpose: Purpose::Snapshot,
            sender: identity("c1", 2),
            target: 1,
            formation: NonZeroU64::new(5),
        };
        let (accepted, connected) = greet(hello.clone(), identity("c1", 1)).await;
        assert_eq!(accepted, Some(hello));
        connected.unwrap();
    }

    #[tokio::test]
    async fn what_differs_is_named() {
        let hello = Hello {
            purpose: Purpose::Append,
            sender: identity("c1", 2),
            target: 1,
            formation: NonZeroU64::new(5),
        };
        let (_, other_cluster) = greet(hello.clone(), identity("c2", 1)).await;
        let Err(GreetingError::Refused(Refusal::Cluster { theirs, .. })) = other_cluster else {
            panic!("{other_cluster:?}");
        };
        assert_eq!(theirs.as_str(), "c2");
        let (_, other_node) = greet(hello, identity("c1", 7)).await;
        let Err(GreetingError::Refused(refusal)) = other_node else { panic!("{other_node:?}") };
        assert_eq!(refusal, Refusal::Node { meant: 1, found: 7 });
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
