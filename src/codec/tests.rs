//! Every record comes back as it went in; every other sequence of bytes is an error, never a panic.

use proptest::collection::{btree_map, btree_set, vec};
use proptest::prelude::*;

use super::*;
use crate::ring::{Ring, RingCluster, RingNode};

fn any_log_id() -> impl Strategy<Value = LogId> {
    (any::<u64>(), any::<u64>(), any::<u64>())
        .prop_map(|(term, node_id, index)| LogId { leader_id: LeaderId { term, node_id }, index })
}

fn any_vote() -> impl Strategy<Value = Vote> {
    (any::<u64>(), any::<u64>(), any::<bool>()).prop_map(|(term, node_id, committed)| Vote {
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

fn any_write() -> impl Strategy<Value = Write> {
    prop_oneof![
        (any_bytes(), any_bytes(), any_condition())
            .prop_map(|(key, value, condition)| Write::Put { key, value, condition }),
        (any_bytes(), any_condition())
            .prop_map(|(key, condition)| Write::Delete { key, condition }),
    ]
}

fn any_entry() -> impl Strategy<Value = Entry> {
    let payload = prop_oneof![
        Just(EntryPayload::Blank),
        vec(any_write(), 0..4).prop_map(|writes| EntryPayload::Normal(Command::Write(writes))),
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

proptest! {
    #[test]
    fn entries_come_back(entry in any_entry()) {
        let bytes = encoded(&entry);
        prop_assert!(bytes.len() <= encoded_entry_len(&entry));
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
    let command =
        Command::Write(vec![Write::Put { key: "k".into(), value, condition: Condition::Always }]);
    let log_id = LogId { leader_id: LeaderId { term: 1, node_id: 2 }, index: 3 };
    let bytes = encoded(&Entry { log_id, payload: EntryPayload::Normal(command) });
    let range = bytes.as_ptr_range();
    let EntryPayload::Normal(Command::Write(writes)) = decode_entry(bytes).unwrap().payload else {
        panic!("writes came back as something else");
    };
    let [Write::Put { value, .. }] = &writes[..] else { panic!("a put came back as {writes:?}") };
    assert!(range.contains(&value.as_ptr()));
}

/// The layout is on disks: this test fails when it changes without a new version.
#[test]
fn the_layout_of_version_1_stays() {
    let put = Write::Put { key: "ab".into(), value: "c".into(), condition: Condition::Revision(9) };
    let command = Command::Write(vec![put]);
    let log_id = LogId { leader_id: LeaderId { term: 1, node_id: 2 }, index: 3 };
    let bytes = encoded(&Entry { log_id, payload: EntryPayload::Normal(command) });
    #[rustfmt::skip]
    let expected = [
        1,
        0, 0, 0, 0, 0, 0, 0, 1,  0, 0, 0, 0, 0, 0, 0, 2,  0, 0, 0, 0, 0, 0, 0, 3,
        1,
        0, 0, 0, 1,
        1,
        1, 0, 0, 0, 0, 0, 0, 0, 9,
        0, 0, 0, 2, b'a', b'b',
        0, 0, 0, 1, b'c',
    ];
    assert_eq!(bytes, expected.as_slice());
}

#[test]
fn a_later_version_is_named() {
    let error = decode_log_id(&[2; 25]).unwrap_err();
    assert_eq!(error, DecodeError::Version { found: 2 });
}

#[test]
fn a_length_beyond_the_input_is_an_error() {
    let mut bytes = encoded(&Entry {
        log_id: LogId { leader_id: LeaderId { term: 1, node_id: 2 }, index: 3 },
        payload: EntryPayload::Normal(Command::Write(vec![Write::Delete {
            key: "k".into(),
            condition: Condition::Always,
        }])),
    })
    .to_vec();
    let length_at = bytes.len() - 5;
    bytes[length_at..length_at + 4].fill(0xff);
    let error = decode_entry(Bytes::from(bytes)).unwrap_err();
    assert_eq!(error, DecodeError::Truncated { wanted: u64::from(u32::MAX), left: 1 });
}
