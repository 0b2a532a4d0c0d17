//! Tickets: the agent as a process, and this test in place of a hostile aditd, which has every frame in its hands.
//!
//! Tests whose names begin with a tool's are of faults that such tools have had, and name where.

use std::fs;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use adit_channel::refusal::Refusal;
use adit_exec::{Asked, Heard, How, Refused, ToGuest, What, refusal};
use adit_tasks::dsse::{self, Type};
use adit_tasks::ticket::{Content, Input, Run, Verb};
use adit_tasks::{PublicKey, Ticket};
use ed25519_dalek::SigningKey;
use jiff::{SignedDuration, Timestamp};
use sha2::{Digest, Sha256};

use crate::blob::dial;
use crate::exec::{self, Guest, Running, me};

pub const TICKETS: &str = "[[exec]]\nallow = \"ticket\"\nusers = \"any\"\ncommands = \"any\"\n";

fn signer() -> SigningKey {
    SigningKey::from_bytes(&[21; 32])
}

/// A guest whose owner has this policy, and trusts the signer for `exec`.
pub fn guest(rules: &str) -> Guest {
    let guest = exec::guest(rules);
    trust(&guest, "exec.pub", "exec", &signer());
    guest
}

fn trust(guest: &Guest, file: &str, roles: &str, key: &SigningKey) {
    let line = format!("roles={roles} {}", PublicKey::of(key, "test"));
    fs::write(guest.host.path("trust").join(file), line).unwrap();
}

fn nonce() -> [u8; 16] {
    let mut nonce = [0; 16];
    fs::File::open("/dev/urandom")
        .and_then(|mut file| std::io::Read::read_exact(&mut file, &mut nonce))
        .unwrap();
    nonce
}

pub fn run_of(argv: &[&str]) -> Run {
    Run {
        argv: argv.iter().map(|&text| text.to_owned()).collect(),
        ..Run::default()
    }
}

pub fn ticket(verb: Verb) -> Ticket {
    let now = Timestamp::now();
    Ticket {
        vm_id: "web-1".parse().unwrap(),
        user: me(),
        verb,
        not_before: now,
        not_after: now + SignedDuration::from_mins(2),
        nonce: nonce(),
        channel: None,
    }
}

fn signed_by(ticket: &Ticket, key: &SigningKey) -> Vec<u8> {
    dsse::sign_as(Type::Ticket, &ticket.payload(), key).into_bytes()
}

pub fn signed(ticket: &Ticket) -> Vec<u8> {
    signed_by(ticket, &signer())
}

pub fn asked(ticket: &Ticket) -> Asked {
    let what = match &ticket.verb {
        Verb::Run(run) => What::Run(run.argv[0].clone()),
        verb => What::Ticket(verb.name().into()),
    };
    let user = (!ticket.user.is_empty()).then(|| ticket.user.clone());
    Asked { user, what }
}

pub fn stream(guest: &Guest, asked: &Asked) -> Result<UnixStream, Refusal> {
    dial(&guest.host, "exec", asked.encode().unwrap())
}

/// Brings a ticket, as the host of that time would.
fn bring(guest: &Guest, asked: &Asked, envelope: Vec<u8>) -> Running {
    let mut running = Running::new(stream(guest, asked).unwrap());
    running.say(&ToGuest::Ticket(envelope));
    running
}

pub fn redeem(guest: &Guest, ticket: &Ticket) -> Running {
    bring(guest, &asked(ticket), signed(ticket))
}

/// A command that leaves a mark whenever it runs.
pub fn mark(guest: &Guest) -> (PathBuf, Ticket) {
    let file = guest.host.path("root").join("ran");
    let script = format!("echo ran >> {}", file.display());
    (file, ticket(Verb::Run(run_of(&["/bin/sh", "-c", &script]))))
}

pub fn marks(file: &Path) -> usize {
    fs::read_to_string(file).map_or(0, |text| text.lines().count())
}

fn bytes_of(content: &[u8]) -> Input {
    Input::Bytes(Content {
        sha256: Sha256::digest(content).into(),
        size: content.len() as u64,
    })
}

fn refused(running: &mut Running, reason: u16) -> Refused {
    let why = running.refused();
    assert_eq!(why.reason, reason, "{}", why.text);
    why
}

#[test]
fn a_ticket_runs_what_it_says_and_the_log_names_its_key() {
    let guest = guest(TICKETS);
    let one = ticket(Verb::Run(Run {
        env: vec![("A".into(), "b $c".into())],
        cwd: "/tmp".into(),
        ..run_of(&[
            "sh",
            "-c",
            "printf '[%s]' \"$@\"; pwd; echo \"$A\"; cat; exit 7",
            "sh",
            "a b",
        ])
    }));
    let mut run = redeem(&guest, &one);
    assert_eq!(run.exit(), (How::Code, 7));
    assert_eq!(run.text(), "[a b]/tmp\nb $c\n");
    // Nothing else of the agent's is in its way.
    for file in ["guest.key", "tickets"] {
        assert!(guest.host.path("state").join(file).exists(), "{file}");
    }
    let log = guest.host.log();
    let key = dsse::id_of(&signer()).to_string();
    assert!(
        log.lines()
            .any(|l| l.contains(" exec ") && l.contains(&key)),
        "{log}"
    );
    guest.until_none();
}

#[test]
fn r120_where_only_tickets_count_the_hosts_word_does_nothing() {
    let guest = guest(TICKETS);
    let (file, one) = mark(&guest);
    let Verb::Run(run) = &one.verb else { panic!() };
    let argv: Vec<&str> = run.argv.iter().map(String::as_str).collect();
    refused(&mut guest.run(&argv), refusal::NEEDS_TICKET);
    let kept = ticket(Verb::Run(Run {
        detach: true,
        ..run_of(&["/bin/sleep", "1000"])
    }));
    let mut session = redeem(&guest, &kept);
    let id = session.started().id;
    // Nor does it see, end or attach to what a ticket began.
    for what in [
        What::List,
        What::End {
            id: id.clone(),
            signal: 0,
        },
        What::End {
            id: id.clone(),
            signal: 9,
        },
    ] {
        let user = Some(me());
        let mut host = Running::new(stream(&guest, &Asked { user, what }).unwrap());
        refused(&mut host, refusal::NEEDS_TICKET);
    }
    let user = Some(me());
    let what = What::Attach(id);
    let mut host = Running::new(stream(&guest, &Asked { user, what }).unwrap());
    host.say(&ToGuest::Attach(adit_exec::Attach::default()));
    refused(&mut host, refusal::NEEDS_TICKET);
    assert_eq!(marks(&file), 0);
    // It runs as the ticket says.
    assert_eq!(redeem(&guest, &one).exit(), (How::Code, 0));
    assert_eq!(marks(&file), 1);
}

#[test]
fn r120_no_ticket_that_is_expired_foreign_of_another_role_changed_or_used_runs_anything() {
    let guest = guest(TICKETS);
    trust(
        &guest,
        "others.pub",
        "card,goal,agent",
        &SigningKey::from_bytes(&[22; 32]),
    );
    let (file, good) = mark(&guest);
    let now = Timestamp::now();
    let minutes = SignedDuration::from_mins;
    let table: [(&str, Vec<u8>, u16); 9] = [
        (
            "expired",
            signed(&Ticket {
                not_before: now - minutes(3),
                not_after: now - minutes(1),
                ..good.clone()
            }),
            refusal::TICKET_TIME,
        ),
        (
            "early",
            signed(&Ticket {
                not_before: now + minutes(2),
                not_after: now + minutes(3),
                ..good.clone()
            }),
            refusal::TICKET_TIME,
        ),
        (
            "long",
            signed(&Ticket {
                not_after: now + minutes(11),
                ..good.clone()
            }),
            refusal::TICKET,
        ),
        (
            "another VM's",
            signed(&Ticket {
                vm_id: "web-2".parse().unwrap(),
                ..good.clone()
            }),
            refusal::TICKET,
        ),
        (
            "another role's",
            signed_by(&good, &SigningKey::from_bytes(&[22; 32])),
            refusal::TICKET,
        ),
        (
            "a stranger's",
            signed_by(&good, &SigningKey::from_bytes(&[23; 32])),
            refusal::TICKET,
        ),
        (
            "of a sealed stream",
            signed(&Ticket {
                channel: Some([1; 32]),
                ..good.clone()
            }),
            refusal::TICKET,
        ),
        (
            "of another type",
            dsse::sign_as(Type::Goal, &good.payload(), &signer()).into_bytes(),
            refusal::TICKET,
        ),
        ("nothing", Vec::new(), refusal::TICKET),
    ];
    for (what, envelope, reason) in table {
        let why = bring(&guest, &asked(&good), envelope).refused();
        assert_eq!(why.reason, reason, "{what}: {}", why.text);
    }
    // What aditd says it let through is not what the ticket says.
    for other in [
        Asked {
            user: Some("nobody".into()),
            ..asked(&good)
        },
        Asked {
            what: What::Run("/bin/ls".into()),
            ..asked(&good)
        },
        Asked {
            what: What::Ticket("list".into()),
            ..asked(&good)
        },
        Asked {
            what: What::Attach("0123456789ab".into()),
            ..asked(&good)
        },
    ] {
        let why = bring(&guest, &other, signed(&good)).refused();
        assert_eq!(why.reason, refusal::TICKET, "{other:?}: {}", why.text);
    }
    assert_eq!(marks(&file), 0);
    assert_eq!(redeem(&guest, &good).exit(), (How::Code, 0));
    for _ in 0..3 {
        refused(&mut redeem(&guest, &good), refusal::TICKET_SPENT);
    }
    assert_eq!(marks(&file), 1);
    guest.until_none();
}

/// What needs a sealed stream, and everything that a host can put behind a ticket.
#[test]
fn r120_the_host_adds_no_input_no_signal_and_no_window() {
    let guest = guest(TICKETS);
    for (tty, stdin) in [(Some((24, 80)), Input::None), (None, Input::Live)] {
        let one = ticket(Verb::Run(Run {
            tty,
            stdin,
            ..run_of(&["/bin/cat"])
        }));
        refused(&mut redeem(&guest, &one), refusal::NEEDS_SEAL);
    }
    let file = guest.host.path("root").join("got");
    let script = format!(
        "trap 'echo INT >> {0}' INT; cat > {0}; sleep 0.3; echo whole >> {0}",
        file.display()
    );
    for hostile in [
        ToGuest::Stdin {
            offset: 0,
            bytes: b"rm -rf /\n".to_vec(),
        },
        ToGuest::StdinEnd { offset: 0 },
        ToGuest::Signal(2),
        ToGuest::Resize(adit_exec::Size { rows: 1, cols: 1 }),
        ToGuest::Open(exec::command(&["id"])),
        ToGuest::Ticket(signed(&mark(&guest).1)),
    ] {
        let one = ticket(Verb::Run(run_of(&["/bin/sh", "-c", &script])));
        let mut run = redeem(&guest, &one);
        run.started();
        run.say(&hostile);
        // As a cut: the command ends, and has got nothing.
        let why = run.refused();
        assert_eq!(why.reason, refusal::MALFORMED, "{hostile:?}");
        guest.until_none();
        assert_eq!(
            fs::read_to_string(&file).unwrap_or_default(),
            "",
            "{hostile:?}"
        );
        let _ = fs::remove_file(&file);
    }
}

#[test]
fn r120_input_is_what_the_ticket_says_or_nothing_runs() {
    let guest = guest(TICKETS);
    let content: Vec<u8> = (0..300_000_u32).flat_map(u32::to_le_bytes).collect();
    let file = guest.host.path("root").join("got");
    let script = format!("cat > {}; wc -c", file.display());
    let of = |content: &[u8]| {
        ticket(Verb::Run(Run {
            stdin: bytes_of(content),
            ..run_of(&["/bin/sh", "-c", &script])
        }))
    };
    let send = |run: &mut Running, content: &[u8]| {
        for (nth, piece) in content.chunks(adit_exec::DATA_MAX).enumerate() {
            let offset = (nth * adit_exec::DATA_MAX) as u64;
            let frame = ToGuest::Stdin {
                offset,
                bytes: piece.to_vec(),
            }
            .encode();
            // It may have been refused by now.
            if run.stream.write_all(&frame).is_err() {
                return;
            }
        }
        let frame = ToGuest::StdinEnd {
            offset: content.len() as u64,
        }
        .encode();
        let _ = run.stream.write_all(&frame);
    };
    let one = of(&content);
    let mut run = redeem(&guest, &one);
    send(&mut run, &content);
    assert_eq!(run.exit(), (How::Code, 0));
    assert_eq!(run.text().trim(), "0");
    assert!(fs::read(&file).unwrap() == content);
    fs::remove_file(&file).unwrap();
    let mut longer = content.clone();
    longer.push(0);
    let mut other = content.clone();
    other[77] ^= 1;
    for wrong in [&content[..content.len() - 1], &longer, &other, b""] {
        let one = of(&content);
        let mut run = redeem(&guest, &one);
        send(&mut run, wrong);
        refused(&mut run, refusal::TICKET_INPUT);
        // It is used up: the host has had its try.
        refused(&mut redeem(&guest, &one), refusal::TICKET_SPENT);
    }
    // Out of order, twice, a signal in between.
    let piece = |offset: u64| ToGuest::Stdin {
        offset,
        bytes: b"ab".to_vec(),
    };
    for frames in [
        vec![piece(2), piece(0)],
        vec![piece(0), piece(0)],
        vec![piece(u64::MAX - 1)],
        vec![piece(0), ToGuest::Signal(9)],
        vec![piece(0), ToGuest::StdinEnd { offset: 4 }],
    ] {
        let one = of(b"abab");
        let mut run = redeem(&guest, &one);
        for frame in &frames {
            let _ = run.stream.write_all(&frame.encode());
        }
        refused(&mut run, refusal::TICKET_INPUT);
    }
    // Cut in the middle.
    let one = of(b"abab");
    let mut run = redeem(&guest, &one);
    run.say(&piece(0));
    drop(run);
    guest.until_none();
    assert!(!file.exists());
    let left = || fs::read_dir(guest.host.path("state/exec-input")).map_or(0, Iterator::count);
    exec::until("no input is left", || left() == 0);
    // None at all is a content, too.
    let mut run = redeem(&guest, &of(b""));
    send(&mut run, b"");
    assert_eq!(run.exit(), (How::Code, 0));
}

/// The agent is killed at each step of a ticket's use, and the host brings it again to the next one.
#[test]
fn r120_a_ticket_runs_at_most_once_wherever_the_agent_is_killed() {
    let mut guest = guest(TICKETS);
    let (mut kills, mut has_run) = (0, false);
    for step in 1..40 {
        let (file, one) = mark(&guest);
        let _ = fs::remove_file(&file);
        guest.host.kill();
        let _ = fs::remove_dir_all(guest.host.path("state/tickets"));
        guest
            .host
            .start_with("ADIT_TEST_KILL_AT_STEP", Some(&step.to_string()));
        exec::until("it dials, or is killed", || {
            guest.host.is_dialled() || guest.host.ended().is_some()
        });
        if !guest.host.is_dialled() {
            // At a step of its start.
            guest.another_agent();
            continue;
        }
        let (session, _) = guest.host.accept();
        let mut run = redeem(&guest, &one);
        let killed = !matches!(run.hear(), Ok(Heard::Started(_)));
        if !killed {
            assert_eq!(run.exit(), (How::Code, 0));
        }
        kills += usize::from(killed);
        drop(session);
        guest.host.kill();
        guest.another_agent();
        let mut again = redeem(&guest, &one);
        match again.hear() {
            Ok(Heard::Started(_)) => assert_eq!(again.exit(), (How::Code, 0)),
            Ok(Heard::Refused(why)) => assert_eq!(why.reason, refusal::TICKET_SPENT),
            other => panic!("{other:?}"),
        }
        refused(&mut redeem(&guest, &one), refusal::TICKET_SPENT);
        guest.until_none();
        assert!(marks(&file) <= 1, "step {step}: {}", marks(&file));
        if !killed {
            // There was no such step: it has run, and the next agent knows that it was used.
            has_run = true;
            break;
        }
    }
    assert!(kills >= 4 && has_run, "{kills}");
}

/// Others of the guest's policy: users, programs, and rules of both kinds beside each other.
#[test]
fn a_ticket_does_no_more_than_the_guests_owner_lets_tickets_do() {
    let me = me();
    let rules = format!(
        "[[exec]]\nallow = \"ticket\"\nusers = [\"{me}\"]\ncommands = [\"/bin/echo\", \"/bin/sleep\"]\n[[exec]]\nallow = \"host\"\nusers = [\"{me}\"]\ncommands = [\"/bin/sh\"]\n"
    );
    let guest = guest(&rules);
    assert_eq!(
        redeem(&guest, &ticket(Verb::Run(run_of(&["/bin/echo"])))).exit(),
        (How::Code, 0)
    );
    assert_eq!(
        redeem(&guest, &ticket(Verb::Run(run_of(&["/bin/sh", "-c", ":"])))).exit(),
        (How::Code, 0)
    );
    refused(
        &mut redeem(&guest, &ticket(Verb::Run(run_of(&["/bin/cat"])))),
        refusal::DENIED,
    );
    assert_eq!(guest.run(&["/bin/sh", "-c", ":"]).exit(), (How::Code, 0));
    refused(&mut guest.run(&["/bin/echo"]), refusal::NEEDS_TICKET);
    refused(&mut guest.run(&["/bin/cat"]), refusal::DENIED);
    // What a ticket began is not the host's, also where the host has rights of its own.
    let kept = ticket(Verb::Run(Run {
        detach: true,
        ..run_of(&["/bin/sleep", "1000"])
    }));
    let mut session = redeem(&guest, &kept);
    let id = session.started().id;
    let why = guest.end(&id, 0).unwrap_err();
    assert_eq!(why.reason, refusal::NEEDS_TICKET, "{}", why.text);
    assert_eq!(guest.end(&id, 9).unwrap_err().reason, refusal::NEEDS_TICKET);
    assert!(
        guest
            .rows()
            .iter()
            .any(|row| row.id == id && row.ended.is_none())
    );
}

/// R112: a full disk forgets nothing and runs nothing.
#[test]
fn r112_where_nothing_can_be_remembered_nothing_runs() {
    let guest = guest(TICKETS);
    let (file, one) = mark(&guest);
    // As a disk without room for a name would.
    fs::write(guest.host.path("state/tickets"), "").unwrap();
    let why = redeem(&guest, &one).refused();
    assert_eq!(why.reason, refusal::FAILED, "{}", why.text);
    assert_eq!(marks(&file), 0);
    fs::remove_file(guest.host.path("state/tickets")).unwrap();
    assert_eq!(redeem(&guest, &one).exit(), (How::Code, 0));
}

/// R106: streams that break off while a ticket, or its input, is on its way leave nothing.
#[test]
fn r106_streams_that_break_off_leave_no_thread_no_file_and_no_descriptor() {
    let guest = guest(TICKETS);
    let pid = guest.host.pid();
    let count = |what: &str| fs::read_dir(format!("/proc/{pid}/{what}")).unwrap().count();
    assert_eq!(
        redeem(&guest, &ticket(Verb::Run(run_of(&["/bin/true"])))).exit(),
        (How::Code, 0)
    );
    let before = (count("task"), count("fd"));
    for nth in 0..200 {
        let one = ticket(Verb::Run(Run {
            stdin: bytes_of(b"abab"),
            ..run_of(&["/bin/cat"])
        }));
        let mut stream = stream(&guest, &asked(&one)).unwrap();
        let mut bytes = ToGuest::Ticket(signed(&one)).encode();
        bytes.extend(
            ToGuest::Stdin {
                offset: 0,
                bytes: b"ab".to_vec(),
            }
            .encode(),
        );
        let cut = bytes.len() * nth / 200;
        stream.write_all(&bytes[..cut]).unwrap();
    }
    exec::until("all is as before", || {
        (count("task"), count("fd")) <= before
    });
    exec::until("no input is left", || {
        fs::read_dir(guest.host.path("state/exec-input")).map_or(0, Iterator::count) == 0
    });
    guest.until_none();
}
