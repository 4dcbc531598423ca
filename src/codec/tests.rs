//! Every record comes back as it went in; every other sequence of bytes is an error, never a panic.

use proptest::collection::{btree_map, btree_set, vec};
use proptest::prelude::*;

use super::*;
use crate::once::{ClientFloor, Once};
use crate::ring::{Ring, RingCluster, RingNode};
use crate::types::{Action, Condition, Write};
use crate::writes::{ActionRef, WriteRef, encoded_bytes};

fn any_log_id() -> impl Strategy<Value = LogId> {
    (0..=ORDINAL_MAX, any::<u64>(), 0..=ORDINAL_MAX)
        .prop_map(|(term, node_id, index)| LogId { leader_id: LeaderId { term, node_id }, index })
}

fn any_vote() -> impl Strategy<Value = Vote> {
    (0..=ORDINAL_MAX, any::<u64>(), any::<bool>()).prop_map(|(term, node_id, committed)| Vote {
        leader_id: LeaderId { term, node_id },
        committed,
    })
}

fn any_bytes() -> impl Strategy<Value = Bytes> {
    vec(any::<u8>(), 0..40).prop_map(Bytes::from)
}

fn any_condition() -> impl Strategy<Value = Condition> {
    prop_oneof![
        Just(Condition::Always),
        any::<u64>().prop_map(Condition::Revision),
        Just(Condition::Absent)
    ]
}

fn any_ring() -> impl Strategy<Value = Ring> {
    (any::<u64>(), 1e-3f32..1e3, "[a-z]{1,8}").prop_map(|(epoch, weight, id)| {
        let node = RingNode { id: 1, http: "127.0.0.1:1".into(), rpc: "[::1]:2".into() };
        let id: crate::types::ClusterId = id.parse().unwrap();
        let cluster = RingCluster { id: id.clone(), weight, nodes: vec![node] };
        Ring { epoch, sequencer: Some(id), clusters: vec![cluster], ..Ring::none() }
    })
}

fn any_membership() -> impl Strategy<Value = Membership> {
    (vec(btree_set(0u64..6, 1..4), 0..3), btree_map(6u64..9, "[a-z:0-9]{0,12}", 0..3)).prop_map(
        |(configs, learners)| {
            let voters = configs.iter().flatten().map(|id| (*id, format!("voter:{id}")));
            let addrs = |text: String| NodeAddrs { http: text.clone(), rpc: text + "r" };
            let nodes: BTreeMap<NodeId, NodeAddrs> =
                voters.chain(learners).map(|(id, text)| (id, addrs(text))).collect();
            Membership::new(configs, nodes).unwrap()
        },
    )
}

/// Few clients and floors, so that neighbours often have the same.
fn any_once() -> impl Strategy<Value = Option<Once>> {
    proptest::option::of(("[a-c]|[!-.0-~]{1,64}", 0u64..3, 0u64..100).prop_map(
        |(client, floor, above)| {
            let client = ClientFloor { client: client.parse().unwrap(), floor };
            Once::new(client, floor + above).unwrap()
        },
    ))
}

fn any_write() -> impl Strategy<Value = Write> {
    let action = prop_oneof![any_bytes().prop_map(Action::Put), Just(Action::Delete)];
    (any_bytes(), action, any_condition(), any_once())
        .prop_map(|(key, action, condition, once)| Write { key, action, condition, once })
}

fn any_writes() -> impl Strategy<Value = Command> {
    (any::<u64>(), vec(any_write(), 0..6))
        .prop_map(|(at_ms, writes)| Command::Write(Writes::new(at_ms, &writes)))
}

fn any_entry() -> impl Strategy<Value = Entry> {
    let payload = prop_oneof![
        Just(EntryPayload::Blank),
        any_writes().prop_map(EntryPayload::Normal),
        any_ring().prop_map(|ring| EntryPayload::Normal(Command::InstallRing(Box::new(ring)))),
        any_membership().prop_map(EntryPayload::Membership),
    ];
    (any_log_id(), payload).prop_map(|(log_id, payload)| Entry { log_id, payload })
}

fn any_stored_membership() -> impl Strategy<Value = StoredMembership> {
    (proptest::option::of(any_log_id()), any_membership())
        .prop_map(|(log_id, membership)| StoredMembership::new(log_id, membership))
}

fn encoded(entry: &Entry) -> Bytes {
    let mut out = Vec::new();
    encode_entry(entry, &mut out);
    Bytes::from(out)
}

/// What was read, encoded anew: decoding keeps the bytes, so that they are their own encoding says nothing.
fn afresh(writes: &Writes) -> Writes {
    let owned = |write: WriteRef| {
        let action = match write.action {
            ActionRef::Put(value) => Action::Put(Bytes::copy_from_slice(value)),
            ActionRef::Delete => Action::Delete,
        };
        let once = write.once.map(|once| {
            let client =
                ClientFloor { client: once.client().parse().unwrap(), floor: once.floor() };
            Once::new(client, once.seq()).unwrap()
        });
        let key = Bytes::copy_from_slice(write.key);
        Write { key, action, condition: write.condition, once }
    };
    let read: Vec<Write> = writes.iter().map(owned).collect();
    assert_eq!(read.len(), writes.len());
    assert_eq!(read.iter().map(Write::bytes).sum::<usize>(), writes.bytes());
    Writes::new(writes.at_ms(), &read)
}

/// Bytes that are often what they should be where a write begins.
fn nearly_writes() -> impl Strategy<Value = Vec<u8>> {
    let byte = prop_oneof![
        4 => Just(0u8),
        2 => prop::sample::select(vec![1u8, 2, 0x11, 0x12, 0x21, 0x22]),
        1 => any::<u8>(),
    ];
    (0u8..4, vec(byte, 0..80)).prop_map(|(count, rest)| {
        let head = [0, 0, 0, 0, 0, 0, 0, 9, 0, 0, 0, count];
        head.into_iter().chain(rest).collect()
    })
}

proptest! {
    /// Whatever decodes can be read to its end, and is the only encoding of what was read.
    #[test]
    fn foreign_writes_never_panic(
        bytes in nearly_writes(), writes in vec(any_write(), 0..4), at in any::<usize>(), flip in 1u8..,
    ) {
        let mut flipped = Writes::new(1, &writes).encoded().to_vec();
        let at = at % flipped.len();
        flipped[at] ^= flip;
        for bytes in [bytes, flipped] {
            if let Ok(decoded) = Writes::decode(Bytes::from(bytes)) {
                prop_assert_eq!(afresh(&decoded), decoded);
            }
        }
    }

    /// Encoded once and read in place, they are the writes that they were made of.
    #[test]
    fn writes_come_back(at_ms in any::<u64>(), writes in vec(any_write(), 0..6)) {
        let encoded = Writes::new(at_ms, &writes);
        let decoded = Writes::decode(Bytes::copy_from_slice(encoded.encoded())).unwrap();
        prop_assert_eq!(&decoded, &encoded);
        prop_assert_eq!(encoded_bytes(&writes), encoded.encoded().len());
        prop_assert_eq!(decoded.at_ms(), at_ms);
        prop_assert_eq!(decoded.len(), writes.len());
        prop_assert_eq!(decoded.bytes(), writes.iter().map(Write::bytes).sum::<usize>());
        let found: Vec<_> = decoded.iter().collect();
        prop_assert_eq!(found, writes.iter().map(WriteRef::from).collect::<Vec<_>>());
    }

    #[test]
    fn entries_come_back(entry in any_entry()) {
        let bytes = encoded(&entry);
        prop_assert_eq!(decode_entry(bytes).unwrap(), entry);
    }

    #[test]
    fn ids_come_back(
        log_id in any_log_id(), vote in any_vote(), membership in any_stored_membership(),
    ) {
        let (mut a, mut b, mut c) = (Vec::new(), Vec::new(), Vec::new());
        encode_log_id(&log_id, &mut a);
        encode_vote(&vote, &mut b);
        encode_membership(&membership, &mut c);
        prop_assert_eq!(decode_log_id(&a).unwrap(), log_id);
        prop_assert_eq!(decode_vote(&b).unwrap(), vote);
        prop_assert_eq!(decode_membership(&c).unwrap(), membership);
    }

    #[test]
    fn no_shorter_or_longer_form_is_accepted(entry in any_entry()) {
        let bytes = encoded(&entry);
        for end in 0..bytes.len() {
            prop_assert!(decode_entry(bytes.slice(..end)).is_err(), "cut at {}", end);
        }
        let mut longer = bytes.to_vec();
        longer.push(0);
        prop_assert!(decode_entry(Bytes::from(longer)).is_err());
    }

    /// A flipped byte is another entry or an error. What decodes encodes to the same bytes again, so
    /// no two byte sequences mean the same entry (rings aside, whose JSON may have other spacing).
    #[test]
    fn a_flipped_byte_never_panics(entry in any_entry(), at in any::<usize>(), flip in 1u8..) {
        let mut bytes = encoded(&entry).to_vec();
        let at = at % bytes.len();
        bytes[at] ^= flip;
        if let Ok(other) = decode_entry(Bytes::from(bytes.clone()))
            && !matches!(other.payload, EntryPayload::Normal(Command::InstallRing(_)))
        {
            let other = match other.payload {
                EntryPayload::Normal(Command::Write(writes)) => {
                    let payload = EntryPayload::Normal(Command::Write(afresh(&writes)));
                    Entry { payload, ..other }
                }
                _ => other,
            };
            prop_assert_eq!(encoded(&other), bytes);
        }
    }

    #[test]
    fn any_bytes_never_panic(bytes in vec(any::<u8>(), 0..200), version in any::<bool>()) {
        let mut bytes = bytes;
        if version {
            bytes.insert(0, VERSION);
        }
        // What they decode to does not matter here, only that they return.
        let _ = decode_log_id(&bytes);
        let _ = decode_vote(&bytes);
        let _ = decode_membership(&bytes);
        let _ = decode_entry(Bytes::from(bytes));
    }
}

#[test]
fn a_value_is_not_copied() {
    let value = Bytes::from(vec![7; 1000]);
    let writes = [Write::put("k".into(), value, Condition::Always)];
    let command = Command::Write(Writes::new(1, &writes));
    let log_id = LogId { leader_id: LeaderId { term: 1, node_id: 2 }, index: 3 };
    let bytes = encoded(&Entry { log_id, payload: EntryPayload::Normal(command) });
    let range = bytes.as_ptr_range();
    let EntryPayload::Normal(Command::Write(writes)) = decode_entry(bytes).unwrap().payload else {
        panic!("writes came back as something else");
    };
    let Some(ActionRef::Put(value)) = writes.iter().next().map(|write| write.action) else {
        panic!("a put came back as {writes:?}");
    };
    assert!(range.contains(&value.as_ptr()));
}

fn once(client: &str, floor: u64, seq: u64) -> Option<Once> {
    let client = ClientFloor { client: client.parse().unwrap(), floor };
    Some(Once::new(client, seq).unwrap())
}

/// The layout is on disks: this test fails when it changes without a new version.
#[test]
fn the_layout_of_version_2_stays() {
    let delete = || Write::delete("k".into(), Condition::Always);
    let writes = vec![
        Write::put("ab".into(), "c".into(), Condition::Revision(9)),
        delete().once(once("me", 3, 4)),
        delete(),
        delete().once(once("me", 3, 6)),
        delete().once(once("me", 5, 7)),
    ];
    let command = Command::Write(Writes::new(8, &writes));
    let log_id = LogId { leader_id: LeaderId { term: 1, node_id: 2 }, index: 3 };
    let bytes = encoded(&Entry { log_id, payload: EntryPayload::Normal(command) });
    #[rustfmt::skip]
    let expected = [
        2,
        0, 0, 0, 0, 0, 0, 0, 1,  0, 0, 0, 0, 0, 0, 0, 2,  0, 0, 0, 0, 0, 0, 0, 3,
        1,
        0, 0, 0, 0, 0, 0, 0, 8,
        0, 0, 0, 5,

        0x01,
        1, 0, 0, 0, 0, 0, 0, 0, 9,
        0, 0, 0, 2, b'a', b'b',
        0, 0, 0, 1, b'c',

        0x22, 2, b'm', b'e', 0, 0, 0, 0, 0, 0, 0, 3,  0, 0, 0, 0, 0, 0, 0, 4,
        0, 0, 0, 0, 1, b'k',

        0x02,
        0, 0, 0, 0, 1, b'k',

        0x12, 0, 0, 0, 0, 0, 0, 0, 6,
        0, 0, 0, 0, 1, b'k',

        0x22, 2, b'm', b'e', 0, 0, 0, 0, 0, 0, 0, 5,  0, 0, 0, 0, 0, 0, 0, 7,
        0, 0, 0, 0, 1, b'k',
    ];
    assert_eq!(bytes, expected.as_slice());

    // A run begins with a client, names it once, and no write lies below its client's floor.
    let decoded = |at: usize, to: u8| {
        let mut other = expected.to_vec();
        other[at] = to;
        decode_entry(other.into())
    };
    let first_once = 26 + 12 + 21;
    assert!(decoded(first_once, 0x22).is_ok());
    assert!(decoded(first_once + 19, 2).is_err(), "below the floor");
    assert!(decoded(first_once, 0x12).is_err(), "no client before it");
    let last_once = expected.len() - 26;
    assert!(decoded(last_once + 11, 4).is_ok());
    assert!(decoded(last_once + 11, 3).is_err(), "the same client and floor again");
}

#[test]
fn a_later_version_is_named() {
    let error = decode_log_id(&[3; 25]).unwrap_err();
    assert_eq!(error, DecodeError::Version { found: 3 });
}

#[test]
fn a_length_beyond_the_input_is_an_error() {
    let mut bytes = encoded(&Entry {
        log_id: LogId { leader_id: LeaderId { term: 1, node_id: 2 }, index: 3 },
        payload: EntryPayload::Normal(Command::Write(Writes::new(
            1,
            &[Write::delete("k".into(), Condition::Always)],
        ))),
    })
    .to_vec();
    let length_at = bytes.len() - 5;
    bytes[length_at..length_at + 4].fill(0xff);
    let error = decode_entry(Bytes::from(bytes)).unwrap_err();
    assert_eq!(error, DecodeError::Truncated { wanted: u64::from(u32::MAX), left: 1 });
}

/// What a peer said is counted on from, and what that comes to is read again after a restart.
#[test]
fn what_follows_the_highest_that_is_heard_can_be_read_again() {
    let id = |ordinal| LogId { leader_id: LeaderId { term: ordinal, node_id: 1 }, index: ordinal };
    let record = |ordinal| {
        let mut record = Vec::new();
        encode_log_id(&id(ordinal), &mut record);
        record
    };
    let heard = |ordinal| {
        let mut reader = Reader::of_peer(record(ordinal).into());
        reader.version(VERSION)?;
        get_log_id(&mut reader)
    };
    assert_eq!(heard(ORDINAL_HEARD_MAX), Ok(id(ORDINAL_HEARD_MAX)));
    assert!(heard(ORDINAL_HEARD_MAX + 1).is_err());
    for read in [ORDINAL_HEARD_MAX + 1, 2 * ORDINAL_HEARD_MAX - 1, ORDINAL_MAX] {
        assert_eq!(decode_log_id(&record(read)), Ok(id(read)));
    }
    assert!(decode_log_id(&record(ORDINAL_MAX + 1)).is_err());
}
