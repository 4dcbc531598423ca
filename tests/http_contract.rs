//! Every row of the HTTP contract against a real cluster of one node, over raw sockets.

mod common;

use std::io::{Read, Write};
use std::net::TcpListener;

use common::alone::Node;
use common::{Connection, delete, get, init_alone, post, put, request};
use serde_json::json;

/// Before the cluster is formed nothing is served, and everything says so.
#[test]
fn an_uninitialized_node_says_so() {
    let node = Node::start("");
    let http = node.http();
    put(http, "/v1/kv/k", b"v").assert_error(503, "NOT_INITIALIZED", "not_applied");
    get(http, "/v1/kv/k").assert_error(503, "NOT_INITIALIZED", "not_applied");
    delete(http, "/v1/kv/k").assert_error(503, "NOT_INITIALIZED", "not_applied");
    assert_eq!(get(http, "/livez").status, 200);
    get(http, "/readyz").assert_error(503, "NOT_READY", "not_applied");
    let metrics = get(http, "/cluster/metrics").json();
    assert_eq!(metrics["id"], 1);
    assert_eq!(metrics["cluster"], "c1");
    assert_eq!(metrics["http"], http);
    assert_eq!(metrics["rpc"], node.process.rpc());
    assert_eq!(metrics["state"], "uninitialized");
    assert!(metrics["current_leader"].is_null());
    let ring = get(http, "/v1/ring").json();
    assert_eq!(
        (&ring["epoch"], &ring["clusters"], &ring["next"]),
        (&json!(0), &json!([]), &json!(null))
    );
    let carp = get(http, "/api/get_hash_ring").json();
    assert_eq!((&carp["config_id"], &carp["nodes"]), (&json!(0), &json!([])));
}

/// What is written can be read, with its revision, which grows with every change.
#[test]
fn values_are_written_read_and_deleted() {
    let node = Node::ready("");
    let http = node.http();
    let first = put(http, "/v1/kv/k", b"one");
    assert_eq!(first.status, 200);
    let first = first.json()["revision"].as_u64().unwrap();
    let read = get(http, "/v1/kv/k");
    assert_eq!((read.status, read.body.as_slice()), (200, &b"one"[..]));
    assert_eq!(read.header("etag"), Some(format!("\"{first}\"").as_str()));
    assert_eq!(read.header("content-type"), Some("application/octet-stream"));

    let second = put(http, "/v1/kv/k", b"").json()["revision"].as_u64().unwrap();
    assert!(second > first);
    for path in ["/v1/kv/k", "/v1/kv/k?consistency=linearizable", "/v1/kv/k?consistency=stale"] {
        let read = get(http, path);
        assert_eq!((read.status, read.body.len()), (200, 0), "an empty value is not absent");
    }
    let follower = [("Kv-Read", "follower")];
    assert_eq!(request(http, "GET", "/v1/kv/k", &follower, b"").status, 200);

    // As `GET`, without the body.
    put(http, "/v1/kv/k", b"three");
    for (path, status) in [
        ("/v1/kv/k", 200),
        ("/v1/kv/k?consistency=stale", 200),
        ("/v1/kv/absent", 404),
        ("/v1/kv/k?consistency=x", 400),
        ("/v1/ring", 200),
    ] {
        let (head, whole) = (request(http, "HEAD", path, &[], b""), get(http, path));
        assert_eq!((head.status, head.body.len()), (status, 0), "{path}");
        for name in ["etag", "content-type"] {
            assert_eq!(head.header(name), whole.header(name), "{path}: {name}");
        }
        let length = whole.body.len().to_string();
        assert_eq!(head.header("content-length"), Some(&length[..]), "{path}");
    }

    let deleted = delete(http, "/v1/kv/k").json();
    assert_eq!(deleted["deleted"], true);
    let third = deleted["revision"].as_u64().unwrap();
    assert!(third > second);
    get(http, "/v1/kv/k").assert_error(404, "NOT_FOUND", "not_applied");
    let again = delete(http, "/v1/kv/k").json();
    assert_eq!(again, json!({"revision": third, "deleted": false}));
}

/// Keys are bytes: what differs once decoded is another key, what does not is the same.
#[test]
fn keys_are_decoded_strictly_from_the_raw_path() {
    let node = Node::ready("");
    let http = node.http();
    let keys = ["a%2Fb", "%FF", "%00", "%C3%A4", "%2E", "%2E%2E", "a+b", "a%20b", "a%252Fb", "%25"];
    for key in keys {
        assert_eq!(put(http, &format!("/v1/kv/{key}"), key.as_bytes()).status, 200, "{key}");
    }
    for key in keys {
        assert_eq!(get(http, &format!("/v1/kv/{key}")).text(), key);
    }
    for (other, key) in [
        ("a%2fb", "a%2Fb"),
        ("%ff", "%FF"),
        ("ä", "%C3%A4"),
        (".", "%2E"),
        ("..", "%2E%2E"),
        ("%2e.", "%2E%2E"),
        ("%61+%62", "a+b"),
    ] {
        assert_eq!(get(http, &format!("/v1/kv/{other}")).text(), key, "{other}");
    }
    for bad in ["", "%", "%4", "%zz", "a%4gb", "a/b", "/", "a/", "../x", "%%41"] {
        for method in ["GET", "PUT", "DELETE"] {
            let answer = request(http, method, &format!("/v1/kv/{bad}"), &[], b"");
            answer.assert_error(400, "BAD_REQUEST", "not_applied");
        }
    }
}

/// A header or parameter that would change the meaning is understood or refused.
#[test]
fn what_is_not_understood_is_refused() {
    let node = Node::ready("");
    let http = node.http();
    for (method, path, headers) in [
        ("GET", "/v1/kv/k?x=1", &[][..]),
        ("GET", "/v1/kv/k?consistency=fresh", &[]),
        ("GET", "/v1/kv/k?consistency=stale&consistency=stale", &[]),
        ("PUT", "/v1/kv/k?consistency=stale", &[]),
        ("DELETE", "/v1/kv/k?x", &[]),
        ("GET", "/v1/ring?x=1", &[]),
        ("GET", "/livez?x=1", &[]),
        ("GET", "/readyz?x=1", &[]),
        ("GET", "/metrics?x=1", &[]),
        ("GET", "/v1/kv/k", &[("Kv-Read", "leader")]),
        ("GET", "/v1/kv/k", &[("Kv-Routing", "proxy")]),
        ("GET", "/v1/kv/k", &[("Kv-Hops", "x")]),
        ("GET", "/v1/kv/k", &[("Kv-Deadline-Ms", "soon")]),
        ("GET", "/v1/kv/k", &[("If-None-Match", "\"1\"")]),
        ("GET", "/v1/kv/k", &[("If-Match", "\"1\"")]),
        ("PUT", "/v1/kv/k", &[("If-Match", "*")]),
        ("PUT", "/v1/kv/k", &[("If-Match", "1")]),
        ("PUT", "/v1/kv/k", &[("If-Match", "W/\"1\"")]),
        ("PUT", "/v1/kv/k", &[("If-Match", "\"1\", \"2\"")]),
        ("PUT", "/v1/kv/k", &[("If-Match", "\"1\""), ("If-Match", "\"1\"")]),
        ("PUT", "/v1/kv/k", &[("If-None-Match", "\"1\"")]),
        ("PUT", "/v1/kv/k", &[("If-Match", "\"1\""), ("If-None-Match", "*")]),
        ("DELETE", "/v1/kv/k", &[("If-None-Match", "*")]),
        ("GET", "/v1/kv/k", &[("Idempotency-Key", "c/1")]),
        ("POST", "/v1/batch", &[("If-None-Match", "*")]),
        ("POST", "/api/write", &[("If-None-Match", "*")]),
        ("POST", "/api/write", &[("If-Match", "\"1\"")]),
        ("POST", "/api/write", &[("Idempotency-Key", "c/1")]),
        ("POST", "/api/read", &[("If-Match", "\"1\"")]),
        ("POST", "/api/consistent_read", &[("Idempotency-Key", "c/1")]),
        ("POST", "/cluster/change-membership", &[("Idempotency-Key", "c/1")]),
        ("GET", "/cluster/metrics", &[("If-None-Match", "\"1\"")]),
    ] {
        // What each route would take, were it not for the header or parameter.
        let body = match path {
            "/v1/batch" => r#"{"operations":[{"get":"k"}]}"#,
            "/api/write" => r#"{"Set":{"key":"k","value":"v"}}"#,
            "/api/read" | "/api/consistent_read" => r#""k""#,
            "/cluster/change-membership" => "[1]",
            _ => "",
        };
        let answer = request(http, method, path, headers, body.as_bytes());
        assert_eq!(answer.status, 400, "{method} {path} {headers:?}");
        answer.assert_error(400, "BAD_REQUEST", "not_applied");
    }
    get(http, "/v1/kv/k").assert_error(404, "NOT_FOUND", "not_applied");
}

/// Conditions decide, and a failed one changes nothing and shows what is there.
#[test]
fn conditions_hold_or_change_nothing() {
    let node = Node::ready("");
    let http = node.http();
    let conditional = |method: &str, name: &str, value: &str| {
        request(http, method, "/v1/kv/k", &[(name, value)], b"new")
    };
    let absent = conditional("PUT", "If-Match", "\"1\"");
    absent.assert_error(412, "CONDITION_FAILED", "not_applied");
    assert_eq!(absent.header("etag"), None);
    let created = conditional("PUT", "If-None-Match", "*");
    assert_eq!(created.status, 200);
    let tag = get(http, "/v1/kv/k").header("etag").unwrap().to_owned();
    let exists = conditional("PUT", "If-None-Match", "*");
    exists.assert_error(412, "CONDITION_FAILED", "not_applied");
    assert_eq!(exists.header("etag"), Some(tag.as_str()));
    assert_eq!(conditional("PUT", "If-Match", &tag).status, 200);
    conditional("PUT", "If-Match", &tag).assert_error(412, "CONDITION_FAILED", "not_applied");
    conditional("DELETE", "If-Match", &tag).assert_error(412, "CONDITION_FAILED", "not_applied");
    let tag = get(http, "/v1/kv/k").header("etag").unwrap().to_owned();
    assert_eq!(conditional("DELETE", "If-Match", &tag).json()["deleted"], true);
    conditional("DELETE", "If-Match", &tag).assert_error(412, "CONDITION_FAILED", "not_applied");
}

/// Unknown paths and methods are told in JSON too, with the methods that work.
#[test]
fn unknown_paths_and_methods_are_told() {
    let node = Node::ready("");
    let http = node.http();
    for path in
        ["/", "/v1", "/v1/kv", "/v1/ring/", "/livez/", "/v2/kv/k", "//", "/api/", "/V1/ring"]
    {
        get(http, path).assert_error(404, "NOT_FOUND", "not_applied");
        put(http, path, b"body").assert_error(404, "NOT_FOUND", "not_applied");
    }
    for (method, path, allow) in [
        ("POST", "/v1/kv/k", "GET, HEAD, PUT, DELETE"),
        ("PATCH", "/v1/kv/k", "GET, HEAD, PUT, DELETE"),
        ("OPTIONS", "/v1/kv/", "GET, HEAD, PUT, DELETE"),
        ("GET", "/v1/batch", "POST"),
        ("POST", "/v1/ring", "GET, HEAD"),
        ("PUT", "/livez", "GET, HEAD"),
        ("DELETE", "/readyz", "GET, HEAD"),
        ("POST", "/metrics", "GET, HEAD"),
        ("GET", "/api/write", "POST"),
        ("GET", "/api/read", "POST"),
        ("PUT", "/api/consistent_read", "POST"),
        ("POST", "/api/get_hash_ring", "GET, HEAD"),
        ("GET", "/cluster/init", "POST"),
        ("GET", "/cluster/add-learner", "POST"),
        ("GET", "/cluster/change-membership", "POST"),
        ("GET", "/cluster/update-hash-ring", "POST"),
        ("POST", "/cluster/metrics", "GET, HEAD"),
        ("BREW", "/v1/ring", "GET, HEAD"),
    ] {
        let answer = request(http, method, path, &[], b"");
        answer.assert_error(405, "METHOD_NOT_ALLOWED", "not_applied");
        assert_eq!(answer.header("allow"), Some(allow), "{method} {path}");
    }
}

/// Limits are exact, and what exceeds them is refused with a readable answer.
#[test]
fn sizes_are_limited() {
    let node = Node::ready("");
    let http = node.http();
    let longest = "k".repeat(4096);
    assert_eq!(put(http, &format!("/v1/kv/{longest}"), b"v").status, 200);
    let escaped = "%6b".repeat(4096);
    assert_eq!(get(http, &format!("/v1/kv/{escaped}")).status, 200);
    let too_long = format!("/v1/kv/{longest}k");
    for method in ["GET", "PUT", "DELETE"] {
        request(http, method, &too_long, &[], b"").assert_error(413, "TOO_LARGE", "not_applied");
    }

    let largest = vec![0xA5; 1 << 20];
    assert_eq!(put(http, "/v1/kv/large", &largest).status, 200);
    assert!(get(http, "/v1/kv/large").body == largest);
    // Announced, sent whole, and the connection still works.
    let mut connection = Connection::open(http);
    connection.request("PUT", "/v1/kv/large", &[], &vec![0; (1 << 20) + 1]);
    connection.receive().assert_error(413, "TOO_LARGE", "not_applied");
    connection.request("GET", "/livez", &[], b"");
    assert_eq!(connection.receive().status, 200);
    // Not announced: the limit is found while reading.
    connection.send(b"PUT /v1/kv/large HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n");
    for _ in 0..5 {
        connection.send(b"40000\r\n");
        connection.send(&[0; 0x40000]);
        connection.send(b"\r\n");
    }
    connection.send(b"0\r\n\r\n");
    connection.receive().assert_error(413, "TOO_LARGE", "not_applied");
    // Asked first: refused before a byte of the body.
    let mut connection = Connection::open(http);
    connection.send(
        b"PUT /v1/kv/large HTTP/1.1\r\nContent-Length: 9999999999\r\nExpect: 100-continue\r\n\r\n",
    );
    connection.receive().assert_error(413, "TOO_LARGE", "not_applied");
    assert!(connection.closes_after().is_empty());
    assert!(get(http, "/v1/kv/large").body == largest, "nothing refused was stored");

    let body = format!("\"{}\"", "x".repeat(8 << 20));
    post(http, "/api/read", &body).assert_error(413, "TOO_LARGE", "not_applied");
    let set = json!({"Set": {"key": "k", "value": "x".repeat((1 << 20) + 1)}}).to_string();
    post(http, "/api/write", &set).assert_error(413, "TOO_LARGE", "not_applied");
    let set = json!({"Set": {"key": "k".repeat(4097), "value": "v"}}).to_string();
    post(http, "/api/write", &set).assert_error(413, "TOO_LARGE", "not_applied");
}

/// The largest key that may be configured fits into a path with every byte escaped.
#[test]
fn the_longest_key_fits_into_a_path() {
    let node = Node::ready("[limits]\nkey_bytes_max = 21504");
    let longest = format!("/v1/kv/{}", "%FF".repeat(21504));
    assert_eq!(put(node.http(), &longest, b"v").status, 200);
    assert_eq!(get(node.http(), &longest).text(), "v");
    put(node.http(), &format!("{longest}k"), b"v").assert_error(413, "TOO_LARGE", "not_applied");
}

/// The original's routes take and give what they always did.
#[test]
fn the_originals_routes_are_kept() {
    let node = Node::ready("");
    let http = node.http();
    let written = post(http, "/api/write", r#"{"Set":{"key":"k\u00e4","value":"v\""}}"#);
    assert_eq!(written.status, 201);
    assert!(written.json()["revision"].is_u64());
    for path in ["/api/read", "/api/consistent_read"] {
        let read = post(http, path, r#""kä""#);
        assert_eq!((read.status, read.json()), (200, json!("v\"")));
        assert_eq!(read.header("content-type"), Some("application/json"));
        let absent = post(http, path, r#""none""#);
        assert_eq!((absent.status, absent.json()), (200, json!(null)));
    }
    assert_eq!(get(http, "/v1/kv/k%C3%A4").text(), "v\"");
    put(http, "/v1/kv/binary", b"\xff");
    post(http, "/api/read", r#""binary""#).assert_error(409, "CONFLICT", "not_applied");
    for (path, body) in [
        ("/api/write", ""),
        ("/api/write", "{"),
        ("/api/write", "{}"),
        ("/api/write", r#"{"Set":{"key":"k"}}"#),
        ("/api/write", r#"{"Set":{"key":"k","value":1}}"#),
        ("/api/write", r#"{"Set":{"key":"k","value":"v","ttl":1}}"#),
        ("/api/write", r#"{"Set":{"key":"","value":"v"}}"#),
        ("/api/write", r#"{"Set":["k","v"]}"#),
        ("/api/write", r#"{"Del":{"key":"k","value":"v"}}"#),
        ("/api/write", r#"{"Set":{"key":"k","value":"v"}} x"#),
        ("/api/read", ""),
        ("/api/read", "k"),
        ("/api/read", "1"),
        ("/api/read", r#"["k"]"#),
        ("/api/read", r#""""#),
        ("/api/consistent_read", "null"),
    ] {
        post(http, path, body).assert_error(400, "BAD_REQUEST", "not_applied");
    }
    let typed = [("Content-Type", "text/plain")];
    let read = request(http, "POST", "/api/read", &typed, r#""kä""#.as_bytes());
    assert_eq!(read.status, 200, "the Content-Type does not matter");
}

/// Management requests are checked before they do anything, and conflicts are 409.
#[test]
fn management_is_checked() {
    let node = Node::start("");
    let http = node.http();
    for body in ["", "[]", "null", r#"{"x":1}"#, "{"] {
        post(http, "/cluster/init", body).assert_error(400, "BAD_REQUEST", "not_applied");
    }
    init_alone(http);
    post(http, "/cluster/init", "{}").assert_error(409, "CONFLICT", "not_applied");
    let metrics = get(http, "/cluster/metrics").json();
    assert_eq!(metrics["state"], "leader");
    assert_eq!(metrics["current_leader"], 1);
    assert_eq!(metrics["voters"], json!([1]));
    assert_eq!(metrics["learners"], json!([]));
    assert!(metrics["last_applied"].is_u64());
    for body in [
        "",
        "{}",
        "[]",
        "[2]",
        r#"[2,"h:1"]"#,
        r#"["2","h:1","h:2"]"#,
        r#"[0,"h:1","h:2"]"#,
        r#"[2,"h","h:2"]"#,
        r#"[2,"http://h:1","h:2"]"#,
        r#"[2,"h:1","h:0"]"#,
        r#"[-1,"h:1","h:2"]"#,
        r#"[2,"h:1","h:2",3]"#,
    ] {
        let answer = post(http, "/cluster/add-learner", body);
        assert_eq!(answer.status, 400, "{body}");
        answer.assert_error(400, "BAD_REQUEST", "not_applied");
    }
    for body in ["", "{}", "[]", "[1,1]", "[0]", "[\"1\"]", "1"] {
        let answer = post(http, "/cluster/change-membership", body);
        answer.assert_error(400, "BAD_REQUEST", "not_applied");
    }
    assert_eq!(post(http, "/cluster/change-membership", "[1]").status, 200);
    let unknown = post(http, "/cluster/change-membership", "[1,9]");
    unknown.assert_error(409, "CONFLICT", "not_applied");
}

/// The health routes answer in their own forms.
#[test]
fn health_is_told() {
    let node = Node::ready("");
    assert_eq!(get(node.http(), "/livez").status, 200);
    assert_eq!(get(node.http(), "/readyz").json(), json!({"ready": true}));
    let metrics = get(node.http(), "/metrics");
    assert_eq!(metrics.status, 200);
    assert!(metrics.header("content-type").unwrap().starts_with("text/plain; version=0.0.4"));
    assert!(metrics.text().ends_with("# EOF\n"));
}

/// A ring of this cluster and of another one whose only node is `other`.
fn ring(http: &str, rpc: &str, other: &str) -> String {
    let cluster = |id: &str, http: &str, rpc: &str| json!({"id": id, "weight": 1.0, "nodes": [{"id": 1, "http": http, "rpc": rpc}]});
    let clusters = [cluster("c1", http, rpc), cluster("c2", other, "127.0.0.1:1")];
    json!({"epoch": 1, "hash_version": 2, "list_ttl_s": 600, "sequencer": "c1",
        "clusters": clusters, "next": null})
    .to_string()
}

/// A key that `c2` owns, as the node itself sees it.
fn foreign_key(http: &str) -> String {
    let direct = [("Kv-Routing", "direct")];
    let is_foreign =
        |key: &String| request(http, "GET", &format!("/v1/kv/{key}"), &direct, b"").status == 421;
    (0..1000).map(|n| format!("key-{n}")).find(is_foreign).expect("two clusters share the keys")
}

/// The first ring is checked and installed once.
#[test]
fn the_first_ring_is_installed_once() {
    let node = Node::ready("");
    let http = node.http();
    let other = "127.0.0.1:1";
    let ring = ring(http, node.process.rpc(), other);
    for bad in [
        "{}",
        &ring.replace("\"hash_version\":2", "\"hash_version\":9"),
        &ring.replace(other, "nowhere"),
        &ring.replace(other, "0.0.0.0:1"),
        &ring.replace("\"next\":null", "\"more\":1"),
    ] {
        let answer = post(http, "/cluster/update-hash-ring", bad);
        answer.assert_error(400, "BAD_REQUEST", "not_applied");
    }
    // As a node tells a ring while it changes.
    let in_change = ring.replace("\"next\":null", &format!("\"next\":{ring}"));
    post(http, "/cluster/update-hash-ring", &in_change).assert_error(
        409,
        "CONFLICT",
        "not_applied",
    );
    assert_eq!(get(http, "/v1/ring").json()["epoch"], 0);
    for round in ["install", "repeat"] {
        assert_eq!(post(http, "/cluster/update-hash-ring", &ring).status, 200, "{round}");
    }
    assert_eq!(post(http, "/cluster/update-hash-ring", &in_change).status, 200);
    for same in [&ring, &in_change] {
        let changed = same.replace("\"list_ttl_s\":600", "\"list_ttl_s\":601");
        let answer = post(http, "/cluster/update-hash-ring", &changed);
        answer.assert_error(409, "CONFLICT", "not_applied");
    }
    let installed: serde_json::Value = serde_json::from_str(&ring).unwrap();
    assert_eq!(get(http, "/v1/ring").json(), installed);
    let carp = get(http, "/api/get_hash_ring").json();
    assert_eq!(carp["config_id"], 1);
    assert_eq!(carp["nodes"].as_array().unwrap().len(), 2);
}

/// Keys of another cluster are redirected, or passed on as they came; a write never twice.
#[test]
fn keys_of_another_cluster_are_passed_on() {
    let other = TcpListener::bind("127.0.0.1:0").unwrap();
    let other_address = other.local_addr().unwrap().to_string();
    let node = Node::ready("");
    let http = node.http();
    let ring = ring(http, node.process.rpc(), &other_address);
    assert_eq!(post(http, "/cluster/update-hash-ring", &ring).status, 200);

    let key = foreign_key(http);
    let direct = [("Kv-Routing", "direct")];
    let redirect = request(http, "PUT", &format!("/v1/kv/{key}"), &direct, b"v");
    redirect.assert_error(421, "WRONG_CLUSTER", "not_applied");
    let error = &redirect.json()["error"];
    assert_eq!(error["epoch"], 1);
    assert_eq!(error["owner"]["id"], "c2");
    assert_eq!(error["owner"]["nodes"][0]["http"], other_address.as_str());

    // The same key, its first letter escaped for no reason: it must arrive just so.
    let path = format!("/v1/kv/%6B{}", &key[1..]);
    let played = std::thread::spawn(move || {
        let (mut peer, _) = other.accept().unwrap();
        let request = read_request(&mut peer);
        peer.write_all(
            b"HTTP/1.1 412 Precondition Failed\r\nETag: \"5\"\r\nContent-Type: text/x\r\n\
              Content-Length: 4\r\nConnection: close\r\n\r\nbody",
        )
        .unwrap();
        drop(peer);
        // The next one hangs up once the request is there.
        let (mut peer, _) = other.accept().unwrap();
        read_request(&mut peer);
        drop(peer);
        other.set_nonblocking(true).unwrap();
        (request, other)
    });
    let relayed = request(http, "PUT", &path, &[("If-Match", "\"4\"")], b"v.");
    assert_eq!((relayed.status, relayed.text().as_str()), (412, "body"));
    assert_eq!(relayed.header("etag"), Some("\"5\""));
    assert_eq!(relayed.header("content-type"), Some("text/x"));
    let lost = put(http, &path, b"v.");
    lost.assert_error(504, "TIMEOUT", "unknown");
    let (seen, other) = played.join().unwrap();
    assert!(seen.starts_with(&format!("PUT {path} HTTP/1.1\r\n")), "{seen}");
    for part in ["if-match: \"4\"\r\n", "kv-hops: 1\r\n", "kv-deadline-ms: ", "\r\n\r\nv."] {
        assert!(seen.contains(part), "{part:?} in {seen:?}");
    }
    assert!(other.accept().is_err(), "the lost write was sent once");

    let travelled = request(http, "PUT", &path, &[("Kv-Hops", "3")], b"v.");
    travelled.assert_error(503, "NO_LEADER", "not_applied");
    let travelled = request(http, "GET", "/v1/ring", &[("Kv-Hops", "4")], b"");
    travelled.assert_error(503, "NO_LEADER", "not_applied");
    drop(other);
    put(http, &path, b"v.").assert_error(503, "NO_LEADER", "not_applied");
}

/// One request whose body ends with a full stop.
fn read_request(stream: &mut std::net::TcpStream) -> String {
    let mut text = String::new();
    while !text.ends_with('.') {
        let mut chunk = [0; 4096];
        let count = stream.read(&mut chunk).unwrap();
        assert_ne!(count, 0, "closed after {text:?}");
        text.push_str(std::str::from_utf8(&chunk[..count]).unwrap());
    }
    text
}
