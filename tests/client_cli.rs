//! The `client` binary: raw values on stdout, one line on stderr, and an exit code for every end.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::process::{Output, Stdio};

use bytes::Bytes;
use distrib_kv_store::ring::Ring;
use serde_json::json;
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

mod fake_node;
use fake_node::{
    FakeNode, Reply, Seen, absent, bind, cluster, error, metrics, refusing, ring, ring_reply,
    start, written,
};

/// The client with an environment of its own, so that a developer's settings do not leak in.
fn client(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_client"));
    command.args(arguments).env_remove("KV_ENDPOINTS").stdin(Stdio::null()).kill_on_drop(true);
    command
}

async fn run(node: &FakeNode, arguments: &[&str]) -> Output {
    client(arguments).args(["--endpoints", &node.address]).output().await.unwrap()
}

fn code(output: &Output) -> i32 {
    output.status.code().unwrap_or_else(|| panic!("{output:?}"))
}

/// The one line that an error is.
fn line(output: &Output) -> String {
    let text = String::from_utf8(output.stderr.clone()).unwrap();
    assert_eq!(text.matches('\n').count(), 1, "{text}");
    assert!(text.starts_with("client: "), "{text}");
    text
}

/// A node of a cluster without a ring that answers reads and writes by `script`.
fn node(script: impl Fn(&Seen) -> Reply + Send + Sync + 'static) -> FakeNode {
    start(move |seen| match seen.path.as_str() {
        "/v1/ring" => ring_reply(&Ring::none()),
        "/cluster/metrics" => metrics("c1", "h:1"),
        _ => script(seen),
    })
}

#[tokio::test]
async fn get_writes_the_raw_value_and_nothing_more() {
    let node = node(|_| Reply::Value(1, Bytes::from_static(&[0xff, 0, b'\n', b'x'])));
    let output = run(&node, &["get", "k"]).await;
    assert_eq!((code(&output), output.stdout.as_slice()), (0, &[0xff, 0, b'\n', b'x'][..]));
    assert!(output.stderr.is_empty());
    assert_eq!(node.seen("/v1/kv/")[0].path, "/v1/kv/k?consistency=linearizable");
    assert_eq!(code(&run(&node, &["get", "k", "--stale"]).await), 0);
    assert_eq!(node.seen("/v1/kv/")[1].path, "/v1/kv/k?consistency=stale");
}

#[tokio::test]
async fn an_absent_key_is_3_and_an_empty_value_is_0() {
    let without = node(|_| absent());
    let output = run(&without, &["get", "k"]).await;
    assert_eq!((code(&output), output.stdout.len()), (3, 0));
    assert!(line(&output).contains("not found"));
    let empty = node(|_| Reply::Value(1, Bytes::new()));
    assert_eq!(code(&run(&empty, &["get", "k"]).await), 0);
}

#[tokio::test]
async fn put_and_del_print_the_revision() {
    let node = node(|seen| match seen.method.as_str() {
        "PUT" => written(7),
        _ => Reply::Json(200, json!({"revision": 8, "deleted": !seen.path.contains("gone")})),
    });
    let output = run(&node, &["put", "k", "v"]).await;
    assert_eq!((code(&output), output.stdout.as_slice()), (0, &b"7\n"[..]));
    assert_eq!(node.seen("/v1/kv/k")[0].body, "v");
    let output = run(&node, &["del", "k"]).await;
    assert_eq!((code(&output), output.stdout.as_slice()), (0, &b"8\n"[..]));
    assert_eq!(code(&run(&node, &["del", "gone"]).await), 3);
}

#[tokio::test]
async fn put_reads_stdin_byte_for_byte() {
    let node = node(|_| written(1));
    let mut command = client(&["put", "k", "-", "--endpoints", &node.address]);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(&[0, 0xff, b'\n']).await.unwrap();
    drop(stdin);
    assert_eq!(code(&child.wait_with_output().await.unwrap()), 0);
    assert_eq!(node.seen("/v1/kv/")[0].body, Bytes::from_static(&[0, 0xff, b'\n']));
}

/// Keys and values are bytes, also as arguments; a value may look like an option, but none is swallowed.
#[tokio::test]
async fn keys_and_values_are_any_bytes() {
    let node = node(|_| written(1));
    let bytes = OsStr::from_bytes;
    for (arguments, path, value) in [
        (&[bytes(b"temp"), bytes(b"-5")][..], "/v1/kv/temp", &b"-5"[..]),
        (&[bytes(b"k"), bytes(b"--verbose"), bytes(b"--if-absent")], "/v1/kv/k", b"--verbose"),
        (&[bytes(b"--if-absent"), bytes(b"-5"), bytes(b"-hello")], "/v1/kv/-5", b"-hello"),
        (&[bytes(b"--"), bytes(b"--k"), bytes(b"--if-absent")], "/v1/kv/--k", b"--if-absent"),
        (&[bytes(b"\xff"), bytes(b"\xfe\n")], "/v1/kv/%FF", b"\xfe\n"),
    ] {
        let mut command = client(&["--endpoints", &node.address, "put"]);
        let output = command.args(arguments).output().await.unwrap();
        assert_eq!(code(&output), 0, "{arguments:?}: {output:?}");
        let seen = node.seen("/v1/kv/").pop().unwrap();
        assert_eq!((seen.path.as_str(), &seen.body[..]), (path, value));
        let if_absent = arguments[0] != "--" && arguments.contains(&OsStr::new("--if-absent"));
        assert_eq!(seen.headers.contains_key("if-none-match"), if_absent, "{arguments:?}");
    }
}

#[tokio::test]
async fn a_failed_condition_is_4_and_conditions_are_sent() {
    let node = node(|_| Reply::Condition(Some(9)));
    let output = run(&node, &["put", "k", "v", "--if-match", "3"]).await;
    assert_eq!(code(&output), 4);
    assert!(line(&output).contains("revision 9"));
    assert_eq!(code(&run(&node, &["put", "k", "v", "--if-absent"]).await), 4);
    assert_eq!(code(&run(&node, &["del", "k", "--if-match", "3"]).await), 4);
    let seen = node.seen("/v1/kv/");
    assert_eq!(seen[0].headers["if-match"], "\"3\"");
    assert_eq!(seen[1].headers["if-none-match"], "*");
    assert_eq!(seen[2].headers["if-match"], "\"3\"");
}

#[tokio::test]
async fn an_unknown_outcome_is_5() {
    let node = node(|_| Reply::Close);
    let output = run(&node, &["put", "k", "v"]).await;
    assert_eq!(code(&output), 5, "{output:?}");
    assert!(line(&output).contains("may or may not"));
    let sent: Vec<_> = node.seen("/v1/kv/").iter().map(|seen| seen.once()).collect();
    assert!(sent.len() > 1 && sent.iter().all(|once| *once == sent[0]), "{sent:?}");
}

/// Whoever reads a log of many commands finds in each line which key it was about: a key of any bytes, of
/// which a terminal gets no control characters, and not thousands.
#[tokio::test]
async fn what_goes_wrong_names_the_key() {
    let without = node(|seen| match seen.method.as_str() {
        "GET" => absent(),
        _ => Reply::Json(200, json!({"revision": 8, "deleted": false})),
    });
    assert_eq!(line(&run(&without, &["get", "k"]).await), "client: get `k`: not found\n");
    assert_eq!(line(&run(&without, &["del", "k"]).await), "client: del `k`: not found\n");
    let long = format!("\u{1b}[2J\n{}", "é".repeat(2000));
    let told = line(&run(&without, &["get", &long]).await);
    assert_eq!(told, format!("client: get `\\u{{1b}}[2J\\n{}...`: not found\n", "é".repeat(59)));
    let mut command = client(&["get", "--endpoints", &without.address]);
    let output = command.arg(OsStr::from_bytes(b"a\xff")).output().await.unwrap();
    assert_eq!(line(&output), "client: get `a\u{fffd}`: not found\n");

    let elsewhere = node(|_| Reply::Condition(Some(9)));
    for verb in [&["put", "k", "v", "--if-match", "3"][..], &["del", "k", "--if-match", "3"]] {
        let told = line(&run(&elsewhere, verb).await);
        assert!(told.starts_with(&format!("client: {} `k`: the condition", verb[0])), "{told}");
    }
}

#[tokio::test]
async fn an_error_is_1_with_the_reason() {
    let node = node(|_| error(413, "TOO_LARGE", "not_applied"));
    let output = run(&node, &["put", "k", "v"]).await;
    assert_eq!(code(&output), 1);
    assert!(line(&output).contains("TOO_LARGE"));

    let output = client(&["get", "k", "--nodes-file", "no-such-file.json"]).output().await.unwrap();
    assert_eq!(code(&output), 1);
    assert!(line(&output).contains("no-such-file.json"));

    let address = refusing();
    let output = client(&["get", "k", "--endpoints", &address]).output().await.unwrap();
    assert_eq!(code(&output), 1);
    assert!(line(&output).contains(&address));
}

#[tokio::test]
async fn wrong_usage_is_2() {
    for arguments in [
        &["put", "k"][..],
        &["get"],
        &["route"],
        &["frobnicate"],
        &["put", "k", "--if-absent"],
        &["put", "--if-absnt", "k", "v"],
        &["put", "k", "v", "--if-absnt"],
        &["get", "--stal"],
        &["put", "k", "v", "--if-match", "x"],
        &["put", "k", "v", "--if-match", "1", "--if-absent"],
        &["get", "k", "--endpoints", "h:1", "--nodes-file", "f"],
    ] {
        assert_eq!(code(&client(arguments).output().await.unwrap()), 2, "{arguments:?}");
    }
}

/// One line that names the flag or the variable and what is wrong with it; nobody is asked.
#[tokio::test]
async fn endpoints_that_are_none_are_wrong_usage() {
    for (bad, named) in [
        ("", "an address is empty"),
        ("127.0.0.1:1,", "an address is empty"),
        ("localhost", "`localhost` is not a HOST:PORT"),
        ("http://127.0.0.1:1", "`http://127.0.0.1:1` is not a HOST:PORT"),
        ("127.0.0.1:99999", "`127.0.0.1:99999` is not a HOST:PORT"),
    ] {
        let output = client(&["get", "k", "--endpoints", bad]).output().await.unwrap();
        assert_eq!((code(&output), output.stdout.len()), (2, 0), "{bad:?}");
        assert_eq!(line(&output), format!("client: --endpoints: {named}\n"));
        if !bad.is_empty() {
            let mut command = client(&["get", "k"]);
            let output = command.env("KV_ENDPOINTS", bad).output().await.unwrap();
            assert_eq!(code(&output), 2, "{bad:?}");
            assert_eq!(line(&output), format!("client: KV_ENDPOINTS: {named}\n"));
        }
    }
    let mut command = client(&["get", "k"]);
    let output = command.env("KV_ENDPOINTS", OsStr::from_bytes(b"\xff:1")).output().await.unwrap();
    assert_eq!(code(&output), 2, "not silently the default file");
    assert!(line(&output).contains("KV_ENDPOINTS"));
}

/// A revision that cannot be shown is an error that does not hide what was done.
#[tokio::test]
async fn a_write_that_took_effect_is_never_told_as_a_failed_one() {
    let node = node(|seen| match seen.method.as_str() {
        "PUT" => written(7),
        _ => Reply::Json(200, json!({"revision": 8, "deleted": true})),
    });
    for (arguments, revision) in [(&["put", "k", "v"][..], "7"), (&["del", "k"], "8")] {
        let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
        let mut command = client(arguments);
        let command = command.args(["--endpoints", &node.address]).stdout(full);
        let output = command.stderr(Stdio::piped()).spawn().unwrap().wait_with_output().await;
        let output = output.unwrap();
        assert_eq!(code(&output), 1, "{arguments:?}");
        assert!(line(&output).contains(&format!("took effect at revision {revision}")));
    }
}

#[tokio::test]
async fn route_prints_the_owner_and_its_nodes() {
    let bound = bind();
    let address = bound.address.clone();
    let ring = ring(1, vec![cluster("c5", &[&address, "h:2"])]);
    let node = bound.serve(move |_| ring_reply(&ring));
    let output = run(&node, &["route", "x", "y"]).await;
    let expected = format!("x\tc5\t{address},h:2\ny\tc5\t{address},h:2\n");
    assert_eq!((code(&output), String::from_utf8(output.stdout).unwrap()), (0, expected));
}

#[tokio::test]
async fn the_demo_writes_and_reads_three_keys_through_the_nodes_file() {
    let values = std::sync::Mutex::new(std::collections::HashMap::new());
    let node = node(move |seen| {
        let mut values = values.lock().unwrap();
        let key = seen.path.split('?').next().unwrap().to_owned();
        match seen.method.as_str() {
            "PUT" => {
                values.insert(key, seen.body.clone());
                written(values.len() as u64)
            }
            _ => values.get(&key).map_or_else(absent, |value| Reply::Value(1, value.clone())),
        }
    });
    let folder = tempfile::tempdir().unwrap();
    let nodes = json!([[node.address]]).to_string();
    std::fs::write(folder.path().join("all_nodes.json"), nodes).unwrap();
    let output = client(&[]).current_dir(folder.path()).output().await.unwrap();
    assert_eq!(code(&output), 0, "{output:?}");
    assert_eq!(node.seen("/v1/kv/").iter().filter(|seen| seen.method == "PUT").count(), 3);
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(text.matches("linearizable").count(), 3, "{text}");
    assert_eq!(text.matches("stale").count(), 3, "{text}");
    assert!(text.contains("cluster c1"), "{text}");
}

#[tokio::test]
async fn endpoints_come_from_the_environment_when_nothing_is_named() {
    let node = node(|_| Reply::Value(1, Bytes::from_static(b"v")));
    let mut command = client(&["get", "k"]);
    let output = command.env("KV_ENDPOINTS", &node.address).output().await.unwrap();
    assert_eq!((code(&output), output.stdout.as_slice()), (0, &b"v"[..]));
    // What is named on the command line goes first.
    let mut command = client(&["get", "k", "--nodes-file", "no-such-file.json"]);
    let output = command.env("KV_ENDPOINTS", &node.address).output().await.unwrap();
    assert_eq!(code(&output), 1);
}

#[tokio::test]
async fn a_reader_that_has_seen_enough_ends_it_quietly() {
    let node = node(|_| Reply::Value(1, vec![b'x'; 1 << 20].into()));
    let mut command = client(&["get", "k", "--endpoints", &node.address]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().await.unwrap();
    assert_eq!((code(&output), output.stderr.len()), (0, 0), "{output:?}");
}
