//! What was denied, and if wanted what was allowed: one line of JSON each, in a file of its own in state_dir.
//!
//! ```text
//! {"at":"2026-11-30T01:02:03.004Z","decision":"deny","caller":"user:deploy","from":"127.0.0.1:40312",
//!  "verb":"reach","vm":"web-1","target":"tcp:22","reason":"not-granted"}
//! {"at":"…","suppressed":512,"caller":"user:deploy"}
//! ```
//! A caller has [`LINES_MAX`] lines a second; of more there is a count, once that second is over. Callers without a name are
//! counted by the address that they come from, so that none hides another. The file is cut at [`FILE_MAX`], and [`FILES`] of them are
//! kept. A thread writes it; where that has too much to do, lines are counted and not written.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::Serialize;

use super::caller::Caller;

/// Name of the file.
pub const FILE: &str = "aditd.audit";
/// Bytes of the file at most.
pub const FILE_MAX: u64 = 8 << 20;
/// Files that are kept besides the one that is written.
pub const FILES: usize = 4;
/// Lines of one caller in a second.
pub const LINES_MAX: u32 = 10;
/// Callers that are counted at the same time at most; all others share one count.
const CALLERS_MAX: usize = 1024;
/// Lines that wait to be written.
const WAITING_MAX: usize = 1024;
/// For how long a caller's lines are counted together.
const A_WHILE: Duration = Duration::from_secs(1);

/// The file.
#[derive(Debug)]
pub struct Audit {
    lines: SyncSender<Line>,
    counts: Arc<Mutex<Counts>>,
}

/// By caller.
type Counts = HashMap<String, Count>;

#[derive(Debug)]
struct Count {
    since: Instant,
    lines: u32,
    suppressed: u64,
}

/// A line.
#[derive(Clone, Debug, Serialize)]
pub struct Line {
    at: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    decision: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    suppressed: Option<u64>,
    caller: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    via: Option<String>,
    #[serde(skip_serializing_if = "String::is_empty")]
    from: String,
    #[serde(skip_serializing_if = "str::is_empty")]
    verb: &'static str,
    #[serde(skip_serializing_if = "String::is_empty")]
    vm: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    target: String,
    #[serde(skip_serializing_if = "str::is_empty")]
    reason: &'static str,
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
    /// Why not; none: it is allowed.
    pub denied: Option<&'static str>,
}

impl Audit {
    /// Writes into a file of that directory.
    ///
    /// # Errors
    /// There can be no thread.
    pub fn start(dir: &Path) -> std::io::Result<Self> {
        let (lines, written) = sync_channel(WAITING_MAX);
        let path = dir.join(FILE);
        let counts = Arc::<Mutex<Counts>>::default();
        let of_thread = counts.clone();
        let thread = std::thread::Builder::new().name("audit".into());
        thread.spawn(move || {
            // Opened here, so that a disk that hangs stops this thread only.
            write_all(Files { path, open: None }, &written, &of_thread);
        })?;
        Ok(Self { lines, counts })
    }

    /// Writes a line, or counts it.
    pub fn note(&self, decided: Decided<'_>, now_ms: i64) {
        let caller = decided.caller.to_string();
        let mut of = match decided.caller.is_anonymous() {
            true => format!("{caller} at {}", place(decided.caller.from())),
            false => caller.clone(),
        };
        {
            let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
            if counts.len() >= CALLERS_MAX && !counts.contains_key(&of) {
                // Until the thread has written those that are over.
                of = "others".into();
            }
            let count = counts.entry(of.clone()).or_insert(Count {
                since: Instant::now(),
                lines: 0,
                suppressed: 0,
            });
            if count.lines >= LINES_MAX {
                count.suppressed += 1;
                return;
            }
            count.lines += 1;
        }
        let line = Line {
            at: at(now_ms),
            decision: Some(if decided.denied.is_some() {
                "deny"
            } else {
                "allow"
            }),
            suppressed: None,
            caller,
            via: decided.caller.via().map(ToString::to_string),
            from: decided.caller.from().into(),
            verb: decided.verb,
            vm: adit_names::escape(decided.vm).at_most(80).to_string(),
            target: decided.target.into(),
            reason: decided.denied.unwrap_or_default(),
        };
        if self.lines.try_send(line).is_err() {
            let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(count) = counts.get_mut(&of) {
                count.suppressed += 1;
            }
        }
    }
}

fn at(now_ms: i64) -> String {
    jiff::Timestamp::from_millisecond(now_ms)
        .unwrap_or_default()
        .to_string()
}

/// Where somebody is from, without the port.
fn place(from: &str) -> String {
    match from.parse::<SocketAddr>() {
        Ok(at) => at.ip().to_canonical().to_string(),
        Err(_) => from.to_owned(),
    }
}

/// Takes the counts whose second is over, and says what was suppressed in it.
fn over(counts: &Mutex<Counts>) -> Vec<Line> {
    let now = at(jiff::Timestamp::now().as_millisecond());
    let mut lines = Vec::new();
    let mut counts = counts.lock().unwrap_or_else(PoisonError::into_inner);
    counts.retain(|caller, count| {
        let is_over = count.since.elapsed() >= A_WHILE;
        if is_over && count.suppressed > 0 {
            lines.push(Line {
                at: now.clone(),
                decision: None,
                suppressed: Some(count.suppressed),
                caller: caller.clone(),
                via: None,
                from: String::new(),
                verb: "",
                vm: String::new(),
                target: String::new(),
                reason: "",
            });
        }
        !is_over
    });
    lines
}

/// The file that is written, and those before it.
#[derive(Debug)]
struct Files {
    path: PathBuf,
    open: Option<(File, u64)>,
}

impl Files {
    /// Appends, and makes room first where the file is full.
    fn append(&mut self, text: &[u8]) -> io::Result<()> {
        if self.open.as_ref().is_some_and(|(_, len)| *len >= FILE_MAX) {
            self.open = None;
            self.turn()?;
        }
        let (file, len) = match &mut self.open {
            Some(open) => open,
            None => {
                let mut options = OpenOptions::new();
                let file = options
                    .create(true)
                    .append(true)
                    .mode(0o600)
                    .open(&self.path)?;
                let len = file.metadata()?.len();
                self.open.insert((file, len))
            }
        };
        let written = file.write_all(text);
        match written {
            Ok(()) => *len += text.len() as u64,
            Err(_) => {
                // No half a line, as where the disk is full. The next one finds out whether the file can be opened.
                let _ = file.set_len(*len);
                self.open = None;
            }
        }
        written
    }

    /// `FILE` becomes `FILE.1`, and so on; the oldest goes.
    fn turn(&self) -> io::Result<()> {
        let nth = |n: usize| match n {
            0 => self.path.clone(),
            n => self.path.with_extension(format!("audit.{n}")),
        };
        for n in (0..FILES).rev() {
            match std::fs::rename(nth(n), nth(n + 1)) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
                _ => {}
            }
        }
        Ok(())
    }
}

/// Writes lines as they come, and counts about once a second.
fn write_all(mut files: Files, lines: &Receiver<Line>, counts: &Mutex<Counts>) {
    let (mut failed, mut next) = (false, Instant::now() + A_WHILE);
    loop {
        let wait = next.saturating_duration_since(Instant::now());
        let mut some = match lines.recv_timeout(wait) {
            Ok(line) => vec![line],
            Err(RecvTimeoutError::Timeout) => vec![],
            Err(RecvTimeoutError::Disconnected) => return,
        };
        if next <= Instant::now() {
            some.extend(over(counts));
            next = Instant::now() + A_WHILE;
        }
        for line in some {
            let Ok(mut text) = serde_json::to_vec(&line) else {
                continue;
            };
            text.push(b'\n');
            let written = files.append(&text);
            if let Err(e) = &written
                && !failed
            {
                tracing::error!(error = %e, file = FILE, "the audit is not written: make room on the disk of state_dir");
            }
            failed = written.is_err();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decided(caller: &Caller) -> Decided<'_> {
        Decided {
            caller,
            verb: "reach",
            vm: "web-1\n\u{1b}[2J",
            target: "tcp:22",
            denied: Some("not-granted"),
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
        let audit = Audit::start(dir.path()).unwrap();
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
        let audit = Audit::start(dir.path()).unwrap();
        for n in 0..CALLERS_MAX + 100 {
            let caller = Caller::anonymous("x").with_token(&n.to_string());
            for _ in 0..=LINES_MAX {
                audit.note(decided(&caller), 0);
            }
        }
        let counted = || audit.counts.lock().unwrap().len();
        assert!(counted() <= CALLERS_MAX + 1);
        let begin = Instant::now();
        while counted() > 0 {
            assert!(begin.elapsed() < Duration::from_secs(30));
            std::thread::yield_now();
        }
    }

    #[test]
    fn files_are_cut_and_the_oldest_goes() {
        let dir = tempfile::tempdir().unwrap();
        let mut files = Files {
            path: dir.path().join(FILE),
            open: None,
        };
        let big = vec![b'x'; usize::try_from(FILE_MAX).unwrap()];
        for _ in 0..FILES + 3 {
            files.append(&big).unwrap();
        }
        let mut names: Vec<_> = std::fs::read_dir(dir.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        let want: Vec<_> = (0..=FILES)
            .map(|n| {
                if n == 0 {
                    FILE.into()
                } else {
                    format!("{FILE}.{n}")
                }
            })
            .collect();
        assert_eq!(names, want);
    }
}
