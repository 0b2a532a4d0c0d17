//! R31, R32 and single messages, without a socket: the handler, a memory table, and a shard that only answers.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::memfd::{MFdFlags, memfd_create};
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserMemoryRegion, VhostUserVirtioFeatures, VhostUserVringAddrFlags,
};
use vhost::vhost_user::{Result, VhostUserBackendReqHandlerMut};

use super::command::{Command, Driver, Link, Paused, Start};
use super::handler::Handler;
use super::memory::{MemTable, MemoryPolicy, TableError};
use crate::device::{FEATURES, GuestCid};

mod resume;

const MEMORY_BYTES: u64 = 0x4_0000;
const USER: u64 = 0x7f00_0000_0000;
const ALL: u64 = FEATURES | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();

/// A command that the shard received.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Received {
    /// With the start positions of the queues, and whether each kick descriptor was already readable.
    Start {
        driver: Driver,
        bases: [u16; 2],
        kicked: [bool; 2],
    },
    Pause,
    End,
    Memory,
    Call,
    Kick,
}

/// A handler whose shard accepts everything, and stops at positions 7 and 9.
struct Rig {
    handler: Handler,
    asked: Arc<Mutex<Vec<Received>>>,
    shard: Option<JoinHandle<()>>,
}

impl Rig {
    fn new() -> Self {
        let (commands, receiver) = mpsc::sync_channel(8);
        let waker = EventFd::from_flags(EfdFlags::EFD_NONBLOCK).expect("eventfd");
        let link = Link {
            commands,
            waker: Arc::new(waker),
        };
        let cid = GuestCid::new(3).expect("a guest's CID");
        let asked = Arc::default();
        let shard = std::thread::spawn({
            let asked = Arc::clone(&asked);
            move || answer(&receiver, &asked)
        });
        Self {
            handler: Handler::new(cid, 1024, MemoryPolicy::SealedMemfd, link),
            asked,
            shard: Some(shard),
        }
    }

    fn received(&self) -> Vec<Received> {
        self.asked.lock().expect("not poisoned").clone()
    }

    /// Sends all messages for a session except the last one.
    fn all_but_last_enable(&mut self) -> Result<()> {
        self.handler.set_features(ALL)?;
        self.table()?;
        for index in [0, 1] {
            self.vring(index)?;
        }
        self.handler.set_vring_enable(0, true)
    }

    fn running() -> Self {
        let mut rig = Self::new();
        rig.all_but_last_enable().expect("good messages");
        rig.handler.set_vring_enable(1, true).expect("good");
        assert_eq!(rig.received().len(), 1);
        rig
    }

    fn table(&mut self) -> Result<()> {
        let (region, file) = good_region("adit-test");
        self.handler
            .set_mem_table(&[region], vec![file], None)
            .map(|_| ())
    }

    fn vring(&mut self, index: u32) -> Result<()> {
        self.handler.set_vring_num(index, 128)?;
        self.handler.set_vring_base(index, 0)?;
        self.addr(index)?;
        self.handler.set_vring_kick(index as u8, Some(event(0)))
    }

    fn addr(&mut self, index: u32) -> Result<()> {
        let vring = USER + 0x1_0000 * u64::from(1 + index);
        let flags = VhostUserVringAddrFlags::empty();
        let (used, avail) = (vring + 0x2000, vring + 0x1000);
        self.handler
            .set_vring_addr(index, flags, vring, used, avail, 0)
    }
}

impl Rig {
    /// Drops the handler and waits until the shard has received all commands.
    fn end(&mut self) {
        // The last link is dropped with the handler, and that ends the shard's thread.
        self.handler = handler_without_shard();
        if let Some(shard) = self.shard.take() {
            shard.join().expect("the shard ends");
        }
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.end();
    }
}

/// A handler whose shard has ended.
fn handler_without_shard() -> Handler {
    let (commands, _) = mpsc::sync_channel(1);
    let waker = Arc::new(EventFd::from_flags(EfdFlags::EFD_NONBLOCK).expect("eventfd"));
    let cid = GuestCid::new(3).expect("a guest's CID");
    let link = Link { commands, waker };
    Handler::new(cid, 1024, MemoryPolicy::SealedMemfd, link)
}

fn answer(commands: &Receiver<Command>, asked: &Mutex<Vec<Received>>) {
    while let Ok(command) = commands.recv() {
        let mut asked = asked.lock().expect("not poisoned");
        match command {
            Command::Start(start, answer) => {
                asked.push(describe(&start));
                answer.send(Ok(()));
            }
            Command::Pause(answer) => {
                asked.push(Received::Pause);
                let bases = [7, 9];
                answer.send(Paused { bases, held: true });
            }
            Command::End(_, answer) => {
                asked.push(Received::End);
                answer.send(());
            }
            Command::Memory(_, answer) => {
                asked.push(Received::Memory);
                answer.send(Ok(()));
            }
            Command::Call(..) => asked.push(Received::Call),
            Command::Kick(..) => asked.push(Received::Kick),
        }
    }
}

fn describe(start: &Start) -> Received {
    let queues = [&start.queues.rx, &start.queues.tx];
    Received::Start {
        driver: start.driver,
        bases: queues.map(|q| q.queue.next_avail),
        kicked: queues.map(|q| q.kick.as_ref().is_some_and(readable)),
    }
}

fn readable(fd: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::ZERO).is_ok_and(|n| n == 1)
}

fn event(value: u32) -> File {
    let event = EventFd::from_value(value).expect("eventfd");
    File::from(OwnedFd::from(event))
}

fn memfd(name: &str, bytes: u64, sealed: bool) -> File {
    let name = std::ffi::CString::new(name).expect("no NUL");
    let fd = memfd_create(name.as_c_str(), MFdFlags::MFD_ALLOW_SEALING).expect("memfd");
    let file = File::from(fd);
    file.set_len(bytes).expect("memfd size");
    if sealed {
        fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK)).expect("seal");
    }
    file
}

fn good_region(name: &str) -> (VhostUserMemoryRegion, File) {
    let region = VhostUserMemoryRegion::new(0, MEMORY_BYTES, USER, 0);
    (region, memfd(name, MEMORY_BYTES, true))
}

/// Calls `visit` with every order of `0..n` (Heap's algorithm).
fn every_order(n: usize, visit: &mut dyn FnMut(&[usize])) {
    fn go(k: usize, order: &mut Vec<usize>, visit: &mut dyn FnMut(&[usize])) {
        if k <= 1 {
            return visit(order);
        }
        for i in 0..k {
            go(k - 1, order, visit);
            order.swap(if k.is_multiple_of(2) { i } else { 0 }, k - 1);
        }
    }
    go(n, &mut (0..n).collect(), visit);
}

#[test]
fn r31_every_order_of_messages_starts_one_session_and_loses_no_kick() {
    const ADDR: usize = 3;
    const TABLE: usize = 1;
    let mut orders = 0;
    every_order(7, &mut |order| {
        orders += 1;
        let mut rig = Rig::new();
        // Vring 1 is complete except for its address, which needs the memory table.
        rig.handler.set_vring_num(1, 128).expect("good");
        rig.handler.set_vring_kick(1, Some(event(0))).expect("good");
        rig.handler.set_vring_enable(1, true).expect("good");
        let mut table_is_there = false;
        for &message in order {
            assert_eq!(rig.received(), [], "{order:?}: too early");
            let result = match message {
                0 => rig.handler.set_features(ALL),
                TABLE => rig.table().and_then(|()| rig.addr(1)),
                2 => rig.handler.set_vring_num(0, 64),
                ADDR => rig.addr(0),
                // The driver has kicked already.
                4 => rig.handler.set_vring_kick(0, Some(event(1))),
                5 => rig.handler.set_vring_enable(0, true),
                _ => rig.handler.set_vring_base(0, 0),
            };
            table_is_there |= message == TABLE;
            // An address before the table cannot be translated. The result is a typed error, and the frontend is cut
            // off.
            assert_eq!(result.is_err(), message == ADDR && !table_is_there);
            if result.is_err() {
                return;
            }
            // If the base is the last message, the vring is running already, and the message is refused.
            if rig.received().len() == 1 && message != order[6] {
                assert_eq!(order[6], 6, "{order:?}: only the base has a default");
                assert!(rig.handler.set_vring_base(0, 5).is_err());
                break;
            }
        }
        let started = Received::Start {
            driver: Driver::New,
            bases: [0, 0],
            kicked: [true, false],
        };
        assert_eq!(rig.received(), [started], "{order:?}");
    });
    assert_eq!(orders, 5040);
}

#[test]
fn r31_without_protocol_features_vrings_are_enabled_from_the_start() {
    let mut rig = Rig::new();
    rig.handler.set_features(FEATURES).expect("good");
    rig.table().expect("good");
    rig.vring(0).expect("good");
    assert_eq!(rig.received(), []);
    rig.vring(1).expect("good");
    assert_eq!(rig.received().len(), 1);
}

#[test]
fn a_stopped_vring_returns_its_base_and_needs_a_new_kick() {
    let mut rig = Rig::running();
    assert_eq!({ rig.handler.get_vring_base(0).expect("good").num }, 7);
    assert_eq!({ rig.handler.get_vring_base(1).expect("good").num }, 9);
    assert_eq!(rig.received()[1..], [Received::Pause], "stopped once");
    rig.handler.set_vring_enable(0, true).expect("good");
    rig.handler.set_vring_kick(0, Some(event(0))).expect("good");
    assert_eq!(rig.received().len(), 2, "vring 1 has no kick");
    rig.handler.set_vring_kick(1, Some(event(0))).expect("good");
    assert_eq!(rig.received()[2..], [RESUMED]);
}

const RESUMED: Received = Received::Start {
    driver: Driver::Same,
    bases: [7, 9],
    kicked: [false, false],
};

#[test]
fn a_disabled_vring_pauses_the_session_and_continues_at_its_position() {
    let mut rig = Rig::running();
    rig.handler.set_vring_enable(1, false).expect("good");
    assert_eq!(rig.received()[1..], [Received::Pause]);
    rig.handler.set_vring_enable(1, true).expect("good");
    assert_eq!(rig.received()[2..], [RESUMED]);
}

/// The messages of QEMU for `stop` and `cont`, with changes in between that another driver would make.
#[test]
fn r51_a_paused_session_continues_only_with_the_same_driver() {
    type Change = fn(&mut Rig);
    let other = |driver, bases| Received::Start {
        driver,
        bases,
        kicked: [false, false],
    };
    let (moved, fresh): (Change, Change) = (
        |rig| {
            let flags = VhostUserVringAddrFlags::empty();
            let at = USER + 0x3_0000;
            let (used, avail) = (at + 0x2000, at + 0x1000);
            let moved = rig.handler.set_vring_addr(0, flags, at, used, avail, 0);
            moved.expect("good");
        },
        |rig| {
            for vring in 0..2 {
                rig.handler.set_vring_base(vring, 0).expect("good");
            }
        },
    );
    let cases: [(&str, Change, Received); 7] = [
        ("nothing", |_| {}, RESUMED),
        ("memory anew", |rig| rig.table().expect("good"), RESUMED),
        ("another address", moved, other(Driver::Continued, [7, 9])),
        (
            "another size",
            |rig| rig.handler.set_vring_num(1, 64).expect("good"),
            other(Driver::Continued, [7, 9]),
        ),
        (
            "another position",
            |rig| rig.handler.set_vring_base(1, 8).expect("good"),
            other(Driver::Continued, [7, 8]),
        ),
        (
            "other features",
            |rig| rig.handler.set_features(ALL & !1).expect("good"),
            other(Driver::Continued, [7, 9]),
        ),
        (
            "a driver that has just started",
            fresh,
            other(Driver::New, [0, 0]),
        ),
    ];
    for (what, change, expected) in cases {
        let mut rig = Rig::running();
        for vring in 0..2 {
            rig.handler.set_vring_enable(vring, false).expect("good");
        }
        let bases = [0, 1].map(|vring| rig.handler.get_vring_base(vring).expect("good").num);
        assert_eq!(bases, [7, 9]);
        change(&mut rig);
        for vring in 0..2 {
            let kick = rig.handler.set_vring_kick(vring, Some(event(0)));
            kick.expect("good");
        }
        for vring in 0..2 {
            rig.handler.set_vring_enable(vring, true).expect("good");
        }
        assert_eq!(rig.received()[1..], [Received::Pause, expected], "{what}");
        // Whatever happens later, a pause is used only once.
        rig.handler.disconnected();
        assert_eq!(rig.received()[3..], [Received::End], "{what}");
    }
}

#[test]
fn a_paused_session_ends_when_the_frontend_goes_or_resets_the_owner() {
    for reset in [false, true] {
        let mut rig = Rig::running();
        rig.handler.set_vring_enable(0, false).expect("good");
        match reset {
            true => rig.handler.reset_owner().expect("good"),
            false => rig.handler.disconnected(),
        }
        assert_eq!(rig.received()[1..], [Received::Pause, Received::End]);
        rig.handler.disconnected();
        assert_eq!(rig.received().len(), 3, "ended once");
    }
}

#[test]
fn r20_a_running_vring_cannot_be_changed() {
    let mut rig = Rig::running();
    assert!(rig.handler.set_vring_num(0, 64).is_err());
    assert!(rig.handler.set_vring_base(1, 3).is_err());
    assert!(rig.handler.set_features(FEATURES).is_err());
    let flags = VhostUserVringAddrFlags::empty();
    let at = USER + 0x3000;
    assert!(rig.handler.set_vring_addr(0, flags, at, at, at, 0).is_err());
    // Setting the same value again is not a change.
    rig.addr(0).expect("the same");
    rig.handler.set_features(ALL).expect("the same");
    assert_eq!(rig.received().len(), 1);
    // Memory, kick and call may be replaced.
    rig.table().expect("good");
    rig.handler.set_vring_call(0, Some(event(0))).expect("good");
    rig.handler.set_vring_call(1, None).expect("polling");
    rig.handler.set_vring_kick(1, Some(event(0))).expect("good");
    rig.end();
    let more = [
        Received::Memory,
        Received::Call,
        Received::Call,
        Received::Kick,
    ];
    assert_eq!(rig.received()[1..], more);
}

#[test]
fn r21_invalid_vring_numbers_are_refused() {
    let mut rig = Rig::new();
    for num in [0, 3, 127, 2048, 65536 + 128, u32::MAX] {
        assert!(rig.handler.set_vring_num(0, num).is_err(), "size {num}");
    }
    for index in [2, 3, u32::MAX] {
        assert!(rig.handler.set_vring_num(index, 128).is_err());
        assert!(rig.handler.set_vring_base(index, 0).is_err());
        assert!(rig.handler.set_vring_enable(index, true).is_err());
        assert!(rig.handler.get_vring_base(index).is_err());
    }
    assert!(rig.handler.set_vring_kick(2, Some(event(0))).is_err());
    assert!(rig.handler.set_vring_call(255, None).is_err());
    assert!(rig.handler.set_vring_base(0, 65536).is_err());
    // Without a descriptor the virtqueue would have to be polled.
    assert!(rig.handler.set_vring_kick(0, None).is_err());
    for bit in [1, 2, 26, 34, 63] {
        assert!(rig.handler.set_features(ALL | 1 << bit).is_err());
    }
    assert_eq!(rig.received(), []);
}

#[test]
fn a_misaligned_vring_or_one_outside_memory_is_refused_at_session_start() {
    for wrong in [USER + 0x1_0001, USER + MEMORY_BYTES] {
        let mut rig = Rig::new();
        rig.handler.set_features(ALL).expect("good");
        rig.table().expect("good");
        rig.vring(1).expect("good");
        rig.handler.set_vring_enable(1, true).expect("good");
        rig.handler.set_vring_enable(0, true).expect("good");
        rig.handler.set_vring_num(0, 128).expect("good");
        rig.handler.set_vring_kick(0, Some(event(0))).expect("good");
        let flags = VhostUserVringAddrFlags::empty();
        let (used, avail) = (USER + 0x1_2000, USER + 0x1_1000);
        let result = rig.handler.set_vring_addr(0, flags, wrong, used, avail, 0);
        assert!(result.is_err(), "{wrong:#x}");
        assert_eq!(rig.received(), []);
    }
}

#[test]
fn config_is_the_guest_cid() {
    let mut rig = Rig::new();
    let flags = VhostUserConfigFlags::empty();
    let mut read = |offset, size| rig.handler.get_config(offset, size, flags);
    assert_eq!(read(0, 8).expect("all"), 3u64.to_le_bytes());
    assert_eq!(read(4, 4).expect("the upper half"), [0; 4]);
    for (offset, size) in [(0, 9), (8, 1), (u32::MAX, u32::MAX), (1, u32::MAX)] {
        assert!(read(offset, size).is_err(), "{offset}+{size}");
    }
}

#[test]
fn a_shard_that_has_ended_gives_an_error_and_no_hang() {
    let mut dead = Rig {
        handler: handler_without_shard(),
        asked: Arc::default(),
        shard: None,
    };
    dead.all_but_last_enable()
        .expect("no command is needed yet");
    assert!(dead.handler.set_vring_enable(1, true).is_err());
}

fn map(
    regions: &[VhostUserMemoryRegion],
    files: Vec<File>,
) -> std::result::Result<MemTable, TableError> {
    MemTable::map(regions, files, MemoryPolicy::SealedMemfd)
}

fn refused(what: &str, regions: &[VhostUserMemoryRegion]) -> TableError {
    let files = regions
        .iter()
        .map(|_| memfd("adit-test", MEMORY_BYTES, true))
        .collect();
    match map(regions, files) {
        Ok(_) => panic!("{what}: mapped"),
        Err(e) => e,
    }
}

#[test]
fn r32_tables_that_wrap_overlap_or_reach_past_their_file_are_refused() {
    let region = VhostUserMemoryRegion::new;
    let m = MEMORY_BYTES;
    for (what, bad) in [
        ("size 0", region(0, 0, USER, 0)),
        ("guest address wraps", region(u64::MAX - m + 1, m, USER, 0)),
        ("user address wraps", region(0, m, u64::MAX - 1, 0)),
        ("offset wraps", region(0, m, USER, u64::MAX - 0xfff)),
    ] {
        let e = refused(what, &[bad]);
        assert!(
            matches!(e, TableError::Wraps { index: 0, .. }),
            "{what}: {e}"
        );
    }
    for (what, a, b) in [
        ("the same", region(0, m, USER, 0), region(0, m, USER + m, 0)),
        (
            "by a byte",
            region(0, m, USER, 0),
            region(m - 1, m, USER + m, 0),
        ),
        (
            "inside, reversed",
            region(0x1000, 0x1000, USER + m, 0),
            region(0, m, USER, 0),
        ),
        (
            "user addresses",
            region(0, m, USER, 0),
            region(m, m, USER + m - 1, 0),
        ),
    ] {
        let e = refused(what, &[a, b]);
        assert!(matches!(e, TableError::Overlap { .. }), "{what}: {e}");
    }
    for (what, bad) in [
        ("larger than its file", region(0, m + 1, USER, 0)),
        ("the largest size", region(0, u64::MAX, 0, 0)),
        ("offset past the end", region(0, m, USER, 0x1000)),
    ] {
        let e = refused(what, &[bad]);
        assert!(
            matches!(e, TableError::PastEnd { index: 0, .. }),
            "{what}: {e}"
        );
    }
    let e = refused("offset inside a page", &[region(0, 0x1000, USER, 0x10)]);
    assert!(matches!(e, TableError::Map { index: 0, .. }), "{e}");
    let e = refused("no region", &[]);
    assert!(
        matches!(
            e,
            TableError::Count {
                regions: 0,
                files: 0
            }
        ),
        "{e}"
    );
    let two = vec![memfd("a", m, true), memfd("b", m, true)];
    let e = map(&[region(0, m, USER, 0)], two).expect_err("one too many");
    assert!(
        matches!(
            e,
            TableError::Count {
                regions: 1,
                files: 2
            }
        ),
        "{e}"
    );
}

#[test]
fn r13_memory_that_can_shrink_is_refused_unless_allowed() {
    let (region, _) = good_region("adit-test");
    let file = || memfd("adit-test", MEMORY_BYTES, false);
    let e = map(&[region], vec![file()]).expect_err("not sealed");
    assert!(matches!(e, TableError::NotSealed { index: 0 }), "{e}");
    MemTable::map(&[region], vec![file()], MemoryPolicy::AnyFile).expect("allowed");
    let e = MemTable::map(&[region], vec![event(0)], MemoryPolicy::AnyFile).expect_err("no file");
    assert!(matches!(e, TableError::NotAFile { index: 0 }), "{e}");
}

#[test]
fn r32_refused_and_replaced_tables_leave_no_mapping_and_no_descriptor() {
    // Names that no other test in this process uses.
    let (name, pipe_name) = ("adit-r32-mapped", "adit-r32-refused");
    let count = |name: &str| {
        let maps = std::fs::read_to_string("/proc/self/maps").expect("/proc");
        let fds = std::fs::read_dir("/proc/self/fd").expect("/proc");
        let open = fds
            .filter_map(|fd| std::fs::read_link(fd.ok()?.path()).ok())
            .filter(|to| to.to_string_lossy().contains(name));
        (maps.matches(name).count(), open.count())
    };
    let mut rig = Rig::running();
    for round in 0..20 {
        let (region, file) = good_region(name);
        let result = rig.handler.set_mem_table(&[region], vec![file], None);
        assert!(result.is_ok());
        // The new table replaced the old one.
        assert_eq!(count(name), (1, 1), "round {round}");
        let (mut region, file) = good_region(pipe_name);
        region.mmap_offset = 0x1000;
        let result = rig.handler.set_mem_table(&[region], vec![file], None);
        assert!(result.is_err());
        assert_eq!(count(pipe_name), (0, 0), "round {round}");
    }
    // A refused table changes nothing: the old one still translates.
    rig.addr(0).expect("the same address");
    rig.handler.disconnected();
    assert_eq!(count(name), (0, 0));
    // A pipe that is passed as memory is closed too.
    let (mut reader, writer) = std::io::pipe().expect("pipe");
    let (region, _) = good_region("adit-test");
    let file = File::from(OwnedFd::from(writer));
    assert!(
        rig.handler
            .set_mem_table(&[region], vec![file], None)
            .is_err()
    );
    let mut bytes = Vec::new();
    assert_eq!(reader.read_to_end(&mut bytes).expect("the end"), 0);
}

#[test]
fn addresses_are_translated_inside_regions_only() {
    let region = VhostUserMemoryRegion::new;
    let regions = [
        region(0x10_0000, 0x1_0000, USER, 0),
        region(0, 0x1_0000, USER + 0x2_0000, 0x1_0000),
    ];
    let files = vec![
        memfd("adit-test", MEMORY_BYTES, true),
        memfd("adit-test", MEMORY_BYTES, true),
    ];
    let table = map(&regions, files).expect("a good table, unsorted");
    for (user, gpa) in [
        (USER, Some(0x10_0000)),
        (USER + 0xffff, Some(0x10_ffff)),
        (USER + 0x1_0000, None),
        (USER + 0x2_0000, Some(0)),
        (USER - 1, None),
        (0, None),
        (u64::MAX, None),
    ] {
        assert_eq!(table.translate(user), gpa, "{user:#x}");
    }
}
