//! Hostile and unlucky guests over a real vhost-user socket: frontend, frontend's thread, shard, `Port`, client's
//! socket.

mod closes;
#[path = "../common/mod.rs"]
mod common;
mod sessions;
mod streams;
#[path = "../common/vm.rs"]
mod vm;
mod world;
