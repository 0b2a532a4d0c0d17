//! What the benches share. The software guest that they drive is `adit_testkit`.
//!
//! - [`duel`]: two processes that send messages to each other, for the ring bench.
//! - [`report`]: prints figures; [`realtime`]: runs benches undisturbed by other work.

pub mod duel;
pub mod realtime;
pub mod report;
