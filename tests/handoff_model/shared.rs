//! Values that are compared and hashed once and then passed around: what keeps the model fast without
//! an optimiser.

use std::collections::HashMap;
use std::collections::hash_map::DefaultHasher;
use std::fmt::{self, Debug};
use std::hash::{BuildHasherDefault, Hash, Hasher};
use std::ops::Deref;
use std::sync::{Arc, Mutex};

/// A value behind a pointer, with its hash beside it.
///
/// Two are equal when their 64-bit hashes are: the checker tells states apart by no more than that
/// either. The hash depends on the content alone, so that a path can be found again.
pub struct Shared<T>(Arc<(u64, T)>);

impl<T: Hash> Shared<T> {
    pub fn new(value: T) -> Self {
        Self(Arc::new((hash_of(&value), value)))
    }
}

impl<T: Hash> Shared<Vec<Shared<T>>> {
    /// A set, in the order of its members' hashes; its hash is made of theirs.
    pub fn set() -> Self {
        Self(Arc::new((0, Vec::new())))
    }

    pub fn contains(&self, one: &Shared<T>) -> bool {
        self.place(one).is_ok()
    }

    fn place(&self, one: &Shared<T>) -> Result<usize, usize> {
        self.binary_search_by_key(&one.hash_value(), Shared::hash_value)
    }

    /// The same set with these members more.
    pub fn with<'a>(&self, more: impl Iterator<Item = &'a Shared<T>>) -> Self
    where
        T: 'a,
    {
        let mut set = self.clone();
        for one in more {
            if let Err(place) = set.place(one) {
                let mut members = Vec::clone(&set);
                members.insert(place, one.clone());
                set = Self(Arc::new((set.hash_value() ^ one.hash_value(), members)));
            }
        }
        set
    }
}

impl<T: Debug> Shared<T> {
    /// For types without `Hash`: their debug text is hashed.
    pub fn by_text(value: T) -> Self {
        Self(Arc::new((hash_of(&format!("{value:?}")), value)))
    }
}

impl<T> Shared<T> {
    /// For what is used once and never compared.
    pub fn unhashed(value: T) -> Self {
        Self(Arc::new((0, value)))
    }

    pub fn hash_value(&self) -> u64 {
        self.0.0
    }
}

impl<T> Clone for Shared<T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<T> Deref for Shared<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0.1
    }
}

impl<T> PartialEq for Shared<T> {
    fn eq(&self, other: &Self) -> bool {
        self.0.0 == other.0.0
    }
}

impl<T> Eq for Shared<T> {}

impl<T> Hash for Shared<T> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u64(self.0.0);
    }
}

impl<T: Debug> Debug for Shared<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.1.fmt(f)
    }
}

/// Remembers what was worked out, under a hash of what it was worked out from.
pub struct Memo<V>(Mutex<HashMap<u64, V, BuildHasherDefault<AsIs>>>);

/// The hash of a hash.
#[derive(Default)]
pub struct AsIs(u64);

impl Hasher for AsIs {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, _: &[u8]) {
        unreachable!("keys are hashes");
    }

    fn write_u64(&mut self, hash: u64) {
        self.0 = hash;
    }
}

impl<V> Default for Memo<V> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<V: Clone> Memo<V> {
    pub fn get(&self, at: u64, make: impl FnOnce() -> V) -> V {
        if let Some(known) = self.0.lock().unwrap().get(&at) {
            return known.clone();
        }
        let made = make();
        self.0.lock().unwrap().insert(at, made.clone());
        made
    }
}

/// One hash of two, in this order.
pub fn mix(one: u64, other: u64) -> u64 {
    let mixed = (one.rotate_left(23) ^ other).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mixed ^ (mixed >> 29)
}

/// A hash that is the same in every run.
pub fn hash_of<T: Hash>(value: &T) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}
