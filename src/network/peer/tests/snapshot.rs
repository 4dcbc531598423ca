//! A snapshot arrives whole, across cut connections, without sending a chunk twice.

use std::io;
use std::sync::Arc;

use bytes::Bytes;
use openraft::storage::{RaftSnapshotBuilder, RaftStateMachine};
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use super::support::*;
use crate::config::Config;
use crate::network::peer::Purpose;
use crate::network::peer::connection::CallError;
use crate::network::peer::link::ConnectError;
use crate::network::peer::snapshot::{ChunkSource, SendError, Transfer};
use crate::network::peer::wire::Installed;
use crate::store::snapshot::{Chunk, Place, SnapshotData};
use crate::store::{Store, StoreOptions};
use crate::types::SnapshotMeta;

struct Source {
    id: u64,
    chunks: u64,
    chunk_bytes: usize,
    is_replaced: bool,
}

impl ChunkSource for Source {
    fn id(&self) -> u64 {
        self.id
    }

    fn begin_sending(&self) -> bool {
        !self.is_replaced
    }

    fn place_of(&self, cursor: &[u8]) -> Option<Place> {
        let at: u64 = str::from_utf8(cursor).ok()?.parse().ok()?;
        Some(Place::after(at.to_be_bytes().to_vec().into()))
    }

    fn read_chunk(&self, cursor: &[u8], _: usize) -> io::Result<Chunk> {
        let at: u64 = std::str::from_utf8(cursor).unwrap().parse().unwrap();
        let mut bytes = format!("chunk {at}").into_bytes();
        bytes.resize(bytes.len().max(self.chunk_bytes), b' ');
        Ok(Chunk { bytes: bytes.into(), last: at + 1 == self.chunks })
    }
}

fn transfer(chunks: u64) -> Transfer<Source> {
    let meta = SnapshotMeta { last_log_id: Some(log_id(9)), last_membership: Default::default() };
    let source = Source { id: 77, chunks, chunk_bytes: 0, is_replaced: false };
    Transfer { source: Arc::new(source), vote: vote(3), meta }
}

async fn receiver(chunks: u64) -> FakeNode {
    let node = FakeNode::start(settings()).await;
    node.fake.staging.lock().unwrap().chunks_wanted = chunks;
    node
}

/// A proxy in front of `target` whose connections are cut whenever `cuts` changes.
async fn proxy(target: String) -> (String, watch::Sender<u32>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap().to_string();
    let (cuts, cut) = watch::channel(0);
    tokio::spawn(async move {
        while let Ok((mut near, _)) = listener.accept().await {
            let mut far = TcpStream::connect(&target).await.unwrap();
            let mut cut = cut.clone();
            cut.mark_unchanged();
            tokio::spawn(async move {
                tokio::select! {
                    _ = copy_bidirectional(&mut near, &mut far) => {}
                    _ = cut.changed() => {}
                }
            });
        }
    });
    (addr, cuts)
}

#[tokio::test]
async fn a_snapshot_arrives_in_order() {
    let node = receiver(5).await;
    let sent = transfer(5).send(&link(&node.addr, Purpose::Snapshot)).await.unwrap();
    assert_eq!(sent, Installed::new(vote(3)));
    let expected: Vec<_> = (0..5).map(|n| Bytes::from(format!("chunk {n}"))).collect();
    assert_eq!(node.fake.staging.lock().unwrap().chunks, expected);
    node.stop().await;
}

#[tokio::test]
async fn a_cut_transfer_goes_on_where_it_stopped() {
    let node = receiver(30).await;
    let (addr, cuts) = proxy(node.addr.clone()).await;
    // After every third chunk the connection goes, before its answer is sent.
    let cut = move |seq: u64| {
        if seq % 3 == 2 {
            cuts.send_modify(|cuts| *cuts += 1);
        }
    };
    *node.fake.on_chunk.lock().unwrap() = Some(Box::new(cut));
    let transfer = transfer(30);
    let link = link(&addr, Purpose::Snapshot);
    let sent = within("the snapshot", transfer.send(&link)).await.unwrap();
    assert_eq!(sent, Installed::new(vote(3)));
    let staging = node.fake.staging.lock().unwrap();
    let expected: Vec<_> = (0..30).map(|n| Bytes::from(format!("chunk {n}"))).collect();
    assert_eq!(staging.chunks, expected);
    assert_eq!(staging.writes, 30, "chunks were sent again");
}

#[tokio::test]
async fn a_deposed_leader_is_told_and_writes_nothing() {
    let node = receiver(5).await;
    node.fake.staging.lock().unwrap().higher_vote = Some(vote(8));
    let sent = transfer(5).send(&link(&node.addr, Purpose::Snapshot)).await.unwrap();
    assert_eq!(sent, Installed::new(vote(8)));
    // But not by its own vote, nor by one that no election leads to.
    for senseless in [vote(3), vote(u64::MAX / 8)] {
        node.fake.staging.lock().unwrap().higher_vote = Some(senseless);
        let sent = transfer(5).send(&link(&node.addr, Purpose::Snapshot)).await;
        assert!(matches!(sent, Err(SendError::Senseless(_))), "{sent:?}");
    }
    assert_eq!(node.fake.staging.lock().unwrap().writes, 0);
    node.stop().await;
}

/// openraft would take a failure to read for one of this node's disk, and end for good.
#[tokio::test]
async fn a_cursor_that_is_none_is_the_receivers_fault() {
    let dir = tempfile::tempdir().unwrap();
    let config = Config::default();
    let store = Store::open(&StoreOptions {
        dir: dir.path().join("node"),
        node_id: 1,
        cluster: "c1".parse().unwrap(),
        storage: config.storage,
        raft: config.raft,
        open_files_max: 64,
    });
    let mut machine = store.unwrap().state_machine();
    let image = machine.get_snapshot_builder().await.build_snapshot().await.unwrap();
    let SnapshotData::Image(source) = image.snapshot else { panic!("a sender has an image") };
    let transfer = Transfer { source, vote: vote(3), meta: image.meta };
    let node = receiver(5).await;
    // In the answer to the beginning, and in that to a chunk: the first one starts at an empty cursor.
    for (cursor, then) in [(b"\x09".as_slice(), b"".as_slice()), (b"", b"\x09")] {
        *node.fake.staging.lock().unwrap() = Staging {
            chunks_wanted: 5,
            cursors: Some([cursor, then].map(Bytes::from_static)),
            ..Staging::default()
        };
        let sent = transfer.send(&link(&node.addr, Purpose::Snapshot)).await;
        assert!(matches!(sent, Err(SendError::Senseless(_))), "{sent:?}");
    }
    node.stop().await;
}

/// It would be sent the same for ever, and the image be kept for it.
#[tokio::test]
async fn a_receiver_that_asks_for_what_it_has_ends_the_transfer() {
    let node = receiver(u64::MAX).await;
    node.fake.staging.lock().unwrap().cursors = Some(["0", "1"].map(Bytes::from));
    let link = link(&node.addr, Purpose::Snapshot);
    let transfer = transfer(5);
    let sent = within("the end", transfer.send(&link)).await;
    assert!(matches!(sent, Err(SendError::Senseless(_))), "{sent:?}");
    assert_eq!(node.fake.staging.lock().unwrap().writes, 2);
    node.stop().await;
}

/// The same of one that takes a few chunks on each connection and then has none of them.
#[tokio::test]
async fn a_receiver_that_begins_again_and_again_ends_the_transfer() {
    let node = receiver(30).await;
    let (addr, cuts) = proxy(node.addr.clone()).await;
    let fake = Arc::downgrade(&node.fake);
    let forget = move |seq: u64| {
        if seq == 2 {
            fake.upgrade().unwrap().staging.lock().unwrap().id = None;
            cuts.send_modify(|cuts| *cuts += 1);
        }
    };
    *node.fake.on_chunk.lock().unwrap() = Some(Box::new(forget));
    let transfer = transfer(30);
    let link = link(&addr, Purpose::Snapshot);
    let sent = within("the end", transfer.send(&link)).await;
    assert!(matches!(sent, Err(SendError::Senseless(_))), "{sent:?}");
    assert_eq!(node.fake.staging.lock().unwrap().writes, 3 * 4);
    node.stop().await;
}

/// A thread that panics has not found anything wrong with the disk.
#[tokio::test]
async fn a_read_that_is_broken_off_is_no_failure_of_the_image() {
    let node = receiver(5).await;
    let mut transfer = transfer(5);
    let chunk_bytes = usize::MAX;
    transfer.source = Arc::new(Source { id: 1, chunks: 5, chunk_bytes, is_replaced: false });
    let sent = transfer.send(&link(&node.addr, Purpose::Snapshot)).await;
    assert!(matches!(sent, Err(SendError::BrokenOff(_))), "{sent:?}");
    node.stop().await;
}

#[tokio::test]
async fn a_receiver_that_is_gone_is_given_up_on() {
    let node = receiver(5).await;
    let addr = node.addr.clone();
    node.stop().await;
    let transfer = transfer(5);
    let link = link(&addr, Purpose::Snapshot);
    let sent = within("giving up", transfer.send(&link)).await;
    assert!(matches!(sent, Err(SendError::Connect(ConnectError::Failed { .. }))), "{sent:?}");
}

/// A refusal of the receiver's disk is not a lost connection: trying again is openraft's decision.
#[tokio::test]
async fn a_refusal_is_not_retried() {
    let node = receiver(5).await;
    let fake = Arc::clone(&node.fake);
    let forget = move |_| fake.staging.lock().unwrap().id = None;
    *node.fake.on_chunk.lock().unwrap() = Some(Box::new(forget));
    let sent = transfer(5).send(&link(&node.addr, Purpose::Snapshot)).await;
    assert!(matches!(sent, Err(SendError::Call(CallError::Failed(_)))), "{sent:?}");
    assert_eq!(node.fake.staging.lock().unwrap().writes, 2);
    node.stop().await;
}

/// A receiver that has nothing of a snapshot yet does not begin with one that is no longer the newest.
#[tokio::test]
async fn a_snapshot_that_was_replaced_is_not_begun() {
    let node = receiver(5).await;
    let mut transfer = transfer(5);
    transfer.source = Arc::new(Source { id: 1, chunks: 5, chunk_bytes: 0, is_replaced: true });
    let sent = transfer.send(&link(&node.addr, Purpose::Snapshot)).await;
    assert!(matches!(sent, Err(SendError::Replaced)), "{sent:?}");
    assert_eq!(node.fake.staging.lock().unwrap().writes, 0);
    node.stop().await;
}

#[tokio::test]
async fn a_chunk_over_the_frame_limit_is_not_sent() {
    let node = receiver(5).await;
    let mut transfer = transfer(5);
    let chunk_bytes = settings().frame_bytes_max;
    transfer.source = Arc::new(Source { id: 1, chunks: 5, chunk_bytes, is_replaced: false });
    let sent = transfer.send(&link(&node.addr, Purpose::Snapshot)).await;
    assert!(matches!(sent, Err(SendError::Call(CallError::TooLarge { .. }))), "{sent:?}");
    node.stop().await;
}
