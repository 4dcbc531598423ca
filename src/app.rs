//! The use cases of one node: put, get, delete, ring, membership, health.
//!
//! [`App`] ties the Raft handle to the store's read side. It decides nothing that the log must
//! decide: conditions and ownership of a write are checked at apply, ownership of a read in the same
//! snapshot as the data. It knows nothing of HTTP: [`crate::network::api`] decodes requests, calls
//! it, and encodes what it says.
