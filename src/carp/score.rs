//! From hashes to a winner: how much each member's weight lifts its score, and the search for
//! the highest.
//!
//! A [`Scorer`] is what can be computed once per table instead of once per lookup. It speaks of
//! members by their index in the table, where they are sorted by id, so the smaller index is the
//! smaller id.
//!
//! # Version 1: the draft's load multipliers
//! `score = combined hash * X`. With K members sorted from the smallest share P_1 to the largest
//! P_K, each X_k is chosen so that member k wins P_k of all keys, given uniform hashes. X_k
//! depends on all shares up to k, so another weight for one member moves keys between others.
//!
//! The draft makes every X_k a 32-bit float. We compute in 64 bits and round each X_k as it is
//! stored, so two implementations of `pow` that differ in the last bit give the same table. The
//! product of hash and X_k is a 64-bit float.
//!
//! # Version 2: logarithmic scores
//! `score = w / -ln(u)`, where u in (0, 1) is the combined hash. `-ln(u) / w` is exponentially
//! distributed with rate w, and of several such variables the smallest is member i's with
//! probability w_i over the sum of all: the shares are exact. A score depends on nothing but the
//! key, the member and its own weight, so a change of one member cannot reorder two others.
//!
//! The winner is the member with the largest `(score, hash, smaller id)`. Finding it needs no
//! logarithm for most members, for two reasons that rely on how the score is *computed*:
//! - *Among equal weights the largest hash wins.* The computed score never falls when the hash
//!   rises. u has 48 random bits, so neighbouring values are 2^-48 apart and their logarithms at
//!   least 2^-48 / u (u the larger of the two); the error of `libm::log` is below 1 ulp, at most
//!   2^-52 * |ln u|, for each. Rounding could swap two neighbours only if u * |ln u| came to 8,
//!   and it is never above 1/e. Division by it is rounded correctly and so keeps the order.
//!   Where scores are equal after all, the hash decides, which is the same answer.
//! - *`-ln(u) >= 1 - u`*, so `w / (1 - u)` bounds the score from above without a logarithm, and
//!   a member whose bound is below the best score so far is skipped.
//!
//! `libm` computes `log` and `pow` in plain IEEE arithmetic, the same on every platform; std
//! calls the platform's own, which differ. The tests pin the bits of several scores, so that a
//! new version of `libm` that rounds otherwise does not go unnoticed: it would need a hash
//! version of its own.

use std::cmp::Ordering;
use std::ops::Range;

use super::{HashVersion, hash};

/// All that a lookup needs of a table, laid out for one pass over it.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Scorer {
    V1(MultiplierTable),
    V2(LogTable),
}

impl Scorer {
    /// `members` is sorted by id; every weight is finite and positive.
    pub(super) fn new(version: HashVersion, members: &[(&str, f32)]) -> Self {
        match version {
            HashVersion::V1 => Self::V1(MultiplierTable::new(members)),
            HashVersion::V2 => Self::V2(LogTable::new(members)),
        }
    }

    /// The index of the member that owns `key`, or `None` without members. Allocates nothing.
    pub(super) fn winner(&self, key: &[u8]) -> Option<usize> {
        match self {
            Self::V1(table) => table.winner(key),
            Self::V2(table) => table.winner(key),
        }
    }
}

/// Version 1: member hash and load multiplier of each member, in the order of the members.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct MultiplierTable {
    members: Vec<(u32, f64)>,
}

impl MultiplierTable {
    fn new(members: &[(&str, f32)]) -> Self {
        let weights: Vec<f32> = members.iter().map(|&(_, weight)| weight).collect();
        let hashes = members.iter().map(|&(id, _)| hash::v1_member(id));
        Self {
            members: hashes.zip(load_multipliers(&weights).into_iter().map(f64::from)).collect(),
        }
    }

    fn winner(&self, key: &[u8]) -> Option<usize> {
        let key_hash = hash::v1_key(key);
        let mut winner = None;
        // Below every score, which may be 0.
        let mut highest = -1.0;
        for (index, &(member_hash, multiplier)) in self.members.iter().enumerate() {
            let score = f64::from(hash::v1_combine(key_hash, member_hash)) * multiplier;
            // Strictly: of equal scores the first, which is the smallest id, stays.
            if score > highest {
                highest = score;
                winner = Some(index);
            }
        }
        winner
    }
}

/// The draft's X_k (section 3.3) for each of `weights`, in the order of `weights`.
fn load_multipliers(weights: &[f32]) -> Vec<f32> {
    let mut ascending: Vec<usize> = (0..weights.len()).collect();
    ascending.sort_by(|&a, &b| weights[a].total_cmp(&weights[b]));
    let total: f64 = ascending.iter().map(|&i| f64::from(weights[i])).sum();

    let mut multipliers = vec![0.0_f32; weights.len()];
    let mut product = 1.0; // X_1 * ... * X_(k-1)
    let mut previous = (0.0, 0.0_f32); // P_(k-1) and X_(k-1)
    for (k, &member) in ascending.iter().enumerate() {
        let share = f64::from(weights[member]) / total;
        let x = if k > 0 && share == previous.0 {
            // What the formula comes to, free of rounding: equal weights must score alike,
            // or the order of equals would matter.
            previous.1
        } else {
            let remaining = (weights.len() - k) as f64; // K - k + 1, with k counted from 1
            let growth = remaining * (share - previous.0) / product;
            let base = growth + libm::pow(f64::from(previous.1), remaining);
            round_multiplier(libm::pow(base, 1.0 / remaining))
        };
        product *= f64::from(x);
        previous = (share, x);
        multipliers[member] = x;
    }
    multipliers
}

/// Rounds to the draft's 32-bit float. Where two weights differ by some 70 orders of magnitude
/// a multiplier overflows it; the largest finite one then does as well and spares us infinity
/// times zero.
fn round_multiplier(x: f64) -> f32 {
    (x as f32).min(f32::MAX)
}

/// Version 2: the members' hashes, those of equal weight side by side.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct LogTable {
    /// By falling weight: heavy members score high, so the later classes are skipped more often.
    classes: Vec<WeightClass>,
    /// By class, within a class by id.
    hashes: Vec<u64>,
    /// Whose hash stands at the same place of `hashes`.
    members: Vec<usize>,
}

#[derive(Clone, Debug, PartialEq)]
struct WeightClass {
    weight: f64,
    /// Where in `hashes` the members of this weight stand.
    places: Range<usize>,
}

/// A member in the running for one key.
#[derive(Clone, Copy, Debug)]
struct Candidate {
    score: f64,
    hash: u64,
    member: usize,
}

impl Candidate {
    /// The rule of the ring: the higher score, then the higher hash, then the smaller id.
    fn beats(&self, other: &Self) -> bool {
        let order = self
            .score
            .total_cmp(&other.score)
            .then(self.hash.cmp(&other.hash))
            .then(other.member.cmp(&self.member));
        order == Ordering::Greater
    }
}

impl LogTable {
    fn new(members: &[(&str, f32)]) -> Self {
        let mut order: Vec<usize> = (0..members.len()).collect();
        // A stable sort: equal weights stay in the order of their ids.
        order.sort_by(|&a, &b| members[b].1.total_cmp(&members[a].1));
        let mut classes: Vec<WeightClass> = Vec::new();
        for (place, &member) in order.iter().enumerate() {
            let weight = f64::from(members[member].1);
            match classes.last_mut() {
                Some(class) if class.weight == weight => class.places.end = place + 1,
                _ => classes.push(WeightClass { weight, places: place..place + 1 }),
            }
        }
        Self {
            classes,
            hashes: order.iter().map(|&member| hash::v2_member(members[member].0)).collect(),
            members: order,
        }
    }

    fn winner(&self, key: &[u8]) -> Option<usize> {
        let key_hash = hash::v2_key(key);
        let (first, others) = self.classes.split_first()?;
        let (hash, member) = self.champion(key_hash, first);
        if others.is_empty() {
            return Some(member);
        }
        let mut best = Candidate { score: log_score(first.weight, hash), hash, member };
        for class in others {
            let (hash, member) = self.champion(key_hash, class);
            if is_below(class.weight, hash, best.score) {
                continue;
            }
            let candidate = Candidate { score: log_score(class.weight, hash), hash, member };
            if candidate.beats(&best) {
                best = candidate;
            }
        }
        Some(best.member)
    }

    /// The only member of its class that can win: the one with the largest hash, the first of
    /// equals.
    fn champion(&self, key_hash: u64, class: &WeightClass) -> (u64, usize) {
        let mut best_hash = 0;
        let mut best_place = class.places.start;
        for (place, &member_hash) in class.places.clone().zip(&self.hashes[class.places.clone()]) {
            let hash = hash::v2_combine(key_hash, member_hash);
            if hash > best_hash {
                best_hash = hash;
                best_place = place;
            }
        }
        (best_hash, self.members[best_place])
    }
}

/// Bits of the hash that make up u. 48 leave the computed logarithm twenty times the precision
/// that it needs to be monotonic (see the top), and are fine enough for shares down to 1e-9.
const UNIT_BITS: u32 = 48;

/// The hash as a fraction: the middle of one of 2^48 equal parts of (0, 1), never 0 or 1.
/// Exact, as it has 49 significant bits, and so is 1 minus it.
fn unit_interval(hash: u64) -> f64 {
    let part = hash >> (u64::BITS - UNIT_BITS);
    (2 * part + 1) as f64 / (1_u64 << (UNIT_BITS + 1)) as f64
}

fn log_score(weight: f64, hash: u64) -> f64 {
    weight / -libm::log(unit_interval(hash))
}

/// Whether the score surely is below `score`, told without a logarithm. `false` says nothing.
fn is_below(weight: f64, hash: u64, score: f64) -> bool {
    // Far above the few ulp that rounding may add to the score or take from the two products.
    const ROUNDING_MARGIN: f64 = 1.0 + 1.0 / (1 << 20) as f64;
    weight * ROUNDING_MARGIN < score * (1.0 - unit_interval(hash))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bits(values: Vec<f32>) -> Vec<u32> {
        values.into_iter().map(f32::to_bits).collect()
    }

    /// Worked by hand for loads 1 and 3, so P = 1/4 and 3/4, K = 2:
    /// X_1 = (2 * 1/4)^(1/2) = sqrt(1/2), and
    /// X_2 = (1 * (3/4 - 1/4) / X_1 + X_1^1)^(1/1) = sqrt(1/2) + sqrt(1/2) = sqrt(2).
    /// With uniform hashes member 1 then wins X_1 / (2 * X_2) = 1/4 of the keys, as it should.
    #[test]
    fn multipliers_of_two_members_are_the_draft_s() {
        assert_eq!(bits(load_multipliers(&[1.0, 3.0])), [0x3F35_04F3, 0x3FB5_04F3]);
        assert_eq!(bits(load_multipliers(&[3.0, 1.0])), [0x3FB5_04F3, 0x3F35_04F3]);
    }

    /// Table C-1 of Wessels, "Web Caching" (2001), gives for the loads 1, 1, 2, 3 the
    /// multipliers 0.869442, 0.869442, 1.064844 and 1.242318.
    #[test]
    fn multipliers_agree_with_the_published_ones() {
        let published = [0.869_442, 0.869_442, 1.064_844, 1.242_318];
        for (ours, theirs) in load_multipliers(&[1.0, 1.0, 2.0, 3.0]).into_iter().zip(published) {
            assert!((ours - theirs).abs() < 1e-6, "{ours} is not {theirs}");
        }
    }

    /// From a Python script written from the draft's text.
    #[test]
    fn multipliers_of_five_unequal_members_are_the_draft_s() {
        assert_eq!(
            bits(load_multipliers(&[0.5, 1.5, 2.5, 0.1, 7.0])),
            [0x3F43_69DF, 0x3F83_5556, 0x3F9A_F5B6, 0x3F08_80C8, 0x3FFD_2C7C]
        );
    }

    #[test]
    fn equal_weights_have_the_multiplier_one() {
        for count in 1..=300 {
            for weight in [1.0, 0.1, 1e-30, f32::MAX, f32::from_bits(1)] {
                let multipliers = load_multipliers(&vec![weight; count]);
                assert_eq!(multipliers, vec![1.0; count], "{count} of {weight}");
            }
        }
    }

    #[test]
    fn multipliers_stay_finite_and_positive_for_extreme_weights() {
        let (tiny, huge) = (f32::from_bits(1), f32::MAX);
        for weights in [
            vec![tiny, huge],
            vec![tiny, tiny, huge],
            vec![tiny, 1.0, huge],
            [vec![tiny; 1000], vec![1.0; 24], vec![huge; 1024]].concat(),
        ] {
            let multipliers = load_multipliers(&weights);
            assert!(multipliers.iter().all(|x| x.is_finite() && *x > 0.0));
        }
    }

    #[test]
    fn unit_interval_is_open_and_exact() {
        assert_eq!(unit_interval(0), 2.0_f64.powi(-49));
        assert_eq!(1.0 - unit_interval(u64::MAX), 2.0_f64.powi(-49));
        assert_eq!(unit_interval(1 << 63), 0.5 + 2.0_f64.powi(-49));
        assert_eq!(unit_interval(0xFFFF), unit_interval(0));
        assert_ne!(unit_interval(0x1_0000), unit_interval(0));
    }

    /// The bits are those of Python's `1.0 / -math.log(u)`, so of another `log`. Should a new
    /// `libm` change one of them, it can change the owner of a key.
    #[test]
    fn log_scores_are_pinned_to_the_bit() {
        for (hash, score) in [
            (0, 0x3F9E_263D_E767_DA1D),
            (u64::MAX, 0x42FF_FFFF_FFFF_FFF8),
            (1 << 63, 0x3FF7_1547_652B_8320),
            (0x0123_4567_89AB_CDEF, 0x3FC7_A21C_022F_AF77),
            (0xFEDC_BA98_7654_3210, 0x406C_0FFC_F58B_D587_u64),
        ] {
            assert_eq!(log_score(1.0, hash).to_bits(), score, "hash {hash:#x}");
        }
    }

    /// The claim on which the shortcut for equal weights rests, tried where it is tightest
    /// (around u = 1/e), at the ends, and at steps all over the range.
    #[test]
    fn log_score_rises_with_the_hash() {
        let part = 1_u64 << (u64::BITS - UNIT_BITS);
        let starts = [0, (u64::MAX as f64 / std::f64::consts::E) as u64, u64::MAX / 2]
            .into_iter()
            .chain((0..2_000).map(|i| i * (u64::MAX / 2_001)))
            .chain([u64::MAX - 200 * part]);
        for start in starts {
            let mut lower = log_score(1.0, start);
            for step in 1..100 {
                let higher = log_score(1.0, start + step * part);
                assert!(lower < higher, "at {start:#x} + {step} parts");
                lower = higher;
            }
        }
    }

    #[test]
    fn is_below_never_skips_a_member_that_could_win() {
        let mut hash = 1_u64;
        let mut skipped = 0;
        for _ in 0..20_000 {
            hash = hash.wrapping_mul(0x5851_F42D_4C95_7F2D).wrapping_add(1);
            for score in [0.01, 1.0, 3.0, log_score(1.0, hash), 1e6] {
                if is_below(1.0, hash, score) {
                    skipped += 1;
                    assert!(log_score(1.0, hash) < score);
                }
            }
        }
        assert!(skipped > 10_000, "only {skipped} skipped: not a shortcut");
    }

    #[test]
    fn ties_go_to_the_higher_hash_then_to_the_smaller_id() {
        let candidate = |score, hash, member| Candidate { score, hash, member };
        assert!(candidate(2.0, 0, 9).beats(&candidate(1.0, 9, 0)));
        assert!(candidate(1.0, 9, 9).beats(&candidate(1.0, 8, 0)));
        assert!(candidate(1.0, 9, 0).beats(&candidate(1.0, 9, 1)));
        assert!(!candidate(1.0, 9, 1).beats(&candidate(1.0, 9, 0)));
    }
}
