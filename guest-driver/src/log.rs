//! Event log: one line an event on standard error, which is a console, /dev/kmsg or a service manager's journal. systemd's
//! journal gets fields as well (`journald`). What somebody has to do something about, an event with a field `do`, is an error
//! there, and on the console too: without the agent it is the operator's only view of the guest.
//!
//! `adit-guest: NAME key=value …`. Values that a peer or a task chose are escaped, so that no value can forge a
//! second line or a terminal sequence. A line that cannot be written is dropped: logging never stops the agent.
//! Events that a client can cause as often as it likes get one line a second (`BY_PEERS`), with a count of the others.

use std::fmt::{Display, Write as _};
use std::io::Write as _;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// An error and what caused it, as one value.
pub use adit_print::with_causes as chain;

use crate::journald;

/// A console has other lines as well.
const PREFIX: &str = "adit-guest: ";
/// Most bytes of one value; the rest is cut and marked.
const VALUE_MAX: usize = 512;
/// Most bytes of a line for the kernel's log; it takes no more than 1 KiB.
const CONSOLE_MAX: usize = 900;
/// Priorities of syslog(3).
const ERROR: u8 = 3;
const INFO: u8 = 6;

/// Events that a client, or a process of this guest, causes by opening a stream, or the host by what it says.
const BY_PEERS: [&str; 15] = [
    "stream",
    "stream-refused",
    "hello-refused",
    "relay-failed",
    "accept-failed",
    "ring-failed",
    "ring-ended",
    "trust-refused",
    "blob",
    "blob-refused",
    "agent-refused",
    "exec-refused",
    "exec-lost",
    "files-refused",
    "files-ended",
];
/// Such an event gets one line in this time.
const PERIOD: Duration = Duration::from_secs(1);

/// When each of them was last written, and how many were left out since.
static WRITTEN: Mutex<[Option<(Instant, u64)>; BY_PEERS.len()]> =
    Mutex::new([None; BY_PEERS.len()]);

/// Writes one event line.
pub fn event(name: &str, fields: &[(&str, &dyn Display)]) {
    let mut line = format_line(name, fields);
    if let Some(nth) = BY_PEERS.iter().position(|of| *of == name) {
        let mut written = WRITTEN.lock().unwrap_or_else(PoisonError::into_inner);
        match admit(&mut written[nth], Instant::now()) {
            None => return,
            Some(0) => {}
            Some(left) => line.insert_str(line.len() - 1, &format!(" left_out={left}")),
        }
    }
    let task = fields
        .iter()
        .find(|(key, _)| *key == "task")
        .map(|(_, task)| {
            let mut shown = String::new();
            push_value(&mut shown, &task.to_string());
            shown
        });
    let message = line.trim_start_matches(PREFIX);
    let has_remedy = fields.iter().any(|(key, _)| *key == "do");
    let priority = if has_remedy { ERROR } else { INFO };
    if !journald::send(message, task.as_deref(), priority) {
        let _ = std::io::stderr().lock().write_all(line.as_bytes());
    } else if has_remedy {
        console(&line);
    }
}

/// Writes a line to the console, where standard error does not lead to it.
pub fn console(line: &str) {
    if !journald::is_there() {
        return;
    }
    let line = line.trim_end();
    let mut end = line.len().min(CONSOLE_MAX);
    while !line.is_char_boundary(end) {
        end -= 1;
    }
    // The kernel prints errors also with `quiet`, and limits how many a program writes.
    let kmsg = std::fs::OpenOptions::new().write(true).open("/dev/kmsg");
    let _ =
        kmsg.and_then(|mut kmsg| kmsg.write_all(format!("<{ERROR}>{}\n", &line[..end]).as_bytes()));
}

/// Whether a line may be written now, and how many were left out before it.
fn admit(last: &mut Option<(Instant, u64)>, now: Instant) -> Option<u64> {
    match last {
        Some((at, left)) if now.duration_since(*at) < PERIOD => {
            *left += 1;
            None
        }
        _ => Some(last.replace((now, 0)).map_or(0, |(_, left)| left)),
    }
}

fn format_line(name: &str, fields: &[(&str, &dyn Display)]) -> String {
    let mut line = format!("{PREFIX}{name}");
    for (key, value) in fields {
        let _ = write!(line, " {key}=");
        push_value(&mut line, &value.to_string());
    }
    line.push('\n');
    line
}

fn push_value(line: &mut String, value: &str) {
    let mut end = value.len().min(VALUE_MAX);
    while !value.is_char_boundary(end) {
        end -= 1;
    }
    let (shown, cut) = (&value[..end], end < value.len());
    let plain = |c: char| c.is_ascii_graphic() && c != '"' && c != '\\';
    if !cut && !shown.is_empty() && shown.chars().all(plain) {
        line.push_str(shown);
        return;
    }
    line.push('"');
    line.extend(shown.chars().flat_map(char::escape_default));
    line.push_str(if cut { "…\"" } else { "\"" });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_cannot_forge_a_second_line_or_a_terminal_sequence() {
        let line = format_line(
            "refused",
            &[
                ("why", &"a\nadit-guest: ready \x1b[2J\u{202e}"),
                ("vm", &"web-1"),
            ],
        );
        assert_eq!(line.matches('\n').count(), 1);
        assert!(line.is_ascii() && !line.contains('\x1b'), "{line}");
        assert!(line.ends_with(" vm=web-1\n"));
    }

    #[test]
    fn r111_what_peers_cause_is_a_line_a_second_with_a_count() {
        let (mut last, now) = (None, Instant::now());
        let written = (0..100_000).filter(|_| admit(&mut last, now).is_some());
        assert_eq!(written.count(), 1);
        assert_eq!(admit(&mut last, now + PERIOD), Some(99_999));
        assert_eq!(admit(&mut last, now + 2 * PERIOD), Some(0));
    }

    #[test]
    fn long_values_are_cut_on_a_character_boundary() {
        let line = format_line("x", &[("v", &"é".repeat(VALUE_MAX))]);
        assert!(line.len() < 8 * VALUE_MAX && line.ends_with("…\"\n"));
    }
}
