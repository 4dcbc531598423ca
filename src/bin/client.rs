//! `client`: reads and writes a running store from the command line.
//!
//! Flags in, one call of [`KVClient`], and an exit code that a script can act on. What was asked for
//! goes to stdout, raw and alone; everything else is one line on stderr. `bench` makes many calls.
#![deny(missing_docs, unsafe_code)]
#![warn(clippy::unwrap_used)]
#![cfg_attr(test, allow(clippy::unwrap_used))]

use std::env::VarError;
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::io::{self, Read, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use bytes::Bytes;
use clap::{Parser, Subcommand};
use distrib_kv_store::client_error::ClientError;
use distrib_kv_store::kvclient::{Consistency, Endpoints, KVClient};
use distrib_kv_store::network::error::Outcome;
use distrib_kv_store::types::{Condition, Revision};
use tokio::runtime::{Builder, Runtime};
use tokio::time::Instant;

// Not `bin/bench.rs`, which would be a program of its own.
#[path = "client/bench.rs"]
mod bench;

use bench::{BenchError, BenchFlags, ReportFlags};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Where `admin` leaves the addresses, unless told otherwise.
const NODES_FILE_DEFAULT: &str = "all_nodes.json";

/// Used when neither `--endpoints` nor `--nodes-file` is given.
const ENDPOINTS_VARIABLE: &str = "KV_ENDPOINTS";

/// The largest value read from stdin: the largest that a store can be configured to take.
const STDIN_BYTES_MAX: u64 = 64 << 20;

/// How much of a key a message shows: enough to know it by, on one line.
const KEY_SHOWN_CHARS_MAX: usize = 64;

/// How long the demo waits for a follower to have what was just written. It usually takes a few
/// milliseconds.
const DEMO_STALE_WAIT: Duration = Duration::from_secs(2);

/// The pause between two looks at the follower.
const DEMO_STALE_PAUSE: Duration = Duration::from_millis(20);

/// Reads and writes a running store. Without a command: a short demo.
#[derive(Debug, Parser)]
#[command(
    name = "client",
    version,
    after_help = "Exit codes: 0 done, 1 error, 2 usage, 3 not found, 4 condition failed, \
                  5 outcome unknown (the write may or may not take effect)."
)]
struct Cli {
    /// The clusters' addresses [default: all_nodes.json]
    #[arg(long, global = true, value_name = "FILE")]
    nodes_file: Option<PathBuf>,
    /// Addresses of some nodes instead of a file [env: KV_ENDPOINTS]
    #[arg(
        long,
        global = true,
        value_name = "HOST:PORT,...",
        value_delimiter = ',',
        conflicts_with = "nodes_file"
    )]
    endpoints: Vec<String>,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Write the raw value of a key to stdout.
    Get {
        /// The key; behind `--` if it begins with `-` and is no number.
        #[arg(allow_negative_numbers = true)]
        key: OsString,
        /// Ask any node; the value may be old.
        #[arg(long)]
        stale: bool,
    },
    /// Store a value and print its revision.
    Put {
        /// The key; behind `--` if it begins with `-` and is no number.
        #[arg(allow_negative_numbers = true)]
        key: OsString,
        /// The value; `-` reads it from stdin. May begin with `-`; behind `--` if it is an option's name.
        #[arg(allow_hyphen_values = true)]
        value: OsString,
        /// Only if the key is at this revision.
        #[arg(long, value_name = "REVISION", conflicts_with = "if_absent")]
        if_match: Option<Revision>,
        /// Only if the key does not exist.
        #[arg(long)]
        if_absent: bool,
    },
    /// Remove a key and print the revision. Exit 3 when there was nothing to remove.
    Del {
        /// The key; behind `--` if it begins with `-` and is no number.
        #[arg(allow_negative_numbers = true)]
        key: OsString,
        /// Only if the key is at this revision.
        #[arg(long, value_name = "REVISION")]
        if_match: Option<Revision>,
    },
    /// Print for each key the cluster that owns it and its nodes.
    Route {
        /// The keys; behind `--` if one begins with `-` and is no number.
        #[arg(required = true, allow_negative_numbers = true)]
        keys: Vec<OsString>,
    },
    /// Put a load on a store and say how it took it.
    ///
    /// Clients work in a closed loop: each sends its next operation when the last is answered. The
    /// workloads a to f are YCSB's; the scans of e are multi-gets of 1 to 100 keys, because the store
    /// has no scans. Ctrl-C reports what was measured so far, and exits with 130.
    Bench(Box<BenchFlags>),
    /// Put the results of many runs next to each other.
    #[command(hide = true)]
    BenchReport(ReportFlags),
}

/// What was to be done to which key, as messages name it: `put` of a key that may hold any bytes, and
/// thousands of them.
#[derive(Debug, Clone)]
struct About {
    verb: &'static str,
    key: String,
}

impl About {
    fn new(verb: &'static str, key: &OsStr) -> Self {
        let text = String::from_utf8_lossy(key.as_bytes());
        // What moves a terminal's cursor must not come out of a key.
        let shown = |c: char| match c.is_control() {
            true => c.escape_default().to_string(),
            false => c.to_string(),
        };
        let mut key: String = text.chars().take(KEY_SHOWN_CHARS_MAX).map(shown).collect();
        if text.chars().nth(KEY_SHOWN_CHARS_MAX).is_some() {
            key += "...";
        }
        Self { verb, key }
    }

    fn failed(self) -> impl FnOnce(ClientError) -> Failure {
        move |error| Failure::Operation { about: self, error }
    }
}

impl fmt::Display for About {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} `{}`", self.verb, self.key)
    }
}

/// What ends the program with something other than 0.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("{given_by}: {message}")]
    Usage { given_by: &'static str, message: String },
    #[error("{0}")]
    Client(#[from] ClientError),
    #[error("{about}: {error}")]
    Operation { about: About, error: ClientError },
    #[error("cannot read the value from stdin: {0}")]
    Stdin(io::Error),
    #[error("the value on stdin is larger than {STDIN_BYTES_MAX} bytes")]
    StdinTooLarge,
    #[error("cannot write to stdout: {0}")]
    Stdout(io::Error),
    #[error(
        "{about}: the write took effect at revision {revision}, but that cannot be written to stdout: {error}"
    )]
    RevisionNotShown { about: About, revision: Revision, error: io::Error },
    #[error("cannot start: {0}")]
    Runtime(io::Error),
    #[error("{0}: not found")]
    NotFound(About),
    #[error("{0}")]
    Bench(#[from] BenchError),
}

impl Failure {
    fn exit_code(&self) -> ExitCode {
        let code = match self {
            Self::Usage { .. } => 2,
            Self::Bench(error) => return error.exit_code(),
            Self::NotFound(_) => 3,
            Self::Operation { error: ClientError::ConditionFailed { .. }, .. } => 4,
            Self::Operation { error, .. } | Self::Client(error)
                if error.outcome() == Outcome::Unknown =>
            {
                5
            }
            _ => 1,
        };
        ExitCode::from(code)
    }
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let ended = runtime(&cli).map_err(Failure::Runtime).and_then(|runtime| {
        let ended = runtime.block_on(run(cli));
        // Whatever still waits for an answer nobody will read.
        runtime.shutdown_background();
        ended
    });
    match ended {
        Ok(code) => code,
        // Whoever reads has seen enough, as in `client get key | head -c 1`.
        Err(
            Failure::Stdout(error)
            | Failure::RevisionNotShown { error, .. }
            | Failure::Bench(BenchError::Stdout(error)),
        ) if error.kind() == io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(failure) => {
            let line = failure.to_string().replace(['\n', '\r'], " ");
            // Without stderr there is nobody left to tell; the exit code still does.
            let _ = writeln!(io::stderr(), "client: {line}");
            failure.exit_code()
        }
    }
}

/// One thread does for single operations; a load asks for what it needs.
fn runtime(cli: &Cli) -> io::Result<Runtime> {
    let threads = match &cli.command {
        Some(Command::Bench(flags)) => flags.threads(),
        _ => 1,
    };
    let mut builder = match threads {
        1 => Builder::new_current_thread(),
        _ => Builder::new_multi_thread(),
    };
    builder.worker_threads(threads).enable_all().build()
}

async fn run(cli: Cli) -> Result<ExitCode, Failure> {
    let endpoints = cli.endpoints.clone();
    let client = connect(start(cli.nodes_file, cli.endpoints)?);
    match cli.command {
        None => demo(&client.await?).await?,
        Some(Command::Get { key, stale }) => get(&client.await?, key, stale).await?,
        Some(Command::Put { key, value, if_match, if_absent }) => {
            // Before connecting: a value that cannot be read needs no cluster.
            let value = value_or_stdin(value)?;
            put(&client.await?, key, value, condition(if_match, if_absent)).await?;
        }
        Some(Command::Del { key, if_match }) => {
            del(&client.await?, key, condition(if_match, false)).await?;
        }
        Some(Command::Route { keys }) => route(&client.await?, keys).await?,
        Some(Command::Bench(flags)) => return Ok(bench::bench(*flags, endpoints, client).await?),
        Some(Command::BenchReport(flags)) => bench::bench_report(&flags)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Where the nodes are listed.
enum Start {
    File(PathBuf),
    Endpoints(Endpoints),
}

/// What the command line names goes before the environment, and that before the default file.
fn start(nodes_file: Option<PathBuf>, endpoints: Vec<String>) -> Result<Start, Failure> {
    if !endpoints.is_empty() {
        return checked("--endpoints", endpoints.iter().map(String::as_str));
    }
    if let Some(path) = nodes_file {
        return Ok(Start::File(path));
    }
    match std::env::var(ENDPOINTS_VARIABLE) {
        Ok(list) if !list.trim().is_empty() => checked(ENDPOINTS_VARIABLE, list.split(',')),
        Ok(_) | Err(VarError::NotPresent) => Ok(Start::File(NODES_FILE_DEFAULT.into())),
        Err(error) => Err(Failure::Usage {
            given_by: ENDPOINTS_VARIABLE,
            message: error.to_string().escape_default().to_string(),
        }),
    }
}

fn checked<'a>(
    given_by: &'static str,
    nodes: impl Iterator<Item = &'a str>,
) -> Result<Start, Failure> {
    let nodes: Vec<String> = nodes.map(|node| node.trim().to_owned()).collect();
    let endpoints = Endpoints::Flat(nodes);
    match endpoints.check() {
        Ok(()) => Ok(Start::Endpoints(endpoints)),
        Err(message) => Err(Failure::Usage { given_by, message }),
    }
}

async fn connect(start: Start) -> Result<KVClient, ClientError> {
    match start {
        Start::File(path) => KVClient::new(path).await,
        Start::Endpoints(endpoints) => KVClient::from_endpoints(endpoints).await,
    }
}

async fn get(client: &KVClient, key: OsString, stale: bool) -> Result<(), Failure> {
    let consistency = if stale { Consistency::Stale } else { Consistency::Linearizable };
    let about = About::new("get", &key);
    match client.get(key.as_bytes(), consistency).await {
        Ok(Some(record)) => print(&record.value),
        Ok(None) => Err(Failure::NotFound(about)),
        Err(error) => Err(Failure::Operation { about, error }),
    }
}

async fn put(
    client: &KVClient,
    key: OsString,
    value: Vec<u8>,
    condition: Condition,
) -> Result<(), Failure> {
    let about = About::new("put", &key);
    let written = client.write_if(key.as_bytes(), value, condition).await;
    print_revision(written.map_err(about.clone().failed())?, about)
}

async fn del(client: &KVClient, key: OsString, condition: Condition) -> Result<(), Failure> {
    let about = About::new("del", &key);
    let done = client.delete_if(key.as_bytes(), condition).await;
    let done = done.map_err(about.clone().failed())?;
    if !done.deleted {
        return Err(Failure::NotFound(about));
    }
    print_revision(done.revision, about)
}

async fn route(client: &KVClient, keys: Vec<OsString>) -> Result<(), Failure> {
    for key in keys {
        let routed = client.route(key.as_bytes()).await;
        let (cluster, nodes) = routed.map_err(About::new("route", &key).failed())?;
        let place = format!("\t{cluster}\t{}\n", nodes.join(","));
        print(&[key.as_bytes(), place.as_bytes()].concat())?;
    }
    Ok(())
}

/// Writes three keys, then reads each in both modes.
async fn demo(client: &KVClient) -> Result<(), Failure> {
    let pairs = [("apple", "green"), ("banana", "yellow"), ("cherry", "red")];
    print(format!("ring of epoch {}\n\n", client.ring().epoch).as_bytes())?;
    for (key, value) in pairs {
        let revision = client.write(key, value).await?;
        let (cluster, _) = client.route(key).await?;
        let line = format!("write  {key:<8} {value:<8} revision {revision:<8} cluster {cluster}\n");
        print(line.as_bytes())?;
    }
    print(b"\n")?;
    for (key, _) in pairs {
        let newest = client.consistent_read(key).await?;
        let line = format!("read   {key:<8} {:<8} linearizable\n", shown(&newest));
        print(line.as_bytes())?;
        let stale = stale_read_like(client, key, &newest).await?;
        let line = format!("read   {key:<8} {:<8} stale (any node)\n", shown(&stale));
        print(line.as_bytes())?;
    }
    Ok(())
}

/// A stale read may come from a follower that is a moment behind: looks again for a while.
async fn stale_read_like(
    client: &KVClient,
    key: &str,
    newest: &Option<Bytes>,
) -> Result<Option<Bytes>, ClientError> {
    let deadline = Instant::now() + DEMO_STALE_WAIT;
    loop {
        let value = client.read(key).await?;
        if value == *newest || Instant::now() > deadline {
            return Ok(value);
        }
        tokio::time::sleep(DEMO_STALE_PAUSE).await;
    }
}

fn shown(value: &Option<Bytes>) -> String {
    value.as_ref().map_or("(absent)".to_owned(), |v| String::from_utf8_lossy(v).into_owned())
}

fn condition(if_match: Option<Revision>, if_absent: bool) -> Condition {
    match (if_match, if_absent) {
        (Some(revision), _) => Condition::Revision(revision),
        (None, true) => Condition::Absent,
        (None, false) => Condition::Always,
    }
}

fn value_or_stdin(value: OsString) -> Result<Vec<u8>, Failure> {
    if value != "-" {
        return Ok(value.into_vec());
    }
    let mut bytes = Vec::new();
    let mut stdin = io::stdin().lock().take(STDIN_BYTES_MAX + 1);
    stdin.read_to_end(&mut bytes).map_err(Failure::Stdin)?;
    if bytes.len() as u64 > STDIN_BYTES_MAX {
        return Err(Failure::StdinTooLarge);
    }
    Ok(bytes)
}

/// Says that a write took effect. Whoever is not told must not take it for failed.
fn print_revision(revision: Revision, about: About) -> Result<(), Failure> {
    let printed = write_out(format!("{revision}\n").as_bytes());
    printed.map_err(|error| Failure::RevisionNotShown { about, revision, error })
}

fn print(bytes: &[u8]) -> Result<(), Failure> {
    write_out(bytes).map_err(Failure::Stdout)
}

fn write_out(bytes: &[u8]) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(bytes).and_then(|()| stdout.flush())
}
