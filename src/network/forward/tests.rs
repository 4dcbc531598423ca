//! The forwarder against nodes played by plain sockets.

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use http::StatusCode;
use http_body_util::BodyExt;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket};

use super::*;
use crate::network::call::tests::call;
use crate::ring::{RingCluster, RingNode};

/// What a played node does with a request once it has read it.
#[derive(Clone, Copy)]
enum Script {
    Answer(&'static str),
    HangUp,
    StaySilent,
}

/// A node that counts what arrives.
struct Played {
    address: String,
    arrived: Arc<AtomicUsize>,
    last: tokio::sync::watch::Receiver<String>,
}

impl Played {
    async fn start(script: Script) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let arrived = Arc::new(AtomicUsize::new(0));
        let (tell, last) = tokio::sync::watch::channel(String::new());
        let count = arrived.clone();
        tokio::spawn(async move {
            let mut silent = Vec::new();
            while let Ok((mut stream, _)) = listener.accept().await {
                let mut text = String::new();
                // The tests' bodies end with a full stop, and nothing else does.
                while !(text.ends_with('.') || text.ends_with("content-length: 0\r\n\r\n")) {
                    let mut chunk = [0; 4096];
                    let read = stream.read(&mut chunk).await.unwrap();
                    text.push_str(std::str::from_utf8(&chunk[..read]).unwrap());
                    if read == 0 || (text.starts_with("GET") && text.ends_with("\r\n\r\n")) {
                        break;
                    }
                }
                count.fetch_add(1, Ordering::SeqCst);
                tell.send_replace(text);
                match script {
                    Script::Answer(answer) => {
                        // Who asked may not want it any more.
                        let _ = stream.write_all(answer.as_bytes()).await;
                    }
                    Script::HangUp => drop(stream),
                    Script::StaySilent => silent.push(stream),
                }
            }
        });
        Self { address, arrived, last }
    }

    fn arrived(&self) -> usize {
        self.arrived.load(Ordering::SeqCst)
    }
}

const WRITTEN: &str = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nETag: \"9\"\r\n\
    Retry-After: 3\r\nX-Else: no\r\nContent-Length: 14\r\nConnection: close\r\n\r\n{\"revision\":9}";

/// An address that refuses connections: its port is bound for as long as the test process lives, so
/// nobody else gets it.
fn dead_address() -> String {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let address = socket.local_addr().unwrap().to_string();
    std::mem::forget(socket);
    address
}

fn not_leader(address: &str) -> ApiError {
    ApiError::NotLeader { leader: node(1, address), epoch: 4 }
}

fn node(id: u64, http: &str) -> RingNode {
    RingNode { id, http: http.into(), rpc: "127.0.0.1:1".into() }
}

fn wrong_cluster(addresses: &[&str]) -> ApiError {
    let nodes = (1..).zip(addresses).map(|(id, address)| node(id, address)).collect();
    let owner = RingCluster { id: "c2".parse().unwrap(), weight: 1.0, nodes };
    ApiError::WrongCluster { owner: Box::new(owner), epoch: 4, next: None }
}

fn forwarder() -> Forwarder {
    Forwarder::new(64, BodyBudget::new(0))
}

async fn serve(
    call: &Call,
    effect: Effect,
    local: impl Fn() -> Result<u64, ApiError>,
) -> Result<Served<u64>, Refusal> {
    serve_by(&forwarder(), call, effect, local).await
}

async fn serve_by(
    forwarder: &Forwarder,
    call: &Call,
    effect: Effect,
    local: impl Fn() -> Result<u64, ApiError>,
) -> Result<Served<u64>, Refusal> {
    let body = Bytes::from_static(b"value.");
    let body = if effect == Effect::Write { body } else { Bytes::new() };
    let local = || std::future::ready(local());
    forwarder.serve(call, || body.clone(), effect, local).await
}

async fn failure(call: &Call, effect: Effect, error: ApiError) -> ApiError {
    match serve(call, effect, || Err(error.clone())).await {
        Err(refusal) => refusal.error,
        Ok(served) => panic!("{served:?}"),
    }
}

fn put(path: &str, headers: &[(&str, &str)]) -> Call {
    call(Method::PUT, path, headers).unwrap()
}

fn get(headers: &[(&str, &str)]) -> Call {
    call(Method::GET, "/v1/kv/k", headers).unwrap()
}

/// Path, conditions and body go on byte for byte, with one more hop and less time; status, body and
/// the headers with a meaning come back.
#[tokio::test]
async fn a_request_goes_on_as_it_came() {
    let leader = Played::start(Script::Answer(WRITTEN)).await;
    let headers = [("if-match", "\"7\""), ("kv-hops", "1"), ("x-private", "p"), ("cookie", "c")];
    let call = put("/v1/kv/%2e%2E%2f%ff%00?x=%zz", &headers);
    let served = serve(&call, Effect::Write, || Err(not_leader(&leader.address))).await.unwrap();
    let Served::Elsewhere(response) = served else { panic!("answered here") };
    assert_eq!(response.status(), StatusCode::OK);
    assert_eq!(response.headers()[header::ETAG], "\"9\"");
    assert_eq!(response.headers()[header::RETRY_AFTER], "3");
    assert_eq!(response.headers()[header::CONTENT_TYPE], "application/json");
    assert!(!response.headers().contains_key("x-else"));
    let body = response.into_body().collect().await.unwrap().to_bytes();
    assert_eq!(body, "{\"revision\":9}");

    let seen = leader.last.borrow().clone();
    let (head, body) = seen.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("PUT /v1/kv/%2e%2E%2f%ff%00?x=%zz HTTP/1.1\r\n"), "{head}");
    assert!(head.contains("if-match: \"7\"") && head.contains("kv-hops: 2"), "{head}");
    assert!(!head.contains("x-private") && !head.contains("cookie"), "{head}");
    let left_ms = head.split("kv-deadline-ms: ").nth(1).and_then(|rest| rest.lines().next());
    assert!((1..=10_000).contains(&left_ms.unwrap().parse::<u64>().unwrap()), "{head}");
    assert_eq!(body, "value.");
}

/// A write whose connection broke after it was sent is unknown, and no other node sees it.
#[tokio::test]
async fn a_write_that_may_have_arrived_is_never_sent_again() {
    let (one, two) = (Played::start(Script::HangUp).await, Played::start(Script::HangUp).await);
    let error = wrong_cluster(&[&one.address, &two.address]);
    let error = failure(&put("/v1/kv/k", &[]), Effect::Write, error).await;
    assert!(matches!(error, ApiError::Forward { outcome: Outcome::Unknown, .. }), "{error:?}");
    assert_eq!(one.arrived() + two.arrived(), 1);
}

/// A write goes on to the next node when the first one was not even reached.
#[tokio::test]
async fn a_write_that_did_not_leave_goes_to_the_next_node() {
    let alive = Played::start(Script::Answer(WRITTEN)).await;
    let (dead, dead_too) = (dead_address(), dead_address());
    for round in 1..=5 {
        let error = || Err(wrong_cluster(&[&dead, &alive.address, &dead_too]));
        let served = serve(&put("/v1/kv/k", &[]), Effect::Write, error).await;
        assert!(matches!(served, Ok(Served::Elsewhere(_))), "{served:?}");
        assert_eq!(alive.arrived(), round);
    }
}

/// While a key is handed over, only its owner knows whether it has moved already. One that is down cannot say so.
#[tokio::test]
async fn what_a_dead_owner_may_have_handed_over_goes_to_its_successor() {
    let alive = Played::start(Script::Answer(WRITTEN)).await;
    for round in 1..=5 {
        let mut error = wrong_cluster(&[&dead_address(), &dead_address()]);
        let ApiError::WrongCluster { next, .. } = &mut error else { unreachable!() };
        let nodes = vec![node(1, &alive.address)];
        *next = Some(Box::new(RingCluster { id: "c3".parse().unwrap(), weight: 1.0, nodes }));
        let served = serve(&put("/v1/kv/k", &[]), Effect::Write, || Err(error.clone())).await;
        assert!(matches!(served, Ok(Served::Elsewhere(_))), "{served:?}");
        assert_eq!(alive.arrived(), round);
    }
}

/// A read may be asked again anywhere.
#[tokio::test]
async fn a_read_goes_on_after_a_broken_connection() {
    let broken = Played::start(Script::HangUp).await;
    let alive = Played::start(Script::Answer(WRITTEN)).await;
    // The first node is chosen at random.
    let mut reads = 0;
    while broken.arrived() == 0 {
        let error = || Err(wrong_cluster(&[&broken.address, &alive.address]));
        let served = serve(&get(&[]), Effect::Read, error).await;
        assert!(matches!(served, Ok(Served::Elsewhere(_))), "{served:?}");
        reads += 1;
        assert!(reads < 1000, "it is always the same");
    }
    assert_eq!(alive.arrived(), reads);
}

/// The answer of a node that cannot serve, with this status, code and outcome.
fn refusal(status: &str, code: &str, outcome: &str) -> &'static str {
    let body = format!(r#"{{"error":{{"code":"{code}","message":"m","outcome":"{outcome}"}}}}"#);
    let head = "Content-Type: application/json\r\nConnection: close\r\nRetry-After: 1";
    let length = body.len();
    format!("HTTP/1.1 {status}\r\n{head}\r\nContent-Length: {length}\r\n\r\n{body}").leak()
}

/// What a node says of itself only, nothing of the cluster.
fn refusals_of_one() -> [&'static str; 4] {
    [
        refusal("500 Internal Server Error", "STORAGE", "not_applied"),
        refusal("503 Service Unavailable", "NOT_INITIALIZED", "not_applied"),
        refusal("503 Service Unavailable", "STOPPING", "not_applied"),
        refusal("503 Service Unavailable", "NO_LEADER", "not_applied"),
    ]
}

async fn status_of(served: Result<Served<u64>, Refusal>) -> StatusCode {
    match served {
        Ok(Served::Elsewhere(response)) => response.status(),
        other => panic!("{other:?}"),
    }
}

/// A large answer counts while it comes, and until it has been sent on: many of them at once could take up any amount
/// of memory. Without room a read is refused; what a write came to is told.
#[tokio::test]
async fn answers_on_their_way_have_a_bound() {
    let large = "v".repeat(1 << 20);
    let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n", large.len());
    let answer: &'static str = format!("{head}Connection: close\r\n\r\n{large}").leak();
    let node = Played::start(Script::Answer(answer)).await;
    let bytes_max = 4 << 20;
    let answers = BodyBudget::of(bytes_max);
    let forwarder = Forwarder::new(64, Arc::clone(&answers));
    let owner = || Err(wrong_cluster(&[&node.address]));
    let mut kept = Vec::new();
    while answers.used() + large.len() <= bytes_max {
        let served = serve_by(&forwarder, &get(&[]), Effect::Read, owner).await.unwrap();
        let Served::Elsewhere(response) = served else { panic!("answered here") };
        kept.push(response);
        assert_eq!(answers.used(), kept.len() * large.len());
    }
    let used = answers.used();
    let refused = serve_by(&forwarder, &get(&[]), Effect::Read, owner).await.unwrap_err();
    assert_eq!(refused.error, ApiError::Overloaded);
    assert_eq!(answers.used(), used, "nothing of it is kept");
    let written = serve_by(&forwarder, &put("/v1/kv/k", &[]), Effect::Write, owner).await;
    assert_eq!(status_of(written).await, StatusCode::OK);
    let response = kept.pop().unwrap();
    assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), large.as_bytes());
    let served = serve_by(&forwarder, &get(&[]), Effect::Read, owner).await;
    assert_eq!(status_of(served).await, StatusCode::OK);
    drop(kept);
    assert_eq!(answers.used(), 0);
}

/// One sick node of a healthy cluster costs no request its answer, and only the first a detour.
#[tokio::test]
async fn a_node_that_cannot_serve_is_passed_by() {
    for answer in refusals_of_one() {
        let sick = Played::start(Script::Answer(answer)).await;
        let alive = Played::start(Script::Answer(WRITTEN)).await;
        let forwarder = forwarder();
        for (call, effect) in [(get(&[]), Effect::Read), (put("/v1/kv/k", &[]), Effect::Write)] {
            for _ in 0..20 {
                let owner = || Err(wrong_cluster(&[&sick.address, &alive.address]));
                let served = serve_by(&forwarder, &call, effect, owner).await;
                assert_eq!(status_of(served).await, StatusCode::OK, "{answer}");
            }
        }
        assert_eq!(alive.arrived(), 40, "{answer}");
        // Suspicion ends after a while, on a slow machine within this test.
        assert!((1..=5).contains(&sick.arrived()), "{answer}");
    }
}

/// When nobody does better, what a node said is the answer. Who knows of no leader has waited for one:
/// a second opinion is asked for, but no third, and none when there is no time for it.
#[tokio::test]
async fn a_refusal_of_all_is_relayed() {
    let begun = Instant::now();
    for (answer, deadline_ms, asked) in [
        (refusals_of_one()[0], "10000", 3),
        (refusals_of_one()[1], "10000", 3),
        (refusals_of_one()[3], "10000", 2),
        (refusals_of_one()[3], "2900", 1),
        (refusal("503 Service Unavailable", "OVERLOADED", "not_applied"), "10000", 1),
    ] {
        let nodes = [
            Played::start(Script::Answer(answer)).await,
            Played::start(Script::Answer(answer)).await,
            Played::start(Script::Answer(answer)).await,
        ];
        let call = put("/v1/kv/k", &[("kv-deadline-ms", deadline_ms)]);
        let owner = wrong_cluster(&nodes.each_ref().map(|node| node.address.as_str()));
        let served = serve(&call, Effect::Write, || Err(owner.clone())).await;
        let Ok(Served::Elsewhere(response)) = served else { panic!("{served:?}") };
        assert!(answer.contains(response.status().as_str()), "{answer}");
        assert_eq!(response.headers()[header::RETRY_AFTER], "1");
        let body = response.into_body().collect().await.unwrap().to_bytes();
        assert!(answer.as_bytes().ends_with(&body), "{answer}");
        assert_eq!(nodes.iter().map(Played::arrived).sum::<usize>(), asked, "{answer}");
    }
    assert!(begun.elapsed() < 4 * LEADER_WAIT, "nothing is waited for here");
}

/// A refusal that leaves open what became of a write is the last word, too.
#[tokio::test]
async fn a_write_in_doubt_is_not_sent_again() {
    let answer = refusal("500 Internal Server Error", "STORAGE", "unknown");
    let (one, two) =
        (Played::start(Script::Answer(answer)).await, Played::start(Script::Answer(answer)).await);
    let owner = || Err(wrong_cluster(&[&one.address, &two.address]));
    let served = serve(&put("/v1/kv/k", &[]), Effect::Write, owner).await;
    assert_eq!(status_of(served).await, StatusCode::INTERNAL_SERVER_ERROR);
    assert_eq!(one.arrived() + two.arrived(), 1);
}

/// A silent leader ends at the deadline: a write as unknown, a read as not applied.
#[tokio::test]
async fn a_silent_node_runs_into_the_deadline() {
    let silent = Played::start(Script::StaySilent).await;
    let soon = [("kv-deadline-ms", "500")];
    let write = put("/v1/kv/k", &soon);
    let error = failure(&write, Effect::Write, not_leader(&silent.address)).await;
    assert!(matches!(error, ApiError::Timeout { outcome: Outcome::Unknown, .. }), "{error:?}");
    assert_eq!(silent.arrived(), 1);
    let read = get(&soon);
    let error = failure(&read, Effect::Read, not_leader(&silent.address)).await;
    assert!(matches!(error, ApiError::Timeout { outcome: Outcome::NotApplied, .. }), "{error:?}");
}

/// A node that kept a request waiting, or refused it, is asked after the others from then on: no
/// later request pays for it, be it a read or a write.
#[tokio::test]
async fn a_node_that_did_not_answer_is_asked_last() {
    let silent = Played::start(Script::StaySilent).await;
    let alive = Played::start(Script::Answer(WRITTEN)).await;
    let forwarder = forwarder();
    let soon = get(&[("kv-deadline-ms", "500")]);
    let to_silent = || Err(wrong_cluster(&[&silent.address]));
    assert!(serve_by(&forwarder, &soon, Effect::Read, to_silent).await.is_err());
    assert_eq!(silent.arrived(), 1);
    for _ in 0..20 {
        let owner = || Err(wrong_cluster(&[&silent.address, &alive.address]));
        for (call, effect) in [(get(&[]), Effect::Read), (put("/v1/kv/k", &[]), Effect::Write)] {
            let served = serve_by(&forwarder, &call, effect, owner).await;
            assert!(matches!(served, Ok(Served::Elsewhere(_))), "{served:?}");
        }
    }
    assert_eq!((silent.arrived(), alive.arrived()), (1, 40));
}

/// While a write still waits for a silent node, others go past it already.
#[tokio::test]
async fn a_node_is_a_suspect_while_it_keeps_a_write_waiting() {
    let silent = Played::start(Script::StaySilent).await;
    let forwarder = forwarder();
    let call = put("/v1/kv/k", &[]);
    let stuck = serve_by(&forwarder, &call, Effect::Write, || Err(not_leader(&silent.address)));
    let suspected = async {
        let mut addresses = [silent.address.clone(), "other:1".to_owned()];
        while addresses[0] == silent.address {
            tokio::time::sleep(PAUSE_FIRST).await;
            forwarder.targets.suspects_last(&mut addresses, Instant::now());
        }
    };
    tokio::select! {
        served = stuck => panic!("{served:?}"),
        () = suspected => {}
    }
    assert_eq!(silent.arrived(), 1);
}

/// One slow node takes the turns that it has and no more: further requests to it are refused at once
/// with nothing applied, and those to other nodes go their way.
#[tokio::test]
async fn a_slow_node_does_not_take_all_there_is() {
    let silent = Played::start(Script::StaySilent).await;
    let alive = Played::start(Script::Answer(WRITTEN)).await;
    let targets = Arc::new(Targets::with(64, 2, 9));
    let forwarder = Forwarder { client: HttpClient::new(), answers: BodyBudget::new(0), targets };
    let (call, read) = (put("/v1/kv/k", &[]), get(&[]));
    let to_silent = || Err(not_leader(&silent.address));
    let stuck = async {
        tokio::join!(
            serve_by(&forwarder, &call, Effect::Write, to_silent),
            serve_by(&forwarder, &call, Effect::Write, to_silent),
        )
    };
    let others = async {
        while silent.arrived() < 2 {
            tokio::time::sleep(PAUSE_FIRST).await;
        }
        let refused = serve_by(&forwarder, &call, Effect::Write, to_silent).await.unwrap_err();
        assert_eq!(refused.error, ApiError::Overloaded);
        for (call, effect) in [(&read, Effect::Read), (&call, Effect::Write)] {
            // Also where the slow one is only one of several.
            for owner in
                [wrong_cluster(&[&silent.address, &alive.address]), not_leader(&alive.address)]
            {
                let served = serve_by(&forwarder, call, effect, || Err(owner.clone())).await;
                assert!(matches!(served, Ok(Served::Elsewhere(_))), "{served:?}");
            }
        }
    };
    tokio::select! {
        served = stuck => panic!("{served:?}"),
        () = others => {}
    }
    assert_eq!((silent.arrived(), alive.arrived()), (2, 4));
}

/// A read leaves a silent node while there are others to ask, and waits longer for the last one.
#[test]
fn reads_leave_time_for_other_nodes_and_writes_take_all() {
    assert_eq!(attempt_max(Effect::Read, 1), SLOW_AFTER);
    assert!(attempt_max(Effect::Read, 0) > LEADER_WAIT);
    assert_eq!(attempt_max(Effect::Write, 2), Duration::MAX);
}

/// A read that a silent node did not answer comes from the next one.
#[tokio::test]
async fn a_read_goes_on_after_a_silent_node() {
    let silent = Played::start(Script::StaySilent).await;
    let alive = Played::start(Script::Answer(WRITTEN)).await;
    while silent.arrived() == 0 {
        let owner = || Err(wrong_cluster(&[&silent.address, &alive.address]));
        let served = serve(&get(&[]), Effect::Read, owner).await;
        assert!(matches!(served, Ok(Served::Elsewhere(_))), "{served:?}");
    }
    assert_eq!(silent.arrived(), 1);
}

/// A request whose time is over is not sent at all.
#[tokio::test]
async fn nothing_is_sent_after_the_deadline() {
    let leader = Played::start(Script::Answer(WRITTEN)).await;
    let late = put("/v1/kv/k", &[("kv-deadline-ms", "0")]);
    let error = failure(&late, Effect::Write, not_leader(&leader.address)).await;
    assert!(matches!(error, ApiError::Timeout { outcome: Outcome::NotApplied, .. }), "{error:?}");
    assert_eq!(leader.arrived(), 0);
}

const NO_LEADER: ApiError =
    ApiError::NoLeader { message: "no leader is known", outcome: Outcome::NotApplied };

/// An election is waited out, but not for ever.
#[tokio::test]
async fn a_missing_leader_is_waited_for_within_bounds() {
    let asked = Cell::new(0);
    let elected = || {
        asked.set(asked.get() + 1);
        if asked.get() < 5 { Err(NO_LEADER) } else { Ok(7) }
    };
    let served = serve(&put("/v1/kv/k", &[]), Effect::Write, elected).await;
    assert!(matches!(served, Ok(Served::Here(7))), "{served:?}");

    // By the number of questions, which does not grow when the machine is busy.
    let times_asked = async |call: Call| {
        let asked = Cell::new(0);
        let never = || {
            asked.set(asked.get() + 1);
            Err(NO_LEADER)
        };
        let refusal = serve(&call, Effect::Write, never).await.unwrap_err();
        assert_eq!(refusal.error, NO_LEADER);
        asked.get()
    };
    let start = Instant::now();
    let until_the_end = times_asked(put("/v1/kv/k", &[])).await;
    assert!(start.elapsed() >= LEADER_WAIT);
    assert!((20..30).contains(&until_the_end), "{until_the_end}");
    let short = put("/v1/kv/k", &[("kv-deadline-ms", "500")]);
    let until_the_deadline = times_asked(short).await;
    assert!(until_the_deadline < 10, "{until_the_deadline}: not beyond the deadline");
}

/// Neither an unknown outcome nor a client that asked for a direct answer is made to wait.
#[tokio::test]
async fn nothing_else_is_asked_twice() {
    let direct = put("/v1/kv/k", &[("kv-routing", "direct")]);
    let plain = put("/v1/kv/k", &[]);
    let lost = ApiError::NoLeader { message: "leadership was lost", outcome: Outcome::Unknown };
    for (call, error) in [
        (&direct, NO_LEADER),
        (&plain, lost),
        (&plain, ApiError::Overloaded),
        (&plain, ApiError::NotInitialized),
        (&plain, ApiError::ConditionFailed { current: None }),
    ] {
        let asked = Cell::new(0);
        let local = || {
            asked.set(asked.get() + 1);
            Err(error.clone())
        };
        let refusal = serve(call, Effect::Write, local).await.unwrap_err();
        assert_eq!((refusal.error, asked.get()), (error.clone(), 1));
    }
}

/// A direct client is told where to go, with the path as it came.
#[tokio::test]
async fn a_direct_client_is_redirected() {
    let direct = put("/v1/kv/%2e%2e?", &[("kv-routing", "direct")]);
    let refusal = serve(&direct, Effect::Write, || Err(not_leader("h:1"))).await.unwrap_err();
    let response = refusal.into_response();
    assert_eq!(response.status(), StatusCode::TEMPORARY_REDIRECT);
    assert_eq!(response.headers()[header::LOCATION], "http://h:1/v1/kv/%2e%2e?");

    let refusal = serve(&direct, Effect::Write, || Err(wrong_cluster(&["h:1"]))).await.unwrap_err();
    let response = refusal.into_response();
    assert_eq!(response.status(), StatusCode::MISDIRECTED_REQUEST);
    let body = response.into_body().collect().await.unwrap().to_bytes();
    let body: serde_json::Value = serde_json::from_slice(&body).unwrap();
    assert_eq!(body["error"]["owner"]["nodes"][0]["http"], "h:1");
    assert_eq!(body["error"]["epoch"], 4);
}

/// After three hops a request ends, whoever is to blame.
#[tokio::test]
async fn a_request_is_not_passed_around_for_ever() {
    let travelled = put("/v1/kv/k", &[("kv-hops", "3")]);
    let error = failure(&travelled, Effect::Write, not_leader("127.0.0.1:1")).await;
    assert_eq!(error, ApiError::TooManyHops { hops: 3 });
}
