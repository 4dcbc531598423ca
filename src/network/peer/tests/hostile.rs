//! Whatever strangers and broken peers send or hold open, the node stays up and its peers go on.

use std::time::Duration;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::timeout;

use super::support::*;
use crate::network::peer::Purpose;
use crate::network::peer::envelope::{encode_message, seal_request};
use crate::network::peer::frame::{FrameHeader, FrameKind, encode_header};
use crate::network::peer::greeting;
use crate::network::peer::settings::PeerSettings;
use crate::network::peer::wire::{Append, Heartbeat, Method, VoteRequest};
use crate::types::NodeId;

const PATIENCE: Duration = Duration::from_secs(5);

/// A raw connection that has greeted as node 9, so that it disturbs no other's place.
async fn greeted(node: &FakeNode, purpose: Purpose) -> TcpStream {
    greeted_as(9, node, purpose).await
}

async fn greeted_as(id: NodeId, node: &FakeNode, purpose: Purpose) -> TcpStream {
    let mut stream = TcpStream::connect(&node.addr).await.unwrap();
    let greeting = hello(purpose, id);
    greeting::connect(&mut stream, &greeting).await.unwrap();
    stream
}

/// Reads until the node closes the connection, which it must do.
async fn closed(mut stream: TcpStream) {
    let mut rest = Vec::new();
    // A reset is as good as an end.
    let _ = within("the node closes the connection", stream.read_to_end(&mut rest)).await;
}

fn framed(method: u8, id: u16, body: &[u8]) -> Vec<u8> {
    let header = FrameHeader { kind: FrameKind::Request, method, id };
    let mut bytes = encode_header(header, body).to_vec();
    bytes.extend(body);
    bytes
}

async fn still_works(node: &FakeNode) {
    let connection = link(&node.addr, Purpose::Control).connection().await.unwrap();
    connection.call(&VoteRequest::new(vote(1), None), PATIENCE).await.unwrap();
}

#[tokio::test]
async fn garbage_instead_of_a_greeting_is_cut_off() {
    let node = FakeNode::start(settings()).await;
    for garbage in [&b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"[..], &[0; 4096], &[0xff; 100_000]] {
        let mut stream = TcpStream::connect(&node.addr).await.unwrap();
        // The node may close before all is written.
        let _ = stream.write_all(garbage).await;
        closed(stream).await;
    }
    still_works(&node).await;
    node.stop().await;
}

#[tokio::test]
async fn half_a_greeting_is_cut_off_in_time() {
    let node = FakeNode::start(settings()).await;
    let mut stream = TcpStream::connect(&node.addr).await.unwrap();
    stream.write_all(b"dkv-peer\x00\x03\x02").await.unwrap();
    closed(stream).await;
    still_works(&node).await;
    node.stop().await;
}

#[tokio::test]
async fn broken_frames_close_their_connection_only() {
    let node = FakeNode::start(settings()).await;
    let peer = link(&node.addr, Purpose::Control).connection().await.unwrap();
    let mut four_gib = framed(Method::Vote.number(), 1, b"");
    four_gib[5..9].fill(0xff);
    // What kills a Toy-RPC server with its own codec: its magic, and an inner length of 2^63.
    let mut toy_rpc = vec![13, 0, 0, 0, 0, 25, 0, 0, 0];
    toy_rpc.extend([253, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f]);
    toy_rpc.resize(38, 0x7f);
    let mut wrong_checksum = framed(Method::Vote.number(), 1, b"body");
    *wrong_checksum.last_mut().unwrap() ^= 1;
    // A well-formed envelope around entries whose count is a lie.
    let mut inner = encode_message(&Heartbeat(append(1, 0, 0)));
    let count_at = inner.len() - 4;
    inner[count_at..].fill(0xff);
    let inner = seal_request(0, &identity(9), inner);
    let other_sender =
        seal_request(0, &identity(3), encode_message(&VoteRequest::new(vote(1), None)));
    let breaches = [
        four_gib,
        toy_rpc,
        wrong_checksum,
        framed(Method::Heartbeat.number(), 1, &inner),
        framed(Method::Heartbeat.number(), 1, &[1; 38]),
        framed(Method::Vote.number(), 1, &other_sender),
        framed(Method::Vote.number(), 1, b""),
        framed(0, 1, b"no such procedure"),
        framed(200, 1, b"no such procedure"),
        vec![0xd5; 500],
    ];
    for breach in breaches {
        let mut stream = greeted(&node, Purpose::Control).await;
        stream.write_all(&breach).await.unwrap();
        closed(stream).await;
    }
    peer.call(&VoteRequest::new(vote(1), None), PATIENCE).await.unwrap();
    assert!(!peer.closer().is_closed());
    node.stop().await;
}

/// Appends behind a gap are held back, and when the missing one can no longer come, that is the end.
#[tokio::test]
async fn appends_with_a_gap_end_the_connection_and_never_reach_raft() {
    let node = FakeNode::start(settings()).await;
    let mut stream = greeted(&node, Purpose::Append).await;
    for sequence in 1..100u16 {
        let message = Append { session: 0, request: append(1, 1, 10) };
        let body = seal_request(u64::from(sequence), &identity(9), encode_message(&message));
        // The node may close before all is written.
        let _ = stream.write_all(&framed(Method::Append.number(), sequence, &body)).await;
    }
    closed(stream).await;
    assert!(node.fake.appended.lock().unwrap().is_empty());
    still_works(&node).await;
    node.stop().await;
}

/// A peer that asks and never reads its answers fills its own buffers, not the node's memory.
#[tokio::test]
async fn a_peer_that_does_not_read_is_held_back() {
    let node = FakeNode::start(settings()).await;
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    let mut stream = socket.connect(node.addr.parse().unwrap()).await.unwrap();
    let greeting = hello(Purpose::Control, 9);
    greeting::connect(&mut stream, &greeting).await.unwrap();
    let message = encode_message(&VoteRequest::new(vote(1), None));
    let flood = async {
        for sequence in 0u64.. {
            let body = seal_request(sequence, &identity(9), message.clone());
            let frame = framed(Method::Vote.number(), sequence as u16, &body);
            let write = stream.write_all(&frame);
            match timeout(Duration::from_millis(500), write).await {
                Ok(written) => written.unwrap(),
                Err(_) => return,
            }
        }
    };
    let stalled = timeout(Duration::from_secs(60), flood).await;
    stalled.expect("the node went on reading from a peer that does not");
    still_works(&node).await;
    node.stop().await;
}

#[tokio::test]
async fn a_thousand_idle_connections_keep_no_peer_out() {
    // Both ends of each are this process's.
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    setrlimit(Resource::Nofile, raised).unwrap();
    let node = FakeNode::start(settings()).await;
    let before = link(&node.addr, Purpose::Control).connection().await.unwrap();
    let mut idle = Vec::new();
    for _ in 0..1000 {
        idle.push(TcpStream::connect(&node.addr).await.unwrap());
    }
    before.call(&VoteRequest::new(vote(1), None), PATIENCE).await.unwrap();
    let newcomer = link_from(identity(3), &node.addr, Purpose::Append);
    within("a new peer connects", newcomer.connection()).await.unwrap();
    before.call(&VoteRequest::new(vote(2), None), PATIENCE).await.unwrap();
    drop(idle);
    node.stop().await;
}

/// However many greet, a peer that connects again for the same purpose has its own place.
#[tokio::test]
async fn greeted_connections_are_bounded_and_a_peer_keeps_its_place() {
    let few = PeerSettings { connections_max: 3, ..settings() };
    let node = FakeNode::start(few).await;
    let own = link(&node.addr, Purpose::Control).connection().await.unwrap();
    let mut others = Vec::new();
    for id in 10..20 {
        let link = link_from(identity(id), &node.addr, Purpose::Control);
        others.push(link.connection().await);
    }
    assert_eq!(others.iter().filter(|other| other.is_ok()).count(), 2);
    let again = link(&node.addr, Purpose::Control).connection().await.unwrap();
    within("the older one goes", own.closer().closed()).await;
    again.call(&VoteRequest::new(vote(1), None), PATIENCE).await.unwrap();
    node.stop().await;
}

/// Strangers that greet with invented ids make room for each other, and members get in.
#[tokio::test]
async fn greeted_strangers_keep_no_member_out() {
    let few = PeerSettings { connections_max: 3, ..settings() };
    let node = FakeNode::start(few).await;
    let before = link(&node.addr, Purpose::Control).connection().await.unwrap();
    let mut strangers = Vec::new();
    for id in 1000..1300 {
        strangers.push(greeted_as(id, &node, Purpose::Append).await);
    }
    for id in [3, 4] {
        let member = link_from(identity(id), &node.addr, Purpose::Append);
        within("a member connects", member.connection()).await.unwrap();
    }
    before.call(&VoteRequest::new(vote(1), None), PATIENCE).await.unwrap();
    let newest = strangers.pop().unwrap();
    assert_eq!(newest.try_read(&mut [0]).unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
    closed(strangers.swap_remove(0)).await;
    node.stop().await;
}

#[tokio::test]
async fn who_says_that_it_is_this_node_is_refused() {
    let node = FakeNode::start(settings()).await;
    let mut stream = TcpStream::connect(&node.addr).await.unwrap();
    let greeting = hello(Purpose::Control, 1);
    greeting::connect(&mut stream, &greeting).await.unwrap_err();
    still_works(&node).await;
    node.stop().await;
}

/// Half frames are given up in time, and meanwhile they hold up no member, not even a large frame.
#[tokio::test]
async fn half_frames_end_in_time_and_hold_up_no_member() {
    let node = FakeNode::start(settings()).await;
    let peer = link(&node.addr, Purpose::Control).connection().await.unwrap();
    let large = framed(Method::Append.number(), 1, &vec![7; 1 << 20]);
    let mut halves = Vec::new();
    for id in 1000..1016 {
        let mut stream = greeted_as(id, &node, Purpose::Append).await;
        stream.write_all(&large[..100_000]).await.unwrap();
        halves.push(stream);
    }
    peer.call(&Heartbeat(append(1, 1, 900 << 10)), PATIENCE).await.unwrap();
    for half in halves {
        closed(half).await;
    }
    assert!(!peer.closer().is_closed());
    node.stop().await;
}

#[tokio::test]
async fn stopping_ends_every_connection() {
    let node = FakeNode::start(settings()).await;
    let idle = TcpStream::connect(&node.addr).await.unwrap();
    let peer = link(&node.addr, Purpose::Append).connection().await.unwrap();
    let raw = greeted(&node, Purpose::Control).await;
    node.stop().await;
    closed(idle).await;
    closed(raw).await;
    within("the peer notices", peer.closer().closed()).await;
}
