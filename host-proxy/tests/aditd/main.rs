//! The whole aditd, with the test at the other end of its control sockets.
#![allow(missing_docs)]

mod cut;
mod handover;
mod host;
mod kept;
mod limits;
mod proxy;
mod tasks;
