//! The 44-byte virtio-vsock packet header (virtio 1.3 §5.10.6), and how a carrier converts it.
//!
//! | off | size | field | off | size | field |
//! |---|---|---|---|---|---|
//! | 0 | 8 | src_cid | 28 | 2 | type |
//! | 8 | 8 | dst_cid | 30 | 2 | op |
//! | 16 | 4 | src_port | 32 | 4 | flags |
//! | 20 | 4 | dst_port | 36 | 4 | buf_alloc |
//! | 24 | 4 | len | 40 | 4 | fwd_cnt |
//!
//! All fields are little-endian. CIDs are only used here: the device through which a packet arrives tells whose it is.
//! The device drops (and counts) a packet that names another sender or receiver. The engine sees only ports.

use adit_engine::PacketHeader;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Size of the header in bytes.
pub const HEADER_BYTES: usize = 44;
/// CID of the host (virtio 1.3 §5.10.4).
pub const HOST_CID: u64 = 2;
/// Largest payload of one packet in bytes (Linux calls it VIRTIO_VSOCK_MAX_PKT_BUF_SIZE).
pub const PAYLOAD_MAX: u32 = 64 * 1024;

/// A valid guest CID: 3 ..= 2^32 - 2 (virtio 1.3 §5.10.4; the upper 32 bits are reserved and zero).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct GuestCid(u32);

impl GuestCid {
    /// Checks that `cid` is a valid guest CID.
    pub fn new(cid: u64) -> Option<Self> {
        let cid = u32::try_from(cid).ok()?;
        (3..u32::MAX).contains(&cid).then_some(Self(cid))
    }

    /// Returns the number.
    pub fn get(self) -> u64 {
        u64::from(self.0)
    }

    /// Reads the configuration space of this guest's device (guest_cid, 8 bytes; virtio 1.3 §5.10.4). Bytes after it
    /// read as zero. A bus may answer this itself: the CID never changes.
    pub fn read_config(self, offset: u64, dst: &mut [u8]) {
        let config = self.get().to_le_bytes();
        dst.fill(0);
        let Some(src) = usize::try_from(offset).ok().and_then(|o| config.get(o..)) else {
            return;
        };
        let n = src.len().min(dst.len());
        dst[..n].copy_from_slice(&src[..n]);
    }
}

/// The header in the layout of guest memory.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct WireHeader {
    src_cid: U64,
    dst_cid: U64,
    src_port: U32,
    dst_port: U32,
    len: U32,
    kind: U16,
    op: U16,
    flags: U32,
    buf_alloc: U32,
    fwd_cnt: U32,
}

const _: () = assert!(size_of::<WireHeader>() == HEADER_BYTES);

impl WireHeader {
    /// Returns the header in `bytes`, which must be a private copy.
    pub fn from_bytes(bytes: &[u8; HEADER_BYTES]) -> Self {
        zerocopy::transmute!(*bytes)
    }

    /// Returns the bytes to write into guest memory.
    pub fn to_bytes(self) -> [u8; HEADER_BYTES] {
        zerocopy::transmute!(self)
    }

    /// Adds CIDs to a header, for the host's carrier or for the guest side of a test.
    pub fn new(src_cid: u64, dst_cid: u64, h: &PacketHeader) -> Self {
        Self {
            src_cid: src_cid.into(),
            dst_cid: dst_cid.into(),
            src_port: h.src_port.into(),
            dst_port: h.dst_port.into(),
            len: h.len.into(),
            kind: h.kind.into(),
            op: h.op.into(),
            flags: h.flags.into(),
            buf_alloc: h.buf_alloc.into(),
            fwd_cnt: h.fwd_cnt.into(),
        }
    }

    /// CID that the sender wrote as its own. This is only a claim, and never identifies the sender.
    pub fn src_cid(&self) -> u64 {
        self.src_cid.get()
    }

    /// CID that the sender wrote as the receiver's.
    pub fn dst_cid(&self) -> u64 {
        self.dst_cid.get()
    }

    /// Returns the header without the CIDs.
    pub fn header(&self) -> PacketHeader {
        PacketHeader {
            src_port: self.src_port.get(),
            dst_port: self.dst_port.get(),
            len: self.len.get(),
            kind: self.kind.get(),
            op: self.op.get(),
            flags: self.flags.get(),
            buf_alloc: self.buf_alloc.get(),
            fwd_cnt: self.fwd_cnt.get(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOLDEN: [u8; HEADER_BYTES] = [
        0x03, 0, 0, 0, 0, 0, 0, 0, // src_cid 3
        0x02, 0, 0, 0, 0, 0, 0, 0, // dst_cid 2
        0x44, 0x33, 0x22, 0x11, // src_port 0x11223344
        0xe5, 0x02, 0, 0, // dst_port 741
        0x00, 0x10, 0, 0, // len 4096
        0x01, 0, // type stream
        0x05, 0, // op RW
        0x03, 0, 0, 0, // flags
        0x00, 0x00, 0x04, 0x00, // buf_alloc 256 KiB
        0xff, 0xff, 0xff, 0xff, // fwd_cnt
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
        let wire = WireHeader::new(3, 2, &h);
        assert_eq!(wire.to_bytes(), GOLDEN);
        let back = WireHeader::from_bytes(&GOLDEN);
        assert_eq!((back.src_cid(), back.dst_cid(), back.header()), (3, 2, h));
    }

    #[test]
    fn reserved_cids_are_not_guest_cids() {
        for cid in [0, 1, 2, 0xffff_ffff, 1 << 32, u64::MAX] {
            assert_eq!(GuestCid::new(cid), None, "{cid:#x}");
        }
        assert_eq!(GuestCid::new(3).map(GuestCid::get), Some(3));
    }
}
