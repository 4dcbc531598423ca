//! The line that says how a phase is going, for a person at a terminal; nothing for anybody else.

use std::io::{self, IsTerminal, Write};
use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior, interval_at};

use super::run::Gauge;

/// How often the line changes.
const TICK: Duration = Duration::from_secs(1);

/// Writes the line until it is stopped.
#[derive(Debug)]
pub struct Progress {
    task: Option<JoinHandle<()>>,
}

impl Progress {
    /// Begins if standard error is a terminal.
    pub fn start(phase: &'static str, gauge: Arc<Gauge>) -> Self {
        let task = io::stderr().is_terminal().then(|| tokio::spawn(tell(phase, gauge)));
        Self { task }
    }

    /// Ends it and takes the line away.
    pub async fn stop(self) {
        if let Some(task) = self.task {
            task.abort();
            // Aborted, as was just asked for.
            let _ = task.await;
            write("\r\x1b[K");
        }
    }
}

async fn tell(phase: &'static str, gauge: Arc<Gauge>) {
    let begun = Instant::now();
    let mut ticks = interval_at(begun + TICK, TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut last, mut last_at) = (0, begun);
    loop {
        let now = ticks.tick().await;
        let answered = gauge.answered();
        let per_second = (answered - last) as f64 / (now - last_at).as_secs_f64();
        (last, last_at) = (answered, now);
        let (seconds, failed) = (begun.elapsed().as_secs(), gauge.failed());
        write(&format!(
            "\r\x1b[K{phase} {seconds:>4} s  {per_second:>9.0} op/s  {answered:>10} done  {failed} failed"
        ));
    }
}

fn write(text: &str) {
    let mut stderr = io::stderr().lock();
    // A terminal that is gone is no reason to stop measuring.
    let _ = stderr.write_all(text.as_bytes()).and_then(|()| stderr.flush());
}
