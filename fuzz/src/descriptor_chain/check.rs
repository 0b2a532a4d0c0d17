//! Checks memory after a burst: used elements, writes, and their marks in the dirty bitmap.

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion, bitmap::Bitmap};

use super::model::Image;
use super::{Case, RINGS, USED, USED_RINGS};

impl Case<'_> {
    pub(super) fn check_used(&self, after: &Image, used: &[(u16, u32)]) {
        let idx = after.get(USED + 2, 2).expect("memory");
        let idx = u16::from_le_bytes([idx[0], idx[1]]);
        assert_eq!(idx.wrapping_sub(self.base), used.len() as u16, "used index");
        for (i, &(head, len)) in used.iter().enumerate() {
            let slot = self.base.wrapping_add(i as u16) % self.size;
            let e = after
                .get(USED + 4 + 8 * u64::from(slot), 8)
                .expect("memory");
            let (id, n) = e.split_at(4);
            assert_eq!(id, u32::from(head).to_le_bytes(), "used element {i}");
            assert_eq!(n, len.to_le_bytes(), "used element {i}");
        }
    }

    /// Checks that exactly the expected bytes changed, and that all of them are marked.
    pub(super) fn check_writes(&self, before: &Image, after: &Image, touched: &[Touched]) {
        let mut expected = before.clone();
        for t in touched {
            t.apply(&mut expected);
        }
        let written: Vec<_> = touched
            .iter()
            .flat_map(|t| &t.buffers)
            .chain(&USED_RINGS)
            .collect();
        let allowed = |at: u64| {
            written
                .iter()
                .any(|&&(start, len)| at >= start && at - start < len)
        };
        // Compare whole lines first, since most did not change.
        for line in (0..0x9000usize).step_by(256) {
            let range = line..line + 256;
            if before.0[range.clone()] == after.0[range.clone()] {
                continue;
            }
            for at in range.filter(|&at| before.0[at] != after.0[at]) {
                assert!(allowed(at as u64), "{at:#x} was written");
                assert!(self.dirty(at as u64), "{at:#x} is not marked dirty");
            }
        }
        // Skip bytes that two buffers share (the later write wins), and rings (the device writes them).
        let mut buffers: Vec<_> = touched.iter().flat_map(|t| &t.buffers).copied().collect();
        buffers.sort_unstable();
        let shared = buffers.windows(2).any(|w| w[0].0 + w[0].1 > w[1].0);
        if !shared && !overlap(&buffers, &RINGS) {
            for &(at, len) in &buffers {
                let range = at as usize..(at + len) as usize;
                assert!(
                    after.0[range.clone()] == expected.0[range],
                    "{at:#x}+{len:#x}"
                );
            }
        }
    }

    fn dirty(&self, addr: u64) -> bool {
        let region = self
            .fixture
            .mem
            .find_region(GuestAddress(addr))
            .expect("memory");
        let offset = addr - region.start_addr().0;
        region.bitmap().dirty_at(offset as usize)
    }
}

/// The host's writes to a chain.
pub(super) struct Touched {
    pub(super) buffers: Vec<(u64, u64)>,
    pub(super) bytes: Vec<u8>,
}

impl Touched {
    fn apply(&self, image: &mut Image) {
        let mut bytes = self.bytes.iter();
        for &(at, len) in &self.buffers {
            let place = &mut image.0[at as usize..(at + len) as usize];
            place
                .iter_mut()
                .zip(&mut bytes)
                .for_each(|(to, from)| *to = *from);
        }
    }
}

/// Tells whether a range in one list overlaps a range in the other.
pub(super) fn overlap(a: &[(u64, u64)], b: &[(u64, u64)]) -> bool {
    // Only a range in a hole can end behind the last address, so saturating is correct.
    let apart = |x: &(u64, u64), y: &(u64, u64)| x.0.saturating_add(x.1) <= y.0;
    a.iter()
        .any(|x| b.iter().any(|y| !apart(x, y) && !apart(y, x)))
}
