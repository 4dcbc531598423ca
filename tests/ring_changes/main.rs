//! The ring changes, and everything goes wrong meanwhile: real processes are killed at every step of a
//! handoff and at random, steps come forged and late, and a client sleeps through it all.

#[path = "../common/mod.rs"]
mod common;

mod by_hand;
mod forged;
mod lost;
mod once;
mod random;
mod refused;
mod sleeper;

use std::time::Duration;

use tokio::sync::Mutex;

/// Settings for clusters of one node: pages are so small that copying takes several, and answers to
/// writes travel in several, too.
const SMALL_PAGES: &str = "
[storage]
block_cache_bytes = 8388608
memtable_bytes = 4194304
[reshard]
page_bytes = 1024
";

/// Callers wait for a cluster whose only node is killed again and again, and for keys that stay
/// frozen while every process is killed in turn.
const CALLER_TIMEOUT: Duration = Duration::from_secs(60);

/// Held by each story from beginning to end: two at once, each with several processes and clients, take
/// more than twice as long, and callers' deadlines do not grow with that.
static ONE_AT_A_TIME: Mutex<()> = Mutex::const_new(());
