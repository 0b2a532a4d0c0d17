//! `adit-guest`: the agent inside a VM image.
//!
//! ```text
//!   host ══ AF_VSOCK 741 ══▶ serve ── policy ──▶ relay ══ TCP ══▶ 127.0.0.1:PORT
//!   host ◀══ AF_VSOCK 741 ══ client ── runner ──▶ verify ▸ journal ▸ exec::{script, file} ▸ journal
//! ```
//! Three threads when idle, each blocked in one system call: the listener in `accept`, the client in `read`, the reaper of
//! tasks' orphans in `read` of a signal. Each stream has a thread of its own while it lives, and so has the task that runs.
//! There is no runtime, and no timer but that of a task whose goal is not yet valid.
//!
//! What it never does: run anything that no trust anchor of the image has signed or that its policy forbids, pass an argument through a shell,
//! follow a symbolic link when it writes a file, start a task id twice.

mod backoff;
pub mod client;
pub mod clock;
pub mod config;
pub mod conn;
pub mod copy;
pub mod crash;
pub mod documents;
pub mod enrol;
mod entropy;
pub mod exec;
pub mod facts;
pub mod fork_server;
mod frames;
pub mod freeze;
pub mod given;
pub mod install;
pub mod journal;
mod journald;
pub mod live;
pub mod log;
mod owned;
pub mod policy;
pub mod protect;
pub mod relay;
pub mod ring;
pub mod run;
pub mod runner;
pub mod running;
pub mod self_test;
pub mod serve;
pub mod session;
pub mod show;
mod sys;
pub mod tickets;
pub mod transport;
pub mod trust;
pub mod upgrade;
pub mod verify;
