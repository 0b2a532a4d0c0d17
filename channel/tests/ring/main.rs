//! The suite of the carrier over a ring: both ends are ports of ours, in threads or in processes that are killed.

mod hostile;
mod sessions;
mod streams;
mod world;
