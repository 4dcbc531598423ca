//! How long handoffs were frozen, out of what their drivers log when it is over.
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

/// The times heard of since they were taken last.
#[derive(Clone, Default)]
pub struct FrozenTimes(Arc<Mutex<Vec<(String, Duration)>>>);

impl FrozenTimes {
    /// Listens from now on. Warnings go to stderr, or what `RUST_LOG` says.
    pub fn install() -> Self {
        let times = Self::default();
        let shown = EnvFilter::try_from_default_env().unwrap_or_else(|_| "warn".into());
        let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_filter(shown);
        let heard = times.clone().with_filter(LevelFilter::INFO);
        tracing_subscriber::registry().with(lines).with(heard).init();
        times
    }

    /// The handoffs that were frozen, and how long.
    pub fn take(&self) -> Vec<(String, Duration)> {
        std::mem::take(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl<S: tracing::Subscriber> Layer<S> for FrozenTimes {
    fn on_event(&self, event: &tracing::Event<'_>, _: Context<'_, S>) {
        if event.metadata().fields().field(FIELD).is_none() {
            return;
        }
        let mut found = Found::default();
        event.record(&mut found);
        let time = Duration::from_secs_f64(found.frozen_ms / 1e3);
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push((found.handoff, time));
    }
}

#[derive(Default)]
struct Found {
    handoff: String,
    frozen_ms: f64,
}

impl Visit for Found {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() == "handoff" {
            self.handoff = format!("{value:?}");
        }
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        if field.name() == FIELD {
            self.frozen_ms = value;
        }
    }
}
