//! Whether Raft's core task has ended, also by a panic.
//!
//! A core that stops, or whose storage fails, says so in its last report. One that panics says nothing: its last
//! report stands, perhaps that of a leader, for as long as anybody looks. What tells is that nobody is left who could
//! report.

use futures_util::FutureExt;
use openraft::async_runtime::WatchReceiver;
use openraft::errors::Fatal;

use crate::node::Raft;
use crate::types::TypeConfig;

/// Why the core has ended, if it has. Costs more than a look at its metrics: a receiver of its own.
pub(crate) fn failure(raft: &Raft) -> Option<Fatal<TypeConfig>> {
    let mut reports = raft.metrics();
    reports.borrow_and_update();
    // In this order: who goes in order reports that first.
    let is_over = matches!(reports.changed().now_or_never(), Some(Err(_)));
    let last = reports.borrow_watched().running_state.clone().err();
    last.or(is_over.then_some(Fatal::Panicked))
}

/// Resolves when the core has ended; what it did not report by then it never will. Wakes up with each change of the
/// leader or the membership, which are rare; other metrics change with every write. Cancel safe.
pub(crate) async fn ended(raft: &Raft) {
    let mut reports = raft.server_metrics();
    while reports.changed().await.is_ok() {}
}
