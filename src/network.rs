//! What crosses the network: HTTP for clients, Toy-RPC for peers.
//!
//! `listener` opens the sockets. For clients, `http_server` accepts and `connection` serves, `call` and
//! `body` decode what a request asks for, `api` and `management` have the routes, `forward` passes on what
//! another node must answer, `witness` asks other clusters whether a step is true, and `error` is the one
//! place that knows how a failure looks in HTTP. For peers, `raft` accepts, `raft_network_impl` calls,
//! `handoff_links` calls other clusters, and `peer` is the protocol between the two. Nothing here touches
//! the disk or decides what a request may do: that is [`crate::app`]'s and the state machine's.

pub mod api;
mod batch;
pub mod body;
pub mod call;
pub mod connection;
pub mod error;
pub mod forward;
pub mod handoff_links;
mod head;
pub mod http_server;
pub mod json;
pub mod listener;
pub mod management;
pub mod peer;
pub mod raft;
pub mod raft_network_impl;
mod witness;
