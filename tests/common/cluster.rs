//! Clusters of real processes: formed over HTTP, killed, paused and started again.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use serde_json::{Value, json};
use tempfile::TempDir;

use super::line::try_request;
use super::network::{Network, ip_of};
use super::{Answer, NodeOptions, NodeProcess, RAFT_KV, eventually};

/// Settings for tests that lose leaders, on a busy machine with two cores: a follower stands for
/// election 0.9 to 1.2 s after it last heard a leader. A leader that stalls for 0.6 s may be
/// deposed: by then it takes its majority for lost, and sends no heartbeat for 1.2 s. For a test in
/// which the leader must stay the same there is [`STEADY`].
pub const FAST: &str = "
[raft]
heartbeat_interval_ms = 75
election_timeout_min_ms = 300
election_timeout_max_ms = 600
";

/// Settings for tests that need the same leader from one line to the next: only a stall of 4 s
/// costs it the lead. The first voter elects itself at once, and a leader whose process ended is
/// replaced as soon as with [`FAST`], because its peers find its port closed.
pub const STEADY: &str = "
[raft]
heartbeat_interval_ms = 75
election_timeout_min_ms = 3000
election_timeout_max_ms = 4000
";

/// How long a node that runs may take to say what it knows.
const METRICS_TIMEOUT: Duration = Duration::from_secs(10);

/// A cluster of `raft-kv` processes with ids from 1. Ends with its drop.
pub struct Cluster {
    nodes: Vec<NodeProcess>,
    /// Killed or paused.
    away: BTreeSet<u64>,
    // Last, so that it is removed after the processes ended.
    dir: TempDir,
}

impl Cluster {
    /// Starts nodes that know nothing of each other yet.
    pub fn start(count: u64, config: &str) -> Self {
        Self::start_as("c1", count, config)
    }

    /// The same for another cluster id.
    pub fn start_as(cluster: &str, count: u64, config: &str) -> Self {
        Self::start_each(cluster, count, config, |_| {
            (free_address(), free_address(), Command::new(RAFT_KV))
        })
    }

    /// Starts each node on a host of its own, where all ports are free.
    pub fn start_on(network: &Network, count: u64, config: &str) -> Self {
        Self::start_each("c1", count, &format!("insecure = true\n{config}"), |id| {
            let (http, rpc) = (format!("{}:31000", ip_of(id)), format!("{}:32000", ip_of(id)));
            (http, rpc, network.command(id, RAFT_KV))
        })
    }

    /// `node` says where a node serves HTTP and its peers, and what becomes a node there.
    fn start_each(
        cluster: &str,
        count: u64,
        config: &str,
        node: impl Fn(u64) -> (String, String, Command),
    ) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let config_file = dir.path().join("Config.toml");
        std::fs::write(&config_file, config).unwrap();
        let nodes = (1..=count).map(|id| {
            let (http_addr, rpc_addr, command) = node(id);
            let options = NodeOptions {
                http_addr,
                rpc_addr,
                cluster: Some(cluster.into()),
                config_file: Some(config_file.clone()),
                ..NodeOptions::new(id, dir.path().join(format!("node{id}")))
            };
            NodeProcess::start_by(&options, command)
        });
        let nodes = nodes.collect();
        Self { nodes, away: BTreeSet::new(), dir }
    }

    /// A cluster in which all nodes vote and are ready.
    pub fn formed(count: u64, config: &str) -> Self {
        let cluster = Self::start(count, config);
        cluster.form();
        cluster
    }

    /// Makes all nodes voters, as a person with curl would.
    pub fn form(&self) {
        self.form_by("{}");
        self.await_ready();
    }

    /// The same for a cluster that serves no key before it has a ring. It is not ready then.
    pub fn form_awaiting_ring(&self) {
        self.form_by(r#"{"awaits_ring":true}"#);
    }

    fn form_by(&self, init: &str) {
        expect_ok(&self.post(1, "/cluster/init", init));
        self.await_node(1, "leads", |m| m["state"] == "leader");
        for id in 2..=self.nodes.len() as u64 {
            self.add_learner(1, id);
        }
        let ids: Vec<u64> = self.ids().collect();
        if ids.len() > 1 {
            self.change_membership(&ids);
        }
    }

    /// Makes these nodes the voters, and waits until all know. On a busy machine the leader may
    /// lose the lead at the very moment, so it is asked again until it is done: a change that is
    /// made already changes nothing.
    pub fn change_membership(&self, ids: &[u64]) {
        let body = json!(ids).to_string();
        let mut last = String::new();
        eventually(&format!("{body} vote"), || {
            let answer = self.post(1, "/cluster/change-membership", &body);
            if answer.status != 200 && answer.text() != last {
                last = answer.text();
                eprintln!("{body} do not vote yet: {last}");
            }
            (answer.status == 200).then_some(())
        });
        self.await_all("knows the membership", |m| m["voters"] == json!(ids));
    }

    /// Asks node `by` to add node `id` as a learner.
    pub fn add_learner(&self, by: u64, id: u64) {
        let body = json!([id, self.http(id), self.rpc(id)]).to_string();
        expect_ok(&self.post(by, "/cluster/add-learner", &body));
    }

    pub fn ids(&self) -> impl Iterator<Item = u64> + use<> {
        1..=self.nodes.len() as u64
    }

    /// The nodes that are neither killed nor paused.
    pub fn up(&self) -> Vec<u64> {
        self.ids().filter(|id| !self.away.contains(id)).collect()
    }

    pub fn node(&self, id: u64) -> &NodeProcess {
        &self.nodes[id as usize - 1]
    }

    pub fn node_mut(&mut self, id: u64) -> &mut NodeProcess {
        &mut self.nodes[id as usize - 1]
    }

    pub fn http(&self, id: u64) -> &str {
        self.node(id).http()
    }

    pub fn rpc(&self, id: u64) -> &str {
        self.node(id).rpc()
    }

    /// The HTTP addresses of all nodes.
    pub fn addresses(&self) -> Vec<String> {
        self.ids().map(|id| self.http(id).to_owned()).collect()
    }

    pub fn data_dir(&self, id: u64) -> &Path {
        &self.node(id).options.data_dir
    }

    /// A place for a test's other files.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// All that node `id` logged since the beginning.
    pub fn log(&self, id: u64) -> String {
        std::fs::read_to_string(&self.node(id).log).unwrap_or_default()
    }

    // --- Faults ----------------------------------------------------------------------------------

    pub fn kill9(&mut self, id: u64) {
        self.node_mut(id).kill9();
        self.away.insert(id);
    }

    /// Starts a node again that ended, at its addresses, on its data.
    pub fn restart(&mut self, id: u64) {
        self.restart_by(id, Command::new(RAFT_KV));
    }

    /// The same by a command that becomes a node when it gets the node's flags.
    pub fn restart_by(&mut self, id: u64, command: Command) {
        let options = self.node(id).options.clone();
        await_free(&options.http_addr);
        await_free(&options.rpc_addr);
        *self.node_mut(id) = NodeProcess::start_by(&options, command);
        self.away.remove(&id);
    }

    pub fn pause(&mut self, id: u64) {
        self.node(id).pause();
        self.away.insert(id);
    }

    pub fn resume(&mut self, id: u64) {
        self.node(id).resume();
        self.away.remove(&id);
    }

    // --- Conditions ------------------------------------------------------------------------------

    /// What node `id` says about itself; `None` when it does not answer.
    pub fn metrics(&self, id: u64) -> Option<Value> {
        let asked =
            try_request(self.http(id), "GET", "/cluster/metrics", &[], b"", METRICS_TIMEOUT);
        asked.ok().filter(|answer| answer.status == 200).map(|answer| answer.json())
    }

    /// Waits for a leader on which all running nodes agree.
    pub fn leader(&self) -> u64 {
        eventually("the running nodes agree on a leader", || {
            let up = self.up();
            let seen: Vec<Value> = up.iter().filter_map(|id| self.metrics(*id)).collect();
            let leader = seen.first()?["current_leader"].as_u64()?;
            let term = &seen[0]["term"];
            let agreed = seen.iter().all(|m| m["current_leader"] == leader && m["term"] == *term);
            let leads = seen.iter().any(|m| m["id"] == leader && m["state"] == "leader");
            (seen.len() == up.len() && agreed && leads).then_some(leader)
        })
    }

    /// A running node that does not lead.
    pub fn follower(&self) -> u64 {
        let leader = self.leader();
        self.up().into_iter().find(|id| *id != leader).expect("there are several nodes")
    }

    /// Waits until what every running node says about itself fulfils a condition.
    pub fn await_all(&self, what: &str, condition: impl Fn(&Value) -> bool) {
        for id in self.up() {
            self.await_node(id, what, &condition);
        }
    }

    /// Waits until what node `id` says about itself fulfils a condition.
    pub fn await_node(&self, id: u64, what: &str, condition: impl Fn(&Value) -> bool) -> Value {
        let mut last = None;
        let mut ask = || {
            last = self.metrics(id);
            last.clone().filter(&condition)
        };
        let deadline = std::time::Instant::now() + super::PATIENCE;
        loop {
            match ask() {
                Some(metrics) => return metrics,
                None => assert!(
                    std::time::Instant::now() < deadline,
                    "node {id}: not in time: {what}; it says {last:?}"
                ),
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Waits until all running nodes are ready: a leader is known, what is committed is applied.
    pub fn await_ready(&self) {
        for id in self.up() {
            eventually(&format!("node {id} is ready"), || {
                let ready =
                    try_request(self.http(id), "GET", "/readyz", &[], b"", METRICS_TIMEOUT).ok()?;
                (ready.status == 200).then_some(())
            });
        }
    }

    /// Waits until all running nodes have applied what the leader has applied now.
    pub fn await_caught_up(&self) {
        let leader = self.leader();
        let goal = self.await_node(leader, "has applied something", |m| m["last_applied"].is_u64());
        let goal = goal["last_applied"].as_u64();
        self.await_all(&format!("has applied up to {goal:?}"), |m| {
            m["last_applied"].as_u64() >= goal
        });
    }

    // --- Requests --------------------------------------------------------------------------------

    pub fn post(&self, id: u64, path: &str, body: &str) -> Answer {
        super::post(self.http(id), path, body)
    }

    pub fn get(&self, id: u64, path: &str) -> Answer {
        super::get(self.http(id), path)
    }

    /// Stores a value and returns its revision.
    #[track_caller]
    pub fn put(&self, id: u64, key: &str, value: &str) -> u64 {
        let answer = super::put(self.http(id), &format!("/v1/kv/{key}"), value.as_bytes());
        expect_ok(&answer);
        answer.json()["revision"].as_u64().expect("a revision")
    }

    /// Reads with these headers; `None` when the key is absent.
    #[track_caller]
    pub fn read(
        &self,
        id: u64,
        key: &str,
        query: &str,
        headers: &[(&str, &str)],
    ) -> Option<String> {
        let path = format!("/v1/kv/{key}{query}");
        let answer = super::request(self.http(id), "GET", &path, headers, b"");
        if answer.status == 404 {
            return None;
        }
        expect_ok(&answer);
        Some(answer.text())
    }
}

impl NodeProcess {
    /// Waits for its end, of which the caller took care.
    pub fn ended(&mut self) -> std::process::ExitStatus {
        eventually("the node ends", || self.child.try_wait().unwrap())
    }
}

/// Asserts that a request was done.
#[track_caller]
pub fn expect_ok(answer: &Answer) {
    assert_eq!(answer.status, 200, "{}", answer.text());
}

/// The next number of a well-mixed sequence (SplitMix64): randomness that a seed repeats.
pub fn splitmix(state: u64) -> u64 {
    let z = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// The lowest and highest port that tests give to nodes. Below the ports that Linux gives to outgoing
/// connections: a killed node's port must still be free when it comes back, and a peer that calls a
/// dead node must not meet itself.
const PORTS: std::ops::Range<u16> = 12_000..30_000;

/// An address that nobody listens on and that this process gives to nobody else.
pub fn free_address() -> String {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let places = PORTS.end - PORTS.start;
    // Test processes at the same time begin at different places.
    let start = (std::process::id() % 180) as u16 * 100;
    for _ in 0..places {
        let place = (start + NEXT.fetch_add(1, Ordering::SeqCst) % places) % places;
        let address = format!("127.0.0.1:{}", PORTS.start + place);
        if is_free(&address) {
            return address;
        }
    }
    panic!("no port is free");
}

/// Whether nobody listens there. Binds and does not listen: a process that another thread is just
/// starting holds a copy of every socket for a moment, and a copy that listens would be in the way.
fn is_free(address: &str) -> bool {
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.set_reuseaddr(true).unwrap();
    socket.bind(address.parse().unwrap()).is_ok()
}

/// Waits until an address can be listened on again.
fn await_free(address: &str) {
    eventually(&format!("{address} is free again"), || is_free(address).then_some(()));
}
