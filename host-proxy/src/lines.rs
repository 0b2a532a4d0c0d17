//! Lines of JSON about what callers do: into a file of their own in state_dir, or to the journal.
//!
//! ```text
//! whoever serves ─ note ─► count of the caller ─► queue ─► a thread ─► FILE, FILE.1, … or stderr
//!                              └ too many: counted ─────────┘ {"at":"…","suppressed":512,"caller":"user:deploy"}
//! ```
//! A caller has so many lines a second; of more there is a count, once that second is over. The file is cut at [`FILE_MAX`], and
//! [`FILES`] of them are kept. Whoever notes never waits: a thread writes, and where that has too much to do, lines are counted as
//! well. What cannot be written is counted too, and said when writing works again (`"lost":3`).

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::Serialize;

/// Bytes of the file at most.
pub const FILE_MAX: u64 = 8 << 20;
/// Files that are kept besides the one that is written.
pub const FILES: usize = 4;
/// Callers that are counted at the same time at most; all others share one count.
pub const CALLERS_MAX: usize = 1024;
/// Lines that wait to be written.
const WAITING_MAX: usize = 4096;
/// For how long a caller's lines are counted together.
const A_WHILE: Duration = Duration::from_secs(1);

/// Where lines go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// A file, and older ones beside it.
    File(PathBuf),
    /// Standard error, which the service manager keeps.
    Journal,
}

/// What is written.
#[derive(Debug)]
pub struct Lines {
    lines: SyncSender<Vec<u8>>,
    counts: Arc<Mutex<Counts>>,
}

/// By kind of line, and caller.
type Counts = HashMap<(&'static str, String), Count>;

#[derive(Debug)]
struct Count {
    since: Instant,
    lines: u32,
    suppressed: u64,
}

/// How many lines were not written.
#[derive(Debug, Serialize)]
struct Suppressed<'a> {
    at: &'a str,
    suppressed: u64,
    #[serde(skip_serializing_if = "str::is_empty")]
    kind: &'static str,
    caller: &'a str,
}

impl Lines {
    /// Starts the thread that writes.
    ///
    /// # Errors
    /// There can be none.
    pub fn start(thread: &str, output: Output) -> io::Result<Self> {
        let (lines, written) = sync_channel(WAITING_MAX);
        let counts = Arc::<Mutex<Counts>>::default();
        let of_thread = counts.clone();
        let named = std::thread::Builder::new().name(thread.into());
        named.spawn(move || {
            // Opened here, so that a disk that hangs stops this thread only.
            let files = match output {
                Output::File(path) => Some(Files { path, open: None }),
                Output::Journal => None,
            };
            write_all(files, &written, &of_thread);
        })?;
        Ok(Self { lines, counts })
    }

    /// Writes a line of that kind, or counts it: `of` has `max` of them a second.
    pub fn note(&self, kind: &'static str, of: &str, max: u32, line: &impl Serialize) {
        let mut key = (kind, of.to_owned());
        {
            let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
            if counts.len() >= CALLERS_MAX && !counts.contains_key(&key) {
                // Until the thread has written those that are over.
                key.1 = "others".into();
            }
            let count = counts.entry(key.clone()).or_insert(Count {
                since: Instant::now(),
                lines: 0,
                suppressed: 0,
            });
            if count.lines >= max {
                count.suppressed += 1;
                return;
            }
            count.lines += 1;
        }
        let queued = serde_json::to_vec(line).map(|mut text| {
            text.push(b'\n');
            self.lines.try_send(text)
        });
        if !matches!(queued, Ok(Ok(()))) {
            let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(count) = counts.get_mut(&key) {
                count.suppressed += 1;
            }
        }
    }

    #[cfg(test)]
    pub(crate) fn counted(&self) -> usize {
        self.counts.lock().unwrap().len()
    }
}

/// A time as lines have it.
pub fn at(now_ms: i64) -> String {
    jiff::Timestamp::from_millisecond(now_ms)
        .unwrap_or_default()
        .to_string()
}

/// Takes the counts whose second is over, and says what was suppressed in it.
fn over(counts: &Mutex<Counts>) -> Vec<Vec<u8>> {
    let now = at(jiff::Timestamp::now().as_millisecond());
    let mut lines = Vec::new();
    let mut counts = counts.lock().unwrap_or_else(PoisonError::into_inner);
    counts.retain(|(kind, caller), count| {
        let is_over = count.since.elapsed() >= A_WHILE;
        if is_over && count.suppressed > 0 {
            let line = Suppressed {
                at: &now,
                suppressed: count.suppressed,
                kind,
                caller,
            };
            lines.extend(serde_json::to_vec(&line).map(|mut text| {
                text.push(b'\n');
                text
            }));
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
            n => {
                let mut name = self.path.clone().into_os_string();
                name.push(format!(".{n}"));
                name.into()
            }
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
fn write_all(mut files: Option<Files>, lines: &Receiver<Vec<u8>>, counts: &Mutex<Counts>) {
    let mut write = |text: &[u8]| match &mut files {
        Some(files) => files.append(text),
        None => io::stderr().write_all(text),
    };
    let (mut lost, mut next) = (0_u64, Instant::now() + A_WHILE);
    loop {
        // Nobody is counted before a line has come: until then there is nothing to wake for.
        let is_idle = counts
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .is_empty();
        let wait = next.saturating_duration_since(Instant::now());
        let received = match is_idle {
            true => lines.recv().map_err(|_| RecvTimeoutError::Disconnected),
            false => lines.recv_timeout(wait),
        };
        let mut some = match received {
            Ok(line) => vec![line],
            Err(RecvTimeoutError::Timeout) => vec![],
            Err(RecvTimeoutError::Disconnected) => return,
        };
        if next <= Instant::now() {
            some.extend(over(counts));
            next = Instant::now() + A_WHILE;
        }
        for text in some {
            if lost > 0 {
                let now = at(jiff::Timestamp::now().as_millisecond());
                let line = format!("{{\"at\":\"{now}\",\"lost\":{lost}}}\n");
                if write(line.as_bytes()).is_err() {
                    lost += 1;
                    continue;
                }
                lost = 0;
            }
            if let Err(e) = write(&text) {
                // Once, until it works again.
                tracing::error!(error = %e, "the audit or the access log is not written: make room on the disk of state_dir");
                lost = 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_with_nothing_to_write_and_to_count_sleeps() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lines");
        let lines = Lines::start("idle-lines", Output::File(path.clone())).unwrap();
        lines.note("", "a", 1, &1);
        let begin = Instant::now();
        while lines.counted() > 0 {
            assert!(begin.elapsed() < Duration::from_secs(30));
            std::thread::sleep(Duration::from_millis(10));
        }
        let slept = || {
            let tasks = std::fs::read_dir("/proc/self/task").unwrap();
            let mut tasks = tasks.map(|task| task.unwrap().path());
            let task = tasks.find(|task| {
                let name = std::fs::read_to_string(task.join("comm"));
                name.is_ok_and(|name| name.trim() == "idle-lines")
            });
            let status = std::fs::read_to_string(task.unwrap().join("status")).unwrap();
            let line = status.lines().find(|l| l.starts_with("voluntary"));
            line.unwrap().to_owned()
        };
        // It may still be on its way to sleep.
        std::thread::sleep(Duration::from_millis(200));
        let before = slept();
        std::thread::sleep(2 * A_WHILE);
        assert_eq!(slept(), before);
        lines.note("", "a", 1, &2);
        while std::fs::read_to_string(&path).unwrap() != "1\n2\n" {
            assert!(begin.elapsed() < Duration::from_secs(30));
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    #[test]
    fn files_are_cut_and_the_oldest_goes() {
        let dir = tempfile::tempdir().unwrap();
        let mut files = Files {
            path: dir.path().join("aditd.audit"),
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
            .map(|n| match n {
                0 => "aditd.audit".to_owned(),
                n => format!("aditd.audit.{n}"),
            })
            .collect();
        assert_eq!(names, want);
    }

    #[test]
    fn r111_what_cannot_be_written_is_counted_and_said_when_it_can() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("there");
        let lines = Lines::start("test", Output::File(path.join("log"))).unwrap();
        let note = |n: u32| lines.note("", "x", u32::MAX, &serde_json::json!({ "n": n }));
        (0..3).for_each(note);
        // The thread has them once its queue has room for as many as it may hold.
        let begin = Instant::now();
        std::fs::create_dir(&path).unwrap();
        let text = loop {
            note(9);
            let text = std::fs::read_to_string(path.join("log")).unwrap_or_default();
            if text.contains("\"n\":9") {
                break text;
            }
            assert!(begin.elapsed() < Duration::from_secs(30), "{text}");
        };
        // However fast the thread was: none is missing without a word.
        let parsed = text.lines().map(|line| serde_json::from_str(line).unwrap());
        let stands_for = |line: serde_json::Value| match line.get("lost") {
            Some(lost) => lost.as_u64().unwrap(),
            None => u64::from(line["n"] != 9),
        };
        let found: u64 = parsed.map(stands_for).sum();
        assert!(found >= 3, "{text}");
    }
}
