//! Tests of the ring carrier. Both ends are `Port`s, in threads, or in processes that are killed.

mod hostile;
mod sessions;
mod streams;
mod world;
