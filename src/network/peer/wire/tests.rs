//! Messages come back as they went in; other bytes are errors, never panics.

use std::fmt::Debug;

use bytes::Bytes;
use openraft::EntryPayload;
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;

use super::*;
use crate::codec::ORDINAL_HEARD_MAX;
use crate::store::snapshot::StagingPosition;
use crate::types::{
    Command, Condition, Entry, LeaderId, SnapshotMeta, StoredMembership, Vote, Write,
};
use crate::writes::Writes;

fn any_leader() -> impl Strategy<Value = LeaderId> {
    (0u64..4, 0u64..4).prop_map(|(term, node_id)| LeaderId { term, node_id })
}

fn any_log_id() -> impl Strategy<Value = LogId> {
    (any_leader(), 0..=ORDINAL_HEARD_MAX).prop_map(|(leader_id, index)| LogId { leader_id, index })
}

fn any_vote() -> impl Strategy<Value = Vote> {
    (any_leader(), any::<bool>()).prop_map(|(leader_id, committed)| Vote { leader_id, committed })
}

/// Appends as a leader makes them: consecutive entries, none of a later leader.
fn any_append() -> impl Strategy<Value = AppendRequest> {
    let values = vec(vec(any::<u8>(), 0..20), 0..6);
    (any_leader(), option::of(0u64..100), values, option::of(any_log_id())).prop_map(
        |(leader_id, prev, values, leader_commit)| {
            let log_id = |index| LogId { leader_id, index };
            let first = prev.map_or(0, |prev| prev + 1);
            let entry = |(index, value): (u64, Vec<u8>)| {
                let value = Bytes::from(value);
                let put = Write::put("k".into(), value, Condition::Always);
                let command = Command::Write(Writes::new(0, &[put]));
                Entry { log_id: log_id(index), payload: EntryPayload::Normal(command) }
            };
            AppendRequest {
                vote: Vote { leader_id, committed: true },
                prev_log_id: prev.map(log_id),
                entries: (first..).zip(values).map(entry).collect(),
                leader_commit,
            }
        },
    )
}

fn decode<T: Wire>(bytes: &[u8]) -> Result<T, DecodeError> {
    let mut reader = Reader::of_peer(Bytes::copy_from_slice(bytes));
    let decoded = T::decode(&mut reader)?;
    reader.end()?;
    Ok(decoded)
}

fn encoded(message: &impl Wire) -> Vec<u8> {
    let mut out = Vec::new();
    message.encode(&mut out);
    out
}

/// There and back, and every shorter form is refused.
fn check<T: Wire + Debug>(message: &T) -> Result<(), TestCaseError> {
    let bytes = encoded(message);
    let back: T = decode(&bytes).map_err(|error| TestCaseError::fail(error.to_string()))?;
    prop_assert_eq!(format!("{:?}", back), format!("{:?}", message));
    for end in 0..bytes.len() {
        prop_assert!(decode::<T>(&bytes[..end]).is_err(), "cut at {}", end);
    }
    Ok(())
}

proptest! {
    #[test]
    fn requests_come_back(
        request in any_append(), vote in any_vote(), log_id in option::of(any_log_id()),
        id in any::<u64>(), seq in any::<u64>(), flag in any::<bool>(), data in vec(any::<u8>(), 0..50),
    ) {
        check(&request)?;
        let mut asked = VoteRequest::new(vote, log_id);
        asked.leadership_transfer = flag;
        check(&PreVote(asked.clone()))?;
        check(&asked)?;
        check(&TransferRequest::new(vote, id, log_id))?;
        let last_membership = StoredMembership::new(log_id, Default::default());
        let meta = SnapshotMeta { last_log_id: log_id, last_membership };
        check(&BeginSnapshot { vote, id, meta: meta.clone() })?;
        check(&FinishSnapshot { vote, id, meta })?;
        check(&SnapshotChunk { vote, id, seq, bytes: data.into() })?;
    }

    #[test]
    fn replies_come_back(
        vote in any_vote(), log_id in any_log_id(), maybe in option::of(any_log_id()),
        next_seq in any::<u64>(), flag in any::<bool>(), cursor in vec(any::<u8>(), 0..50),
        why in ".{0,40}", leader in option::of(any::<u64>()),
    ) {
        for reply in [Ok(maybe), Err(AppendRefusal::Conflict(log_id)), Err(AppendRefusal::HigherVote(vote))] {
            check::<AppendReply>(&reply)?;
        }
        for reply in [
            HeartbeatReply::Success, HeartbeatReply::PartialSuccess(maybe), HeartbeatReply::Conflict,
            HeartbeatReply::HigherVote(vote),
        ] {
            check(&reply)?;
        }
        check(&VoteReply::new(vote, maybe, flag))?;
        let changed = TransferRefusal::VoteChanged { expected: vote, actual: vote };
        let unflushed = TransferRefusal::LogNotFlushed { expected: maybe, actual: Some(log_id) };
        for reply in [Ok(()), Err(changed), Err(unflushed)] {
            check::<TransferReply>(&reply)?;
        }
        check(&log_id)?;
        let position = StagingPosition { next_seq, cursor: cursor.into(), complete: flag };
        check(&SnapshotStep::Position(position))?;
        check(&SnapshotStep::HigherVote(vote))?;
        check(&Installed::new(vote))?;
        for failure in [
            Failure::Stopped, Failure::SessionEnded, Failure::NotLeader(leader), Failure::NoQuorum,
            Failure::refused(why),
        ] {
            check(&failure)?;
        }
    }

    /// However small the messages have to be, the parts of an append make up the whole.
    #[test]
    fn split_appends_make_up_the_whole(request in any_append(), bytes_max in 200usize..400) {
        let parts = encode_appends(5, &request, bytes_max).unwrap();
        let mut whole = AppendRequest { entries: Vec::new(), ..request.clone() };
        let mut last = request.prev_log_id;
        for part in parts {
            prop_assert!(part.message.len() <= bytes_max);
            let header = crate::network::peer::envelope::REQUEST_HEADER_BYTES;
            let append: Append = decode(&part.message[header..]).unwrap();
            prop_assert_eq!(append.session, 5);
            prop_assert_eq!((append.request.prev_log_id, part.prev), (last, last));
            last = append.request.entries.last().map_or(last, |entry| Some(entry.log_id));
            prop_assert_eq!(part.last, last);
            whole.entries.extend(append.request.entries);
        }
        prop_assert_eq!(format!("{:?}", whole), format!("{:?}", request));
    }

    #[test]
    fn any_bytes_never_panic(bytes in vec(any::<u8>(), 0..300)) {
        // What they decode to does not matter here, only that they return.
        let _ = decode::<Append>(&bytes);
        let _ = decode::<BeginSnapshot>(&bytes);
        let _ = decode::<SnapshotChunk>(&bytes);
        let _ = decode::<TransferRequest>(&bytes);
        let _ = decode::<TransferReply>(&bytes);
        let _ = decode::<SnapshotStep>(&bytes);
        let _ = decode::<Failure>(&bytes);
    }

    #[test]
    fn a_flipped_byte_never_panics(request in any_append(), at in any::<usize>(), flip in 1u8..) {
        let mut bytes = encoded(&request);
        let at = at % bytes.len();
        bytes[at] ^= flip;
        let _ = decode::<AppendRequest>(&bytes);
    }
}

/// Raft takes a log without gaps for granted; bytes from a network must prove it.
#[test]
fn appends_that_would_corrupt_a_log_are_refused() {
    let entry = |term, index| Entry {
        log_id: LogId { leader_id: LeaderId { term, node_id: 1 }, index },
        payload: EntryPayload::Blank,
    };
    let request = |committed, entries| AppendRequest {
        vote: Vote { leader_id: LeaderId { term: 5, node_id: 1 }, committed },
        prev_log_id: Some(LogId { leader_id: LeaderId { term: 3, node_id: 1 }, index: 7 }),
        entries,
        leader_commit: None,
    };
    let refused = |request| decode::<AppendRequest>(&encoded(&request)).is_err();
    assert!(!refused(request(true, vec![entry(3, 8), entry(5, 9)])));
    assert!(refused(request(false, vec![entry(3, 8)])), "not from a leader");
    assert!(refused(request(true, vec![entry(3, 9)])), "a gap after prev");
    assert!(refused(request(true, vec![entry(3, 8), entry(3, 8)])), "an index twice");
    assert!(
        refused(request(true, vec![entry(4, 8), entry(3, 9)])),
        "an older leader after a newer"
    );
    assert!(refused(request(true, vec![entry(6, 8)])), "a leader later than the sender");
    let from_the_beginning =
        |entries| AppendRequest { prev_log_id: None, ..request(true, entries) };
    assert!(!refused(from_the_beginning(vec![entry(3, 0), entry(3, 1)])));
    assert!(refused(from_the_beginning(vec![entry(3, 7)])), "a gap before the first");
}

/// Whoever hears of a term or an index counts on from it, and the highest number has none after it: such a message
/// ended a node's Raft, or its elections for ever.
#[test]
fn terms_and_indexes_that_nothing_can_follow_are_refused() {
    fn is_refused<T: Wire>(message: &T) -> bool {
        decode::<T>(&encoded(message)).is_err()
    }
    const MAX: u64 = ORDINAL_HEARD_MAX;
    for (term, index, term_refused, index_refused) in [
        (1, 1, false, false),
        (MAX, MAX, false, false),
        (1, MAX + 1, false, true),
        (1, u64::MAX - 1, false, true),
        (1, u64::MAX, false, true),
        (MAX + 1, 1, true, false),
        (u64::MAX, 1, true, false),
    ] {
        let refused = term_refused || index_refused;
        let leader_id = LeaderId { term, node_id: 1 };
        let (vote, log_id) = (Vote { leader_id, committed: true }, LogId { leader_id, index });
        let sound = Vote { leader_id: LeaderId { term: MAX, node_id: 2 }, committed: true };
        let append = |vote, prev_log_id, leader_commit| AppendRequest {
            vote,
            prev_log_id,
            entries: Vec::new(),
            leader_commit,
        };
        assert_eq!(is_refused(&append(sound, Some(log_id), None)), refused, "{log_id}");
        assert_eq!(is_refused(&append(sound, None, Some(log_id))), refused, "{log_id}");
        assert_eq!(is_refused(&append(vote, None, None)), term_refused, "{vote}");
        assert_eq!(is_refused(&VoteRequest::new(sound, Some(log_id))), refused, "{log_id}");
        assert_eq!(is_refused(&VoteReply::new(sound, Some(log_id), true)), refused, "{log_id}");
        assert_eq!(is_refused(&TransferRequest::new(sound, 1, Some(log_id))), refused, "{log_id}");
        assert_eq!(is_refused(&HeartbeatReply::PartialSuccess(Some(log_id))), refused, "{log_id}");
        assert_eq!(is_refused::<AppendReply>(&Ok(Some(log_id))), refused, "{log_id}");
        assert_eq!(is_refused(&log_id), refused, "a read index: {log_id}");
        let confirm = Confirm { leader: leader_id, lease_ms: 0 };
        assert_eq!(is_refused(&confirm), term_refused, "{leader_id}");
        let last_membership = StoredMembership::new(Some(log_id), Default::default());
        for meta in [
            SnapshotMeta { last_log_id: Some(log_id), ..SnapshotMeta::default() },
            SnapshotMeta { last_membership, ..SnapshotMeta::default() },
        ] {
            let begin = BeginSnapshot { vote: sound, id: 1, meta: meta.clone() };
            assert_eq!(is_refused(&begin), refused, "{log_id}");
            let finish = FinishSnapshot { vote: sound, id: 1, meta };
            assert_eq!(is_refused(&finish), refused, "{log_id}");
        }
    }
}
