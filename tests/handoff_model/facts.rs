//! What the model's cluster tells a step about its data.

use std::io;

use distrib_kv_store::handoff::{Facts, Prepared, Tally};
use distrib_kv_store::types::{ClusterId, Revision};

use super::{Cluster, Rules};
use crate::shared::hash_of;

/// The facts that a step may ask for.
pub(super) struct Data<'a> {
    pub(super) cluster: &'a Cluster,
    pub(super) rules: &'a Rules,
}

impl Facts for Data<'_> {
    fn own(&self) -> &ClusterId {
        &self.cluster.id
    }

    /// Not modelled: it tells which replicas may serve pages, and the model lets only those.
    fn index(&self) -> u64 {
        0
    }

    fn revision(&self) -> Revision {
        self.cluster.revision
    }

    fn floors(&self) -> Vec<(String, u64)> {
        self.cluster.floors.iter().map(|(client, floor)| (client.to_string(), *floor)).collect()
    }

    fn is_empty(&self) -> io::Result<bool> {
        let cluster = self.cluster;
        Ok(cluster.rows.is_empty() && cluster.answers.is_empty() && cluster.staged.is_empty())
    }

    fn answers(&self, moves: &dyn Fn(&[u8]) -> bool) -> Tally {
        let mut tally = Tally::default();
        for (op, answer) in self.cluster.answers.iter().filter(|(_, a)| moves(&a.key)) {
            tally.add_answer(hash_of(&(op, answer)));
        }
        tally
    }

    fn records(
        &self,
        moves: &dyn Fn(&[u8]) -> bool,
        from: &[u8],
        to: Option<&[u8]>,
        prepared: Prepared,
    ) -> io::Result<Option<Tally>> {
        let mut tally = Tally::default();
        for key in self.cluster.rows.keys() {
            let within = &key[..] > from && to.is_none_or(|to| &key[..] <= to);
            let record = self.cluster.record(key, self.rules);
            if within
                && moves(key)
                && let Some(record) = record.filter(|record| record.revision <= prepared.revision)
            {
                tally.add_record(hash_of(&(key, record)));
            }
        }
        Ok(Some(tally))
    }
}
