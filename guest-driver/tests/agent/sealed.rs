//! Streams that are sealed to the guest's key, with a hostile aditd in the middle: this test carries every byte between a client and the
//! agent, and changes, keeps back, repeats and swaps what it likes.

use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;

use adit_exec::seal::{Asking, Channel, Keys, RECORD_MAX, Sealed};
use adit_exec::{
    Asked, Attach, Client, Decoder, Exit, Heard, How, Out, Refused, Row, Started, ToClient,
    ToGuest, What, refusal,
};
use adit_tasks::key::parse_private;
use adit_tasks::ticket::{self, Input, Run, Verb};
use adit_tasks::{PublicKey, Ticket};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::exec::{self, Guest};
use crate::ticket::{
    TICKETS, asked, guest, mark, marks, redeem, run_of, signed, stream, ticket as of,
};

fn key_of(guest: &Guest) -> PublicKey {
    let text = fs::read_to_string(guest.host.path("state/guest.key")).unwrap();
    PublicKey::of(&parse_private(&text).unwrap(), "")
}

/// A client's end: frames go in and out as sealed bytes, which the test carries.
struct End {
    stream: UnixStream,
    sealed: Sealed,
    decoder: Decoder,
    half: Client,
    out: Vec<u8>,
    started: Option<Started>,
}

/// The handshake, with what it makes.
fn handshake(guest: &Guest, asked: &Asked) -> (UnixStream, Keys, Channel) {
    let mut stream = stream(guest, asked).unwrap();
    let (asking, first) = Asking::new(&key_of(guest).exchange()).unwrap();
    stream.write_all(&ToGuest::Seal(first).encode()).unwrap();
    let answer = plain(&mut stream);
    let ToClient::Sealed(answer) = answer else {
        panic!("{answer:?}");
    };
    let (keys, channel) = asking.finish(&answer).unwrap();
    (stream, keys, channel)
}

/// A frame in the clear.
fn plain(stream: &mut UnixStream) -> ToClient {
    let mut decoder = Decoder::default();
    loop {
        if let Some(message) = decoder.poll_frame().unwrap() {
            return message;
        }
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        decoder.push(&byte);
    }
}

impl End {
    fn of(stream: UnixStream, keys: Keys) -> Self {
        Self {
            stream,
            sealed: Sealed::new(keys),
            decoder: Decoder::default(),
            half: Client::new(),
            out: Vec::new(),
            started: None,
        }
    }

    /// Brings a ticket that names this stream.
    fn open(guest: &Guest, ticket: &Ticket) -> Self {
        let (stream, keys, channel) = handshake(guest, &asked(ticket));
        let mut end = Self::of(stream, keys);
        let ticket = Ticket {
            channel: Some(channel),
            ..ticket.clone()
        };
        end.say(&ToGuest::Ticket(signed(&ticket)));
        end
    }

    fn sealed(&mut self, message: &ToGuest) -> Vec<u8> {
        let mut out = Vec::new();
        self.sealed.seal(&message.encode(), &mut out).unwrap();
        out
    }

    fn say(&mut self, message: &ToGuest) {
        let bytes = self.sealed(message);
        self.stream.write_all(&bytes).unwrap();
    }

    fn hear(&mut self) -> io::Result<Heard> {
        let mut piece = vec![0; RECORD_MAX];
        loop {
            if let Some(message) = self.decoder.poll_frame::<ToClient>().unwrap() {
                let heard = self.half.handle(message).unwrap();
                match &heard {
                    Heard::Started(started) => self.started = Some(started.clone()),
                    Heard::Output(Out::Stdout, bytes) => self.out.extend(bytes),
                    _ => {}
                }
                if let Some(ack) = self.half.poll_ack() {
                    let mut out = Vec::new();
                    self.sealed.seal(&ack, &mut out).unwrap();
                    self.stream.write_all(&out)?;
                }
                return Ok(heard);
            }
            let n = self.stream.read(&mut piece)?;
            if n == 0 {
                self.sealed.finish().map_err(io::Error::other)?;
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let mut plain = Vec::new();
            self.sealed.push(&piece[..n]);
            self.sealed.open(&mut plain).map_err(io::Error::other)?;
            self.decoder.push(&plain);
        }
    }

    fn started(&mut self) -> Started {
        while self.started.is_none() {
            let heard = self.hear().unwrap();
            assert!(matches!(heard, Heard::Started(_)), "{heard:?}");
        }
        self.started.clone().unwrap()
    }

    fn exit(&mut self) -> (How, i32) {
        loop {
            match self.hear().unwrap() {
                Heard::Exit(Exit { how, value, .. }) => return (How::of(how).unwrap(), value),
                Heard::Refused(why) => panic!("{why:?}"),
                _ => {}
            }
        }
    }

    fn refused(&mut self) -> Refused {
        loop {
            match self.hear().unwrap() {
                Heard::Refused(why) => return why,
                Heard::Exit(exit) => panic!("{exit:?}"),
                _ => {}
            }
        }
    }

    fn rows(&mut self) -> Vec<Row> {
        match self.hear().unwrap() {
            Heard::Rows(rows) => rows,
            other => panic!("{other:?}"),
        }
    }

    fn until(&mut self, text: &str) {
        while !String::from_utf8_lossy(&self.out).contains(text) {
            let heard = self.hear().unwrap();
            assert!(!matches!(heard, Heard::Exit(_)), "{heard:?}");
        }
    }

    fn input(&mut self, bytes: &[u8]) {
        let frame = self.half.stdin(bytes);
        let mut out = Vec::new();
        self.sealed.seal(&frame, &mut out).unwrap();
        self.stream.write_all(&out).unwrap();
    }

    fn end_input(&mut self) {
        let frame = self.half.stdin_end();
        let mut out = Vec::new();
        self.sealed.seal(&frame, &mut out).unwrap();
        self.stream.write_all(&out).unwrap();
    }
}

fn live(argv: &[&str], tty: Option<(u16, u16)>) -> Ticket {
    of(Verb::Run(Run {
        tty,
        stdin: Input::Live,
        ..run_of(argv)
    }))
}

#[test]
fn on_a_sealed_stream_live_input_signals_and_a_terminal_work() {
    let guest = guest(TICKETS);
    let mut cat = End::open(&guest, &live(&["/bin/cat"], None));
    cat.started();
    let content: Vec<u8> = (0..200_000_u32).flat_map(u32::to_le_bytes).collect();
    for piece in content.chunks(30_000) {
        while cat.half.stdin_room() < piece.len() {
            cat.hear().unwrap();
        }
        cat.input(piece);
    }
    cat.end_input();
    assert_eq!(cat.exit(), (How::Code, 0));
    assert!(cat.out == content);
    // The end is said, too.
    assert!(cat.hear().is_err());
    assert_eq!(cat.sealed.finish(), Ok(()));
    let script = "trap 'echo got; exit 3' USR1; echo ready; while :; do sleep 0.01; done";
    let mut trap = End::open(&guest, &of(Verb::Run(run_of(&["/bin/sh", "-c", script]))));
    trap.until("ready");
    trap.say(&ToGuest::Signal(10));
    assert_eq!(trap.exit(), (How::Code, 3));
    let mut tty = End::open(&guest, &live(&["/bin/sh"], Some((24, 80))));
    tty.started();
    tty.say(&ToGuest::Resize(adit_exec::Size { rows: 33, cols: 77 }));
    tty.input(b"stty size; exit 4\n");
    assert_eq!(tty.exit(), (How::Code, 4));
    assert!(String::from_utf8_lossy(&tty.out).contains("33 77"));
    guest.until_none();
}

#[test]
fn r121_a_sealed_session_is_listed_attached_to_and_ended_by_tickets_and_survives_the_agent() {
    let mut guest = guest(TICKETS);
    let script = "echo one; while read line; do echo \"<$line>\"; done";
    let kept = of(Verb::Run(Run {
        detach: true,
        stdin: Input::Live,
        ..run_of(&["/bin/sh", "-c", script])
    }));
    let mut first = End::open(&guest, &kept);
    let id = first.started().id;
    first.until("one");
    // What runs does so without the agent, and goes on with the next one.
    guest.host.kill();
    first.input(b"two\n");
    first.until("<two>");
    guest.another_agent();
    first.input(b"three\n");
    first.until("<three>");
    let mut list = End::open(&guest, &of(Verb::List(ticket::List {})));
    assert_eq!(list.rows().len(), 1);
    let attach = of(Verb::Attach(ticket::Attach {
        session: id.clone(),
    }));
    let mut second = End::open(&guest, &attach);
    second.say(&ToGuest::Attach(Attach::default()));
    second.started();
    second.until("<three>");
    assert_eq!(first.refused().reason, refusal::TAKEN_OVER);
    second.input(b"four\n");
    second.until("<four>");
    // Another user's: there is none.
    let others = Ticket {
        user: "nobody".into(),
        ..of(attach.verb.clone())
    };
    let mut none = End::open(&guest, &others);
    none.say(&ToGuest::Attach(Attach::default()));
    assert_eq!(none.refused().reason, refusal::NO_SESSION);
    let end = ticket::End {
        session: id,
        signal: 0,
    };
    let mut end = End::open(&guest, &of(Verb::End(end)));
    assert_eq!(end.hear().unwrap(), Heard::Done);
    assert_eq!(second.exit().0, How::Ended);
}

/// What the host may do with a sealed stream of somebody else's: carry it, or not.
#[test]
fn r120_a_host_that_changes_repeats_reorders_or_injects_ends_the_stream_and_reaches_nothing() {
    let guest = guest(TICKETS);
    let file = guest.host.path("root").join("got");
    let script = format!("cat >> {}", file.display());
    // The client's three pieces, which the host has in its hands.
    type Hostile = fn(&[Vec<u8>]) -> Vec<u8>;
    let table: [(&str, Hostile, &str); 8] = [
        ("whole", |r| r.concat(), "abc"),
        ("twice", |r| [&r[0][..], &r[0]].concat(), "a"),
        ("left out", |r| [&r[0][..], &r[2]].concat(), "a"),
        ("turned", |r| [&r[1][..], &r[0]].concat(), ""),
        (
            "changed",
            |r| {
                let mut all = r.concat();
                all[r[0].len() + 9] ^= 1;
                all
            },
            "a",
        ),
        (
            "in the clear",
            |r| {
                [
                    &r[0][..],
                    &ToGuest::Stdin {
                        offset: 1,
                        bytes: b"X".to_vec(),
                    }
                    .encode(),
                ]
                .concat()
            },
            "a",
        ),
        (
            "longer",
            |r| {
                let mut all = r[0].clone();
                all[0] += 1;
                all.push(0);
                all
            },
            "",
        ),
        (
            "a length that none has",
            |r| [&r[0][..], &[0xff, 0xff]].concat(),
            "a",
        ),
    ];
    for (what, hostile, reaches) in table {
        let _ = fs::remove_file(&file);
        let mut end = End::open(&guest, &live(&["/bin/sh", "-c", &script], None));
        end.started();
        let records: Vec<_> = (0..3)
            .map(|nth| {
                let bytes = vec![b"abc"[nth as usize]];
                end.sealed(&ToGuest::Stdin { offset: nth, bytes })
            })
            .collect();
        end.stream.write_all(&hostile(&records)).unwrap();
        match what {
            "whole" => {
                end.say(&ToGuest::StdinEnd { offset: 3 });
                assert_eq!(end.exit(), (How::Code, 0));
            }
            // Cut, and the client sees that it was.
            _ => while end.hear().is_ok() {},
        }
        guest.until_none();
        let got = fs::read_to_string(&file).unwrap_or_default();
        assert!(reaches.starts_with(&got), "{what}: {got:?}");
    }
}

#[test]
fn r120_a_ticket_of_a_sealed_stream_is_good_for_that_stream_alone() {
    let guest = guest(TICKETS);
    let (file, one) = mark(&guest);
    let (_stream, _keys, channel) = handshake(&guest, &asked(&one));
    let bound = Ticket {
        channel: Some(channel),
        ..one.clone()
    };
    // In the clear; on another sealed stream, which the host has made itself.
    let mut clear = redeem(&guest, &bound);
    assert_eq!(clear.refused().reason, refusal::TICKET);
    let (stream, keys, _) = handshake(&guest, &asked(&one));
    let mut other = End::of(stream, keys);
    other.say(&ToGuest::Ticket(signed(&bound)));
    assert_eq!(other.refused().reason, refusal::TICKET);
    // One that names no stream opens none: whoever has it could type.
    let (stream, keys, _) = handshake(&guest, &asked(&one));
    let mut other = End::of(stream, keys);
    other.say(&ToGuest::Ticket(signed(&one)));
    assert_eq!(other.refused().reason, refusal::TICKET);
    assert_eq!(marks(&file), 0);
    // All that a client has said, said again: its handshake makes another stream.
    let mut first = crate::ticket::stream(&guest, &asked(&one)).unwrap();
    let (asking, message) = Asking::new(&key_of(&guest).exchange()).unwrap();
    let hello = ToGuest::Seal(message).encode();
    first.write_all(&hello).unwrap();
    let ToClient::Sealed(answer) = plain(&mut first) else {
        panic!()
    };
    let (keys, channel) = asking.finish(&answer).unwrap();
    let mut end = End::of(first, keys);
    let said = end.sealed(&ToGuest::Ticket(signed(&Ticket {
        channel: Some(channel),
        ..one.clone()
    })));
    end.stream.write_all(&said).unwrap();
    assert_eq!(end.exit(), (How::Code, 0));
    let mut again = crate::ticket::stream(&guest, &asked(&one)).unwrap();
    again.write_all(&[hello, said].concat()).unwrap();
    let mut rest = Vec::new();
    // It answers the handshake, and then cuts.
    let _ = again.read_to_end(&mut rest);
    assert!(!rest.is_empty());
    guest.until_none();
    assert_eq!(marks(&file), 1);
}

#[test]
fn r120_a_stream_that_is_sealed_to_another_key_says_nothing() {
    let guest = guest(TICKETS);
    let (file, one) = mark(&guest);
    let mut stream = stream(&guest, &asked(&one)).unwrap();
    let other = PublicKey::of(&ed25519_dalek::SigningKey::from_bytes(&[9; 32]), "");
    let (_, first) = Asking::new(&other.exchange()).unwrap();
    stream.write_all(&ToGuest::Seal(first).encode()).unwrap();
    let ToClient::Refused(why) = plain(&mut stream) else {
        panic!()
    };
    assert_eq!(why.reason, refusal::SEAL, "{}", why.text);
    assert_eq!(marks(&file), 0);
}

/// warp-tech/warpgate#2397, gravitational/teleport#15426: what is allowed for one thing opens nothing else.
#[test]
fn warpgate_a_ticket_for_one_verb_does_no_other() {
    let guest = guest(TICKETS);
    let id = "0123456789ab".to_owned();
    let (file, run) = mark(&guest);
    let verbs = [
        run.verb,
        Verb::Attach(ticket::Attach {
            session: id.clone(),
        }),
        Verb::End(ticket::End {
            session: id,
            signal: 0,
        }),
        Verb::Get(ticket::Get {
            path: "/etc/passwd".into(),
        }),
    ];
    for verb in &verbs {
        for what in [
            What::Run("/bin/sh".into()),
            What::Run("/bin/ls".into()),
            What::Ticket("anything".into()),
            What::Attach("0123456789ab".into()),
        ] {
            let is_run = matches!(verb, Verb::Run(_));
            if is_run && what == What::Run("/bin/sh".into()) {
                continue;
            }
            let one = of(verb.clone());
            let asked = Asked {
                what: what.clone(),
                ..asked(&one)
            };
            let (stream, keys, channel) = handshake(&guest, &asked);
            let mut end = End::of(stream, keys);
            end.say(&ToGuest::Ticket(signed(&Ticket {
                channel: Some(channel),
                ..one
            })));
            if matches!(verb, Verb::Attach(_)) && what == What::Ticket("anything".into()) {
                end.say(&ToGuest::Attach(Attach::default()));
            }
            let why = end.refused();
            let reasons = [refusal::TICKET, refusal::NO_SESSION];
            assert!(reasons.contains(&why.reason), "{verb:?} {what:?}: {why:?}");
        }
    }
    assert_eq!(marks(&file), 0);
}

/// R121, R106: sealed sessions whose clients vanish at any byte leave nothing.
#[test]
fn r121_sealed_streams_that_break_off_anywhere_leave_nothing() {
    let guest = guest(TICKETS);
    let pid = guest.host.pid();
    let count = |what: &str| fs::read_dir(format!("/proc/{pid}/{what}")).unwrap().count();
    End::open(&guest, &of(Verb::Run(run_of(&["/bin/true"])))).exit();
    guest.until_none();
    let before = (count("task"), count("fd"));
    for nth in 0..40 {
        let one = live(&["/bin/cat"], None);
        let (mut stream, keys, channel) = handshake(&guest, &asked(&one));
        let mut end = End::of(stream.try_clone().unwrap(), keys);
        let one = Ticket {
            channel: Some(channel),
            ..one
        };
        let said = end.sealed(&ToGuest::Ticket(signed(&one)));
        stream.write_all(&said[..said.len() * nth / 39]).unwrap();
    }
    guest.until_none();
    exec::until("all is as before", || {
        (count("task"), count("fd")) <= before
    });
}

/// A session process that is killed cuts its sealed stream, and the client sees that it was cut.
#[test]
fn r121_a_cut_is_no_end() {
    let guest = guest(TICKETS);
    let mut end = End::open(
        &guest,
        &of(Verb::Run(run_of(&[
            "/bin/sh",
            "-c",
            "echo $PPID; sleep 1000",
        ]))),
    );
    end.until("\n");
    let session: i32 = String::from_utf8_lossy(&end.out).trim().parse().unwrap();
    kill(Pid::from_raw(session), Signal::SIGKILL).unwrap();
    while end.hear().is_ok() {}
    assert_eq!(end.sealed.finish(), Err(adit_exec::seal::SealError::Cut));
}
