//! Pages of handoffs between clusters: who may ask for them, for which, and how they are fetched.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::support::*;
use crate::handoff::{Cursor, Handoff, PageRequest, Refused};
use crate::network::handoff_links::{HandoffLinks, SourceError};
use crate::network::peer::envelope::{encode_message, seal_request};
use crate::network::peer::frame::{FrameHeader, FrameKind, encode_header};
use crate::network::peer::greeting::{self, GreetingError, Hello, Refusal};
use crate::network::peer::link::{ConnectError, LinkContext};
use crate::network::peer::settings::{PAGE_BYTES_MAX, PeerSettings};
use crate::network::peer::thrift::Thrift;
use crate::network::peer::wire::{Failure, Method, VoteRequest};
use crate::network::peer::{PeerIdentity, Purpose};
use crate::ring::{RingCluster, RingNode};
use crate::store::formation::Formation;

const PATIENCE: Duration = Duration::from_secs(5);

fn request(from: &str, to: &str) -> PageRequest {
    let handoff = Handoff { epoch: 2, from: from.parse().unwrap(), to: to.parse().unwrap() };
    PageRequest { handoff, attempt: 1, cursor: Cursor::Changes { position: 7 }, bytes_max: 1000 }
}

fn hello_of(sender: PeerIdentity, target: PeerIdentity) -> Hello {
    Hello { purpose: Purpose::Handoff, sender, target, formation: None, is_voter: false }
}

async fn greet(node: &FakeNode, hello: &Hello) -> Result<TcpStream, GreetingError> {
    let mut stream = TcpStream::connect(&node.addr).await.unwrap();
    within("an answer", greeting::connect(&mut stream, hello)).await?;
    Ok(stream)
}

async fn refusal(node: &FakeNode, hello: &Hello) -> Refusal {
    match greet(node, hello).await {
        Err(GreetingError::Refused(refusal)) => refusal,
        other => panic!("{other:?}"),
    }
}

/// The links of node 4 of cluster c2.
fn links_with(settings: PeerSettings) -> HandoffLinks {
    HandoffLinks::new(LinkContext {
        identity: foreign("c2", 4),
        formation: Formation::of(FORMATION + 1),
        settings: Arc::new(settings),
        shutdown: CancellationToken::new(),
        tracker: TaskTracker::new(),
        quiet: Arc::default(),
        thrift: Arc::new(Thrift::new(4, Duration::ZERO)),
    })
}

/// Cluster c1 with its replicas at these addresses; all fakes say that they are node 1.
fn source_at(addrs: &[&str]) -> RingCluster {
    let node = |rpc: &&str| RingNode { id: 1, http: String::new(), rpc: (*rpc).to_owned() };
    let nodes = addrs.iter().map(node).collect();
    RingCluster { id: "c1".parse().unwrap(), weight: 1.0, nodes }
}

/// An address at which nobody listens: its port is bound for as long as the test process lives, so
/// nobody gets it who asks for any. Who asks for it may listen there.
fn nowhere() -> String {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_reuseaddr(true).unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let address = socket.local_addr().unwrap().to_string();
    std::mem::forget(socket);
    address
}

#[tokio::test]
async fn a_destination_gets_the_pages_it_asks_for() {
    let node = FakeNode::start(settings()).await;
    let (links, source) = (links_with(settings()), source_at(&[&node.addr]));
    for _ in 0..3 {
        let page = links.page(&source, &request("c1", "c2")).await.unwrap();
        assert_eq!(page, page_after(&request("c1", "c2")));
    }
    assert_eq!(*node.fake.page_requests.lock().unwrap(), vec![request("c1", "c2"); 3]);
    node.stop().await;
}

/// Who is refused is told why, and nodes of other clusters get connections for handoffs alone.
#[tokio::test]
async fn only_nodes_of_destinations_are_let_in() {
    let node = FakeNode::start(settings()).await;
    let id = |text: &str| text.parse().unwrap();
    for (sender, target, expected) in [
        (foreign("c3", 1), identity(1), Refusal::NoHandoff { from: id("c1"), to: id("c3") }),
        (identity(2), identity(1), Refusal::NoHandoff { from: id("c1"), to: id("c1") }),
        (foreign("c2", 1), identity(2), Refusal::Node { meant: 2, found: 1 }),
        (
            foreign("c2", 1),
            foreign("c3", 1),
            Refusal::Elsewhere { meant: id("c3"), found: id("c1") },
        ),
    ] {
        assert_eq!(refusal(&node, &hello_of(sender, target)).await, expected);
    }
    // Node 1 of c2 is not this node, which is node 1 of c1.
    greet(&node, &hello_of(foreign("c2", 1), identity(1))).await.unwrap();
    for purpose in [Purpose::Append, Purpose::Control, Purpose::Snapshot] {
        let refused = link_from(foreign("c2", 4), &node.addr, purpose).connection().await.err();
        assert!(matches!(refused, Some(ConnectError::Refused { .. })), "{refused:?}");
    }
    node.stop().await;
}

fn framed(method: Method, body: &[u8]) -> Vec<u8> {
    let header = FrameHeader { kind: FrameKind::Request, method: method.number(), id: 1 };
    let mut bytes = encode_header(header, body).to_vec();
    bytes.extend(body);
    bytes
}

/// A greeting is no licence: requests for the keys of other handoffs, in the name of other senders, other
/// calls, what is too large and garbage end the connection, and nothing is read for them.
#[tokio::test]
async fn forged_requests_end_the_connection_and_read_nothing() {
    let node = FakeNode::start(settings()).await;
    let (visitor, vote_request) = (foreign("c2", 9), VoteRequest::new(vote(1), None));
    let page = |from, to, sender: &PeerIdentity| {
        framed(Method::Page, &seal_request(0, sender, encode_message(&request(from, to))))
    };
    let mut cut_short = encode_message(&request("c1", "c2"));
    cut_short.pop();
    let breaches = [
        page("c1", "c3", &visitor),
        page("c3", "c2", &visitor),
        page("c2", "c1", &visitor),
        page("c1", "c2", &foreign("c2", 8)),
        page("c1", "c2", &foreign("c3", 9)),
        framed(Method::Page, &seal_request(0, &visitor, cut_short)),
        framed(Method::Page, &[0xff; 40]),
        framed(Method::Page, &vec![7; 100_000]),
        framed(Method::Vote, &seal_request(0, &visitor, encode_message(&vote_request))),
        vec![0xd5; 500],
    ];
    for breach in breaches {
        let mut stream = greet(&node, &hello_of(visitor.clone(), identity(1))).await.unwrap();
        // The node may close before all is written.
        let _ = stream.write_all(&breach).await;
        let mut rest = Vec::new();
        // A reset is as good as an end.
        let _ = within("the node closes", stream.read_to_end(&mut rest)).await;
    }
    // Nor does a member's connection serve pages.
    let member = link(&node.addr, Purpose::Control).connection().await.unwrap();
    member.call(&request("c1", "c1"), PATIENCE).await.unwrap_err();
    assert_eq!(node.fake.begun(), 0);
    node.stop().await;
}

#[tokio::test]
async fn a_page_is_never_larger_than_this_node_allows() {
    let node = FakeNode::start(settings()).await;
    let (links, source) = (links_with(settings()), source_at(&[&node.addr]));
    for bytes_max in [0, 1000, u32::MAX] {
        let request = PageRequest { bytes_max, ..request("c1", "c2") };
        links.page(&source, &request).await.unwrap();
    }
    let limit = PAGE_BYTES_MAX.min(settings().frame_bytes_max / 4) as u32;
    let requests = node.fake.page_requests.lock().unwrap().clone();
    let asked: Vec<_> = requests.iter().map(|request| request.bytes_max).collect();
    assert_eq!(asked, [1, 1000, limit]);
    node.stop().await;
}

/// However many come for handoffs, the node's peers keep their places and get new ones.
#[tokio::test]
async fn foreign_nodes_keep_no_peer_out() {
    let few = PeerSettings { connections_max: 3, ..settings() };
    let node = FakeNode::start(few).await;
    let before = link(&node.addr, Purpose::Control).connection().await.unwrap();
    let mut foreigners = Vec::new();
    for id in 0..200 {
        let hello = hello_of(foreign("c2", id), identity(1));
        foreigners.push(greet(&node, &hello).await.unwrap());
    }
    let member = link_from(identity(3), &node.addr, Purpose::Append);
    within("a member connects", member.connection()).await.unwrap();
    before.call(&VoteRequest::new(vote(1), None), PATIENCE).await.unwrap();
    let mut rest = Vec::new();
    // A reset is as good as an end.
    let _ = within("the oldest goes", foreigners[0].read_to_end(&mut rest)).await;
    node.stop().await;
}

/// Replicas that are gone, that refuse or that are silent cost a while and not the page; who answers is
/// asked again first.
#[tokio::test]
async fn another_replica_answers_for_one_that_does_not() {
    let behind = FakeNode::start(settings()).await;
    let silent = FakeNode::start(settings()).await;
    let good = FakeNode::start(settings()).await;
    let refused = || Refused::WrongAttempt { attempt: 1, present: 0 };
    *behind.fake.on_page.lock().unwrap() = Box::new(move |_| Ok(Err(refused())));
    silent.fake.pages.forget_permits(tokio::sync::Semaphore::MAX_PERMITS);
    let gone = nowhere();
    let source = source_at(&[&gone, &behind.addr, &silent.addr, &good.addr]);
    let impatient = PeerSettings { page_timeout: Duration::from_secs(1), ..settings() };
    let links = links_with(impatient);
    for _ in 0..50 {
        links.page(&source, &request("c1", "c2")).await.unwrap();
    }
    assert_eq!(good.fake.begun(), 50);
    assert_eq!((behind.fake.begun(), silent.fake.begun()), (1, 1));
    for node in [behind, silent, good] {
        node.stop().await;
    }
}

/// A replica that has nothing new does not keep the turn: it may be cut off from the others.
#[tokio::test]
async fn an_answer_without_news_makes_another_ones_turn() {
    let (stuck, good) = (FakeNode::start(settings()).await, FakeNode::start(settings()).await);
    *stuck.fake.on_page.lock().unwrap() = Box::new(|request| {
        let mut page = page_after(request);
        page.to = request.cursor.clone();
        page.records.clear();
        Ok(Ok(page))
    });
    let (links, source) = (links_with(settings()), source_at(&[&stuck.addr, &good.addr]));
    let asked = request("c1", "c2");
    assert_eq!(links.page(&source, &asked).await.unwrap().to, asked.cursor);
    for _ in 0..10 {
        assert_ne!(links.page(&source, &asked).await.unwrap().to, asked.cursor);
    }
    assert_eq!(stuck.fake.begun(), 1);
    stuck.stop().await;
    good.stop().await;
}

/// When nobody has the page the error says why, and a node that comes back is found.
#[tokio::test]
async fn a_source_that_comes_back_is_found() {
    let addr = nowhere();
    let (links, source) = (links_with(settings()), source_at(&[&addr]));
    let gone = links.page(&source, &request("c1", "c2")).await.unwrap_err();
    assert!(matches!(gone, SourceError::Unreachable { .. }), "{gone}");
    let node = FakeNode::start_at(&addr, settings()).await;
    let calls = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&calls);
    *node.fake.on_page.lock().unwrap() =
        Box::new(move |request| match count.fetch_add(1, Ordering::SeqCst) {
            0 => Err(Failure::refused("a bad disk")),
            1 => Ok(Err(Refused::Cancelled)),
            _ => Ok(Ok(page_after(request))),
        });
    let mut refusals = 0;
    let fetching = async {
        loop {
            match links.page(&source, &request("c1", "c2")).await {
                Ok(_) => return,
                Err(SourceError::Refused { refused, .. }) => {
                    assert_eq!(refused, Refused::Cancelled);
                    refusals += 1;
                }
                Err(SourceError::Unreachable { .. }) => {}
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    within("the page", fetching).await;
    assert_eq!((refusals, calls.load(Ordering::SeqCst)), (1, 3));
    links.close();
    node.stop().await;
}
