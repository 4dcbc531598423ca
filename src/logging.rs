//! Where programs log, and how much.

use std::env::VarError;
use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

/// Logs to standard error from now on: as `RUST_LOG` says, or by `default` without it. To be called once.
///
/// A `RUST_LOG` that is not understood is logged as a warning, which `default` has to let through and then holds: that
/// variable is often there for other programs, and no reason not to serve.
pub fn to_stderr(default: &str) {
    let filter = match std::env::var(EnvFilter::DEFAULT_ENV) {
        Ok(directives) => EnvFilter::try_new(directives).map_err(|error| error.to_string()),
        Err(VarError::NotPresent) => Ok(default.into()),
        Err(error) => Err(error.to_string()),
    };
    let (filter, error) = match filter {
        Ok(filter) => (filter, None),
        Err(error) => (default.into(), Some(error)),
    };
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    if let Some(error) = error {
        tracing::warn!(error, default, "RUST_LOG is not understood, and the default holds");
    }
}
