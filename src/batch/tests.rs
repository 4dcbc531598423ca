//! Every batch comes back as it went in; everything else is an error that says where, never a panic.

use proptest::collection::vec;
use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::network::error::Outcome;
use crate::ring::{RingCluster, RingNode};

const LIMITS: Limits = Limits { operations_max: 20, key_bytes_max: 8, value_bytes_max: 16 };

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

fn any_seq() -> impl Strategy<Value = Option<u64>> {
    proptest::option::of(any::<u64>())
}

fn any_operation() -> impl Strategy<Value = Operation> {
    prop_oneof![
        any_bytes().prop_map(|key| Operation::Get { key }),
        (any_bytes(), any_bytes(), any_condition(), any_seq())
            .prop_map(|(key, value, condition, seq)| Operation::Put { key, value, condition, seq }),
        (any_bytes(), any_condition(), any_seq())
            .prop_map(|(key, condition, seq)| Operation::Delete { key, condition, seq }),
    ]
}

fn without_seq(operation: Operation) -> Operation {
    match operation {
        Operation::Get { key } => Operation::Get { key },
        Operation::Put { key, value, condition, .. } => {
            Operation::Put { key, value, condition, seq: None }
        }
        Operation::Delete { key, condition, .. } => Operation::Delete { key, condition, seq: None },
    }
}

fn any_batch(operations_max: usize) -> impl Strategy<Value = Batch> {
    let client = proptest::option::of(
        ("[!-.0-~]{1,64}", any::<u64>())
            .prop_map(|(name, floor)| ClientFloor { client: name.parse().unwrap(), floor }),
    );
    (client, vec(any_operation(), 0..operations_max)).prop_map(|(client, operations)| {
        let operations = match client {
            Some(_) => operations,
            None => operations.into_iter().map(without_seq).collect(),
        };
        Batch { client, operations }
    })
}

fn encoded(batch: &Batch) -> Bytes {
    encode_request(batch.client.as_ref(), &batch.operations)
}

fn encode_operations<'a, I>(operations: I) -> Bytes
where
    I: IntoIterator<Item = &'a Operation>,
    I::IntoIter: ExactSizeIterator + Clone,
{
    encode_request(None, operations)
}

fn any_error() -> impl Strategy<Value = ApiError> {
    let node = RingNode { id: 2, http: "h:1".into(), rpc: "r:1".into() };
    let id = "c2".parse().unwrap();
    let owner = RingCluster { id, weight: 1.0, nodes: vec![node.clone()] };
    prop_oneof![
        proptest::option::of(any::<u64>())
            .prop_map(|current| ApiError::ConditionFailed { current }),
        any::<u64>().prop_map(move |epoch| ApiError::NotLeader { leader: node.clone(), epoch }),
        any::<u64>().prop_map(move |epoch| ApiError::WrongCluster {
            next: None,
            owner: Box::new(owner.clone()),
            epoch
        }),
        Just(ApiError::Timeout { message: "m", outcome: Outcome::Unknown }),
        ".{0,20}".prop_map(ApiError::BadRequest),
    ]
}

fn any_result() -> impl Strategy<Value = OperationResult> {
    prop_oneof![
        (any::<u64>(), any_bytes())
            .prop_map(|(revision, value)| OperationResult::Found { revision, value }),
        Just(OperationResult::Absent),
        any::<u64>().prop_map(|revision| OperationResult::Written { revision }),
        (any::<u64>(), any::<bool>())
            .prop_map(|(revision, deleted)| OperationResult::Deleted { revision, deleted }),
        any_error().prop_map(|error| OperationResult::failed(&error)),
    ]
}

fn decoded(body: impl Into<Bytes>) -> Result<Vec<Operation>, DecodeError> {
    decode_request(body.into(), &LIMITS).map(|batch| batch.operations)
}

/// A body is cut, grown, or has a byte changed; the other way it means something else.
fn assert_strict<T: PartialEq + std::fmt::Debug>(
    body: &Bytes,
    flip: (usize, u8),
    decode: impl Fn(Bytes) -> Result<T, DecodeError>,
    encode: impl Fn(&T) -> Option<Bytes>,
) -> Result<(), TestCaseError> {
    for end in 0..body.len() {
        prop_assert!(decode(body.slice(..end)).is_err(), "cut at {}", end);
    }
    let mut longer = body.to_vec();
    longer.push(0);
    prop_assert!(decode(longer.into()).is_err());
    let mut flipped = body.to_vec();
    let at = flip.0 % flipped.len();
    flipped[at] ^= flip.1;
    let flipped = Bytes::from(flipped);
    if let Ok(other) = decode(flipped.clone())
        && let Some(encoded) = encode(&other)
    {
        prop_assert_eq!(encoded, flipped);
    }
    Ok(())
}

proptest! {
    #[test]
    fn requests_come_back(batch in any_batch(20)) {
        let body = encoded(&batch);
        let length: usize = batch.operations.iter().map(Operation::encoded_len).sum();
        let client = batch.client.as_ref().map_or(0, |client| 9 + client.client.as_str().len());
        prop_assert_eq!(body.len(), 5 + client + length);
        prop_assert_eq!(decode_request(body, &LIMITS).unwrap(), batch);
    }

    #[test]
    fn results_come_back(results in vec(any_result(), 0..20)) {
        let body = encode_results(&results);
        prop_assert_eq!(decode_results(body, results.len()).unwrap(), results);
    }

    /// What decodes encodes to the same bytes again: no two bodies mean the same operations.
    #[test]
    fn damaged_operations_never_panic(
        batch in any_batch(5), at in any::<usize>(), flip in 1u8..,
    ) {
        let decode = |body| decode_request(body, &LIMITS);
        assert_strict(&encoded(&batch), (at, flip), decode, |other| Some(encoded(other)))?;
    }

    /// As above, except for errors, whose JSON may be written in several ways.
    #[test]
    fn damaged_results_never_panic(
        results in vec(any_result(), 0..5), at in any::<usize>(), flip in 1u8..,
    ) {
        let body = encode_results(&results);
        let encode = |other: &Vec<OperationResult>| {
            let failed = other.iter().any(|result| matches!(result, OperationResult::Failed(_)));
            (!failed).then(|| encode_results(other))
        };
        assert_strict(&body, (at, flip), |body| decode_results(body, results.len()), encode)?;
    }

    #[test]
    fn any_bytes_never_panic(body in vec(any::<u8>(), 0..200), count in 0u8..5, head: bool) {
        let mut body = body;
        if head {
            body.splice(..0, [1, 0, 0, 0, count]);
        }
        // What they decode to does not matter here, only that they return.
        let _ = decoded(body.clone());
        let _ = decode_results(body.clone().into(), count.into());
        let _ = json::decode_request(&body, &LIMITS);
    }
}

/// Clients in other languages are written against these bytes.
#[test]
fn the_layout_of_version_1_stays() {
    let operations = [
        Operation::Get { key: "a".into() },
        Operation::Put {
            key: "b".into(),
            value: "v".into(),
            condition: Condition::Always,
            seq: None,
        },
        Operation::Put {
            key: "c".into(),
            value: "".into(),
            condition: Condition::Revision(7),
            seq: None,
        },
        Operation::Put {
            key: "d".into(),
            value: "v".into(),
            condition: Condition::Absent,
            seq: None,
        },
        Operation::Delete { key: "e".into(), condition: Condition::Always, seq: None },
        Operation::Delete { key: "f".into(), condition: Condition::Revision(8), seq: None },
        Operation::Delete { key: "g".into(), condition: Condition::Absent, seq: None },
    ];
    #[rustfmt::skip]
    let expected = [
        1, 0, 0, 0, 7,
        0x01, 0, 0, 0, 1, b'a',
        0x02, 0, 0, 0, 1, b'b', 0, 0, 0, 1, b'v',
        0x12, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 1, b'c', 0, 0, 0, 0,
        0x22, 0, 0, 0, 1, b'd', 0, 0, 0, 1, b'v',
        0x03, 0, 0, 0, 1, b'e',
        0x13, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 1, b'f',
        0x23, 0, 0, 0, 1, b'g',
    ];
    assert_eq!(encode_operations(&operations), expected.as_slice());

    let failed = ApiError::ConditionFailed { current: Some(9) };
    let results = [
        OperationResult::Found { revision: 5, value: "v".into() },
        OperationResult::Absent,
        OperationResult::Written { revision: 6 },
        OperationResult::Deleted { revision: 6, deleted: false },
        OperationResult::failed(&failed),
    ];
    let error = br#"{"error":{"code":"CONDITION_FAILED","message":"the condition does not hold","outcome":"not_applied"}}"#;
    #[rustfmt::skip]
    let mut expected = vec![
        1, 0, 0, 0, 5,
        1, 0, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0, 1, b'v',
        2,
        3, 0, 0, 0, 0, 0, 0, 0, 6,
        4, 0, 0, 0, 0, 0, 0, 0, 6, 0,
        5, 1, 0x9c, 1, 0, 0, 0, 0, 0, 0, 0, 9, 0, 0, 0, error.len() as u8,
    ];
    expected.extend_from_slice(error);
    assert_eq!(encode_results(&results), expected);
}

#[test]
fn a_value_is_not_copied() {
    let value = Bytes::from(vec![7; 1000]);
    let put = Operation::Put { key: "k".into(), value, condition: Condition::Always, seq: None };
    let body = encode_operations([&put]);
    let range = body.as_ptr_range();
    let operations = decoded(body).unwrap();
    let [Operation::Put { value, .. }] = &operations[..] else { panic!("{operations:?}") };
    assert!(range.contains(&value.as_ptr()));
}

#[test]
fn what_is_unknown_is_named() {
    let item = |index, error| Err(DecodeError::Item { index, error });
    let kind = |found| codec::DecodeError::Tag { what: "kind of operation", found };
    let version = codec::DecodeError::Version { found: 3 };
    assert_eq!(decoded(&[3, 0, 0, 0, 0][..]), Err(DecodeError::Frame(version)));
    for found in [0, 4, 0x11, 0x21, 0x32, 0x33, 0x42, 0x80, 0x82] {
        assert_eq!(decoded(vec![1, 0, 0, 0, 1, found, 0, 0, 0, 0]), item(0, kind(found)));
    }
    let second = vec![1, 0, 0, 0, 2, 1, 0, 0, 0, 1, b'k', 9];
    assert_eq!(decoded(second), item(1, kind(9)));
    let trailing = codec::DecodeError::Trailing(1);
    assert_eq!(decoded(&[1, 0, 0, 0, 0, 0][..]), Err(DecodeError::Frame(trailing)));
}

/// As above, for the version that has a client.
#[test]
fn the_layout_of_version_2_stays() {
    let client = ClientFloor { client: "me".parse().unwrap(), floor: 4 };
    let (always, at_7) = (Condition::Always, Condition::Revision(7));
    let operations = vec![
        Operation::Get { key: "a".into() },
        Operation::Put { key: "b".into(), value: "v".into(), condition: always, seq: Some(5) },
        Operation::Delete { key: "c".into(), condition: at_7, seq: Some(3) },
        Operation::Delete { key: "d".into(), condition: always, seq: None },
    ];
    #[rustfmt::skip]
    let expected = [
        2, 2, b'm', b'e', 0, 0, 0, 0, 0, 0, 0, 4,
        0, 0, 0, 4,
        0x01, 0, 0, 0, 1, b'a',
        0x42, 0, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0, 1, b'b', 0, 0, 0, 1, b'v',
        0x53, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 1, b'c',
        0x03, 0, 0, 0, 1, b'd',
    ];
    let batch = Batch { client: Some(client), operations };
    assert_eq!(encoded(&batch), expected.as_slice());
    let client = batch.client.as_ref();
    let once: Vec<_> = batch.operations.iter().map(|operation| operation.once(client)).collect();
    assert_eq!(once[1].as_ref().unwrap().as_ref().unwrap().seq(), 5);
    assert_eq!(once[2], Err(InvalidSeq::BelowFloor { seq: 3, floor: 4 }), "only this one fails");
    assert_eq!((&once[0], &once[3]), (&Ok(None), &Ok(None)));
    // A read has no sequence, in any version.
    for version_and_client in [&[1][..], &expected[..12]] {
        let body = [version_and_client, &[0, 0, 0, 1, 0x41], &[0; 12]].concat();
        assert!(matches!(decoded(body), Err(DecodeError::Item { index: 0, .. })));
    }
}

#[test]
fn counts_are_bounded_and_not_trusted() {
    assert_eq!(
        decoded(&[1, 0, 0, 0, 21][..]),
        Err(DecodeError::TooMany { max: LIMITS.operations_max })
    );
    let unbounded = Limits { operations_max: usize::MAX, ..LIMITS };
    let error = decode_request(vec![1, 255, 255, 255, 255].into(), &unbounded).unwrap_err();
    assert!(matches!(error, DecodeError::Item { index: 0, .. }), "{error}");
    let error = decode_results(vec![1, 255, 255, 255, 255].into(), 1).unwrap_err();
    assert_eq!(error, DecodeError::Count { expected: 1, found: u32::MAX });
    let operation = r#"{"op":"get","key":"k"}"#;
    let json = |count| format!(r#"{{"operations":[{}]}}"#, vec![operation; count].join(","));
    let batch = json::decode_request(json(20).as_bytes(), &LIMITS).unwrap();
    assert_eq!(batch.operations.len(), 20);
    let error = json::decode_request(json(21).as_bytes(), &LIMITS).unwrap_err();
    assert_eq!(error, DecodeError::TooMany { max: 20 });
}

#[test]
fn a_status_that_is_no_failure_is_refused() {
    for status in [0u16, 200, 299, 600, u16::MAX] {
        let mut body = encode_results([&OperationResult::failed(&ApiError::Overloaded)]).to_vec();
        body[6..8].copy_from_slice(&status.to_be_bytes());
        let error = decode_results(body.into(), 1).unwrap_err();
        assert!(matches!(error, DecodeError::Item { index: 0, .. }), "{status}: {error}");
    }
}

/// A batch must not fail because one of its operations breaks a rule: others wrote the rest.
#[test]
fn rules_are_checked_for_each_operation_by_itself() {
    let put = |key: &'static str, value: &'static str| Operation::Put {
        key: key.into(),
        value: value.into(),
        condition: Condition::Always,
        seq: None,
    };
    let delete = |condition| {
        Operation::Delete { key: "k".into(), condition, seq: None }.check(&LIMITS).map_err(drop)
    };
    let bad = |error| matches!(error, Err(ApiError::BadRequest(_)));
    assert!(bad(put("", "v").check(&LIMITS)));
    assert!(bad(Operation::Get { key: Bytes::new() }.check(&LIMITS)));
    let too_large = |what, max| Err(ApiError::TooLarge { what, max });
    assert_eq!(put("12345678", "1234567890123456").check(&LIMITS), Ok(()));
    assert_eq!(put("123456789", "v").check(&LIMITS), too_large("key", 8));
    assert_eq!(put("k", "12345678901234567").check(&LIMITS), too_large("value", 16));
    assert_eq!(delete(Condition::Absent), Err(()));
    assert_eq!(delete(Condition::Revision(1)), Ok(()));
    let operations = [
        put("", ""),
        Operation::Delete { key: "".into(), condition: Condition::Absent, seq: None },
    ];
    assert_eq!(decoded(encode_operations(&operations)).unwrap(), operations);
}

fn from_json(operations: Value) -> Result<Vec<Operation>, DecodeError> {
    let body = json!({ "operations": operations }).to_string();
    json::decode_request(body.as_bytes(), &LIMITS).map(|batch| batch.operations)
}

#[test]
fn json_says_the_same() {
    let operations = from_json(json!([
        {"op": "put", "key": "k", "value": "v", "if_match": 5},
        {"op": "put", "key": "k2", "value_base64": "//8=", "if_absent": true},
        {"op": "put", "key_base64": "/w==", "value": ""},
        {"op": "get", "key": "ü"},
        {"op": "delete", "key": "k"},
        {"op": "delete", "key": "k", "if_match": 3},
    ]));
    let put = |key: &'static [u8], value: &'static [u8], condition| Operation::Put {
        key: Bytes::from_static(key),
        value: Bytes::from_static(value),
        condition,
        seq: None,
    };
    let expected = [
        put(b"k", b"v", Condition::Revision(5)),
        put(b"k2", b"\xff\xff", Condition::Absent),
        put(b"\xff", b"", Condition::Always),
        Operation::Get { key: "ü".into() },
        Operation::Delete { key: "k".into(), condition: Condition::Always, seq: None },
        Operation::Delete { key: "k".into(), condition: Condition::Revision(3), seq: None },
    ];
    assert_eq!(operations.unwrap(), expected);
    assert_eq!(from_json(json!([])).unwrap(), []);
}

#[test]
fn json_names_a_client_before_or_after_its_operations() {
    let operation =
        r#""operations":[{"op":"put","key":"k","value":"v","seq":9},{"op":"get","key":"k"}]"#;
    let client = |floor| Some(ClientFloor { client: "me".parse().unwrap(), floor });
    for (body, expected) in [
        (format!(r#"{{"client":"me","floor":7,{operation}}}"#), client(7)),
        (format!(r#"{{{operation},"floor":7,"client":"me"}}"#), client(7)),
        (format!(r#"{{{operation},"client":"me"}}"#), client(0)),
    ] {
        let batch = json::decode_request(body.as_bytes(), &LIMITS).unwrap();
        assert_eq!(batch.client, expected);
        let seqs: Vec<_> = batch.operations.iter().map(Operation::seq).collect();
        assert_eq!(seqs, [Some(9), None]);
    }
}

#[test]
fn json_that_is_not_understood_is_refused_and_named() {
    for bad in [
        json!({"op": "get"}),
        json!({"key": "k"}),
        json!({"op": "GET", "key": "k"}),
        json!({"op": "get", "key": 1}),
        json!({"op": "get", "key": null}),
        json!({"op": "get", "key": "k", "key_base64": "aw=="}),
        json!({"op": "get", "key_base64": "a"}),
        json!({"op": "get", "key": "k", "value": "v"}),
        json!({"op": "get", "key": "k", "if_match": 1}),
        json!({"op": "get", "key": "k", "consistency": "stale"}),
        json!({"op": "put", "key": "k"}),
        json!({"op": "put", "key": "k", "value": "v", "value_base64": "dg=="}),
        json!({"op": "put", "key": "k", "value": ["v"]}),
        json!({"op": "put", "key": "k", "value": "v", "if_match": null}),
        json!({"op": "put", "key": "k", "value": "v", "if_match": "5"}),
        json!({"op": "put", "key": "k", "value": "v", "if_match": -1}),
        json!({"op": "put", "key": "k", "value": "v", "if_match": 1.0}),
        json!({"op": "put", "key": "k", "value": "v", "if_absent": false}),
        json!({"op": "put", "key": "k", "value": "v", "if_match": 1, "if_absent": true}),
        json!({"op": "put", "key": "k", "value": "v", "idempotency_key": "c/1"}),
        json!({"op": "put", "key": "k", "value": "v", "seq": "1"}),
        json!({"op": "put", "key": "k", "value": "v", "seq": -1}),
        json!({"op": "put", "key": "k", "value": "v", "seq": null}),
        json!({"op": "put", "key": "k", "value": "v", "seq": 1}),
        json!({"op": "get", "key": "k", "seq": 1}),
        json!({"op": "delete", "key": "k", "value": "v"}),
        json!({"op": "delete", "key": "k", "if_absent": true}),
        json!(["get", "k"]),
        json!("get"),
    ] {
        let error = from_json(json!([{"op": "get", "key": "k"}, bad])).unwrap_err();
        let DecodeError::Json(text) = &error else { panic!("{bad}: {error}") };
        assert!(text.starts_with("operation 1: "), "{bad}: {text}");
        assert!(matches!(ApiError::from(error), ApiError::BadRequest(_)));
    }
}

#[test]
fn json_around_the_operations_is_strict() {
    for bad in [
        "",
        "[]",
        "{}",
        "null",
        r#"{"operations":null}"#,
        r#"{"operations":{}}"#,
        r#"{"operations":[]"#,
        r#"{"operations":[]} x"#,
        r#"{"operations":[],"operations":[]}"#,
        r#"{"operations":[],"consistency":"stale"}"#,
        r#"{"operations":[],"floor":1}"#,
        r#"{"operations":[],"client":null}"#,
        r#"{"operations":[],"client":"a/b"}"#,
        r#"{"operations":[],"client":""}"#,
        r#"{"operations":[],"client":"a","client":"a"}"#,
        r#"{"operations":[],"client":"a","floor":-1}"#,
        r#"{"operations":[],"client":"a","floor":"1"}"#,
        r#"{"operations":[],"client":"a","seq":1}"#,
        r#"{"operations":[{"op":"get","key":"k","key":"k"}]}"#,
    ] {
        let error = json::decode_request(bad.as_bytes(), &LIMITS).unwrap_err();
        assert!(matches!(error, DecodeError::Json(_)), "{bad}: {error}");
    }
}

#[test]
fn json_results_show_what_single_answers_would() {
    let redirect = ApiError::Timeout { message: "late", outcome: Outcome::Unknown };
    let results = [
        OperationResult::Written { revision: 5 },
        OperationResult::Found { revision: 5, value: "v".into() },
        OperationResult::Found { revision: 5, value: Bytes::from_static(b"\xff") },
        OperationResult::failed(&ApiError::KeyAbsent),
        OperationResult::Deleted { revision: 6, deleted: true },
        OperationResult::failed(&ApiError::ConditionFailed { current: Some(7) }),
        OperationResult::failed(&ApiError::ConditionFailed { current: None }),
        OperationResult::failed(&redirect),
    ];
    let condition = json!({"code": "CONDITION_FAILED", "message": "the condition does not hold",
        "outcome": "not_applied"});
    let expected = json!({"results": [
        {"status": 200, "revision": 5},
        {"status": 200, "revision": 5, "value": "v"},
        {"status": 200, "revision": 5, "value_base64": "/w=="},
        {"status": 404},
        {"status": 200, "revision": 6, "deleted": true},
        {"status": 412, "revision": 7, "error": condition},
        {"status": 412, "error": condition},
        {"status": 504, "error": {"code": "TIMEOUT", "message": "late", "outcome": "unknown"}},
    ]});
    let written: Value = serde_json::from_slice(&json::encode_results(&results)).unwrap();
    assert_eq!(written, expected);
}
