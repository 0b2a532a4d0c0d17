//! The bytes of every message of the `tasks` service: an agent of before is served by today's host, and the other way round.
#![allow(missing_docs)]

use adit_tasks::wire::*;
use serde::Serialize;
use serde::de::DeserializeOwned;

#[track_caller]
fn golden<T: Serialize + DeserializeOwned + PartialEq + std::fmt::Debug>(message: T, bytes: &[u8]) {
    assert_eq!(postcard::to_stdvec(&message).unwrap(), bytes);
    assert_eq!(postcard::from_bytes::<T>(bytes).unwrap(), message);
}

#[test]
fn every_message_has_golden_bytes_both_ways() {
    let id = [0xab; 16];
    golden(
        Facts {
            agent_version: "1".into(),
            kernel: "6".into(),
            os: "x".into(),
            vm_id: "web-1".into(),
            anchors: 300,
            boot_nonce: [1; 16],
        },
        &[&b"\x011\x016\x01x\x05web-1\xac\x02"[..], &[1; 16]].concat(),
    );
    golden(Pull { epoch: 300 }, &[0xac, 2]);
    golden(
        Task {
            task_id: id,
            envelope: b"{}".to_vec(),
            step_id: "s".into(),
            attempt: 1,
        },
        &[&id[..], b"\x02{}\x01s\x01"].concat(),
    );
    golden(
        Goal {
            envelope: b"{}".to_vec(),
        },
        b"\x02{}",
    );
    golden(
        TaskOf {
            task_id: id,
            digest: [7; 32],
            step_id: "s".into(),
            attempt: 1,
        },
        &[&id[..], &[7; 32], b"\x01s\x01"].concat(),
    );
    golden(Lacks { digest: [7; 32] }, &[7; 32]);
    golden(Started { task_id: id }, &id);
    golden(ReportAck { task_id: id }, &id);
    golden(Clock { unix_ms: 300 }, &[0xac, 2]);
    golden(
        Held {
            task_id: id,
            not_before_ms: 300,
            now_ms: 5,
        },
        &[&id[..], &[0xac, 2, 5]].concat(),
    );
    let outcomes = [
        Outcome::Done,
        Outcome::Failed,
        Outcome::TimedOut,
        Outcome::Interrupted,
        Outcome::Refused,
    ];
    for (number, outcome) in (0..).zip(outcomes) {
        // Exit status 3 is 6 in zigzag.
        let exit = (outcome == Outcome::Failed).then_some(3);
        let exit_bytes = exit.map_or(vec![0], |_| vec![1, 6]);
        let captured = Captured {
            head: b"hi".to_vec(),
            tail: b"o".to_vec(),
            total: 300,
        };
        golden(
            Report {
                task_id: id,
                outcome,
                exit,
                reason: "r".into(),
                started_ms: 1,
                ended_ms: 300,
                stdout: captured,
                stderr: Captured::default(),
                boot_nonce: [2; 16],
            },
            &[
                &id[..],
                &[number],
                &exit_bytes,
                b"\x01r\x01\xac\x02\x02hi\x01o\xac\x02\0\0\0",
                &[2; 16],
            ]
            .concat(),
        );
    }
}

#[test]
fn the_numbers_of_the_messages_stay() {
    use WireKind::*;
    let kinds = [
        Facts, Pull, Task, Started, Report, ReportAck, Clock, HostClock, Held, Goal, TaskOf, Lacks,
    ];
    let numbers = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12];
    assert_eq!(kinds.map(|kind| kind as u16), numbers);
    assert_eq!(WINDOW, 1);
    assert_eq!(SERVICE, "tasks");
}
