//! The real agent binary against a host that this test plays: real signatures, real journal, real children, kill points.
//!
//! Only the carrier is another: Unix sockets in a directory stand for AF_VSOCK, which this machine may not have.

mod before;
mod blob;
mod by_digest;
mod clock;
mod clones;
mod commands;
mod delivery;
mod disk;
mod documents;
mod enrol;
mod exec;
mod host;
mod install;
mod own;
mod policy;
mod reload;
mod sealed;
mod ticket;
mod trust;
mod upgrade;
