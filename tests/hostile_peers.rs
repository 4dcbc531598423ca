//! Strangers on both ports: the node stays up, its memory and its log stay bounded, and the cluster
//! goes on serving.

mod common;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use common::cluster::{Cluster, FAST, STEADY, expect_ok};
use common::line::try_request;
use common::load::{Load, LoadOptions};
use common::{PATIENCE, eventually, raise_open_files, request};
use distrib_kv_store::batch::{MEDIA_TYPE, Operation, decode_results, encode_request};
use distrib_kv_store::network::body::BODIES_BYTES_MAX;
use distrib_kv_store::network::connection::UNREAD_TIMEOUT;
use distrib_kv_store::types::Condition;
use serde_json::json;

/// How many idle connections a flood has.
const FLOOD: usize = 1000;

/// How much a node's memory may grow under any of this.
const GROWTH_BYTES_MAX: u64 = 100 << 20;

/// How many lines any of this may add to a node's log.
const LOG_LINES_MAX: usize = 200;

/// What must hold of a node after strangers came.
struct Watch<'a> {
    cluster: &'a Cluster,
    id: u64,
    memory: u64,
    lines: usize,
}

impl<'a> Watch<'a> {
    fn new(cluster: &'a Cluster, id: u64) -> Self {
        let lines = cluster.log(id).lines().count();
        Self { cluster, id, memory: cluster.node(id).resident_bytes(), lines }
    }

    #[track_caller]
    fn check(&self) {
        let memory = self.cluster.node(self.id).resident_bytes();
        let grown = memory.saturating_sub(self.memory);
        assert!(grown < GROWTH_BYTES_MAX, "{} KiB more memory", grown >> 10);
        let lines = self.cluster.log(self.id).lines().count() - self.lines;
        assert!(lines < LOG_LINES_MAX, "{lines} more lines in the log");
        expect_ok(&self.cluster.get(self.id, "/livez"));
    }
}

/// How the answer to a greeting begins that is welcome: magic, version, verdict.
const ANSWER_WELCOME: &[u8; 11] = b"dkv-peer\x00\x06\x00";

/// All nodes that are greeted here are.
const IS_VOTER: bool = true;

/// What is asked of a node: who it is, and its cluster's formation (an id, and what it serves before a
/// ring), which peers say in clear text.
#[derive(Clone, Copy)]
struct Target {
    id: u64,
    formation: [u8; 9],
}

impl Target {
    fn of(cluster: &Cluster, id: u64) -> Self {
        // The marker says it behind 8 bytes of magic and the node's id.
        let marker = std::fs::read(cluster.data_dir(id).join("marker")).expect("a marker");
        let formation = marker[16..25].try_into().unwrap();
        assert_ne!(formation, [0; 9], "the cluster is formed");
        Self { id, formation }
    }

    /// A greeting that lets in whoever sends it.
    fn greeting(self, sender: u64) -> Vec<u8> {
        greeting(1, sender, self.id, "c1", self.formation)
    }
}

/// The greeting of a peer: magic, version, purpose, sender and target with their cluster, formation, whether the
/// target is a voter.
fn greeting(purpose: u8, sender: u64, target: u64, cluster: &str, formation: [u8; 9]) -> Vec<u8> {
    let mut bytes = b"dkv-peer\x00\x06".to_vec();
    bytes.push(purpose);
    for node in [sender, target] {
        bytes.extend(node.to_be_bytes());
        bytes.push(u8::try_from(cluster.len()).unwrap());
        bytes.extend(cluster.as_bytes());
    }
    bytes.extend(formation);
    bytes.push(u8::from(IS_VOTER));
    bytes
}

/// A frame's header: magic, kind, method, id, declared length, checksum.
fn frame_header(method: u8, id: u16, length: u32, crc: u32) -> Vec<u8> {
    let mut bytes = vec![0xd5, 0, method];
    bytes.extend(id.to_be_bytes());
    bytes.extend(length.to_be_bytes());
    bytes.extend(crc.to_be_bytes());
    bytes
}

/// A whole frame whose checksum is right.
fn frame(method: u8, id: u16, body: &[u8]) -> Vec<u8> {
    let mut bytes = frame_header(method, id, body.len() as u32, 0);
    let mut crc = crc32fast::Hasher::new();
    crc.update(&bytes[..9]);
    crc.update(body);
    bytes[9..].copy_from_slice(&crc.finalize().to_be_bytes());
    bytes.extend(body);
    bytes
}

fn connect(address: &str) -> TcpStream {
    let stream = TcpStream::connect(address).expect("the node accepts");
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// Sends bytes; the node may close at any of them.
fn send(address: &str, bytes: &[u8]) -> TcpStream {
    let mut stream = connect(address);
    // It may have hung up already, which is its right.
    let _ = stream.write_all(bytes);
    stream
}

/// Whether the other end closes.
fn closes(mut stream: TcpStream) -> bool {
    let mut sink = [0; 4096];
    loop {
        match stream.read(&mut sink) {
            Ok(0) => return true,
            Ok(_) => {}
            Err(error) => return error.kind() == std::io::ErrorKind::ConnectionReset,
        }
    }
}

/// Whether the other end has not closed yet; it has sent nothing.
fn is_open(stream: &TcpStream) -> bool {
    stream.set_nonblocking(true).expect("a socket");
    let peeked = stream.peek(&mut [0]);
    peeked.is_err_and(|error| error.kind() == std::io::ErrorKind::WouldBlock)
}

/// Everything that a stranger may send, each on a connection of its own.
fn hostile_streams(target: Target) -> Vec<Vec<u8>> {
    let hello = |rest: &[u8]| [target.greeting(99).as_slice(), rest].concat();
    let huge_inner = {
        // 38 bytes that a naive decoder of "length, bytes" takes for a request of 2^63 bytes.
        let mut body = [0xff; 25];
        body[8..16].copy_from_slice(&(1u64 << 63).to_le_bytes());
        frame(1, 1, &body)
    };
    assert_eq!(huge_inner.len(), 38);
    let garbage: Vec<u8> =
        (0..4096u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let mut streams = vec![
        garbage.clone(),
        b"GET / HTTP/1.1\r\nHost: node\r\n\r\n".to_vec(),
        vec![0xff; 38],
        vec![0; 64],
        // The length first, as other protocols have it.
        [&u32::MAX.to_be_bytes()[..], &[0; 34]].concat(),
        greeting(1, 99, target.id, "c2", target.formation),
        greeting(1, 99, target.id + 1, "c1", target.formation),
        greeting(77, 99, target.id, "c1", target.formation),
        greeting(1, 99, target.id, "c1", [0; 9]),
        hello(&garbage),
        hello(&frame_header(1, 1, u32::MAX, 0)),
        hello(&frame(200, 1, b"no such method")),
        hello(&huge_inner),
        hello(&frame(1, 1, &[])),
    ];
    for method in 0..16 {
        streams.push(hello(&frame(method, 7, &garbage)));
        streams.push(hello(&frame(method, 7, &[0xff; 40])));
    }
    let flipped = {
        let mut bytes = frame(1, 1, b"flipped");
        *bytes.last_mut().unwrap() ^= 1;
        bytes
    };
    streams.push(hello(&flipped));
    streams
}

/// Garbage, wrong greetings, frames that lie: the connection is closed and nothing else happens.
#[test]
fn garbage_on_the_peer_port_harms_nobody() {
    let cluster = Cluster::formed(3, STEADY);
    let target = cluster.leader();
    let streams = hostile_streams(Target::of(&cluster, target));
    let term = cluster.metrics(target).unwrap()["term"].clone();
    let watch = Watch::new(&cluster, target);
    let load = Load::start(cluster.addresses(), LoadOptions::default());
    for round in 0..20 {
        for bytes in &streams {
            let stream = send(cluster.rpc(target), bytes);
            // Half of them hang up at once, the others wait for what the node does.
            if round % 2 == 0 {
                drop(stream);
            }
        }
    }
    load.await_more("after garbage", 100);
    // Frames that end in the middle, held open together.
    let halves: Vec<TcpStream> =
        streams.iter().map(|bytes| send(cluster.rpc(target), &bytes[..bytes.len() / 2])).collect();
    load.await_more("with half frames open", 100);
    watch.check();
    drop(halves);
    load.stop().check_all(&cluster.addresses());
    assert_eq!(cluster.metrics(target).unwrap()["term"], term, "the leader leads on");
    watch.check();
}

/// A frame that declares 4 GiB is refused before anything is allocated for it.
#[test]
fn a_frame_that_declares_too_much_is_refused() {
    let cluster = Cluster::formed(1, FAST);
    let watch = Watch::new(&cluster, 1);
    let target = Target::of(&cluster, 1);
    // Who greets so is let in: what follows is refused for what it is.
    let mut answer = [0; ANSWER_WELCOME.len()];
    send(cluster.rpc(1), &target.greeting(99)).read_exact(&mut answer).unwrap();
    assert_eq!(&answer, ANSWER_WELCOME);
    for length in [u32::MAX, 1 << 31, (16 << 20) + 1] {
        let hello = target.greeting(99);
        let bytes = [hello, frame_header(1, 1, length, 0), vec![0; 1000]].concat();
        assert!(closes(send(cluster.rpc(1), &bytes)), "{length}");
    }
    // Within the limit it is waited for, but nothing is set aside for what has not come.
    let open: Vec<TcpStream> = (0..50)
        .map(|n| {
            let hello = target.greeting(100 + n);
            let bytes = [hello, frame_header(1, 1, 15 << 20, 0), vec![0; 1000]].concat();
            send(cluster.rpc(1), &bytes)
        })
        .collect();
    cluster.put(1, "k", "v");
    watch.check();
    drop(open);
}

/// One small write in a request of 8 MiB, again and again: what is kept of it is the write, and not the request.
#[test]
fn a_small_write_does_not_keep_its_large_request_in_memory() {
    let cluster = Cluster::formed(1, FAST);
    let watch = Watch::new(&cluster, 1);
    let read = Operation::Get { key: vec![b'k'; (8 << 20) - 100].into() };
    for n in 0..40u32 {
        let (key, value, condition) = (n.to_be_bytes().to_vec(), "v".into(), Condition::Always);
        let write = Operation::Put { key: key.into(), value, condition, seq: None };
        let body = encode_request(None, &[write, read.clone()]);
        let headers = [("Content-Type", MEDIA_TYPE)];
        expect_ok(&request(cluster.http(1), "POST", "/v1/batch", &headers, &body));
    }
    assert_eq!(cluster.metrics(1).unwrap()["keys"], 40);
    watch.check();
}

/// Clients that ask for the largest answers and do not read them: all of them together get what memory there is
/// for answers, and others are served on.
#[test]
fn answers_that_nobody_reads_take_up_no_more_than_their_share() {
    let cluster = Cluster::formed(1, FAST);
    const READS: usize = 7;
    let value = "v".repeat(1 << 20);
    cluster.put(1, "large", &value);
    cluster.put(1, "small", "v");
    let memory = || cluster.node(1).resident_bytes();
    let before = memory();
    let read = Operation::Get { key: "large".into() };
    let body = encode_request(None, &vec![read; READS]);
    let head = format!(
        "POST /v1/batch HTTP/1.1\r\nHost: node\r\nContent-Type: {MEDIA_TYPE}\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    let bytes = [head.as_bytes(), &body].concat();
    let ask_and_not_read = || {
        let mut stream = send(cluster.http(1), &bytes);
        // So the answer is there.
        let mut start = [0; "HTTP/1.1 200".len()];
        stream.read_exact(&mut start).unwrap();
        assert_eq!(&start, b"HTTP/1.1 200");
        stream
    };
    let answers = |body: Vec<u8>| decode_results(body.into(), READS).unwrap();
    let headers = [("Content-Type", MEDIA_TYPE)];
    let share = u64::try_from(BODIES_BYTES_MAX).unwrap();
    let unread = eventually("all are asked before the node lets the first one go", || {
        let began = Instant::now();
        let unread: Vec<TcpStream> = (0..150).map(|_| ask_and_not_read()).collect();
        let grown = memory().saturating_sub(before);
        assert!(grown < share + GROWTH_BYTES_MAX, "{} KiB more memory", grown >> 10);
        // The first ones wait with their values, all others were told to come later.
        let told = answers(request(cluster.http(1), "POST", "/v1/batch", &headers, &body).body);
        let refused = told.iter().all(|result| result.status() == 503);
        assert!(refused || began.elapsed() >= UNREAD_TIMEOUT, "{told:?}");
        refused.then_some(unread)
    });
    assert_eq!(cluster.get(1, "/v1/kv/small").text(), "v");
    drop(unread);
    eventually("what nobody waits for any more is let go", || {
        let again = answers(request(cluster.http(1), "POST", "/v1/batch", &headers, &body).body);
        again.iter().all(|result| result.status() == 200).then_some(())
    });
}

/// A thousand idle connections on the peer port keep no peer out.
#[test]
fn idle_connections_on_the_peer_port_keep_no_peer_out() {
    raise_open_files();
    let mut cluster = Cluster::formed(3, FAST);
    let target = cluster.leader();
    let flood = |id| -> Vec<TcpStream> { (0..FLOOD).map(|_| connect(cluster.rpc(id))).collect() };
    let watch = Watch::new(&cluster, target);
    let floods: Vec<_> = cluster.ids().map(flood).collect();
    let load = Load::start(cluster.addresses(), LoadOptions::default());
    load.await_more("under a flood of peer connections", 200);
    watch.check();
    // Peers that have to connect anew find their way through it, too.
    let follower = cluster.follower();
    cluster.kill9(follower);
    cluster.restart(follower);
    cluster.await_caught_up();
    load.await_more("with a peer that connected anew", 100);
    drop(floods);
    load.stop().check_all(&cluster.addresses());
}

/// A thousand idle connections on the HTTP port keep no client out: who drips a header is closed in
/// time, who says nothing as soon as others want the place.
#[test]
fn idle_connections_on_the_http_port_keep_no_client_out() {
    raise_open_files();
    let config = format!("[limits]\nhttp_connections_max = 300\nheader_timeout_ms = 1000\n{FAST}");
    let cluster = Cluster::formed(1, &config);
    let watch = Watch::new(&cluster, 1);
    let silent: Vec<TcpStream> = (0..FLOOD / 2).map(|_| connect(cluster.http(1))).collect();
    let half = || send(cluster.http(1), b"GET /v1/kv/k HTTP/1.1\r\nHo");
    let dripping: Vec<TcpStream> = (0..FLOOD / 2).map(|_| half()).collect();
    for n in 0..20 {
        let path = format!("/v1/kv/k{n}");
        let answer = eventually("a request gets through", || {
            try_request(cluster.http(1), "PUT", &path, &[], b"v", Duration::from_secs(10)).ok()
        });
        expect_ok(&answer);
    }
    watch.check();
    for stream in dripping {
        assert!(closes(stream), "who does not finish a header is let go");
    }
    eventually("silent connections made room", || {
        (silent.iter().filter(|stream| is_open(stream)).count() <= 300).then_some(())
    });
    watch.check();
}

/// A node of another cluster does not join, and both logs say why.
#[test]
fn a_node_of_another_cluster_does_not_join() {
    let ours = Cluster::formed(1, FAST);
    let mut theirs = Cluster::start_as("c2", 1, FAST);
    let watch = Watch::new(&ours, 1);
    let learner = json!([2, theirs.http(1), theirs.rpc(1)]).to_string();
    let refused = ours.post(1, "/cluster/add-learner", &learner);
    refused.assert_error(409, "CONFLICT", "not_applied");
    assert!(refused.text().contains("it belongs to cluster c2"), "{}", refused.text());
    assert_eq!(ours.metrics(1).unwrap()["learners"], json!([]));
    // Unless it cannot be asked. Then it is listed, but must never get an entry.
    theirs.pause(1);
    expect_ok(&ours.post(1, "/cluster/add-learner", &learner));
    theirs.resume(1);
    ours.put(1, "secret", "s");
    eventually("the log says that the other belongs elsewhere", || {
        ours.log(1).contains("it belongs to cluster c2, this node to c1").then_some(())
    });
    eventually("the other's log says so, too", || {
        theirs.log(1).contains("refused a peer connection").then_some(())
    });
    let metrics = theirs.metrics(1).unwrap();
    assert_eq!((&metrics["state"], &metrics["last_log"]), (&json!("uninitialized"), &json!(null)));
    theirs.get(1, "/v1/kv/secret?consistency=stale").assert_error(
        503,
        "NOT_INITIALIZED",
        "not_applied",
    );
    ours.put(1, "secret", "t");
    watch.check();
}

/// Two nodes that were both told to form the cluster are two clusters: neither takes the other in, and
/// both go on.
#[test]
fn clusters_that_were_formed_apart_are_not_mixed() {
    let mut nodes = Cluster::start(2, FAST);
    for id in [1, 2] {
        expect_ok(&nodes.post(id, "/cluster/init", "{}"));
    }
    nodes.await_ready();
    nodes.put(1, "k", "one");
    nodes.put(2, "k", "two");
    let learner = json!([2, nodes.http(2), nodes.rpc(2)]).to_string();
    let refused = nodes.post(1, "/cluster/add-learner", &learner);
    refused.assert_error(409, "CONFLICT", "not_applied");
    assert!(refused.text().contains("initialized apart"), "{}", refused.text());
    // Not even when it is listed, because it could not be asked.
    nodes.pause(2);
    expect_ok(&nodes.post(1, "/cluster/add-learner", &learner));
    nodes.resume(2);
    eventually("the log says why it does not follow", || {
        nodes.log(1).contains("were initialized apart").then_some(())
    });
    for (id, value) in [(1, "one"), (2, "two")] {
        nodes.put(id, "after", value);
        assert_eq!(nodes.get(id, "/v1/kv/k").text(), value);
        assert_eq!(nodes.get(id, "/v1/kv/after").text(), value);
    }
}
