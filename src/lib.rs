//! A sharded, linearizable key-value store: CARP over independent Raft clusters.
//!
//! Start a node with [`node::Node`], several clusters of them with
//! [`cluster_manager::ClusterManager`]; talk to one cluster with [`raft_node::RaftNode`] and to all of
//! them with [`kvclient::KVClient`]. `docs/ARCHITECTURE.md` has the map.
#![deny(missing_docs, unsafe_code)]
#![warn(clippy::unwrap_used)]
#![cfg_attr(test, allow(clippy::unwrap_used))]
// The essays at the top of modules lead to their private parts, for those who read them with the source.
#![allow(rustdoc::private_intra_doc_links)]

mod alarm;
pub mod app;
mod backoff;
pub mod batch;
pub mod caretaker;
pub mod carp;
pub mod client_error;
pub mod cluster_manager;
pub mod codec;
pub mod config;
mod core_end;
pub mod handoff;
pub mod http_client;
pub mod key_path;
pub mod kvclient;
mod log_clock;
pub mod logging;
pub mod metrics;
pub mod mover;
pub mod network;
pub mod node;
pub mod once;
pub mod proposer;
pub mod raft_node;
pub mod read_gate;
pub mod reshard;
pub mod ring;
pub mod store;
pub mod telemetry;
pub mod types;
pub mod writes;
