//! The image: its entry, ports, and the smoke test.
#![no_std]
#![no_main]
#![allow(unsafe_code)] // ports and physical addresses are all that there is here

use core::arch::asm;
use core::fmt::Write;
use core::panic::PanicInfo;
use core::ptr::NonNull;

use adit_bare::abi::{
    DEVICE, LINE, MAIL, MAILBOX, PORT_BELL, PORT_ECHO, PORT_TEXT, PORT_VERDICT, REGION, RINGS,
    Task, Verdict,
};
use adit_bare::ring::{self, EchoError};
use adit_bare::rude::{self, Attack};
use adit_bare::streams;
use adit_engine::Tick;
use adit_ringbuf::Raw;
use linked_list_allocator::LockedHeap;

/// What streams are kept in: between image and stack.
const HEAP_START: u64 = 0x28_0000;
const HEAP_BYTES: usize = 1 << 20;

#[global_allocator]
static HEAP: LockedHeap = LockedHeap::empty();

/// How long each case of a hostile guest lasts.
const RUDE_NS: u64 = 300_000_000;

/// The first interrupt controller's command port, and "show which lines were pulled".
const PIC: u16 = 0x20;
const PIC_READ_REQUESTS: u8 = 0x0a;
/// Looks for the interrupt; each leaves the guest.
const LOOKS: u32 = 100_000;

/// What the VMM jumps to.
#[unsafe(no_mangle)]
extern "C" fn _start(task: u64, region_bytes: usize, tsc_khz: u64) -> ! {
    // ns = ticks * scale / 2^32, for no division.
    let scale = (1_000_000u128 << 32) / u128::from(tsc_khz.max(1));
    let now = || Tick(((u128::from(ticks()) * scale) >> 32) as u64);
    let done = if task == Task::Smoke as u64 {
        smoke()
    } else if task == Task::Echo as u64 {
        ended(ring::echo(region(region_bytes)))
    } else if task == Task::Rude as u64 {
        ended(rude(region(region_bytes), now))
    } else {
        // SAFETY: nothing was allocated before, and nothing else uses this memory.
        unsafe { HEAP.lock().init(HEAP_START as *mut u8, HEAP_BYTES) };
        ended(streams::serve(region(region_bytes), now))
    };
    end(done.map_or_else(|failed| failed, |()| Verdict::Done))
}

/// Ticks of the processor's clock.
fn ticks() -> u64 {
    // SAFETY: reads a register.
    unsafe { core::arch::x86_64::_rdtsc() }
}

fn region(bytes: usize) -> Raw {
    let base = NonNull::new(REGION as *mut u8).unwrap_or(NonNull::dangling());
    // SAFETY: the VMM mapped so many bytes there before the first instruction, for as long as this guest lives, and
    // nothing else here uses them.
    unsafe { Raw::new(base, bytes) }
}

fn ended(done: Result<u64, EchoError>) -> Result<(), Verdict> {
    done.map(drop).map_err(|e| {
        let _ = writeln!(Text, "ring: {e}");
        Verdict::Ring
    })
}

/// Every case for a while; what came of each over the text port.
fn rude(mem: Raw, now: impl Fn() -> Tick) -> Result<u64, EchoError> {
    // Nobody sleeps here.
    let ring_nobody = || {};
    for (name, case) in rude::cases() {
        let guest = ring::find(mem)?;
        let mut attack = Attack::new(mem, guest, ticks(), &ring_nobody, &now, RUDE_NS);
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
    for n in 0..RINGS {
        out(PORT_BELL, n as u32);
    }
    interrupt()
}

/// Memory keeps what is written; the VMM finds the last word.
fn memory() -> Result<(), Verdict> {
    let words = MAILBOX as *mut u64;
    for n in 0..512u64 {
        let value = MAIL.rotate_left(n as u32);
        // SAFETY: a page between image and stack, which only this loop uses.
        let read = unsafe {
            let word = words.add(n as usize);
            word.write_volatile(value);
            word.read_volatile()
        };
        if read != value {
            return Err(Verdict::Memory);
        }
    }
    // SAFETY: as above.
    unsafe { words.write_volatile(MAIL) };
    Ok(())
}

/// Ports and a device's memory leave the guest, and the answer comes back.
fn exits() -> Result<(), Verdict> {
    out(PORT_ECHO, 0x1234_5678);
    let told = inl(PORT_ECHO);
    let device = DEVICE as *mut u32;
    // SAFETY: mapped for this guest, and no memory: the VMM takes the store, and answers the load with its complement.
    let read = unsafe {
        device.write_volatile(0x8765_4321);
        device.read_volatile()
    };
    if (told, read) == (!0x1234_5678, !0x8765_4321) {
        Ok(())
    } else {
        Err(Verdict::Exit)
    }
}

/// The VMM pulls a line when it has heard the bell. It is seen in the interrupt controller, for nobody handles it here.
fn interrupt() -> Result<(), Verdict> {
    for _ in 0..LOOKS {
        let requests: u8;
        // SAFETY: ports of the interrupt controller; no memory is touched.
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
    // SAFETY: a port of the VMM's; it changes no memory of this guest.
    unsafe { asm!("out dx, eax", in("dx") port, in("eax") value, options(nostack)) };
}

fn inl(port: u16) -> u32 {
    let value;
    // SAFETY: as in `out`.
    unsafe { asm!("in eax, dx", in("dx") port, out("eax") value, options(nomem, nostack)) };
    value
}

/// Characters for whoever reads.
struct Text;

impl Write for Text {
    fn write_str(&mut self, text: &str) -> core::fmt::Result {
        for byte in text.bytes() {
            // SAFETY: as in `out`.
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
