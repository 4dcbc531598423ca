//! The marker: a small file beside the database that says who owns it and what must be in it.
//!
//! RocksDB cannot know that a whole file of its log was lost, or that an old backup was put in its
//! place; it would open, and the node would break the promises that it gave: vote twice, or forget an
//! entry that it acknowledged. The marker is written and fsynced apart from the database and holds a
//! lower bound of what the database must contain.
//!
//! ```text
//! magic     8 bytes  "dkvmark3"
//! node id   u64
//! formation u64      0: none yet ([`super::formation`])
//! ring      u8       what the cluster serves before it has one: 0 every key, 1 none
//! vote      u8 length, then the vote's record (length 0: none)
//! log id    u8 length, then the record of a log id that was durable (length 0: none)
//! cluster   u8 length, then the id
//! crc32     u32      of everything before it
//! ```
//!
//! Markers that begin with "dkvmark2" have no `ring`, which is 0 then.
//!
//! Invariant: the marker never claims more than is on disk. It is raised only after an fsync of the
//! database, and lowered before the log is cut. It is rewritten as a whole (temporary file, fsync,
//! rename, fsync of the directory), so that a crash leaves the old one or the new one.

use std::fs::File;
use std::io::{self, Write};
use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Mutex, MutexGuard};

use bytes::{Buf, BufMut};

use crate::types::{ClusterId, LogId, NodeId, Vote};

use super::formation::{BeforeRing, Founding, Joined};
use super::{OpenError, meta};

pub(super) const FILE_NAME: &str = "marker";
/// Where a new marker is written before it takes the old one's place.
pub(super) const TEMPORARY_NAME: &str = "marker.tmp";
const MAGIC: &[u8; 8] = b"dkvmark3";
/// Of markers that do not say what the cluster serves before it has a ring.
const MAGIC_2: &[u8; 8] = b"dkvmark2";

#[derive(Debug, Clone, PartialEq)]
struct Claims {
    node_id: NodeId,
    formation: Option<Founding>,
    cluster: ClusterId,
    vote: Option<Vote>,
    durable: Option<LogId>,
}

pub(super) struct Marker {
    path: PathBuf,
    claims: Mutex<Claims>,
    /// A part of the claims: requests ask for it, and must not wait until a new marker is on disk.
    before_ring: AtomicU8,
}

impl Marker {
    /// Reads the marker, or writes a new one that claims nothing.
    pub(super) fn open(path: &Path, id: NodeId, cluster: &ClusterId) -> Result<Self, OpenError> {
        let io_error = |source| OpenError::Io { path: path.into(), source };
        let mine = Claims {
            node_id: id,
            formation: None,
            cluster: cluster.clone(),
            vote: None,
            durable: None,
        };
        let claims = match std::fs::read(path) {
            Ok(bytes) => decode(&bytes)
                .map_err(|message| OpenError::MarkerCorrupt { path: path.into(), message })?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                replace(path, &encode(&mine)).map_err(io_error)?;
                mine
            }
            Err(error) => return Err(io_error(error)),
        };
        if claims.node_id != id || claims.cluster != *cluster {
            return Err(OpenError::OtherNode {
                path: path.into(),
                found_id: claims.node_id,
                found_cluster: claims.cluster,
                id,
                cluster: cluster.clone(),
            });
        }
        let before_ring = AtomicU8::new(claims.before_ring().number());
        Ok(Self { path: path.into(), claims: Mutex::new(claims), before_ring })
    }

    /// Checks that what was found on disk is at least what the marker claims.
    pub(super) fn check_kept(
        &self,
        vote: Option<Vote>,
        durable: Option<LogId>,
    ) -> Result<(), String> {
        let claims = self.lock();
        if vote < claims.vote {
            let (found, claimed) = (show(&vote), show(&claims.vote));
            return Err(format!("its vote is {found}, but the node has voted {claimed}"));
        }
        if durable < claims.durable {
            let (found, claimed) = (show(&durable), show(&claims.durable));
            return Err(format!("its log ends at {found}, but {claimed} was acknowledged"));
        }
        Ok(())
    }

    /// The vote is on disk.
    pub(super) fn raise_vote(&self, vote: &Vote) -> io::Result<()> {
        self.change(|claims| {
            if claims.vote < Some(*vote) {
                claims.vote = Some(*vote);
            }
        })
    }

    /// The log up to here is on disk.
    pub(super) fn raise_durable(&self, last: LogId) -> io::Result<()> {
        self.change(|claims| claims.durable = claims.durable.max(Some(last)))
    }

    /// The log will end here at most. Call before cutting it.
    pub(super) fn lower_durable(&self, last: Option<LogId>) -> io::Result<()> {
        self.change(|claims| claims.durable = claims.durable.min(last))
    }

    pub(super) fn founding(&self) -> Option<Founding> {
        self.lock().formation
    }

    pub(super) fn before_ring(&self) -> BeforeRing {
        let number = self.before_ring.load(Ordering::Acquire);
        BeforeRing::from_number(number).expect("nothing but the numbers of these is stored")
    }

    pub(super) fn join_formation(&self, founding: Founding) -> io::Result<Joined> {
        let mut joined = Joined::Same;
        self.change(|claims| match claims.formation {
            None => {
                claims.formation = Some(founding);
                joined = Joined::Adopted;
            }
            Some(own) if own == founding => {}
            Some(_) => joined = Joined::Other,
        })?;
        Ok(joined)
    }

    /// The node has neither voted nor appended: whatever cluster it heard of, it may yet join any.
    pub(super) fn forget_formation(&self) -> io::Result<()> {
        self.change(|claims| claims.formation = None)
    }

    fn change(&self, change: impl FnOnce(&mut Claims)) -> io::Result<()> {
        let mut claims = self.lock();
        let mut next = claims.clone();
        change(&mut next);
        if next != *claims {
            replace(&self.path, &encode(&next))?;
            self.before_ring.store(next.before_ring().number(), Ordering::Release);
            *claims = next;
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Claims> {
        self.claims.lock().expect("no code panics while it holds this lock")
    }
}

impl Claims {
    fn before_ring(&self) -> BeforeRing {
        self.formation.map_or(BeforeRing::Serves, |founding| founding.before_ring)
    }
}

fn show<T: std::fmt::Display>(value: &Option<T>) -> String {
    value.as_ref().map_or_else(|| "none".into(), T::to_string)
}

fn encode(claims: &Claims) -> Vec<u8> {
    let mut bytes = MAGIC.to_vec();
    bytes.put_u64(claims.node_id);
    bytes.put_u64(claims.formation.map_or(0, |founding| founding.id.get()));
    bytes.put_u8(claims.before_ring().number());
    put_block(&claims.vote.as_ref().map(meta::encode_vote).unwrap_or_default(), &mut bytes);
    put_block(&claims.durable.as_ref().map(meta::encode_log_id).unwrap_or_default(), &mut bytes);
    put_block(claims.cluster.as_str().as_bytes(), &mut bytes);
    let crc = crc32fast::hash(&bytes);
    bytes.put_u32(crc);
    bytes
}

fn decode(bytes: &[u8]) -> Result<Claims, String> {
    let Some((body, crc)) = bytes.split_last_chunk::<4>() else {
        return Err("it is too short".into());
    };
    if crc32fast::hash(body) != u32::from_be_bytes(*crc) {
        return Err("its checksum does not match".into());
    }
    let Some((magic, mut rest)) = body.split_first_chunk() else {
        return Err("it is too short".into());
    };
    let has_ring = match magic {
        MAGIC => true,
        MAGIC_2 => false,
        _ => return Err("it is of an unknown format".into()),
    };
    let node_id = rest.try_get_u64().map_err(|e| e.to_string())?;
    let id = NonZeroU64::new(rest.try_get_u64().map_err(|e| e.to_string())?);
    let before_ring = if has_ring { rest.try_get_u8().map_err(|e| e.to_string())? } else { 0 };
    let before_ring = BeforeRing::from_number(before_ring).ok_or("it says nothing of a ring")?;
    let formation = id.map(|id| Founding { id, before_ring });
    let vote = match get_block(&mut rest)? {
        [] => None,
        record => Some(meta::decode_vote(record).map_err(|e| e.to_string())?),
    };
    let durable = match get_block(&mut rest)? {
        [] => None,
        record => Some(meta::decode_log_id("the log id", record).map_err(|e| e.to_string())?),
    };
    let cluster = std::str::from_utf8(get_block(&mut rest)?).map_err(|e| e.to_string())?;
    let cluster = cluster.parse().map_err(|e: crate::types::InvalidClusterId| e.to_string())?;
    Ok(Claims { node_id, formation, cluster, vote, durable })
}

fn put_block(block: &[u8], bytes: &mut Vec<u8>) {
    bytes.put_u8(u8::try_from(block.len()).expect("no part of the marker has over 64 bytes"));
    bytes.put_slice(block);
}

fn get_block<'a>(rest: &mut &'a [u8]) -> Result<&'a [u8], String> {
    let length = usize::from(rest.try_get_u8().map_err(|e| e.to_string())?);
    let (block, after) = rest.split_at_checked(length).ok_or("it is too short")?;
    *rest = after;
    Ok(block)
}

/// Writes a file so that a crash leaves the old content or the new one.
fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let temporary = path.with_file_name(TEMPORARY_NAME);
    let mut file = File::create(&temporary)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    std::fs::rename(&temporary, path)?;
    let parent = path.parent().expect("the marker lies in the data directory");
    File::open(parent)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log_id(term: u64, index: u64) -> LogId {
        let leader_id = openraft::vote::leader_id_adv::LeaderId { term, node_id: 1 };
        LogId { leader_id, index }
    }

    #[test]
    fn claims_survive_and_are_enforced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE_NAME);
        let cluster: ClusterId = "c1".parse().unwrap();
        let marker = Marker::open(&path, 1, &cluster).unwrap();
        marker.raise_durable(log_id(1, 5)).unwrap();
        marker.raise_vote(&Vote::new(2, 1)).unwrap();
        marker.raise_durable(log_id(1, 3)).unwrap();
        drop(marker);

        let marker = Marker::open(&path, 1, &cluster).unwrap();
        let vote = Some(Vote::new(2, 1));
        assert!(marker.check_kept(vote, Some(log_id(1, 5))).is_ok());
        assert!(marker.check_kept(vote, Some(log_id(1, 4))).is_err());
        assert!(marker.check_kept(vote, None).is_err());
        assert!(marker.check_kept(Some(Vote::new(1, 1)), Some(log_id(1, 9))).is_err());
        marker.lower_durable(Some(log_id(1, 2))).unwrap();
        assert!(marker.check_kept(vote, Some(log_id(1, 2))).is_ok());
    }

    #[test]
    fn a_formation_is_joined_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE_NAME);
        let cluster: ClusterId = "c1".parse().unwrap();
        let founding = |id, before_ring| Founding { id: NonZeroU64::new(id).unwrap(), before_ring };
        let first = founding(7, BeforeRing::Waits);
        let second = founding(8, BeforeRing::Serves);
        let marker = Marker::open(&path, 1, &cluster).unwrap();
        assert_eq!(marker.founding(), None);
        assert_eq!(marker.before_ring(), BeforeRing::Serves);
        assert_eq!(marker.join_formation(first).unwrap(), Joined::Adopted);
        assert_eq!(marker.before_ring(), BeforeRing::Waits);
        let marker = Marker::open(&path, 1, &cluster).unwrap();
        assert_eq!((marker.founding(), marker.before_ring()), (Some(first), BeforeRing::Waits));
        let alike = founding(7, BeforeRing::Serves);
        assert_eq!(marker.join_formation(alike).unwrap(), Joined::Other);
        assert_eq!(marker.join_formation(second).unwrap(), Joined::Other);
        assert_eq!(marker.join_formation(first).unwrap(), Joined::Same);
        marker.forget_formation().unwrap();
        assert_eq!(marker.before_ring(), BeforeRing::Serves);
        assert_eq!(marker.join_formation(second).unwrap(), Joined::Adopted);
    }

    /// Data directories of the version before go on: their clusters serve without a ring.
    #[test]
    fn a_marker_of_the_version_before_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE_NAME);
        let cluster: ClusterId = "c1".parse().unwrap();
        let founding =
            Founding { id: NonZeroU64::new(7).unwrap(), before_ring: BeforeRing::Serves };
        let marker = Marker::open(&path, 1, &cluster).unwrap();
        marker.join_formation(founding).unwrap();
        marker.raise_durable(log_id(1, 5)).unwrap();
        let mut old = std::fs::read(&path).unwrap();
        old.truncate(old.len() - 4);
        old[..8].copy_from_slice(MAGIC_2);
        old.remove(8 + 8 + 8);
        let crc = crc32fast::hash(&old);
        old.put_u32(crc);
        std::fs::write(&path, &old).unwrap();
        let marker = Marker::open(&path, 1, &cluster).unwrap();
        assert_eq!(marker.founding(), Some(founding));
        assert!(marker.check_kept(None, Some(log_id(1, 4))).is_err());
    }

    #[test]
    fn any_flipped_bit_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE_NAME);
        let cluster: ClusterId = "c1".parse().unwrap();
        Marker::open(&path, 1, &cluster).unwrap().raise_durable(log_id(1, 5)).unwrap();
        let good = std::fs::read(&path).unwrap();
        for bit in 0..good.len() * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            std::fs::write(&path, &bad).unwrap();
            let opened = Marker::open(&path, 1, &cluster);
            assert!(matches!(opened, Err(OpenError::MarkerCorrupt { .. })), "bit {bit}");
        }
        for length in 0..good.len() {
            std::fs::write(&path, &good[..length]).unwrap();
            assert!(Marker::open(&path, 1, &cluster).is_err(), "length {length}");
        }
    }

    #[test]
    fn another_nodes_marker_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE_NAME);
        Marker::open(&path, 1, &"c1".parse().unwrap()).unwrap();
        let other = Marker::open(&path, 2, &"c1".parse().unwrap());
        assert!(matches!(other, Err(OpenError::OtherNode { found_id: 1, id: 2, .. })));
        let other = Marker::open(&path, 1, &"c2".parse().unwrap());
        assert!(matches!(other, Err(OpenError::OtherNode { .. })));
    }
}
