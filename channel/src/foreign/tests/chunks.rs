//! Streams whose ends are carried by chunks, because their VMM does not keep half-closes.

use super::*;
use crate::hello::{Accept, CHUNKS, Common, Hello, Open};

const END: [u8; 4] = [2, 0, 0, 0];
const ABORT: [u8; 4] = [3, 0, 0, 0];

fn chunk(payload: &[u8]) -> Vec<u8> {
    let [a, b, c, _] = (payload.len() as u32).to_le_bytes();
    [&[1, a, b, c], payload].concat()
}

pub(super) fn accept(features: u64) -> Vec<u8> {
    let common = Common {
        features,
        ..Common::default()
    };
    Hello::Accept(Accept { common, version: 1 }).encode()
}

impl World {
    /// A stream to the agent, and the VMM's end of it when the hello has arrived there.
    pub(super) fn dial_agent(&mut self) -> (StreamId, UnixStream) {
        let common = Common {
            features: self.carrier().hello_features(),
            ..Common::default()
        };
        let hello = Open::new("tcp:80".parse().unwrap(), common);
        let len = Hello::Open(hello.clone()).encode().len();
        let request = DialRequest {
            port: hello::PORT,
            hello: Some(hello),
            deadline: None,
            lane: Lane::Bulk,
        };
        let now = self.shard.now();
        let port = self.shard.port_mut(HERE);
        let stream = port.dial(now, request, None).unwrap();
        let ticket = self.ticket(hello::PORT);
        let (ours, mut vmm) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        vmm.set_nonblocking(true).unwrap();
        let socket = ours.into();
        self.news(DoorNews::Dialed { ticket, socket });
        vmm.write_all(b"OK 1\n").unwrap();
        let said = self.read(&mut vmm, len);
        assert!(said.starts_with(b"ADIT"));
        (stream, vmm)
    }

    /// Gives a stream its sink when its hello is answered.
    #[track_caller]
    pub(super) fn attached(&mut self, stream: StreamId) -> UnixStream {
        self.until(|w| {
            let is_it = |n: &Notice| matches!(n, Notice::Dialed { stream: s, .. } if *s == stream);
            w.heard.iter().any(is_it)
        });
        let (app, sink) = UnixStream::pair().unwrap();
        app.set_nonblocking(true).unwrap();
        sink.set_nonblocking(!self.blocking).unwrap();
        let now = self.shard.now();
        let port = self.shard.port_mut(HERE);
        assert!(port.attach(now, stream, Sink::Fd(sink.into()), &[]));
        app
    }

    /// An open stream in chunks.
    fn chunked(&mut self) -> (UnixStream, UnixStream) {
        let (stream, mut vmm) = self.dial_agent();
        vmm.write_all(&accept(CHUNKS)).unwrap();
        (self.attached(stream), vmm)
    }

    /// Everything up to the end of a socket's bytes, or to its reset.
    pub(super) fn rest(&mut self, of: &mut UnixStream) -> (Vec<u8>, bool) {
        let (mut bytes, mut reset) = (Vec::new(), false);
        self.until(|_| {
            let mut chunk = [0; 70_000];
            match of.read(&mut chunk) {
                Ok(0) => return true,
                Ok(n) => bytes.extend(&chunk[..n]),
                Err(e) if e.kind() == ErrorKind::WouldBlock => {}
                Err(_) => reset = true,
            }
            reset
        });
        (bytes, reset)
    }

    pub(super) fn reason(&self) -> Option<Option<adit_engine::ResetReason>> {
        self.heard.iter().find_map(|n| match n {
            Notice::Closed { reason, .. } => Some(*reason),
            _ => None,
        })
    }
}

fn closing() -> World {
    World::with(Options::default())
}

#[test]
fn chunks_are_offered_only_where_the_vmm_does_not_keep_half_closes() {
    assert_eq!(closing().carrier().hello_features(), CHUNKS);
    assert_eq!(World::new().carrier().hello_features(), 0);
}

#[test]
fn r117_each_end_arrives_while_the_other_direction_goes_on() {
    // The client's first, then the guest's, and the other way round.
    for client_first in [true, false] {
        let mut world = closing();
        let (mut app, mut vmm) = world.chunked();
        if client_first {
            app.write_all(b"question").unwrap();
            app.shutdown(Shutdown::Write).unwrap();
            let want = [chunk(b"question"), END.to_vec()].concat();
            assert_eq!(world.read(&mut vmm, want.len()), want);
            world.settle();
            // The VMM sees no end of the socket, which it would take for one of both directions.
            assert_eq!(
                vmm.read(&mut [0]).unwrap_err().kind(),
                ErrorKind::WouldBlock
            );
            vmm.write_all(&chunk(b"answer")).unwrap();
            assert_eq!(world.read(&mut app, 6), b"answer");
            vmm.write_all(&[chunk(b"last"), END.to_vec()].concat())
                .unwrap();
            assert_eq!(world.rest(&mut app), (b"last".to_vec(), false));
        } else {
            vmm.write_all(&[chunk(b"banner"), END.to_vec()].concat())
                .unwrap();
            assert_eq!(world.rest(&mut app), (b"banner".to_vec(), false));
            app.write_all(b"still").unwrap();
            assert_eq!(world.read(&mut vmm, 9), chunk(b"still"));
            app.shutdown(Shutdown::Write).unwrap();
            assert_eq!(world.read(&mut vmm, 4), END);
        }
        // Both have ended, so the socket is closed.
        world.end(&mut vmm);
        drop(vmm);
        world.gone();
        assert_eq!(world.reason(), Some(None));
    }
}

#[test]
fn an_agent_that_knows_no_chunks_is_served_as_before() {
    let mut world = closing();
    let (stream, mut vmm) = world.dial_agent();
    vmm.write_all(&accept(0)).unwrap();
    let mut app = world.attached(stream);
    vmm.write_all(b"plain").unwrap();
    assert_eq!(world.read(&mut app, 5), b"plain");
    app.write_all(b"bytes").unwrap();
    assert_eq!(world.read(&mut vmm, 5), b"bytes");
    // Nor is a port without hellos, whatever its bytes are.
    let (mut app, mut vmm) = world.open();
    vmm.write_all(&accept(CHUNKS)).unwrap();
    vmm.write_all(&END).unwrap();
    let want = [accept(CHUNKS), END.to_vec()].concat();
    assert_eq!(world.read(&mut app, want.len()), want);
}

#[test]
fn r117_what_is_broken_off_is_told_apart_from_what_has_ended() {
    let whole = [chunk(b"half"), chunk(b" of it"), END.to_vec()].concat();
    for cut in 0..whole.len() {
        let mut world = closing();
        let (mut app, mut vmm) = world.chunked();
        vmm.write_all(&whole[..cut]).unwrap();
        drop(vmm);
        let (bytes, _) = world.rest(&mut app);
        assert!(b"half of it".starts_with(&bytes[..]), "{cut}");
        // A Unix socket shows it by taking nothing any more.
        assert!(app.write(b"x").is_err(), "{cut}");
        world.gone();
        assert!(world.reason().unwrap().is_some(), "{cut}");
    }
    // An abort, garbage, and more behind the end.
    for last in [
        &ABORT[..],
        &[0; 4],
        b"SSH-2.0-x\r\n",
        &[1, 0, 0, 0],
        &[1, 1, 0, 2],
        &[2, 0, 0, 0, 1, 1, 0, 0, 9],
        &[2, 0, 0, 0, 3, 0, 0, 0],
    ] {
        let mut world = closing();
        let (mut other, mut far) = world.chunked();
        let (mut app, mut vmm) = world.chunked();
        vmm.write_all(&[&chunk(b"half"), last].concat()).unwrap();
        assert_eq!(world.rest(&mut app).0, b"half");
        world.until(|w| w.carrier().streams() == 1);
        world.end(&mut vmm);
        assert!(world.reason().unwrap().is_some(), "{last:?}");
        // The one beside it has noticed nothing.
        other.write_all(b"on").unwrap();
        assert_eq!(world.read(&mut far, 6), chunk(b"on"));
    }
}

#[test]
fn r117_a_client_that_breaks_off_is_no_end_for_the_guest() {
    let mut world = closing();
    let (mut app, mut vmm) = world.chunked();
    app.write_all(b"half").unwrap();
    assert_eq!(world.read(&mut vmm, 8), chunk(b"half"));
    drop(app);
    assert_eq!(world.rest(&mut vmm).0, ABORT);
    drop(vmm);
    world.gone();
    // After its end, too: the guest's next write fails.
    let (app, mut vmm) = world.chunked();
    app.shutdown(Shutdown::Write).unwrap();
    assert_eq!(world.read(&mut vmm, 4), END);
    drop(app);
    world.until(|_| vmm.write(&chunk(b"x")).is_err());
    drop(vmm);
    world.gone();
}

#[test]
fn a_guest_that_closes_behind_its_end_takes_no_more() {
    let mut world = closing();
    let (mut app, mut vmm) = world.chunked();
    vmm.write_all(&[chunk(b"all"), END.to_vec()].concat())
        .unwrap();
    assert_eq!(world.rest(&mut app), (b"all".to_vec(), false));
    drop(vmm);
    world.until(|_| app.write(b"x").is_err());
    drop(app);
    world.gone();
    assert_eq!(world.reason(), Some(None));
}

#[test]
fn every_byte_goes_both_ways_in_odd_pieces_and_past_full_sockets() {
    for blocking in [false, true] {
        every_byte_goes_both_ways(blocking);
    }
}

fn every_byte_goes_both_ways(blocking: bool) {
    const TOTAL: usize = 3 << 20;
    let pattern = |at: usize| (at % 251) as u8;
    let mut world = closing();
    world.blocking = blocking;
    let (mut app, mut vmm) = world.chunked();
    // To the guest, whose side does not read at first.
    let (mut writer, mut reader) = (
        crate::chunk::Writer::default(),
        crate::chunk::Reader::default(),
    );
    let (mut sent, mut got, mut stalled) = (0, 0, 0);
    while got < TOTAL {
        let piece: Vec<u8> = (sent..TOTAL.min(sent + 50_001)).map(pattern).collect();
        match app.write(&piece) {
            Ok(n) if n > 0 => sent += n,
            _ => stalled += 1,
        }
        world.turn();
        let waiting = world.carrier().links.iter().flatten();
        assert!(waiting.map(Link::waits).all(|n| n <= WINDOW as usize));
        if stalled > 200 {
            let mut bytes = [0; 40_003];
            let n = vmm.read(&mut bytes).unwrap_or(0);
            let (n, outcome) = reader.unwrap(&mut bytes[..n]);
            assert_eq!(outcome, Ok(()));
            assert!(
                bytes[..n]
                    .iter()
                    .zip(got..)
                    .all(|(b, at)| *b == pattern(at))
            );
            got += n;
        }
    }
    // And back.
    let data: Vec<u8> = (0..TOTAL).map(pattern).collect();
    let (mut sent, mut got, mut turn) = (0, 0, 0);
    while got < TOTAL {
        turn += 1;
        let most = [1, 9, 4096, 65_536, 70_000][turn % 5];
        let (head, n) = writer.next((TOTAL - sent).min(most));
        let bytes = [head, &data[sent..sent + n]].concat();
        if let Ok(n) = vmm.write(&bytes) {
            sent += writer.sent(n);
        }
        world.turn();
        let mut bytes = [0; 33_333];
        let n = app.read(&mut bytes).unwrap_or(0);
        assert!(
            bytes[..n]
                .iter()
                .zip(got..)
                .all(|(b, at)| *b == pattern(at))
        );
        got += n;
    }
    drop((app, vmm));
    world.gone();
}
