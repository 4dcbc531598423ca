//! What handoffs moved and how long they were frozen, out of what their drivers log when it is over.
//!
//! Nodes run in the benchmark's process, so it hears every event: no polling, which would cost the
//! clusters work and be as coarse as its interval.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tracing::field::{Field, Visit};
use tracing_subscriber::filter::{EnvFilter, LevelFilter};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;

/// The field of the driver's line that says for how long.
const FIELD: &str = "frozen_ms";

/// A handoff whose keys have moved.
#[derive(Debug, Default)]
pub struct Moved {
    /// From where to where.
    pub handoff: String,
    /// How many keys.
    pub keys: u64,
    /// How long nobody served them.
    pub frozen: Duration,
}

/// What was heard of since it was taken last.
#[derive(Clone, Default)]
pub struct Handoffs(Arc<Mutex<Vec<Moved>>>);

impl Handoffs {
    /// Listens from now on. Warnings go to stderr, or what `RUST_LOG` says.
    pub fn install() -> Self {
        let handoffs = Self::default();
        let shown = EnvFilter::try_from_default_env().unwrap_or_else(|_| "warn".into());
        let lines =
            tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_filter(shown);
        let heard = handoffs.clone().with_filter(LevelFilter::INFO);
        tracing_subscriber::registry().with(lines).with(heard).init();
        handoffs
    }

    /// The handoffs that have moved.
    pub fn take(&self) -> Vec<Moved> {
        std::mem::take(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl<S: tracing::Subscriber> Layer<S> for Handoffs {
    fn on_event(&self, event: &tracing::Event<'_>, _: Context<'_, S>) {
        if event.metadata().fields().field(FIELD).is_none() {
            return;
        }
        let mut moved = Moved::default();
        event.record(&mut moved);
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(moved);
    }
}

impl Visit for Moved {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() == "handoff" {
            self.handoff = format!("{value:?}");
        }
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        if field.name() == "keys" {
            self.keys = value;
        }
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        if field.name() == FIELD {
            self.frozen = Duration::from_secs_f64(value / 1e3);
        }
    }
}
