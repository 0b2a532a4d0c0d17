//! Target `mem_table`: tables of memory regions over real descriptors, against the rules in 128-bit arithmetic. Accepted memory is
//! accessed at both ends (a mistake would be a SIGBUS, which ends the process). A refused table leaves nothing behind.

use std::fs::File;
use std::io::Seek;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use adit_channel::vhost_user::{MemoryPolicy, VmMemoryRef, map_table};
use adit_passed::Closer;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use vm_memory::{Bytes, GuestAddress};

use crate::input::Input;

const PAGE: u64 = 4096;
/// Executions between two checks for leaks.
const LOOK_EVERY: u64 = 1024;
/// Longer than the closes under way take.
const CLOSE_LIMIT: Duration = Duration::from_secs(20);

/// A descriptor that a region can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// 16 pages that cannot shrink.
    Sealed,
    /// A page and a half that cannot shrink.
    Odd,
    /// 16 pages that can shrink.
    Loose,
    /// Not a file.
    Device,
}

impl Kind {
    fn bytes(self) -> u64 {
        match self {
            Self::Sealed | Self::Loose => 16 * PAGE,
            Self::Odd => PAGE + PAGE / 2,
            Self::Device => 0,
        }
    }
}

struct Fixture {
    files: [(Kind, File); 4],
    runs: u64,
    held: (usize, usize),
}

thread_local! {
    static FIXTURE: std::cell::RefCell<Option<Fixture>> = const { std::cell::RefCell::new(None) };
}

/// Makes a memfd.
pub(crate) fn memfd(bytes: u64, sealed: bool) -> File {
    let fd = memfd_create(
        c"adit-fuzz",
        MFdFlags::MFD_ALLOW_SEALING | MFdFlags::MFD_CLOEXEC,
    );
    let file = File::from(fd.expect("memfd"));
    file.set_len(bytes).expect("a size");
    if sealed {
        fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK)).expect("a seal");
    }
    file
}

/// Number of descriptors and mappings of this process.
pub(crate) fn held() -> (usize, usize) {
    let fds = std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count);
    let maps = std::fs::read_to_string("/proc/self/maps").map_or(0, |s| s.lines().count());
    (fds, maps)
}

/// Asserts that their number does not grow. Some slack is allowed, because other code of this process has some too.
pub(crate) fn assert_no_leak(before: (usize, usize)) {
    // What was passed is closed on a thread of its own, which may not have run for a while.
    let begin = Instant::now();
    while Closer::shared().pending() > 0 && begin.elapsed() < CLOSE_LIMIT {
        std::thread::yield_now();
    }
    let now = held();
    assert!(
        now.0 < before.0 + 200 && now.1 < before.1 + 400,
        "{before:?} descriptors and mappings, now {now:?}"
    );
}

impl Fixture {
    fn new() -> Self {
        let device = File::open("/dev/null").expect("/dev/null");
        let files = [
            (Kind::Sealed, memfd(Kind::Sealed.bytes(), true)),
            (Kind::Odd, memfd(Kind::Odd.bytes(), true)),
            (Kind::Loose, memfd(Kind::Loose.bytes(), false)),
            (Kind::Device, device),
        ];
        Self {
            files,
            runs: 0,
            held: held(),
        }
    }
}

/// Runs one input.
pub fn run(data: &[u8]) {
    FIXTURE.with_borrow_mut(|kept| {
        let mut fixture = kept.take().unwrap_or_else(Fixture::new);
        case(&fixture, &mut Input(data));
        fixture.runs += 1;
        if fixture.runs % LOOK_EVERY == 0 {
            assert_no_leak(fixture.held);
        }
        *kept = Some(fixture);
    });
}

#[derive(Clone, Copy, Debug)]
struct Region {
    gpa: u64,
    size: u64,
    user: u64,
    offset: u64,
    kind: Kind,
}

fn number(input: &mut Input<'_>) -> u64 {
    let pages = u64::from(input.u8() % 24) * PAGE;
    match input.u8() % 8 {
        0..=4 => pages,
        5 => (u64::MAX - 4 * PAGE + 1).wrapping_add(pages),
        6 => pages + u64::from(input.u16()),
        _ => input.u64(),
    }
}

fn case(fixture: &Fixture, input: &mut Input<'_>) {
    let shape = input.u8();
    let policy = if shape & 1 == 0 {
        MemoryPolicy::SealedMemfd
    } else {
        MemoryPolicy::AnyFile
    };
    let n = usize::from(shape >> 1 & 7);
    let regions: Vec<Region> = (0..n)
        .map(|_| Region {
            gpa: number(input),
            size: number(input),
            user: number(input),
            offset: number(input),
            kind: fixture.files[[0, 0, 0, 0, 0, 1, 2, 3][input.below(8)]].0,
        })
        .collect();
    let missing = shape & 0xf0 == 0xf0;
    let files: Vec<File> = regions
        .iter()
        .skip(usize::from(missing))
        .map(|r| {
            let file = fixture
                .files
                .iter()
                .find(|f| f.0 == r.kind)
                .expect("all kinds");
            file.1.try_clone().expect("a descriptor")
        })
        .collect();
    let table: Vec<_> = regions
        .iter()
        .map(|r| [r.gpa, r.size, r.user, r.offset])
        .collect();
    let expected = !missing && good(&regions, policy);
    match map_table(&table, files, policy) {
        Ok(mem) => {
            assert!(expected, "taken: {regions:x?}");
            touch(fixture, &mem, &regions);
        }
        Err(e) => assert!(!expected, "refused: {e}: {regions:x?}"),
    }
}

/// The rules: whether the table must be accepted.
fn good(regions: &[Region], policy: MemoryPolicy) -> bool {
    let wide = |start: u64, size: u64| (u128::from(start), u128::from(start) + u128::from(size));
    let apart = |a: (u128, u128), b: (u128, u128)| a.1 <= b.0 || b.1 <= a.0;
    let fits = |start: u64, size: u64| wide(start, size).1 < 1 << 64;
    let each = regions.iter().all(|r| {
        r.size > 0
            && fits(r.gpa, r.size)
            && fits(r.user, r.size)
            && wide(r.offset, r.size).1 <= u128::from(r.kind.bytes())
            && r.offset % PAGE == 0
            && (r.kind != Kind::Loose || policy == MemoryPolicy::AnyFile)
    });
    let pairs = regions.iter().enumerate().all(|(i, a)| {
        regions[..i].iter().all(|b| {
            apart(wide(a.gpa, a.size), wide(b.gpa, b.size))
                && apart(wide(a.user, a.size), wide(b.user, b.size))
        })
    });
    !regions.is_empty() && each && pairs
}

fn touch(fixture: &Fixture, mem: &VmMemoryRef, regions: &[Region]) {
    for (i, r) in regions.iter().enumerate() {
        let file = &fixture
            .files
            .iter()
            .find(|f| f.0 == r.kind)
            .expect("all kinds")
            .1;
        for offset in [0, r.size - 1] {
            let value = [(i as u8) ^ 0x5a ^ offset as u8];
            let at = GuestAddress(r.gpa + offset);
            mem.write_slice(&value, at).expect("mapped");
            let mut got = [0];
            file.read_exact_at(&mut got, r.offset + offset)
                .expect("inside the file");
            assert_eq!(got, value, "mapped from somewhere else");
        }
    }
    // The position in the file is shared with the original descriptor, and must not change.
    let at = { &fixture.files[0].1 }.stream_position();
    assert_eq!(at.ok(), Some(0));
}
