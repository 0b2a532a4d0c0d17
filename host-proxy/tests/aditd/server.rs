//! A server in a guest, as a port process and an agent show it to aditd: each dial reaches it, and each stream is served by a
//! thread of its own.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use adit_port::control_io::{Message, receive};

use crate::host::Control;

/// What becomes of a stream after an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Then {
    /// The next request is waited for.
    GoOn,
    /// The stream ends in order.
    End,
    /// It is broken off.
    BreakOff,
    /// It is neither read nor ended any more.
    Forget,
}

/// How many there were, and are.
#[derive(Default)]
pub struct Counts {
    dials: AtomicUsize,
    open: AtomicUsize,
}

impl Counts {
    pub fn dials(&self) -> usize {
        self.dials.load(Ordering::SeqCst)
    }

    /// Streams that are open.
    pub fn open(&self) -> usize {
        self.open.load(Ordering::SeqCst)
    }
}

/// Serves whatever is dialled: `answer` gets the stream and the head of each request.
pub fn serve(
    control: Control,
    answer: impl Fn(&mut UnixStream, &str) -> Then + Send + Sync + 'static,
) -> Arc<Counts> {
    let counts = Arc::new(Counts::default());
    let (of_loop, answer) = (counts.clone(), Arc::new(answer));
    thread::spawn(move || {
        // Until aditd is gone.
        while let Ok(Some((message, fd))) = receive(&control.0) {
            let (Message::Connect(connect), Some(fd)) = (message, fd) else {
                continue;
            };
            of_loop.dials.fetch_add(1, Ordering::SeqCst);
            let id = control.keep(connect, fd).id;
            control.dialed(id);
            let (stream, _) = control.attached();
            stream.set_read_timeout(None).unwrap();
            of_loop.open.fetch_add(1, Ordering::SeqCst);
            let (counts, answer) = (of_loop.clone(), answer.clone());
            thread::spawn(move || {
                one(stream, &*answer);
                counts.open.fetch_sub(1, Ordering::SeqCst);
            });
        }
    });
    counts
}

fn one(mut stream: UnixStream, answer: &dyn Fn(&mut UnixStream, &str) -> Then) {
    while let Some(head) = next_head(&mut stream) {
        match answer(&mut stream, &head) {
            Then::GoOn => {}
            Then::End => break,
            Then::BreakOff => return drop(stream.shutdown(Shutdown::Both)),
            Then::Forget => return std::mem::forget(stream),
        }
    }
    let _ = stream.shutdown(Shutdown::Write);
    let _ = stream.read_to_end(&mut Vec::new());
}

/// The next head; none where there is no other.
pub fn next_head(stream: &mut impl Read) -> Option<String> {
    let (mut text, mut byte) = (Vec::new(), [0]);
    while !text.ends_with(b"\r\n\r\n") {
        if stream.read(&mut byte).ok()? == 0 {
            return None;
        }
        text.push(byte[0]);
    }
    Some(String::from_utf8(text).unwrap())
}

/// Reads up to this end of a chunked body, or of anything else.
pub fn until(stream: &mut impl Read, end: &str) -> String {
    let (mut text, mut byte) = (Vec::new(), [0]);
    while !text.ends_with(end.as_bytes()) {
        let n = stream.read(&mut byte).unwrap();
        assert!(n > 0, "ended: {}", String::from_utf8_lossy(&text));
        text.push(byte[0]);
    }
    String::from_utf8(text).unwrap()
}

/// `ok`, with a length.
pub fn ok(stream: &mut UnixStream, _head: &str) -> Then {
    let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok");
    Then::GoOn
}

/// Asks for the page and reads its answer, which has a length of two bytes. Returns its head.
pub fn get(client: &mut TcpStream) -> String {
    client
        .write_all(b"GET http://a/ HTTP/1.1\r\nHost: a\r\n\r\n")
        .unwrap();
    two(client)
}

/// An answer, and two bytes of its body. Returns its head.
pub fn two(client: &mut TcpStream) -> String {
    let head = next_head(client).unwrap();
    let mut body = [0; 2];
    client.read_exact(&mut body).unwrap();
    head
}
