//! What crosses the network: HTTP for clients, Toy-RPC for peers.

pub mod api;
pub mod body;
pub mod call;
pub mod connection;
pub mod error;
pub mod forward;
pub mod http_server;
pub mod json;
pub mod management;
pub mod peer;
pub mod raft;
pub mod raft_network_impl;
