//! A session and its clients, over a stream that is cut into any pieces, breaks at any time and delivers only some of what was sent.

use std::collections::VecDeque;

use adit_exec::{
    Attach, Client, Decoder, Exit, Heard, How, Next, Out, SPOOL_MAX, STDIN_WINDOW, Session,
    ToClient, ToGuest,
};
use proptest::prelude::*;

/// What happens next.
#[derive(Clone, Debug)]
enum Step {
    /// The command writes so much, if there is room.
    Write(bool, usize),
    /// The stream carries so many bytes to the client.
    ToClient(usize),
    /// The same to the guest.
    ToGuest(usize),
    /// The client sends so much input.
    Input(usize),
    /// The command reads so much input.
    Read(usize),
    /// The stream breaks, and another client comes.
    Cut,
    /// The command ends.
    Exit,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (any::<bool>(), 0..80_000_usize).prop_map(|(out, n)| Step::Write(out, n)),
        6 => (1..100_000_usize).prop_map(Step::ToClient),
        4 => (1..100_000_usize).prop_map(Step::ToGuest),
        3 => (1..80_000_usize).prop_map(Step::Input),
        3 => (1..80_000_usize).prop_map(Step::Read),
        1 => Just(Step::Cut),
        1 => Just(Step::Exit),
    ]
}

fn byte(offset: u64) -> u8 {
    (offset % 253) as u8
}

struct World {
    session: Session,
    client: Client,
    to_client: VecDeque<u8>,
    to_guest: VecDeque<u8>,
    at_client: Decoder,
    at_guest: Decoder,
    written: [u64; 2],
    passed_on: [u64; 2],
    sent: u64,
    read: u64,
    exit: Option<Exit>,
}

impl World {
    fn new(kept: bool) -> Self {
        Self {
            session: Session::new("1".into(), kept, false, true),
            client: Client::new(),
            to_client: VecDeque::new(),
            to_guest: VecDeque::new(),
            at_client: Decoder::default(),
            at_guest: Decoder::default(),
            written: [0; 2],
            passed_on: [0; 2],
            sent: 0,
            read: 0,
            exit: None,
        }
    }

    fn send(&mut self) {
        while let Some(frame) = self.session.poll_send() {
            self.to_client.extend(frame);
        }
    }

    fn carry_to_client(&mut self, n: usize) {
        let n = n.min(self.to_client.len());
        let bytes: Vec<u8> = self.to_client.drain(..n).collect();
        self.at_client.push(&bytes);
        while let Some(message) = self.at_client.poll_frame::<ToClient>().unwrap() {
            match self.client.handle(message).unwrap() {
                Heard::Output(out, bytes) => {
                    let at = &mut self.passed_on[usize::from(out == Out::Stderr)];
                    let is_next = |(b, at): (&u8, u64)| *b == byte(at);
                    assert!(bytes.iter().zip(*at..).all(is_next));
                    *at += bytes.len() as u64;
                }
                Heard::Started(started) => {
                    assert_eq!([started.stdout, started.stderr], self.passed_on);
                    self.sent = started.stdin;
                }
                Heard::Exit(exit) => self.exit = Some(exit),
                Heard::Nothing => {}
                other => panic!("{other:?}"),
            }
            self.to_guest
                .extend(self.client.poll_ack().into_iter().flatten());
        }
    }

    fn carry_to_guest(&mut self, n: usize) {
        let n = n.min(self.to_guest.len());
        let bytes: Vec<u8> = self.to_guest.drain(..n).collect();
        self.at_guest.push(&bytes);
        while let Some(message) = self.at_guest.poll_frame::<ToGuest>().unwrap() {
            self.session.handle(&message).unwrap();
        }
        self.send();
    }

    fn step(&mut self, step: &Step) {
        match *step {
            Step::Write(is_error, n) => {
                let (out, nth) = match is_error {
                    false => (Out::Stdout, 0),
                    true => (Out::Stderr, 1),
                };
                let n = n.min(self.session.room(out));
                let from = self.written[nth];
                let bytes: Vec<u8> = (from..from + n as u64).map(byte).collect();
                assert_eq!(self.session.output(out, &bytes), n);
                self.written[nth] += n as u64;
                self.send();
                // What is on its way is not kept by the session, but what nobody has read is bounded.
                let kept = self.written[nth] - self.passed_on[nth];
                assert!(kept <= (SPOOL_MAX + self.to_client.len() + 200_000) as u64);
            }
            Step::ToClient(n) => self.carry_to_client(n),
            Step::ToGuest(n) => self.carry_to_guest(n),
            Step::Input(n) => {
                let n = n.min(self.client.stdin_room());
                if n > 0 {
                    let bytes: Vec<u8> = (self.sent..self.sent + n as u64).map(byte).collect();
                    self.to_guest.extend(self.client.stdin(&bytes));
                    self.sent += n as u64;
                }
            }
            Step::Read(n) => {
                let Next::Write(bytes) = self.session.stdin() else {
                    return;
                };
                let n = n.min(bytes.len());
                assert!(bytes.len() <= STDIN_WINDOW);
                let is_next = |(b, at): (&u8, u64)| *b == byte(at);
                assert!(bytes[..n].iter().zip(self.read..).all(is_next));
                self.read += n as u64;
                self.session.stdin_wrote(n);
                self.send();
            }
            Step::Cut => {
                assert!(self.session.client_gone());
                (self.to_client, self.to_guest) = Default::default();
                (self.at_client, self.at_guest) = Default::default();
                let [stdout, stderr] = self.passed_on.map(Some);
                self.client = Client::new();
                let attach = Attach {
                    stdout,
                    stderr,
                    size: None,
                };
                self.session.attach(&attach).unwrap();
                self.send();
            }
            Step::Exit => {
                self.session.exited(Exit {
                    how: How::Code as u8,
                    value: 3,
                    ..Exit::default()
                });
                for out in [Out::Stdout, Out::Stderr] {
                    self.session.output_ended(out);
                }
                self.send();
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn r121_a_kept_session_loses_nothing_over_any_number_of_cuts(steps in prop::collection::vec(step(), 0..60)) {
        let mut world = World::new(true);
        world.send();
        for step in &steps {
            world.step(step);
        }
        // A command waits for nobody who has read all of it.
        let has_ended = world.session.exit().is_some();
        for _ in 0..100 {
            world.carry_to_client(usize::MAX);
            world.carry_to_guest(usize::MAX);
        }
        let goes_on = |out| world.session.room(out) >= SPOOL_MAX - (64 << 10);
        prop_assert!(has_ended || (goes_on(Out::Stdout) && goes_on(Out::Stderr)));
        world.step(&Step::Exit);
        for _ in 0..100 {
            world.carry_to_client(usize::MAX);
            world.carry_to_guest(usize::MAX);
        }
        prop_assert_eq!(world.passed_on, world.written);
        prop_assert_eq!(world.exit.as_ref().map(|exit| exit.value), Some(3));
        prop_assert!(world.session.is_over());
    }

    #[test]
    fn a_session_without_cuts_passes_on_all_of_it_and_then_its_end(steps in prop::collection::vec(step(), 0..60)) {
        let mut world = World::new(false);
        world.send();
        for step in steps.iter().filter(|step| !matches!(step, Step::Cut)) {
            world.step(step);
        }
        world.step(&Step::Exit);
        for _ in 0..100 {
            world.carry_to_client(usize::MAX);
            world.carry_to_guest(usize::MAX);
        }
        prop_assert_eq!(world.passed_on, world.written);
        prop_assert_eq!(world.exit.as_ref().map(|exit| exit.value), Some(3));
        prop_assert!(world.session.is_over());
    }
}

#[test]
fn what_a_client_says_that_it_may_not_changes_nothing() {
    let mut session = Session::new("1".into(), false, false, false);
    for message in [
        // It has no input, no terminal, and wants to hear nothing of what arrives.
        ToGuest::Stdin {
            offset: 0,
            bytes: b"x".to_vec(),
        },
        ToGuest::StdinEnd { offset: 0 },
        ToGuest::Resize(Default::default()),
        ToGuest::Ack {
            stdout: 0,
            stderr: 0,
        },
        ToGuest::Signal(0),
        ToGuest::Signal(200),
        ToGuest::Attach(Attach::default()),
    ] {
        assert!(session.handle(&message).is_err(), "{message:?}");
    }
    let mut session = Session::new("1".into(), true, false, true);
    let input = |offset, n: usize| ToGuest::Stdin {
        offset,
        bytes: vec![0; n],
    };
    assert!(session.handle(&input(1, 1)).is_err());
    assert!(session.handle(&input(0, 9)).is_ok());
    assert!(session.handle(&input(0, 9)).is_err());
    assert!(
        session
            .handle(&ToGuest::Ack {
                stdout: 1,
                stderr: 0
            })
            .is_err()
    );
    // A client may not be further ahead than it was told.
    for offset in (9..STDIN_WINDOW as u64).step_by(1000) {
        let n = 1000.min(STDIN_WINDOW - offset as usize);
        assert!(session.handle(&input(offset, n)).is_ok());
    }
    assert!(session.handle(&input(STDIN_WINDOW as u64, 1)).is_err());
}

#[test]
fn a_signal_never_waits_behind_input_that_nobody_reads() {
    let mut session = Session::new("1".into(), false, false, true);
    let mut client = Client::new();
    let mut decoder = Decoder::default();
    decoder.push(&session.poll_send().unwrap());
    client
        .handle(decoder.poll_frame().unwrap().unwrap())
        .unwrap();
    let mut ahead = 0;
    while client.stdin_room() > 0 {
        let frame = client.stdin(&vec![0; client.stdin_room()]);
        let mut decoder = Decoder::default();
        decoder.push(&frame);
        session
            .handle(&decoder.poll_frame().unwrap().unwrap())
            .unwrap();
        ahead += 1;
    }
    assert!(ahead > 1);
    // All of it is in the session, so what comes next is read at once.
    assert!(session.handle(&ToGuest::Signal(2)).unwrap().is_some());
}
