//! Shows how far a change is, again and again: a bar that redraws itself on a terminal, a line now and
//! then elsewhere, a JSON document on each line for programs.
//!
//! All of it goes to stderr, except JSON: stdout holds the result.
//!
//! A bar that is there never goes back, whatever the counts do: an attempt begins again, a cluster does not
//! answer for a moment, clients write more keys. The numbers beside it are those of the moment. Where nobody
//! knows how much there is to do, a word stands in its place.

use std::collections::BTreeMap;
use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use distrib_kv_store::reshard::{HandoffProgress, Holdings, Phase, Progress};
use distrib_kv_store::types::{ClusterId, Epoch};

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
    bar: Bar,
    /// What the clusters held in the beginning: for what a key of theirs takes on the disk.
    held: BTreeMap<ClusterId, Holdings>,
}

impl Reporter {
    pub fn new(form: Form, held: BTreeMap<ClusterId, Holdings>) -> Self {
        Self { form, shown_at: None, shown: None, begun: None, bar: Bar::default(), held }
    }

    /// Shows it, if it is time to and something is new.
    pub fn show(&mut self, progress: Option<&Progress>) {
        let Some(progress) = progress else { return };
        let every = if self.form == Form::Bar { BAR_EVERY } else { LINE_EVERY };
        let now = Instant::now();
        let (copied, _) = progress.keys();
        // What is copied again counts from its beginning.
        let begun = self.begun.filter(|(_, before)| *before <= copied);
        let (since, before) = *self.begun.insert(begun.unwrap_or((now, copied)));
        let bar = self.bar.of(progress);
        let due = self.shown_at.is_none_or(|at| now - at >= every);
        let new = self.form == Form::Bar || self.shown.as_ref() != Some(progress);
        if !due || !new {
            return;
        }
        (self.shown_at, self.shown) = (Some(now), Some(progress.clone()));
        let rate = copied.saturating_sub(before) as f64 / (now - since).as_secs_f64().max(0.001);
        match self.form {
            // A line over the last one, and what was longer is cleared.
            Form::Bar => draw(&format!("\r{bar} {}\x1b[K", line(progress, rate, &self.held))),
            Form::Lines => text::note(&format!("{bar} {}", line(progress, rate, &self.held))),
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

/// The bar, or a word in its place.
#[derive(Debug, Default)]
struct Bar {
    /// The change that is shown, and the largest part of it that was: a bar does not go back.
    shown: Option<(Epoch, f64)>,
}

impl Bar {
    fn of(&mut self, progress: &Progress) -> String {
        self.shown = self.shown.filter(|(epoch, _)| *epoch == progress.to_epoch);
        if progress.cancelled {
            // It leads nowhere any more.
            return Self::word("calling off");
        }
        if is_deleting(progress) {
            self.shown = Some((progress.to_epoch, 1.0));
            return Self::word("copied, deleting");
        }
        let (copied, all) = progress.keys();
        let before = self.shown.map(|(_, done)| done);
        let now = (progress.is_counted() && all > 0).then(|| copied as f64 / all as f64);
        let Some(done) = before.into_iter().chain(now).reduce(f64::max) else {
            return Self::word(if progress.is_counted() { "no keys yet" } else { "counting" });
        };
        self.shown = Some((progress.to_epoch, done));
        let filled = ((done * BAR_WIDTH as f64) as usize).min(BAR_WIDTH);
        format!("[{}{}]", "#".repeat(filled), "-".repeat(BAR_WIDTH - filled))
    }

    fn word(word: &str) -> String {
        format!("[{word:^BAR_WIDTH$}]")
    }
}

/// Whether all is where it belongs, and old copies are left.
fn is_deleting(progress: &Progress) -> bool {
    let (copied, all) = progress.keys();
    progress.is_counted() && copied == all && to_delete(progress) > 0
}

fn to_delete(progress: &Progress) -> u64 {
    progress.handoffs.iter().map(|handoff| handoff.keys_to_delete).sum()
}

/// How far a change is, in numbers. `rate`: keys a second.
fn line(progress: &Progress, rate: f64, held: &BTreeMap<ClusterId, Holdings>) -> String {
    let (copied, all) = progress.keys();
    let of_all =
        if progress.is_counted() { format!(" of {all} keys") } else { " keys so far".into() };
    let megabytes = bytes(progress, held) / 1e6;
    let mut line = format!("{copied}{of_all}, ~{megabytes:.1} MB");
    if is_deleting(progress) {
        line += &format!(", {} to delete where they were", to_delete(progress));
    } else {
        line += &format!(", {rate:.0} keys/s");
    }
    if progress.is_counted() && rate > 0.0 && copied < all && !progress.cancelled {
        line += &format!(", {:.0} s left", (all - copied) as f64 / rate);
    }
    let attempt = progress.handoffs.iter().map(|handoff| handoff.attempt).max().unwrap_or(0);
    if attempt > 1 {
        line += &format!(", attempt {attempt}");
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

    /// One handoff from `a` to `b`.
    fn progress(keys: Option<u64>, keys_copied: u64, keys_to_delete: u64) -> Progress {
        let (from, to) = ("a".parse().unwrap(), "b".parse().unwrap());
        let (pair, phase) = (Pair { from, to }, Phase::Copying);
        let handoff =
            HandoffProgress { pair, phase, attempt: 1, keys, keys_copied, keys_to_delete };
        Progress {
            from_epoch: 1,
            to_epoch: 2,
            cancelled: false,
            handoffs: vec![handoff],
            waiting_for: Vec::new(),
            finished: Vec::new(),
        }
    }

    #[test]
    fn a_line_tells_keys_bytes_rate_and_time_left() {
        let held = Holdings { keys: 1000, bytes: 20_000_000 };
        let held = BTreeMap::from([("a".parse().unwrap(), held)]);
        let told = |progress: &Progress| line(progress, 50.0, &held);
        let copying = progress(Some(400), 100, 0);
        assert_eq!(told(&copying), "100 of 400 keys, ~2.0 MB, 50 keys/s, 6 s left");
        let cancelled = Progress { cancelled: true, ..copying.clone() };
        let expected = "100 of 400 keys, ~2.0 MB, 50 keys/s, being called off";
        assert_eq!(told(&cancelled), expected);
        assert_eq!(told(&progress(None, 100, 0)), "100 keys so far, ~2.0 MB, 50 keys/s");
        let deleting = progress(Some(400), 400, 300);
        assert_eq!(told(&deleting), "400 of 400 keys, ~8.0 MB, 300 to delete where they were");
        let mut again = copying;
        again.handoffs[0].attempt = 2;
        let expected = "100 of 400 keys, ~2.0 MB, 50 keys/s, 6 s left, attempt 2";
        assert_eq!(told(&again), expected);
    }

    #[test]
    fn a_bar_never_goes_back_and_a_word_stands_where_there_is_none() {
        let mut bar = Bar::default();
        for (keys, copied, to_delete, shown) in [
            (None, 0, 0, "[        counting        ]"),
            (None, 90, 0, "[        counting        ]"),
            (Some(0), 0, 0, "[      no keys yet       ]"),
            (Some(400), 100, 0, "[######------------------]"),
            // Clients have written keys, a cluster does not answer, the next attempt begins.
            (Some(800), 100, 0, "[######------------------]"),
            (None, 0, 0, "[######------------------]"),
            (Some(400), 0, 200, "[######------------------]"),
            (Some(400), 200, 0, "[############------------]"),
            (Some(400), 400, 400, "[    copied, deleting    ]"),
            (None, 0, 0, "[########################]"),
            (Some(400), 400, 0, "[########################]"),
        ] {
            assert_eq!(bar.of(&progress(keys, copied, to_delete)), shown, "{keys:?} {copied}");
        }
        let cancelled = Progress { cancelled: true, ..progress(Some(400), 400, 0) };
        assert_eq!(bar.of(&cancelled), "[      calling off       ]");
        let next = Progress { to_epoch: 3, ..progress(Some(400), 100, 0) };
        assert_eq!(bar.of(&next), "[######------------------]");
    }
}
