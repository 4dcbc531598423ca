//! Shows how far a change is, again and again: a bar that redraws itself on a terminal, a line now and
//! then elsewhere, a JSON document on each line for programs.
//!
//! All of it goes to stderr, except JSON: stdout holds the result.

use std::collections::BTreeMap;
use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use distrib_kv_store::reshard::{HandoffProgress, Holdings, Phase, Progress};
use distrib_kv_store::types::ClusterId;

use crate::text;

/// How often the bar is drawn: it moves, and does not flicker.
const BAR_EVERY: Duration = Duration::from_millis(200);

/// How often a line is written: a log of a long change stays readable.
const LINE_EVERY: Duration = Duration::from_secs(2);

/// The bar's width in characters.
const BAR_WIDTH: usize = 24;

/// How progress is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// One line that is drawn over.
    Bar,
    /// Lines.
    Lines,
    /// JSON on stdout.
    Json,
}

impl Form {
    /// What suits whoever reads stderr.
    pub fn of_stderr() -> Self {
        if io::stderr().is_terminal() { Self::Bar } else { Self::Lines }
    }
}

/// Shows progress. See the module.
pub struct Reporter {
    form: Form,
    shown_at: Option<Instant>,
    shown: Option<Progress>,
    /// When the first keys were seen, and how many: for the rate.
    begun: Option<(Instant, u64)>,
    /// What the clusters held in the beginning: for what a key of theirs takes on the disk.
    held: BTreeMap<ClusterId, Holdings>,
}

impl Reporter {
    pub fn new(form: Form, held: BTreeMap<ClusterId, Holdings>) -> Self {
        Self { form, shown_at: None, shown: None, begun: None, held }
    }

    /// Shows it, if it is time to and something is new.
    pub fn show(&mut self, progress: Option<&Progress>) {
        let Some(progress) = progress else { return };
        let every = if self.form == Form::Bar { BAR_EVERY } else { LINE_EVERY };
        let now = Instant::now();
        let (copied, _) = progress.keys();
        let (since, before) = *self.begun.get_or_insert((now, copied));
        let due = self.shown_at.is_none_or(|at| now - at >= every);
        let new = self.form == Form::Bar || self.shown.as_ref() != Some(progress);
        if !due || !new {
            return;
        }
        (self.shown_at, self.shown) = (Some(now), Some(progress.clone()));
        let rate = copied.saturating_sub(before) as f64 / (now - since).as_secs_f64().max(0.001);
        match self.form {
            // A line over the last one, and what was longer is cleared.
            Form::Bar => draw(&format!("\r{}\x1b[K", line(progress, rate, &self.held))),
            Form::Lines => text::note(&line(progress, rate, &self.held)),
            // Who does not read it any more will not miss it; the result is printed anyhow.
            Form::Json => drop(text::print_json(progress)),
        }
    }

    /// Leaves the bar's line.
    pub fn end(&mut self) {
        if self.form == Form::Bar && self.shown.take().is_some() {
            draw("\r\x1b[K");
        }
    }
}

fn draw(text: &str) {
    let mut err = io::stderr().lock();
    // Without a terminal there is nobody to show it to.
    let _ = err.write_all(text.as_bytes()).and_then(|()| err.flush());
}

/// About how many bytes on the disk of the source the copied keys take.
fn bytes(progress: &Progress, held: &BTreeMap<ClusterId, Holdings>) -> f64 {
    let of_handoff = |handoff: &HandoffProgress| {
        let held = held.get(&handoff.pair.from).copied().unwrap_or_default();
        handoff.keys_copied as f64 * held.bytes as f64 / held.keys.max(1) as f64
    };
    progress.handoffs.iter().map(of_handoff).sum()
}

/// How far a change is, in one line. `rate`: keys a second.
fn line(progress: &Progress, rate: f64, held: &BTreeMap<ClusterId, Holdings>) -> String {
    let (copied, all) = progress.keys();
    let to_delete: u64 = progress.handoffs.iter().map(|h| h.keys_to_delete).sum();
    // Before all is counted nobody knows how much of it there is, and what is called off leads nowhere.
    let is_known = progress.is_counted() && all > 0 && !progress.cancelled;
    let done = if is_known { copied as f64 / all as f64 } else { 0.0 };
    let filled = (done * BAR_WIDTH as f64) as usize;
    let bar = format!("{}{}", "#".repeat(filled), "-".repeat(BAR_WIDTH - filled.min(BAR_WIDTH)));
    let of_all =
        if progress.is_counted() { format!(" of {all} keys") } else { " keys so far".into() };
    let megabytes = bytes(progress, held) / 1e6;
    let mut line = format!("[{bar}] {copied}{of_all}, ~{megabytes:.1} MB, {rate:.0} keys/s");
    if progress.is_counted() && rate > 0.0 && copied < all {
        line += &format!(", {:.0} s left", (all - copied) as f64 / rate);
    }
    if copied == all && to_delete > 0 {
        line += &format!(", {to_delete} to delete where they were");
    }
    let frozen = progress.handoffs.iter().filter(|h| h.phase == Phase::Frozen).count();
    match frozen {
        0 => {}
        1 => line += ", 1 handoff frozen",
        _ => line += &format!(", {frozen} handoffs frozen"),
    }
    if progress.cancelled {
        line += ", being called off";
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;
    use distrib_kv_store::handoff::Pair;

    #[test]
    fn a_line_tells_keys_bytes_rate_and_time_left() {
        let (from, to): (ClusterId, ClusterId) = ("a".parse().unwrap(), "b".parse().unwrap());
        let handoff = HandoffProgress {
            pair: Pair { from: from.clone(), to },
            phase: Phase::Copying,
            attempt: 1,
            keys: Some(400),
            keys_copied: 100,
            keys_to_delete: 0,
        };
        let progress = Progress {
            from_epoch: 1,
            to_epoch: 2,
            cancelled: false,
            handoffs: vec![handoff],
            waiting_for: Vec::new(),
            finished: Vec::new(),
        };
        let held = BTreeMap::from([(from, Holdings { keys: 1000, bytes: 20_000_000 })]);
        let told = line(&progress, 50.0, &held);
        assert_eq!(
            told,
            "[######------------------] 100 of 400 keys, ~2.0 MB, 50 keys/s, 6 s left"
        );
        let cancelled = Progress { cancelled: true, ..progress.clone() };
        assert!(line(&cancelled, 50.0, &held).starts_with("[------------------------] 100 of"));
        let mut uncounted = progress;
        uncounted.handoffs[0].keys = None;
        let told = line(&uncounted, 50.0, &held);
        assert_eq!(told, "[------------------------] 100 keys so far, ~2.0 MB, 50 keys/s");
    }
}
