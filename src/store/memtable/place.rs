//! Where a row is, in eight bytes.
//!
//! A table of these is what a processor's cache holds of many rows. Half of a key's hash stands beside the
//! place: enough to tell most keys apart, and to find it a new slot without looking at the row.

/// Rows are counted in these, so that 32 bits say where one is, among 32 GiB.
pub(super) const UNIT_BYTES: usize = 8;

/// A place in pieces of memory of so many units each.
#[derive(Clone, Copy)]
pub(super) struct Place<const UNITS: usize> {
    pub(super) hash: u32,
    pub(super) unit: u32,
}

impl<const UNITS: usize> Place<UNITS> {
    pub(super) fn piece(self) -> usize {
        self.unit as usize / UNITS
    }

    pub(super) fn offset(self) -> usize {
        self.unit as usize % UNITS * UNIT_BYTES
    }

    /// The table takes a slot by the lower bits of a hash and a tag by the upper ones.
    pub(super) fn spread(hash: u32) -> u64 {
        u64::from(hash) << 32 | u64::from(hash)
    }
}

/// The half of a hash that stands in a place.
pub(super) fn half(hash: u64) -> u32 {
    (hash >> 32) as u32
}
