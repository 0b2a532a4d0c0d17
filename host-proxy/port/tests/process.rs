//! The real `adit-port` binary in its sandbox: a test is `aditd` on its control socket, and a software guest is behind its
//! vhost-user socket.

mod guest;
mod running;

use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::process::Stdio;
use std::time::Duration;

use adit_channel::dial::DialRequest;
use adit_channel::hello::{self, Accept, Common, Hello};
use adit_channel::port::Notice;
use adit_channel::sink::Sink;
use adit_port::control::{
    Cancel, Dial, DialError, Incoming, PACKET_MAX, Quit, Target, VHOST_SOCKET,
};
use adit_port::control_io::{Message, receive};
use guest::Guest;
use nix::sys::socket::MsgFlags;
use running::{Aditd, CID, Running, command};
use vhost::vhost_user::message::{
    VhostUserHeaderFlag, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo};

fn socket() -> (UnixStream, Sink) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    (ours, Sink::Fd(theirs.into()))
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len as u32)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8)
        .collect()
}

/// Moves `data` from one socket to the other while the guest runs.
fn carry(guest: &mut Guest, to: &UnixStream, from: &UnixStream, data: &[u8]) {
    let (mut sent, mut got) = (0, Vec::new());
    guest.until(|_| {
        sent += { to }.write(&data[sent..]).unwrap_or(0);
        let mut buf = [0; 9001];
        while let Ok(n @ 1..) = { from }.read(&mut buf) {
            got.extend_from_slice(&buf[..n]);
        }
        (got.len() >= data.len()).then_some(())
    });
    assert!(got == data);
}

fn read_end(guest: &mut Guest, from: &UnixStream) -> Vec<u8> {
    let mut got = Vec::new();
    guest.until(|_| {
        let mut buf = [0; 4096];
        match { from }.read(&mut buf) {
            Ok(0) => return Some(()),
            Ok(n) => got.extend_from_slice(&buf[..n]),
            Err(e) => assert_eq!(e.kind(), io::ErrorKind::WouldBlock),
        }
        None
    });
    got
}

/// Dials a plain port and attaches a socket on each side.
fn tunnel(aditd: &Aditd, guest: &mut Guest, id: u64) -> (UnixStream, UnixStream) {
    aditd.dial(id, Target::VsockPort(22));
    let (far, sink) = socket();
    guest.accept(sink);
    let (message, _) = guest.until(|_| aditd.heard());
    assert!(matches!(message, Message::Dialed(d) if d.id == id));
    (aditd.attach(id, b""), far)
}

#[test]
fn it_starts_in_its_sandbox_and_sends_its_status() {
    let mut running = Running::start();
    let aditd = running.connect();
    let status = aditd.wait_status(|_| true);
    assert_eq!(
        (status.vm.as_str(), status.cid, status.session),
        ("web-1", CID, false)
    );
    assert_eq!(status.pid, running.child.id());
    assert_eq!(running.status("Seccomp"), 2);
    assert_eq!(running.status("NoNewPrivs"), 1);
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", status.pid)).unwrap();
    let files = limits.lines().find(|l| l.starts_with("Max open files"));
    let files: Vec<&str> = files.unwrap().split_whitespace().collect();
    assert_eq!(files[3], files[4]);
    let rss = running.status("RssAnon");
    println!("RssAnon idle: {rss} KiB");
    let limit = if cfg!(debug_assertions) { 4096 } else { 2048 };
    assert!(rss <= limit, "{rss} KiB");
}

#[test]
fn a_second_process_in_the_same_directory_is_refused_and_a_killed_one_is_replaced() {
    let mut running = Running::start();
    running.connect();
    let second = command(&running.dir)
        .stderr(Stdio::piped())
        .output()
        .unwrap();
    assert!(!second.status.success());
    let text = String::from_utf8(second.stderr).unwrap();
    assert!(text.contains("already running"), "{text}");
    running.child.kill().unwrap();
    running.child.wait().unwrap();
    running.child = command(&running.dir).spawn().unwrap();
    running.connect().wait_status(|_| true);
}

#[test]
fn quit_and_sigterm_end_it_with_success() {
    let mut running = Running::start();
    let aditd = running.connect();
    aditd.wait_status(|_| true);
    aditd.say(Message::Quit(Quit {}), None);
    assert!(running.ended().success());
    let mut running = Running::start();
    running.connect().wait_status(|_| true);
    let pid = nix::unistd::Pid::from_raw(running.child.id() as i32);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    assert!(running.ended().success());
}

#[test]
fn an_error_that_cannot_be_written_is_an_exit_status_and_no_panic() {
    let mut running = Running::start();
    running.connect();
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full");
    // Its place is taken.
    let mut second = command(&running.dir);
    let status = second.stderr(full.unwrap()).status().unwrap();
    assert_eq!(status.code(), Some(1));
}

#[test]
fn sighup_is_for_aditd_and_does_not_end_it() {
    let mut running = Running::start();
    let aditd = running.connect();
    aditd.wait_status(|_| true);
    let pid = nix::unistd::Pid::from_raw(running.child.id() as i32);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGHUP).unwrap();
    aditd.say(Message::Quit(Quit {}), None);
    assert!(running.ended().success());
}

#[test]
fn a_dial_without_a_guest_fails_at_once() {
    let mut running = Running::start();
    let aditd = running.connect();
    aditd.dial(1, Target::Service("tcp:80".parse().unwrap()));
    let failed = loop {
        if let (Message::DialFailed(failed), _) = receive(&aditd.0).unwrap().unwrap() {
            break failed;
        }
    };
    assert_eq!((failed.id, failed.error), (1, DialError::NoSession));
}

#[test]
fn r53_a_truncated_or_forbidden_frame_ends_its_connection_only() {
    let mut running = Running::start();
    let aditd = running.connect();
    let mut guest = running.boot(&[22]);
    aditd.wait_status(|s| s.session);
    let (near, far) = tunnel(&aditd, &mut guest, 1);
    drop(aditd);
    let dial = Message::Dial(Dial {
        id: 9,
        to: Target::VsockPort(22),
        deadline_ms: 5000,
    });
    let dial = dial.encode().unwrap();
    let mut wrong: Vec<Vec<u8>> = (0..dial.len()).map(|cut| dial[..cut].to_vec()).collect();
    wrong.extend([
        b"not a frame at all".to_vec(),
        vec![0; 64],
        [&dial[..], &[0]].concat(),
        vec![b'a'; PACKET_MAX + 1],
    ]);
    for bytes in wrong {
        let aditd = running.connect();
        // The kernel reports an empty packet like the end of the connection.
        nix::sys::socket::send(aditd.0.as_raw_fd(), &bytes, MsgFlags::empty()).unwrap();
        let end = loop {
            match receive(&aditd.0) {
                Ok(Some((
                    Message::Status(_)
                    | Message::Features(_)
                    | Message::Handover(_)
                    | Message::Ring(_),
                    _,
                ))) => {}
                other => break other.map_err(|e| e.to_string()),
            }
        };
        assert!(matches!(end, Ok(None)), "{} bytes: {end:?}", bytes.len());
        // The tunnel is unaffected.
        carry(&mut guest, &near, &far, b"still there");
    }
    // The kernel refuses to send a megabyte in one packet.
    let aditd = running.connect();
    let sent = nix::sys::socket::send(aditd.0.as_raw_fd(), &[b'a'; 1 << 20], MsgFlags::empty());
    assert_eq!(sent, Err(nix::errno::Errno::EMSGSIZE));
    let (near, far) = tunnel(&aditd, &mut guest, 2);
    carry(&mut guest, &near, &far, b"the next request");
}

#[test]
fn r49_a_tunnel_carries_bytes_and_half_closes_in_both_directions_and_outlives_aditd() {
    let mut running = Running::start();
    let aditd = running.connect();
    let mut guest = running.boot(&[22]);
    aditd.wait_status(|s| s.session);
    let (near, far) = tunnel(&aditd, &mut guest, 1);
    let data = pattern(1 << 20);
    carry(&mut guest, &near, &far, &data);
    carry(&mut guest, &far, &near, &data);
    // aditd ends and another one connects; the tunnel is unaffected.
    drop(aditd);
    let aditd = running.connect();
    let status = guest.until(|_| {
        let (message, _) = receive(&aditd.0).unwrap()?;
        match message {
            Message::Status(status) if status.streams == 1 => Some(status),
            _ => None,
        }
    });
    assert!(status.bytes.0 >= 1 << 20 && status.bytes.1 >= 1 << 20);
    near.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(read_end(&mut guest, &far), b"");
    carry(&mut guest, &far, &near, &data);
    drop(far);
    assert_eq!(read_end(&mut guest, &near), b"");
    let (near, far) = tunnel(&aditd, &mut guest, 1);
    carry(&mut guest, &near, &far, b"again");
}

/// Frames that aditd sent before it was killed still count, also if it had not read everything itself, and if the next aditd is
/// connecting already.
#[test]
fn frames_that_aditd_sent_before_it_was_killed_are_handled() {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use nix::sys::signal::{Signal, kill};
    use std::os::fd::AsFd;
    let mut running = Running::start();
    let pid = nix::unistd::Pid::from_raw(running.child.id() as i32);
    drop(running.connect());
    let mut guest = running.boot(&[22]);
    for next_knocks in [false, true] {
        let aditd = running.connect();
        aditd.wait_status(|s| s.session);
        aditd.dial(1, Target::VsockPort(22));
        let (far, sink) = socket();
        guest.accept(sink);
        let (message, _) = guest.until(|_| aditd.heard());
        assert!(matches!(message, Message::Dialed(d) if d.id == 1));
        // The answer to another dial stays unread.
        aditd.dial(2, Target::VsockPort(22));
        guest.accept(socket().1);
        guest.until(|_| {
            let mut fds = [PollFd::new(aditd.0.as_fd(), PollFlags::POLLIN)];
            (poll(&mut fds, PollTimeout::ZERO) == Ok(1)).then_some(())
        });
        // Stop the process, so that it reads only after aditd has sent everything and ended.
        kill(pid, Signal::SIGSTOP).unwrap();
        let near = aditd.attach(1, b"");
        drop(aditd);
        let next = next_knocks.then(|| running.connect());
        kill(pid, Signal::SIGCONT).unwrap();
        carry(&mut guest, &near, &far, b"its last word");
        carry(&mut guest, &far, &near, b"and the answer");
        drop(next);
    }
}

#[test]
fn r55_a_stopped_reader_does_not_stop_other_tunnels() {
    let mut running = Running::start();
    let aditd = running.connect();
    let mut guest = running.boot(&[22]);
    aditd.wait_status(|s| s.session);
    let (stuck, unread) = tunnel(&aditd, &mut guest, 1);
    let (near, far) = tunnel(&aditd, &mut guest, 2);
    let data = pattern(1 << 20);
    // In both directions: nobody reads `stuck`, and nobody reads `unread`.
    for (id, end) in [(3, &stuck), (4, &unread)] {
        let mut quiet = 0;
        guest.until(|_| {
            quiet = match { end }.write(&data) {
                Ok(_) => 0,
                Err(_) => quiet + 1,
            };
            (quiet > 50).then_some(())
        });
        carry(&mut guest, &near, &far, &data);
        carry(&mut guest, &far, &near, &data);
        let (near, far) = tunnel(&aditd, &mut guest, id);
        carry(&mut guest, &far, &near, &data);
    }
}

#[test]
fn a_service_is_reached_through_its_hello() {
    let mut running = Running::start();
    let aditd = running.connect();
    let mut guest = running.boot(&[hello::PORT]);
    aditd.wait_status(|s| s.session);
    aditd.dial(9, Target::Service("tcp:80".parse().unwrap()));
    let (far, sink) = socket();
    guest.accept(sink);
    let mut asked = Vec::new();
    let open = guest.until(|_| {
        let mut buf = [0; 256];
        let n = { &far }.read(&mut buf).unwrap_or(0);
        asked.extend_from_slice(&buf[..n]);
        hello::read(&mut &asked[..]).ok()
    });
    assert!(matches!(open, Hello::Open(o) if o.service.as_str() == "tcp:80"));
    let common = Common {
        boot_nonce: [3; 16],
        ..Common::default()
    };
    let accept = Hello::Accept(Accept { common, version: 1 }).encode();
    { &far }.write_all(&accept).unwrap();
    { &far }.write_all(b"banner").unwrap();
    let (message, _) = guest.until(|_| aditd.heard());
    assert!(matches!(message, Message::Dialed(d) if d.boot_nonce == [3; 16]));
    let near = aditd.attach(9, b"GET / ");
    near.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(read_end(&mut guest, &far), b"GET / ");
    drop(far);
    assert_eq!(read_end(&mut guest, &near), b"banner");
}

#[test]
fn dials_that_aditd_never_attached_are_reset_when_it_ends() {
    let mut running = Running::start();
    let aditd = running.connect();
    let mut guest = running.boot(&[22]);
    aditd.wait_status(|s| s.session);
    for cancelled in [true, false] {
        aditd.dial(1, Target::VsockPort(22));
        let (far, sink) = socket();
        guest.accept(sink);
        guest.until(|_| aditd.heard());
        match cancelled {
            true => aditd.say(Message::Cancel(Cancel { id: 1 }), None),
            // A newer connection replaces this one.
            false => drop(running.connect()),
        }
        guest.until(|g| {
            let at = g.heard.iter().position(|n| {
                matches!(
                    n,
                    Notice::Closed {
                        reason: Some(_),
                        ..
                    }
                )
            })?;
            g.heard.remove(at);
            Some(())
        });
        drop(far);
    }
}

#[test]
fn the_guests_dial_reaches_aditd_and_is_refused_without_aditd() {
    let mut running = Running::start();
    let aditd = running.connect();
    let mut guest = running.boot(&[]);
    aditd.wait_status(|s| s.session);
    guest.until(|g| g.shard.port(g.port).epoch());
    let dial = |guest: &mut Guest, port| {
        let request = DialRequest {
            port,
            hello: None,
            deadline: None,
            lane: adit_engine::Lane::Bulk,
        };
        let now = guest.shard.now();
        let (end, sink) = socket();
        let port = guest.shard.port_mut(guest.port);
        (port.dial(now, request, Some(sink)).unwrap(), end)
    };
    let (_, end) = dial(&mut guest, hello::PORT);
    let (message, fd) = guest.until(|_| aditd.heard());
    let Message::Incoming(Incoming { port, .. }) = message else {
        panic!("{message:?}");
    };
    assert_eq!(port, hello::PORT);
    let served = UnixStream::from(fd.unwrap());
    served.set_nonblocking(true).unwrap();
    let data = pattern(300_000);
    carry(&mut guest, &end, &served, &data);
    carry(&mut guest, &served, &end, &data);
    // A port that aditd does not serve, and then a served port without aditd.
    let (_, other) = dial(&mut guest, 80);
    assert_eq!(read_end(&mut guest, &other), b"");
    drop(aditd);
    let (_, end) = dial(&mut guest, hello::PORT);
    assert_eq!(read_end(&mut guest, &end), b"");
}

#[test]
fn an_idle_process_does_not_wake_up() {
    let mut running = Running::start();
    let aditd = running.connect();
    let mut guest = running.boot(&[22]);
    aditd.wait_status(|s| s.session);
    let (near, far) = tunnel(&aditd, &mut guest, 1);
    carry(&mut guest, &near, &far, b"x");
    // How many streams there are is said once more after a while, if it has changed.
    aditd.wait_status(|s| s.streams == 1);
    // Wait until the guest has been quiet for a moment: the last bytes still cause a credit update.
    for _ in 0..50 {
        guest.shard.turn(Some(Duration::from_millis(1))).unwrap();
    }
    let before = running.status("voluntary_ctxt_switches");
    for _ in 0..200 {
        guest.shard.turn(Some(Duration::from_millis(1))).unwrap();
    }
    assert_eq!(running.status("voluntary_ctxt_switches"), before);
}

/// Offers a plain file as guest memory (`memory-backend-file,share=on`). Returns whether it is accepted.
fn offer_file(running: &Running) -> bool {
    let file = tempfile::tempfile().unwrap();
    file.set_len(1 << 20).unwrap();
    let mut frontend = Frontend::connect(running.dir.join(VHOST_SOCKET), 2).unwrap();
    frontend.set_owner().unwrap();
    let protocol = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
    frontend.get_features().unwrap();
    frontend.set_features(protocol).unwrap();
    let ack = frontend.get_protocol_features().unwrap() & VhostUserProtocolFeatures::REPLY_ACK;
    frontend.set_protocol_features(ack).unwrap();
    frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    let region = VhostUserMemoryRegionInfo {
        guest_phys_addr: 0,
        memory_size: 1 << 20,
        userspace_addr: 0x7000_0000_0000,
        mmap_offset: 0,
        mmap_handle: file.as_raw_fd(),
    };
    frontend.set_mem_table(&[region]).is_ok()
}

#[test]
fn memory_from_a_file_is_refused_with_a_hint_and_accepted_if_allowed() {
    let mut running = Running::start();
    let aditd = running.connect();
    assert!(!offer_file(&running));
    let said = aditd.wait_status(|s| !s.last_fault.is_empty()).last_fault;
    assert!(said.contains("allow_any_memory = true"), "{said}");
    // Once a VMM is served, the fault is cleared.
    let _guest = running.boot(&[]);
    aditd.wait_status(|s| s.session && s.last_fault.is_empty());

    running.child.kill().unwrap();
    running.ended();
    running.child = command(&running.dir)
        .arg("--allow-any-memory")
        .spawn()
        .unwrap();
    let aditd = running.connect();
    assert!(offer_file(&running));
    assert_eq!(aditd.wait_status(|_| true).last_fault, "");
}

/// One descriptor is reserved for `aditd`: it can connect again and again when no other is left.
#[test]
fn aditd_can_connect_when_no_descriptor_is_left() {
    let mut running = Running::start();
    let aditd = running.connect();
    aditd.wait_status(|_| true);
    let numbers = || {
        let dir = std::fs::read_dir(format!("/proc/{}/fd", running.child.id())).unwrap();
        let names = dir.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.map(|n| n.parse().unwrap()).collect::<Vec<u32>>()
    };
    let connected = numbers().len();
    drop(aditd);
    let end = std::time::Instant::now() + Duration::from_secs(30);
    while numbers().len() == connected {
        assert!(std::time::Instant::now() < end);
        std::thread::yield_now();
    }
    // Set the limit so that no further descriptor can be opened.
    let numbers = numbers();
    let free = (0..).find(|n| !numbers.contains(n)).unwrap();
    let mut limit = std::process::Command::new("prlimit");
    limit.arg(format!("--pid={}", running.child.id()));
    match limit.arg(format!("--nofile={free}:")).status() {
        Ok(done) => assert!(done.success()),
        Err(e) => return println!("skipped: no prlimit: {e}"),
    }
    let mut before = None;
    for _ in 0..3 {
        // The previous connection is still open when the next one comes.
        before = Some(running.connect());
        before.iter().for_each(|a| drop(a.wait_status(|_| true)));
    }
    drop(before);
}
