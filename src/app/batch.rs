//! Many operations at once, each answered as if it had come alone.

use tokio::sync::OwnedSemaphorePermit;

use super::*;
use crate::batch::{Operation, OperationResult};
use crate::config::VALUE_BYTES_MAX;
use crate::once::ClientFloor;

/// One of the places for requests in flight stands for this many operations of a batch: they share
/// what a request costs, and their bytes are bounded by the budget of bodies.
const OPERATIONS_PER_PLACE: usize = 16;

impl App {
    /// Carries operations out: the writes in their order, then the reads. One result for each;
    /// reads whose values would make the answer too long say so.
    ///
    /// An error stands for all of them and says that nothing took effect: they should have gone to
    /// another node, or to this one later.
    pub async fn batch(
        &self,
        client: Option<&ClientFloor>,
        operations: &[&Operation],
        consistency: Consistency,
        deadline: Instant,
    ) -> Result<Vec<OperationResult>, ApiError> {
        self.check_serving()?;
        self.check_initialized()?;
        let waits = consistency != Consistency::Stale || operations.iter().any(|o| o.is_write());
        if waits && Instant::now() >= deadline {
            return Err(not_proposed());
        }
        let _permit = self.admit_many(operations.len())?;
        let started = Instant::now();
        let mut results = vec![None; operations.len()];
        let (mut reads, mut writes) = (Vec::new(), Vec::new());
        let ring = self.inner.reader.ring_view();
        self.check_ring(&ring)?;
        let serves = |key: &[u8]| ring.serves(&self.inner.identity.cluster, key);
        for (index, operation) in operations.iter().enumerate() {
            match as_write(client, operation) {
                Ok(Some(write)) if serves(&write.key) => writes.push((index, write)),
                Ok(Some(write)) => results[index] = Some(Err(self.not_here(&ring, &write.key))),
                Ok(None) => reads.push((index, operation.key())),
                Err(error) => results[index] = Some(Err(error)),
            }
        }
        // What belongs elsewhere has nothing to wait for here. Usually all of a batch does, or nothing.
        if reads.first().is_some_and(|(_, key)| !serves(key)) {
            reads.retain(|(index, key)| {
                let here = serves(key);
                if !here {
                    results[*index] = Some(Err(self.not_here(&ring, key)));
                }
                here
            });
        }
        let (written, confirmed) = tokio::join!(
            self.write_many(operations, writes, deadline),
            self.confirm_reads(&reads, consistency, deadline)
        );
        // Not before: values would wait in memory for writes that no majority answers.
        let found = self.look_up_many(confirmed, &reads).await;
        // What belongs elsewhere says so also where nobody leads.
        let why = |key: &[u8], error: &ApiError| match serves(key) {
            true => error.clone(),
            false => self.not_here(&ring, key),
        };
        let found = found
            .unwrap_or_else(|error| reads.iter().map(|(_, key)| Err(why(key, &error))).collect());
        let read = reads.iter().map(|(index, _)| *index).zip(found);
        for (index, result) in written.into_iter().chain(read) {
            results[index] = Some(result);
        }
        let results = results.into_iter().map(|r| r.expect("a read, a write or an error"));
        let results: Vec<_> = results.collect();
        let took = started.elapsed();
        for (operation, result) in operations.iter().zip(&results) {
            self.record_one(operation, consistency, took, result);
        }
        match misdirected(&results) {
            Some(error) => Err(error),
            None => Ok(results.into_iter().map(into_result).collect()),
        }
    }

    fn admit_many(&self, operations: usize) -> Result<OwnedSemaphorePermit, ApiError> {
        let places = operations.div_ceil(OPERATIONS_PER_PLACE);
        let places = u32::try_from(places.min(self.inner.limits.requests_in_flight_max));
        let in_flight = self.inner.in_flight.clone();
        in_flight
            .try_acquire_many_owned(places.unwrap_or(u32::MAX))
            .map_err(|_| ApiError::Overloaded)
    }

    async fn write_many(
        &self,
        operations: &[&Operation],
        writes: Vec<(usize, Write)>,
        deadline: Instant,
    ) -> Vec<(usize, Result<Done, ApiError>)> {
        if writes.is_empty() {
            return Vec::new();
        }
        let (places, proposed): (Vec<_>, Vec<_>) = writes.into_iter().unzip();
        let answers = self.inner.proposer.propose(proposed, deadline).await;
        let judged = places.into_iter().zip(answers).map(|(index, answer)| {
            (index, self.judge(operations[index].key(), answer).map(Done::Written))
        });
        judged.collect()
    }

    /// Returns once this node may answer the reads from what it has applied.
    async fn confirm_reads(
        &self,
        reads: &[(usize, &Bytes)],
        consistency: Consistency,
        deadline: Instant,
    ) -> Result<(), ApiError> {
        if reads.is_empty() || consistency == Consistency::Stale {
            return Ok(());
        }
        self.await_read_index(consistency, deadline).await
    }

    /// What each of the reads comes to, if this node may answer them.
    async fn look_up_many(
        &self,
        confirmed: Result<(), ApiError>,
        reads: &[(usize, &Bytes)],
    ) -> Result<Vec<Result<Done, ApiError>>, ApiError> {
        confirmed?;
        if reads.is_empty() {
            return Ok(Vec::new());
        }
        // No more than clients take.
        let max = self.inner.limits.http_body_bytes_max.min(VALUE_BYTES_MAX);
        let keys: Vec<&[u8]> = reads.iter().map(|(_, key)| &key[..]).collect();
        let found = self.inner.reader.get_many(&keys, max).await;
        let found = found.map_err(|error| refusal::storage(error, Outcome::NotApplied))?;
        let left_out = ApiError::TooLarge { what: "answer to the whole batch", max };
        let mut found = found.into_iter();
        let results = reads.iter().map(|(_, key)| match found.next() {
            Some(Lookup::Found(record)) => Ok(Done::Read(Some(record))),
            Some(Lookup::Absent) => Ok(Done::Read(None)),
            Some(Lookup::NotHere(ring)) => Err(self.not_here(&ring, key)),
            None => Err(left_out.clone()),
        });
        Ok(results.collect())
    }

    fn record_one(
        &self,
        operation: &Operation,
        consistency: Consistency,
        took: Duration,
        result: &Result<Done, ApiError>,
    ) {
        let operation = match operation {
            Operation::Put { .. } => telemetry::Operation::Put,
            Operation::Delete { .. } => telemetry::Operation::Delete,
            Operation::Get { .. } if consistency == Consistency::Stale => {
                telemetry::Operation::GetStale
            }
            Operation::Get { .. } => telemetry::Operation::Get,
        };
        self.record(operation, took, result);
    }
}

/// The write that an operation asks for, if it is no read.
fn as_write(
    client: Option<&ClientFloor>,
    operation: &Operation,
) -> Result<Option<Write>, ApiError> {
    let write = match operation {
        Operation::Get { .. } => return Ok(None),
        Operation::Put { key, value, condition, .. } => {
            Write::put(key.clone(), value.clone(), *condition)
        }
        Operation::Delete { key, condition, .. } => Write::delete(key.clone(), *condition),
    };
    match operation.once(client) {
        Ok(once) => Ok(Some(write.once(once))),
        Err(error) => Err(ApiError::BadRequest(error.to_string())),
    }
}

/// What an operation came to that did not fail.
#[derive(Debug, Clone)]
enum Done {
    Written(Written),
    Read(Option<Record>),
}

/// The error of all operations that another node, or this one later, may do better with; nothing took
/// effect. They need not agree on the leader: it may have changed in between, and whoever is named knows.
fn misdirected(results: &[Result<Done, ApiError>]) -> Option<ApiError> {
    let first = results.first()?.as_ref().err()?;
    let is_alike = match first {
        ApiError::WrongCluster { .. } => |first: &ApiError, error: &ApiError| error == first,
        _ => |_: &ApiError, error: &ApiError| {
            matches!(
                error,
                ApiError::NotLeader { .. }
                    | ApiError::NoLeader { outcome: Outcome::NotApplied, .. }
            )
        },
    };
    let mut errors = results.iter().map(|result| result.as_ref().err());
    if !errors.clone().all(|error| error.is_some_and(|error| is_alike(first, error))) {
        return None;
    }
    let leader = errors.find(|error| matches!(error, Some(ApiError::NotLeader { .. })));
    Some(leader.flatten().unwrap_or(first).clone())
}

fn into_result(result: Result<Done, ApiError>) -> OperationResult {
    match result {
        Ok(Done::Written(Written::Put { revision })) => OperationResult::Written { revision },
        Ok(Done::Written(Written::Deleted { revision, deleted })) => {
            OperationResult::Deleted { revision, deleted }
        }
        Ok(Done::Written(other)) => unreachable!("judged to be an error: {other:?}"),
        Ok(Done::Read(Some(Record { revision, value }))) => {
            OperationResult::Found { revision, value }
        }
        Ok(Done::Read(None)) => OperationResult::Absent,
        Err(error) => OperationResult::failed(&error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn not_leader(leader: u64) -> Result<Done, ApiError> {
        let leader = RingNode { id: leader, http: "h:1".into(), rpc: "r:1".into() };
        Err(ApiError::NotLeader { leader, epoch: 4 })
    }

    fn no_leader(outcome: Outcome) -> Result<Done, ApiError> {
        Err(ApiError::NoLeader { message: "none is known", outcome })
    }

    /// A batch that met the end of a leadership is passed on or waited for as a whole, however its
    /// operations learned of it; as soon as anything may have taken effect, each is answered by itself.
    #[test]
    fn a_batch_none_of_which_was_done_is_misdirected_as_a_whole() {
        let not_applied = || no_leader(Outcome::NotApplied);
        for (results, whole) in [
            (vec![not_leader(1), not_leader(1)], Some(not_leader(1))),
            (vec![not_leader(1), not_leader(2)], Some(not_leader(1))),
            (vec![not_applied(), not_leader(2), not_applied()], Some(not_leader(2))),
            (vec![not_applied(), not_applied()], Some(not_applied())),
            (vec![not_leader(1), no_leader(Outcome::Unknown)], None),
            (vec![no_leader(Outcome::Unknown), not_leader(1)], None),
            (vec![not_leader(1), Ok(Done::Read(None))], None),
            (vec![Err(ApiError::Frozen), not_leader(1)], None),
            (vec![], None),
        ] {
            let whole = whole.map(|result| result.unwrap_err());
            assert_eq!(misdirected(&results), whole, "{results:?}");
        }
    }
}
