//! Which pairs of clusters need a handoff.

use crate::ring::{HASH_VERSION_DEFAULT, Ring};
use crate::types::ClusterId;

use super::Pair;

/// All ordered pairs between which a key may move, unless it is certain that none does. Never a guess
/// from samples: a pair that is left out is keys that nobody serves.
///
/// Under hash version 2 a member's score for a key depends on its own weight alone, and computed
/// scores never fall when it rises. So a key goes from S to D only if S got lighter or D got heavier.
/// Under version 1 any weight may move keys between any two.
pub fn pairs(old: &Ring, new: &Ring) -> Vec<Pair> {
    let logarithmic =
        old.hash_version == HASH_VERSION_DEFAULT && new.hash_version == HASH_VERSION_DEFAULT;
    let weight = |ring: &Ring, id: &ClusterId| ring.cluster(id).map_or(0.0, |c| c.weight);
    let lighter = |id: &ClusterId| weight(new, id) < weight(old, id);
    let heavier = |id: &ClusterId| weight(new, id) > weight(old, id);
    let mut pairs = Vec::new();
    for from in &old.clusters {
        for to in &new.clusters {
            let may_move = !logarithmic || lighter(&from.id) || heavier(&to.id);
            if from.id != to.id && may_move {
                pairs.push(Pair { from: from.id.clone(), to: to.id.clone() });
            }
        }
    }
    pairs.sort();
    pairs
}
