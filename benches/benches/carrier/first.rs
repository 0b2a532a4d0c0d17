//! The first 64 KiB of a new stream, compared with the same on a stream that is warm.
//!
//! ```text
//! near: dial ─ REQUEST ─► far      near: 64 KiB ───► far          repeated until the stream is warm, then the next stream
//!       opened ◄ RESPONSE ─           done ◄ 8 bytes ─
//!       ├──────── first, from its opening ────────┤
//! ├────── first, from the dial ───────────────────┤
//! ```

use std::sync::{Arc, Mutex};
use std::time::Instant;

use adit_benches::duel::{self, Home, stamp};
use adit_channel::dial::DialRequest;
use adit_channel::port::Notice;
use adit_channel::shard::News;
use adit_channel::sink::{Service, ServiceEvent, Sink, StreamIo};
use adit_engine::Lane;

use super::BULK;
use super::streams::{PORT, Pieces, Side, TURN_MAX, sides};

/// Streams of one measurement.
const STREAMS: usize = 400;
/// Messages on each stream. The last one counts as warm: the window has grown by then.
const MESSAGES: usize = 24;

/// When things happened on the near side.
struct Times {
    dialled: Instant,
    began: Instant,
    from_dial: Vec<f64>,
    from_open: Vec<f64>,
    warm: Vec<f64>,
}

impl Times {
    fn new() -> Self {
        Self {
            dialled: Instant::now(),
            began: Instant::now(),
            from_dial: Vec::new(),
            from_open: Vec::new(),
            warm: Vec::new(),
        }
    }
}

/// Sends a message, waits for the answer, and repeats.
struct Sender {
    message: Vec<u8>,
    sent: usize,
    answered: usize,
    times: Arc<Mutex<Times>>,
}

impl Service for Sender {
    fn on_event(&mut self, event: ServiceEvent<'_>, io: &mut StreamIo<'_>) {
        let mut times = self.times.lock().expect("one thread");
        match event {
            ServiceEvent::Opened => times.began = Instant::now(),
            ServiceEvent::Data(answer) => {
                io.take(answer.len());
                let now = Instant::now();
                let ns = |begin: Instant| (now - begin).as_nanos() as f64;
                if self.answered == 0 {
                    let (dial, open) = (ns(times.dialled), ns(times.began));
                    times.from_dial.push(dial);
                    times.from_open.push(open);
                }
                self.answered += 1;
                if self.answered == MESSAGES {
                    let warm = ns(times.began);
                    times.warm.push(warm);
                    return io.finish();
                }
                times.began = now;
            }
            ServiceEvent::Writable if self.sent == self.answered && io.straight() > 0 => {
                stamp(&mut self.message, self.sent);
                io.write(&self.message);
                self.sent += 1;
                return;
            }
            ServiceEvent::Writable | ServiceEvent::PeerDone => return,
        }
        io.ask();
    }
}

/// Answers each message when it is complete.
struct Answerer(Pieces);

impl Service for Answerer {
    fn on_event(&mut self, event: ServiceEvent<'_>, io: &mut StreamIo<'_>) {
        match event {
            ServiceEvent::Data(mut bytes) => {
                io.take(bytes.len());
                while self.0.completes(&mut bytes) {
                    io.write(&self.0.got.to_le_bytes());
                }
            }
            ServiceEvent::PeerDone => io.finish(),
            ServiceEvent::Opened | ServiceEvent::Writable => {}
        }
    }
}

fn run_near((mut shard, port): Side, times: &Arc<Mutex<Times>>) {
    let mut left = STREAMS;
    loop {
        shard.turn(Some(TURN_MAX)).expect("a turn");
        while let Some(news) = shard.poll_news() {
            let News::Notice(_, Notice::Session { epoch: Some(_) } | Notice::Closed { .. }) = news
            else {
                continue;
            };
            if left == 0 {
                return;
            }
            left -= 1;
            let service = Sender {
                message: vec![7; BULK],
                sent: 0,
                answered: 0,
                times: times.clone(),
            };
            let request = DialRequest {
                port: PORT,
                hello: None,
                deadline: None,
                lane: Lane::Bulk,
            };
            times.lock().expect("one thread").dialled = Instant::now();
            let (now, sink) = (shard.now(), Some(Sink::Inline(Box::new(service))));
            let dialled = shard.port_mut(port).dial(now, request, sink);
            dialled.expect("a session");
        }
    }
}

fn run_far((mut shard, port): Side) {
    shard.port_mut(port).listen(PORT).expect("free");
    loop {
        shard.turn(Some(TURN_MAX)).expect("a turn");
        while let Some(news) = shard.poll_news() {
            match news {
                News::Notice(_, Notice::Incoming { stream, .. }) => {
                    let now = shard.now();
                    let sink = Sink::Inline(Box::new(Answerer(Pieces::default())));
                    shard.port_mut(port).accept(now, stream, Some(sink));
                }
                News::Notice(_, Notice::Session { epoch: None }) => return,
                _ => {}
            }
        }
    }
}

/// Medians: the first message of a stream from its opening, the same from the dial, and the last message; ns.
pub fn messages() -> [f64; 3] {
    let (near, far) = sides();
    let (said, _) = duel::run(
        Home::Processes,
        || {
            let times = Arc::new(Mutex::new(Times::new()));
            run_near(near, &times);
            let mut times = times.lock().expect("one thread");
            let mut median = |of: fn(&mut Times) -> &mut Vec<f64>| duel::warm(of(&mut times))[0];
            vec![
                median(|t| &mut t.from_open),
                median(|t| &mut t.from_dial),
                median(|t| &mut t.warm),
            ]
        },
        || {
            run_far(far);
            Vec::new()
        },
    );
    [said[0], said[1], said[2]]
}
