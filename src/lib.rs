//! A sharded, linearizable key-value store: CARP over independent Raft clusters.
#![deny(missing_docs, unsafe_code)]
#![warn(clippy::unwrap_used)]
#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod carp;
pub mod codec;
pub mod config;
pub mod http_client;
pub mod network;
pub mod ring;
pub mod types;
