//! What was denied, and if wanted what was allowed: one line of JSON each, in a file of its own in state_dir.
//!
//! ```text
//! {"at":"2026-11-30T01:02:03.004Z","decision":"deny","caller":"user:deploy","from":"127.0.0.1:40312",
//!  "verb":"reach","vm":"web-1","target":"tcp:22","reason":"not-granted"}
//! {"at":"…","decision":"allow","caller":"user:deploy","from":"…","verb":"reach","vm":"web-1","target":"tcp:80",
//!  "reason":"/etc/adit/aditd.toml:12","bytes_to_vm":78,"bytes_from_vm":1234,"duration_ms":12,"trace_id":"…"}
//! {"at":"…","suppressed":512,"kind":"deny","caller":"user:deploy"}
//! ```
//! What is allowed has the grant that allows it for its reason, and its line when it is over, with the time when it began.
//! A caller has [`LINES_MAX`] lines a second of what was denied, and [`ALLOWS_MAX`] of what was allowed. Callers without a name are
//! counted by the address that they come from, so that none hides another. [`lines`](crate::lines) has the rest.

use std::net::SocketAddr;
use std::path::Path;

use serde::Serialize;

use super::caller::Caller;
use crate::lines::{Lines, Output, at};

/// Name of the file.
pub const FILE: &str = "aditd.audit";
/// Lines of one caller in a second of what was denied.
pub const LINES_MAX: u32 = 10;
/// The same, of what was allowed.
pub const ALLOWS_MAX: u32 = 200;

/// The file.
#[derive(Debug)]
pub struct Audit {
    lines: Lines,
    allows: bool,
}

/// A line.
#[derive(Clone, Debug, Serialize)]
struct Line<'a> {
    at: String,
    decision: &'static str,
    caller: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    via: Option<String>,
    #[serde(skip_serializing_if = "str::is_empty")]
    from: &'a str,
    verb: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    vm: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    target: &'a str,
    reason: &'a str,
    #[serde(flatten)]
    moved: Option<&'a Moved>,
    #[serde(skip_serializing_if = "str::is_empty")]
    trace_id: &'a str,
}

/// What was decided.
#[derive(Clone, Copy, Debug)]
pub struct Decided<'a> {
    /// Who asked.
    pub caller: &'a Caller,
    /// For what: `reach`, `see`, …
    pub verb: &'static str,
    /// With which VM; as the caller has it, where there is none.
    pub vm: &'a str,
    /// What in it.
    pub target: &'a str,
    /// Why not.
    pub denied: &'static str,
}

/// What was allowed, and is over.
#[derive(Clone, Copy, Debug)]
pub struct Allowed<'a> {
    /// Who asked, and where they came from.
    pub caller: (&'a str, &'a str),
    /// For what.
    pub verb: &'a str,
    /// With which VM.
    pub vm: &'a str,
    /// What in it.
    pub target: &'a str,
    /// The grant that allowed it; `owner`: nobody needed one.
    pub reason: &'a str,
    /// What it came to; none: that is not known.
    pub moved: Option<&'a Moved>,
    /// The trace's id.
    pub trace_id: &'a str,
}

/// Bytes both ways, and how long it took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Moved {
    /// To the VM.
    pub bytes_to_vm: u64,
    /// From the VM.
    pub bytes_from_vm: u64,
    /// From its beginning to its end.
    pub duration_ms: u64,
}

impl Audit {
    /// Writes into a file of that directory; `allows`: also what was allowed.
    ///
    /// # Errors
    /// There can be no thread.
    pub fn start(dir: &Path, allows: bool) -> std::io::Result<Self> {
        let lines = Lines::start("audit", Output::File(dir.join(FILE)))?;
        Ok(Self { lines, allows })
    }

    /// Whether what is allowed is written.
    pub fn allows(&self) -> bool {
        self.allows
    }

    /// Writes that ends of what was allowed are not known.
    pub fn lost(&self, vm: &str, line: &impl Serialize) {
        if self.allows {
            self.lines.note("lost", vm, ALLOWS_MAX, line);
        }
    }

    /// Writes what was denied, or counts it.
    pub fn note(&self, decided: Decided<'_>, now_ms: i64) {
        let caller = decided.caller.to_string();
        let of = counted_as(&caller, decided.caller.from());
        let vm = adit_names::escape(decided.vm).at_most(80).to_string();
        let line = Line {
            at: at(now_ms),
            decision: "deny",
            caller: &caller,
            via: decided.caller.via().map(ToString::to_string),
            from: decided.caller.from(),
            verb: decided.verb,
            vm: &vm,
            target: decided.target,
            reason: decided.denied,
            moved: None,
            trace_id: "",
        };
        self.lines.note("deny", &of, LINES_MAX, &line);
    }

    /// Writes what was allowed and began at that time, or counts it, if it is wanted.
    pub fn allowed(&self, allowed: Allowed<'_>, began_ms: i64) {
        if !self.allows {
            return;
        }
        let (caller, from) = allowed.caller;
        let line = Line {
            at: at(began_ms),
            decision: "allow",
            caller,
            via: None,
            from,
            verb: allowed.verb,
            vm: allowed.vm,
            target: allowed.target,
            reason: allowed.reason,
            moved: allowed.moved,
            trace_id: allowed.trace_id,
        };
        self.lines
            .note("allow", &counted_as(caller, from), ALLOWS_MAX, &line);
    }
}

/// Whose lines a caller's are: its own, or those of its address, where nothing else is known.
pub fn counted_as(caller: &str, from: &str) -> String {
    match caller == Caller::NOBODY {
        true => format!("{caller} at {}", place(from)),
        false => caller.to_owned(),
    }
}

/// Where somebody is from, without the port.
fn place(from: &str) -> String {
    match from.parse::<SocketAddr>() {
        Ok(at) => at.ip().to_canonical().to_string(),
        Err(_) => from.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;
    use crate::lines::CALLERS_MAX;

    fn decided(caller: &Caller) -> Decided<'_> {
        Decided {
            caller,
            verb: "reach",
            vm: "web-1\n\u{1b}[2J",
            target: "tcp:22",
            denied: "not-granted",
        }
    }

    fn lines(dir: &Path, at_least: usize) -> Vec<serde_json::Value> {
        let begin = Instant::now();
        loop {
            let text = std::fs::read_to_string(dir.join(FILE)).unwrap_or_default();
            if text.lines().count() >= at_least {
                return text
                    .lines()
                    .map(|line| serde_json::from_str(line).unwrap())
                    .collect();
            }
            assert!(begin.elapsed() < Duration::from_secs(30), "{text}");
            std::thread::yield_now();
        }
    }

    #[test]
    fn r111_a_caller_has_some_lines_and_then_a_count_and_others_have_theirs() {
        let dir = tempfile::tempdir().unwrap();
        let audit = Audit::start(dir.path(), false).unwrap();
        let noisy = Caller::anonymous("192.0.2.1:1").with_token("noisy");
        let quiet = [
            Caller::anonymous("192.0.2.1:2"),
            Caller::anonymous("192.0.2.2:2"),
        ];
        for _ in 0..1000 {
            audit.note(decided(&noisy), 0);
            audit.note(decided(&quiet[0]), 0);
        }
        audit.note(decided(&quiet[1]), 0);
        // The counts come by themselves: what was not written is in them.
        let is =
            |line: &serde_json::Value, text: &str| line["caller"].as_str().unwrap().contains(text);
        let found = (0..)
            .map(|n| lines(dir.path(), n))
            .find(|found| {
                ["noisy", "192.0.2.1"].iter().all(|caller| {
                    let of = found.iter().filter(|line| {
                        is(line, caller) || line["from"] == "192.0.2.1:2" && *caller != "noisy"
                    });
                    let stands_for =
                        |line: &serde_json::Value| line["suppressed"].as_u64().unwrap_or(1);
                    of.map(stands_for).sum::<u64>() >= 1000
                })
            })
            .unwrap();
        assert!(found.len() < 200, "{}", found.len());
        assert!(found.iter().any(|line| line["from"] == "192.0.2.2:2"));
        let line = &found[0];
        assert_eq!(
            (line["decision"].as_str(), line["target"].as_str()),
            (Some("deny"), Some("tcp:22"))
        );
        assert_eq!(line["vm"], "web-1\\n\\u{1b}[2J");
        assert_eq!(line["at"], "1970-01-01T00:00:00Z");
    }

    #[test]
    fn r111_callers_that_are_counted_are_bounded_and_noise_of_many_is_forgotten_again() {
        let dir = tempfile::tempdir().unwrap();
        let audit = Audit::start(dir.path(), false).unwrap();
        for n in 0..CALLERS_MAX + 100 {
            let caller = Caller::anonymous("x").with_token(&n.to_string());
            for _ in 0..=LINES_MAX {
                audit.note(decided(&caller), 0);
            }
        }
        let counted = || audit.lines.counted();
        assert!(counted() <= CALLERS_MAX + 1);
        let begin = Instant::now();
        while counted() > 0 {
            assert!(begin.elapsed() < Duration::from_secs(30));
            std::thread::yield_now();
        }
    }

    #[test]
    fn what_is_allowed_is_written_only_where_it_is_wanted() {
        let moved = Moved {
            bytes_to_vm: 1,
            bytes_from_vm: 2,
            duration_ms: 3,
        };
        let allowed = Allowed {
            caller: ("user:deploy", "127.0.0.1:9"),
            verb: "reach",
            vm: "web-1",
            target: "tcp:80",
            reason: "aditd.toml:7",
            moved: Some(&moved),
            trace_id: "",
        };
        for allows in [true, false] {
            let dir = tempfile::tempdir().unwrap();
            let audit = Audit::start(dir.path(), allows).unwrap();
            audit.allowed(allowed, 0);
            audit.note(decided(&Caller::anonymous("x")), 0);
            let found = lines(dir.path(), 1 + usize::from(allows));
            let is_allow = |line: &&serde_json::Value| line["decision"] == "allow";
            let allow = found.iter().find(is_allow);
            assert_eq!(allow.is_some(), allows);
            let Some(allow) = allow else { continue };
            assert_eq!(allow["reason"], "aditd.toml:7");
            assert_eq!(allow["bytes_from_vm"], 2);
            assert_eq!(allow.get("trace_id"), None);
        }
    }
}
