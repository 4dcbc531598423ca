//! What surrounds every message: its sequence, its sender, and in a reply whether it went well.
//!
//! ```text
//! request = version:u8 (1), sequence:u64, sender:u64, cluster:u64 (xxh3 of the id), message
//! reply   = version:u8 (1), sequence:u64, outcome:u8 (0 done | 1 failed), message | failure
//! ```
//! The sequence counts up from 0 on each connection. A reply echoes it: Toy-RPC's 16-bit ids come
//! round, and a late reply must not answer a later call. On append connections it is also the order.

use bytes::{BufMut, Bytes};

use super::PeerIdentity;
use super::wire::{Failure, Wire};
use crate::codec::{DecodeError, Reader};

const VERSION: u8 = 1;
const DONE: u8 = 0;
const FAILED: u8 = 1;

/// The bytes of a request before its message.
pub(in crate::network) const REQUEST_HEADER_BYTES: usize = 1 + 8 + 8 + 8;

/// Puts a request together. `message` is already encoded and comes with room in front for the
/// envelope: see [`message_buffer`].
pub(in crate::network) fn seal_request(
    sequence: u64,
    own: &PeerIdentity,
    mut message: Vec<u8>,
) -> Vec<u8> {
    let mut header = &mut message[..REQUEST_HEADER_BYTES];
    header.put_u8(VERSION);
    header.put_u64(sequence);
    header.put_u64(own.node_id);
    header.put_u64(own.cluster_hash());
    message
}

/// A buffer with room in front for the envelope, so that a message is never copied to be wrapped.
pub(in crate::network) fn message_buffer() -> Vec<u8> {
    vec![0; REQUEST_HEADER_BYTES]
}

/// Encodes a message into such a buffer.
pub(in crate::network) fn encode_message(message: &impl Wire) -> Vec<u8> {
    let mut out = message_buffer();
    message.encode(&mut out);
    out
}

/// Takes a request apart, and checks that it comes from `peer`, who greeted.
pub(in crate::network) fn open_request(
    bytes: Bytes,
    peer: &PeerIdentity,
) -> Result<(u64, Reader), DecodeError> {
    let mut reader = Reader::of_peer(bytes);
    reader.version(VERSION)?;
    let sequence = reader.u64()?;
    if reader.u64()? != peer.node_id || reader.u64()? != peer.cluster_hash() {
        return Err(DecodeError::Invalid { what: "sender: not who greeted" });
    }
    Ok((sequence, reader))
}

/// Puts a reply together.
pub(in crate::network) fn seal_reply<T: Wire>(
    sequence: u64,
    outcome: &Result<T, Failure>,
) -> Vec<u8> {
    let mut out = Vec::with_capacity(64);
    out.put_u8(VERSION);
    out.put_u64(sequence);
    match outcome {
        Ok(message) => {
            out.put_u8(DONE);
            message.encode(&mut out);
        }
        Err(failure) => {
            out.put_u8(FAILED);
            failure.encode(&mut out);
        }
    }
    out
}

/// Takes the reply to request `sequence` apart.
pub(in crate::network) fn open_reply<T: Wire>(
    bytes: Bytes,
    sequence: u64,
) -> Result<Result<T, Failure>, DecodeError> {
    let mut reader = Reader::of_peer(bytes);
    reader.version(VERSION)?;
    if reader.u64()? != sequence {
        return Err(DecodeError::Invalid { what: "sequence: the reply belongs to another call" });
    }
    let outcome = match reader.u8()? {
        DONE => Ok(T::decode(&mut reader)?),
        FAILED => Err(Failure::decode(&mut reader)?),
        found => return Err(DecodeError::Tag { what: "outcome", found }),
    };
    reader.end()?;
    Ok(outcome)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::ORDINAL_HEARD_MAX;
    use crate::types::{LeaderId, LogId};

    fn peer(cluster: &str, node_id: u64) -> PeerIdentity {
        PeerIdentity { cluster: cluster.parse().unwrap(), node_id }
    }

    #[test]
    fn only_the_greeted_peers_requests_open() {
        let sealed = || Bytes::from(seal_request(7, &peer("c1", 2), encode_message(&())));
        assert_eq!(open_request(sealed(), &peer("c1", 2)).unwrap().0, 7);
        assert!(open_request(sealed(), &peer("c1", 3)).is_err());
        assert!(open_request(sealed(), &peer("c2", 2)).is_err());
    }

    #[test]
    fn a_reply_to_another_call_does_not_open() {
        let reply = Bytes::from(seal_reply(7, &Ok(())));
        assert_eq!(open_reply::<()>(reply.clone(), 7).unwrap(), Ok(()));
        assert!(open_reply::<()>(reply, 7 + (1 << 16)).is_err());
    }

    /// What a peer says is counted on from, so there is less of it than in a record.
    #[test]
    fn messages_hold_no_more_than_what_can_be_counted_on_from() {
        let own = peer("c1", 2);
        for (index, opens) in [(ORDINAL_HEARD_MAX, true), (ORDINAL_HEARD_MAX + 1, false)] {
            let log_id = LogId { leader_id: LeaderId { term: 1, node_id: 1 }, index };
            let request = seal_request(7, &own, encode_message(&log_id));
            let (_, mut message) = open_request(request.into(), &own).unwrap();
            assert_eq!(LogId::decode(&mut message).is_ok(), opens);
            let reply = Bytes::from(seal_reply(7, &Ok(log_id)));
            assert_eq!(open_reply::<LogId>(reply, 7).is_ok(), opens);
        }
    }
}
