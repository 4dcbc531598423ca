//! What a change of the ring costs those who use the store meanwhile: 3 clusters become 4, and 3 again,
//! while tasks write and read.
//!
//! Run `cargo bench --bench reshard_benchmark`. It starts clusters of its own in its process, on free
//! ports and in a temporary directory, writes the keys, and lets every task write and read keys that
//! nobody else touches, so that each answer can be checked: a value that was acknowledged and is gone is
//! **lost**, one that is older than what was acknowledged is **stale**, and whatever reaches the caller
//! as an error is an **error**. One of them, or keys moved that are more than 1 % off those that must move,
//! and the exit code is 1.
//!
//! | variable | means | default |
//! | --- | --- | ---: |
//! | `KEYS` | keys, with values of 100 bytes | 1,000,000 |
//! | `TASKS` | tasks; of the operations of each, half are writes, half linearizable reads | 64 |
//! | `NODES` | nodes of each cluster | 1 |
//! | `SECONDS` | how long the load runs before, between and after the changes | 5 |
//!
//! **Frozen** is how long nobody served what a handoff moves, as its driver tells it when the destination
//! has taken over: from asking the source to freeze to the destination's answer, which is a little more
//! than the truth. **Moved** is what the destinations took over; **must move** are the keys whose owners
//! by the two rings differ, found key by key.

use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use distrib_kv_store::cluster_manager::ClusterManager;
use distrib_kv_store::config::Config;
use distrib_kv_store::kvclient::KVClient;
use distrib_kv_store::node::{Node, NodeOptions};
use distrib_kv_store::reshard::{self, Begun, Change, HttpClusters, Plan, Role};
use distrib_kv_store::ring::{Ring, RingTable};

#[path = "reshard/frozen.rs"]
mod frozen;
#[path = "reshard/load.rs"]
mod load;

use frozen::{Handoffs, Moved};
use load::{Counts, Load, key};

/// The programs' allocator.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// The clusters before the first change and after the second.
const CLUSTERS: u32 = 3;

/// A change that takes longer has failed.
const CHANGE_TIMEOUT: Duration = Duration::from_secs(150);

/// What may be set from outside.
struct Settings {
    keys: u32,
    tasks: u32,
    nodes: u32,
    phase: Duration,
}

impl Settings {
    fn from_environment() -> Self {
        Self {
            keys: setting("KEYS", 1_000_000),
            tasks: setting("TASKS", 64),
            nodes: setting("NODES", 1),
            phase: Duration::from_secs(setting("SECONDS", 5).into()),
        }
    }
}

fn setting(name: &str, default: u32) -> u32 {
    let Ok(text) = std::env::var(name) else { return default };
    let value = text.parse().ok().filter(|value| *value > 0);
    value.unwrap_or_else(|| panic!("{name} is a number above 0, not `{text}`"))
}

/// What one change came to.
struct Outcome {
    name: &'static str,
    before: f64,
    during: f64,
    after: f64,
    counts: Counts,
    took: Duration,
    longest: Duration,
    must_move: u64,
    keys: u32,
    by_formula: f64,
    handoffs: Vec<Moved>,
}

impl Outcome {
    /// How many keys have moved.
    fn moved(&self) -> u64 {
        self.handoffs.iter().map(|handoff| handoff.keys).sum()
    }

    /// Whether those are the keys that must move, to 1 %.
    fn is_exact(&self) -> bool {
        self.moved().abs_diff(self.must_move) * 100 <= self.must_move
    }
}

fn main() -> ExitCode {
    let handoffs = Handoffs::install();
    let settings = Settings::from_environment();
    let runtime = tokio::runtime::Runtime::new().expect("a runtime can be made");
    let outcomes = runtime.block_on(measure(&settings, &handoffs));
    print(&settings, &outcomes);
    let clean = outcomes.iter().all(|outcome| outcome.counts.is_clean() && outcome.is_exact());
    if clean { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

async fn measure(settings: &Settings, handoffs: &Handoffs) -> Vec<Outcome> {
    let folder = tempfile::tempdir().expect("a temporary directory can be made");
    let config = Config {
        num_clusters: CLUSTERS,
        nodes_per_cluster: settings.nodes,
        data_dir: folder.path().join("data"),
        nodes_file: folder.path().join("all_nodes.json"),
        ..Config::default()
    };
    let manager =
        ClusterManager::start_on_free_ports(config.clone()).await.expect("the clusters start");
    let mut fourth = Vec::new();
    for id in 1..=settings.nodes.into() {
        let options = NodeOptions {
            id,
            cluster: "c4".parse().expect("it is an id"),
            http_addr: "127.0.0.1:0".into(),
            rpc_addr: "127.0.0.1:0".into(),
            data_dir: folder.path().join(format!("c4-n{id}")),
            config: config.clone(),
        };
        fourth.push(Node::start(options).await.expect("a node starts"));
    }
    let client = KVClient::new(&config.nodes_file).await.expect("the clusters answer");
    let begun = Instant::now();
    load::fill(&client, settings.keys).await;
    eprintln!("{} keys written in {:.1} s", settings.keys, begun.elapsed().as_secs_f64());

    let load = Arc::new(Load::start(&client, settings.keys, settings.tasks));
    let address = |node: &Node| (node.http_addr().to_string(), node.rpc_addr().to_string());
    let add = Change::Add {
        id: "c4".parse().expect("it is an id"),
        nodes: fourth.iter().map(address).collect(),
        weight: 1.0,
    };
    let remove = Change::Remove("c4".parse().expect("it is an id"));
    let world = World { settings, handoffs, addresses: manager.nodes(), load: &load };
    let mut outcomes = Vec::new();
    let (mut ring, mut before) = (client.ring(), world.rest().await);
    for (name, change) in [("3 -> 4", add), ("4 -> 3", remove)] {
        let (outcome, next) = world.change(name, change, &ring, before).await;
        (ring, before) = (next, outcome.after);
        outcomes.push(outcome);
    }
    let begun = Instant::now();
    let found = load.stop_and_verify(&config.nodes_file).await;
    eprintln!("{} keys read back in {:.1} s", settings.keys, begun.elapsed().as_secs_f64());
    outcomes.last_mut().expect("there were changes").counts.add(&found);
    for node in fourth {
        node.shutdown().await.expect("a node stops");
    }
    manager.shutdown().await.expect("the clusters stop");
    outcomes
}

/// What is measured, and with what.
struct World<'a> {
    settings: &'a Settings,
    handoffs: &'a Handoffs,
    addresses: Vec<Vec<String>>,
    load: &'a Load,
}

impl World<'_> {
    /// Operations in a second while no change runs.
    async fn rest(&self) -> f64 {
        // What the last change or the filling has left to do in the background is not looked at.
        tokio::time::sleep(Duration::from_secs(1)).await;
        let (begun, done) = (Instant::now(), self.load.counts().done());
        tokio::time::sleep(self.settings.phase).await;
        (self.load.counts().done() - done) as f64 / begun.elapsed().as_secs_f64()
    }

    /// Changes `old`; what that came to, and the ring then.
    async fn change(
        &self,
        name: &'static str,
        change: Change,
        old: &Ring,
        before: f64,
    ) -> (Outcome, Ring) {
        let http = HttpClusters::default();
        self.load.take_longest();
        let (begun, counts) = (Instant::now(), self.load.counts());
        let next = tokio::time::timeout(CHANGE_TIMEOUT, async {
            let begun = match reshard::begin(&http, &self.addresses, &change).await? {
                Begun::Change(begun) => begun,
                Begun::AlreadySo(ring) => return Ok(ring),
            };
            let (role, begun) = (Role::Onlooker, Some(&begun));
            reshard::follow(&http, &self.addresses, role, begun, |_, _| {}).await
        });
        let next = next.await.expect("the change ends in time").expect("the change succeeds");
        let took = begun.elapsed();
        let in_change = self.load.counts();
        let longest = self.load.take_longest();
        let during = (in_change.done() - counts.done()) as f64 / took.as_secs_f64();
        let after = self.rest().await;
        let outcome = Outcome {
            name,
            before,
            during,
            after,
            counts: self.load.counts().since(&counts),
            took,
            longest,
            must_move: must_move(old, &next, self.settings.keys),
            keys: self.settings.keys,
            by_formula: Plan::new(old, &next).expect("both are rings").share(),
            handoffs: self.handoffs.take(),
        };
        (outcome, next)
    }
}

/// How many of the keys have another owner by the new ring.
fn must_move(old: &Ring, next: &Ring, keys: u32) -> u64 {
    let table = |ring: &Ring| RingTable::new(ring.clone()).expect("it is a ring");
    let (old, next) = (table(old), table(next));
    let moves = |number: &u32| {
        let key = key(*number);
        old.owner(key.as_bytes()).map(|o| &o.id) != next.owner(key.as_bytes()).map(|o| &o.id)
    };
    (0..keys).filter(moves).count() as u64
}

fn print(settings: &Settings, outcomes: &[Outcome]) {
    let Settings { keys, tasks, nodes, .. } = settings;
    println!(
        "\n{keys} keys of {} bytes, {tasks} tasks, {nodes} node(s) a cluster",
        load::VALUE_BYTES
    );
    let row = |name: &str, cell: &dyn Fn(&Outcome) -> String| {
        let cells: Vec<String> = outcomes.iter().map(|o| format!("{:>22}", cell(o))).collect();
        println!("| {name:<38} |{} |", cells.join(" |"));
    };
    row("", &|o| format!("{} clusters", o.name));
    println!("| --- |{}", " ---: |".repeat(outcomes.len()));
    row("lost / stale / errors", &|o| o.counts.to_string());
    row("operations checked", &|o| o.counts.done().to_string());
    row("keys moved / that must move", &|o| format!("{} / {}", o.moved(), o.must_move));
    row("share moved / share by the formula", &|o| {
        let share = o.moved() as f64 / f64::from(o.keys);
        format!("{:.2} % / {:.2} %", share * 100.0, o.by_formula * 100.0)
    });
    row("keys and values moved, MB", &|o| {
        format!("{:.1}", o.moved() as f64 * record_bytes() / 1e6)
    });
    row("duration, s", &|o| format!("{:.1}", o.took.as_secs_f64()));
    row("frozen, longest handoff, ms", &|o| {
        let longest = o.handoffs.iter().map(|handoff| handoff.frozen).max();
        longest.map_or("none told".into(), |time| format!("{:.0}", time.as_secs_f64() * 1e3))
    });
    row("longest operation, ms", &|o| format!("{:.0}", o.longest.as_secs_f64() * 1e3));
    row("throughput during / before", &|o| format!("{:.2}", o.during / o.before));
    row("throughput after / before", &|o| format!("{:.2}", o.after / o.before));
    row("operations a second before", &|o| format!("{:.0}", o.before));
    for outcome in outcomes {
        let each = outcome.handoffs.iter();
        let each = each.map(|Moved { handoff, frozen, .. }| {
            format!("{handoff} {:.0} ms", frozen.as_secs_f64() * 1e3)
        });
        println!("frozen, {}: {}", outcome.name, each.collect::<Vec<_>>().join(", "));
    }
}

fn record_bytes() -> f64 {
    (key(0).len() + load::VALUE_BYTES) as f64
}
