//! The image: its entry, ports, and the smoke test.
#![no_std]
#![no_main]
#![allow(unsafe_code)] // without an operating system, all I/O is ports and physical addresses

use core::arch::asm;
use core::fmt::Write;
use core::panic::PanicInfo;
use core::ptr::NonNull;

use adit_bare::abi::{
    DEVICE, DOORBELLS, LINE, MAIL, MAILBOX, PORT_DOORBELL, PORT_ECHO, PORT_TEXT, PORT_VERDICT,
    REGION, Task, Verdict,
};
use adit_bare::attacks::{self, Attack};
use adit_bare::ring::{self, EchoError};
use adit_bare::streams;
use adit_engine::Tick;
use adit_ringbuf::Raw;
use linked_list_allocator::LockedHeap;

/// The heap is between image and stack. Only the streams use it.
const HEAP_START: u64 = 0x28_0000;
const HEAP_BYTES: usize = 1 << 20;

#[global_allocator]
static HEAP: LockedHeap = LockedHeap::empty();

/// How long each case of the hostile guest lasts.
const ATTACK_NS: u64 = 300_000_000;

/// The first interrupt controller's command port, and the command "read the requested lines".
const PIC: u16 = 0x20;
const PIC_READ_REQUESTS: u8 = 0x0a;
/// How often the guest asks for the interrupt before it gives up. Each time is an exit.
const INTERRUPT_POLLS: u32 = 100_000;

/// The entry. The VMM sets the arguments.
#[unsafe(no_mangle)]
extern "C" fn _start(task: u64, region_bytes: usize, tsc_khz: u64) -> ! {
    // ns = ticks * scale / 2^32: a multiplication, because a division of 128 bits is slow.
    let scale = (1_000_000u128 << 32) / u128::from(tsc_khz.max(1));
    let now = || Tick(((u128::from(ticks()) * scale) >> 32) as u64);
    let done = if task == Task::Smoke as u64 {
        smoke()
    } else if task == Task::Echo as u64 {
        ended(ring::echo(region(region_bytes)))
    } else if task == Task::Attacks as u64 {
        ended(attacks(region(region_bytes), now))
    } else {
        // SAFETY: nothing was allocated before this line, and nothing else uses this memory.
        unsafe { HEAP.lock().init(HEAP_START as *mut u8, HEAP_BYTES) };
        ended(streams::serve(region(region_bytes), now))
    };
    end(done.map_or_else(|failed| failed, |()| Verdict::Done))
}

/// The processor's time stamp counter.
fn ticks() -> u64 {
    // SAFETY: only reads a register.
    unsafe { core::arch::x86_64::_rdtsc() }
}

fn region(bytes: usize) -> Raw {
    let base = NonNull::new(REGION as *mut u8).unwrap_or(NonNull::dangling());
    // SAFETY: the VMM mapped `bytes` bytes there before the first instruction, for as long as this guest lives, and
    // nothing else in the image uses them.
    unsafe { Raw::new(base, bytes) }
}

fn ended(done: Result<u64, EchoError>) -> Result<(), Verdict> {
    done.map(drop).map_err(|e| {
        let _ = writeln!(Text, "ring: {e}");
        Verdict::Ring
    })
}

/// Runs every case for [`ATTACK_NS`], and reports the result of each on the text port.
fn attacks(mem: Raw, now: impl Fn() -> Tick) -> Result<u64, EchoError> {
    // The host polls, so it needs no doorbell.
    let no_doorbell = || {};
    for (name, case) in attacks::cases() {
        let guest = ring::find(mem)?;
        let mut attack = Attack::new(mem, guest, ticks(), &no_doorbell, &now, ATTACK_NS);
        attack.run(case);
        let (sessions, lost) = (attack.sessions, attack.lost);
        let _ = writeln!(Text, "{name}: {sessions} sessions, {lost} ended");
    }
    Ok(0)
}

fn smoke() -> Result<(), Verdict> {
    let _ = writeln!(
        Text,
        "user mode, {} bytes of memory",
        adit_bare::abi::MEMORY
    );
    memory()?;
    exits()?;
    for n in 0..DOORBELLS {
        out(PORT_DOORBELL, n as u32);
    }
    interrupt()
}

/// Memory keeps what is written to it. The last value stays there for the VMM to check.
fn memory() -> Result<(), Verdict> {
    let words = MAILBOX as *mut u64;
    for n in 0..512u64 {
        let value = MAIL.rotate_left(n as u32);
        // SAFETY: a page between image and stack that only this loop uses.
        let read = unsafe {
            let word = words.add(n as usize);
            word.write_volatile(value);
            word.read_volatile()
        };
        if read != value {
            return Err(Verdict::Memory);
        }
    }
    // SAFETY: the same page.
    unsafe { words.write_volatile(MAIL) };
    Ok(())
}

/// An access to a port or to device memory exits to the VMM, and the VMM's answer arrives.
fn exits() -> Result<(), Verdict> {
    out(PORT_ECHO, 0x1234_5678);
    let answer = inl(PORT_ECHO);
    let device = DEVICE as *mut u32;
    // SAFETY: mapped for this guest, but not memory: the VMM handles the store, and answers the load with the complement.
    let read = unsafe {
        device.write_volatile(0x8765_4321);
        device.read_volatile()
    };
    if (answer, read) == (!0x1234_5678, !0x8765_4321) {
        Ok(())
    } else {
        Err(Verdict::Exit)
    }
}

/// The VMM raises a line after it received the doorbells. The guest has no interrupt handler, so it reads the request from
/// the interrupt controller.
fn interrupt() -> Result<(), Verdict> {
    for _ in 0..INTERRUPT_POLLS {
        let requests: u8;
        // SAFETY: only accesses ports of the interrupt controller; no memory changes.
        unsafe {
            asm!("out dx, al", in("dx") PIC, in("al") PIC_READ_REQUESTS, options(nomem, nostack));
            asm!("in al, dx", in("dx") PIC, out("al") requests, options(nomem, nostack));
        }
        if requests & 1 << LINE != 0 {
            return Ok(());
        }
    }
    Err(Verdict::Interrupt)
}

fn out(port: u16, value: u32) {
    // SAFETY: the VMM owns the port, and no memory of this guest changes.
    unsafe { asm!("out dx, eax", in("dx") port, in("eax") value, options(nostack)) };
}

fn inl(port: u16) -> u32 {
    let value;
    // SAFETY: the same as in `out`.
    unsafe { asm!("in eax, dx", in("dx") port, out("eax") value, options(nomem, nostack)) };
    value
}

/// Writes to the text port.
struct Text;

impl Write for Text {
    fn write_str(&mut self, text: &str) -> core::fmt::Result {
        for byte in text.bytes() {
            // SAFETY: the same as in `out`.
            unsafe {
                asm!("out dx, al", in("dx") PORT_TEXT, in("al") byte, options(nomem, nostack))
            };
        }
        Ok(())
    }
}

fn end(verdict: Verdict) -> ! {
    loop {
        out(PORT_VERDICT, verdict as u32);
    }
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    let _ = writeln!(Text, "{info}");
    end(Verdict::Panic)
}
