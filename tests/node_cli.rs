//! What `raft-kv` says and does when it is started wrongly, stopped, or finds its data changed.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use common::cluster::{Cluster, FAST, free_address, splitmix};
use common::load::{Load, LoadOptions};
use common::{NodeOptions, NodeProcess, PATIENCE, eventually, init_alone, post};
use rustix::process::{Pid, Signal, kill_process};

const EXIT_USAGE: i32 = 2;

/// Runs `raft-kv` to its end, which must come: whoever is refused does not linger.
fn run_in(dir: &Path, args: &[&str]) -> Output {
    run_with(None, dir, args)
}

/// The same, with a `RUST_LOG`.
fn run_with(log: Option<&str>, dir: &Path, args: &[&str]) -> Output {
    let mut child = Command::new(env!("CARGO_BIN_EXE_raft-kv"))
        .env_remove("RUST_LOG")
        .envs(log.map(|log| ("RUST_LOG", log)))
        .args(args)
        .current_dir(dir)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let deadline = Instant::now() + PATIENCE;
    while child.try_wait().unwrap().is_none() {
        if Instant::now() > deadline {
            child.kill().unwrap();
            panic!("raft-kv {args:?} runs on: {:?}", child.wait_with_output().unwrap());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    child.wait_with_output().unwrap()
}

/// Asserts that it was refused with exit code 2, no `ready`, and one line that names these.
#[track_caller]
fn assert_refused(output: &Output, names: &[&str]) {
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(EXIT_USAGE), "{errors}");
    assert_eq!(String::from_utf8_lossy(&output.stdout), "", "nothing on stdout");
    let lines: Vec<&str> = errors.lines().filter(|line| line.starts_with("raft-kv: ")).collect();
    assert_eq!(lines.len(), 1, "one line says why: {errors}");
    for name in names {
        assert!(lines[0].contains(name), "{name:?} is not in: {errors}");
    }
}

/// The flags of a node on free ports.
fn flags<'a>(id: &'a str, data_dir: &'a Path) -> Vec<&'a str> {
    let dir = data_dir.to_str().unwrap();
    let free = "127.0.0.1:0";
    vec!["--id", id, "--http-addr", free, "--rpc-addr", free, "--data-dir", dir]
}

/// Every file below a directory with its content.
fn contents(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.insert(path.clone(), b"directory".to_vec());
            found.extend(contents(&path));
        } else {
            found.insert(path.clone(), fs::read(&path).unwrap());
        }
    }
    found
}

/// Asserts that nothing in the directory changed. Names first, because contents are long.
#[track_caller]
fn assert_unchanged(dir: &Path, before: &BTreeMap<PathBuf, Vec<u8>>) {
    let after = contents(dir);
    assert!(after.keys().eq(before.keys()), "{:?} was {:?}", after.keys(), before.keys());
    let changed: Vec<_> = after.keys().filter(|path| after[*path] != before[*path]).collect();
    assert!(changed.is_empty(), "{changed:?}");
}

fn start(options: &NodeOptions) -> NodeProcess {
    let node = NodeProcess::start(options);
    assert!(
        node.http().starts_with("127.0.0.1:") && !node.http().ends_with(":0"),
        "{}",
        node.http()
    );
    node
}

/// How a node ended.
enum End {
    Clean,
    Killed,
}

/// A data directory of node 1 of `c1` with a few keys, whose node has ended.
fn used_directory(dir: &Path, end: End) -> PathBuf {
    let data = dir.join("data");
    let mut node = start(&NodeOptions::new(1, &data));
    init_alone(node.http());
    for n in 0..50 {
        let answer = common::put(node.http(), &format!("/v1/kv/k{n}"), &[b'v'; 1000]);
        assert_eq!(answer.status, 200, "{}", answer.text());
    }
    match end {
        End::Clean => assert!(node.terminate().success()),
        End::Killed => node.kill9(),
    }
    data
}

/// Wrong flags: usage on stderr, exit 2, nothing made.
#[test]
fn bad_flags_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let free = "127.0.0.1:0";
    let good = ["--id", "1", "--http-addr", free, "--rpc-addr", free];
    let with = |extra: &[&'static str]| [&good[..], extra].concat();
    let cases: [(Vec<&str>, &str); 8] = [
        (vec![], "--id"),
        (good[..4].to_vec(), "--rpc-addr"),
        (["--id", "0"].iter().chain(&good[2..]).copied().collect(), "0"),
        (["--id", "x"].iter().chain(&good[2..]).copied().collect(), "x"),
        (with(&["--cluster", "not a cluster"]), "not a cluster"),
        (with(&["--cluster", ""]), "--cluster"),
        (with(&["--frobnicate"]), "--frobnicate"),
        (with(&["--id", "2"]), "--id"),
    ];
    for (args, named) in cases {
        let output = run_in(dir.path(), &args);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(EXIT_USAGE), "{args:?}: {errors}");
        assert!(errors.contains(named), "{args:?}: {errors}");
        assert!(errors.starts_with("error: "), "{args:?}: {errors}");
    }
    assert!(contents(dir.path()).is_empty(), "nothing was made");
}

/// Addresses that cannot be listened on, or must not be: named, exit 2, no directory made.
#[test]
fn bad_addresses_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = taken.local_addr().unwrap().to_string();
    let free = "127.0.0.1:0";
    let cases: [(&str, &str, &[&str]); 7] = [
        (&taken, free, &[&taken, "in use"]),
        (free, &taken, &[&taken, "in use"]),
        ("127.0.0.1", free, &["127.0.0.1"]),
        ("nonsense", free, &["nonsense"]),
        ("127.0.0.1:99999", free, &["127.0.0.1:99999"]),
        ("0.0.0.0:0", free, &["0.0.0.0:0", "insecure"]),
        (free, "[::]:0", &["insecure"]),
    ];
    let keep = std::net::TcpListener::bind(&taken);
    for (http, rpc, named) in cases {
        if rpc == "[::]:0" && std::net::TcpListener::bind(rpc).is_err() {
            continue; // No IPv6 on this machine.
        }
        let args = ["--id", "1", "--http-addr", http, "--rpc-addr", rpc, "--data-dir", "data"];
        assert_refused(&run_in(dir.path(), &args), named);
        assert!(contents(dir.path()).is_empty(), "{http} {rpc}: nothing was made");
    }
    drop(keep);
}

/// Clients and peers need a port each, and that is what is said, however the address is written.
#[test]
fn one_address_for_clients_and_peers_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let http = free_address();
    let port = http.rsplit_once(':').unwrap().1;
    for rpc in [&http, &format!("localhost:{port}")] {
        let args = ["--id", "1", "--http-addr", &http, "--rpc-addr", rpc, "--data-dir", "data"];
        assert_refused(&run_in(dir.path(), &args), &[rpc, "--http-addr", "--rpc-addr"]);
        assert!(contents(dir.path()).is_empty(), "{rpc}: nothing was made");
    }
}

/// Whoever names a node's peer port where its HTTP port belongs is told so.
#[test]
fn a_peer_port_is_no_http_port() {
    let dir = tempfile::tempdir().unwrap();
    let node = start(&NodeOptions::new(1, dir.path().join("data")));
    let (admin, client) = (env!("CARGO_BIN_EXE_admin"), env!("CARGO_BIN_EXE_client"));
    for (program, arguments) in [
        (admin, &["status", "--endpoints", node.rpc()][..]),
        (admin, &["ring", "show", "--endpoints", node.rpc()]),
        (client, &["get", "k", "--endpoints", node.rpc()]),
    ] {
        let output =
            Command::new(program).args(arguments).current_dir(dir.path()).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        let told = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
        assert!(told.contains("it does not speak HTTP: is it a node's peer port?"), "{told}");
    }
}

/// A cluster that was formed by hand and has no ring is found by any one of its nodes.
#[test]
fn one_node_leads_to_all_of_its_cluster() {
    let mut cluster = Cluster::formed(3, FAST);
    let dir = tempfile::tempdir().unwrap();
    let asked = cluster.follower();
    let endpoint = cluster.http(asked).to_owned();
    let status = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_admin"));
        command.args(["status", "--json", "--endpoints", &endpoint]).current_dir(dir.path());
        let output = command.output().unwrap();
        let told = serde_json::from_slice::<serde_json::Value>(&output.stdout).unwrap();
        (output.status.code() == Some(0)).then_some(told)
    };
    let told = eventually("its leader is told", status);
    let nodes = |told: &serde_json::Value| {
        let nodes = told["clusters"][0]["nodes"].as_array().unwrap();
        let node =
            |node: &serde_json::Value| (node["id"].as_u64().unwrap(), node["reachable"] == true);
        nodes.iter().map(node).collect::<BTreeMap<u64, bool>>()
    };
    assert_eq!(nodes(&told), [(1, true), (2, true), (3, true)].into());

    let dead = cluster.leader();
    cluster.kill9(dead);
    let told = eventually("another leader is told", status);
    let alive = |id: u64| (id, id != dead);
    assert_eq!(nodes(&told), [alive(1), alive(2), alive(3)].into());
}

/// Other addresses than loopback work when the configuration allows them.
#[test]
fn insecure_allows_every_address() {
    let dir = tempfile::tempdir().unwrap();
    let config_file = dir.path().join("Config.toml");
    fs::write(&config_file, "insecure = true").unwrap();
    let options = NodeOptions {
        http_addr: "0.0.0.0:0".into(),
        config_file: Some(config_file),
        ..NodeOptions::new(1, dir.path().join("data"))
    };
    let mut node = NodeProcess::start(&options);
    let port = node.http().rsplit_once(':').unwrap().1.to_owned();
    let address = format!("127.0.0.1:{port}");
    init_alone(&address);
    let learner = r#"[2, "127.0.0.1:1", "127.0.0.1:2"]"#;
    let refused = post(&address, "/cluster/add-learner", learner);
    refused.assert_error(400, "BAD_REQUEST", "not_applied");
    assert!(refused.text().contains("0.0.0.0"), "{}", refused.text());
    assert!(node.terminate().success());
}

/// A `RUST_LOG` that means nothing is told, and not silently the default.
#[test]
fn a_log_filter_that_is_not_understood_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let args = [&flags("1", dir.path())[..], &["--config", "no-such-file"]].concat();
    for (log, told) in [("info,openraft=loud", true), ("info,openraft=error", false)] {
        let output = run_with(Some(log), dir.path(), &args);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert_eq!(errors.contains("RUST_LOG"), told, "{log}: {errors}");
        assert!(errors.contains("no-such-file"), "{log}: {errors}");
    }
}

/// What only `admin` goes by does not keep a single node from starting.
#[test]
fn the_layout_of_clusters_is_not_a_nodes_business() {
    let dir = tempfile::tempdir().unwrap();
    let config_file = dir.path().join("Config.toml");
    let layout = "num_clusters = 2\nweights = [1.0, 1.0, 1.0]\nrpc_base_port = 31001\n";
    fs::write(&config_file, layout).unwrap();
    let options = NodeOptions {
        config_file: Some(config_file),
        ..NodeOptions::new(1, dir.path().join("data"))
    };
    assert!(NodeProcess::start(&options).terminate().success());
}

/// A configuration with a typo or an impossible value is refused with the key's name.
#[test]
fn a_bad_configuration_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("Config.toml");
    let cases: [(&str, &[&str]); 5] = [
        ("[raft]\nheartbeat_intervall_ms = 100\n", &["Config.toml"]),
        ("[limits]\nkey_bytes_max = \"big\"\n", &["Config.toml"]),
        ("[limits]\nkey_bytes_max = 0\n", &["Config.toml", "limits.key_bytes_max"]),
        ("[raft\n", &["Config.toml"]),
        ("[raft]\nelection_timeout_min_ms = 50\n", &["raft.election_timeout_min_ms"]),
    ];
    for (text, named) in cases {
        fs::write(&file, text).unwrap();
        let before = contents(dir.path());
        let mut args = vec!["--id", "1", "--http-addr", "127.0.0.1:0", "--rpc-addr", "127.0.0.1:0"];
        args.extend(["--config", "Config.toml", "--data-dir", "data"]);
        let output = run_in(dir.path(), &args);
        assert_refused(&output, named);
        let errors = String::from_utf8_lossy(&output.stderr);
        if text.contains("intervall") {
            assert!(
                errors.contains("heartbeat_intervall_ms") && errors.contains("line 2"),
                "{errors}"
            );
        }
        assert_unchanged(dir.path(), &before);
    }
    let mut args = flags("1", dir.path());
    args.extend(["--config", "absent.toml"]);
    assert_refused(&run_in(dir.path(), &args), &["absent.toml"]);
}

/// A directory of another node or cluster, or of no node at all, is refused and left as it is.
#[test]
fn a_directory_of_somebody_else_is_refused_unchanged() {
    let dir = tempfile::tempdir().unwrap();
    let data = used_directory(dir.path(), End::Clean);
    let before = contents(&data);
    assert_refused(&run_in(dir.path(), &flags("2", &data)), &["node 1", "node 2", "data"]);
    assert_unchanged(&data, &before);
    let mut other = flags("1", &data);
    other.extend(["--cluster", "c2"]);
    assert_refused(&run_in(dir.path(), &other), &["c1", "c2", "data"]);
    assert_unchanged(&data, &before);

    let home = dir.path().join("home");
    fs::create_dir(&home).unwrap();
    fs::write(home.join("letter.txt"), "dear").unwrap();
    let before = contents(&home);
    assert_refused(&run_in(dir.path(), &flags("1", &home)), &["home"]);
    assert_unchanged(&home, &before);

    let file = dir.path().join("file");
    fs::write(&file, "not a directory").unwrap();
    assert_refused(&run_in(dir.path(), &flags("1", &file)), &["file"]);
    assert_eq!(fs::read(&file).unwrap(), b"not a directory");

    // Its owner still finds everything.
    let node = start(&NodeOptions::new(1, &data));
    eventually("the node serves again", || {
        (common::get(node.http(), "/v1/kv/k49").status == 200).then_some(())
    });
}

/// A directory that a running node has open is refused, and the running node goes on.
#[test]
fn a_directory_opens_once() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    let node = start(&NodeOptions::new(1, &data));
    init_alone(node.http());
    assert_refused(&run_in(dir.path(), &flags("1", &data)), &["data", "in use"]);
    assert_eq!(common::put(node.http(), "/v1/kv/k", b"v").status, 200);
}

/// A directory that cannot be written is named.
#[test]
fn a_directory_that_cannot_be_written_is_refused() {
    // Nobody can make a directory there, not even root.
    let dir = tempfile::tempdir().unwrap();
    let output = run_in(dir.path(), &flags("1", Path::new("/proc/raft-kv-data")));
    assert_refused(&output, &["/proc/raft-kv-data"]);
    let inside_file = dir.path().join("file/data");
    fs::write(dir.path().join("file"), "").unwrap();
    assert_refused(&run_in(dir.path(), &flags("1", &inside_file)), &["file/data"]);
}

/// Without `--data-dir` the data goes to `./<rpc-addr>-db`.
#[test]
fn the_default_directory_has_the_peer_address_in_its_name() {
    let dir = tempfile::tempdir().unwrap();
    let rpc = free_address();
    let mut child = Command::new(env!("CARGO_BIN_EXE_raft-kv"))
        .args(["--id", "1", "--http-addr", "127.0.0.1:0", "--rpc-addr", &rpc])
        .current_dir(dir.path())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let expected = dir.path().join(format!("{rpc}-db/marker"));
    eventually("the default directory is made", || expected.exists().then_some(()));
    child.kill().unwrap();
    child.wait().unwrap();
}

/// SIGTERM and SIGINT end a node with exit code 0, under load and with connections open, and
/// everything acknowledged is there afterwards.
#[test]
fn signals_stop_a_node_cleanly_under_load() {
    let mut cluster = Cluster::formed(1, FAST);
    let mut promises = Default::default();
    for signal in [Signal::TERM, Signal::INT, Signal::TERM] {
        let idle = std::net::TcpStream::connect(cluster.http(1)).unwrap();
        let half = common::Connection::open(cluster.http(1));
        let load = Load::resume(cluster.addresses(), LoadOptions::default(), promises);
        load.await_more("before the signal", 50);
        let status = stop(cluster.node_mut(1), signal);
        assert_eq!(status.code(), Some(0), "{signal:?}: {status:?}");
        promises = load.stop();
        drop((idle, half));
        cluster.restart(1);
        cluster.await_ready();
        promises.check(cluster.http(1), "", &[]);
    }
}

/// Sends a signal and waits for the end, which must come within what requests in flight may take.
fn stop(node: &mut NodeProcess, signal: Signal) -> ExitStatus {
    let pid = Pid::from_raw(node.pid().cast_signed()).expect("a process id");
    kill_process(pid, signal).unwrap();
    node.ended()
}

/// After a clean stop: see [`flip_bits`].
#[test]
fn a_flipped_bit_is_refused_or_harmless() {
    flip_bits(End::Clean);
}

/// After kill -9, when the newest writes are in RocksDB's own log only: see [`flip_bits`].
#[test]
fn a_flipped_bit_after_a_crash_is_refused_or_harmless() {
    flip_bits(End::Killed);
}

/// Flips of one bit in each file. `KV_TEST_FLIPS` looks at more.
const FLIPS: usize = 3;

/// A flipped bit in a file of the data directory is either refused with the file's name, or harms
/// nothing: every acknowledged write is still there. It is never a node that forgot something.
fn flip_bits(end: End) {
    let flips = std::env::var("KV_TEST_FLIPS").map_or(FLIPS, |n| n.parse().expect("a number"));
    let dir = tempfile::tempdir().unwrap();
    let data = used_directory(dir.path(), end);
    let clean = contents(&data);
    let files: Vec<&PathBuf> = clean
        .iter()
        .filter(|(path, bytes)| path.is_file() && !bytes.is_empty())
        .map(|(path, _)| path)
        .collect();
    let mut refused = 0;
    for (round, path) in files.iter().cycle().take(flips * files.len()).enumerate() {
        restore(&data, &clean);
        let mut bytes = clean[*path].clone();
        let bit = splitmix(round as u64) as usize % (8 * bytes.len());
        bytes[bit / 8] ^= 1 << (bit % 8);
        fs::write(path, &bytes).unwrap();
        refused += usize::from(refused_or_harmless(dir.path(), &data, path, bit));
    }
    assert!(refused > 0, "some of these bits matter");
}

/// Starts a node on the directory; whether it was refused.
fn refused_or_harmless(dir: &Path, data: &Path, flipped: &Path, bit: usize) -> bool {
    let name = flipped.file_name().unwrap().to_str().unwrap();
    let log = dir.join("stderr");
    let mut child = Command::new(env!("CARGO_BIN_EXE_raft-kv"))
        .args(flags("1", data))
        .stdout(Stdio::piped())
        .stderr(fs::File::create(&log).unwrap())
        .spawn()
        .unwrap();
    let mut ready = String::new();
    let mut stdout = std::io::BufReader::new(child.stdout.take().unwrap());
    std::io::BufRead::read_line(&mut stdout, &mut ready).unwrap();
    let Some(http) = ready.strip_prefix("ready http=").and_then(|rest| rest.split(' ').next())
    else {
        let status = child.wait().unwrap();
        let errors = fs::read_to_string(&log).unwrap();
        assert_eq!(status.code(), Some(EXIT_USAGE), "{name} bit {bit}: {errors}");
        let line = errors.lines().find(|line| line.starts_with("raft-kv: ")).expect("a reason");
        assert!(line.contains(data.to_str().unwrap()), "{name} bit {bit}: {line}");
        return true;
    };
    eventually(&format!("{name} bit {bit}: the node is ready"), || {
        (common::get(http, "/readyz").status == 200).then_some(())
    });
    for n in 0..50 {
        let answer = common::get(http, &format!("/v1/kv/k{n}"));
        let whole = answer.status == 200 && answer.body == [b'v'; 1000];
        assert!(whole, "{name} bit {bit}: k{n}: {} {}", answer.status, answer.text());
    }
    child.kill().unwrap();
    child.wait().unwrap();
    false
}

/// Puts a directory back as it was.
fn restore(dir: &Path, contents: &BTreeMap<PathBuf, Vec<u8>>) {
    fs::remove_dir_all(dir).unwrap();
    fs::create_dir_all(dir).unwrap();
    for (path, bytes) in contents {
        if bytes == b"directory" {
            fs::create_dir_all(path).unwrap();
        } else {
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, bytes).unwrap();
        }
    }
}
