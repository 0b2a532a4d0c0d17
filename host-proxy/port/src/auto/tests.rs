//! The carrier with a scripted device, and with doors that say what a test has them say.

use std::collections::VecDeque;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};

use adit_channel::foreign::{DoorNews, Options};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::*;

/// Something with a bell that has news.
struct Script<T> {
    news: Arc<Mutex<VecDeque<T>>>,
    bell: Arc<EventFd>,
}

impl<T> Clone for Script<T> {
    fn clone(&self) -> Self {
        let (news, bell) = (self.news.clone(), self.bell.clone());
        Self { news, bell }
    }
}

impl<T> Script<T> {
    fn new() -> Self {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        Self {
            news: Arc::default(),
            bell: Arc::new(EventFd::from_flags(flags).unwrap()),
        }
    }

    fn say(&self, news: T) {
        self.news.lock().unwrap().push_back(news);
        self.bell.write(1).unwrap();
    }

    fn next(&self) -> Option<T> {
        let _ = self.bell.read();
        self.news.lock().unwrap().pop_front()
    }
}

impl Door for Script<DoorNews> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }

    fn dial(&mut self, _: u32, _: u32) -> io::Result<()> {
        Ok(())
    }

    fn receive(&mut self) -> Option<DoorNews> {
        self.next()
    }
}

/// A device that has a VMM, and sessions, as it is told.
struct TestDevice {
    vmm: Arc<AtomicBool>,
    says: Script<Option<SessionChange>>,
}

impl Device for TestDevice {
    fn has_vmm(&self) -> bool {
        self.vmm.load(Ordering::Relaxed)
    }
}

impl Carrier for TestDevice {
    type Rx<'a> = ForeignPacket<'a>;
    type Tx<'a> = ForeignSlot<'a, Script<DoorNews>>;

    fn caps(&self) -> CarrierCaps {
        CarrierCaps {
            max_payload: 1,
            packet_overhead: 0,
            lanes: false,
            tells_reason: false,
            run_bytes: 1,
        }
    }

    fn begin(&mut self) {}

    fn rx(&mut self) -> Result<Option<Self::Rx<'_>>, CarrierFault> {
        Ok(None)
    }

    fn tx(&mut self, _: Lane, _: u32) -> Result<Option<Self::Tx<'_>>, CarrierFault> {
        Ok(None)
    }

    fn flush(&mut self) {}

    fn arm(&mut self, _: Interest) -> Armed {
        Armed::Sleep
    }

    fn tear(&mut self) {}

    fn wakers(&self, visit: &mut dyn FnMut(BorrowedFd<'_>, u32)) {
        visit(self.says.bell.as_fd(), 0);
    }

    fn woken(&mut self, _: u32) -> Woken {
        Woken {
            session: self.says.next().flatten(),
            obstacle_changed: true,
            ..Woken::default()
        }
    }
}

struct World {
    auto: Auto<TestDevice, Script<DoorNews>>,
    vmm: Arc<AtomicBool>,
    device: Script<Option<SessionChange>>,
    kernel: Script<DoorNews>,
    hybrid: Script<DoorNews>,
    /// The session that the shell knows of.
    session: Option<u64>,
}

const NONE: &str = "not there";

impl World {
    fn new() -> Self {
        let (device, kernel, hybrid) = (Script::new(), Script::new(), Script::new());
        let vmm = Arc::<AtomicBool>::default();
        let of = |door: &Script<DoorNews>, half_closes| {
            Some(Foreign::new(door.clone(), Options { half_closes }, 1).unwrap())
        };
        let test_device = TestDevice {
            vmm: vmm.clone(),
            says: device.clone(),
        };
        let auto = Auto::new(test_device, of(&kernel, true), of(&hybrid, false), 7);
        let mut world = Self {
            auto: auto.unwrap(),
            vmm,
            device,
            kernel,
            hybrid,
            session: None,
        };
        world.kernel.say(DoorNews::State(Err(NONE.into())));
        world.hybrid.say(DoorNews::State(Err(NONE.into())));
        assert_eq!(world.turn(), None);
        world
    }

    /// Handles all wakers that are readable, as a shell does. Returns the way that is taken and has a session.
    fn turn(&mut self) -> Option<Way> {
        for _ in 0..100 {
            let mut ready = Vec::new();
            self.auto.wakers(&mut |fd, id| {
                let mut fds = [PollFd::new(fd, PollFlags::POLLIN)];
                if poll(&mut fds, PollTimeout::ZERO).unwrap() > 0 {
                    ready.push(id);
                }
            });
            // One at a time: each may change what the others are.
            let Some(id) = ready.first() else {
                assert_eq!(self.session.is_some(), self.auto.now().is_some());
                return self.auto.now();
            };
            match self.auto.woken(*id).session {
                None => {}
                Some(SessionChange::Lost(_)) => {
                    assert!(self.session.take().is_some(), "no session has ended");
                }
                Some(
                    SessionChange::Attached { epoch }
                    | SessionChange::Continued { epoch }
                    | SessionChange::Restored { epoch },
                ) => {
                    assert_eq!(self.session.replace(epoch), None, "one has not ended");
                }
            }
        }
        panic!("it does not come to rest");
    }

    fn vmm(&mut self, is_there: bool) -> Option<Way> {
        self.vmm.store(is_there, Ordering::Relaxed);
        self.device.say(None);
        self.turn()
    }

    fn session(&mut self, change: SessionChange) -> Option<Way> {
        self.device.say(Some(change));
        self.turn()
    }

    fn state(&mut self, of: Way, is_there: bool) -> Option<Way> {
        let door = match of {
            Way::Kernel => &self.kernel,
            _ => &self.hybrid,
        };
        door.say(DoorNews::State(match is_there {
            true => Ok(()),
            false => Err(NONE.into()),
        }));
        self.turn()
    }

    /// The guest dials over the kernel. Returns its end.
    fn offered(&mut self) -> UnixStream {
        let (near, far) = UnixStream::pair().unwrap();
        near.set_nonblocking(true).unwrap();
        far.set_nonblocking(true).unwrap();
        self.kernel.say(DoorNews::OfferedBy {
            port: 741,
            guest_port: 700,
            socket: near.into(),
        });
        self.turn();
        far
    }

    fn why(&self) -> String {
        self.auto.ways().choice(false).1
    }
}

const ATTACHED: SessionChange = SessionChange::Attached { epoch: 1 };
const LOST: SessionChange = SessionChange::Lost(ResetReason::Epoch);

fn is_closed(mut far: &UnixStream) -> bool {
    io::Read::read(&mut far, &mut [0]).is_ok_and(|n| n == 0)
}

#[test]
fn what_is_there_is_taken_in_its_order_and_the_next_when_it_has_gone() {
    let mut world = World::new();
    assert!(world.why().starts_with("nothing yet"), "{}", world.why());
    assert_eq!(world.state(Way::Hybrid, true), Some(Way::Hybrid));
    assert_eq!(world.session, Some(7));
    assert_ne!(world.auto.hello_features(), 0);
    // Nothing is open over it, and this comes first.
    assert_eq!(world.state(Way::Kernel, true), Some(Way::Kernel));
    assert_eq!(world.auto.hello_features(), 0);
    assert_eq!(world.session, Some(8));
    // The VMM is connected, and its guest boots.
    assert_eq!(world.vmm(true), None);
    assert_eq!(world.session(ATTACHED), Some(Way::VhostUser));
    assert_eq!(world.session, Some(9));
    assert_eq!(world.why(), "a VMM is connected to vhost.sock");
    // The guest reboots: its VMM is still there.
    assert_eq!(world.session(LOST), None);
    assert_eq!(world.session(ATTACHED), Some(Way::VhostUser));
    // It goes: its session ends a moment after it.
    assert_eq!(world.vmm(false), Some(Way::VhostUser));
    assert_eq!(world.session(LOST), Some(Way::Kernel));
    assert_eq!(world.state(Way::Kernel, false), Some(Way::Hybrid));
    assert_eq!(world.state(Way::Hybrid, false), None);
    assert_eq!(world.state(Way::Kernel, true), Some(Way::Kernel));
    assert!(world.why().starts_with("a VM has this CID"));
}

#[test]
fn a_vmm_that_goes_before_its_guest_has_booted_leaves_the_way_to_others() {
    let mut world = World::new();
    assert_eq!(world.state(Way::Kernel, true), Some(Way::Kernel));
    assert_eq!(world.vmm(true), None);
    assert_eq!(world.vmm(false), Some(Way::Kernel));
}

#[test]
fn a_way_with_streams_is_kept() {
    let mut world = World::new();
    world.state(Way::Kernel, true);
    let far = world.offered();
    assert_eq!(world.vmm(true), Some(Way::Kernel));
    assert_eq!(world.session(ATTACHED), Some(Way::Kernel));
    assert!(world.why().contains("vhost-user, which comes first"));
    // Not even when its VM has gone: only the socket knows whether the stream has ended.
    assert_eq!(world.state(Way::Kernel, false), Some(Way::Kernel));
    assert!(!is_closed(&far));
    // What follows when they have ended is shown with a real engine, in `tests/auto.rs`.
}

#[test]
fn what_a_guest_dials_over_a_way_that_is_not_taken_is_closed() {
    let mut world = World::new();
    world.state(Way::Kernel, true);
    world.vmm(true);
    assert_eq!(world.session(ATTACHED), Some(Way::VhostUser));
    let far = world.offered();
    assert!(is_closed(&far));
    assert_eq!(world.turn(), Some(Way::VhostUser));
}

/// A successor of a port process goes on with its VMM: its streams are reset, so the shell has to know that the driver is the same.
#[test]
fn a_session_that_a_successor_has_taken_over_is_told_as_one() {
    let mut world = World::new();
    world.vmm.store(true, Ordering::Relaxed);
    world
        .device
        .say(Some(SessionChange::Continued { epoch: 3 }));
    let mut told = None;
    world.auto.wakers(&mut |_, id| {
        if id / IDS == 1 {
            told = Some(id);
        }
    });
    let woken = world.auto.woken(told.unwrap());
    assert_eq!(woken.session, Some(SessionChange::Continued { epoch: 7 }));
    assert_eq!(world.auto.now(), Some(Way::VhostUser));
}
