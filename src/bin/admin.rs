//! `admin`: runs a whole set of clusters, or looks after running ones.
//!
//! Without a verb it starts what `Config.toml` describes and serves until it is told to stop; with a
//! verb it talks to running nodes over HTTP and ends. The work is in the library; here are flags,
//! tables and exit codes: 0 done, 1 refused or failed (also for a nodes file that cannot be used), 2 wrong
//! usage or a configuration, data directory or address that cannot be used, 130 interrupted (a verb by
//! Ctrl-C, a run by its second signal).
#![deny(missing_docs, unsafe_code)]
#![warn(clippy::unwrap_used)]
#![cfg_attr(test, allow(clippy::unwrap_used))]

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use distrib_kv_store::cluster_manager::{
    self, ClusterManager, ClusterStatus, Discovered, InstallError, ManagerError, NodeStatus,
};
use distrib_kv_store::config::{Config, RingConfig};
use distrib_kv_store::kvclient::Endpoints;
use distrib_kv_store::logging;
use distrib_kv_store::ring::{Ring, RingCluster};
use distrib_kv_store::types::ClusterId;
use futures_util::StreamExt;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

#[path = "admin/change.rs"]
mod change;
#[path = "admin/progress.rs"]
mod progress;
#[path = "admin/text.rs"]
mod text;

/// The file that a run without `--config` uses if it is there.
const CONFIG_FILE: &str = "Config.toml";

/// What is logged unless `RUST_LOG` says otherwise: the tables tell the rest, and a stopping follower
/// is openraft's warning, but nobody's trouble.
const DEFAULT_LOG: &str = "warn,openraft=error,toy_rpc=off";

/// What a command says that found nobody to ask.
const NOBODY: &str = "no node can be reached";

/// What a shell reports for a process that SIGINT ended.
const EXIT_INTERRUPTED: i32 = 130;

/// Runs the clusters that Config.toml describes, or looks after running ones.
#[derive(Parser)]
#[command(name = "admin", version, args_conflicts_with_subcommands = true)]
struct Cli {
    /// The configuration of the clusters to run [default: Config.toml if there is one]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(subcommand)]
    verb: Option<Verb>,
}

#[derive(Subcommand)]
enum Verb {
    /// Shows every node: role, term, applied index, keys, reachable or not
    Status(Target),
    /// Shows or installs the ring
    #[command(subcommand)]
    Ring(RingVerb),
    /// Changes the ring while it serves: adds a cluster, removes one, or gives one another share
    #[command(subcommand)]
    Cluster(change::ClusterVerb),
    /// Shows what a change would move
    Rebalance(change::Rebalance),
    /// Shows the change under way, goes on with it, or calls it off
    #[command(subcommand)]
    Migration(change::MigrationVerb),
}

#[derive(Subcommand)]
enum RingVerb {
    /// Shows the ring that the clusters live by
    Show(Target),
    /// Gives clusters that have no ring their first one
    Install {
        #[command(flatten)]
        target: Target,
        /// Relative shares of the clusters, in the order in which they are listed [default: equal]
        #[arg(long, value_name = "W,W,...", value_delimiter = ',', value_parser = parse_weight)]
        weights: Vec<f32>,
    },
}

/// Which nodes to talk to, and how to answer.
#[derive(Args)]
struct Target {
    /// The file that lists the clusters' nodes
    #[arg(long, value_name = "FILE", default_value = "all_nodes.json")]
    nodes_file: PathBuf,
    /// HTTP addresses of nodes, instead of a file
    #[arg(long, value_name = "A,B,...", value_delimiter = ',', conflicts_with = "nodes_file")]
    endpoints: Vec<String>,
    /// Prints JSON
    #[arg(long)]
    json: bool,
}

/// What a command ends with: what to say on stderr, and the exit code.
struct Failure {
    code: u8,
    message: String,
}

impl Failure {
    fn failed(message: impl ToString) -> Self {
        Self { code: 1, message: message.to_string() }
    }

    fn usage(message: impl ToString) -> Self {
        Self { code: 2, message: message.to_string() }
    }

    /// What was asked for could not be shown. A reader that has seen enough, such as `head`, is no
    /// reason to complain.
    fn of_printing(error: std::io::Error) -> Result<(), Self> {
        match error.kind() {
            ErrorKind::BrokenPipe => Ok(()),
            _ => Err(Self::failed(format!("cannot write to stdout: {error}"))),
        }
    }
}

impl From<ManagerError> for Failure {
    fn from(error: ManagerError) -> Self {
        use ManagerError as E;
        match error {
            // Nothing that was given is wrong.
            E::Start { ref source, .. } if !source.is_usage() => Self::failed(error),
            E::Config(_)
            | E::Read { .. }
            | E::BadFile { .. }
            | E::OtherLayout { .. }
            | E::NodeDirMissing { .. }
            | E::Start { .. } => Self::usage(error),
            _ => Self::failed(error),
        }
    }
}

#[tokio::main]
async fn main() -> ExitCode {
    let cli = Cli::parse();
    logging::to_stderr(DEFAULT_LOG);
    let done = match cli.verb {
        None => run(cli.config.as_deref()).await,
        Some(Verb::Status(target)) => status(&target).await,
        Some(Verb::Ring(RingVerb::Show(target))) => ring_show(&target).await,
        Some(Verb::Ring(RingVerb::Install { target, weights })) => {
            ring_install(&target, &weights).await
        }
        Some(Verb::Cluster(verb)) => change::cluster(verb).await,
        Some(Verb::Rebalance(rebalance)) => change::rebalance(&rebalance).await,
        Some(Verb::Migration(verb)) => change::migration(verb).await,
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            text::note(&format!("admin: {}", failure.message));
            ExitCode::from(failure.code)
        }
    }
}

/// Starts everything, serves, and stops everything on the first signal.
async fn run(config: Option<&Path>) -> Result<(), Failure> {
    let config = load_config(config)?;
    let stop = CancellationToken::new();
    watch_signals(&stop).map_err(Failure::failed)?;
    let (clusters, nodes) = (config.num_clusters, config.nodes_per_cluster);
    text::note(&format!("starting {} ...", text::counted(clusters, nodes)));
    let manager = match ClusterManager::start_until(config.clone(), stop.cancelled()).await {
        Err(ManagerError::Interrupted) => {
            text::note("stopped before everything was ready");
            return Ok(());
        }
        Err(ManagerError::InterruptedOpening { opening }) => {
            text::note(&format!(
                "stopped before everything was ready; stores that were still being opened: {opening}"
            ));
            // Returning would wait for them. They serve nobody yet, so this loses nothing.
            std::process::exit(0);
        }
        started => started?,
    };
    let addresses = manager.nodes();
    let status = cluster_manager::status_of(&addresses).await;
    let others = status_of_others(&manager).await;
    if let Err(error) = text::print(&text::running(&config, &manager, &status, &others)) {
        // Nobody may be reading it: no reason not to serve.
        tracing::warn!(%error, "cannot write to stdout");
    }
    let served = serve(&manager, &stop).await;
    text::note("stopping ... (again to quit at once)");
    manager.shutdown().await?;
    text::note(&format!("stopped; all data is in {}", config.data_dir.display()));
    served
}

/// The clusters of the ring that run elsewhere: without them their keys have no owner that serves.
async fn status_of_others(manager: &ClusterManager) -> Vec<(ClusterId, ClusterStatus)> {
    let own = |id: &ClusterId| manager.layout().nodes().any(|(cluster, _)| cluster.id == *id);
    let others = || manager.ring().clusters.iter().filter(|cluster| !own(&cluster.id));
    let http = |cluster: &RingCluster| cluster.nodes.iter().map(|n| n.http.clone()).collect();
    let addresses: Vec<Vec<String>> = others().map(http).collect();
    let status = cluster_manager::status_of(&addresses).await;
    others().map(|cluster| cluster.id.clone()).zip(status).collect()
}

/// Waits for the signal to stop. Single nodes may fail meanwhile: their clusters go on without them.
async fn serve(manager: &ClusterManager, stop: &CancellationToken) -> Result<(), Failure> {
    let mut failures = manager.failures();
    loop {
        tokio::select! {
            () = stop.cancelled() => return Ok(()),
            failure = failures.next() => match failure {
                Some(f) => text::note(&format!(
                    "node {} of {} has stopped serving: {}", f.node, f.cluster, f.message
                )),
                None => return Err(Failure::failed("all nodes have stopped serving")),
            },
        }
    }
}

/// A file that was named must be there; without one, an absent `Config.toml` means the defaults.
fn load_config(named: Option<&Path>) -> Result<Config, Failure> {
    match named {
        Some(path) => Config::load(path).map_err(Failure::usage),
        // A link into nowhere, or one that may not be followed, is there: loading says what is wrong.
        None => match std::fs::symlink_metadata(CONFIG_FILE) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(Config::default()),
            _ => Config::load(CONFIG_FILE).map_err(Failure::usage),
        },
    }
}

/// The first of SIGINT, SIGTERM and SIGHUP cancels `stop`; the second ends the process at once, which
/// loses nothing that was acknowledged.
fn watch_signals(stop: &CancellationToken) -> std::io::Result<()> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hangup = signal(SignalKind::hangup())?;
    let stop = stop.clone();
    // Not joined: it lives as long as the process, which is what it may have to end.
    tokio::spawn(async move {
        loop {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
                _ = hangup.recv() => {}
            }
            if stop.is_cancelled() {
                std::process::exit(EXIT_INTERRUPTED);
            }
            stop.cancel();
        }
    });
    Ok(())
}

async fn status(target: &Target) -> Result<(), Failure> {
    let Discovered { clusters, unplaced } = target.clusters().await?;
    let status = cluster_manager::status_of(&clusters).await;
    let printed = if target.json {
        text::print_json(&serde_json::json!({ "clusters": status, "unplaced": unplaced }))
    } else {
        text::print(&text::status(&status, &unplaced))
    };
    printed.or_else(Failure::of_printing)?;
    all_led(&status)
}

/// Whether every cluster has a leader that answers.
fn all_led(status: &[ClusterStatus]) -> Result<(), Failure> {
    if !status.iter().flat_map(|cluster| &cluster.nodes).any(|node| node.reachable) {
        return Err(Failure::failed(NOBODY));
    }
    let headless = status.iter().filter(|cluster| cluster.leader.is_none());
    let headless: Vec<String> = headless.map(text::name_of).collect();
    match headless.as_slice() {
        [] => Ok(()),
        [one] => Err(Failure::failed(format!("{one} has no leader that answers"))),
        several => {
            Err(Failure::failed(format!("{} have no leader that answers", several.join(", "))))
        }
    }
}

async fn ring_show(target: &Target) -> Result<(), Failure> {
    let Discovered { clusters, unplaced } = target.clusters().await?;
    let status = cluster_manager::status_of(&clusters).await;
    let seen = || status.iter().flat_map(|c| &c.nodes).filter_map(|node| node.metrics.as_ref());
    if seen().next().is_none() {
        let silent = status.iter().flat_map(|cluster| &cluster.nodes).chain(&unplaced);
        let reasons: Vec<&str> = silent.filter_map(|node| node.error.as_deref()).collect();
        return Err(Failure::failed(format!("{NOBODY}: {}", reasons.join("; "))));
    }
    let ring = match cluster_manager::newest_ring(seen()).await {
        Some(ring) => ring,
        None if seen().all(|node| node.epoch.unwrap_or(0) == 0) => Ring::none(),
        None => return Err(Failure::failed("the node with the newest ring did not answer")),
    };
    let printed = if target.json {
        text::print_json(&ring)
    } else {
        text::print(&text::ring(&ring, &status))
    };
    printed.or_else(Failure::of_printing)
}

async fn ring_install(target: &Target, weights: &[f32]) -> Result<(), Failure> {
    let Discovered { clusters, unplaced } = target.clusters().await?;
    if let Some(NodeStatus { error: Some(error), .. }) = unplaced.first() {
        return Err(Failure::failed(InstallError::Unreachable(error.clone())));
    }
    if !weights.is_empty() && weights.len() != clusters.len() {
        let (given, needed) = (weights.len(), clusters.len());
        return Err(Failure::usage(format!("{given} weights are given for {needed} clusters")));
    }
    let surveys = cluster_manager::survey_all(&clusters).await.map_err(Failure::failed)?;
    let members = surveys.iter().map(|s| (&s.cluster, s.nodes.as_slice()));
    let ring = cluster_manager::first_ring(members, weights, &RingConfig::default());
    let ring = ring.map_err(Failure::failed)?;
    let installed = cluster_manager::install(&clusters, &surveys, &ring).await;
    let installed = installed.map_err(Failure::failed)?;
    let printed = if target.json {
        text::print_json(&serde_json::json!({ "installed": installed, "ring": ring }))
    } else {
        text::print(&text::installed(&ring, &installed))
    };
    printed.or_else(|error| {
        Failure::of_printing(error).map_err(|failure| {
            Failure::failed(format!("the ring is installed, but {}", failure.message))
        })
    })
}

impl Target {
    /// The clusters' HTTP addresses.
    async fn clusters(&self) -> Result<Discovered, Failure> {
        let listed = cluster_manager::read_nodes_file(&self.nodes_file);
        if self.endpoints.is_empty() {
            // The command is not wrong, so this is a failure, as it is for `client`.
            let clusters = listed.map_err(|error| {
                Failure::failed(format!("{error}; --nodes-file or --endpoints name the nodes, too"))
            })?;
            return Ok(Discovered { clusters, unplaced: Vec::new() });
        }
        if let Err(message) = Endpoints::from(self.endpoints.clone()).check() {
            return Err(Failure::usage(format!("--endpoints: {message}")));
        }
        // The file is only a hint about nodes that do not answer: without it they are just that.
        Ok(cluster_manager::discover(&self.endpoints, &listed.unwrap_or_default()).await)
    }
}

fn parse_weight(text: &str) -> Result<f32, String> {
    match text.trim().parse::<f32>() {
        Ok(weight) if weight.is_finite() && weight > 0.0 => Ok(weight),
        _ => Err("a weight is a number above 0".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn wrong_usage_is_refused_before_anything_happens() {
        for bad in [
            vec!["admin", "ring", "install", "--weights", "1,0"],
            vec!["admin", "ring", "install", "--weights", "1,nan"],
            vec!["admin", "status", "--nodes-file", "a", "--endpoints", "b"],
            vec!["admin", "--config", "a", "status"],
            vec!["admin", "ring"],
            vec!["admin", "cluster", "add", "c4"],
            vec!["admin", "cluster", "add", "c 4", "--nodes", "a:1/a:2"],
            vec!["admin", "cluster", "add", "c4", "--nodes", "a:1"],
            vec!["admin", "cluster", "add", "c4", "--nodes", "a:1/a"],
            vec!["admin", "cluster", "add", "c4", "--nodes", "a:1/a:2", "--weight", "0"],
            vec!["admin", "cluster", "remove"],
            vec!["admin", "cluster", "weight", "c1"],
            vec!["admin", "cluster", "weight", "c1", "0"],
            vec!["admin", "cluster", "weight", "c1", "-1"],
            vec!["admin", "cluster", "weight", "c1", "nan"],
            vec!["admin", "cluster", "weight", "c1", "inf"],
            vec!["admin", "rebalance"],
            vec!["admin", "rebalance", "--dry-run", "--add", "c4:0"],
            vec!["admin", "rebalance", "--dry-run", "--add", "c4:1", "--remove", "c1"],
            vec!["admin", "migration"],
        ] {
            let error = Cli::try_parse_from(&bad).err();
            assert_eq!(error.map(|e| e.exit_code()), Some(2), "{bad:?}");
        }
    }
}
