//! What must hold for every ring: who owns a key does not depend on how the table came about,
//! a change moves no key that it need not move, and shares follow weights.
//!
//! The rules of movement hold for version 2 with any weights. For version 1 they hold with equal
//! weights only: its load multipliers depend on each other, so with unequal weights a new member
//! rescales the scores of others and a few keys move between those. The last test shows it.
//!
//! The shares are counted over fixed keys, so those tests either always pass or always fail.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap};

use distrib_kv_store::carp::{Carp, HashVersion};
use proptest::prelude::*;
use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

type Nodes = Vec<(String, f32)>;

const VERSIONS: [HashVersion; 2] = [HashVersion::V1, HashVersion::V2];

/// Weights that often repeat, so that rings mix equal and unequal ones.
fn weight() -> impl Strategy<Value = f32> {
    prop_oneof![
        3 => prop::sample::select(vec![0.5_f32, 1.0, 2.0]),
        1 => 0.01_f32..100.0,
    ]
}

/// Any weight that a ring may have, from the smallest subnormal on.
fn any_weight() -> impl Strategy<Value = f32> {
    (1..f32::INFINITY.to_bits()).prop_map(f32::from_bits)
}

/// From `min` to 12 members in random order. Lower case, as version 1 does not tell cases apart.
fn nodes(min: usize, weight: impl Strategy<Value = f32>) -> impl Strategy<Value = Nodes> {
    prop::collection::btree_map("[a-z0-9.:-]{1,12}", weight, min..=12)
        .prop_map(|nodes: BTreeMap<String, f32>| nodes.into_iter().collect::<Nodes>())
        .prop_shuffle()
}

/// Rings on which both versions promise minimal movement.
fn movable_ring() -> impl Strategy<Value = (Nodes, HashVersion)> {
    prop_oneof![
        nodes(2, Just(1.0_f32)).prop_map(|nodes| (nodes, HashVersion::V1)),
        nodes(2, weight()).prop_map(|nodes| (nodes, HashVersion::V2)),
    ]
}

fn keys() -> impl Strategy<Value = Vec<Vec<u8>>> {
    let key = prop_oneof![
        prop::collection::vec(any::<u8>(), 0..40),
        (0..100_000_000_u32).prop_map(|n| format!("user:{n:08}").into_bytes()),
    ];
    prop::collection::vec(key, 100)
}

fn version() -> impl Strategy<Value = HashVersion> {
    prop::sample::select(VERSIONS.to_vec())
}

fn owner<'a>(ring: &'a Carp, key: &[u8]) -> &'a str {
    ring.owner(key).expect("the ring has members")
}

/// Version 2 straight from its definition: no classes, no shortcuts, every score computed.
fn naive_v2_owner<'a>(nodes: &'a Nodes, key: &[u8]) -> Option<&'a str> {
    let score = |id: &str, weight: f32| {
        let mut hash = xxh3_64(key) ^ xxh3_64_with_seed(id.as_bytes(), 0x9E37_79B9_7F4A_7C15);
        hash = (hash ^ (hash >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        hash = (hash ^ (hash >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        hash ^= hash >> 31;
        let unit = (2 * (hash >> 16) + 1) as f64 / 2.0_f64.powi(49);
        // A positive float orders as its bits do.
        let score = f64::from(weight) / -libm::log(unit);
        (score.to_bits(), hash)
    };
    nodes
        .iter()
        .max_by_key(|(id, weight)| (score(id, *weight), Reverse(id)))
        .map(|(id, _)| id.as_str())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn v2_is_what_its_definition_says(nodes in nodes(0, weight()), keys in keys()) {
        let ring = Carp::new(nodes.clone(), 1);
        for key in &keys {
            prop_assert_eq!(ring.owner(key), naive_v2_owner(&nodes, key));
        }
    }

    #[test]
    fn v2_is_what_its_definition_says_for_extreme_weights(
        nodes in nodes(1, any_weight()),
        keys in keys(),
    ) {
        let ring = Carp::new(nodes.clone(), 1);
        for key in &keys {
            prop_assert_eq!(ring.owner(key), naive_v2_owner(&nodes, key));
        }
    }

    #[test]
    fn any_weights_and_keys_have_an_owner(
        nodes in nodes(1, any_weight()),
        version in version(),
        keys in keys(),
    ) {
        let ring = Carp::with_hash(nodes, 1, version);
        let members: Vec<&str> = ring.members().map(|(id, _)| id).collect();
        for key in &keys {
            let index = ring.owner_index(key).expect("the ring has members");
            prop_assert_eq!(ring.owner(key), Some(members[index]));
            if let Ok(text) = std::str::from_utf8(key) {
                prop_assert_eq!(ring.get(text), members[index]);
            }
        }
    }

    #[test]
    fn the_order_of_members_does_not_matter(
        (nodes, shuffled) in nodes(0, weight())
            .prop_flat_map(|nodes| (Just(nodes.clone()), Just(nodes).prop_shuffle())),
        version in version(),
        keys in keys(),
    ) {
        let ring = Carp::with_hash(nodes, 1, version);
        let other = Carp::with_hash(shuffled, 1, version);
        prop_assert!(ring.members().map(|(id, _)| id).is_sorted());
        prop_assert_eq!(&ring, &other);
        for key in &keys {
            prop_assert_eq!(ring.owner(key), other.owner(key));
        }
    }

    #[test]
    fn a_changed_ring_equals_a_new_one(
        nodes in nodes(1, weight()),
        removed in any::<prop::sample::Index>(),
        version in version(),
    ) {
        let mut grown = Carp::with_hash(vec![], 1, version);
        for (id, weight) in nodes.clone() {
            grown.add_node(id, weight);
        }
        prop_assert_eq!(&grown, &Carp::with_hash(nodes.clone(), 1, version));

        let mut rest = nodes;
        let (id, weight) = rest.remove(removed.index(rest.len()));
        let mut shrunk = grown.clone();
        prop_assert!(shrunk.remove_node(&id));
        prop_assert_eq!(&shrunk, &Carp::with_hash(rest, 1, version));
        shrunk.add_node(id, weight);
        prop_assert_eq!(&shrunk, &grown);
    }

    #[test]
    fn only_ratios_of_weights_count(
        nodes in nodes(1, weight()),
        exponent in -20_i32..20,
        version in version(),
        keys in keys(),
    ) {
        // By a power of two, so that the ratios stay what they are to the last bit.
        let scale = 2.0_f32.powi(exponent);
        let scaled = nodes.iter().map(|(id, weight)| (id.clone(), weight * scale)).collect();
        let ring = Carp::with_hash(nodes, 1, version);
        let other = Carp::with_hash(scaled, 1, version);
        for key in &keys {
            prop_assert_eq!(ring.owner(key), other.owner(key));
        }
    }

    #[test]
    fn an_added_member_takes_keys_and_moves_no_others(
        (nodes, version) in movable_ring(),
        keys in keys(),
    ) {
        let (id, _) = nodes.last().cloned().expect("at least two members");
        let after = Carp::with_hash(nodes.clone(), 1, version);
        let before = Carp::with_hash(nodes[..nodes.len() - 1].to_vec(), 1, version);
        for key in &keys {
            let (old, new) = (owner(&before, key), owner(&after, key));
            prop_assert!(new == old || new == id, "moved from {} to {}", old, new);
        }
    }

    #[test]
    fn a_removed_member_gives_up_its_keys_and_moves_no_others(
        (nodes, version) in movable_ring(),
        removed in any::<prop::sample::Index>(),
        keys in keys(),
    ) {
        let (id, _) = &nodes[removed.index(nodes.len())];
        let before = Carp::with_hash(nodes.clone(), 1, version);
        let mut after = before.clone();
        prop_assert!(after.remove_node(id));
        for key in &keys {
            let (old, new) = (owner(&before, key), owner(&after, key));
            let only_its_keys_moved = if old == id { new != id } else { new == old };
            prop_assert!(only_its_keys_moved, "from {} to {}", old, new);
        }
    }

    #[test]
    fn v2_a_changed_weight_moves_keys_one_way_only(
        mut nodes in nodes(2, weight()),
        changed in any::<prop::sample::Index>(),
        weight in weight(),
        keys in keys(),
    ) {
        let before = Carp::new(nodes.clone(), 1);
        let place = changed.index(nodes.len());
        let grows = weight > nodes[place].1;
        nodes[place].1 = weight;
        let after = Carp::new(nodes.clone(), 1);
        for key in &keys {
            let (old, new) = (owner(&before, key), owner(&after, key));
            let at_the_other_end = if grows { new } else { old };
            prop_assert!(old == new || at_the_other_end == nodes[place].0);
        }
    }

    #[test]
    fn json_round_trips_to_the_bit(
        nodes in nodes(0, any_weight()),
        version in version(),
        config_id in any::<u32>(),
        list_ttl in any::<u32>(),
    ) {
        let ring = Carp::with_hash(nodes, config_id, version).with_list_ttl(list_ttl);
        let json = serde_json::to_string(&ring).expect("a ring serialises");
        let back: Carp = serde_json::from_str(&json).expect("what a ring wrote is valid");
        prop_assert_eq!(&back, &ring);
        let bits = |ring: &Carp| ring.members().map(|(_, w)| w.to_bits()).collect::<Vec<_>>();
        prop_assert_eq!(bits(&back), bits(&ring));
    }

    #[test]
    fn damaged_json_never_panics(
        nodes in nodes(0, any_weight()),
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
    ) {
        let mut json = serde_json::to_vec(&Carp::new(nodes, 1)).expect("a ring serialises");
        for (place, byte) in damage {
            let place = place.index(json.len());
            json[place] = byte;
        }
        // Either it is refused, or it is a ring that works.
        if let Ok(ring) = serde_json::from_slice::<Carp>(&json) {
            prop_assert_eq!(ring.owner(b"key").is_some(), !ring.is_empty());
        }
    }
}

const SHARE_KEYS: usize = 60_000;

fn numbered(weights: &[f32]) -> Nodes {
    let id = |i| format!("c{i}");
    weights.iter().enumerate().map(|(i, &w)| (id(i), w)).collect()
}

fn sequential_keys() -> impl Iterator<Item = String> {
    (0..SHARE_KEYS).map(|i| format!("user:{i:08}"))
}

/// For each member the keys that it owns, over those that its weight promises.
fn shares(ring: &Carp) -> Vec<(f64, f64)> {
    let mut owned = vec![0_u32; ring.len()];
    for key in sequential_keys() {
        owned[ring.owner_index(key.as_bytes()).expect("it has members")] += 1;
    }
    let total: f64 = ring.members().map(|(_, weight)| f64::from(weight)).sum();
    ring.members()
        .zip(owned)
        .map(|((_, weight), owned)| (f64::from(owned), f64::from(weight) / total))
        .collect()
}

/// Whether `owned` of `keys` is what chance gives to a member with this share, within five
/// standard deviations (one chance in a million for each member).
fn is_fair(owned: f64, share: f64, keys: f64) -> bool {
    (owned - keys * share).abs() < 5.0 * (keys * share * (1.0 - share)).sqrt()
}

#[test]
fn v2_shares_follow_weights_as_closely_as_chance_allows() {
    for weights in [
        vec![1.0; 3],
        vec![1.0; 8],
        vec![1.0; 64],
        vec![1.0, 2.0],
        vec![1.0, 1.0, 2.0, 4.0, 8.0],
        vec![0.1, 0.2, 0.3, 0.4],
        (1..=32).map(|i| i as f32).collect(),
    ] {
        for (owned, share) in shares(&Carp::new(numbered(&weights), 1)) {
            assert!(
                is_fair(owned, share, SHARE_KEYS as f64),
                "{weights:?}: {owned} keys for a share of {share}"
            );
        }
    }
}

/// The draft's hash spreads sequential keys badly, so this only tells that weights are not
/// ignored or swapped: every member has between 0.5 and 1.6 of what its weight promises.
#[test]
fn v1_shares_follow_weights_loosely() {
    for weights in [vec![1.0; 3], vec![1.0; 8], vec![1.0, 2.0], vec![1.0, 1.0, 2.0, 4.0, 8.0]] {
        let ring = Carp::with_hash(numbered(&weights), 1, HashVersion::V1);
        for (owned, share) in shares(&ring) {
            let ratio = owned / (share * SHARE_KEYS as f64);
            assert!((0.5..1.6).contains(&ratio), "{weights:?}: {ratio}");
        }
    }
}

/// Tells that the scores of different members are independent of each other: if they were not,
/// the keys of a removed member would prefer some of the rest.
#[test]
fn v2_keys_of_a_removed_member_spread_by_the_weights_of_the_rest() {
    let weights = [1.0, 1.0, 2.0, 3.0, 1.0, 2.0, 2.0];
    let before = Carp::new(numbered(&weights), 1);
    let mut after = before.clone();
    assert!(after.remove_node("c3"));
    let mut heirs: HashMap<&str, f64> = HashMap::new();
    for key in sequential_keys().filter(|key| before.get(key) == "c3") {
        *heirs.entry(after.get(&key)).or_default() += 1.0;
    }
    let moved: f64 = heirs.values().sum();
    assert!(is_fair(moved, 3.0 / 12.0, SHARE_KEYS as f64), "{moved}");
    for (id, weight) in after.members() {
        let heir = heirs.get(id).copied().unwrap_or_default();
        assert!(is_fair(heir, f64::from(weight) / 9.0, moved), "{id}: {heir}");
    }
}

/// How many keys move between members whose own weight stays, when one of five changes.
fn needless_moves(version: HashVersion) -> usize {
    let before = Carp::with_hash(numbered(&[1.0, 2.0, 3.0, 4.0, 5.0]), 1, version);
    let after = Carp::with_hash(numbered(&[1.0, 2.0, 0.1, 4.0, 5.0]), 1, version);
    sequential_keys()
        .filter(|key| {
            let (old, new) = (before.get(key), after.get(key));
            old != new && old != "c2" && new != "c2"
        })
        .count()
}

/// Not wanted, but what the draft does, and the reason why version 2 scores otherwise.
#[test]
fn v1_moves_keys_needlessly_when_a_weight_changes_and_v2_does_not() {
    assert!(needless_moves(HashVersion::V1) > SHARE_KEYS / 100);
    assert_eq!(needless_moves(HashVersion::V2), 0);
}
