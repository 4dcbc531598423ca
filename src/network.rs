//! What crosses the network: HTTP for clients, Toy-RPC for peers.

pub mod api;
pub mod body;
pub mod call;
pub mod connection;
pub mod error;
pub mod forward;
pub mod http_server;
pub mod management;
pub mod raft;
pub mod raft_network_impl;
