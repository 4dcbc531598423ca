//! Networks that fail: cut off hosts, one-way losses, a firewall. Nothing acknowledged is lost, no
//! linearizable read is old, whoever still has a majority goes on, and nobody deposes a leader that the
//! others hear.
//!
//! Ignored, because they make network namespaces, for which they have to be root and to have iproute2 and
//! util-linux: `cargo test --test partitions -- --ignored --test-threads 1`.

mod common;

use std::time::Duration;

use common::cluster::{Cluster, FAST, splitmix};
use common::load::{Load, LoadOptions};
use common::network::{Network, in_a_namespace};
use common::watch::Watch;

/// How many faults, one after the other.
const FAULTS: u64 = 20;

/// How many writes must be acknowledged while a fault lasts. It lasts until then, and longer than a follower
/// that hears nobody waits before it stands for election: up to twice the longest election timeout.
const WRITES_DURING: u64 = 200;
const ELECTION_TIME: Duration = Duration::from_millis(1500);

/// Where the same leader has to stay, it must not be a stall of the machine that deposes it.
const PATIENT: &str = "
[raft]
heartbeat_interval_ms = 75
election_timeout_min_ms = 1000
election_timeout_max_ms = 1500
";
const PATIENT_ELECTION_TIME: Duration = Duration::from_millis(3300);

/// A request that its node cannot answer is tried at the next.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(2);

/// What happens to the network between three nodes; each leaves a majority that hear each other.
#[derive(Debug, Clone, Copy)]
enum Fault {
    /// The host is lost as a whole, for all others and for clients.
    Unplugged { host: u64 },
    /// What one sends is lost on its way to the other.
    OneWay { from: u64, to: u64 },
    /// Both hear the third, and not each other.
    Between { a: u64, b: u64 },
    /// It hears the others, who do not hear it.
    Mute { host: u64, others: [u64; 2] },
    /// It is heard by the others, and hears nothing.
    Deaf { host: u64, others: [u64; 2] },
    /// A firewall refuses what it sends to the other.
    Refused { host: u64, by: u64 },
}

impl Fault {
    /// Half of them are the leader's.
    fn random(draw: u64, leader: u64) -> Self {
        let host = [leader, leader, leader % 3 + 1, (leader + 1) % 3 + 1][(draw % 4) as usize];
        let others = [host % 3 + 1, (host + 1) % 3 + 1];
        let other = others[(draw / 4 % 2) as usize];
        match draw / 8 % 6 {
            0 => Self::Unplugged { host },
            1 => Self::OneWay { from: host, to: other },
            2 => Self::Between { a: host, b: other },
            3 => Self::Mute { host, others },
            4 => Self::Deaf { host, others },
            _ => Self::Refused { host, by: other },
        }
    }

    /// All that can happen to this follower and leave its leader a majority.
    fn all_of(follower: u64, leader: u64) -> [Self; 7] {
        let others = [leader, 6 - follower - leader];
        [
            Self::Unplugged { host: follower },
            Self::OneWay { from: follower, to: leader },
            Self::OneWay { from: leader, to: follower },
            Self::Between { a: follower, b: leader },
            Self::Mute { host: follower, others },
            Self::Deaf { host: follower, others },
            Self::Refused { host: follower, by: leader },
        ]
    }

    fn strike(self, network: &mut Network) {
        match self {
            Self::Unplugged { host } => network.unplug(host),
            Self::OneWay { from, to } => network.lose(from, to),
            Self::Between { a, b } => {
                network.lose(a, b);
                network.lose(b, a);
            }
            Self::Mute { host, others } => others.into_iter().for_each(|to| network.lose(host, to)),
            Self::Deaf { host, others } => others.into_iter().for_each(|by| network.lose(by, host)),
            Self::Refused { host, by } => network.refuse(host, by),
        }
    }
}

/// Writers and readers at all nodes, while the network fails in one way after the other.
#[test]
#[ignore = "needs root, to make network namespaces"]
fn nothing_acknowledged_is_lost_and_nothing_read_is_old() {
    networks_fail("nothing_acknowledged_is_lost_and_nothing_read_is_old", FAST);
}

/// The same with leaders that do not ask for each read, among them those that are cut off from all others and not
/// from their clients.
#[test]
#[ignore = "needs root, to make network namespaces"]
fn with_leases_nothing_acknowledged_is_lost_and_nothing_read_is_old() {
    let test = "with_leases_nothing_acknowledged_is_lost_and_nothing_read_is_old";
    networks_fail(test, &format!("{FAST}\nread_lease_ms = 100\n"));
}

fn networks_fail(test: &str, config: &str) {
    if !in_a_namespace(test) {
        return;
    }
    let mut network = Network::new(3);
    let cluster = Cluster::start_on(&network, 3, config);
    cluster.form();
    let seed = std::env::var("KV_TEST_SEED").map_or(1, |seed| seed.parse().unwrap());
    let options = LoadOptions { timeout: REQUEST_TIMEOUT, ..LoadOptions::default() };
    let load = Load::start(cluster.addresses(), options);
    let watch = Watch::start(cluster.addresses(), REQUEST_TIMEOUT);
    let mut random = seed;
    for number in 1..=FAULTS {
        random = splitmix(random);
        let leader = cluster.leader();
        let fault = Fault::random(random, leader);
        eprintln!("fault {number} of seed {seed}: {fault:?}, {leader} leads");
        fault.strike(&mut network);
        load.await_more("a majority hear each other", WRITES_DURING);
        std::thread::sleep(ELECTION_TIME);
        network.heal();
        cluster.await_ready();
        load.await_more("all hear each other", WRITES_DURING);
    }
    let reads = watch.stop();
    let promises = load.stop();
    eprintln!("{} writes, {} in doubt, {reads} reads", promises.acknowledged, promises.unknown);
    assert!(reads > FAULTS * WRITES_DURING, "only {reads} reads");
    cluster.await_caught_up();
    promises.check_all(&cluster.addresses());
}

/// Whatever cuts one follower off, and however it comes back, the leader that the other one hears stays: the
/// same leader, in the same term, with every write acknowledged. Also where a firewall refuses the follower,
/// which to itself looks as if the leader's process had ended.
#[test]
#[ignore = "needs root, to make network namespaces"]
fn one_follower_that_is_cut_off_deposes_nobody() {
    if !in_a_namespace("one_follower_that_is_cut_off_deposes_nobody") {
        return;
    }
    let mut network = Network::new(3);
    let cluster = Cluster::start_on(&network, 3, PATIENT);
    cluster.form();
    let leader = cluster.leader();
    let term = cluster.metrics(leader).unwrap()["term"].clone();
    let load = Load::start(vec![cluster.http(leader).to_owned()], LoadOptions::default());
    let followers = cluster.ids().filter(|id| *id != leader);
    for fault in followers.flat_map(|follower| Fault::all_of(follower, leader)) {
        load.await_more("all is well", WRITES_DURING);
        fault.strike(&mut network);
        if let Fault::Refused { host, .. } = fault {
            common::eventually("the follower finds that its leader refuses it", || {
                cluster.log(host).contains("the leader refuses connections").then_some(())
            });
        }
        std::thread::sleep(PATIENT_ELECTION_TIME);
        load.await_more("the leader goes on", WRITES_DURING);
        network.heal();
        cluster.await_ready();
        cluster.await_caught_up();
        let now = cluster.metrics(leader).unwrap();
        assert_eq!((&now["current_leader"], &now["term"]), (&leader.into(), &term), "{fault:?}");
    }
    let promises = load.stop();
    assert_eq!(promises.unknown, 0);
    promises.check_all(&cluster.addresses());
}
