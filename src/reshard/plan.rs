//! The plan of a change: its handoffs, and which share of all keys each of them moves.
//!
//! Pure. Which pairs of clusters get a handoff is [`pairs`]'s to say and certain. The share is for
//! people, and comes in two kinds:
//!
//! - **Hash version 2** scores a member of weight `w` by `-w / ln u`, so the owner is the one of the
//!   smallest `E / w`, where the `E = -ln u` of the members are independent and exponentially
//!   distributed, and the same before and after. Let `w` be the old weights, `v` the new ones, 0 for
//!   a cluster that is not there, and `x = E_S / w_S`, `y = E_D / v_D`. A key goes from S to D if
//!   every other `E_i` is at least `max(x w_i, y v_i)`, `E_S >= y v_S` and `E_D >= x w_D`. With
//!   `r = y / x` this integrates to
//!
//!   ```text
//!   P(S -> D) = ∫ w_S v_D / A(r)^2 dr,  from r = w_D / v_D to w_S / v_S,
//!   A(r)      = w_S + r v_D + sum over the others of max(w_i, r v_i)
//!   ```
//!
//!   and `A` is made of straight pieces, each of which has a closed form: exact, but for rounding.
//! - **Hash version 1** has no such form. There [`SAMPLE_KEYS`] fixed keys are counted, and the share
//!   has an error: three standard deviations.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::handoff::{Pair, pairs};
use crate::ring::{HASH_VERSION_DEFAULT, Ring, RingError, RingTable};
use crate::types::ClusterId;

/// How many keys are counted where there is no formula: the error of a share is then below 0.34 %, and
/// counting takes a fraction of a second.
const SAMPLE_KEYS: u32 = 200_000;

/// Where the shares come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Basis {
    /// Calculated.
    Exact,
    /// Counted in a fixed sample of keys.
    Sampled,
}

/// What one handoff moves.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PlannedHandoff {
    /// Between whom.
    #[serde(flatten)]
    pub pair: Pair,
    /// The share of all keys that moves, from 0 to 1.
    pub share: f64,
    /// How far off the share may be; 0 when it is calculated.
    pub error: f64,
    /// The share of the source's own keys that moves, from 0 to 1.
    pub share_of_source: f64,
}

/// What a change moves.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Plan {
    /// Its handoffs, in the order in which a `Begin` lists them.
    pub handoffs: Vec<PlannedHandoff>,
    /// Where the shares come from.
    pub basis: Basis,
}

impl Plan {
    /// The plan for going from one ring to another.
    ///
    /// # Errors
    /// One of the rings is none.
    pub fn new(old: &Ring, new: &Ring) -> Result<Self, RingError> {
        let pairs = pairs(old, new);
        let versions = [old.hash_version, new.hash_version];
        if versions == [HASH_VERSION_DEFAULT; 2] {
            let handoff = |pair: Pair| {
                let share = exact_share(old, new, &pair);
                let share_of_source = share / share_before(old, &pair.from);
                PlannedHandoff { pair, share, error: 0.0, share_of_source }
            };
            let handoffs = pairs.into_iter().map(handoff).collect();
            return Ok(Self { handoffs, basis: Basis::Exact });
        }
        let sample = Sample::count(old, new)?;
        let handoffs = pairs.into_iter().map(|pair| sample.handoff(pair)).collect();
        Ok(Self { handoffs, basis: Basis::Sampled })
    }

    /// The share of all keys that moves, from 0 to 1.
    pub fn share(&self) -> f64 {
        self.handoffs.iter().map(|handoff| handoff.share).sum()
    }
}

/// What a cluster holds, for estimates.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Holdings {
    /// Keys.
    pub keys: u64,
    /// Bytes on one node's disk.
    pub bytes: u64,
}

/// What a handoff moves of what its source holds, about.
pub fn estimate(handoff: &PlannedHandoff, source: Holdings) -> Holdings {
    let part = |whole: u64| (whole as f64 * handoff.share_of_source).round() as u64;
    Holdings { keys: part(source.keys), bytes: part(source.bytes) }
}

fn weight(ring: &Ring, id: &ClusterId) -> f64 {
    ring.cluster(id).map_or(0.0, |cluster| f64::from(cluster.weight))
}

fn share_before(ring: &Ring, id: &ClusterId) -> f64 {
    let total: f64 = ring.clusters.iter().map(|cluster| f64::from(cluster.weight)).sum();
    weight(ring, id) / total
}

/// See the module.
fn exact_share(old: &Ring, new: &Ring, pair: &Pair) -> f64 {
    let (from, to) = (&pair.from, &pair.to);
    let (from_old, to_new) = (weight(old, from), weight(new, to));
    let low = weight(old, to) / to_new;
    // Infinite when the source leaves the ring.
    let high = from_old / weight(new, from);
    if low >= high {
        return 0.0;
    }
    let gone = old.clusters.iter().filter(|cluster| new.cluster(&cluster.id).is_none());
    let others = new.clusters.iter().chain(gone).map(|cluster| &cluster.id);
    let others = others.filter(|id| *id != from && *id != to);
    let others: Vec<(f64, f64)> = others.map(|id| (weight(old, id), weight(new, id))).collect();
    let area = |ratio: f64| {
        let rest: f64 = others.iter().map(|(old, new)| old.max(ratio * new)).sum();
        from_old + ratio * to_new + rest
    };
    let mut bounds: Vec<f64> = others.iter().map(|(old, new)| old / new).collect();
    bounds.retain(|bound| *bound > low && *bound < high);
    bounds.sort_by(f64::total_cmp);
    let ends = bounds.iter().copied().chain([high]);
    let starts = [low].into_iter().chain(bounds.iter().copied());
    let piece = |(start, end): (f64, f64)| {
        // On this piece A grows by a constant slope, which is never 0: the destination has a weight.
        let middle = if end.is_finite() { (start + end) / 2.0 } else { 2.0 * start + 1.0 };
        let grown = others.iter().filter(|(old, new)| middle * new > *old).map(|(_, new)| new);
        let slope = to_new + grown.sum::<f64>();
        let rest = if end.is_finite() { 1.0 / area(end) } else { 0.0 };
        (1.0 / area(start) - rest) / slope
    };
    from_old * to_new * starts.zip(ends).map(piece).sum::<f64>()
}

/// How many keys of the sample go from whom to whom.
struct Sample {
    held: BTreeMap<ClusterId, u32>,
    moved: BTreeMap<Pair, u32>,
}

impl Sample {
    fn count(old: &Ring, new: &Ring) -> Result<Self, RingError> {
        let (old, new) = (RingTable::new(old.clone())?, RingTable::new(new.clone())?);
        let mut sample = Self { held: BTreeMap::new(), moved: BTreeMap::new() };
        for number in 0..SAMPLE_KEYS {
            let key = sample_key(number);
            let (Some(from), Some(to)) = (old.owner(&key), new.owner(&key)) else { continue };
            *sample.held.entry(from.id.clone()).or_default() += 1;
            if from.id != to.id {
                let pair = Pair { from: from.id.clone(), to: to.id.clone() };
                *sample.moved.entry(pair).or_default() += 1;
            }
        }
        Ok(sample)
    }

    fn handoff(&self, pair: Pair) -> PlannedHandoff {
        let moved = f64::from(self.moved.get(&pair).copied().unwrap_or(0));
        let held = f64::from(self.held.get(&pair.from).copied().unwrap_or(0));
        let keys = f64::from(SAMPLE_KEYS);
        let share = moved / keys;
        // Of a share of which no key was met it is only known that it is small: the rule of three.
        let error = (3.0 * (share * (1.0 - share) / keys).sqrt()).max(3.0 / keys);
        let share_of_source = if held > 0.0 { moved / held } else { 0.0 };
        PlannedHandoff { pair, share, error, share_of_source }
    }
}

/// The sample's keys: well mixed, and the same ones always.
fn sample_key(number: u32) -> [u8; 8] {
    xxhash_rust::xxh3::xxh3_64(&number.to_be_bytes()).to_be_bytes()
}

#[cfg(test)]
mod tests {
    use super::super::testing::ring;
    use super::*;

    /// The keys that really change hands, counted under hash version 2, are what the formula says.
    #[test]
    fn calculated_shares_are_what_brute_force_counts() {
        let rings = [
            ring(1, &[("a", 1.0), ("b", 1.0), ("c", 1.0)]),
            ring(2, &[("a", 1.0), ("b", 1.0), ("c", 1.0), ("d", 1.0)]),
            ring(2, &[("b", 2.0), ("c", 1.0)]),
            ring(2, &[("a", 0.25), ("b", 3.0), ("c", 1.0), ("e", 1.5)]),
            ring(2, &[("a", 5.0), ("b", 1.0), ("c", 1.0)]),
        ];
        for old in &rings {
            for new in &rings {
                let plan = Plan::new(old, new).unwrap();
                assert_eq!(plan.basis, Basis::Exact);
                let counted = Sample::count(old, new).unwrap();
                let known: u32 = plan
                    .handoffs
                    .iter()
                    .map(|h| counted.moved.get(&h.pair).copied().unwrap_or(0))
                    .sum();
                assert_eq!(known, counted.moved.values().sum::<u32>(), "no move is left out");
                for handoff in &plan.handoffs {
                    let seen = counted.handoff(handoff.pair.clone());
                    let off = (seen.share - handoff.share).abs();
                    assert!(off <= seen.error.max(4e-3), "{old:?} {new:?} {handoff:?} {seen:?}");
                    let off = (seen.share_of_source - handoff.share_of_source).abs();
                    assert!(off <= 0.02, "{handoff:?} {seen:?}");
                }
            }
        }
    }

    #[test]
    fn one_more_of_equal_clusters_takes_its_share_evenly() {
        let three = ring(1, &[("a", 1.0), ("b", 1.0), ("c", 1.0)]);
        let four = ring(2, &[("a", 1.0), ("b", 1.0), ("c", 1.0), ("d", 1.0)]);
        let plan = Plan::new(&three, &four).unwrap();
        assert_eq!(plan.handoffs.len(), 3);
        for handoff in &plan.handoffs {
            assert!((handoff.share - 1.0 / 12.0).abs() < 1e-12, "{handoff:?}");
            assert!((handoff.share_of_source - 0.25).abs() < 1e-12, "{handoff:?}");
        }
        assert!((plan.share() - 0.25).abs() < 1e-12);
        let back = Plan::new(&four, &three).unwrap();
        assert!((back.share() - 0.25).abs() < 1e-12, "{back:?}");
        let holdings = Holdings { keys: 1000, bytes: 100_000 };
        assert_eq!(estimate(&plan.handoffs[0], holdings), Holdings { keys: 250, bytes: 25_000 });
    }

    #[test]
    fn version_1_is_sampled_and_says_so() {
        let old = Ring { hash_version: 1, ..ring(1, &[("a", 1.0), ("b", 1.0)]) };
        let new = Ring { hash_version: 1, ..ring(2, &[("a", 1.0), ("b", 1.0), ("c", 1.0)]) };
        let plan = Plan::new(&old, &new).unwrap();
        assert_eq!(plan.basis, Basis::Sampled);
        assert!(plan.handoffs.iter().all(|handoff| handoff.error > 0.0 && handoff.error < 0.0034));
        assert!(plan.share() > 0.2 && plan.share() < 0.5, "{}", plan.share());
    }
}
