//! Target `record`: a ring whose memory the peer wrote, with headers, lengths, pads and positions of any kind. Every record that a
//! consumer returns is the one that an independent second reader finds there. After an error the consumer returns nothing more.
//!
//! Input: size, alignment, whether rings wrap, words to write (pairs of place and value), and the rest over the records.

use adit_ringbuf::layout::Header;
use adit_ringbuf::{Consumer, Geometry, Mapped, RingMem};

use crate::input::Input;

const BYTES: usize = 1 << 14;

thread_local! {
    static MEMORY: Mapped = Mapped::anonymous(BYTES).expect("memory");
}

pub fn run(data: &[u8]) {
    MEMORY.with(|memory| {
        memory.zero(0, BYTES);
        attack(memory, Input(data));
    });
}

fn attack(memory: &Mapped, mut input: Input<'_>) {
    let size = input.pick(&[64, 256, 1024, 4096]);
    let align = if size >= 256 { input.pick(&[8, 64]) } else { 8 };
    let mut geometry = Geometry::alone(size, align);
    geometry.record_max = geometry.record_max.min(usize::from(input.u16()));
    let mut consumer = Consumer::new(memory, geometry, input.flag()).expect("a ring");
    for _ in 0..input.below(8) {
        let at = geometry.data + ((usize::from(input.u16()) % size) & !7);
        memory.store(at, input.u64());
    }
    let rest = input.bytes(size);
    memory.write(geometry.data, rest);

    let (mut tail, mut released) = (0u64, 0u64);
    let mut buf = [0; 4096];
    // A ring has at most as many records as headers fit.
    for _ in 0..=size / 8 {
        let expected = second_reader(memory, &geometry, &mut tail, released);
        // `drain` has a check of its own, and gives the space back.
        let drained = input.flag();
        let got = if drained {
            let mut found = None;
            let taken = consumer.drain(&mut buf, 1, |record| found = Some(record.len()));
            taken.map(|_| found)
        } else {
            consumer.pop(&mut buf)
        };
        match (expected, got) {
            (Some(Ok(len)), Ok(Some(found))) => {
                assert_eq!(len, found);
                let at = geometry.data + (tail as usize & (size - 1)) + 8;
                let mut bytes = vec![0; len];
                memory.read(at, &mut bytes);
                assert_eq!(bytes, buf[..len], "a record of {len} at {tail}");
                tail += ((8 + len).next_multiple_of(align)) as u64;
            }
            (None, Ok(None)) => break,
            (Some(Err(())), Err(corrupt)) => {
                memory.store(geometry.data + (tail as usize & (size - 1)), 0);
                assert_eq!(consumer.pop(&mut buf), Err(corrupt), "it stays broken");
                return;
            }
            (expected, got) => panic!("{expected:?}, but {got:?} at {tail}"),
        }
        if drained || input.flag() {
            let _ = consumer.release();
            released = tail;
            assert_eq!(memory.load(geometry.cons), tail);
        }
    }
}

/// The next record's length, behind pads. `Err`: nobody may write this.
fn second_reader(
    memory: &Mapped,
    geometry: &Geometry,
    tail: &mut u64,
    released: u64,
) -> Option<Result<usize, ()>> {
    loop {
        let in_ring = *tail as usize & (geometry.size - 1);
        let to_end = geometry.size - in_ring;
        let room = to_end.min(geometry.size - (*tail - released) as usize);
        match Header::parse(memory.load(geometry.data + in_ring)) {
            Header::Empty => return None,
            Header::Data(len) if len <= geometry.record_max as u64 => {
                let total = (8 + len as usize).next_multiple_of(geometry.align);
                return Some(if total <= room {
                    Ok(len as usize)
                } else {
                    Err(())
                });
            }
            Header::Pad(len) if len + 8 == to_end as u64 && to_end <= room => {
                *tail += to_end as u64
            }
            _ => return Some(Err(())),
        }
    }
}
