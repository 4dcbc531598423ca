//! What clients do to their connections, and what becomes of these: odd and broken requests, floods,
//! silence, and the end of the node.

mod common;

use std::time::{Duration, Instant};

use common::alone::Node;
use common::{Connection, NodeProcess, eventually, get, post, put, request};
use serde_json::json;

/// An unescaped `#` would be dropped with what follows it, and the write would hit another key. It is
/// refused, also behind other requests of the same connection, and a body may hold what it likes.
#[test]
fn a_fragment_is_no_part_of_a_key() {
    let node = Node::ready("");
    let http = node.http();
    assert_eq!(put(http, "/v1/kv/a", b"PUT /v1/kv/a#b HTTP/1.1\r\n\r\n").status, 200);
    for method in ["PUT", "GET", "DELETE"] {
        let answer = request(http, method, "/v1/kv/a#b", &[], b"");
        answer.assert_error(400, "BAD_REQUEST", "not_applied");
        assert!(answer.text().contains("%23"), "{}", answer.text());
    }
    let mut connection = Connection::open(http);
    connection.send(
        b"PUT /v1/kv/c HTTP/1.1\r\nContent-Length: 3\r\n\r\n#c#PUT /v1/kv/c#d HTTP/1.1\r\n\
          Content-Length: 1\r\n\r\nd",
    );
    assert_eq!(connection.receive().status, 200);
    connection.receive().assert_error(400, "BAD_REQUEST", "not_applied");
    assert!(connection.closes_after().is_empty());
    assert_eq!(get(http, "/v1/kv/c").text(), "#c#");
    assert!(get(http, "/v1/kv/a").text().starts_with("PUT /v1/kv/a#b"));
    assert_eq!(put(http, "/v1/kv/a%23b", b"v").status, 200);
}

/// What does not even parse as a request is told why in JSON, too.
#[test]
fn what_is_no_request_is_answered_in_json() {
    let node = Node::ready("");
    let http = node.http();
    let long = "k".repeat(70_000);
    for (bytes, status, code) in [
        ("nonsense\r\n\r\n".to_owned(), 400, "BAD_REQUEST"),
        ("GET /livez HTTP/3.0\r\n\r\n".into(), 400, "BAD_REQUEST"),
        ("GET /v1/kv/a b HTTP/1.1\r\n\r\n".into(), 400, "BAD_REQUEST"),
        ("GET /v1/kv/k HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n".into(), 400, "BAD_REQUEST"),
        ("GET /livez HTTP/1.1\r\nTE: x\r\nHost: a\r\nHost: a\r\n\r\n".into(), 400, "BAD_REQUEST"),
        ("PUT /v1/kv/k HTTP/1.1\r\nContent-Length: x\r\n\r\n".into(), 400, "BAD_REQUEST"),
        ("PUT /v1/kv/k HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n".into(), 400, "BAD_REQUEST"),
        (format!("GET /livez HTTP/1.1\r\n{long}: x\r\n\r\n"), 413, "TOO_LARGE"),
        (format!("GET /v1/kv/{long} HTTP/1.1\r\n\r\n"), 413, "TOO_LARGE"),
        (format!("GET /livez HTTP/1.1\r\nA: {long}{long}\r\n\r\n"), 413, "TOO_LARGE"),
    ] {
        let mut connection = Connection::open(http);
        connection.send(bytes.as_bytes());
        let answer = connection.receive();
        answer.assert_error(status, code, "not_applied");
        assert_eq!(answer.header("connection"), Some("close"));
        connection.finish();
        assert!(connection.closes_after().is_empty());
    }
}

/// Who closes before the head is whole is told so, behind the answers to what was whole.
#[test]
fn a_head_that_breaks_off_is_answered() {
    let node = Node::ready("");
    for (whole, begun) in [
        ("", "hello\n"),
        ("", "GET /v1/kv/k\r\n"),
        ("GET /livez HTTP/1.1\r\n\r\n", "G"),
        ("GET /livez HTTP/1.1\r\nTE: x\r\n\r\n", "\r\nGET /livez HTTP/1.1\r\nHost: n\r\n"),
    ] {
        let mut connection = Connection::open(node.http());
        connection.send(format!("{whole}{begun}").as_bytes());
        connection.finish();
        if !whole.is_empty() {
            assert_eq!(connection.receive().status, 200);
        }
        connection.receive().assert_error(400, "BAD_REQUEST", "not_applied");
        assert!(connection.closes_after().is_empty());
    }
    let mut silent = Connection::open(node.http());
    silent.send(b"GET /livez HTTP/1.1\r\n\r\n\r\n");
    silent.finish();
    assert_eq!(silent.receive().status, 200);
    assert!(silent.closes_after().is_empty(), "an empty line is no request");
}

/// The answer to a refused `HEAD` tells the length of what a `GET` would get, and has none of it.
#[test]
fn a_refused_head_gets_no_body() {
    let node = Node::ready("");
    let length = request(node.http(), "GET", "/v1/kv/a#b", &[], b"").body.len().to_string();
    let mut connection = Connection::open(node.http());
    connection.send(b"HEAD /v1/kv/a#b HTTP/1.1\r\n\r\n");
    let answer = connection.receive_head();
    assert_eq!((answer.status, answer.header("content-length")), (400, Some(length.as_str())));
    connection.finish();
    assert_eq!(String::from_utf8(connection.closes_after()).unwrap(), "");
}

/// An offer to go on in another protocol, which clients make with an ordinary request, takes nothing from a
/// connection: neither the last answer nor the time to read it.
#[test]
fn an_offer_of_another_protocol_costs_no_answer() {
    let node = Node::ready("");
    let offer = "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEA\r\n";
    for (first, status) in [
        (format!("GET /livez HTTP/1.1\r\n{offer}\r\n"), 200),
        // Not in a plain form, so that hyper sees it.
        (format!("GET /livez HTTP/1.1\r\n{offer}TE: x\r\n\r\n"), 200),
        ("CONNECT host:80 HTTP/1.1\r\n\r\n".to_owned(), 404),
    ] {
        let mut connection = Connection::open(node.http());
        connection.send(format!("{first}GET /v1/kv/a#b HTTP/1.1\r\n\r\n").as_bytes());
        assert_eq!(connection.receive().status, status, "{first}");
        connection.receive().assert_error(400, "BAD_REQUEST", "not_applied");
        connection.finish();
        assert!(connection.closes_after().is_empty());
    }
    let huge = vec![7; 24 << 20];
    let length = huge.len();
    let fields = format!("{offer}Expect: 100-continue\r\nContent-Length: {length}");
    let mut connection = Connection::open(node.http());
    connection.send(format!("PUT /v1/kv/k HTTP/1.1\r\n{fields}\r\n\r\n").as_bytes());
    connection.send(&huge);
    connection.receive().assert_error(413, "TOO_LARGE", "not_applied");
}

/// The reason comes through even to who sends far too much before looking.
#[test]
fn who_sends_far_too_much_hears_why() {
    let node = Node::ready("");
    let http = node.http();
    let huge = vec![7; 24 << 20];
    put(http, "/v1/kv/k", &huge).assert_error(413, "TOO_LARGE", "not_applied");
    post(http, "/v1/batch", &"x".repeat(24 << 20)).assert_error(413, "TOO_LARGE", "not_applied");
    let mut connection = Connection::open(http);
    connection.send(b"PUT /v1/kv/k HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n");
    connection.send(format!("{:x}\r\n", huge.len()).as_bytes());
    connection.send(&huge);
    connection.send(b"\r\n0\r\n\r\n");
    connection.receive().assert_error(413, "TOO_LARGE", "not_applied");
    // Refused where nothing of the body is read before the answer: it asked, but did not wait.
    let length = huge.len();
    for (fields, status, code) in [
        (format!("Expect: 100-continue\r\nContent-Length: {length}"), 413, "TOO_LARGE"),
        ("Transfer-Encoding: chunked\r\n\r\nno size".to_owned(), 400, "BAD_REQUEST"),
    ] {
        let mut connection = Connection::open(http);
        connection.send(format!("PUT /v1/kv/k HTTP/1.1\r\n{fields}\r\n\r\n").as_bytes());
        connection.send(&huge);
        let answer = connection.receive();
        answer.assert_error(status, code, "not_applied");
        assert_eq!(answer.header("connection"), Some("close"), "{fields}");
        connection.finish();
        assert!(connection.closes_after().is_empty());
    }
    get(http, "/v1/kv/k").assert_error(404, "NOT_FOUND", "not_applied");
}

/// A body that stops coming does not hold its request until the deadline.
#[test]
fn a_body_that_stalls_is_given_up() {
    let node = Node::ready("[limits]\nheader_timeout_ms = 200\nrequest_timeout_ms = 60000");
    let mut connection = Connection::open(node.http());
    connection.send(b"PUT /v1/kv/k HTTP/1.1\r\nContent-Length: 10\r\n\r\nabc");
    connection.receive().assert_error(504, "TIMEOUT", "not_applied");
    assert!(connection.closes_after().is_empty());
    get(node.http(), "/v1/kv/k").assert_error(404, "NOT_FOUND", "not_applied");
}

/// Requests in unusual but legal forms are understood.
#[test]
fn legal_forms_of_http_are_understood() {
    let node = Node::ready("");
    let http = node.http();
    let mut connection = Connection::open(http);
    connection.send(b"PUT /v1/kv/k HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n");
    connection.send(b"3\r\nabc\r\n2;x=y\r\nde\r\n0\r\nTrailer: t\r\n\r\n");
    assert_eq!(connection.receive().status, 200);
    // Three in a row without waiting, one in the absolute form.
    connection.send(
        b"GET /v1/kv/k HTTP/1.1\r\n\r\nGET http://any/v1/kv/k HTTP/1.1\r\n\r\n\
          PUT /v1/kv/k HTTP/1.1\r\nContent-Length: 1\r\n\r\nxGET /v1/kv/k HTTP/1.1\r\n\r\n",
    );
    let bodies: Vec<String> = (0..4).map(|_| connection.receive().text()).collect();
    assert_eq!([&bodies[0], &bodies[1], &bodies[3]], ["abcde", "abcde", "x"]);
    connection.send(b"PUT /v1/kv/k HTTP/1.1\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\n");
    assert_eq!(connection.receive_head().status, 100);
    connection.send(b"yes");
    assert_eq!(connection.receive().status, 200);
    connection.send(b"GET /v1/kv/k HTTP/1.0\r\n\r\n");
    assert_eq!(connection.receive().text(), "yes");
    assert!(connection.closes_after().is_empty(), "HTTP/1.0 closes");
    let mut half_closed = Connection::open(http);
    half_closed.request("PUT", "/v1/kv/k", &[], b"half");
    half_closed.finish();
    assert_eq!(half_closed.receive().status, 200);
}

/// Garbage, oversized headers and impossible requests end their own connection only.
#[test]
fn nonsense_is_survived() {
    let node = Node::ready("");
    let http = node.http();
    let huge = format!("GET /livez HTTP/1.1\r\nX: {}\r\n\r\n", "x".repeat(512 << 10));
    let many = format!("GET /livez HTTP/1.1\r\n{}\r\n", "X: y\r\n".repeat(1000));
    let long = format!("GET /v1/kv/{} HTTP/1.1\r\n\r\n", "x".repeat(70_000));
    for nonsense in [
        &b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 not HTTP at all"[..],
        b"\0\0\0\0\0\0\0\0\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET /v1/kv/\xff HTTP/1.1\r\n\r\n",
        b"GET livez HTTP/1.1\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"PUT /v1/kv/k HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"PUT /v1/kv/k HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nxx",
        b"PUT /v1/kv/k HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"PUT /v1/kv/k HTTP/1.1\r\nContent-Length: 10\r\n\r\nshort",
        huge.as_bytes(),
        many.as_bytes(),
        long.as_bytes(),
    ] {
        let mut connection = Connection::open(http);
        // The node may close before it has read all of it.
        if connection.try_send(nonsense) {
            connection.finish();
        }
        let answer = connection.closes_after();
        assert!(answer.is_empty() || answer.starts_with(b"HTTP/1.1 4"), "{answer:?}");
    }
    for strange in ["OPTIONS * HTTP/1.1\r\n\r\n", "CONNECT host:80 HTTP/1.1\r\n\r\n"] {
        let mut connection = Connection::open(http);
        connection.send(strange.as_bytes());
        assert_eq!(connection.receive().status / 100, 4, "{strange}");
    }
    assert_eq!(get(http, "/livez").status, 200);
    get(http, "/v1/kv/k").assert_error(404, "NOT_FOUND", "not_applied");
}

/// Slow clients lose their connection, not others their node.
#[test]
fn slow_clients_are_cut_off() {
    let limits = "[limits]\nheader_timeout_ms = 300\nrequest_timeout_ms = 700\n";
    let node = Node::ready(limits);
    let http = node.http();
    let start = Instant::now();
    let mut slow_header = Connection::open(http);
    slow_header.send(b"GET /livez HTTP/1.1\r\nX: ");
    let mut slow_body = Connection::open(http);
    slow_body.send(b"PUT /v1/kv/k HTTP/1.1\r\nContent-Length: 10\r\n\r\nabc");
    let answer = slow_header.receive();
    answer.assert_error(400, "BAD_REQUEST", "not_applied");
    assert!(answer.text().contains("in time"), "{}", answer.text());
    assert!(start.elapsed() >= Duration::from_millis(300));
    slow_header.finish();
    assert!(slow_header.closes_after().is_empty());
    slow_body.receive().assert_error(504, "TIMEOUT", "not_applied");
    assert!(slow_body.closes_after().is_empty());
    get(http, "/v1/kv/k").assert_error(404, "NOT_FOUND", "not_applied");
    let expired = request(http, "PUT", "/v1/kv/k", &[("Kv-Deadline-Ms", "0")], b"v");
    assert_eq!((expired.status, &expired.json()["error"]["code"]), (504, &json!("TIMEOUT")));
    // An idle connection is not a slow one: the header's time starts with its first byte.
    let mut idle = Connection::open(http);
    assert!(idle.stays_open_for(Duration::from_millis(600)));
    idle.request("GET", "/livez", &[], b"");
    assert_eq!(idle.receive().status, 200);
}

/// A line break behind a body, as old clients send it, is no slow header; what does not end is one.
#[test]
fn a_line_break_behind_a_body_costs_no_connection() {
    let node = Node::ready("[limits]\nheader_timeout_ms = 300\n");
    // In a plain form, and in one for hyper.
    for field in ["", "TE: x\r\n"] {
        let mut connection = Connection::open(node.http());
        let put = format!("PUT /v1/kv/k HTTP/1.1\r\n{field}Content-Length: 1\r\n\r\nv\r\n");
        connection.send(put.as_bytes());
        assert_eq!(connection.receive().status, 200);
        connection.send(b"\r\n");
        assert!(connection.stays_open_for(Duration::from_millis(900)), "{field}");
        connection.send(b"GET /v1/kv/k HTTP/1.1\r\n\r\n");
        assert_eq!(connection.receive().text(), "v");
        connection.send(b"\r\nGET /v1/kv/k");
        connection.receive().assert_error(400, "BAD_REQUEST", "not_applied");
    }
}

/// Clients that hold every connection and say nothing do not keep others out.
#[test]
fn idle_connections_make_room() {
    let node = Node::ready("[limits]\nhttp_connections_max = 20\n");
    let idle: Vec<Connection> = (0..60).map(|_| Connection::open(node.http())).collect();
    for _ in 0..3 {
        assert_eq!(get(node.http(), "/livez").status, 200);
    }
    drop(idle);
}

/// SIGTERM ends the node with 0, whatever its clients hold open; what was written is there after it.
#[test]
fn a_node_stops_cleanly_and_comes_back() {
    let mut node = Node::ready("");
    let http = node.http().to_owned();
    assert_eq!(put(&http, "/v1/kv/k", b"v").status, 200);
    let mut idle = Connection::open(&http);
    idle.request("GET", "/livez", &[], b"");
    assert_eq!(idle.receive().status, 200);
    let mut half_sent = Connection::open(&http);
    half_sent.send(b"GET /livez HT");
    assert!(node.process.terminate().success());
    assert!(idle.closes_after().is_empty());
    let again = NodeProcess::start(&node.process.options().clone());
    assert_eq!(again.http(), http);
    let read = eventually("the node serves again", || {
        let answer = get(&http, "/v1/kv/k");
        (answer.status == 200).then_some(answer)
    });
    assert_eq!(read.text(), "v");
}
