//! CARP: which member of the ring owns a key.
//!
//! The Cache Array Routing Protocol (`draft-vinod-carp-v1-03`, 1998) lets any number of parties
//! who hold the same small table agree on one owner for each key without talking to each other.
//! Each member of the table gets a score for the key, and the highest score wins (today this is
//! called rendezvous hashing). A member that joins takes from each other member just the keys
//! for which it now scores highest; one that leaves gives its keys to the runners-up; nothing
//! else moves.
//!
//! # The draft's pieces, and where they are
//! - a **membership table**: members with relative loads, a config id that names this state of
//!   the table, and a list TTL after which a client fetches the table anew: [`Carp`] and its
//!   JSON form, below;
//! - a **member hash**, a **key hash** and a **combined hash** of the two: `carp/hash.rs`;
//! - **load multipliers**, which make the winner's odds follow the loads, and the **route
//!   selection** by highest score: `carp/score.rs`.
//!
//! Our members are clusters, under their stable ids, not single machines: a ring that changed
//! with every replaced machine would move keys for nothing.
//!
//! # Two hash versions
//! [`HashVersion::V1`] is the draft to the bit, to agree with other implementations. Its hash is
//! weak: keys that differ in a few digits, such as `user:00000042`, land unevenly, and more so
//! the more members there are. And its multipliers depend on each other, so a changed weight
//! also moves some keys between members whose weights stay.
//!
//! [`HashVersion::V2`], the default, keeps the table and the ranking and replaces both weak
//! parts: a well-mixed 64-bit hash, and the score `-w / ln(u)` with u the hash as a fraction.
//! That score follows the weights exactly and depends on one member alone, so a changed weight
//! moves keys only to or from the member that changed.
//!
//! The versions place keys differently: a table must never change its version while it holds
//! data.
//!
//! # Where the draft is silent, or spoke of URLs
//! - Keys are bytes, taken as they are: unsigned, zeros included, case included. Member names
//!   are hashed in (ASCII) lower case by version 1, as the draft wants it, but are told apart by
//!   their exact bytes.
//! - Equal scores go to the smaller id, in byte order. The draft leaves them open, and an order
//!   of the file would be no answer: two copies of a table may list their members differently.
//!   Two members of equal weight with the same member hash (under version 1: `C1` and `c1`) tie
//!   on every key, so the second gets none. Do not name members so.
//! - Loads are positive numbers, not just integers. They are relative: only ratios count.
//! - The list TTL is in seconds. The draft says minutes in one place and seconds in another.
//! - A table without members is valid and owns nothing.
//!
//! # Invariants
//! 1. Members are sorted by id and distinct; every weight is finite and positive.
//! 2. The scorer is a function of the hash version and the members, rebuilt with every change.
//! 3. The owner of a key is a function of the key, the hash version and the *set* of members
//!    with their weights: not of their order, the config id, the TTL or the platform. Replicas
//!    compute it while they apply a log, so it uses integers and `libm` only.
//!
//! # Cost of a lookup
//! One pass over the key and a few instructions for each member; nothing is allocated. Members
//! of equal weight need no logarithm, so a ring of equals costs one to two nanoseconds a member,
//! and one in which no two weights are equal a few (`benches/carp_benchmark.rs`). Building or
//! changing a table costs O(n log n), and all of it is rebuilt.
//!
//! # What it is not
//! Not a defence against keys chosen to land on one member, not a balance of bytes or of
//! requests (only of keys), and not a failover: the draft's rule to try the second-highest
//! member is for caches, and here that member does not hold the key. It knows nothing of epochs
//! and of how a ring changes while it serves.

mod hash;
mod score;

#[cfg(test)]
mod tests;

use std::fmt;

use serde::{Deserialize, Serialize};

use score::Scorer;

/// How long a client may use a table before it fetches it anew, unless told otherwise. A ring
/// changes rarely, and a client that is behind is redirected, so this only bounds how long
/// redirects last.
pub const DEFAULT_LIST_TTL_S: u32 = 600;

/// The version of the JSON form that this code writes, and the only one that it reads.
const TABLE_VERSION: u32 = 1;

/// How keys and members are hashed and scored; see the top of the module.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub enum HashVersion {
    /// The draft to the bit: 32-bit hashes and load multipliers. For agreement with others.
    V1,
    /// 64-bit hashes and logarithmic scores: even shares, minimal movement.
    #[default]
    V2,
}

impl From<HashVersion> for u32 {
    fn from(version: HashVersion) -> Self {
        match version {
            HashVersion::V1 => 1,
            HashVersion::V2 => 2,
        }
    }
}

impl TryFrom<u32> for HashVersion {
    type Error = CarpError;

    fn try_from(version: u32) -> Result<Self, CarpError> {
        match version {
            1 => Ok(Self::V1),
            2 => Ok(Self::V2),
            _ => Err(CarpError::UnknownHashVersion { version }),
        }
    }
}

/// Why a table was refused. To try again with the same table is no use.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum CarpError {
    /// Two members have the same id.
    #[error("member {id:?} is in the ring twice")]
    DuplicateMember {
        /// The id in question.
        id: String,
    },
    /// A weight is zero, negative, infinite or not a number.
    #[error("member {id:?} has the weight {weight}, which is not finite and positive")]
    BadWeight {
        /// The member in question.
        id: String,
        /// Its weight.
        weight: f32,
    },
    /// The JSON form is of a version that this code does not know.
    #[error("the ring's table has version {version}, only {TABLE_VERSION} is known")]
    UnknownTableVersion {
        /// The version found.
        version: u32,
    },
    /// The table asks for a hash that this code does not know, so no owner can be told.
    #[error("the ring has hash version {version}, only 1 and 2 are known")]
    UnknownHashVersion {
        /// The version found.
        version: u32,
    },
}

/// A membership table, ready for lookups.
///
/// ```
/// use distrib_kv_store::carp::Carp;
///
/// let ring = Carp::new(vec![("c1".into(), 1.0), ("c2".into(), 2.0)], 7);
/// let owner = ring.get("user:42");
/// assert_eq!(ring.owner(b"user:42"), Some(owner));
/// ```
///
/// As JSON, with members sorted by id and each `relative_load` being the weight as it was given
/// (not a share of 1), so that reading it back gives an equal table, bit for bit:
///
/// ```json
/// {"version":1,"hash_version":2,"config_id":7,"list_ttl":600,
///  "nodes":[{"addr":"c1","relative_load":1.0},{"addr":"c2","relative_load":2.0}]}
/// ```
///
/// Reading checks what [`Carp::try_with_hash`] checks and knows table version 1 only. Fields
/// that it does not know are ignored; a change of meaning takes a new version.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Table", into = "Table")]
pub struct Carp {
    config_id: u32,
    hash_version: HashVersion,
    list_ttl_s: u32,
    members: Vec<Member>,
    scorer: Scorer,
}

/// One member, in memory and, as the draft's fields are called in our JSON, in a table.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Member {
    #[serde(rename = "addr")]
    id: String,
    #[serde(rename = "relative_load")]
    weight: f32,
}

impl Carp {
    /// A table of `(id, weight)` under the default hash version. The order of `nodes` does not
    /// matter, an empty list is allowed, and weights are relative to each other.
    ///
    /// `config_id` names this state of the table, and whoever decides on the members sets it
    /// (the ring's epoch, in this crate). Lookups do not depend on it.
    ///
    /// # Panics
    /// On a duplicate id or on a weight that is not finite and positive.
    pub fn new(nodes: Vec<(String, f32)>, config_id: u32) -> Self {
        Self::with_hash(nodes, config_id, HashVersion::default())
    }

    /// Like [`Carp::new`], with the hash version of choice.
    ///
    /// # Panics
    /// On a duplicate id or on a weight that is not finite and positive.
    pub fn with_hash(nodes: Vec<(String, f32)>, config_id: u32, hash_version: HashVersion) -> Self {
        Self::try_with_hash(nodes, config_id, hash_version)
            .unwrap_or_else(|error| panic!("{error}"))
    }

    /// Like [`Carp::with_hash`], for members that come from outside.
    ///
    /// # Errors
    /// [`CarpError::DuplicateMember`] or [`CarpError::BadWeight`].
    pub fn try_with_hash(
        nodes: Vec<(String, f32)>,
        config_id: u32,
        hash_version: HashVersion,
    ) -> Result<Self, CarpError> {
        let members = nodes.into_iter().map(|(id, weight)| Member { id, weight }).collect();
        Self::from_members(members, config_id, hash_version)
    }

    fn from_members(
        mut members: Vec<Member>,
        config_id: u32,
        hash_version: HashVersion,
    ) -> Result<Self, CarpError> {
        for member in &members {
            check_weight(&member.id, member.weight)?;
        }
        members.sort_by(|a, b| a.id.cmp(&b.id));
        if let Some(pair) = members.windows(2).find(|pair| pair[0].id == pair[1].id) {
            let id = pair[0].id.clone();
            return Err(CarpError::DuplicateMember { id });
        }
        Ok(Self {
            config_id,
            hash_version,
            list_ttl_s: DEFAULT_LIST_TTL_S,
            scorer: scorer_of(hash_version, &members),
            members,
        })
    }

    /// The id of the member that owns `key`.
    ///
    /// # Panics
    /// On a ring without members. [`Carp::owner`] does not.
    pub fn get(&self, key: &str) -> &str {
        self.owner(key.as_bytes())
            .expect("a ring without members owns no key; ask is_empty() first, or use owner()")
    }

    /// The id of the member that owns `key`, or `None` on a ring without members. Allocates
    /// nothing.
    pub fn owner(&self, key: &[u8]) -> Option<&str> {
        self.owner_index(key).map(|i| self.members[i].id.as_str())
    }

    /// Where the owner of `key` stands in [`Carp::members`], for callers that keep a list of
    /// their own beside it. Any change of the ring's members may change every index.
    pub fn owner_index(&self, key: &[u8]) -> Option<usize> {
        self.scorer.winner(key)
    }

    /// Adds a member. The config id stays; see [`Carp::set_config_id`].
    ///
    /// # Panics
    /// If the id is there already, or on a weight that is not finite and positive.
    pub fn add_node(&mut self, id: String, weight: f32) {
        self.try_add_node(id, weight).unwrap_or_else(|error| panic!("{error}"));
    }

    /// Like [`Carp::add_node`], for a member that comes from outside. An error leaves the table
    /// as it was.
    ///
    /// # Errors
    /// [`CarpError::DuplicateMember`] or [`CarpError::BadWeight`].
    pub fn try_add_node(&mut self, id: String, weight: f32) -> Result<(), CarpError> {
        check_weight(&id, weight)?;
        match self.position(&id) {
            Ok(_) => Err(CarpError::DuplicateMember { id }),
            Err(place) => {
                self.members.insert(place, Member { id, weight });
                self.scorer = scorer_of(self.hash_version, &self.members);
                Ok(())
            }
        }
    }

    /// Removes a member and returns whether it was there. The config id stays; see
    /// [`Carp::set_config_id`].
    pub fn remove_node(&mut self, id: &str) -> bool {
        let Ok(place) = self.position(id) else {
            return false;
        };
        self.members.remove(place);
        self.scorer = scorer_of(self.hash_version, &self.members);
        true
    }

    fn position(&self, id: &str) -> Result<usize, usize> {
        self.members.binary_search_by(|member| member.id.as_str().cmp(id))
    }

    /// How many members the ring has.
    pub fn len(&self) -> usize {
        self.members.len()
    }

    /// Whether the ring has no members, and so owns nothing.
    pub fn is_empty(&self) -> bool {
        self.members.is_empty()
    }

    /// All members with their weights as given, sorted by id.
    pub fn members(&self) -> impl ExactSizeIterator<Item = (&str, f32)> {
        self.members.iter().map(|member| (member.id.as_str(), member.weight))
    }

    /// Which state of the table this is, as its maker numbered it.
    pub fn config_id(&self) -> u32 {
        self.config_id
    }

    /// Numbers this state of the table. Adding and removing members leave the number alone: one
    /// decision may add three members, and only who decides knows the next number.
    pub fn set_config_id(&mut self, config_id: u32) {
        self.config_id = config_id;
    }

    /// How this ring hashes and scores. Fixed for its life, as another version would move keys.
    pub fn hash_version(&self) -> HashVersion {
        self.hash_version
    }

    /// For how many seconds a client may use its copy of the table before it fetches it anew.
    pub fn list_ttl(&self) -> u32 {
        self.list_ttl_s
    }

    /// Sets [`Carp::list_ttl`], in seconds.
    pub fn set_list_ttl(&mut self, seconds: u32) {
        self.list_ttl_s = seconds;
    }

    /// The same table with another [`Carp::list_ttl`], in seconds.
    #[must_use]
    pub fn with_list_ttl(mut self, seconds: u32) -> Self {
        self.set_list_ttl(seconds);
        self
    }
}

fn check_weight(id: &str, weight: f32) -> Result<(), CarpError> {
    if weight.is_finite() && weight > 0.0 {
        return Ok(());
    }
    let id = id.to_owned();
    Err(CarpError::BadWeight { id, weight })
}

fn scorer_of(hash_version: HashVersion, members: &[Member]) -> Scorer {
    let pairs: Vec<(&str, f32)> =
        members.iter().map(|member| (member.id.as_str(), member.weight)).collect();
    Scorer::new(hash_version, &pairs)
}

/// Without the scorer, which follows from the rest and would fill the screen.
impl fmt::Debug for Carp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Carp")
            .field("config_id", &self.config_id)
            .field("hash_version", &self.hash_version)
            .field("list_ttl_s", &self.list_ttl_s)
            .field("members", &self.members)
            .finish_non_exhaustive()
    }
}

/// The JSON form. A weight is written with the fewest digits that name its `f32`.
#[derive(Serialize, Deserialize)]
struct Table {
    version: u32,
    hash_version: HashVersion,
    config_id: u32,
    list_ttl: u32,
    nodes: Vec<Member>,
}

impl From<Carp> for Table {
    fn from(carp: Carp) -> Self {
        Self {
            version: TABLE_VERSION,
            hash_version: carp.hash_version,
            config_id: carp.config_id,
            list_ttl: carp.list_ttl_s,
            nodes: carp.members,
        }
    }
}

impl TryFrom<Table> for Carp {
    type Error = CarpError;

    fn try_from(table: Table) -> Result<Self, CarpError> {
        if table.version != TABLE_VERSION {
            let version = table.version;
            return Err(CarpError::UnknownTableVersion { version });
        }
        Self::from_members(table.nodes, table.config_id, table.hash_version)
            .map(|carp| carp.with_list_ttl(table.list_ttl))
    }
}
