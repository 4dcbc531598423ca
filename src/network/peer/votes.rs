//! Which votes of other nodes are believed.
//!
//! A vote that is believed once stays: Raft never goes back to an earlier term. After the highest of all terms
//! there would never be another election, so one senseless message would end a cluster for ever.

use crate::codec::ORDINAL_HEARD_MAX;
use crate::types::{NodeId, Vote};

/// What is said of a vote that is not believed.
pub(in crate::network) const NO_ELECTION: &str = "a vote that no election leads to";

/// How far the term of a vote may be ahead of this node's own. One election raises it by one.
const TERMS_AHEAD_MAX: u64 = 1 << 32;

/// The highest term that a node takes that has none: when it stands for election itself, it counts on from
/// there, and its peers hear nothing above [`ORDINAL_HEARD_MAX`].
const FIRST_TERM_MAX: u64 = ORDINAL_HEARD_MAX / 2;

/// Whether another node may say this vote to node `own`, which has reached `term`. Not if its term is out of
/// reach; only who is new must take nearly what it hears. Nor if it is the vote of this node itself: as a
/// leader it would follow itself, and Raft panic.
pub(in crate::network) fn is_plausible(vote: &Vote, own: NodeId, term: u64) -> bool {
    let term_max = if term == 0 { FIRST_TERM_MAX } else { term.saturating_add(TERMS_AHEAD_MAX) };
    vote.leader_id.term <= term_max && vote.leader_id.node_id != own
}

/// Whether another node may answer with this vote what node `own` said with the vote `said`: with that one, which
/// may have won meanwhile, one before it, or one that it may say by itself.
pub(in crate::network) fn may_answer(vote: &Vote, own: NodeId, said: &Vote) -> bool {
    vote.leader_id <= said.leader_id || is_plausible(vote, own, said.leader_id.term)
}

/// The same of a question whether a vote would be granted: nobody knows of that one yet.
pub(in crate::network) fn may_answer_pre_vote(vote: &Vote, own: NodeId, asked: &Vote) -> bool {
    vote.leader_id != asked.leader_id && may_answer(vote, own, asked)
}

/// Whether another node may refuse what node `own` said with the vote `said`, because this one is higher.
pub(in crate::network) fn may_refuse(vote: &Vote, own: NodeId, said: &Vote) -> bool {
    vote > said && is_plausible(vote, own, said.leader_id.term)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::LeaderId;

    const OWN: NodeId = 1;

    fn vote(term: u64, node_id: NodeId, committed: bool) -> Vote {
        Vote { leader_id: LeaderId { term, node_id }, committed }
    }

    /// It is one message that brings it there, and its own elections have to go on.
    #[test]
    fn a_new_node_takes_a_term_only_with_room_above_it() {
        let is_taken = |term, by| is_plausible(&vote(term, 2, false), OWN, by);
        assert!(is_taken(7, 0) && is_taken(FIRST_TERM_MAX, 0));
        assert!(!is_taken(FIRST_TERM_MAX + 1, 0));
        assert!(!is_taken(ORDINAL_HEARD_MAX, 0));
        assert!(is_taken(FIRST_TERM_MAX + 1, FIRST_TERM_MAX), "the next candidate's");
        const { assert!(FIRST_TERM_MAX + TERMS_AHEAD_MAX < ORDINAL_HEARD_MAX) };
        assert!(is_taken(5 + TERMS_AHEAD_MAX, 5) && !is_taken(6 + TERMS_AHEAD_MAX, 5));
    }

    #[test]
    fn an_answer_repeats_the_vote_or_names_one_within_reach() {
        let said = vote(5, OWN, false);
        let won = vote(5, OWN, true);
        for possible in [said, won, vote(4, OWN, true), vote(5, 2, true), vote(9, 3, false)] {
            assert!(may_answer(&possible, OWN, &said), "{possible}");
        }
        for impossible in [vote(6, OWN, false), vote(6, OWN, true), vote(u64::MAX, 2, false)] {
            assert!(!may_answer(&impossible, OWN, &said), "{impossible}");
        }
    }

    #[test]
    fn nobody_knows_of_a_vote_that_was_only_asked_about() {
        let asked = vote(5, OWN, false);
        for impossible in [asked, vote(5, OWN, true), vote(u64::MAX, 2, false)] {
            assert!(!may_answer_pre_vote(&impossible, OWN, &asked), "{impossible}");
        }
        for possible in [vote(4, OWN, true), vote(4, 3, true), vote(5, 2, false)] {
            assert!(may_answer_pre_vote(&possible, OWN, &asked), "{possible}");
        }
    }

    #[test]
    fn a_refusal_names_a_higher_vote() {
        let said = vote(5, OWN, true);
        for possible in [vote(5, 2, false), vote(6, 3, true)] {
            assert!(may_refuse(&possible, OWN, &said), "{possible}");
        }
        for impossible in [said, vote(4, 2, true), vote(6, OWN, true), vote(u64::MAX, 2, true)] {
            assert!(!may_refuse(&impossible, OWN, &said), "{impossible}");
        }
    }
}
