//! The bytes of every control message, as builds of before send them: those that run on while aditd is upgraded, and the aditd
//! that a downgrade starts again.
#![allow(missing_docs)]

use adit_channel::hello::Extensions;
use adit_port::control::*;
use adit_port::control_io::Message;

/// Length, kind, version, id (always 0) and flags.
fn head(len: u8, kind: u8, version: u8, flags: u8) -> Vec<u8> {
    vec![
        len, 0, 0, 0, kind, 0, version, 0, 0, 0, 0, 0, flags, 0, 0, 0,
    ]
}

/// A length and the text, as postcard writes it.
fn text(text: &str) -> Vec<u8> {
    [&[u8::try_from(text.len()).unwrap()], text.as_bytes()].concat()
}

fn messages() -> Vec<(Message, u8, u8, Vec<u8>)> {
    let (needed, ignorable) = (0, 4);
    let dial = |to| {
        Message::Dial(Dial {
            id: 7,
            to,
            deadline_ms: 5000,
        })
    };
    let failed = |error| {
        Message::DialFailed(DialFailed {
            id: 300,
            error,
            status: 4,
            errno: 111,
            text: "no".into(),
        })
    };
    let handover = |ring| {
        Message::Handover(Handover {
            seq: 7,
            record: vec![1, 2],
            ring,
        })
    };
    let status = Status {
        vm: "web-1".parse().unwrap(),
        cid: 3,
        pid: 300,
        session: true,
        epoch: 2,
        streams: 1,
        bytes: (5, 6),
        faults: 8,
        last_fault: "bad".into(),
    };
    let ring = Ring {
        running: true,
        why: "up".into(),
        memory: "memfd".into(),
        bytes: 4096,
        line_ns: 70,
        hears: 1,
        rtt_ns: (5, 300),
        streams: 2,
    };
    let mut all = vec![
        (
            dial(Target::Service("tcp:80".parse().unwrap())),
            1,
            needed,
            [&[7, 0][..], &text("tcp:80"), &[0x88, 0x27]].concat(),
        ),
        (
            dial(Target::VsockPort(300)),
            1,
            needed,
            vec![7, 1, 0xac, 2, 0x88, 0x27],
        ),
        (
            Message::Attach(Attach {
                id: 7,
                prefix: b"GET".to_vec(),
            }),
            2,
            needed,
            [&[7][..], &text("GET")].concat(),
        ),
        (
            Message::Cancel(Cancel { id: 300 }),
            3,
            needed,
            vec![0xac, 2],
        ),
        (
            Message::ConnectAs(ConnectAs {
                connect: Connect {
                    id: 7,
                    to: Target::VsockPort(22),
                    deadline_ms: 1,
                    extensions: Extensions::default(),
                    prefix: vec![1],
                    greeting: vec![2],
                },
                tag: vec![3, 4],
            }),
            9,
            needed,
            // Id, target, deadline; no extensions; prefix, greeting, tag.
            vec![7, 1, 22, 1, 0, 0, 0, 1, 1, 1, 2, 2, 3, 4],
        ),
        (
            Message::ConnectNoted(ConnectNoted {
                connect: Connect {
                    id: 7,
                    to: Target::VsockPort(22),
                    deadline_ms: 1,
                    extensions: Extensions::default(),
                    prefix: vec![1],
                    greeting: vec![2],
                },
                tag: Some(vec![3]),
                note: vec![4, 5],
            }),
            12,
            needed,
            // As `ConnectAs`; there is a tag; the note.
            vec![7, 1, 22, 1, 0, 0, 0, 1, 1, 1, 2, 1, 1, 3, 2, 4, 5],
        ),
        (
            Message::ConnectLimited(ConnectLimited {
                connect: Connect {
                    id: 7,
                    to: Target::VsockPort(22),
                    deadline_ms: 1,
                    extensions: Extensions::default(),
                    prefix: vec![1],
                    greeting: vec![2],
                },
                tag: Some(vec![3]),
                note: None,
                limits: vec![Limit {
                    key: [8; 16],
                    bytes_per_s: 300,
                }],
            }),
            14,
            needed,
            // As `ConnectNoted`, and there may be no note; the limits, each with its key.
            [
                &[7, 1, 22, 1, 0, 0, 0, 1, 1, 1, 2, 1, 1, 3, 0, 1][..],
                &[8; 16],
                &[0xac, 2],
            ]
            .concat(),
        ),
        (
            Message::SetLimits(SetLimits {
                tunnels: vec![
                    (300, vec![]),
                    (
                        2,
                        vec![Limit {
                            key: [8; 16],
                            bytes_per_s: 5,
                        }],
                    ),
                ],
            }),
            15,
            needed,
            [&[2, 0xac, 2, 0, 2, 1][..], &[8; 16], &[5]].concat(),
        ),
        (
            Message::EndsTaken(EndsTaken { seq: 300 }),
            13,
            needed,
            vec![0xac, 2],
        ),
        (
            Message::Ends(Ends {
                seq: 1,
                ends: vec![TunnelEnd {
                    note: vec![9],
                    to_guest: 300,
                    from_guest: 2,
                    lasted_us: 3,
                    dial_us: Some(4),
                    first_byte_us: None,
                    broken_off: true,
                }],
                lost: 5,
            }),
            26,
            ignorable,
            vec![1, 1, 1, 9, 0xac, 2, 2, 3, 1, 4, 0, 1, 5],
        ),
        (
            Message::ListTunnels(ListTunnels { after: 300 }),
            10,
            needed,
            vec![0xac, 2],
        ),
        (
            Message::EndTunnels(EndTunnels {
                numbers: vec![1, 300],
            }),
            11,
            needed,
            vec![2, 1, 0xac, 2],
        ),
        (
            Message::Tunnels(Tunnels {
                after: 1,
                tunnels: vec![(2, vec![9])],
                last: true,
            }),
            25,
            needed,
            vec![1, 1, 2, 1, 9, 1],
        ),
        (
            Message::Connect(Connect {
                id: 7,
                to: Target::Service("tcp:80".parse().unwrap()),
                deadline_ms: 5000,
                extensions: Extensions {
                    arguments: b"-x".to_vec().try_into().unwrap(),
                    caller: b"me".to_vec().try_into().unwrap(),
                    trace: b"00".to_vec().try_into().unwrap(),
                },
                prefix: b"up".to_vec(),
                greeting: b"down".to_vec(),
            }),
            7,
            needed,
            [
                &[7, 0][..],
                &text("tcp:80"),
                &[0x88, 0x27],
                &text("-x"),
                &text("me"),
                &text("00"),
                &text("up"),
                &text("down"),
            ]
            .concat(),
        ),
        (
            Message::Ask(Ask {
                id: 7,
                text: b"there?".to_vec(),
            }),
            8,
            needed,
            [&[7][..], &text("there?")].concat(),
        ),
        // A build that does not know it skips it.
        (
            Message::Features(Features { bits: 300 }),
            24,
            ignorable,
            vec![0xac, 2],
        ),
        (Message::Quit(Quit {}), 4, needed, vec![]),
        (Message::Key(Key { key: None }), 32, needed, vec![0]),
        (
            Message::Key(Key { key: Some([7; 32]) }),
            32,
            needed,
            [&[1][..], &[7; 32]].concat(),
        ),
        (
            Message::Accepted(Accepted {
                port: 741,
                guest_port: 742,
            }),
            33,
            needed,
            vec![0xe5, 5, 0xe6, 5],
        ),
        (
            Message::BegunAnew(BegunAnew {
                port: 741,
                guest_port: 742,
            }),
            34,
            needed,
            vec![0xe5, 5, 0xe6, 5],
        ),
        (Message::Kept(Kept { seq: 7 }), 5, needed, vec![7]),
        (Message::Release(Release {}), 6, needed, vec![]),
        (
            Message::Status(status),
            16,
            needed,
            [
                &text("web-1")[..],
                &[3, 0xac, 2, 1, 2, 1, 5, 6, 8],
                &text("bad"),
            ]
            .concat(),
        ),
        (
            Message::Dialed(Dialed {
                id: 7,
                boot_nonce: [9; 16],
            }),
            17,
            needed,
            [&[7][..], &[9; 16]].concat(),
        ),
        (
            Message::Incoming(Incoming {
                port: 741,
                peer_port: 5,
            }),
            19,
            needed,
            vec![0xe5, 5, 5],
        ),
        (handover(0), 20, ignorable, vec![7, 2, 1, 2]),
        (
            Message::Stuck(Stuck {
                reason: "why".into(),
            }),
            21,
            ignorable,
            text("why"),
        ),
        (
            Message::Ring(ring),
            22,
            ignorable,
            [
                &[1][..],
                &text("up"),
                &text("memfd"),
                &[0x80, 0x20, 70, 1, 5, 0xac, 2, 2],
            ]
            .concat(),
        ),
        (Message::Held(Held {}), 23, ignorable, vec![]),
        (
            Message::Way(Way {
                way: 3,
                why: "up".into(),
            }),
            27,
            ignorable,
            [&[3][..], &text("up")].concat(),
        ),
    ];
    let errors = [
        DialError::NoSession,
        DialError::Refused,
        DialError::Timeout,
        DialError::Reset,
        DialError::Foreign,
        DialError::HelloRefused,
        DialError::Busy,
    ];
    for (number, error) in (0..).zip(errors) {
        let body = [&[0xac, 2, number, 4, 111][..], &text("no")].concat();
        all.push((failed(error), 18, needed, body));
    }
    all
}

#[test]
fn every_message_has_golden_bytes_both_ways() {
    for (message, kind, flags, body) in messages() {
        let len = u8::try_from(body.len()).unwrap();
        let golden = [head(len, kind, 1, flags), body].concat();
        assert_eq!(message.encode().unwrap(), golden, "{message:?}");
        assert_eq!(Message::decode(&golden).unwrap(), Some(message));
    }
}

#[test]
fn every_kind_has_a_message_above() {
    let known = messages();
    for number in 0..=u16::from(u8::MAX) {
        let mut packet = head(0, 0, 1, 0);
        packet[4..6].copy_from_slice(&number.to_le_bytes());
        // An unknown kind is an error for that; a known one decodes, or its body does not.
        let is_known = !matches!(
            Message::decode(&packet),
            Err(adit_port::control_io::ControlError::Frame(
                adit_channel::frame::FrameError::Unknown { .. }
            ))
        );
        let is_here = known.iter().any(|m| u16::from(m.1) == number);
        assert_eq!(is_known, is_here, "kind {number}");
    }
}
