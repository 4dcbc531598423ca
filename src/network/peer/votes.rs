//! Which votes of other nodes are believed.
//!
//! A vote that is believed once stays: Raft never goes back to an earlier term. After the highest of all terms
//! there would never be another election, so one senseless message would end a cluster for ever.

use crate::types::{NodeId, Vote};

/// How far the term of a vote may be ahead of this node's own. One election raises it by one.
const TERMS_AHEAD_MAX: u64 = 1 << 32;

/// Whether another node may say this vote to node `own`, which has reached `term`. Not if its term is out of
/// reach; only who is new must take what it hears. Nor if it is the vote of this node itself: as a leader it
/// would follow itself, and Raft panic.
pub(in crate::network) fn is_plausible(vote: &Vote, own: NodeId, term: u64) -> bool {
    let within_reach = term == 0 || vote.leader_id.term <= term.saturating_add(TERMS_AHEAD_MAX);
    within_reach && vote.leader_id.node_id != own
}

/// Whether another node may answer this vote to what node `own` said with the vote `said`: that one, one before
/// it, or one that it may say by itself.
pub(in crate::network) fn may_answer(vote: &Vote, own: NodeId, said: &Vote) -> bool {
    vote <= said || is_plausible(vote, own, said.leader_id.term)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::LeaderId;

    #[test]
    fn an_answer_repeats_the_vote_or_names_one_within_reach() {
        let vote =
            |term, node_id, committed| Vote { leader_id: LeaderId { term, node_id }, committed };
        let said = vote(5, 1, true);
        for possible in
            [said, vote(5, 1, false), vote(4, 1, true), vote(5, 2, true), vote(9, 3, false)]
        {
            assert!(may_answer(&possible, 1, &said), "{possible}");
        }
        for impossible in [vote(6, 1, false), vote(6, 1, true), vote(u64::MAX, 2, false)] {
            assert!(!may_answer(&impossible, 1, &said), "{impossible}");
        }
    }
}
