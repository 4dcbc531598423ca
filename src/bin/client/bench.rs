//! `client bench`: puts a load on a store and says how it took it.
//!
//! One process, many closed-loop clients (what that means is at the top of `run.rs`), one kind of
//! report whoever is measured: this store through `KVClient` or by plain HTTP and, when built with the
//! feature `compare`, etcd and Redis. `scripts/compare.sh` does that for all of them in turn.
//!
//! The map: `mix` says what the clients do and `distribution` to which keys; `store` is what a load
//! needs of a store, with `library`, `plain_http` (on `keep_alive`), `etcd` and `redis` behind it; `run`
//! lets the clients work; `tally` counts, `cpu` watches processes, `summary` reports; `report` and `chart`
//! put many summaries next to each other.

use std::io::{self, Write};
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, ValueEnum};
use distrib_kv_store::client_error::ClientError;
use distrib_kv_store::kvclient::{Consistency, KVClient};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::signal::unix::{self, SignalKind, signal};
use tokio_util::sync::CancellationToken;

mod chart;
mod cpu;
mod distribution;
#[cfg(feature = "compare")]
mod etcd;
mod keep_alive;
mod library;
mod mix;
mod plain_http;
mod progress;
#[cfg(feature = "compare")]
mod protobuf;
#[cfg(feature = "compare")]
mod redis;
mod report;
mod run;
mod store;
mod summary;
mod tally;

use distribution::Distribution;
use library::Library;
use mix::Workload;
use plain_http::PlainHttp;
use report::ReportError;
pub use report::ReportFlags;
use run::{End, Measured, Plan, RunError};
use store::Store;
use summary::{Parameters, Summary, System};
use tally::Failure;

/// How long is measured unless something else is asked for.
const SECONDS_DEFAULT: f64 = 10.0;

/// The longest of the times that can be asked for: a day.
const SECONDS_MAX: f64 = 86_400.0;

/// What a program that Ctrl-C ended returns, by custom.
const EXIT_INTERRUPTED: u8 = 130;

/// Flags of `client bench`.
#[derive(Debug, Args)]
pub struct BenchFlags {
    /// What the clients do
    #[arg(long, value_enum, default_value = "mixed")]
    workload: Workload,
    /// How keys are spread [default: uniform; YCSB's own for a to f]
    #[arg(long, value_enum)]
    distribution: Option<Distribution>,
    /// How many work at once; each has one operation in flight
    #[arg(long, default_value = "16", value_name = "N",
          value_parser = clap::value_parser!(u32).range(1..=100_000))]
    clients: u32,
    /// How many keys there are at first
    #[arg(long, default_value = "100000", value_name = "N",
          value_parser = clap::value_parser!(u64).range(1..=1_000_000_000))]
    keys: u64,
    /// The size of each value
    #[arg(long, default_value = "100", value_name = "N",
          value_parser = clap::value_parser!(u32).range(0..=64 << 20))]
    value_bytes: u32,
    /// How long to measure; 0 only with --load, to do nothing else [default: 10]
    #[arg(long, value_name = "S", value_parser = seconds, conflicts_with = "operations")]
    seconds: Option<Duration>,
    /// How many operations to measure instead; 0 only with --load
    #[arg(long, value_name = "N")]
    operations: Option<u64>,
    /// How long to work before that, unmeasured
    #[arg(long, default_value = "1", value_name = "S", value_parser = seconds)]
    warmup_seconds: Duration,
    /// Of reads
    #[arg(long, value_enum, default_value = "linearizable")]
    consistency: ReadConsistency,
    /// Through KVClient, or one HTTP request for each operation
    #[arg(long, value_enum, default_value = "kvclient")]
    mode: Mode,
    /// What is measured; etcd and redis take --endpoints and need the cargo feature `compare`
    #[arg(long, value_enum, default_value = "kv")]
    target: Target,
    /// Whom to ask by http and etcd: whoever leads, or the given nodes by turns
    #[arg(long, value_enum, default_value = "leader")]
    ask: Ask,
    /// etcd, redis: connections that the clients share; 0 gives each one of its own
    #[arg(long, value_name = "N", default_value = "0",
          value_parser = clap::value_parser!(u32).range(0..=10_000))]
    connections: u32,
    /// Write all keys first
    #[arg(long)]
    load: bool,
    /// Of all that is random: the same seed, the same operations
    #[arg(long, default_value = "1", value_name = "N")]
    seed: u64,
    /// Threads of the load program itself [default: one for each core]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=256))]
    threads: Option<u32>,
    /// Processes whose CPU time is reported, the store's for example
    #[arg(long, value_name = "PID,...", value_delimiter = ',')]
    cpu_of: Vec<u32>,
    /// Report one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum ReadConsistency {
    /// As new as the last acknowledged write
    Linearizable,
    /// Any node's own state
    Stale,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Mode {
    /// The library's client, shared by all
    Kvclient,
    /// Plain HTTP, a connection for each client
    Http,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Target {
    /// This store
    Kv,
    /// etcd 3 over gRPC
    Etcd,
    /// One Redis
    Redis,
}

/// Whom to ask.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Ask {
    /// Whoever leads
    Leader,
    /// The given nodes, by turns
    Given,
}

/// Why a load could not be put on a store.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// The nodes of this store cannot be found.
    #[error("{0}")]
    Client(#[from] ClientError),
    /// Those of another.
    #[error("cannot connect: {0}")]
    Connect(#[from] Failure),
    /// The load did not get as far as the measurement.
    #[error("{0}")]
    Run(#[from] RunError),
    /// What was asked for makes no sense.
    #[error("{0}")]
    Usage(String),
    /// Not one operation was answered.
    #[error("not one operation was answered")]
    NothingAnswered,
    /// The system lets nobody wait for Ctrl-C.
    #[error("cannot wait for Ctrl-C: {0}")]
    Signal(io::Error),
    /// Runs cannot be put next to each other.
    #[error("{0}")]
    Report(#[from] ReportError),
    /// The report cannot be written.
    #[error("cannot write to stdout: {0}")]
    Stdout(io::Error),
}

impl BenchError {
    /// What the program returns.
    pub fn exit_code(&self) -> ExitCode {
        ExitCode::from(match self {
            Self::Usage(_) => 2,
            Self::Run(RunError::Interrupted) => EXIT_INTERRUPTED,
            _ => 1,
        })
    }
}

impl BenchFlags {
    /// How many threads the load program asks for.
    pub fn threads(&self) -> usize {
        let cores = || std::thread::available_parallelism().map_or(1, usize::from);
        self.threads.map_or_else(cores, |threads| threads as usize)
    }

    fn plan(&self) -> Plan {
        let seconds = Duration::from_secs_f64(SECONDS_DEFAULT);
        Plan {
            workload: self.workload,
            distribution: self.distribution.unwrap_or(self.workload.distribution()),
            clients: self.clients as usize,
            keys: self.keys,
            value_bytes: self.value_bytes as usize,
            load: self.load,
            warmup: self.warmup_seconds,
            end: self
                .operations
                .map_or(End::After(self.seconds.unwrap_or(seconds)), End::Operations),
            seed: self.seed,
            cpu_of: self.cpu_of.clone(),
        }
    }

    fn consistency(&self) -> Consistency {
        match self.consistency {
            ReadConsistency::Linearizable => Consistency::Linearizable,
            ReadConsistency::Stale => Consistency::Stale,
        }
    }

    fn system(&self) -> System {
        match (self.target, self.mode) {
            (Target::Kv, Mode::Kvclient) => System::Kvclient,
            (Target::Kv, Mode::Http) => System::Http,
            (Target::Etcd, _) => System::Etcd,
            (Target::Redis, _) => System::Redis,
        }
    }

    /// What clap cannot see.
    fn check(&self, endpoints: &[String]) -> Result<(), BenchError> {
        let usage = |message: &str| Err(BenchError::Usage(message.to_owned()));
        if self.plan().end.is_at_once() && !self.load {
            return usage(
                "--seconds 0 and --operations 0 measure nothing: they need --load, which then is all that is done",
            );
        }
        if self.target == Target::Kv {
            return Ok(());
        }
        if cfg!(not(feature = "compare")) {
            return usage(
                "this client knows no etcd and no Redis; build it with --features compare",
            );
        }
        if endpoints.is_empty() {
            return usage("--target etcd and redis need --endpoints");
        }
        if self.target == Target::Redis && endpoints.len() > 1 {
            return usage("--target redis takes one endpoint");
        }
        if self.workload == Workload::F {
            return usage("workload f is for --target kv only");
        }
        Ok(())
    }
}

/// A time in seconds, as `2` or `0.5`.
fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| "a number of seconds is needed".to_owned())?;
    if !(0.0..=SECONDS_MAX).contains(&seconds) {
        return Err(format!("between 0 and {SECONDS_MAX} seconds, please"));
    }
    Ok(Duration::from_secs_f64(seconds))
}

/// Measures and reports. `connect` finds this store when that is what is measured.
pub async fn bench(
    flags: BenchFlags,
    endpoints: Vec<String>,
    connect: impl Future<Output = Result<KVClient, ClientError>>,
) -> Result<ExitCode, BenchError> {
    flags.check(&endpoints)?;
    raise_open_files_limit();
    let stop = CancellationToken::new();
    let interrupts = signal(SignalKind::interrupt()).map_err(BenchError::Signal)?;
    tokio::spawn(stop_by_ctrl_c(interrupts, stop.clone()));
    let consistency = flags.consistency();
    let measured = match (flags.target, flags.mode) {
        (Target::Kv, Mode::Kvclient) => {
            let client = connect.await?;
            measure(&Library { client, consistency }, &flags, &stop).await?
        }
        (Target::Kv, Mode::Http) => {
            let http = PlainHttp::find(&connect.await?, endpoints, flags.ask, consistency).await?;
            measure(&http, &flags, &stop).await?
        }
        (Target::Etcd | Target::Redis, _) => measure_peer(&flags, &endpoints, &stop).await?,
    };
    let (threads, connections) = (flags.threads(), flags.connections as usize);
    let parameters =
        Parameters::new(&flags.plan(), flags.system(), consistency, threads, connections);
    let summary = Summary::new(parameters, !flags.cpu_of.is_empty(), &measured);
    tell(&summary, flags.json)?;
    if summary.interrupted {
        return Ok(ExitCode::from(EXIT_INTERRUPTED));
    }
    if summary.outcomes.answered() == 0 && !flags.plan().end.is_at_once() {
        return Err(BenchError::NothingAnswered);
    }
    Ok(ExitCode::SUCCESS)
}

async fn measure<S: Store>(
    store: &S,
    flags: &BenchFlags,
    stop: &CancellationToken,
) -> Result<Measured, BenchError> {
    Ok(run::run(store, &flags.plan(), stop).await?)
}

#[cfg(feature = "compare")]
async fn measure_peer(
    flags: &BenchFlags,
    endpoints: &[String],
    stop: &CancellationToken,
) -> Result<Measured, BenchError> {
    let connections = flags.connections as usize;
    if flags.target == Target::Redis {
        let redis = redis::Redis::connect(&endpoints[0], connections).await?;
        return measure(&redis, flags, stop).await;
    }
    let connections = if connections == 0 { flags.clients as usize } else { connections };
    let etcd = etcd::Etcd::connect(endpoints, flags.ask, connections, flags.consistency()).await?;
    measure(&etcd, flags, stop).await
}

#[cfg(not(feature = "compare"))]
async fn measure_peer(
    _flags: &BenchFlags,
    _endpoints: &[String],
    _stop: &CancellationToken,
) -> Result<Measured, BenchError> {
    unreachable!("the flags were checked")
}

/// Puts the runs in a file next to each other.
pub fn bench_report(flags: &ReportFlags) -> Result<(), BenchError> {
    print(&report::report(flags)?)
}

fn print(text: &str) -> Result<(), BenchError> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).map_err(BenchError::Stdout)
}

fn tell(summary: &Summary, json: bool) -> Result<(), BenchError> {
    let text = if json {
        let object = serde_json::to_string(summary);
        object.expect("numbers and fixed words are always JSON") + "\n"
    } else {
        summary.to_string()
    };
    print(&text)
}

/// The first Ctrl-C ends the measurement; a second one ends the program.
async fn stop_by_ctrl_c(mut interrupts: unix::Signal, stop: CancellationToken) {
    interrupts.recv().await;
    stop.cancel();
    interrupts.recv().await;
    std::process::exit(i32::from(EXIT_INTERRUPTED));
}

/// Each client of plain HTTP holds a file open, and the usual limit is 1024.
fn raise_open_files_limit() {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    // If it cannot be raised, those that are too many fail to connect and say why.
    let _ = setrlimit(Resource::Nofile, raised);
}
