//! Target `ring_function`: a PCI function that a guest controls, with accesses of any width and address, a host that sends
//! doorbells, a VM that is paused, and saved states of any origin. What the VMM was told step by step must equal what a second
//! reader computes from the function's saved state, and nothing of the function is outside the windows.
//!
//! Input: operations.

use adit_ring_pci::{Changes, Function, Message, STATE_BYTES, VECTORS, Windows, Wiring};

use crate::input::Input;

const REGION: u64 = 1 << 16;
const LOW: u64 = 0xe010_0000;
const HIGH: u64 = 0x1_4000_0000;
const WINDOWS: Windows = [LOW..LOW + 0x4000, HIGH..HIGH + 2 * REGION];
/// What a kernel writes to configuration space: offsets and values.
const KERNELS: [(u64, u32); 11] = [
    (0x10, LOW as u32),
    (0x14, LOW as u32 + 0x1000),
    (0x18, HIGH as u32),
    (0x1c, (HIGH >> 32) as u32),
    (4, 0x2),
    (4, 0x6),
    (4, 0x406),
    (0x40, 0x8000_0000),
    // Behind the end of a window; before its start.
    (0x10, LOW as u32 + 0x4000),
    (0x18, (HIGH + 2 * REGION) as u32),
    (0x1c, 0),
];
const BASES: [u64; 6] = [LOW, LOW + 0x1000, LOW + 0x1800, HIGH, 0, u64::MAX - 0xffff];

/// What a VMM knows from the changes that it was told.
#[derive(Default)]
struct VmmView {
    wiring: Wiring,
    line: bool,
}

impl VmmView {
    fn of(&mut self, function: &Function, changes: Changes) {
        if changes.rewired {
            assert_ne!(self.wiring, *function.wiring(), "nothing has changed");
            self.wiring = *function.wiring();
        }
        self.line = changes.line.unwrap_or(self.line);
        let sendable = |n: usize| !changes.send[n] || self.wiring.messages[n].is_some();
        assert!((0..VECTORS).all(sendable), "a message that there is not");
    }

    /// Compares that with the saved state, which is decoded independently here.
    fn check(&self, function: &Function) {
        let state = function.save();
        let word = |at: usize| u32::from_le_bytes([0, 1, 2, 3].map(|n| state[at + n]));
        let (command, control) = (word(12) & 0xffff, word(12) >> 16);
        let (mask, status) = (word(40), word(44));
        let at = |n: usize| u64::from(word(24 + 4 * n) & !0xf);
        let places = [at(0), at(1), at(2) | u64::from(word(36)) << 32];
        let sizes = [4096, 4096, REGION];
        for (n, (place, size)) in places.into_iter().zip(sizes).enumerate() {
            let inside = |w: &std::ops::Range<u64>| w.contains(&place) && size <= w.end - place;
            let there = command & 2 != 0 && WINDOWS.iter().any(inside);
            assert_eq!(self.wiring.bars[n], there.then_some(place), "BAR {n}");
            assert!(place.is_multiple_of(size), "BAR {n}");
        }
        let msix = control & 0x8000 != 0;
        let on = msix && control & 0x4000 == 0 && command & 4 != 0;
        for (n, message) in self.wiring.messages.iter().enumerate() {
            let entry = 56 + 16 * n;
            let wanted = (on && word(entry + 12) & 1 == 0).then(|| Message {
                address: u64::from(word(entry)) | u64::from(word(entry + 4)) << 32,
                data: word(entry + 8),
            });
            assert_eq!(*message, wanted, "vector {n}");
            assert!(message.is_none() || state[50] >> n & 1 == 0, "kept back");
        }
        let pending = !msix && status & mask & 3 != 0;
        let line = pending && mask >> 31 == 0 && command & 0x400 == 0;
        assert_eq!(self.line, line, "the line");
        let mut said = [0; 4];
        function.config_read(4, &mut said);
        let said = u32::from_le_bytes(said);
        assert_eq!((said & 0xffff, said >> 19 & 1), (command, pending.into()));
    }
}

pub fn run(data: &[u8]) {
    let mut input = Input(data);
    let mut function = Function::new(REGION, WINDOWS);
    let mut told = VmmView::default();
    while !input.is_empty() {
        let mut there = [0; 32];
        let changes = match input.below(8) {
            0 => {
                let (at, len) = (u64::from(input.u16()) % 0x110, input.below(20));
                Some(function.config_write(at, input.bytes(len)))
            }
            1 => {
                let (at, word) = input.pick(&KERNELS);
                Some(function.config_write(at, &word.to_le_bytes()))
            }
            2 => {
                let address = input.pick(&BASES).wrapping_add(input.u16().into());
                function.read(address, &mut there[..input.below(33)])
            }
            3 => {
                let address = input
                    .pick(&BASES)
                    .wrapping_add(u64::from(input.u16()) % 0x1010);
                let len = input.pick(&[4, 4, 4, 1, 2, 8, 0, 17]);
                function.write(address, input.bytes(len))
            }
            4 => Some(function.interrupt(input.below(VECTORS))),
            5 => {
                let state = function.save();
                let changes = function.restore(&state).expect("its own state");
                assert_eq!(function.save(), state);
                Some(changes)
            }
            6 => {
                let before = function.save();
                let mut state = before;
                for _ in 0..=input.below(4) {
                    state[input.below(STATE_BYTES)] ^= input.u8();
                }
                let restored = function.restore(&state[..STATE_BYTES - input.below(2)]);
                assert!(
                    restored.is_ok() || function.save() == before,
                    "half restored"
                );
                restored.ok()
            }
            _ => {
                function.config_read(input.u64(), &mut there[..input.below(33)]);
                None
            }
        };
        if let Some(changes) = changes {
            told.of(&function, changes);
        }
        told.check(&function);
    }
}
