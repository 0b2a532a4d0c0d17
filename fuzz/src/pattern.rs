//! Payloads that tell which packet they belong to.

use std::sync::LazyLock;

use adit_channel::carrier::TxSlot;
use adit_engine::PacketHeader;

use crate::shell::Shell;

/// A packet in flight: its header, and the length and seed of its payload.
pub type Sent = (PacketHeader, usize, u8);

/// Payloads are cut from one pattern. No two parts of it near each other are equal. Computing a payload each time would be slow
/// under instrumentation.
static PATTERN: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let byte = |i: usize| (i as u8).wrapping_mul(13) ^ (i >> 8) as u8;
    (0..BODY_MAX + 256).map(byte).collect()
});
/// Larger than any slot or chain in these targets.
const BODY_MAX: usize = 8192;

/// The payload of a packet.
pub fn body(seed: u8, len: usize) -> &'static [u8] {
    &PATTERN[usize::from(seed)..][..len]
}

/// Puts the next packet into a slot, as a port does. `None`: there is no packet, and the slot is returned.
pub fn fill(shell: &mut Shell, mut slot: impl TxSlot, seed: u8) -> Option<Sent> {
    let t = shell.transmit(slot.capacity())?;
    let (h, n) = match t.body {
        None => (t.header, 0),
        Some((id, len)) => {
            let n = 1 + u32::from(seed) * 97 % len;
            let bytes = body(seed, n as usize);
            assert_eq!(slot.write(bytes).expect("writable"), bytes.len());
            (shell.commit(id, n), n)
        }
    };
    slot.commit(&h);
    Some((PacketHeader { len: n, ..h }, n as usize, seed))
}
