//! What crosses the network: HTTP for clients, Toy-RPC for peers.

pub mod error;
