//! Payloads that tell which packet they are of.

use std::sync::LazyLock;

/// Payloads are cut out of one pattern: no run of it is like another near by, and making one costs nothing under
/// instrumentation.
static PATTERN: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let byte = |i: usize| (i as u8).wrapping_mul(13) ^ (i >> 8) as u8;
    (0..BODY_MAX + 256).map(byte).collect()
});
/// More than any slot or chain holds here.
const BODY_MAX: usize = 8192;

/// The payload of a packet.
pub fn body(seed: u8, len: usize) -> &'static [u8] {
    &PATTERN[usize::from(seed)..][..len]
}
