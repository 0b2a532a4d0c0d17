use adit_ringbuf_io::ivshmem;
use proptest::prelude::*;

use super::*;
use crate::state::{STATE_BYTES, StateError};

const REGION: u64 = 1 << 22;
const LOW: u64 = 0xe010_0000;
const HIGH: u64 = 0x1_4000_0000;
const WINDOW: u64 = 1 << 20;
const SIZING: u32 = u32::MAX;

fn windows() -> Windows {
    [LOW..LOW + WINDOW, HIGH..HIGH + 4 * REGION]
}

fn function() -> Function {
    Function::new(REGION, windows())
}

fn config(function: &Function, at: u64) -> u32 {
    let mut word = [0; 4];
    function.config_read(at, &mut word);
    u32::from_le_bytes(word)
}

fn set(function: &mut Function, at: u64, value: u32) -> Changes {
    function.config_write(at, &value.to_le_bytes())
}

fn command(function: &mut Function, value: u16) -> Changes {
    function.config_write(COMMAND as u64, &value.to_le_bytes())
}

fn load(function: &mut Function, at: u64) -> u32 {
    let mut word = [0; 4];
    let _ = function.read(at, &mut word).unwrap();
    u32::from_le_bytes(word)
}

fn store(function: &mut Function, at: u64, value: u32) -> Changes {
    function.write(at, &value.to_le_bytes()).unwrap()
}

/// A function as Linux configures it: BARs have addresses, memory decoding is on.
fn placed() -> Function {
    let mut function = function();
    for (at, value) in [
        (0x10, LOW as u32),
        (0x14, LOW as u32 + 0x1000),
        (0x18, HIGH as u32),
        (0x1c, (HIGH >> 32) as u32),
    ] {
        assert_eq!(set(&mut function, at, value), Changes::default());
    }
    let changes = command(&mut function, MEMORY);
    assert!(changes.rewired && changes.line.is_none());
    function
}

/// Also with interrupts enabled in BAR 0.
fn listening() -> Function {
    let mut function = placed();
    let _ = store(&mut function, LOW, INTERRUPTS);
    function
}

/// With MSI-X on. Vector 0 has a message (address, data), and vector 1 is still masked.
fn with_msix() -> Function {
    let mut function = placed();
    let table = LOW + 0x1000;
    for (at, value) in [(0, 0xfee0_1000), (4, 0), (8, 0x41), (12, 0)] {
        let _ = store(&mut function, table + at, value);
    }
    for (at, value) in [(16, 0xfee0_2000), (24, 0x42)] {
        let _ = store(&mut function, table + at, value);
    }
    let _ = command(&mut function, MEMORY | MASTER);
    let changes = function.config_write(MSIX_CONTROL as u64, &MSIX_ENABLE.to_le_bytes());
    assert!(changes.rewired);
    function
}

#[test]
fn the_function_looks_like_ivshmem_with_a_pin_and_msix() {
    let function = function();
    assert_eq!(config(&function, 0x00), 0x1110_1af4);
    assert_eq!(config(&function, 0x08), 0x0500_0001);
    assert_eq!(config(&function, 0x2c), 0x1100_1af4);
    assert_eq!(config(&function, 0x3c), 0x0000_0100);
    // The capability list contains only MSI-X, with two vectors.
    assert_eq!(config(&function, 0x04), 0x0010_0000);
    assert_eq!(config(&function, 0x34), 0x40);
    assert_eq!(config(&function, 0x40), 0x0001_0011);
    assert_eq!(
        (config(&function, 0x44), config(&function, 0x48)),
        (1, 0x801)
    );
}

#[test]
fn writing_all_ones_reads_back_the_bar_size() {
    let mut function = function();
    for (at, reads) in [
        (0x10, 0xffff_f000),
        (0x14, 0xffff_f000),
        (0x18, !(REGION as u32 - 1) | 0xc),
        (0x1c, u32::MAX),
        (0x20, 0),
        (0x24, 0),
        (0x30, 0),
    ] {
        let _ = set(&mut function, at, SIZING);
        assert_eq!(config(&function, at), reads, "{at:#x}");
    }
    let mut large = Function::new(1 << 32, windows());
    let _ = set(&mut large, 0x18, SIZING);
    let _ = set(&mut large, 0x1c, SIZING);
    assert_eq!(
        (config(&large, 0x18), config(&large, 0x1c)),
        (0xc, u32::MAX)
    );
}

#[test]
fn bars_are_decoded_only_while_memory_is_on_and_can_move() {
    let mut function = placed();
    let at = [Some(LOW), Some(LOW + 0x1000), Some(HIGH)];
    assert_eq!(function.wiring().bars, at);
    assert!(command(&mut function, 0).rewired);
    assert_eq!(function.wiring().bars, [None; BARS]);
    assert!(function.read(LOW, &mut [0; 4]).is_none());
    let _ = set(&mut function, 0x18, (HIGH + REGION) as u32);
    assert!(command(&mut function, MEMORY).rewired);
    assert_eq!(function.wiring().bars[2], Some(HIGH + REGION));
    // Also while memory decoding is on.
    assert!(set(&mut function, 0x18, HIGH as u32).rewired);
    assert_eq!(function.wiring().bars[2], Some(HIGH));
}

/// A guest cannot take over RAM, interrupt chips or other devices by putting a BAR over them.
#[test]
fn a_bar_outside_the_windows_is_not_decoded() {
    let mut function = placed();
    for address in [0, 0x10_0000, 0xfee0_0000, LOW - 0x1000, LOW + WINDOW] {
        let _ = set(&mut function, 0x10, address as u32);
        assert_eq!(function.wiring().bars[0], None, "{address:#x}");
    }
    for address in [0, HIGH - REGION, HIGH + 4 * REGION, u64::MAX] {
        let _ = set(&mut function, 0x18, address as u32);
        let _ = set(&mut function, 0x1c, (address >> 32) as u32);
        assert_eq!(function.wiring().bars[2], None, "{address:#x}");
    }
    // A BAR that starts inside a window and ends outside.
    let mut long = Function::new(WINDOW * 2, windows());
    let _ = set(&mut long, 0x18, 0xe000_0000);
    let _ = command(&mut long, MEMORY);
    assert_eq!(long.wiring().bars[2], None);
}

/// The sequence of `uio_pci_generic` and the agent, twice.
#[test]
fn the_handler_disables_the_pin_and_the_waiting_agent_enables_it() {
    let mut function = listening();
    for _ in 0..2 {
        assert_eq!(function.interrupt(0).line, Some(true));
        // Another interrupt causes no second edge.
        assert_eq!(function.interrupt(1).line, None);
        // pci_check_and_mask_intx reads status and command at once.
        assert_eq!(config(&function, 4) >> 19 & 1, 1);
        let disabled = command(&mut function, MEMORY | INTX_DISABLE);
        assert_eq!(disabled.line, Some(false));
        // The interrupt is pending although the pin is disabled.
        assert_eq!(config(&function, 4) >> 19 & 1, 1);
        assert_eq!(function.interrupt(0).line, None);
        assert_eq!(load(&mut function, LOW + 4), 0b11);
        assert_eq!(load(&mut function, LOW + 4), 0);
        assert_eq!(config(&function, 4) >> 19 & 1, 0);
        assert_eq!(command(&mut function, MEMORY).line, None);
    }
}

#[test]
fn an_interrupt_under_a_disabled_pin_is_raised_when_it_is_enabled() {
    let mut function = listening();
    let _ = command(&mut function, MEMORY | INTX_DISABLE);
    assert_eq!(function.interrupt(0), Changes::default());
    assert_eq!(command(&mut function, MEMORY).line, Some(true));
}

/// The sequence of `uio_pci_generic` and the agent with pulses: the handler disables the pin once, and nobody enables
/// it.
#[test]
fn a_guest_with_pulses_need_not_clear_or_enable_anything() {
    let mut function = placed();
    assert_eq!(load(&mut function, LOW + 16), PULSES_OFFERED);
    // An interrupt that was pending before the mask was written is a pulse too.
    assert_eq!(function.interrupt(0), Changes::default());
    let changes = store(&mut function, LOW, u32::MAX);
    assert!(changes.pulse && changes.line.is_none());
    assert_eq!(load(&mut function, LOW), MASK_BITS);
    let _ = command(&mut function, MEMORY | INTX_DISABLE);
    for vector in [0, 1, 1, 0] {
        let pulse = Changes {
            pulse: true,
            ..Changes::default()
        };
        assert_eq!(function.interrupt(vector), pulse);
        assert_eq!(config(&function, 4) >> 19 & 1, 1);
    }
    let mut other = self::function();
    assert!(other.restore(&function.save()).unwrap().pulse);
    // Pulses come only for the unmasked vectors, and not while MSI-X is on.
    let _ = store(&mut function, LOW, PULSES | 1);
    assert!(!function.interrupt(1).pulse && function.interrupt(0).pulse);
    let _ = function.config_write(MSIX_CONTROL as u64, &MSIX_ENABLE.to_le_bytes());
    assert!(!function.interrupt(0).pulse);
}

#[test]
fn a_masked_interrupt_never_raises_the_pin() {
    let mut function = placed();
    assert_eq!(function.interrupt(0), Changes::default());
    assert_eq!(store(&mut function, LOW, 1).line, Some(true));
    assert_eq!(store(&mut function, LOW, 0).line, Some(false));
}

/// `pci_intx_mask_supported`: the driver only binds if this bit can be toggled and no other bit changes.
#[test]
fn interrupt_disable_is_the_only_bit_that_toggles() {
    let mut function = placed();
    let before = config(&function, 4);
    let _ = command(&mut function, before as u16 ^ INTX_DISABLE);
    assert_eq!(config(&function, 4), before ^ u32::from(INTX_DISABLE));
    let _ = command(&mut function, u16::MAX);
    assert_eq!(config(&function, 4) & 0xffff, 0x406);
}

#[test]
fn msix_sends_unmasked_vectors_and_keeps_masked_ones_pending() {
    let mut function = with_msix();
    let message = Message {
        address: 0xfee0_1000,
        data: 0x41,
    };
    assert_eq!(function.wiring().messages, [Some(message), None]);
    assert_eq!(function.interrupt(0).send, [true, false]);
    assert_eq!(function.interrupt(1), Changes::default());
    let pending = LOW + 0x1000 + 0x800;
    assert_eq!(load(&mut function, pending), 0b10);
    // A guest cannot write pending bits.
    let _ = store(&mut function, pending, 0);
    assert_eq!(load(&mut function, pending), 0b10);
    let unmasked = store(&mut function, LOW + 0x1000 + 28, 0);
    assert!(unmasked.rewired);
    assert_eq!(unmasked.send, [false, true]);
    assert_eq!(load(&mut function, pending), 0);
    // The pending message is sent once.
    assert_eq!(function.interrupt(0).send, [true, false]);
}

#[test]
fn msix_needs_bus_mastering_and_stops_under_the_common_mask() {
    for quiet in [
        |f: &mut Function| command(f, MEMORY),
        |f: &mut Function| {
            let control = MSIX_ENABLE | MSIX_MASK_ALL;
            f.config_write(MSIX_CONTROL as u64, &control.to_le_bytes())
        },
    ] {
        let mut function = with_msix();
        assert!(quiet(&mut function).rewired);
        assert_eq!(function.interrupt(0).send, [false; 2]);
        let _ = command(&mut function, MEMORY | MASTER);
        let again = function.config_write(MSIX_CONTROL as u64, &MSIX_ENABLE.to_le_bytes());
        let sent = again.send[0] || function.msix.pending == 0;
        assert!(sent, "an interrupt under the common mask was lost");
    }
}

#[test]
fn msix_disables_the_pin() {
    let mut function = with_msix();
    let _ = store(&mut function, LOW, u32::MAX);
    assert_eq!(function.interrupt(0).line, None);
    assert_eq!(config(&function, 4) >> 19 & 1, 0);
}

#[test]
fn only_the_two_host_doorbells_have_an_effect() {
    let mut function = placed();
    let [data, space] = [ivshmem::VECTOR_DATA, ivshmem::VECTOR_SPACE].map(u32::from);
    assert_eq!(
        store(&mut function, LOW + DOORBELL, data).rung,
        [true, false]
    );
    assert_eq!(
        store(&mut function, LOW + DOORBELL, space).rung,
        [false, true]
    );
    for value in [2, 0xffff, 1 << 16, u32::from(GUEST_PEER) << 16, u32::MAX] {
        assert_eq!(
            store(&mut function, LOW + DOORBELL, value),
            Changes::default()
        );
    }
    for data in [&[0; 1][..], &[0; 2], &[0; 8], &[]] {
        let nothing = Some(Changes::default());
        assert_eq!(function.write(LOW + DOORBELL, data), nothing);
    }
    assert_eq!(load(&mut function, LOW + 8), u32::from(GUEST_PEER));
}

/// R20: accesses of every width, at every offset of everything, and across every boundary.
#[test]
fn any_access_of_any_width_is_answered() {
    let mut function = with_msix();
    let edges = [
        0, 1, 2, 3, 4, 7, 8, 12, 15, 16, 31, 32, 0x7ff, 0x800, 0xffd, 0xfff,
    ];
    let at = |base: u64| edges.map(|edge| base.wrapping_add(edge));
    let mut data = [0xa5; 64];
    for len in (0..=16).chain([33, 64]) {
        for offset in (0..300).chain(at(0x1000)).chain(at(u64::MAX - 0xfff)) {
            function.config_read(offset, &mut data[..len]);
        }
        for address in [
            0,
            LOW,
            LOW + 0x1000,
            HIGH,
            HIGH + REGION - 0x1000,
            u64::MAX - 0xfff,
        ]
        .into_iter()
        .flat_map(at)
        {
            let _ = function.read(address, &mut data[..len]);
        }
    }
    // Bytes after the end of a BAR read as zero, and do not come from the next BAR.
    data.fill(0xa5);
    let _ = function.read(LOW + 0xffe, &mut data[..8]).unwrap();
    assert_eq!(data[..8], [0; 8]);
    let before = function.msix.clone();
    let _ = function.write(LOW + 0xffe, &[0x5a; 8]).unwrap();
    assert_eq!(function.msix, before);
}

#[test]
fn a_restored_function_equals_the_saved_one() {
    let mut held = listening();
    let _ = held.interrupt(1);
    let saved = held.save();
    let mut other = function();
    let changes = other.restore(&saved).unwrap();
    assert!(changes.rewired);
    assert_eq!(changes.line, Some(true));
    assert_eq!((other.wiring(), other.save()), (held.wiring(), saved));
    // Restores over a function that is in use.
    let mut used = with_msix();
    let changes = used.restore(&saved).unwrap();
    assert!(changes.rewired);
    assert_eq!((used.wiring(), used.save()), (held.wiring(), saved));
    let mut raised = held.clone();
    assert_eq!(
        raised.restore(&function().save()).unwrap().line,
        Some(false)
    );
}

#[test]
fn golden_state() {
    let mut golden = Vec::from(*b"ADITPCIF");
    golden.extend([1, 0, 0, 0, 2, 0, 1, 0]);
    golden.extend(REGION.to_le_bytes());
    golden.extend((LOW as u32).to_le_bytes());
    golden.extend((LOW as u32 + 0x1000).to_le_bytes());
    golden.extend((HIGH | 0xc).to_le_bytes());
    golden.extend([3, 0, 0, 0, 2, 0, 0, 0]);
    golden.extend([0; 8]);
    for _ in 0..2 {
        golden.extend([0; 12]);
        golden.extend([1, 0, 0, 0]);
    }
    let mut function = listening();
    let _ = function.interrupt(1);
    assert_eq!(function.save()[..], golden);
}

/// R35: the state may come from any file.
#[test]
fn a_state_that_no_guest_could_write_is_refused() {
    let mut held = with_msix();
    let _ = held.interrupt(1);
    let good = held.save();
    let mut other = function();
    let refused = |other: &mut Function, state: &[u8]| other.restore(state).unwrap_err();
    assert_eq!(
        refused(&mut other, &good[1..]),
        StateError::Length {
            len: STATE_BYTES - 1
        }
    );
    let mut wrong = good;
    wrong[8] = 2;
    assert_eq!(
        refused(&mut other, &wrong),
        StateError::Foreign { version: 2 }
    );
    wrong = good;
    wrong[18] ^= 0xc0;
    assert!(matches!(
        refused(&mut other, &wrong),
        StateError::Size { .. }
    ));
    // Bits that a guest cannot set: in command, control, the flags of a BAR, the masks, the padding, the control of an
    // entry.
    for (byte, bit) in [
        (12, 0),
        (14, 1),
        (24, 3),
        (32, 1),
        (40, 2),
        (45, 0),
        (50, 2),
        (51, 0),
        (69, 0),
    ] {
        wrong = good;
        wrong[byte] ^= 1 << bit;
        assert_eq!(
            refused(&mut other, &wrong),
            StateError::Register,
            "{byte} {bit}"
        );
    }
    assert_eq!(
        other.save(),
        function().save(),
        "a refused state changed something"
    );
    // A guest can write an address over RAM into a BAR; such a BAR is not decoded.
    wrong = good;
    wrong[24..28].copy_from_slice(&[0, 0x10, 0, 0]);
    let _ = other.restore(&wrong).unwrap();
    assert_eq!(other.wiring().bars[0], None);
}

#[derive(Clone, Debug)]
enum Op {
    ConfigRead(u64, usize),
    ConfigWrite(u64, Vec<u8>),
    Read(u64, usize),
    Write(u64, Vec<u8>),
    Interrupt(usize),
    Hold,
}

fn ops() -> impl Strategy<Value = Op> {
    let config = prop_oneof![0u64..0x60, any::<u64>()];
    let address = prop_oneof![
        LOW - 4..LOW + 0x2004,
        HIGH - 4..HIGH + REGION + 4,
        any::<u64>()
    ];
    let sure = [
        (0x10, LOW as u32),
        (0x14, LOW as u32 + 0x1000),
        (0x18, HIGH as u32),
        (0x1c, (HIGH >> 32) as u32),
        (4, 0x406),
        (4, 6),
        (0x40, 0x8000_0000),
    ];
    let bytes = || proptest::collection::vec(any::<u8>(), 0..20);
    prop_oneof![
        (config.clone(), 0..20usize).prop_map(|(at, len)| Op::ConfigRead(at, len)),
        (config, bytes()).prop_map(|(at, data)| Op::ConfigWrite(at, data)),
        proptest::sample::select(sure.to_vec())
            .prop_map(|(at, word)| Op::ConfigWrite(at, word.to_le_bytes().into())),
        (address.clone(), 0..20usize).prop_map(|(at, len)| Op::Read(at, len)),
        (address, bytes()).prop_map(|(at, data)| Op::Write(at, data)),
        (0..VECTORS).prop_map(Op::Interrupt),
        Just(Op::Hold),
    ]
}

proptest! {
    /// What the VMM learns from the changes alone equals the function's own state, and no BAR is outside the windows.
    #[test]
    fn changes_describe_the_whole_state_after_any_guest_access(ops in proptest::collection::vec(ops(), 0..200)) {
        let mut function = function();
        let (mut line, mut wiring) = (false, Wiring::default());
        for op in ops {
            let changes = match op {
                Op::ConfigRead(at, len) => {
                    function.config_read(at, &mut vec![0; len]);
                    Some(Changes::default())
                }
                Op::ConfigWrite(at, data) => Some(function.config_write(at, &data)),
                Op::Read(at, len) => function.read(at, &mut vec![0; len]),
                Op::Write(at, data) => function.write(at, &data),
                Op::Interrupt(vector) => Some(function.interrupt(vector)),
                Op::Hold => {
                    let saved = function.save();
                    let changes = function.restore(&saved).unwrap();
                    prop_assert_eq!(function.save(), saved);
                    Some(changes)
                }
            };
            let Some(changes) = changes else { continue };
            if changes.rewired {
                wiring = *function.wiring();
            }
            line = changes.line.unwrap_or(line);
            prop_assert_eq!(&wiring, function.wiring());
            prop_assert_eq!(line, function.line);
            for (bar, at) in Bar::ALL.into_iter().zip(wiring.bars) {
                let Some(at) = at else { continue };
                let end = at + function.bytes(bar);
                prop_assert!(at.is_multiple_of(function.bytes(bar)));
                prop_assert!(windows().iter().any(|w| w.start <= at && end <= w.end));
            }
            let told = |n: usize| !changes.send[n] || wiring.messages[n].is_some();
            prop_assert!((0..VECTORS).all(told));
            let mut ids = [0; 4];
            function.config_read(0, &mut ids);
            prop_assert_eq!(ids, [0xf4, 0x1a, 0x10, 0x11]);
        }
    }
}
