//! `Config.toml`: every setting with its default, its unit and its allowed range.
//!
//! One file serves both `admin`, which reads all of it, and a single `raft-kv --config FILE`, which
//! reads the tables and `insecure`: what the top level says about a layout of clusters has to be of the
//! right type there, and no more. An unknown key is an error, so
//! that a typo never silently means the default; a value out of range is an error that names the key
//! and what is allowed. A file that is not there is an error only for who asked for it by name.

use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::ring::{CLUSTERS_MAX, HASH_VERSION_DEFAULT, LIST_TTL_S_DEFAULT, NODES_PER_CLUSTER_MAX};

/// The longest `raft.read_lease_ms`. Shorter than an election by default, so that voters who keep to a lease delay
/// few; a part of the peer protocol, because a voter that was restarted waits for so long, whatever is configured.
pub const READ_LEASE_MS_MAX: u64 = 100;

/// How many ports above a base port belong to each cluster; node `n` of cluster `c` takes the port
/// `base + PORTS_PER_CLUSTER * c + n`. Ten keeps the numbers readable: 31023 is node 3 of cluster 2.
pub const PORTS_PER_CLUSTER: u32 = 10;

/// The most nodes of a cluster that `admin` starts: one more would take the next cluster's first port.
const NODES_MAX: u32 = PORTS_PER_CLUSTER - 1;

const _: () = assert!(NODES_MAX as usize <= NODES_PER_CLUSTER_MAX);

/// Why a configuration was refused. Always names the file and, where there is one, the key.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file could not be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Not TOML, an unknown key, or a value of the wrong type; the message shows the line.
    #[error("{path}: {message}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// The parser's message with line and column.
        message: String,
    },
    /// A value that cannot work.
    #[error("{path}: `{key}` is {value}, but {allowed}")]
    OutOfRange {
        /// The file.
        path: PathBuf,
        /// The key, with its table: `raft.heartbeat_interval_ms`.
        key: &'static str,
        /// The value that was found.
        value: String,
        /// What is allowed.
        allowed: String,
    },
}

/// All settings. `Config::default()` is what an empty file means.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// How many clusters `admin` starts.
    pub num_clusters: u32,
    /// How many nodes each of them has.
    pub nodes_per_cluster: u32,
    /// The address that `admin`'s nodes listen on, and by which they and clients find each other.
    pub host: String,
    /// Node `n` of cluster `c` serves HTTP on `http_base_port + 10*c + n`; both count from 1.
    pub http_base_port: u16,
    /// And its peers on `rpc_base_port + 10*c + n`.
    pub rpc_base_port: u16,
    /// Where `admin` keeps its nodes' data, one directory a node.
    pub data_dir: PathBuf,
    /// Where `admin` writes the nodes' HTTP addresses for clients.
    pub nodes_file: PathBuf,
    /// Relative weights of the clusters in the first ring; empty means equal.
    pub weights: Vec<f32>,
    /// Allows addresses other than loopback, which carry everything in clear text.
    pub insecure: bool,
    /// The first ring.
    pub ring: RingConfig,
    /// What a request may cost.
    pub limits: Limits,
    /// Timing of consensus.
    pub raft: RaftConfig,
    /// RocksDB.
    pub storage: StorageConfig,
    /// Changes of the ring.
    pub reshard: ReshardConfig,
    /// Threads.
    pub runtime: RuntimeConfig,
}

/// The first ring that `admin` installs.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RingConfig {
    /// 1: the CARP draft to the bit. 2: the well-mixed hash.
    pub hash_version: u8,
    /// How long clients may cache the ring, in seconds.
    pub list_ttl_s: u64,
}

/// Bounds on what one client, one peer and all of them together can ask for.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// The longest key, in bytes; at most 21 KiB, which a path holds with every byte escaped.
    pub key_bytes_max: usize,
    /// The longest value, in bytes.
    pub value_bytes_max: usize,
    /// The largest HTTP body of any request, in bytes.
    pub http_body_bytes_max: usize,
    /// The largest message between peers, in bytes.
    pub peer_frame_bytes_max: usize,
    /// HTTP connections at once; further ones wait until one ends, and an idle or slow one is
    /// closed for them.
    pub http_connections_max: usize,
    /// Connections that peers have opened to this node at once, three for each peer; further ones are
    /// closed.
    pub peer_connections_max: usize,
    /// How long a client may take for a request's header, or pause within its body, and a peer take for
    /// its greeting.
    pub header_timeout_ms: u64,
    /// How long a request may take in all; then 504.
    pub request_timeout_ms: u64,
    /// Writes and linearizable reads in flight at once; further ones get 503.
    pub requests_in_flight_max: usize,
    /// Requests that are on their way to other nodes at once, each on a connection of its own; further
    /// ones get 503. No more connections than these are kept for later ones.
    pub passed_on_max: usize,
}

/// Timing and sizes of consensus.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RaftConfig {
    /// How often a leader shows that it is alive, in milliseconds.
    pub heartbeat_interval_ms: u64,
    /// A follower that heard nothing for `election_timeout_max_ms`, in which it helps nobody to depose
    /// the leader, and then for a random time between this ...
    pub election_timeout_min_ms: u64,
    /// ... and this starts an election, in milliseconds: by default after 400 to 500. At once, if the
    /// leader's system refuses connections.
    pub election_timeout_max_ms: u64,
    /// How long a leader that a majority has just confirmed answers linearizable reads without asking again, in
    /// milliseconds: for so long the voters help nobody else to lead. 0: it asks for every read. Relies on
    /// clocks that do not stop and differ by less than a tenth in their pace.
    pub read_lease_ms: u64,
    /// A snapshot is taken after this many entries since the last one.
    pub snapshot_log_entries: u64,
    /// How many entries that a snapshot covers stay in the log for followers that lag a little.
    pub log_entries_kept: u64,
    /// Append messages in flight to one follower.
    pub append_pipeline_max: usize,
    /// How often, in milliseconds, a follower is sent entries at most that a majority does not need: with
    /// three nodes, the slower one. 0: all followers get every entry at once.
    pub spare_append_pause_ms: u64,
    /// Entries in one append message, in number.
    pub append_entries_max: u64,
    /// Entries in one append message, in bytes; a single larger entry still goes. Four times that are in
    /// flight to one follower at most, and one message more.
    pub append_bytes_max: usize,
    /// One chunk of a snapshot on its way to a follower, in bytes.
    pub snapshot_chunk_bytes: usize,
}

/// How fast keys come to this node's cluster in a change of the ring.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ReshardConfig {
    /// Bytes of records and answers that a leading node copies from other clusters per second, all
    /// handoffs together; 0 means as fast as it goes. What changes at the end of a handoff, while keys
    /// are about to be frozen or are, is counted but does not wait.
    pub handoff_bytes_per_s: u64,
    /// Handoffs whose records are copied side by side, and that a leader which drives a change lets send
    /// at once; further ones wait for their turn.
    pub handoffs_at_once: usize,
    /// How long copying, counting and deleting pause after each piece of work, as a multiple of it. More
    /// leaves more to those who read and write, and takes longer; 0: no pause. Shorter by itself when
    /// keys change faster than they are copied.
    pub pause_times: u32,
    /// About how many bytes are copied at a time: one message, and one entry of the log.
    pub page_bytes: usize,
}

/// What a `raft-kv` process takes of the processor. `admin` and its nodes share one process and take all
/// of it.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RuntimeConfig {
    /// Threads that serve requests and run consensus; 0 means half of the processor's, one at least.
    /// The flusher, RocksDB's background work and the kernel's network need the others.
    pub worker_threads: usize,
}

impl RuntimeConfig {
    /// The number of threads to start.
    pub fn workers(&self) -> usize {
        match self.worker_threads {
            0 => std::thread::available_parallelism().map_or(1, |all| all.get().div_ceil(2)),
            chosen => chosen,
        }
    }
}

/// RocksDB's memory and the log's tail.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct StorageConfig {
    /// Blocks of data files kept in memory, in bytes, shared by all column families.
    pub block_cache_bytes: usize,
    /// Single rows kept in memory, in bytes: those that were written or read lately and are in no memtable any
    /// more. 0: none.
    pub row_cache_bytes: usize,
    /// One memtable of the data, in bytes; up to three exist at once, and for a moment four. RocksDB's own, for the
    /// log, take up to 64 MiB.
    pub memtable_bytes: usize,
    /// The newest log entries kept in memory, in bytes.
    pub log_tail_bytes: usize,
    /// The Raft log's size above which it is cut, in bytes, however few entries it holds. While a follower
    /// is being sent the state, the log may grow as large as the state instead; and for a follower that is
    /// slow to take it, to twice the larger of the two.
    pub log_bytes_max: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            num_clusters: 3,
            nodes_per_cluster: 3,
            host: "127.0.0.1".into(),
            http_base_port: 31000,
            rpc_base_port: 32000,
            data_dir: "data".into(),
            nodes_file: "all_nodes.json".into(),
            weights: Vec::new(),
            insecure: false,
            ring: RingConfig::default(),
            limits: Limits::default(),
            raft: RaftConfig::default(),
            storage: StorageConfig::default(),
            reshard: ReshardConfig::default(),
            runtime: RuntimeConfig::default(),
        }
    }
}

impl Default for RingConfig {
    fn default() -> Self {
        Self { hash_version: HASH_VERSION_DEFAULT, list_ttl_s: LIST_TTL_S_DEFAULT }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            key_bytes_max: KEY_BYTES_MAX_DEFAULT,
            value_bytes_max: 1 << 20,
            http_body_bytes_max: 8 << 20,
            peer_frame_bytes_max: 16 << 20,
            http_connections_max: 4096,
            peer_connections_max: 256,
            header_timeout_ms: 5_000,
            request_timeout_ms: 10_000,
            requests_in_flight_max: 16_384,
            passed_on_max: 2048,
        }
    }
}

impl Default for RaftConfig {
    fn default() -> Self {
        Self {
            heartbeat_interval_ms: 50,
            election_timeout_min_ms: 150,
            election_timeout_max_ms: 250,
            read_lease_ms: 0,
            snapshot_log_entries: 50_000,
            log_entries_kept: 10_000,
            append_pipeline_max: 32,
            spare_append_pause_ms: 4,
            append_entries_max: 1024,
            append_bytes_max: 4 << 20,
            snapshot_chunk_bytes: 1 << 20,
        }
    }
}

impl Default for ReshardConfig {
    fn default() -> Self {
        Self {
            handoff_bytes_per_s: 32 << 20,
            handoffs_at_once: 4,
            pause_times: 16,
            page_bytes: 256 << 10,
        }
    }
}

impl Default for StorageConfig {
    fn default() -> Self {
        Self {
            block_cache_bytes: 128 << 20,
            row_cache_bytes: 128 << 20,
            memtable_bytes: 32 << 20,
            log_tail_bytes: 16 << 20,
            log_bytes_max: 1 << 30,
        }
    }
}

impl Config {
    /// Reads and checks a file. Blocks. The error names the file and, for a bad value, the key.
    pub fn load(path: impl AsRef<Path>) -> Result<Self, ConfigError> {
        let path = path.as_ref();
        Self::parse(&read(path)?, path)
    }

    /// Like [`Self::load`], for a single node: the layout of clusters is not looked at.
    pub fn load_for_node(path: impl AsRef<Path>) -> Result<Self, ConfigError> {
        let path = path.as_ref();
        Self::parse_with(&read(path)?, path, Self::check_node)
    }

    /// Checks a file's text; `path` is for messages only.
    pub fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        Self::parse_with(text, path, |config| config.check_layout().and(config.check_node()))
    }

    fn parse_with(
        text: &str,
        path: &Path,
        check: impl Fn(&Self) -> Result<(), OutOfRange>,
    ) -> Result<Self, ConfigError> {
        let config: Self = toml::from_str(text).map_err(|error| ConfigError::Parse {
            path: path.into(),
            message: error.to_string().trim_end().to_owned(),
        })?;
        check(&config).map_err(|bad| ConfigError::OutOfRange {
            path: path.into(),
            key: bad.key,
            value: bad.value,
            allowed: bad.allowed,
        })?;
        Ok(config)
    }

    fn check_node(&self) -> Result<(), OutOfRange> {
        within("ring.hash_version", self.ring.hash_version, 1..=2)?;
        within("ring.list_ttl_s", self.ring.list_ttl_s, 1..=86_400)?;
        self.limits.check()?;
        self.raft.check(&self.limits)?;
        within("runtime.worker_threads", self.runtime.worker_threads, 0..=1024)?;
        self.reshard.check()?;
        self.storage.check()
    }

    fn check_layout(&self) -> Result<(), OutOfRange> {
        within("num_clusters", self.num_clusters, 1..=CLUSTERS_MAX as u32)?;
        within("nodes_per_cluster", self.nodes_per_cluster, 1..=NODES_MAX)?;
        let highest = PORTS_PER_CLUSTER * self.num_clusters + self.nodes_per_cluster;
        let room = u32::from(u16::MAX) - highest.min(u32::from(u16::MAX));
        within("http_base_port", u32::from(self.http_base_port), 1..=room)?;
        within("rpc_base_port", u32::from(self.rpc_base_port), 1..=room)?;
        let apart = u32::from(self.http_base_port.abs_diff(self.rpc_base_port));
        require(apart > highest, "rpc_base_port", self.rpc_base_port, || {
            format!("it must be more than {highest} away from `http_base_port`, or ports collide")
        })?;
        require(!is_wildcard(&self.host), "host", &self.host, || {
            "a cluster's nodes know each other by it, and nobody can connect to a wildcard; use the \
             machine's own address or name"
                .into()
        })?;
        for (key, path) in [("data_dir", &self.data_dir), ("nodes_file", &self.nodes_file)] {
            require(!path.as_os_str().is_empty(), key, "empty", || "it needs a name".into())?;
        }
        let count = self.weights.len();
        require(count == 0 || count == self.num_clusters as usize, "weights", count, || {
            format!(
                "it must be empty or list one weight for each of {} clusters",
                self.num_clusters
            )
        })?;
        let bad = self.weights.iter().find(|w| !(w.is_finite() && **w > 0.0));
        match bad {
            Some(weight) => require(false, "weights", weight, || "weights must be above 0".into()),
            None => Ok(()),
        }
    }
}

/// Writes that come together share a log entry up to this many bytes; a larger one has an entry of its
/// own. Several fit into a message to a follower, and who comes first is answered soon.
pub const ENTRY_BYTES_MAX: usize = 1 << 20;

/// What an entry and the message around it have besides keys and values: at most 99 bytes for each of
/// 1024 writes, when every one is of another client with the longest name.
const ENTRY_OVERHEAD_BYTES_MAX: usize = 128 << 10;

/// `limits.key_bytes_max` unless configured.
pub(crate) const KEY_BYTES_MAX_DEFAULT: usize = 4 << 10;

/// The largest value that can be configured, in bytes. Clients take answers of this size and some overhead.
pub const VALUE_BYTES_MAX: usize = 64 << 20;

/// The largest key that can be configured, in bytes: in a path each of them may take three, and a path has
/// 64 KiB at most. No cluster holds a longer one, and what is handed over is checked against this when it is
/// applied: so it is the same for all nodes, whatever each is configured to take.
pub const KEY_BYTES_MAX: usize = 21 << 10;

impl Limits {
    fn check(&self) -> Result<(), OutOfRange> {
        within("limits.key_bytes_max", self.key_bytes_max, 1..=KEY_BYTES_MAX)?;
        within("limits.value_bytes_max", self.value_bytes_max, 1..=VALUE_BYTES_MAX)?;
        within(
            "limits.http_body_bytes_max",
            self.http_body_bytes_max,
            self.value_bytes_max..=1 << 30,
        )?;
        // A peer frame must hold one entry, of the largest key and value or of many small ones, and what
        // frames it.
        let write_bytes_max = self.key_bytes_max + self.value_bytes_max;
        let entry_bytes_max = write_bytes_max.max(ENTRY_BYTES_MAX) + ENTRY_OVERHEAD_BYTES_MAX;
        within(
            "limits.peer_frame_bytes_max",
            self.peer_frame_bytes_max,
            entry_bytes_max..=1 << 30,
        )?;
        within("limits.http_connections_max", self.http_connections_max, 1..=1_000_000)?;
        within("limits.peer_connections_max", self.peer_connections_max, 8..=100_000)?;
        within("limits.header_timeout_ms", self.header_timeout_ms, 10..=600_000)?;
        within("limits.request_timeout_ms", self.request_timeout_ms, 100..=600_000)?;
        within("limits.requests_in_flight_max", self.requests_in_flight_max, 1..=1_000_000)?;
        within("limits.passed_on_max", self.passed_on_max, 1..=100_000)
    }
}

impl RaftConfig {
    fn check(&self, limits: &Limits) -> Result<(), OutOfRange> {
        within("raft.heartbeat_interval_ms", self.heartbeat_interval_ms, 10..=60_000)?;
        let election_min = 2 * self.heartbeat_interval_ms;
        within(
            "raft.election_timeout_min_ms",
            self.election_timeout_min_ms,
            election_min..=600_000,
        )?;
        let election_max = self.election_timeout_min_ms + 1;
        within(
            "raft.election_timeout_max_ms",
            self.election_timeout_max_ms,
            election_max..=1_200_000,
        )?;
        // Else elections are over before the leases that they wait for.
        let lease_max = READ_LEASE_MS_MAX.min(self.election_timeout_min_ms);
        within("raft.read_lease_ms", self.read_lease_ms, 0..=lease_max)?;
        within("raft.snapshot_log_entries", self.snapshot_log_entries, 10..=100_000_000)?;
        within("raft.log_entries_kept", self.log_entries_kept, 0..=100_000_000)?;
        within("raft.append_pipeline_max", self.append_pipeline_max, 1..=1024)?;
        within("raft.spare_append_pause_ms", self.spare_append_pause_ms, 0..=20)?;
        within("raft.append_entries_max", self.append_entries_max, 1..=65_536)?;
        // Half a frame: one entry more than the bound may be in a message.
        let half_frame = limits.peer_frame_bytes_max / 2;
        within("raft.append_bytes_max", self.append_bytes_max, 1..=half_frame)?;
        within("raft.snapshot_chunk_bytes", self.snapshot_chunk_bytes, 1 << 10..=half_frame)
    }
}

impl ReshardConfig {
    fn check(&self) -> Result<(), OutOfRange> {
        within("reshard.handoff_bytes_per_s", self.handoff_bytes_per_s, 0..=1 << 40)?;
        within("reshard.handoffs_at_once", self.handoffs_at_once, 1..=64)?;
        within("reshard.pause_times", self.pause_times, 0..=1000)?;
        within("reshard.page_bytes", self.page_bytes, 1 << 10..=ENTRY_BYTES_MAX)
    }
}

impl StorageConfig {
    fn check(&self) -> Result<(), OutOfRange> {
        within("storage.block_cache_bytes", self.block_cache_bytes, 1 << 20..=1 << 40)?;
        let row_cache = self.row_cache_bytes;
        let allowed = row_cache == 0 || (1 << 20..=1 << 40).contains(&row_cache);
        require(allowed, "storage.row_cache_bytes", row_cache.to_string(), || {
            format!("0, or {} to {}, is allowed", 1 << 20, 1_u64 << 40)
        })?;
        within("storage.memtable_bytes", self.memtable_bytes, 1 << 20..=1 << 30)?;
        within("storage.log_tail_bytes", self.log_tail_bytes, 0..=1 << 34)?;
        // What was purged is counted until RocksDB lets go of it: up to three memtables of 16 MiB.
        within("storage.log_bytes_max", self.log_bytes_max, 64 << 20..=1 << 40)
    }
}

fn read(path: &Path) -> Result<String, ConfigError> {
    std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.into(), source })
}

/// Whether an address, with or without the brackets of IPv6, means all of a machine's addresses.
fn is_wildcard(host: &str) -> bool {
    let bare = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(host);
    bare.parse::<IpAddr>().is_ok_and(|address| address.is_unspecified())
}

struct OutOfRange {
    key: &'static str,
    value: String,
    allowed: String,
}

fn within<T: PartialOrd + ToString>(
    key: &'static str,
    value: T,
    allowed: RangeInclusive<T>,
) -> Result<(), OutOfRange> {
    require(allowed.contains(&value), key, value.to_string(), || {
        format!("{} to {} is allowed", allowed.start().to_string(), allowed.end().to_string())
    })
}

fn require(
    holds: bool,
    key: &'static str,
    value: impl ToString,
    allowed: impl FnOnce() -> String,
) -> Result<(), OutOfRange> {
    if holds {
        return Ok(());
    }
    Err(OutOfRange { key, value: value.to_string(), allowed: allowed() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, ConfigError> {
        Config::parse(text, Path::new("Config.toml"))
    }

    #[test]
    fn an_empty_file_means_the_defaults_and_they_are_allowed() {
        assert_eq!(parse("").unwrap(), Config::default());
    }

    #[test]
    fn the_projects_own_file_spells_out_the_defaults() {
        let text = include_str!("../Config.toml");
        assert_eq!(parse(text).unwrap(), Config::default());
    }

    #[test]
    fn an_unknown_key_is_refused_with_its_line() {
        let error = parse("num_clusters = 3\nnodes_per_clutser = 3\n").unwrap_err().to_string();
        assert!(error.contains("line 2") && error.contains("nodes_per_clutser"), "{error}");
    }

    #[test]
    fn impossible_values_are_refused_by_name() {
        for (text, key) in [
            ("num_clusters = 0", "num_clusters"),
            ("nodes_per_cluster = 10", "nodes_per_cluster"),
            ("http_base_port = 65530", "http_base_port"),
            ("rpc_base_port = 31001", "rpc_base_port"),
            ("host = \"0.0.0.0\"\ninsecure = true", "host"),
            ("host = \"[::]\"\ninsecure = true", "host"),
            ("data_dir = \"\"", "data_dir"),
            ("nodes_file = \"\"", "nodes_file"),
            ("weights = [1.0]", "weights"),
            ("weights = [1.0, -1.0, 1.0]", "weights"),
            ("ring.hash_version = 3", "ring.hash_version"),
            ("limits.key_bytes_max = 0", "limits.key_bytes_max"),
            ("limits.key_bytes_max = 21505", "limits.key_bytes_max"),
            ("limits.peer_frame_bytes_max = 1179647", "limits.peer_frame_bytes_max"),
            ("raft.heartbeat_interval_ms = 300", "raft.election_timeout_min_ms"),
            ("raft.read_lease_ms = 101", "raft.read_lease_ms"),
            ("storage.memtable_bytes = 5", "storage.memtable_bytes"),
            ("storage.row_cache_bytes = 5", "storage.row_cache_bytes"),
            ("reshard.handoffs_at_once = 0", "reshard.handoffs_at_once"),
            ("reshard.pause_times = 1001", "reshard.pause_times"),
            ("reshard.page_bytes = 1048577", "reshard.page_bytes"),
            ("runtime.worker_threads = 1025", "runtime.worker_threads"),
        ] {
            let Err(ConfigError::OutOfRange { key: found, .. }) = parse(text) else {
                panic!("{text} was not refused");
            };
            assert_eq!(found, key, "{text}");
        }
    }

    #[test]
    fn a_value_of_the_wrong_type_is_refused_with_its_line() {
        let error = parse("\n[limits]\nkey_bytes_max = \"big\"\n").unwrap_err().to_string();
        assert!(error.contains("line 3"), "{error}");
    }
}
