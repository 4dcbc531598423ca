//! The peer network over real sockets, with a fake in place of Raft.

mod calls;
mod hostile;
mod lane;
mod pipeline;
mod snapshot;
mod support;
