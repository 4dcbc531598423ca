//! The line that says how a phase is going: drawn over every second for a person at a terminal, and
//! written now and then for a log, so that whoever reads it sees that a long load is alive.
//!
//! All of it goes to standard error: standard output holds the report.

use std::io::{self, IsTerminal, Write};
use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior, interval_at};

use super::run::Gauge;

/// How often the line at a terminal changes.
const DRAWN_EVERY: Duration = Duration::from_secs(1);

/// How often a line is written elsewhere: phases of the usual length write none, and a log of an hour
/// stays readable.
const WRITTEN_EVERY: Duration = Duration::from_secs(10);

/// Tells until it is stopped.
#[derive(Debug)]
pub struct Progress {
    task: JoinHandle<()>,
    form: Form,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    /// One line that is drawn over.
    Drawn,
    /// Lines.
    Written,
}

impl Progress {
    /// Begins to tell of a phase that makes `of` operations, if that is known.
    pub fn start(phase: &'static str, of: Option<u64>, gauge: Arc<Gauge>) -> Self {
        let form = if io::stderr().is_terminal() { Form::Drawn } else { Form::Written };
        Self { task: tokio::spawn(tell(phase, of, gauge, form)), form }
    }

    /// Ends it and takes the line at a terminal away.
    pub async fn stop(self) {
        self.task.abort();
        // Aborted, as was just asked for.
        let _ = self.task.await;
        if self.form == Form::Drawn {
            write("\r\x1b[K");
        }
    }
}

async fn tell(phase: &'static str, of: Option<u64>, gauge: Arc<Gauge>, form: Form) {
    let begun = Instant::now();
    let every = match form {
        Form::Drawn => DRAWN_EVERY,
        Form::Written => WRITTEN_EVERY,
    };
    let mut ticks = interval_at(begun + every, every);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut last, mut last_at) = (0, begun);
    loop {
        let now = ticks.tick().await;
        let answered = gauge.answered();
        let per_second = (answered - last) as f64 / (now - last_at).as_secs_f64();
        (last, last_at) = (answered, now);
        let (seconds, failed) = (begun.elapsed().as_secs(), gauge.failed());
        let of = of.map_or(String::new(), |all| format!(" of {all}"));
        write(&match form {
            Form::Drawn => format!(
                "\r\x1b[K{phase} {seconds:>4} s  {per_second:>9.0} op/s  {answered:>10}{of} done  {failed} failed"
            ),
            Form::Written => format!(
                "{phase}: {answered}{of} done after {seconds} s, {per_second:.0} op/s, {failed} failed\n"
            ),
        });
    }
}

fn write(text: &str) {
    let mut stderr = io::stderr().lock();
    // Without anybody to tell there is no reason to stop measuring.
    let _ = stderr.write_all(text.as_bytes()).and_then(|()| stderr.flush());
}
