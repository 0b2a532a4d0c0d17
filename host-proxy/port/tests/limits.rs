//! Tunnels that carry so many bytes a second, in the real `adit-port`: also when `aditd` is gone, and with other limits later.

mod guest;
mod running;

use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use adit_channel::hello::Extensions;
use adit_channel::sink::Sink;
use adit_port::control::{
    Connect, ConnectLimited, LIMITS_MAX, Limit, ListTunnels, SetLimits, Target,
};
use adit_port::control_io::{Message, send_all};
use guest::Guest;
use running::{Aditd, Running};

/// Bytes that each end of a tunnel has for the other one.
const BYTES: usize = 200_000;

/// A tunnel from end to end, each of which says [`BYTES`].
struct Tunnel {
    near: UnixStream,
    far: UnixStream,
    /// What each has said, and has heard.
    moved: [(usize, usize); 2],
}

fn pair() -> (UnixStream, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    (ours, theirs)
}

fn limit(key: u8, bytes_per_s: u64) -> Limit {
    let key = [key; 16];
    Limit { key, bytes_per_s }
}

impl Tunnel {
    fn open(aditd: &Aditd, guest: &mut Guest, id: u64, limits: Vec<Limit>) -> Self {
        let (near, passed) = pair();
        let (far, sink) = pair();
        let connect = Connect {
            id,
            to: Target::VsockPort(22),
            deadline_ms: 5000,
            extensions: Extensions::default(),
            prefix: Vec::new(),
            greeting: Vec::new(),
        };
        let limited = ConnectLimited {
            connect,
            tag: Some(vec![1]),
            note: None,
            limits,
        };
        let message = Message::ConnectLimited(limited);
        send_all(&aditd.0, &message, &[passed.as_fd()]).unwrap();
        guest.accept(Sink::Fd(sink.into()));
        let (message, _) = guest.until(|_| aditd.heard());
        assert!(matches!(message, Message::Dialed(d) if d.id == id));
        let moved = [(0, 0); 2];
        Self { near, far, moved }
    }

    /// Moves what can move now. Returns true when each has heard everything.
    fn go(&mut self) -> bool {
        for ((said, heard), (to, from)) in self
            .moved
            .iter_mut()
            .zip([(&self.near, &self.far), (&self.far, &self.near)])
        {
            let more = vec![7; (BYTES - *said).min(8192)];
            match { to }.write(&more) {
                Ok(n) => *said += n,
                Err(e) => assert_eq!(e.kind(), ErrorKind::WouldBlock),
            }
            match { from }.read(&mut [0; 9001]) {
                Ok(n) => *heard += n,
                Err(e) => assert_eq!(e.kind(), ErrorKind::WouldBlock),
            }
        }
        self.moved.iter().all(|(_, heard)| *heard == BYTES)
    }

    fn heard(&self) -> [usize; 2] {
        self.moved.map(|(_, heard)| heard)
    }
}

fn started() -> (Running, Aditd, Guest) {
    let mut running = Running::start();
    let aditd = running.connect();
    let guest = running.boot(&[22]);
    aditd.wait_status(|s| s.session);
    (running, aditd, guest)
}

#[test]
fn r110_a_tunnel_keeps_its_rate_when_aditd_has_gone_and_the_next_one_may_change_it() {
    let (mut running, aditd, mut guest) = started();
    let begin = Instant::now();
    // Two of one caller, one of another, and one of whom nothing is said.
    let mut slow = Tunnel::open(
        &aditd,
        &mut guest,
        1,
        vec![limit(1, 1024), limit(0, 1 << 30)],
    );
    let mut same = Tunnel::open(
        &aditd,
        &mut guest,
        2,
        vec![limit(1, 1024), limit(0, 1 << 30)],
    );
    let mut other = Tunnel::open(&aditd, &mut guest, 3, vec![limit(2, 1 << 30)]);
    let mut free = Tunnel::open(&aditd, &mut guest, 4, vec![]);
    drop(aditd);
    guest.until(|_| {
        let _ = (slow.go(), same.go());
        (other.go() & free.go()).then_some(())
    });
    // However long that was: what the rate lets through, a second ahead, and a chunk of each.
    let most = 1024 * (begin.elapsed().as_secs() as usize + 4);
    let both = std::iter::zip(slow.heard(), same.heard()).map(|(a, b)| a + b);
    let both: Vec<_> = both.collect();
    assert!(
        both.iter().all(|n| (1..=most).contains(n)),
        "{both:?} of {most}"
    );

    let aditd = running.connect();
    aditd.say(Message::ListTunnels(ListTunnels { after: 0 }), None);
    let (message, _) = guest.until(|_| aditd.heard());
    let Message::Tunnels(page) = message else {
        panic!("{message:?}")
    };
    let numbers: Vec<_> = page.tunnels.iter().map(|(number, _)| *number).collect();
    assert_eq!(numbers, [1, 2, 3, 4]);
    // One has none any more, the other a higher one, and nobody minds one that is not there.
    let tunnels = vec![(1, vec![]), (2, vec![limit(1, 1 << 30)]), (99, vec![])];
    aditd.say(Message::SetLimits(SetLimits { tunnels }), None);
    guest.until(|_| (slow.go() & same.go()).then_some(()));
}

#[test]
fn r53_more_limits_than_there_may_be_end_the_connection() {
    let (mut running, aditd, mut guest) = started();
    let mut tunnel = Tunnel::open(&aditd, &mut guest, 1, vec![limit(1, 1 << 20); LIMITS_MAX]);
    let tunnels = vec![(1, vec![limit(1, 1024); LIMITS_MAX + 1])];
    aditd.say(Message::SetLimits(SetLimits { tunnels }), None);
    while adit_port::control_io::receive(&aditd.0).unwrap().is_some() {}
    // The tunnel is as it was.
    let _aditd = running.connect();
    guest.until(|_| tunnel.go().then_some(()));
}
