//! The packet header as the ring carrier encodes it: 24 bytes, little-endian. Each VM has its own region on that
//! carrier.
//!
//! | off | size | field | valid values |
//! |---|---|---|---|
//! | 0 | 4 | src_port | any |
//! | 4 | 4 | dst_port | any |
//! | 8 | 4 | buf_alloc, bytes | any |
//! | 12 | 4 | fwd_cnt, bytes | see the engine |
//! | 16 | 4 | len, payload bytes | at most the bytes that follow; the rest is padding |
//! | 20 | 2 | flags | SHUTDOWN: virtio's flags; RST: the reason ([`PeerReason`](crate::PeerReason)); else 0 |
//! | 22 | 1 | type | 1 |
//! | 23 | 1 | op | virtio's numbers |
//!
//! It has no CIDs, because the region tells whose packet it is. Together with the record header of 8 bytes the payload
//! starts at offset 32, and a packet without payload uses half a cache line.

use crate::PacketHeader;

/// Size of an encoded packet header in bytes.
pub const PACKET_HEADER_BYTES: usize = 24;

impl PacketHeader {
    /// Decodes a header. The engine checks its values later.
    #[inline]
    pub fn from_ring_bytes(encoded: &[u8; PACKET_HEADER_BYTES]) -> Self {
        let [a, b, c, d, e, f] = words(encoded);
        Self {
            src_port: a,
            dst_port: b,
            buf_alloc: c,
            fwd_cnt: d,
            len: e,
            flags: f & 0xffff,
            kind: (f >> 16 & 0xff) as u16,
            op: (f >> 24) as u16,
        }
    }

    /// Encodes a header that this engine made; its values fit the smaller fields.
    #[inline]
    pub fn to_ring_bytes(&self) -> [u8; PACKET_HEADER_BYTES] {
        let last =
            self.flags & 0xffff | u32::from(self.kind & 0xff) << 16 | u32::from(self.op) << 24;
        let words = [
            self.src_port,
            self.dst_port,
            self.buf_alloc,
            self.fwd_cnt,
            self.len,
            last,
        ];
        let mut encoded = [0; PACKET_HEADER_BYTES];
        for (to, word) in encoded.chunks_exact_mut(4).zip(words) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        encoded
    }
}

fn words(encoded: &[u8; PACKET_HEADER_BYTES]) -> [u32; 6] {
    core::array::from_fn(|n| {
        let bytes = core::array::from_fn(|i| encoded[4 * n + i]);
        u32::from_le_bytes(bytes)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOLDEN: [u8; PACKET_HEADER_BYTES] = [
        0x44, 0x33, 0x22, 0x11, // src_port 0x11223344
        0xe5, 0x02, 0, 0, // dst_port 741
        0x00, 0x00, 0x04, 0x00, // buf_alloc 256 KiB
        0xff, 0xff, 0xff, 0xff, // fwd_cnt
        0x00, 0x10, 0, 0, // len 4096
        0x03, 0,    // flags
        0x01, // type stream
        0x05, // op RW
    ];

    #[test]
    fn golden_bytes_both_ways() {
        let h = PacketHeader {
            src_port: 0x1122_3344,
            dst_port: 741,
            len: 4096,
            kind: 1,
            op: 5,
            flags: 3,
            buf_alloc: 256 * 1024,
            fwd_cnt: u32::MAX,
        };
        assert_eq!(h.to_ring_bytes(), GOLDEN);
        assert_eq!(PacketHeader::from_ring_bytes(&GOLDEN), h);
    }
}
