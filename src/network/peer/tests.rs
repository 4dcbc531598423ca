//! The peer network over real sockets, with a fake in place of Raft.

mod calls;
mod handoff;
mod hostile;
mod lane;
mod pipeline;
mod snapshot;
mod support;
mod thrift;
