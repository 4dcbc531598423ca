//! The `admin` binary: what it says about nodes that do not answer, how it is stopped while it starts,
//! and an exit code for every end.

use std::fs::File;
use std::path::Path;
use std::process::{Output, Stdio};
use std::time::Duration;

use distrib_kv_store::ring::Ring;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tokio::process::Command;
use tokio::time::timeout;

mod fake_node;
use fake_node::{FakeNode, refusing, ring_reply};

/// How long anything may take that is expected to happen. Generous: test machines are busy.
const PATIENCE: Duration = Duration::from_secs(30);

/// `admin` in a directory of its own, so that no `all_nodes.json` of somebody else is found.
fn admin(dir: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_admin"));
    command.args(arguments).current_dir(dir).stdin(Stdio::null()).kill_on_drop(true);
    command
}

async fn run(dir: &Path, arguments: &[&str]) -> Output {
    admin(dir, arguments).output().await.unwrap()
}

fn code(output: &Output) -> i32 {
    output.status.code().unwrap_or_else(|| panic!("{output:?}"))
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// The one line on stderr that an error is.
fn line(output: &Output) -> String {
    let text = text(&output.stderr);
    assert_eq!(text.matches('\n').count(), 1, "{text}");
    assert!(text.starts_with("admin: "), "{text}");
    text
}

/// The leader of a cluster without a ring.
fn leader(cluster: &'static str) -> FakeNode {
    let bound = fake_node::bind();
    let address = bound.address.clone();
    bound.serve(move |seen| match seen.path.as_str() {
        "/v1/ring" => ring_reply(&Ring::none()),
        _ => fake_node::metrics(cluster, &address),
    })
}

async fn status(dir: &Path, endpoints: &str) -> (i32, Value) {
    let output = run(dir, &["status", "--json", "--endpoints", endpoints]).await;
    let shown = serde_json::from_slice(&output.stdout);
    (code(&output), shown.unwrap_or_else(|_| panic!("{output:?}")))
}

/// A node that does not answer is no cluster of its own: it is shown where the nodes file has it, or
/// apart, and the clusters that serve are told as such.
#[tokio::test]
async fn a_silent_node_is_no_cluster_of_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let (node, dead) = (leader("c7"), refusing());
    let endpoints = format!("{},{dead}", node.address);

    let (code_apart, apart) = status(dir.path(), &endpoints).await;
    assert_eq!((code_apart, apart["clusters"].as_array().unwrap().len()), (0, 1), "{apart}");
    assert_eq!(apart["unplaced"][0]["http"], *dead, "{apart}");
    assert_eq!(apart["unplaced"][0]["reachable"], false, "{apart}");
    let output = run(dir.path(), &["status", "--endpoints", &endpoints]).await;
    let rows = text(&output.stdout);
    let row = rows.lines().find(|row| row.ends_with(" NO")).unwrap_or_else(|| panic!("{rows}"));
    assert!(row.starts_with("? ") && row.contains(&dead), "{rows}");

    let listed = json!([[node.address, dead]]).to_string();
    std::fs::write(dir.path().join("all_nodes.json"), listed).unwrap();
    let (code_placed, placed) = status(dir.path(), &endpoints).await;
    assert_eq!((code_placed, &placed["unplaced"]), (0, &json!([])), "{placed}");
    assert_eq!(placed["clusters"][0]["id"], "c7", "{placed}");
    assert_eq!(placed["clusters"][0]["nodes"][1]["http"], *dead, "{placed}");
}

/// With nobody there, that is what is said, and not that some clusters have no leader.
#[tokio::test]
async fn nobody_there_is_1_and_said_so() {
    let dir = tempfile::tempdir().unwrap();
    let dead = refusing();
    let output = run(dir.path(), &["status", "--endpoints", &dead]).await;
    assert_eq!((code(&output), &line(&output)[..]), (1, "admin: no node can be reached\n"));
    // Without a table that shows why.
    let output = run(dir.path(), &["ring", "show", "--endpoints", &dead]).await;
    let line = line(&output);
    assert_eq!(code(&output), 1);
    assert!(line.starts_with("admin: no node can be reached: ") && line.contains(&dead), "{line}");
}

/// A ring is not installed past a node that does not answer, and the line says which one.
#[tokio::test]
async fn a_ring_is_not_installed_past_a_silent_node() {
    let dir = tempfile::tempdir().unwrap();
    let (node, dead) = (leader("c1"), refusing());
    let endpoints = format!("{},{dead}", node.address);
    let arguments = ["ring", "install", "--weights", "1", "--endpoints", &endpoints];
    let output = run(dir.path(), &arguments).await;
    assert_eq!(code(&output), 1);
    assert!(line(&output).contains(&dead) && line(&output).contains("nothing was changed"));
    assert!(node.seen("/cluster/update-hash-ring").is_empty());
}

/// What is no address is wrong usage in a flag, and in a nodes file a failure, as is a file that is not
/// there.
#[tokio::test]
async fn what_is_no_address_is_2_in_a_flag_and_1_in_a_file() {
    let dir = tempfile::tempdir().unwrap();
    for (bad, named) in [("", "an address is empty"), ("localhost", "`localhost`")] {
        let output = run(dir.path(), &["status", "--endpoints", bad]).await;
        assert_eq!(code(&output), 2, "{bad:?}");
        assert!(line(&output).starts_with(&format!("admin: --endpoints: {named}")), "{output:?}");
    }
    for listed in [None, Some(r#"[["localhost"]]"#)] {
        if let Some(listed) = listed {
            std::fs::write(dir.path().join("all_nodes.json"), listed).unwrap();
        }
        let output = run(dir.path(), &["status"]).await;
        assert_eq!(code(&output), 1, "{listed:?}");
        assert!(line(&output).contains("all_nodes.json"), "{output:?}");
    }
}

/// What cannot be shown is a failure; a reader that went away is none.
#[tokio::test]
async fn an_answer_that_cannot_be_written_is_1() {
    let dir = tempfile::tempdir().unwrap();
    let node = leader("c1");
    let arguments = ["status", "--json", "--endpoints", &node.address];
    let full = File::options().write(true).open("/dev/full").unwrap();
    let mut command = admin(dir.path(), &arguments);
    let child = command.stdout(full).stderr(Stdio::piped()).spawn().unwrap();
    let output = child.wait_with_output().await.unwrap();
    assert_eq!(code(&output), 1);
    assert!(line(&output).contains("cannot write to stdout"));

    let mut command = admin(dir.path(), &arguments);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().await.unwrap();
    assert_eq!((code(&output), output.stderr.len()), (0, 0), "{output:?}");
}

/// A link into nowhere is not an absent file, which would mean the defaults.
#[tokio::test]
async fn a_config_that_cannot_be_read_is_2() {
    let dir = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink("nowhere", dir.path().join("Config.toml")).unwrap();
    let output = timeout(PATIENCE, run(dir.path(), &[])).await.expect("it does not start");
    assert_eq!(code(&output), 2);
    assert!(line(&output).contains("Config.toml"));
}

/// A signal ends a start at once and cleanly, also while a store takes for ever to open: here its
/// marker is a pipe, and reading it waits until the test lets go.
#[tokio::test]
async fn a_signal_ends_a_start_while_a_store_is_being_opened() {
    let dir = tempfile::tempdir().unwrap();
    let (http, rpc) = free_base_ports();
    let config = format!(
        "num_clusters = 1\nnodes_per_cluster = 2\nhttp_base_port = {http}\nrpc_base_port = {rpc}\n\
         data_dir = \"data\"\n[storage]\nblock_cache_bytes = 8388608\nmemtable_bytes = 4194304\n"
    );
    std::fs::write(dir.path().join("Config.toml"), config).unwrap();
    let stuck = dir.path().join("data/c1-n2");
    std::fs::create_dir_all(&stuck).unwrap();
    let pipe = stuck.join("marker");
    let made = Command::new("mkfifo").arg(&pipe).status().await.unwrap();
    assert!(made.success());

    let mut command = admin(dir.path(), &[]);
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    // Opening a pipe for writing waits until somebody reads it: the store is being opened then.
    let open = tokio::task::spawn_blocking(move || File::options().write(true).open(pipe));
    let _held = timeout(PATIENCE, open).await.expect("the store is opened").unwrap().unwrap();
    let pid = Pid::from_raw(child.id().unwrap().cast_signed()).unwrap();
    kill_process(pid, Signal::INT).unwrap();
    let output = timeout(PATIENCE, child.wait_with_output()).await.expect("it ends").unwrap();
    assert_eq!(code(&output), 0, "{output:?}");
    assert!(text(&output.stderr).contains("stopped before everything was ready"), "{output:?}");
    assert!(output.stdout.is_empty(), "{output:?}");
    assert!(!dir.path().join("all_nodes.json").exists());
}

/// Base ports such that those of the two nodes of one cluster are free at the moment.
fn free_base_ports() -> (u16, u16) {
    let free = |port: u16| std::net::TcpListener::bind(("127.0.0.1", port)).is_ok();
    let base = || loop {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let base = listener.local_addr().unwrap().port() - 20;
        if free(base + 11) && free(base + 12) {
            return base;
        }
    };
    let http = base();
    loop {
        let rpc = base();
        if http.abs_diff(rpc) > 2 {
            return (http, rpc);
        }
    }
}
