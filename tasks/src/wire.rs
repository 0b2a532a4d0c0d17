//! Messages of the `tasks` service, between the guest's agent (dialer) and the host (listener).
//!
//! Each is the postcard body of one frame (`adit_channel::frame`, version 1 of its kind). The guest dials, so it pulls:
//! the host only ever answers.
//!
//! ```text
//! guest                                   host
//!   ◀──────────────────────────── HostKey{key}   where both have the bit KEY: of the host's dials from now on
//!   ◀─────────────────────────── Seed{bytes}   where both have the bit SEED: for the guest's random numbers
//!   Identity{id} ─────────────────────────▶   where both have the bit IDENTITY: the id that a host has given it
//!   ◀────────────────────────────── Identified   the id that it has from now on; it runs nothing before it has heard this
//!   Enrolment ────────────────────────────▶   its card and its key, and what of that it could not use
//!   Program ──────────────────────────────▶   which program the agent is, and which it could not be
//!   Facts ────────────────────────────────▶   agent is ready; all three again if they change
//!   TrustHeld ────────────────────────────▶   where both have the bit TRUST: which trust documents it has taken
//!   ◀──────────────────────── Trust{envelope}   each that the guest has not taken yet; at any time, also while a task runs
//!   TrustHeld ────────────────────────────▶   the answer to each
//!   Clock ────────────────────────────────▶   before every pull, so that the host sees a clock that is off
//!   ◀───────────────────────────── HostClock   used by a guest that is configured so
//!   Stood ────────────────────────────────▶   if by that its time stood still: it was paused, or restored from a snapshot
//!   Pull{known digests} ──────────────────▶   held until there is a task: no polling, no timer
//!   ◀──────────────────────────────── Task
//!   Held{task_id, until} ─────────────────▶   its goal is not yet valid by the guest's clock; started when it is
//!   Started{task_id} ─────────────────────▶   advisory: journaled already
//!   Report ───────────────────────────────▶   sent again on every connection until acknowledged
//!   ◀─────────────────────────── ReportAck    the host has it on disk; the guest may forget the result
//!   Pull …
//! ```
//! `Enrolment`, `Program`, `Clock`, `Stood` and `Held` have the flag IGNORABLE: a host that does not know them skips them, and `HostClock` goes only to a guest
//! that has sent a `Clock`.
//!
//! A task carries no content of its own: goal envelope, step and attempt; the guest derives the rest.
//!
//! Where both hellos have the bit [`WINDOW`]:
//! ```text
//!   Pull ─────────────────────────────────▶
//!   ◀──────────────────────── Goal{envelope}   unless both have it from before: see `recent`
//!   ◀────────────────────── TaskOf{digest …}   the digest of an envelope that went before
//!   Lacks{digest} ────────────────────────▶   counts as a pull: the host sends the goal again, and the task
//!   Held{task_id, until} ─────────────────▶   the guest gives the task back, and pulls the next
//!   Pull ─────────────────────────────────▶   the host hands out no task of that goal
//!   Clock ────────────────────────────────▶   until the guest's clock shows its time; the guest says so by itself
//! ```

use serde::{Deserialize, Serialize};

/// Name of the service.
pub const SERVICE: &str = "tasks";

/// Bit of a hello's features: the guest remembers the goals of a key in a window, so that they may come in any order; it takes
/// tasks by digest, and gives back what it holds. A host that has it too says so in its accept.
pub const WINDOW: u64 = 1;

/// Bit of a hello's features: trust documents, as [`Trust`] and [`TrustHeld`]. They are sent only where both have it.
pub const TRUST: u64 = 2;

/// Bit of a hello's features: the guest has an id of its host, as [`Identity`] and [`Identified`]. As above.
pub const IDENTITY: u64 = 4;

/// Bit of a hello's features: the host gives a key, as [`HostKey`], by which the agent knows the host's dials. Only a host whose
/// guest others can dial too has it, and then its first frame is the key.
pub const KEY: u64 = 8;

/// Bit of a hello's features: on what the host dials the agent knows chunks, which carry the ends of streams where a VMM does not
/// (`adit_channel::chunk`). For people: each stream's own hello decides. Only a host with such a carrier has it.
pub const CHUNKS: u64 = 16;

/// Bit of a hello's features: the host sends a [`Seed`] on each stream, before it answers anything.
pub const SEED: u64 = 32;

/// All that every host has.
pub const FEATURES: u64 = WINDOW | TRUST | IDENTITY | SEED;

/// Most goals that a guest gives back at once. It keeps one more itself, and pulls nothing until the time of one of them has come.
pub const HELD_MAX: usize = 1024;

/// Frame kinds. The number is wire format.
#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum WireKind {
    Facts = 1,
    Pull = 2,
    Task = 3,
    Started = 4,
    Report = 5,
    ReportAck = 6,
    Clock = 7,
    HostClock = 8,
    Held = 9,
    Goal = 10,
    TaskOf = 11,
    Lacks = 12,
    Enrolment = 13,
    Trust = 14,
    TrustHeld = 15,
    Identity = 16,
    Identified = 17,
    Program = 18,
    HostKey = 19,
    Seed = 20,
    Stood = 21,
}

/// 16 bytes that name one attempt of one step for one VM: see `task_id`.
pub type TaskId = [u8; 16];

/// What the agent reports of its guest. Shown, never trusted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Facts {
    /// Version of the agent.
    pub agent_version: String,
    /// Kernel release.
    pub kernel: String,
    /// Distribution name and version, from os-release.
    pub os: String,
    /// The id that the guest is enrolled with, empty if none; a mismatch with the channel's VM is shown as a fault.
    pub vm_id: String,
    /// Keys that may sign goals, of the image and of its card; with none it runs no task.
    pub anchors: u16,
    /// A random number for this boot.
    pub boot_nonce: [u8; 16],
}

/// Most faults of an [`Enrolment`].
pub const FAULTS_MAX: usize = 8;

/// Who the guest is, by its card. The host checks the card itself; all else is shown, never trusted.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Enrolment {
    /// The envelope of the card that the guest goes by, at most [`CARD_MAX`](crate::dsse::CARD_MAX) bytes; empty: none.
    pub card: Vec<u8>,
    /// Where the guest found it.
    pub place: String,
    /// The guest's own public key. That it has the private half is not shown by this.
    pub guest_pk: Option<[u8; 32]>,
    /// Cards, and a policy file (`policy-…`), that it found and does not use, each with why and what to do; at most [`FAULTS_MAX`].
    pub faults: Vec<String>,
}

/// A trust document, see [`trust`](crate::trust). The host passes it on and cannot change it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trust {
    /// The envelope, at most [`TRUST_MAX`](crate::dsse::TRUST_MAX) bytes.
    pub envelope: Vec<u8>,
}

/// Which trust documents a guest has taken. Shown, never trusted.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrustHeld {
    /// The newest of each signer, at most [`DOCUMENTS_MAX`](crate::trust::DOCUMENTS_MAX).
    pub documents: Vec<HeldDocument>,
    /// How many keys are revoked.
    pub revoked: u16,
    /// Why the document that this answers is not taken; begins with a stable code. Empty: it is, or none is answered.
    pub refused: String,
}

/// One of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeldDocument {
    /// Id of the key that signed it.
    pub signer: [u8; 16],
    /// It is for this VM only.
    pub own: bool,
    /// Which.
    pub sequence: u64,
}

/// The id that a host gives a guest when it first sees it: a copy of the guest's disk has it too.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostGiven {
    /// Which host gave it: drawn once a host.
    pub host: [u8; 16],
    /// Drawn once a guest.
    pub guest: [u8; 16],
}

/// The id that the guest has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// None: no host has given it one.
    pub id: Option<HostGiven>,
}

/// The id that the guest has from now on. Another one than it had: its disk is a copy, and it enrols anew.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identified {
    /// The id.
    pub id: HostGiven,
    /// Whose disk it is a copy of, for people; empty where it is none.
    pub copy_of: String,
}

/// The key of the host's dials from now on, and until this stream ends.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostKey {
    /// See `adit_channel::hello::HostKey`.
    pub key: [u8; 32],
}

impl std::fmt::Debug for HostKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("HostKey")
    }
}

/// Which program the agent is. Shown, never trusted.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Program {
    /// sha256 of the program, if it came over the channel; none: it is the one of the image.
    pub digest: Option<[u8; 32]>,
    /// The oldest version that this guest takes, empty if any.
    pub floor: String,
    /// sha256 of the program that was taken back last.
    pub taken_back: Option<[u8; 32]>,
    /// What is wrong, each with why and what to do; at most [`FAULTS_MAX`].
    pub faults: Vec<String>,
}

/// Asks for one task and waits for it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pull {
    /// The last epoch of the host that the guest saw; 0 = none.
    pub epoch: u64,
}

/// One task.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Task {
    /// As the host derived it; the guest derives it again and refuses a mismatch.
    pub task_id: TaskId,
    /// The signed goal: the exact bytes of the DSSE envelope, at most 256 KiB.
    pub envelope: Vec<u8>,
    /// Which step of it.
    pub step_id: String,
    /// 1 for the first.
    pub attempt: u32,
}

/// A signed goal, for the tasks of it that follow on this stream.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Goal {
    /// The exact bytes of the DSSE envelope, at most 256 KiB.
    pub envelope: Vec<u8>,
}

/// One task of a goal that was sent before.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TaskOf {
    /// As in [`Task`].
    pub task_id: TaskId,
    /// sha256 of the envelope's bytes. Not of its payload: the guest computes it of whatever it was sent.
    pub digest: [u8; 32],
    /// As in [`Task`].
    pub step_id: String,
    /// As in [`Task`].
    pub attempt: u32,
}

/// The guest does not have the goal of the task that it was handed out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lacks {
    /// As in [`TaskOf`].
    pub digest: [u8; 32],
}

/// The journal has `started` on disk; the effect begins next.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Started {
    /// Which task.
    pub task_id: TaskId,
}

/// Terminal state as the guest reports it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// Ran and ended with a success code.
    Done,
    /// Ran and ended otherwise, or could not be run.
    Failed,
    /// Ran longer than it may; its whole process tree was killed.
    TimedOut,
    /// The agent or the guest ended while it ran; it does not run again unless its step is idempotent.
    Interrupted,
    /// The guest would not run it: signature, audience, sequence, time, policy, disk space. Nothing was done.
    Refused,
}

/// A captured output stream: the first and the last bytes where it was longer than the cap.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Captured {
    /// Bytes from the start.
    pub head: Vec<u8>,
    /// Bytes from the end, if the middle was dropped.
    pub tail: Vec<u8>,
    /// All bytes that were written.
    pub total: u64,
}

/// The result of a task. Kept by the guest until acknowledged.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Which task.
    pub task_id: TaskId,
    /// Terminal state.
    pub outcome: Outcome,
    /// Exit status (128+N for a signal); none if nothing ran.
    pub exit: Option<i32>,
    /// Why, for people; for `Refused` begins with a stable code such as `wrong-target:`. Empty when `Done`, unless something
    /// about it must be known: that the guest's journal has no space for it, for example.
    pub reason: String,
    /// Unix time in ms by the guest's clock; 0 if it did not start.
    pub started_ms: u64,
    /// Unix time in ms by the guest's clock.
    pub ended_ms: u64,
    /// Standard output.
    pub stdout: Captured,
    /// Standard error.
    pub stderr: Captured,
    /// Boot in which it ended.
    pub boot_nonce: [u8; 16],
}

/// The stable code that the reason of a refusal begins with, such as `policy` or `wrong-target`.
pub fn refusal_code(reason: &str) -> Option<&str> {
    let (code, _) = reason.split_once(": ")?;
    let is_code = |b: u8| b.is_ascii_lowercase() || b == b'-';
    (!code.is_empty() && code.bytes().all(is_code)).then_some(code)
}

/// The report is on the host's disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReportAck {
    /// Which task.
    pub task_id: TaskId,
}

/// The sender's time: the guest's in `Clock`, the host's in `HostClock`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Clock {
    /// Unix time in ms.
    pub unix_ms: u64,
}

/// Random bytes of the host, new for each stream. A guest that is restored from a snapshot would go on with the random numbers of the guest
/// that was saved, as would every other one that is restored from it; and its streams are new ones.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seed {
    /// Mixed into what the guest has: nobody who knows them knows more of its numbers than before.
    pub bytes: [u8; 32],
}

impl std::fmt::Debug for Seed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Seed")
    }
}

/// Between two times that the host gave it, less time went by in the guest than for the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stood {
    /// So much less, ms.
    pub ms: u64,
    /// By so much the guest set its clock, ms; none: it did not, by its configuration or because it may not.
    pub clock_set_ms: Option<i64>,
    /// It has mixed the host's [`Seed`] into its random numbers.
    pub seeded: bool,
}

/// The guest has a task whose goal is not yet valid by its clock, and keeps it until it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Held {
    /// Which task.
    pub task_id: TaskId,
    /// Unix time in ms from which its goal is valid.
    pub not_before_ms: u64,
    /// Unix time in ms by the guest's clock.
    pub now_ms: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_code_of_a_refusal_is_its_first_word() {
        let of = "policy: /etc/adit-guest/policy.toml:4: no";
        assert_eq!(refusal_code(of), Some("policy"));
        for none in [
            "",
            "policy",
            ": x",
            "Policy: x",
            "a b: x",
            "exit status 1",
            "\n: x",
        ] {
            assert_eq!(refusal_code(none), None, "{none}");
        }
    }

    #[test]
    fn an_enrolment_has_golden_bytes() {
        let bytes = |m: &Enrolment| crate::hex(&postcard::to_stdvec(m).unwrap());
        assert_eq!(bytes(&Enrolment::default()), "00000000");
        let whole = Enrolment {
            card: b"{}".to_vec(),
            place: "file".into(),
            guest_pk: Some([0xcd; 32]),
            faults: vec!["a".into()],
        };
        let key = "cd".repeat(32);
        assert_eq!(bytes(&whole), format!("027b7d0466696c6501{key}010161"));
        assert_eq!(WireKind::Enrolment as u16, 13);
    }

    #[test]
    fn the_messages_about_trust_and_identity_have_golden_bytes() {
        let bytes = |m: postcard::Result<Vec<u8>>| crate::hex(&m.unwrap());
        let envelope = b"{}".to_vec();
        assert_eq!(bytes(postcard::to_stdvec(&Trust { envelope })), "027b7d");
        let held = TrustHeld {
            documents: vec![HeldDocument {
                signer: [0xab; 16],
                own: true,
                sequence: 300,
            }],
            revoked: 2,
            refused: "a".into(),
        };
        let want = format!("01{}01ac02020161", "ab".repeat(16));
        assert_eq!(bytes(postcard::to_stdvec(&held)), want);
        let none = TrustHeld::default();
        assert_eq!(bytes(postcard::to_stdvec(&none)), "000000");
        let id = HostGiven {
            host: [1; 16],
            guest: [2; 16],
        };
        let both = format!("{}{}", "01".repeat(16), "02".repeat(16));
        let some = Identity { id: Some(id) };
        assert_eq!(bytes(postcard::to_stdvec(&some)), format!("01{both}"));
        let copy_of = "b".into();
        let answer = Identified { id, copy_of };
        assert_eq!(bytes(postcard::to_stdvec(&answer)), format!("{both}0162"));
        let kinds = [WireKind::Trust, WireKind::TrustHeld];
        assert_eq!(kinds.map(|k| k as u16), [14, 15]);
        let kinds = [WireKind::Identity, WireKind::Identified];
        assert_eq!(kinds.map(|k| k as u16), [16, 17]);
        assert_eq!((WINDOW, TRUST, IDENTITY), (1, 2, 4));
        assert_eq!((KEY, CHUNKS, SEED), (8, 16, 32));
    }

    #[test]
    fn a_program_has_golden_bytes() {
        let bytes = |m: &Program| crate::hex(&postcard::to_stdvec(m).unwrap());
        assert_eq!(bytes(&Program::default()), "00000000");
        let whole = Program {
            digest: Some([0xab; 32]),
            floor: "1.2.3".into(),
            taken_back: Some([0xcd; 32]),
            faults: vec!["a".into()],
        };
        let (digest, back) = ("ab".repeat(32), "cd".repeat(32));
        assert_eq!(
            bytes(&whole),
            format!("01{digest}05312e322e3301{back}010161")
        );
        assert_eq!(WireKind::Program as u16, 18);
    }

    #[test]
    fn the_messages_about_clocks_have_golden_bytes() {
        let bytes = |m: postcard::Result<Vec<u8>>| crate::hex(&m.unwrap());
        let unix_ms = 1_795_219_200_000;
        assert_eq!(
            bytes(postcard::to_stdvec(&Clock { unix_ms })),
            "80b09cdb9f34"
        );
        let held = Held {
            task_id: [0xab; 16],
            not_before_ms: unix_ms,
            now_ms: 300,
        };
        let want = format!("{}80b09cdb9f34ac02", "ab".repeat(16));
        assert_eq!(bytes(postcard::to_stdvec(&held)), want);
        let numbers = [WireKind::Clock, WireKind::HostClock, WireKind::Held].map(|k| k as u16);
        assert_eq!(numbers, [7, 8, 9]);
        let stood = Stood {
            ms: 300,
            clock_set_ms: Some(-1),
            seeded: true,
        };
        assert_eq!(bytes(postcard::to_stdvec(&stood)), "ac02010101");
        let seed = Seed { bytes: [0xcd; 32] };
        assert_eq!(bytes(postcard::to_stdvec(&seed)), "cd".repeat(32));
        assert_eq!(
            [WireKind::Seed, WireKind::Stood].map(|k| k as u16),
            [20, 21]
        );
    }
}
