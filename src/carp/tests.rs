//! What the table promises, and whole lookups against vectors from elsewhere.

use super::*;

const VERSIONS: [HashVersion; 2] = [HashVersion::V1, HashVersion::V2];

fn ring(nodes: &[(&str, f32)], version: HashVersion) -> Carp {
    let nodes = nodes.iter().map(|&(id, w)| (id.to_owned(), w)).collect();
    Carp::with_hash(nodes, 1, version)
}

/// Folds the owners of `key-0` to `key-1999` into one number: acc = acc * 31 + owner's index.
fn digest(ring: &Carp) -> u32 {
    (0..2_000).fold(0_u32, |acc, i| {
        let owner = ring.owner_index(format!("key-{i}").as_bytes());
        let owner = owner.expect("the ring has members") as u32;
        acc.wrapping_mul(31).wrapping_add(owner)
    })
}

const WESSELS: [(&str, f32); 4] = [
    ("test1.ircache.net", 1.0),
    ("test2.web-cache.com", 1.0),
    ("test3.squid-cache.org", 2.0),
    ("test4.packet-pushers.com", 3.0),
];

/// Owners from a Python script written from the draft's text, for the members of table C-1 of
/// Wessels, "Web Caching" (2001), whose hashes and multipliers that script reproduces.
#[test]
fn v1_routes_as_the_draft_says() {
    let ring = ring(&WESSELS, HashVersion::V1);
    for (key, owner) in [
        (&b""[..], "test3.squid-cache.org"),
        (b"a", "test3.squid-cache.org"),
        (b"http://www.squid-cache.org", "test3.squid-cache.org"),
        (b"http://www.ircache.net", "test4.packet-pushers.com"),
        (b"user:00000042", "test3.squid-cache.org"),
        (b"user:00000043", "test4.packet-pushers.com"),
        (b"\xFF\x00\x80", "test3.squid-cache.org"),
        (b"key-1", "test1.ircache.net"),
    ] {
        assert_eq!(ring.owner(key), Some(owner), "key {key:?}");
    }
}

#[test]
fn v1_routes_equal_members_as_the_draft_says() {
    let ring = ring(&WESSELS.map(|(id, _)| (id, 1.0)), HashVersion::V1);
    for (key, owner) in [
        ("a", "test3.squid-cache.org"),
        ("http://www.squid-cache.org", "test1.ircache.net"),
        ("http://www.ircache.net", "test1.ircache.net"),
        ("user:00000042", "test3.squid-cache.org"),
        ("user:00000043", "test1.ircache.net"),
        ("key-3", "test4.packet-pushers.com"),
    ] {
        assert_eq!(ring.get(key), owner, "key {key:?}");
    }
}

/// The same script's digest of 2,000 owners.
#[test]
fn v1_routes_many_keys_as_the_draft_says() {
    let unequal = [("c1", 0.5), ("c2", 1.5), ("c3", 2.5), ("c4", 0.1), ("c5", 7.0)];
    assert_eq!(digest(&ring(&unequal, HashVersion::V1)), 0x7C97_56AA);
}

/// From a Python script over the reference implementation of xxHash and Python's own `log`.
#[test]
fn v2_routes_as_an_independent_implementation_does() {
    let unequal = [("c1", 0.5), ("c2", 1.5), ("c3", 2.5), ("c4", 0.125), ("c5", 7.0)];
    assert_eq!(digest(&ring(&unequal, HashVersion::V2)), 0xF478_787B);
    let equal = unequal.map(|(id, _)| (id, 1.0));
    assert_eq!(digest(&ring(&equal, HashVersion::V2)), 0x4AA6_7E80);
}

#[test]
fn an_empty_ring_owns_nothing() {
    for version in VERSIONS {
        let ring = ring(&[], version);
        assert!(ring.is_empty());
        assert_eq!(ring.len(), 0);
        assert_eq!(ring.owner(b"key"), None);
        assert_eq!(ring.owner_index(b"key"), None);
    }
}

#[test]
#[should_panic(expected = "a ring without members owns no key")]
fn get_on_an_empty_ring_panics() {
    Carp::new(vec![], 0).get("key");
}

#[test]
fn a_single_member_owns_everything() {
    for version in VERSIONS {
        for weight in [f32::from_bits(1), 1.0, f32::MAX] {
            let ring = ring(&[("only", weight)], version);
            assert_eq!(ring.owner(b""), Some("only"));
            assert_eq!(ring.get("any"), "only");
        }
    }
}

/// Under version 1 names that differ in case have one hash, so every key is a tie.
#[test]
fn ties_go_to_the_smaller_id() {
    let ring = ring(&[("node", 1.0), ("NODE", 1.0), ("Node", 1.0)], HashVersion::V1);
    for i in 0..100 {
        assert_eq!(ring.get(&format!("key-{i}")), "NODE");
    }
}

#[test]
fn new_uses_version_2() {
    assert_eq!(Carp::new(vec![], 0).hash_version(), HashVersion::V2);
}

#[test]
fn bad_members_are_refused_by_name() {
    for version in VERSIONS {
        for weight in [0.0, -0.0, -1.0, f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let nodes = vec![("good".to_owned(), 1.0), ("bad".to_owned(), weight)];
            let error = Carp::try_with_hash(nodes, 1, version);
            assert!(
                matches!(&error, Err(CarpError::BadWeight { id, .. }) if id == "bad"),
                "{weight}: {error:?}"
            );
        }
        let twice = vec![("b", 1.0), ("a", 1.0), ("b", 2.0)];
        let nodes = twice.into_iter().map(|(id, w)| (id.to_owned(), w)).collect();
        let id = "b".to_owned();
        assert_eq!(Carp::try_with_hash(nodes, 1, version), Err(CarpError::DuplicateMember { id }));
    }
}

#[test]
#[should_panic(expected = "\"c1\" is in the ring twice")]
fn new_panics_on_a_duplicate() {
    Carp::new(vec![("c1".into(), 1.0), ("c1".into(), 1.0)], 1);
}

#[test]
#[should_panic(expected = "\"c1\" has the weight NaN")]
fn new_panics_on_a_bad_weight() {
    Carp::new(vec![("c1".into(), f32::NAN)], 1);
}

#[test]
#[should_panic(expected = "\"c1\" is in the ring twice")]
fn add_node_panics_on_a_duplicate() {
    ring(&[("c1", 1.0)], HashVersion::V2).add_node("c1".into(), 2.0);
}

#[test]
fn a_refused_member_leaves_the_ring_as_it_was() {
    for version in VERSIONS {
        let before = ring(&[("c1", 1.0), ("c2", 2.0)], version);
        let mut after = before.clone();
        let id = "c1".to_owned();
        assert_eq!(after.try_add_node("c1".into(), 3.0), Err(CarpError::DuplicateMember { id }));
        assert!(after.try_add_node("c3".into(), 0.0).is_err());
        assert!(!after.remove_node("c3"));
        assert_eq!(after, before);
    }
}

#[test]
fn adding_and_removing_keep_all_but_the_members() {
    for version in VERSIONS {
        let mut ring = ring(&[("b", 1.0), ("d", 2.0)], version).with_list_ttl(30);
        ring.add_node("c".into(), 3.0);
        ring.add_node("a".into(), 4.0);
        assert!(ring.remove_node("d"));
        let members: Vec<_> = ring.members().collect();
        assert_eq!(members, [("a", 4.0), ("b", 1.0), ("c", 3.0)]);
        assert_eq!((ring.config_id(), ring.list_ttl()), (1, 30));
        ring.set_config_id(2);
        assert_eq!(ring.config_id(), 2);
    }
}

#[test]
fn json_is_the_documented_form() {
    let ring = ring(&[("c2", 0.333), ("c1", 1.0)], HashVersion::V1).with_list_ttl(60);
    let json = r#"{"version":1,"hash_version":1,"config_id":1,"list_ttl":60,"nodes":[{"addr":"c1","relative_load":1.0},{"addr":"c2","relative_load":0.333}]}"#;
    assert_eq!(serde_json::to_string(&ring).expect("a ring serialises"), json);
    assert_eq!(serde_json::from_str::<Carp>(json).expect("it is valid"), ring);
}

#[test]
fn json_of_an_empty_ring_round_trips() {
    let json = serde_json::to_string(&Carp::new(vec![], 0)).expect("a ring serialises");
    assert_eq!(json, r#"{"version":1,"hash_version":2,"config_id":0,"list_ttl":600,"nodes":[]}"#);
    let ring: Carp = serde_json::from_str(&json).expect("it is valid");
    assert!(ring.is_empty());
}

#[test]
fn json_may_write_weights_as_integers_and_add_fields() {
    let json = r#"{"version":1,"hash_version":2,"config_id":1,"list_ttl":600,"later":true,
        "nodes":[{"addr":"c1","relative_load":3,"later":[]}]}"#;
    let ring: Carp = serde_json::from_str(json).expect("it is valid");
    assert_eq!(ring.members().collect::<Vec<_>>(), [("c1", 3.0)]);
}

/// Each bad table differs in one place from one that is read.
#[test]
fn bad_json_is_an_error_and_never_a_panic() {
    let good = r#"{"version":1,"hash_version":2,"config_id":1,"list_ttl":600,"nodes":[{"addr":"c1","relative_load":1.0}]}"#;
    assert!(serde_json::from_str::<Carp>(good).is_ok());
    for (part, replacement, complaint) in [
        ("\"version\":1", "\"version\":2", "has version 2"),
        ("\"version\":1", "\"version\":-1", "invalid value"),
        ("\"hash_version\":2", "\"hash_version\":0", "hash version 0"),
        ("\"hash_version\":2", "\"hash_version\":3", "hash version 3"),
        ("\"hash_version\":2,", "", "missing field"),
        ("\"config_id\":1", "\"config_id\":4294967296", "invalid value"),
        ("1.0", "0.0", "not finite and positive"),
        ("1.0", "-1.0", "not finite and positive"),
        ("1.0", "1e39", "not finite and positive"),
        ("1.0", "1e-60", "not finite and positive"),
        ("1.0", "1e999", "out of range"),
        ("1.0", "null", "invalid type"),
        ("1.0}", "1.0},{\"addr\":\"c1\",\"relative_load\":2.0}", "twice"),
        ("]}", "", "EOF"),
    ] {
        let bad = good.replacen(part, replacement, 1);
        assert_ne!(bad, good, "{part} is not in the good table");
        let error = serde_json::from_str::<Carp>(&bad).expect_err(&bad);
        assert!(error.to_string().contains(complaint), "{bad}: {error}");
    }
}

#[test]
fn debug_shows_the_table() {
    let text = format!("{:?}", ring(&[("c1", 1.5)], HashVersion::V1));
    assert!(text.contains("V1") && text.contains("c1") && text.contains("1.5"), "{text}");
}
