//! Tests of the whole aditd. The test is at the other end of its control sockets.
#![allow(missing_docs)]

mod access;
mod adding;
mod answers;
mod asked;
mod before;
mod blobs;
mod by_digest;
mod bytes;
mod cards;
mod changes;
mod commands;
mod cut;
mod desk;
mod discovered;
mod dns;
mod dns_servers;
mod faults;
mod foreign;
mod front;
mod full_disk;
#[path = "../../port/tests/fuse/mod.rs"]
mod fuse;
mod h2client;
mod h2raw;
mod handover;
mod host;
mod http;
mod http2;
mod http2_hostile;
mod identities;
mod kept;
#[path = "../../port/tests/kinds/mod.rs"]
mod kinds;
mod limits;
mod locks;
mod management;
mod management_hostile;
mod patience;
mod peers;
mod peers_lines;
mod pool;
mod processes;
mod proxy;
mod reach;
mod refused;
mod reload;
mod seen;
mod server;
mod smuggle;
mod tasks;
mod tls;
mod trust;
mod tunnel;
mod upgrade;
mod work;
