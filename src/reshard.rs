//! The ring changes while it serves: what a change moves, and who drives it.
//!
//! The protocol is [`crate::handoff`]; each of its steps is an entry in the log of the cluster that it
//! concerns. This module decides which step comes next, and proposes it:
//!
//! ```text
//! rings      what is asked for -> the next ring, or why there is none        pure
//! plan       two rings -> handoffs, and the share of the keys of each        pure
//! scene      what the clusters say -> where the change stands                pure
//! driver     where it stands -> the next steps                               pure
//! fate       what was seen -> what became of one change                     pure
//! progress   where it stands -> what people want to know                     pure
//! clusters   how they are asked                                              over HTTP
//! run        looks, decides, proposes, again and again                       over HTTP
//! service    in every node: a source's or a sequencer's leader runs the driver
//! request    what `admin` does: checks, begins a change, watches it
//! ```
//!
//! **Nobody keeps state that matters.** A driver may be killed at any moment, and any number of them may
//! drive at once: each reads the clusters' own states and proposes what is missing, and a step that came
//! too late or twice is answered as such. So once the sequencer has begun a change, the change goes on
//! by itself: the leader of a source drives the handoffs of its cluster, the leaders of both rings'
//! sequencers drive the rest, and take over what a source's leader leaves lying.
//!
//! What a driver does not do is copy, count or delete keys: each cluster's leader does that by itself,
//! and the driver waits for it.

mod clusters;
mod driver;
mod fate;
mod plan;
mod progress;
mod request;
mod rings;
mod run;
mod scene;
pub mod service;
#[cfg(test)]
mod simulation;
#[cfg(test)]
mod testing;

pub use clusters::{Clusters, HttpClusters};
pub use driver::{Action, Goal, Hints, next_actions};
pub use fate::{Awaited, Fate};
pub use plan::{Basis, Holdings, Plan, PlannedHandoff, estimate};
pub use progress::{HandoffProgress, Phase, Progress};
pub use request::{
    Begun, Change, ChangeError, Outlook, Survey, abort, begin, follow, holdings, outlook, survey,
};
pub use rings::{Request, RequestError, next_ring, reverted};
pub use run::{Drive, DriveError, Role};
pub use scene::{Scene, Stage, Transition, Views};
