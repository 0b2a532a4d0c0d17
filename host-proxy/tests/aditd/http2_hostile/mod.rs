//! Clients of HTTP/2 that mean harm (R65, R67, R74): frame by frame, as no library makes them. Whatever they do, the proxy says why
//! it ends them, keeps little for them, and serves others.
//!
//! | file | what such a client does |
//! |---|---|
//! | `broken` | breaks the protocol |
//! | `floods` | sends more, or more often, than anybody needs |
//! | `requests` | asks for what could be read in two ways |
//! | `given_up` | takes its time, leaves, or keeps its window shut |

mod broken;
mod floods;
mod given_up;
mod requests;

use std::io::Write;

use crate::h2client::Client;
use crate::h2raw::*;
use crate::host::{Control, Host, Port};
use crate::proxy::head;

fn started() -> (Host, Vec<Port>) {
    Host::serving(&[("a", 3), ("b", 4)], "")
}

/// Memory of whoever serves, KiB.
fn memory_kib(host: &Host) -> usize {
    let status = std::fs::read_to_string(format!("/proc/{}/status", host.worker())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.unwrap().trim().trim_end_matches(" kB");
    kib.parse().unwrap()
}

/// Somebody else gets an answer, and nothing else has reached the guest.
fn others_are_served(host: &Host, control: &Control) {
    let client = Client::new(host.proxy());
    let mut stream = client.get("http://a/");
    let (mut guest, _) = control.tunnel();
    assert!(head(&mut guest).starts_with("GET / HTTP/1.1\r\n"));
    guest
        .write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok")
        .unwrap();
    assert_eq!(stream.status(), 200);
    assert_eq!(stream.rest().unwrap(), "ok");
}

/// Sends pieces of it until the other end is heard to be gone, which reads on all the time. Returns how the connection ended.
fn flood(host: &Host, before: &[u8], piece: impl Fn(u32) -> Vec<u8>) -> Ended {
    let mut raw = Raw::new(host.proxy());
    raw.say(before);
    flood_over(raw, piece)
}

fn flood_over(mut raw: Raw, piece: impl Fn(u32) -> Vec<u8>) -> Ended {
    let mut sending = raw.sender();
    let sender = std::thread::spawn(move || raw.ended());
    for n in 0.. {
        if !sending.say(&piece(n)) || sender.is_finished() {
            break;
        }
        assert!(n < 1_000_000, "it goes on for ever");
    }
    sender.join().unwrap()
}
