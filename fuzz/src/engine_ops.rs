//! Target `engine_ops`: packets, commands, time and sessions in any order, by the input's choice.

use adit_engine::PacketHeader;

use crate::input::Input;
use crate::shell::{SERVICES, Shell};

/// Runs one input.
pub fn run(data: &[u8]) {
    let input = &mut Input(data);
    let mut shell = Shell::new(input);
    while !input.is_empty() {
        match input.u8() % 16 {
            0..=6 => {
                let h = packet(input, &shell);
                let body = if input.u8() < 224 {
                    h.len
                } else {
                    input.edge32()
                };
                shell.packet(&h, body);
            }
            7..=10 => shell.command(input),
            11 => shell.events(input),
            12 => shell.wait(input),
            13 | 14 => {
                let (capacity, bodies) = (input.edge32() & 0xf_ffff, input.u8() % 32);
                shell.send_all(capacity, 1 + u32::from(bodies), input.u8());
            }
            _ => match input.u8() {
                0 => shell.session(None),
                1 => shell.session(Some(())),
                _ => shell.events(input),
            },
        }
        // The engine counts a stream as known until its event is polled, and the shell does the same.
        shell.events(input);
    }
    shell.session(None);
}

/// A packet: mostly with a known stream and a known operation.
pub fn packet(input: &mut Input<'_>, shell: &Shell) -> PacketHeader {
    let shape = input.u8();
    let (dst_port, src_port) = match shell.ports(input.u8()) {
        Some(ports) if shape & 3 != 0 => ports,
        _ => (
            input.pick(&[SERVICES[0], SERVICES[1], 80, u32::MAX]),
            u32::from(input.u8() % 8),
        ),
    };
    let op = match shape >> 2 & 15 {
        15 => input.u16(),
        n => u16::from(n % 8),
    };
    let odd = shape & 0xc0 == 0xc0;
    PacketHeader {
        src_port,
        dst_port,
        len: if op == 5 || odd { input.edge32() } else { 0 },
        kind: if odd { input.u16() & 3 } else { 1 },
        op,
        flags: if op == 4 {
            u32::from(input.u8() & 3)
        } else if odd {
            input.edge32()
        } else {
            0
        },
        buf_alloc: if shape & 0x80 != 0 {
            input.edge32()
        } else {
            256 << 10
        },
        fwd_cnt: if shape & 0x40 != 0 { input.edge32() } else { 0 },
    }
}
