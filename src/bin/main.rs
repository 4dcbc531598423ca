//! `raft-kv`: one node.
//!
//! Prints one line, `ready http=ADDR rpc=ADDR`, on standard output once both ports accept; logs go to
//! standard error. SIGTERM and SIGINT stop it cleanly. Exit codes: 0 stopped cleanly, 1 failed, 2 bad
//! flags, configuration, addresses or data directory.
#![deny(missing_docs, unsafe_code)]
#![warn(clippy::unwrap_used)]

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use distrib_kv_store::config::Config;
use distrib_kv_store::logging;
use distrib_kv_store::node::{Node, NodeOptions};
use distrib_kv_store::types::{ClusterId, NodeId};
use tokio::runtime::{Builder, Runtime};
use tokio::signal::unix::{SignalKind, signal};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// One node of a sharded key-value store.
#[derive(Parser)]
#[command(name = "raft-kv", version)]
struct Flags {
    /// The node's id in its cluster, counted from 1
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
    id: NodeId,
    /// Address for clients; port 0 picks a free one
    #[arg(long, value_name = "HOST:PORT")]
    http_addr: String,
    /// Address for the other nodes of the cluster; port 0 picks a free one
    #[arg(long, value_name = "HOST:PORT")]
    rpc_addr: String,
    /// The cluster that the node belongs to
    #[arg(long, value_name = "ID", default_value = "c1")]
    cluster: ClusterId,
    /// Where the data is kept [default: ./RPC_ADDR-db]
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Settings; without it the defaults hold
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

/// What is logged unless `RUST_LOG` says otherwise. openraft warns at every attempt to reach a dead
/// peer, hundreds of times a second under load; the peer network says the same once. Toy-RPC reports
/// every call that a lost connection took with it.
const DEFAULT_LOG: &str = "info,openraft=error,toy_rpc=off";

/// The node did not start, or did not stop cleanly.
const EXIT_FAILED: u8 = 1;

/// Flags, configuration, addresses or data directory are not usable as they are.
const EXIT_USAGE: u8 = 2;

fn main() -> ExitCode {
    let flags = Flags::parse();
    logging::to_stderr(DEFAULT_LOG);
    let config = flags.config.as_ref().map_or_else(|| Ok(Config::default()), Config::load_for_node);
    let config = match config {
        Ok(config) => config,
        Err(error) => return fail(EXIT_USAGE, &error),
    };
    let runtime = match runtime(config.runtime.workers()) {
        Ok(runtime) => runtime,
        Err(error) => return fail(1, &error),
    };
    runtime.block_on(run(flags, config))
}

/// A single worker is this thread: it never has to wake another one to hand work over.
fn runtime(workers: usize) -> std::io::Result<Runtime> {
    let mut builder = match workers {
        1 => Builder::new_current_thread(),
        _ => Builder::new_multi_thread(),
    };
    if workers > 1 {
        builder.worker_threads(workers);
    }
    builder.enable_all().build()
}

async fn run(flags: Flags, config: Config) -> ExitCode {
    let (mut terminate, mut interrupt) =
        match (signal(SignalKind::terminate()), signal(SignalKind::interrupt())) {
            (Ok(terminate), Ok(interrupt)) => (terminate, interrupt),
            (Err(error), _) | (_, Err(error)) => return fail(1, &error),
        };
    let data_dir = flags.data_dir.unwrap_or_else(|| format!("./{}-db", flags.rpc_addr).into());
    let options = NodeOptions {
        id: flags.id,
        cluster: flags.cluster,
        http_addr: flags.http_addr,
        rpc_addr: flags.rpc_addr,
        data_dir,
        config,
    };
    let started = tokio::select! {
        started = Node::start(options) => started,
        // Replaying a long log takes a while. Nothing has been served yet, so nothing is lost.
        _ = terminate.recv() => std::process::exit(0),
        _ = interrupt.recv() => std::process::exit(0),
    };
    let node = match started {
        Ok(node) => node,
        Err(error) if error.is_usage() => return fail(EXIT_USAGE, &error),
        Err(error) => return fail(EXIT_FAILED, &error),
    };
    let mut stdout = std::io::stdout();
    let ready = writeln!(stdout, "ready http={} rpc={}", node.http_addr(), node.rpc_addr());
    // Nobody may be reading it: no reason not to serve.
    let _ = ready.and_then(|()| stdout.flush());

    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
        _ = report_failure(&node) => {}
    }
    let stopped = tokio::select! {
        stopped = node.shutdown() => stopped,
        // Whoever asks twice does not want to wait. A crash loses nothing either.
        _ = terminate.recv() => std::process::exit(1),
        _ = interrupt.recv() => std::process::exit(1),
    };
    match stopped {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(1, &error),
    }
}

/// Says why storage or consensus failed and never returns: the node goes on answering with that error.
async fn report_failure(node: &Node) {
    let reason = node.failed().await;
    eprintln!("raft-kv: this node serves no more, its storage has failed: {reason}");
    std::future::pending().await
}

fn fail(code: u8, error: &dyn std::error::Error) -> ExitCode {
    eprintln!("raft-kv: {error}");
    ExitCode::from(code)
}
