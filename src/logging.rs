//! Where programs log, and how much.

use std::env::VarError;
use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

/// Logs to standard error from now on: as `RUST_LOG` says, or by `default` without it. To be called once.
///
/// A `RUST_LOG` that is not understood is said, and `default` holds: it is often there for other programs,
/// and no reason not to serve.
pub fn to_stderr(program: &str, default: &str) {
    let filter = match std::env::var(EnvFilter::DEFAULT_ENV) {
        Ok(directives) => EnvFilter::try_new(directives).map_err(|error| error.to_string()),
        Err(VarError::NotPresent) => Ok(default.into()),
        Err(error) => Err(error.to_string()),
    };
    let filter = filter.unwrap_or_else(|error| {
        // Before anything is logged, which could not say it.
        eprintln!("{program}: RUST_LOG is not understood, and `{default}` holds: {error}");
        default.into()
    });
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
}
