//! One cluster of three processes keeps its promises: the original's story, failover, catching up,
//! restarts, and reads that are either the latest or say that they may not be.

mod common;

use std::net::TcpListener;
use std::time::{Duration, Instant};

use common::cluster::{Cluster, FAST, STEADY, expect_ok, free_address};
use common::eventually;
use common::line::{Line, try_request};
use common::load::{Load, LoadOptions, Verdict, verdict};
use common::proxy::Proxy;
use serde_json::{Value, json};

const FOLLOWER_READ: [(&str, &str); 1] = [("Kv-Read", "follower")];
const DIRECT: [(&str, &str); 1] = [("Kv-Routing", "direct")];

/// How many lines a few deaths may leave in one node's log.
const LOG_LINES_MAX: usize = 100;

/// The story of the original: init, learners, membership, write, read everywhere in every way.
#[test]
fn a_cluster_is_formed_and_every_node_serves() {
    let cluster = Cluster::start(3, FAST);
    for id in cluster.ids() {
        let metrics = cluster.metrics(id).unwrap();
        assert_eq!(metrics["state"], "uninitialized");
        assert_eq!(metrics["current_leader"], Value::Null);
        cluster.get(id, "/v1/kv/k").assert_error(503, "NOT_INITIALIZED", "not_applied");
        assert_eq!(cluster.get(id, "/readyz").status, 503);
        assert_eq!(cluster.get(id, "/livez").status, 200);
    }
    expect_ok(&cluster.post(1, "/cluster/init", "{}"));
    cluster.await_node(1, "leads", |m| m["state"] == "leader");
    cluster.post(1, "/cluster/init", "{}").assert_error(409, "CONFLICT", "not_applied");
    let stranger = cluster.post(1, "/cluster/change-membership", "[1,9]");
    stranger.assert_error(409, "CONFLICT", "not_applied");

    for id in [2, 3, 2] {
        cluster.add_learner(1, id);
    }
    let metrics = cluster.metrics(1).unwrap();
    assert_eq!((&metrics["voters"], &metrics["learners"]), (&json!([1]), &json!([2, 3])));
    // A learner passes it on to the leader.
    cluster.await_node(2, "knows the leader", |m| m["current_leader"] == 1);
    expect_ok(&cluster.post(2, "/cluster/change-membership", "[1,2,3]"));
    cluster.await_all("knows the membership", |m| {
        m["voters"] == json!([1, 2, 3]) && m["learners"] == json!([])
    });

    every_node_serves(&cluster);
    the_originals_routes_serve(&cluster);
}

fn every_node_serves(cluster: &Cluster) {
    let mut last_revision = 0;
    for writer in cluster.ids() {
        let (key, value) = (format!("key{writer}"), format!("value{writer}"));
        let revision = cluster.put(writer, &key, &value);
        assert!(revision > last_revision, "{revision} after {last_revision}");
        last_revision = revision;
        for id in cluster.ids() {
            let found = Some(value.clone());
            assert_eq!(cluster.read(id, &key, "", &[]), found);
            assert_eq!(cluster.read(id, &key, "?consistency=linearizable", &[]), found);
            assert_eq!(cluster.read(id, &key, "", &FOLLOWER_READ), found);
            // The read before made this node apply the write.
            assert_eq!(cluster.read(id, &key, "?consistency=stale", &[]), found);
            assert_eq!(cluster.read(id, "absent", "", &[]), None);
        }
    }
    for id in cluster.ids() {
        let answer = common::delete(cluster.http(id), "/v1/kv/key1");
        expect_ok(&answer);
        assert_eq!(answer.json()["deleted"], json!(id == 1), "only the first finds it");
        assert_eq!(cluster.read(id, "key1", "", &[]), None);
    }
}

fn the_originals_routes_serve(cluster: &Cluster) {
    for id in cluster.ids() {
        let body = json!({"Set": {"key": "foo", "value": format!("bar{id}")}}).to_string();
        assert_eq!(cluster.post(id, "/api/write", &body).status, 201);
        for reader in cluster.ids() {
            let read = cluster.post(reader, "/api/consistent_read", "\"foo\"");
            assert_eq!((read.status, read.json()), (200, json!(format!("bar{id}"))));
            eventually("a stale read catches up", || {
                let read = cluster.post(reader, "/api/read", "\"foo\"");
                expect_ok(&read);
                (read.json() == json!(format!("bar{id}"))).then_some(())
            });
            assert_eq!(cluster.post(reader, "/api/read", "\"nobody\"").json(), Value::Null);
        }
        let ring = cluster.get(id, "/api/get_hash_ring").json();
        assert_eq!((&ring["config_id"], &ring["nodes"]), (&json!(0), &json!([])));
        assert_eq!(cluster.get(id, "/v1/ring").json()["epoch"], 0);
        let metrics = cluster.get(id, "/metrics");
        assert_eq!(metrics.status, 200);
        assert!(metrics.text().contains("# TYPE"), "Prometheus text");
        assert_eq!(cluster.get(id, "/readyz").status, 200);
    }
}

/// A node that does not lead passes requests on, or says where to go when asked to.
#[test]
fn requests_at_the_wrong_node_are_forwarded_or_redirected() {
    let cluster = Cluster::formed(3, STEADY);
    let leader = cluster.leader();
    let to = format!("http://{}/v1/kv/a%2Fb", cluster.http(leader));
    for id in cluster.ids().filter(|id| *id != leader) {
        let value = format!("by{id}");
        let write = || common::request(cluster.http(id), "PUT", "/v1/kv/a%2Fb", &DIRECT, b"no");
        let refused = write();
        refused.assert_error(307, "NOT_LEADER", "not_applied");
        assert_eq!(refused.header("location"), Some(to.as_str()));
        let refused = common::request(cluster.http(id), "GET", "/v1/kv/a%2Fb", &DIRECT, b"");
        refused.assert_error(307, "NOT_LEADER", "not_applied");
        assert_eq!(refused.header("location"), Some(to.as_str()));

        cluster.put(id, "a%2Fb", &value);
        assert_eq!(cluster.read(id, "a%2Fb", "", &[]), Some(value.clone()));
        assert_eq!(cluster.read(leader, "a%2Fb", "", &DIRECT), Some(value.clone()));
        // A follower's own answers are no reason to send anybody away.
        let own = [DIRECT[0], FOLLOWER_READ[0]];
        assert_eq!(cluster.read(id, "a%2Fb", "", &own), Some(value.clone()));
        assert_eq!(cluster.read(id, "a%2Fb", "?consistency=stale", &DIRECT), Some(value));
    }
}

/// kill -9 of the leader under concurrent writers: nothing acknowledged is lost, writes resume.
#[test]
fn a_killed_leader_costs_no_acknowledged_write() {
    let mut cluster = Cluster::formed(3, FAST);
    let load = Load::start(cluster.addresses(), LoadOptions { writers: 6, ..Default::default() });
    for round in 0..2 {
        load.await_more("before the leader is killed", 300);
        let leader = cluster.leader();
        cluster.kill9(leader);
        load.await_more("after the leader was killed", 300);
        assert_ne!(cluster.leader(), leader, "round {round}");
        cluster.restart(leader);
    }
    load.await_more("with all nodes", 100);
    let promises = load.stop();
    promises.check_all(&cluster.addresses());
    cluster.await_caught_up();
    for address in cluster.addresses() {
        promises.check(&address, "", &FOLLOWER_READ);
        promises.check(&address, "?consistency=stale", &[]);
    }
    for id in cluster.ids() {
        let lines = cluster.log(id).lines().count();
        assert!(lines < LOG_LINES_MAX, "a dead peer filled the log: {lines} lines");
    }
}

/// A follower that missed more than the log keeps gets a snapshot, also when it is killed while it
/// gets it.
#[test]
fn a_follower_that_missed_too_much_catches_up_by_snapshot() {
    let config = format!(
        "{FAST}\nsnapshot_log_entries = 100\nlog_entries_kept = 10\nsnapshot_chunk_bytes = 16384\n"
    );
    let mut cluster = Cluster::start(3, &config);
    let proxy = form_with_proxy(&cluster);
    cluster.put(1, "early", "bird");
    cluster.await_caught_up();
    cluster.kill9(3);

    let options =
        LoadOptions { writers: 4, keys: 100, value_bytes: 20_000, ..LoadOptions::default() };
    let load = Load::start(vec![cluster.http(1).into(), cluster.http(2).into()], options);
    load.await_more("while a follower is away", 1_000);
    let promises = load.stop();
    for id in [1, 2] {
        eventually("the log is cut", || cluster.log(id).contains("made a snapshot").then_some(()));
    }

    let before = installed(&cluster);
    proxy.hold_after(1 << 20);
    cluster.restart(3);
    eventually("the snapshot is half way", || proxy.holds().then_some(()));
    assert_eq!(installed(&cluster), before, "it has not got all of it");
    assert!(cluster.metrics(3).unwrap()["keys"].as_u64() <= Some(1), "nothing of it is served");
    cluster.kill9(3);
    proxy.release();
    cluster.restart(3);
    cluster.await_caught_up();
    assert!(installed(&cluster) > before, "it caught up without a snapshot");
    promises.check(cluster.http(3), "?consistency=stale", &[]);
    assert_eq!(cluster.read(3, "early", "?consistency=stale", &[]), Some("bird".into()));
    // It is a full member: with it and one more the cluster goes on.
    cluster.kill9(2);
    let leader = cluster.leader();
    cluster.put(leader, "late", "night");
    assert_eq!(cluster.read(3, "late", "", &FOLLOWER_READ), Some("night".into()));
    promises.check(cluster.http(3), "", &[]);
}

/// Forms the cluster so that the others reach node 3 only through a proxy.
fn form_with_proxy(cluster: &Cluster) -> Proxy {
    let proxy = Proxy::start(cluster.rpc(3));
    expect_ok(&cluster.post(1, "/cluster/init", "{}"));
    cluster.await_node(1, "leads", |m| m["state"] == "leader");
    cluster.add_learner(1, 2);
    let third = json!([3, cluster.http(3), proxy.address()]).to_string();
    expect_ok(&cluster.post(1, "/cluster/add-learner", &third));
    cluster.change_membership(&[1, 2, 3]);
    proxy
}

/// How many snapshots node 3 has installed.
fn installed(cluster: &Cluster) -> usize {
    cluster.log(3).matches("installed a snapshot").count()
}

/// kill -9 of all nodes at once: writes, membership and ring are there afterwards.
#[test]
fn a_cluster_survives_the_death_of_all_its_nodes() {
    let mut cluster = Cluster::formed(3, FAST);
    let nodes: Vec<Value> = cluster
        .ids()
        .map(|id| json!({"id": id, "http": cluster.http(id), "rpc": cluster.rpc(id)}))
        .collect();
    let ring = json!({
        "epoch": 1, "hash_version": 2, "list_ttl_s": 600, "sequencer": "c1", "next": null,
        "clusters": [{"id": "c1", "weight": 1.0, "nodes": nodes}],
    });
    expect_ok(&cluster.post(2, "/cluster/update-hash-ring", &ring.to_string()));
    let load = Load::start(cluster.addresses(), LoadOptions::default());
    load.await_more("before the end", 400);
    let term = cluster.metrics(1).unwrap()["term"].as_u64();
    cluster.ids().for_each(|id| cluster.kill9(id));
    let promises = load.stop();
    cluster.ids().for_each(|id| cluster.restart(id));

    cluster.leader();
    cluster.await_caught_up();
    cluster.await_all("came back as it was", |m| {
        m["voters"] == json!([1, 2, 3]) && m["epoch"] == 1 && m["term"].as_u64() >= term
    });
    for id in cluster.ids() {
        assert_eq!(cluster.get(id, "/v1/ring").json(), ring);
        promises.check(cluster.http(id), "?consistency=stale", &[]);
    }
    promises.check_all(&cluster.addresses());
    let load = Load::resume(cluster.addresses(), LoadOptions::default(), promises);
    load.await_more("after the restart", 100);
    load.stop().check_all(&cluster.addresses());
}

/// A cluster of one node needs nobody, also after kill -9.
#[test]
fn one_node_is_a_cluster() {
    let mut cluster = Cluster::formed(1, FAST);
    let revision = cluster.put(1, "k", "v");
    let again = common::put(cluster.http(1), "/v1/kv/k", b"w").json()["revision"].as_u64();
    assert_eq!(again, Some(revision + 1));
    cluster.kill9(1);
    cluster.restart(1);
    cluster.await_ready();
    let answer = cluster.get(1, "/v1/kv/k");
    assert_eq!((answer.status, answer.text()), (200, "w".into()));
    assert_eq!(answer.header("etag"), Some(format!("\"{}\"", revision + 1).as_str()));
    assert_eq!(cluster.read(1, "k", "", &FOLLOWER_READ), Some("w".into()));
    assert_eq!(cluster.put(1, "l", "v"), revision + 2);
}

/// Without a majority, a linearizable read fails in time, a stale one answers, and a write is not
/// acknowledged.
#[test]
fn a_leader_without_its_followers_gives_no_linearizable_answer() {
    let config = format!("[limits]\nrequest_timeout_ms = 2000\n{FAST}");
    let mut cluster = Cluster::formed(3, &config);
    let leader = cluster.leader();
    cluster.put(leader, "k", "before");
    cluster.await_caught_up();
    let followers: Vec<u64> = cluster.ids().filter(|id| *id != leader).collect();
    followers.iter().for_each(|id| cluster.pause(*id));
    let address = cluster.http(leader).to_owned();
    let patience = Duration::from_secs(20);
    let ask = |method, query: &str, body: &[u8]| {
        let started = Instant::now();
        let path = format!("/v1/kv/k{query}");
        let answer = try_request(&address, method, &path, &[], body, patience).unwrap();
        (answer, started.elapsed())
    };
    let in_time = Duration::from_secs(6);
    cluster.get(leader, "/readyz").assert_error(503, "NOT_READY", "not_applied");
    for _ in 0..2 {
        let (read, took) = ask("GET", "", b"");
        assert!(matches!(read.status, 503 | 504), "{} {}", read.status, read.text());
        assert_eq!(read.json()["error"]["outcome"], "not_applied");
        assert!(took < in_time, "{took:?}");
        let (read, took) = ask("GET", "?consistency=stale", b"");
        assert_eq!((read.status, read.text()), (200, "before".into()));
        assert!(took < in_time, "{took:?}");
    }
    let (write, took) = ask("PUT", "", b"during");
    assert!(matches!(write.status, 503 | 504), "{} {}", write.status, write.text());
    assert!(took < in_time, "{took:?}");
    let may_be_there = verdict(&Ok(write)) == Verdict::Unknown;

    followers.iter().for_each(|id| cluster.resume(*id));
    cluster.leader();
    let found = eventually("reads answer again", || {
        let (read, _) = ask("GET", "", b"");
        (read.status == 200).then(|| read.text())
    });
    assert!(found == "before" || (may_be_there && found == "during"), "{found}");
    eventually("writes are acknowledged again", || {
        (ask("PUT", "", b"x").0.status == 200).then_some(())
    });
}

/// A follower remembers its leader until there is another, which without a majority there never is: it said for ever
/// that it was ready.
#[test]
fn a_follower_that_is_left_alone_is_not_ready() {
    let mut cluster = Cluster::formed(3, FAST);
    let left = cluster.follower();
    cluster.await_caught_up();
    assert_eq!(cluster.get(left, "/readyz").status, 200);
    cluster.ids().filter(|id| *id != left).for_each(|id| cluster.kill9(id));
    for _ in 0..3 {
        cluster.get(left, "/readyz").assert_error(503, "NOT_READY", "not_applied");
    }
}

/// A leader that was paused while others went on never answers with what it last knew.
#[test]
fn an_old_leader_never_answers_with_the_past() {
    an_old_leader_keeps_silent(FAST);
}

/// Nor does one that had a lease.
#[test]
fn an_old_leader_with_a_lease_never_answers_with_the_past() {
    an_old_leader_keeps_silent(&format!("{FAST}\nread_lease_ms = 100\n"));
}

fn an_old_leader_keeps_silent(raft: &str) {
    let config = format!("[limits]\nrequest_timeout_ms = 4000\n{raft}");
    let mut cluster = Cluster::formed(3, &config);
    for round in 0..3 {
        let old = cluster.leader();
        cluster.put(old, "k", &format!("old{round}"));
        assert_eq!(cluster.read(old, "k", "", &DIRECT), Some(format!("old{round}")));
        cluster.pause(old);
        let new = cluster.leader();
        let value = format!("new{round}");
        let through = cluster.up();
        eventually("the new leader takes writes", || {
            let at = cluster.http(through[round % 2]);
            let path = "/v1/kv/k";
            let wrote = try_request(at, "PUT", path, &[], value.as_bytes(), Duration::from_secs(5));
            wrote.is_ok_and(|answer| answer.status == 200).then_some(())
        });
        assert_ne!(new, old);

        // These wait in its sockets and are the first that it sees when it wakes up.
        let address = cluster.http(old).to_owned();
        let kinds: [&[(&str, &str)]; 3] = [&[], &DIRECT, &FOLLOWER_READ];
        let waiting: Vec<_> =
            (0..30).map(|n| Line::send_only(&address, "GET", "/v1/kv/k", kinds[n % 3])).collect();
        cluster.resume(old);
        let mut hammer = Line::new(&address, Duration::from_secs(10));
        let hammered = (0..100).map(|n| hammer.request("GET", "/v1/kv/k", kinds[n % 3], b"").ok());
        let hammered: Vec<_> = hammered.collect();
        let waited = waiting.into_iter().map(|pending| pending.answer(Duration::from_secs(10)));
        let mut answered = 0;
        for answer in waited.chain(hammered).flatten() {
            match answer.status {
                200 => {
                    assert_eq!(answer.text(), value, "round {round}");
                    answered += 1;
                }
                307 | 503 | 504 => {}
                other => panic!("{other} {}", answer.text()),
            }
        }
        assert!(answered > 0, "it answers as a follower in the end");
    }
}

/// A read served by a follower sees every write that was acknowledged before it.
#[test]
fn a_followers_linearizable_read_sees_the_latest_write() {
    every_read_sees_the_latest_write(STEADY);
}

/// Also where the leader does not ask for each read.
#[test]
fn a_followers_linearizable_read_during_a_lease_sees_the_latest_write() {
    every_read_sees_the_latest_write(&format!("{STEADY}\nread_lease_ms = 100\n"));
}

fn every_read_sees_the_latest_write(config: &str) {
    let cluster = Cluster::formed(3, config);
    let mut lines: Vec<Line> =
        cluster.ids().map(|id| Line::new(cluster.http(id), common::PATIENCE)).collect();
    let headers = [FOLLOWER_READ[0], DIRECT[0]];
    for round in 0..150 {
        let value = format!("v{round}");
        let wrote = lines[round % 3].request("PUT", "/v1/kv/k", &[], value.as_bytes()).unwrap();
        expect_ok(&wrote);
        for line in &mut lines {
            let read = line.request("GET", "/v1/kv/k", &headers, b"").unwrap();
            assert_eq!((read.status, read.text()), (200, value.clone()));
        }
    }
}

/// A leader that is removed hands over, and tells who asks that it serves no more.
#[test]
fn a_leader_that_is_removed_is_not_ready() {
    let cluster = Cluster::formed(3, FAST);
    cluster.await_ready();
    let leader = cluster.leader();
    let rest: Vec<u64> = cluster.ids().filter(|id| *id != leader).collect();
    let body = json!(rest).to_string();
    expect_ok(&cluster.post(leader, "/cluster/change-membership", &body));
    let refused = eventually("it is not ready", || {
        let answer = cluster.get(leader, "/readyz");
        (answer.status == 503).then_some(answer)
    });
    eventually("it says why", || {
        let text = cluster.get(leader, "/readyz").text();
        text.contains("not a member").then_some(())
    });
    refused.assert_error(503, "NOT_READY", "not_applied");
    let serves = |id: u64| cluster.get(id, "/readyz").status == 200;
    eventually("the others go on", || rest.iter().all(|id| serves(*id)).then_some(()));
    cluster.put(rest[0], "k", "v");
}

/// A voter that comes back without its data does not know what it acknowledged. It is not taken for a majority, votes
/// for nobody, says why, and can be replaced.
#[test]
fn a_voter_that_lost_its_data_is_not_taken_back() {
    let mut cluster = Cluster::formed(3, FAST);
    cluster.await_ready();
    let leader = cluster.leader();
    let [lost, other] = *cluster.ids().filter(|id| *id != leader).collect::<Vec<_>>() else {
        panic!("there are three");
    };
    cluster.put(leader, "k", "1");
    cluster.kill9(lost);
    std::fs::remove_dir_all(cluster.data_dir(lost)).unwrap();
    cluster.restart(lost);
    eventually("it says so", || {
        cluster.log(lost).contains("is a voter, and has no data").then_some(())
    });
    cluster.put(leader, "k", "2");
    let ready = cluster.get(lost, "/readyz");
    ready.assert_error(503, "NOT_READY", "not_applied");
    assert!(ready.text().contains("lost its data"), "{}", ready.text());
    let read = cluster.get(lost, "/v1/kv/k");
    read.assert_error(503, "NOT_INITIALIZED", "not_applied");
    assert!(read.text().contains("lost its data"), "{}", read.text());
    cluster.post(lost, "/cluster/init", "{}").assert_error(409, "CONFLICT", "not_applied");

    // Two of three nodes run, and one of them must not count. Nor may it make the other one a leader.
    for (dead, alive) in [(other, leader), (leader, other)] {
        cluster.kill9(dead);
        let address = cluster.http(alive).to_owned();
        let put = || {
            let timeout = Duration::from_secs(2);
            try_request(&address, "PUT", "/v1/kv/k", &[], b"3", timeout)
        };
        for _ in 0..2 {
            let answer = put();
            assert!(answer.as_ref().map_or(true, |a| a.status != 200), "{answer:?}");
        }
        assert_eq!(cluster.metrics(lost).unwrap()["state"], "uninitialized");
        cluster.restart(dead);
        eventually("two of three serve", || put().is_ok_and(|a| a.status == 200).then_some(()));
    }

    // Out of the membership, and in again like a new one.
    let leads = |id: &u64| cluster.metrics(*id).is_some_and(|m| m["state"] == "leader");
    let leader = eventually("one of the two leads", || [leader, other].into_iter().find(leads));
    let voters: Vec<u64> = cluster.ids().filter(|id| *id != lost).collect();
    eventually("it is removed", || {
        let answer = cluster.post(leader, "/cluster/change-membership", &json!(voters).to_string());
        (answer.status == 200).then_some(())
    });
    cluster.add_learner(leader, lost);
    eventually("it is a voter again", || {
        let answer = cluster.post(leader, "/cluster/change-membership", "[1,2,3]");
        (answer.status == 200).then_some(())
    });
    cluster.await_caught_up();
    let read = cluster.get(lost, "/v1/kv/k?consistency=stale");
    assert_eq!((read.status, read.text().as_str()), (200, "3"));
}

/// A learner was added with a wrong address. Nothing could change that: its id was taken for ever.
#[test]
fn a_learners_address_can_be_mended() {
    let cluster = Cluster::start(2, FAST);
    expect_ok(&cluster.post(1, "/cluster/init", "{}"));
    let wrong = json!([2, free_address(), free_address()]).to_string();
    expect_ok(&cluster.post(1, "/cluster/add-learner", &wrong));
    cluster.add_learner(1, 2);
    cluster.add_learner(1, 2);
    cluster.change_membership(&[1, 2]);
    cluster.put(2, "k", "v");
    cluster.post(1, "/cluster/add-learner", &wrong).assert_error(409, "CONFLICT", "not_applied");
    assert_eq!(cluster.read(2, "k", "", &[]), Some("v".into()));
}

/// Of two who add the same node at the same moment, the later one was told that it is where only the other one had
/// said.
#[test]
fn who_adds_a_learner_hears_whether_another_address_came_first() {
    let cluster = Cluster::start(1, FAST);
    expect_ok(&cluster.post(1, "/cluster/init", "{}"));
    // The node does not greet, so whoever adds it with this address is kept waiting.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let rpc = silent.local_addr().unwrap().to_string();
    let late = json!([2, free_address(), rpc]).to_string();
    let early = json!([2, free_address(), free_address()]).to_string();
    std::thread::scope(|scope| {
        let kept = scope.spawn(|| cluster.post(1, "/cluster/add-learner", &late));
        let (connection, _) = silent.accept().unwrap();
        expect_ok(&cluster.post(1, "/cluster/add-learner", &early));
        drop((connection, silent));
        kept.join().unwrap().assert_error(409, "CONFLICT", "not_applied");
    });
    // Whoever comes after it may still mend the address, and hears that of its own.
    expect_ok(&cluster.post(1, "/cluster/add-learner", &late));
}

/// A learner counts for no majority: one that comes back without its data is sent all of it again.
#[test]
fn a_learner_that_lost_its_data_is_brought_up_again() {
    let mut cluster = Cluster::start(2, FAST);
    expect_ok(&cluster.post(1, "/cluster/init", "{}"));
    cluster.add_learner(1, 2);
    for n in 0..20 {
        cluster.put(1, &format!("k{n}"), "1");
    }
    cluster.await_caught_up();
    for round in ["2", "3"] {
        cluster.kill9(2);
        std::fs::remove_dir_all(cluster.data_dir(2)).unwrap();
        cluster.restart(2);
        cluster.put(1, "k", round);
        cluster.await_caught_up();
        for (key, value) in [("k0", "1"), ("k19", "1"), ("k", round)] {
            let read = cluster.get(2, &format!("/v1/kv/{key}?consistency=stale"));
            assert_eq!((read.status, read.text().as_str()), (200, value));
        }
    }
}
