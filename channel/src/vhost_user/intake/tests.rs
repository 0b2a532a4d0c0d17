//! A predecessor stops between any two of the calls that take a message. Its successor must send the frontend every
//! reply exactly once and whole.

use std::io::{Read, Write};
use std::sync::mpsc;

use nix::sys::eventfd::{EfdFlags, EventFd};

use super::*;
use crate::device::GuestCid;
use crate::vhost_user::command::Link;
use crate::vhost_user::handover::{Record, VringRecord};
use crate::vhost_user::memory::MemoryPolicy;

/// GET_FEATURES: its reply is 20 bytes.
const ASK: [u8; HEADER_BYTES] = [1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0];
const REPLY_BYTES: usize = 20;

fn handler() -> Arc<Mutex<Handler>> {
    let (commands, _) = mpsc::sync_channel(1);
    let waker = Arc::new(EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap());
    let link = Link { commands, waker };
    let cid = GuestCid::new(3).unwrap();
    let handler = Handler::new(cid, 1024, MemoryPolicy::SealedMemfd, link);
    Arc::new(Mutex::new(handler))
}

fn handover(changes: u64, frontend: &UnixStream) -> Handover {
    let record = Record {
        changes,
        features: None,
        protocol_features: None,
        regions: vec![],
        vrings: [VringRecord::default(); 2],
        running: false,
    };
    Handover::new(&record, vec![frontend.try_clone().unwrap().into()]).unwrap()
}

/// The frontend's end, the port process's end, and the live file.
struct Torn {
    frontend: UnixStream,
    ours: UnixStream,
    live: Arc<LiveFile>,
    reply: Vec<u8>,
}

impl Torn {
    /// Stores the reply of a process that is not killed.
    fn new() -> Self {
        let (mut frontend, ours) = UnixStream::pair().unwrap();
        let live = Arc::new(LiveFile::create().unwrap());
        let mut continuity = continuity(&live);
        let socket = Apart::new(ours.try_clone().unwrap(), &Closer::shared());
        let mut intake = Intake::new(socket, handler()).unwrap();
        frontend.write_all(&ASK).unwrap();
        let control = Control::new().unwrap();
        assert!(intake.step(&control, &mut continuity).is_ok());
        let mut reply = vec![0; REPLY_BYTES];
        frontend.read_exact(&mut reply).unwrap();
        assert_eq!(live.step(), Some(Step::Idle));
        Self {
            frontend,
            ours,
            live,
            reply,
        }
    }

    /// The frontend has sent its request. The process has handled it and written the reply down.
    fn handled(&mut self, step: Step) -> Reply {
        self.frontend.write_all(&ASK).unwrap();
        let reply = self.live.write_reply(&self.reply).unwrap().unwrap();
        lseek(self.live.as_fd(), reply.at as i64, Whence::SeekSet).unwrap();
        self.live.set_step(step);
        reply
    }

    fn taken(&mut self, step: Step) -> Reply {
        let reply = self.handled(step);
        self.ours.read_exact(&mut [0; HEADER_BYTES]).unwrap();
        reply
    }

    fn sent(&self, bytes: usize) {
        let n = rustix::fs::sendfile(&self.ours, self.live.as_fd(), None, bytes).unwrap();
        assert_eq!(n, bytes);
    }

    /// A successor continues until nothing is left to read. Returns what the frontend received of the last reply; then
    /// the frontend sends one more request.
    fn succeed(mut self) -> Vec<u8> {
        let mut continuity = continuity(&self.live);
        // This must be the same open file, as after a real handover, because the offset is shared.
        let handover = handover(0, &self.ours);
        let mut intake = Intake::resume(handover, handler(), &mut continuity).unwrap();
        let control = Control::new().unwrap();
        while rustix::io::ioctl_fionread(&self.ours).unwrap() > 0 {
            assert!(intake.step(&control, &mut continuity).is_ok());
        }
        let mut got = vec![0; 4 * REPLY_BYTES];
        self.frontend.set_nonblocking(true).unwrap();
        let n = self.frontend.read(&mut got).unwrap_or(0);
        got.truncate(n);
        self.frontend.set_nonblocking(false).unwrap();
        self.frontend.write_all(&ASK).unwrap();
        assert!(intake.step(&control, &mut continuity).is_ok());
        let mut again = [0; REPLY_BYTES];
        self.frontend.read_exact(&mut again).unwrap();
        assert_eq!(again, self.reply[..]);
        assert_eq!(self.live.step(), Some(Step::Idle));
        got
    }

    fn refused(self, changes: u64) -> ResumeError {
        let mut continuity = continuity(&self.live);
        let handover = handover(changes, &self.ours);
        match Intake::resume(handover, handler(), &mut continuity) {
            Ok(_) => panic!("resumed"),
            Err(e) => e,
        }
    }
}

fn continuity(live: &Arc<LiveFile>) -> Continuity {
    Continuity {
        live: Some(live.clone()),
        keeper: None,
        changes: 0,
    }
}

#[test]
fn a_message_that_was_not_taken_is_handled_again_and_answered_once() {
    let mut torn = Torn::new();
    torn.frontend.write_all(&ASK).unwrap();
    let reply = torn.reply.clone();
    assert_eq!(torn.succeed(), reply);
    let mut torn = Torn::new();
    torn.handled(Step::Taking);
    assert_eq!(torn.succeed(), reply);
}

#[test]
fn a_reply_that_was_not_sent_is_sent() {
    for step in [Step::Taking, Step::Replying] {
        let mut torn = Torn::new();
        torn.taken(step);
        let reply = torn.reply.clone();
        assert_eq!(torn.succeed(), reply, "{step:?}");
    }
}

#[test]
fn no_part_of_a_sent_reply_is_sent_again() {
    for sent in 1..=REPLY_BYTES {
        let mut torn = Torn::new();
        torn.taken(Step::Replying);
        torn.sent(sent);
        let reply = torn.reply.clone();
        assert_eq!(torn.succeed(), reply, "{sent}");
    }
    // The frontend has the reply, and has sent its next request.
    let mut torn = Torn::new();
    torn.taken(Step::Replying);
    torn.sent(REPLY_BYTES);
    torn.frontend.read_exact(&mut [0; REPLY_BYTES]).unwrap();
    torn.frontend.write_all(&ASK).unwrap();
    let reply = torn.reply.clone();
    assert_eq!(torn.succeed(), reply);
}

#[test]
fn ambiguous_states_are_refused() {
    let mut torn = Torn::new();
    torn.taken(Step::Pieces);
    assert!(matches!(torn.refused(0), ResumeError::Pieces));

    let torn = Torn::new();
    torn.live.set_changes(7);
    assert!(matches!(torn.refused(5), ResumeError::Behind { by: 2 }));

    // One missing change is no loss if the message that made it is still in the socket.
    let mut torn = Torn::new();
    torn.handled(Step::Taking);
    torn.live.set_changes(1);
    let reply = torn.reply.clone();
    assert_eq!(torn.succeed(), reply);
    let mut torn = Torn::new();
    torn.taken(Step::Taking);
    torn.live.set_changes(1);
    assert!(matches!(torn.refused(0), ResumeError::Behind { by: 1 }));
}

#[test]
fn a_descriptor_that_is_not_a_socket_is_refused() {
    let live = Arc::new(LiveFile::create().unwrap());
    let null = std::fs::File::open("/dev/null").unwrap();
    let record = handover(0, &UnixStream::pair().unwrap().0).bytes;
    let handover = Handover {
        bytes: record,
        fds: vec![null.into()],
    };
    let resumed = Intake::resume(handover, handler(), &mut continuity(&live));
    assert!(resumed.is_err());
}
