//! One running node: the parts, put together, started and stopped in the right order.
//!
//! Starting: listeners are bound before anything else, so that an address in use costs nothing and
//! changes nothing; then the store is opened, then Raft, then the ports serve. Stopping goes the other
//! way round: no new requests, requests in flight finish, peers are let go, Raft stops, the store
//! flushes and closes. Every task has its owner here and is joined.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use openraft::SnapshotPolicy;
use openraft::async_runtime::WatchReceiver;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::app::{App, Identity, Parts};
use crate::caretaker;
use crate::config::{Config, Limits, RaftConfig};
use crate::mover;
use crate::network::http_server::HttpServer;
use crate::network::listener;
use crate::network::raft::PeerServer;
use crate::network::raft_network_impl::{PeerIdentity, PeerNetwork};
use crate::proposer::Proposer;
use crate::read_gate::{ReadGate, Voters};
use crate::reshard;
use crate::store::{OpenError, StateMachine, Store, StoreOptions};
use crate::types::{ClusterId, NodeAddrs, NodeId, TypeConfig};

/// openraft with this crate's types and state machine.
pub type Raft = openraft::Raft<TypeConfig, StateMachine>;

/// What a node needs to know to start.
#[derive(Debug, Clone)]
pub struct NodeOptions {
    /// Its id in its cluster, above 0.
    pub id: NodeId,
    /// Its cluster.
    pub cluster: ClusterId,
    /// `HOST:PORT` to serve clients on; port 0 picks a free one.
    pub http_addr: String,
    /// `HOST:PORT` to serve peers on; port 0 picks a free one.
    pub rpc_addr: String,
    /// Where its data is.
    pub data_dir: PathBuf,
    /// Limits, timing, memory.
    pub config: Config,
}

/// Why a node did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The address cannot be listened on.
    #[error("cannot listen on {address}: {source}")]
    Bind {
        /// The address as it was given.
        address: String,
        /// What the system said.
        source: io::Error,
    },
    /// Clients and peers speak different protocols.
    #[error(
        "{address} cannot serve peers, for this node serves clients there: --http-addr and --rpc-addr need a port each"
    )]
    SharedAddress {
        /// The peers' address as it was given.
        address: String,
    },
    /// Anyone on the network could read and write everything.
    #[error(
        "{address} is not a loopback address: everything would cross the network in clear text; set `insecure = true` in the configuration to allow it"
    )]
    NotLoopback {
        /// The address as it was given.
        address: String,
    },
    /// Files and connections would run out, and a write that cannot open its file is a failed disk.
    #[error(
        "the limit of open files is {limit}; a node needs at least {OPEN_FILES_MIN} (ulimit -n)"
    )]
    TooFewFiles {
        /// The limit, raised as far as it goes.
        limit: u64,
    },
    /// The program would end in the middle of its first write.
    #[error(
        "this processor has no {instruction}, for which RocksDB was compiled: build the program without the flags in .cargo/config.toml"
    )]
    Processor {
        /// The instruction set.
        instruction: &'static str,
    },
    /// The data directory is not fit.
    #[error(transparent)]
    Store(#[from] OpenError),
    /// Raft did not start.
    #[error("consensus did not start: {0}")]
    Raft(String),
}

impl StartError {
    /// Whether what was asked for is at fault: flags, configuration, an address or a data directory. Then the same
    /// command will not do better.
    pub fn is_usage(&self) -> bool {
        !matches!(self, Self::Raft(_))
    }
}

/// Why a node did not stop cleanly.
#[derive(Debug, thiserror::Error)]
pub enum StopError {
    /// The store could not be flushed or closed.
    #[error("the store did not close cleanly: {0}")]
    Store(io::Error),
    /// Raft's task died.
    #[error("consensus did not stop cleanly: {0}")]
    Raft(String),
}

/// How often a node looks whether consensus has died without its storage failing.
const CONSENSUS_LOOK: Duration = Duration::from_millis(250);

/// A running node. Stop it with [`Node::shutdown`]; dropping it aborts nothing and joins nothing.
pub struct Node {
    http_addr: SocketAddr,
    rpc_addr: SocketAddr,
    shutdown: CancellationToken,
    app: App,
    raft: Raft,
    http: HttpServer,
    peers: PeerServer,
    network: PeerNetwork,
    gate: JoinHandle<()>,
    proposer: JoinHandle<()>,
    caretaker: JoinHandle<()>,
    reshard: JoinHandle<()>,
    mover: JoinHandle<()>,
    store: Store,
}

impl Node {
    /// Starts a node. Returns once both ports accept. Also raises the process's limit of open files, and
    /// lowers the configured limits of connections to what it allows.
    ///
    /// Not safe to cancel: a store that is being opened goes on being opened, and Raft may be left
    /// running. Nothing was served yet, so ending the process loses nothing.
    pub async fn start(mut options: NodeOptions) -> Result<Self, StartError> {
        check_processor()?;
        let files = OpenFiles::of(raise_open_files_limit())?;
        files.bound(&mut options.config.limits);
        let config = &options.config;
        let (http, http_addr) = listen(&options.http_addr, config.insecure).await?;
        let (rpc, rpc_addr) = listen_beside(http_addr, &options.rpc_addr, config.insecure).await?;
        let store = open_store(&options, files.data).await?;
        let identity = PeerIdentity { cluster: options.cluster.clone(), node_id: options.id };
        let network = PeerNetwork::new(identity.clone(), store.formation(), config);
        let raft = start_raft(&options, &network, &store).await?;
        let metrics = raft.metrics();
        network.know_members(move || metrics.borrow_watched().membership_config.clone());

        let addrs = NodeAddrs {
            http: advertised(&options.http_addr, http_addr),
            rpc: advertised(&options.rpc_addr, rpc_addr),
        };
        warn_if_moved(&raft, options.id, &addrs);
        let shutdown = CancellationToken::new();
        let voters = Voters { own: store.promise(), peers: network.clone() };
        let lease = Duration::from_millis(config.raft.read_lease_ms);
        let (gate, gate_task) = ReadGate::spawn(raft.clone(), store.reader(), voters, lease);
        let (of_raft, token) = (raft.clone(), shutdown.clone());
        let peers = PeerServer::serve(rpc, identity, of_raft, gate.clone(), &store, config, token);
        let (proposer, proposer_task) = Proposer::spawn(raft.clone(), store.reader());
        let (of_raft, token) = (raft.clone(), shutdown.clone());
        let caretaker =
            caretaker::spawn(of_raft, store.reader(), store.stager(), network.clone(), token);
        let (cluster, token) = (options.cluster.clone(), shutdown.clone());
        let reshard =
            reshard::service::spawn(cluster, raft.clone(), store.reader(), &config.reshard, token);
        let (cluster, links) = (options.cluster.clone(), network.handoff_links());
        let (of_raft, token) = (raft.clone(), shutdown.clone());
        let mover = mover::spawn(cluster, of_raft, store.reader(), links, config, token);
        let identity = Identity { cluster: options.cluster, node_id: options.id, addrs };
        let limits = config.limits.clone();
        let parts = Parts {
            raft: raft.clone(),
            reader: store.reader(),
            formation: store.formation(),
            gate,
            proposer,
            peers: network.clone(),
        };
        let app = App::new(identity, limits, parts);
        let http = HttpServer::serve(http, app.clone(), shutdown.clone());
        tracing::info!(%http_addr, %rpc_addr, dir = %options.data_dir.display(), "node started");
        Ok(Self {
            http_addr,
            rpc_addr,
            shutdown,
            app,
            raft,
            http,
            peers,
            network,
            gate: gate_task,
            proposer: proposer_task,
            caretaker,
            reshard,
            mover,
            store,
        })
    }

    /// Where it serves clients.
    pub fn http_addr(&self) -> SocketAddr {
        self.http_addr
    }

    /// Where it serves peers.
    pub fn rpc_addr(&self) -> SocketAddr {
        self.rpc_addr
    }

    /// Resolves, with the reason, when storage or consensus fails. Then the node answers every read and
    /// write with an error, so that its operator sees why, until it is stopped. Cancel safe.
    pub async fn failed(&self) -> String {
        let mut storage = self.app.storage_failure();
        loop {
            if let Some(failure) = self.app.storage_failed() {
                return failure;
            }
            // Consensus is looked at, not waited for: its metrics change several times with every
            // write, and each time would wake a thread.
            let changed = tokio::time::timeout(CONSENSUS_LOOK, storage.changed()).await;
            if let Ok(Err(_)) = changed {
                // The store is closed: the node is being stopped.
                std::future::pending::<()>().await;
            }
        }
    }

    /// Stops the node: requests in flight finish, everything is flushed, the data directory is free.
    /// Not safe to cancel: parts of the node would go on without an owner.
    pub async fn shutdown(self) -> Result<(), StopError> {
        let Self { shutdown, app, raft, http, peers, network, gate, proposer, .. } = self;
        let (caretaker, reshard, mover, store) =
            (self.caretaker, self.reshard, self.mover, self.store);
        shutdown.cancel();
        http.join().await;
        peers.join().await;
        let stopped = raft.shutdown().await;
        network.shutdown().await;
        drop(network);
        app.join().await;
        // A panic in one has been reported by the panic hook.
        let _ = tokio::join!(caretaker, reshard, mover);
        drop(app);
        drop(raft);
        // Their queues closed with the last app; what they wait for ends with Raft. A panic in one
        // has been reported by the panic hook.
        let _ = tokio::join!(gate, proposer);
        let closed = tokio::task::spawn_blocking(move || store.close()).await;
        stopped.map_err(|error| StopError::Raft(error.to_string()))?;
        closed
            .unwrap_or_else(|error| Err(io::Error::other(error.to_string())))
            .map_err(StopError::Store)
    }
}

/// Whether this processor has what RocksDB's checksums were compiled for.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
fn check_processor() -> Result<(), StartError> {
    let flags = if cfg!(target_env = "musl") {
        option_env!("CXXFLAGS_x86_64_unknown_linux_musl")
    } else {
        option_env!("CXXFLAGS_x86_64_unknown_linux_gnu")
    };
    let instructions = [
        ("SSE4.2", "-msse4.2", std::arch::is_x86_feature_detected!("sse4.2")),
        ("PCLMULQDQ", "-mpclmul", std::arch::is_x86_feature_detected!("pclmulqdq")),
    ];
    match missing_instruction(flags.unwrap_or_default(), &instructions) {
        Some(instruction) => Err(StartError::Processor { instruction }),
        None => Ok(()),
    }
}

/// The first of the instruction sets, each with its flag and whether it is there, that the compiler was
/// told to use and that is not there.
#[cfg(any(test, all(target_arch = "x86_64", target_os = "linux")))]
fn missing_instruction(
    flags: &str,
    instructions: &[(&'static str, &str, bool)],
) -> Option<&'static str> {
    let missing = |(_, flag, there): &&(_, &str, bool)| !there && flags.contains(*flag);
    instructions.iter().find(missing).map(|(name, ..)| *name)
}

#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
fn check_processor() -> Result<(), StartError> {
    Ok(())
}

/// Returns once consensus has told what the node belongs to.
async fn start_raft(
    options: &NodeOptions,
    network: &PeerNetwork,
    store: &Store,
) -> Result<Raft, StartError> {
    let config = raft_config(&options.cluster, &options.config.raft)?;
    let (log, machine) = (store.log(), store.state_machine());
    let raft = Raft::new(options.id, config, network.clone(), log, machine)
        .await
        .map_err(|error| StartError::Raft(error.to_string()))?;
    // Before that, its metrics say that the node belongs to no cluster, and so would the node. A core
    // that has stopped already says that in its metrics, too.
    let _ = raft.with_raft_state(|_| ()).await;
    Ok(raft)
}

async fn open_store(options: &NodeOptions, open_files_max: i32) -> Result<Store, StartError> {
    let options = StoreOptions {
        dir: options.data_dir.clone(),
        node_id: options.id,
        cluster: options.cluster.clone(),
        storage: options.config.storage.clone(),
        raft: options.config.raft.clone(),
        open_files_max,
    };
    tokio::task::spawn_blocking(move || Store::open(&options))
        .await
        .map_err(|error| StartError::Raft(format!("opening the store died: {error}")))?
        .map_err(StartError::Store)
}

async fn listen(address: &str, insecure: bool) -> Result<(TcpListener, SocketAddr), StartError> {
    let bind_error = |source| StartError::Bind { address: address.to_owned(), source };
    let listener = listener::listen(address).await.map_err(bind_error)?;
    let local = listener.local_addr().map_err(bind_error)?;
    if !local.ip().is_loopback() && !insecure {
        return Err(StartError::NotLoopback { address: address.to_owned() });
    }
    Ok((listener, local))
}

/// That an address is taken does not help whoever gave the same one twice.
async fn listen_beside(
    http: SocketAddr,
    address: &str,
    insecure: bool,
) -> Result<(TcpListener, SocketAddr), StartError> {
    let error = match listen(address, insecure).await {
        Ok(listening) => return Ok(listening),
        Err(error) => error,
    };
    let is_taken = match &error {
        StartError::Bind { source, .. } => source.kind() == io::ErrorKind::AddrInUse,
        _ => false,
    };
    let is_shared = |rpc: SocketAddr| {
        let is_every = rpc.ip().is_unspecified() || http.ip().is_unspecified();
        rpc.port() == http.port() && (rpc.ip() == http.ip() || is_every)
    };
    if is_taken
        && let Ok(mut found) = tokio::net::lookup_host(address).await
        && found.any(is_shared)
    {
        return Err(StartError::SharedAddress { address: address.to_owned() });
    }
    Err(error)
}

/// The others look for a node where the membership says. One that comes back elsewhere is not found.
fn warn_if_moved(raft: &Raft, id: NodeId, now: &NodeAddrs) {
    let metrics = raft.metrics();
    let metrics = metrics.borrow_watched();
    match metrics.membership_config.membership().get_node(&id) {
        Some(then) if then != now => tracing::warn!(
            known_http = %then.http,
            known_rpc = %then.rpc,
            http = %now.http,
            rpc = %now.rpc,
            "this node listens elsewhere than its cluster's membership says, and others will not find it: \
             start it at the known addresses"
        ),
        _ => {}
    }
}

/// What others are told: the host as it was given, because a name may mean more to them than the
/// address it has here; the port as it was bound.
fn advertised(given: &str, bound: SocketAddr) -> String {
    match given.rsplit_once(':') {
        Some((host, _)) => format!("{host}:{}", bound.port()),
        None => bound.to_string(),
    }
}

fn raft_config(
    cluster: &ClusterId,
    config: &RaftConfig,
) -> Result<Arc<openraft::Config>, StartError> {
    let raft = openraft::Config {
        cluster_name: cluster.to_string(),
        heartbeat_interval: config.heartbeat_interval_ms,
        election_timeout_min: config.election_timeout_min_ms,
        election_timeout_max: config.election_timeout_max_ms,
        max_payload_entries: config.append_entries_max,
        snapshot_policy: SnapshotPolicy::LogsSinceLast(config.snapshot_log_entries),
        max_in_snapshot_log_to_keep: config.log_entries_kept,
        // A follower gets a snapshot when the log no longer reaches it, hardly earlier.
        replication_lag_threshold: 2 * config.snapshot_log_entries + config.log_entries_kept,
        snapshot_max_chunk_size: config.snapshot_chunk_bytes as u64,
        // The whole transfer of a large state; single chunks have their own, short timeout.
        install_snapshot_timeout: 600_000,
        // Followers get entries while the leader's own fsync still runs.
        broadcast_submitted_on_append: Some(true),
        // A node that comes back does not depose a healthy leader.
        enable_pre_vote: Some(true),
        // A restarted leader must be elected again: it cannot know what happened meanwhile.
        enable_leader_restore: Some(false),
        // A voter never comes back without what it had (network/raft.rs). A learner may, and counts for nothing:
        // it is sent all of it again. Without this its leader would ask it for what it has lost, in circles.
        allow_log_reversion: Some(true),
        // A leader that lost its majority falls silent long enough for others to take over.
        quorum_loss_probe_interval: Some(2 * config.election_timeout_max_ms),
        // Between attempts at a peer that cannot be reached: a node that comes back is found within
        // the second, and a dead one costs next to nothing.
        backoff: "50ms 100ms ...1s".into(),
        ..openraft::Config::default()
    };
    raft.validate().map(Arc::new).map_err(|error| StartError::Raft(error.to_string()))
}

/// Below this many open files, a node cannot promise that clients leave its store any.
const OPEN_FILES_MIN: u64 = 512;

/// Open files that are neither data files nor connections: write-ahead logs, manifests, listeners,
/// images, and what the runtime needs.
const OPEN_FILES_RESERVED: u64 = 128;

/// How the process's open files are shared out, so that a flood of clients cannot take from the store
/// what it needs to go on writing.
struct OpenFiles {
    data: i32,
    http: usize,
    peers: usize,
    passed_on: usize,
}

impl OpenFiles {
    fn of(limit: u64) -> Result<Self, StartError> {
        if limit < OPEN_FILES_MIN {
            return Err(StartError::TooFewFiles { limit });
        }
        // A quarter for data files. Of the rest, half for clients and peers that connect, half for
        // requests that this node passes on, with as many idle connections, and for its own
        // connections to peers.
        let quarter = (limit - OPEN_FILES_RESERVED) / 4;
        let at_most = |share: u64| usize::try_from(share).unwrap_or(usize::MAX);
        Ok(Self {
            data: i32::try_from(quarter).unwrap_or(i32::MAX),
            http: at_most(quarter / 4 * 5),
            peers: at_most(quarter / 4),
            passed_on: at_most(quarter / 2),
        })
    }

    /// Lowers the limits of connections to what the files allow.
    fn bound(&self, limits: &mut Limits) {
        for (limit, files, what) in [
            (&mut limits.http_connections_max, self.http, "clients"),
            (&mut limits.peer_connections_max, self.peers, "peers"),
        ] {
            if *limit > files {
                tracing::warn!(max = files, what, "fewer connections than configured: open files");
                *limit = files;
            }
        }
        if limits.passed_on_max > self.passed_on {
            tracing::info!(max = self.passed_on, "requests passed on are bounded by open files");
            limits.passed_on_max = self.passed_on;
        }
    }
}

/// Raises the soft limit of open files to the hard one; returns what it is then.
fn raise_open_files_limit() -> u64 {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    match setrlimit(Resource::Nofile, raised) {
        Ok(()) => limit.maximum.unwrap_or(u64::MAX),
        Err(error) => {
            tracing::warn!(%error, "cannot raise the limit of open files");
            limit.current.unwrap_or(u64::MAX)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use openraft::errors::Fatal;

    use super::*;
    use crate::core_end;
    use crate::network::error::ApiError;
    use crate::store::formation::BeforeRing;
    use crate::types::{Condition, Consistency};

    #[test]
    fn only_an_instruction_that_was_compiled_for_can_be_missing() {
        let old = [("SSE4.2", "-msse4.2", true), ("PCLMULQDQ", "-mpclmul", false)];
        assert_eq!(missing_instruction("-msse4.2 -mpclmul", &old), Some("PCLMULQDQ"));
        assert_eq!(missing_instruction("-msse4.2", &old), None);
        assert_eq!(missing_instruction("", &old), None);
    }

    async fn start(dir: &Path) -> Node {
        let options = NodeOptions {
            id: 1,
            cluster: "c1".parse().unwrap(),
            http_addr: "127.0.0.1:0".into(),
            rpc_addr: "127.0.0.1:0".into(),
            data_dir: dir.join("node"),
            config: Config::default(),
        };
        Node::start(options).await.unwrap()
    }

    /// Its last report is that of a leader who is well. Clients would wait for it, and nobody look after it.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_core_that_panics_is_a_failure_that_shows() {
        let dir = tempfile::tempdir().unwrap();
        let node = start(dir.path()).await;
        let soon = || tokio::time::Instant::now() + Duration::from_secs(20);
        let put = || node.app.put("k".into(), "v".into(), Condition::Always, None, soon());
        let get = || node.app.get(b"k", Consistency::Linearizable, soon());
        node.app.init(BeforeRing::Serves).await.unwrap();
        put().await.unwrap();
        get().await.unwrap();
        assert_eq!(node.app.storage_failed(), None);

        let fatal = node.raft.with_raft_state(|_| -> () { panic!("as if by a defect") }).await;
        assert!(matches!(fatal, Err(Fatal::Panicked)), "{fatal:?}");
        tokio::time::timeout(Duration::from_secs(20), node.failed()).await.expect("it failed");
        assert!(node.app.readiness().is_err());
        assert!(matches!(put().await, Err(ApiError::Storage { .. })));
        assert!(matches!(get().await, Err(ApiError::Storage { .. })));
        node.shutdown().await.unwrap();
    }

    /// Who is stopped has not failed.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_core_that_is_stopped_has_not_failed() {
        let dir = tempfile::tempdir().unwrap();
        let node = start(dir.path()).await;
        node.raft.shutdown().await.unwrap();
        node.app.join().await;
        assert_eq!(node.app.storage_failed(), None);
        assert!(matches!(core_end::failure(&node.raft), Some(Fatal::Stopped)));
        node.shutdown().await.unwrap();
    }
}
