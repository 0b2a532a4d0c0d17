//! Files for VMs: kept by aditd, sent to a guest that the test plays.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use adit_blob::Digest;
use adit_blob::wire::{Ended, Have, Kind, Want};
use adit_channel::frame;
use adit_channel::refusal::{Code, Refusal};
use adit_port::control::{DialFailed, Target};
use adit_port::control_io::Message;
use adit_tasks::order;
use adit_tasks::wire::{Enrolment, Program};
use serde_json::Value;

use crate::host::{Answer, Control, HANG, Host};

fn content() -> String {
    "0123456789abcdef".repeat(40_000)
}

fn put(host: &Host, digest: &Digest, size: usize, from: usize, piece: &str) -> Answer {
    let path = format!("/v1/blobs/{digest}?size={size}&from={from}");
    host.api("PUT", &path, piece)
}

/// Puts it there, piece by piece, as a client does.
fn upload(host: &Host, content: &str) -> Digest {
    let digest = Digest::of(content.as_bytes());
    loop {
        let at = host.get(&format!("/v1/blobs/{digest}"));
        if at["whole"] == true {
            return digest;
        }
        let from = at["bytes"].as_u64().unwrap() as usize;
        let end = content.len().min(from + adit_api::PIECE_MAX);
        let answer = put(host, &digest, content.len(), from, &content[from..end]);
        assert_eq!(answer.status, 200, "{}", answer.body);
    }
}

fn send(host: &Host, digest: &Digest) -> Answer {
    host.api("POST", &format!("/v1/vms/a/blobs/{digest}"), "")
}

/// Asks until it has ended.
fn sent(host: &Host, digest: &Digest) -> Answer {
    host.until("the file is sent", |host| {
        let answer = send(host, digest);
        let going_on = answer.status == 200 && json(&answer)["kept"] == false;
        (!going_on).then_some(answer)
    })
}

fn json(answer: &Answer) -> Value {
    serde_json::from_str(&answer.body).unwrap()
}

/// A guest that is offered a file.
pub struct Guest(pub UnixStream);

impl Guest {
    /// Takes the dial.
    fn dialled(control: &Control, want: Want) -> Self {
        Self::dialled_as(control, "blob", &want.encode())
    }

    pub fn dialled_as(control: &Control, service: &str, arguments: &[u8]) -> Self {
        let (connect, fd): (_, OwnedFd) = loop {
            match control.hear().unwrap() {
                (Message::Connect(connect), Some(fd)) => break (connect, fd),
                (Message::Cancel(_), _) => {}
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(connect.to, Target::Service(service.parse().unwrap()));
        assert_eq!(connect.extensions.arguments.as_bytes(), arguments);
        let id = connect.id;
        control.keep(connect, fd);
        control.dialed(id);
        Self(control.attached().0)
    }

    fn have(&mut self, bytes: u64) {
        let have = frame::encode(Kind::Have as u16, 1, 0, 0, &Have { bytes });
        self.0.write_all(&have.unwrap()).unwrap();
    }

    fn read(&mut self, bytes: usize) -> Vec<u8> {
        let mut read = vec![0; bytes];
        self.0.read_exact(&mut read).unwrap();
        read
    }

    fn ended(mut self, code: Option<Code>, text: &str) {
        let ended = Ended {
            refusal: code.map_or(0, Code::hello_number),
            text: text.into(),
        };
        let ended = frame::encode(Kind::Ended as u16, 1, 0, 0, &ended);
        self.0.write_all(&ended.unwrap()).unwrap();
        // aditd goes, whatever is on its way.
        let _ = std::io::copy(&mut self.0, &mut std::io::sink());
    }

    /// Takes an order, and answers it.
    fn ordered(mut self, envelope: &str, answer: &order::Answer) {
        let (header, body) = frame::read(&mut self.0, order::BODY_MAX).unwrap().unwrap();
        assert_eq!(header.kind, order::Kind::Order as u16);
        let order: order::Order = header.decode(&body).unwrap();
        assert_eq!(order.envelope, envelope.as_bytes());
        let answer = frame::encode(order::Kind::Answer as u16, 1, header.id, 0, answer);
        self.0.write_all(&answer.unwrap()).unwrap();
    }
}

fn refused(answer: &Answer, status: u16, code: &str) {
    assert_eq!(
        (answer.status, json(answer)["code"].as_str()),
        (status, Some(code)),
        "{}",
        answer.body
    );
}

#[test]
fn a_file_comes_in_pieces_and_goes_on_where_it_ended_also_in_the_next_aditd() {
    let (mut host, _ports) = Host::serving(&[("a", 3)], "");
    let content = content();
    let (digest, size) = (Digest::of(content.as_bytes()), content.len());
    let none = host.get(&format!("/v1/blobs/{digest}"));
    assert_eq!((&none["bytes"], &none["size"]), (&0.into(), &Value::Null));
    let answer = put(&host, &digest, size, 0, &content[..1000]);
    assert_eq!(
        (answer.status, &json(&answer)["bytes"]),
        (200, &1000.into())
    );
    // A piece that does not follow is not written.
    let answer = put(&host, &digest, size, 5000, &content[5000..6000]);
    assert_eq!(
        (answer.status, &json(&answer)["bytes"]),
        (200, &1000.into())
    );
    host.kill();
    host.start();
    let part = host.get(&format!("/v1/blobs/{digest}"));
    assert_eq!(
        (&part["bytes"], &part["size"]),
        (&1000.into(), &size.into())
    );
    assert_eq!(part["whole"], false);
    assert_eq!(upload(&host, &content), digest);
    // Again, it is there.
    let answer = put(&host, &digest, size, 0, &content[..10]);
    assert_eq!(json(&answer)["whole"], true);
}

#[test]
fn what_is_no_such_file_is_refused_and_leaves_nothing() {
    let (host, _ports) = Host::serving(&[("a", 3)], "");
    let digest = Digest::of(b"meant");
    refused(&put(&host, &digest, 5, 0, "other"), 422, "mismatch");
    refused(&put(&host, &digest, 5, 0, "meant."), 422, "mismatch");
    let large = put(&host, &digest, (1 << 30) + 1, 0, "");
    refused(&large, 413, "too-large");
    let full = put(&host, &digest, 1 << 30, 0, &" ".repeat(1 << 20));
    assert_eq!(full.status, 413);
    refused(&host.api("GET", "/v1/blobs/../x", ""), 404, "unknown-path");
    refused(&host.api("GET", "/v1/blobs/ABCD", ""), 400, "usage");
    let left = host.get(&format!("/v1/blobs/{digest}"));
    assert_eq!(left["bytes"], 0, "{left}");
    refused(&send(&host, &digest), 404, "unknown-blob");
    let nobody = host.api("POST", &format!("/v1/vms/b/blobs/{digest}"), "");
    refused(&nobody, 404, "unknown-vm");
}

#[test]
fn a_guest_is_sent_what_it_lacks_and_says_when_it_has_it() {
    let (host, ports) = Host::serving(&[("a", 3)], "");
    let content = content();
    let digest = upload(&host, &content);
    let size = content.len() as u64;
    // No port process, no guest.
    assert_eq!(sent(&host, &digest).status, 503);
    let control = ports[0].connected();
    let want = Want { digest, size };
    let begun = send(&host, &digest);
    assert_eq!((begun.status, &json(&begun)["size"]), (200, &size.into()));
    let mut guest = Guest::dialled(&control, want);
    guest.have(1000);
    assert_eq!(
        guest.read(content.len() - 1000),
        &content.as_bytes()[1000..]
    );
    let going_on = json(&send(&host, &digest));
    assert_eq!(going_on["kept"], false, "it has not said so: {going_on}");
    guest.ended(None, "");
    let done = json(&sent(&host, &digest));
    assert_eq!((&done["kept"], &done["sent"]), (&true.into(), &size.into()));
    // One that has it is sent nothing.
    send(&host, &digest);
    let mut guest = Guest::dialled(&control, want);
    guest.have(size);
    guest.ended(None, "");
    assert_eq!(json(&sent(&host, &digest))["kept"], true);
}

#[test]
fn a_guest_that_refuses_or_lies_ends_its_own_transfer_and_no_more() {
    let (host, ports) = Host::serving(&[("a", 3)], "");
    let content = content();
    let digest = upload(&host, &content);
    let size = content.len() as u64;
    let want = Want { digest, size };
    let control = ports[0].connected();
    let dialled = || {
        send(&host, &digest);
        Guest::dialled(&control, want)
    };
    // Its disk is full in the middle.
    let mut guest = dialled();
    guest.have(0);
    guest.read(100);
    guest.ended(Some(Code::NoSpace), "no\x1b[2J room");
    let answer = sent(&host, &digest);
    refused(&answer, 507, "no-space");
    assert!(!answer.body.contains('\x1b'), "{}", answer.body);
    // It has more than there is.
    let mut guest = dialled();
    guest.have(size + 1);
    refused(&sent(&host, &digest), 502, "foreign");
    // It says what is no message, or nothing, or goes.
    for said in [&b"HTTP/1.1 400 Bad Request\r\n\r\n"[..], &[0xff; 64], &[]] {
        let mut guest = dialled();
        guest.0.write_all(said).unwrap();
        drop(guest);
        refused(&sent(&host, &digest), 502, "reset");
    }
    // Its agent does not know the service.
    send(&host, &digest);
    let dial = control.dial();
    let unknown = Refusal::new(Code::UnknownService, "this agent serves tcp:PORT, ping");
    control.say(
        &Message::DialFailed(DialFailed::new(dial.id, &unknown)),
        None,
    );
    refused(&sent(&host, &digest), 403, "old-agent");
    // What it had was something else: once more, from the start.
    let mut guest = dialled();
    guest.have(size - 1);
    guest.read(1);
    guest.ended(Some(Code::Mismatch), "another digest");
    let mut guest = Guest::dialled(&control, want);
    guest.have(0);
    assert_eq!(guest.read(content.len()), content.as_bytes());
    guest.ended(None, "");
    assert_eq!(json(&sent(&host, &digest))["kept"], true);
    // And never a third time.
    let mut guest = dialled();
    guest.have(0);
    guest.ended(Some(Code::Mismatch), "another digest");
    refused(&sent(&host, &digest), 502, "mismatch");
}

#[test]
fn a_vm_is_sent_one_file_at_a_time() {
    let (host, ports) = Host::serving(&[("a", 3)], "");
    let (one, two) = (upload(&host, "one"), upload(&host, "two"));
    let control = ports[0].connected();
    send(&host, &one);
    let mut guest = Guest::dialled(
        &control,
        Want {
            digest: one,
            size: 3,
        },
    );
    refused(&send(&host, &two), 503, "busy");
    guest.have(3);
    guest.ended(None, "");
    assert_eq!(json(&sent(&host, &one))["kept"], true);
    send(&host, &two);
    let mut guest = Guest::dialled(
        &control,
        Want {
            digest: two,
            size: 3,
        },
    );
    guest.0.set_read_timeout(Some(HANG)).unwrap();
    guest.have(0);
    assert_eq!(guest.read(3), b"two");
    guest.ended(None, "");
    assert_eq!(json(&sent(&host, &two))["kept"], true);
}

#[test]
fn how_a_transfer_ended_is_said_also_after_another_vm_was_sent_something() {
    let (host, ports) = Host::serving(&[("a", 3), ("b", 4)], "");
    let digest = upload(&host, "one");
    let want = Want { digest, size: 3 };
    let [to_a, to_b] = [&ports[0], &ports[1]].map(|port| port.connected());
    send(&host, &digest);
    let mut guest = Guest::dialled(&to_a, want);
    guest.have(0);
    guest.ended(Some(Code::NoSpace), "no room");
    let path = format!("/v1/vms/b/blobs/{digest}");
    assert_eq!(host.api("POST", &path, "").status, 200);
    let mut guest = Guest::dialled(&to_b, want);
    guest.have(3);
    guest.ended(None, "");
    refused(&sent(&host, &digest), 507, "no-space");
    // A VM that gets the name of one that was removed gets nothing of that one's.
    for _ in 0..2 {
        let added = host.api("POST", "/v1/vms", r#"{"name": "c", "cid": 9}"#);
        assert_eq!(added.status, 200, "{}", added.body);
        let begun = host.api("POST", &format!("/v1/vms/c/blobs/{digest}"), "");
        assert_eq!(begun.status, 200, "{}", begun.body);
        assert_eq!(host.api("DELETE", "/v1/vms/c", "").status, 204);
    }
}

#[test]
fn an_agent_is_ordered_and_what_it_says_of_its_program_is_shown_and_a_fault() {
    let (host, ports) = Host::serving(&[("a", 3)], "");
    let control = ports[0].connected();
    let program = |program: &Program| control.program(program);
    // One of the version before says nothing of it.
    let _agent = control.enrolled("a", &Enrolment::default());
    assert!(host.get("/v1/vms/a")["program"].is_null());
    let _agent = program(&Program {
        floor: "0.1.0".into(),
        taken_back: Some([0xab; 32]),
        faults: vec!["agent-taken-back: 0.2.0\n\x1b[2J".into(); 20],
        ..Program::default()
    });
    let vm = host.get("/v1/vms/a");
    assert_eq!(vm["program"]["floor"], "0.1.0");
    assert_eq!(vm["program"]["taken_back"], "ab".repeat(32));
    let fault = vm["fault"].as_str().unwrap();
    assert!(fault.starts_with("agent-taken-back: 0.2.0"), "{fault}");
    assert!(fault.len() < 1000 && !fault.contains(char::is_control));
    let metric = "adit_vm_fault{vm=\"a\",kind=\"agent\"} 1";
    let metrics = || host.api("GET", "/metrics", "").body;
    assert!(metrics().contains(metric), "{}", metrics());

    let envelope = "{}";
    let body = serde_json::json!({ "envelope": envelope }).to_string();
    let ordered = |answer: order::Answer| {
        std::thread::scope(|s| {
            let asked = s.spawn(|| host.api("POST", "/v1/vms/a/agent", &body));
            Guest::dialled_as(&control, "agent", &[]).ordered(envelope, &answer);
            asked.join().unwrap()
        })
    };
    let answer = |refused: &str, waits| order::Answer {
        refused: refused.into(),
        text: "why\x1b[2J".into(),
        already: false,
        waits,
    };
    refused(
        &ordered(answer("agent-below-floor", false)),
        422,
        "agent-below-floor",
    );
    for word in ["unknown-vm", "a word", "\x1b[2J"] {
        refused(&ordered(answer(word, false)), 422, "agent-refused");
    }
    // A refusal changes nothing.
    assert!(metrics().contains(metric));
    let followed = json(&ordered(answer("", true)));
    assert_eq!(
        (&followed["waits"], &followed["already"]),
        (&true.into(), &false.into())
    );
    let vm = host.get("/v1/vms/a");
    assert!(
        vm["fault"].is_null() && vm["program"]["taken_back"].is_null(),
        "{vm}"
    );
    let _next = program(&Program {
        digest: Some([0xcd; 32]),
        ..Program::default()
    });
    assert_eq!(host.get("/v1/vms/a")["program"]["sha256"], "cd".repeat(32));
}
