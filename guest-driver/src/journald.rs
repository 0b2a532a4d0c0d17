//! Event lines for systemd's journal, with fields by which `journalctl VM=web-1 TASK=…` finds them.
//!
//! Only where standard error is the journal (`JOURNAL_STREAM`, systemd.exec(5)): who sends the agent's lines elsewhere finds
//! all of them there. The format is that of <https://systemd.io/JOURNAL_NATIVE_PROTOCOL/>, without its form for values of
//! several lines: no value has one (see `log`).

use std::env;
use std::fmt::Write as _;
use std::os::unix::net::UnixDatagram;
use std::sync::{Mutex, OnceLock, PoisonError};

use adit_names::VmId;
use nix::sys::stat::fstat;

const SOCKET: &str = "/run/systemd/journal/socket";

static JOURNAL: OnceLock<Option<UnixDatagram>> = OnceLock::new();
static VM: Mutex<Option<VmId>> = Mutex::new(None);

/// Whose lines these are, from now on.
pub fn is_vm(vm: Option<&VmId>) {
    *VM.lock().unwrap_or_else(PoisonError::into_inner) = vm.cloned();
}

/// Sends a line. False where it has to be written to standard error: that is no journal, or the journal takes nothing now.
pub fn send(line: &str, task: Option<&str>, priority: u8) -> bool {
    let Some(journal) = JOURNAL.get_or_init(connect) else {
        return false;
    };
    let vm = VM.lock().unwrap_or_else(PoisonError::into_inner).clone();
    let entry = entry(line, vm.as_ref().map(VmId::as_str), task, priority);
    journal.send(entry.as_bytes()).is_ok()
}

/// Whether standard error is the journal.
pub fn is_there() -> bool {
    JOURNAL.get_or_init(connect).is_some()
}

fn connect() -> Option<UnixDatagram> {
    let stream = env::var("JOURNAL_STREAM").ok()?;
    let stderr = fstat(std::io::stderr()).ok()?;
    if stream != format!("{}:{}", stderr.st_dev, stderr.st_ino) {
        return None;
    }
    let socket = UnixDatagram::unbound().ok()?;
    socket.connect(SOCKET).ok()?;
    // A journal that is stuck must not stop the agent.
    socket.set_nonblocking(true).ok()?;
    Some(socket)
}

fn entry(line: &str, vm: Option<&str>, task: Option<&str>, priority: u8) -> String {
    let line = line.trim_end();
    let mut entry = format!("PRIORITY={priority}\nSYSLOG_IDENTIFIER=adit-guest\nMESSAGE={line}\n");
    for (field, value) in [("VM", vm), ("TASK", task)] {
        if let Some(value) = value {
            let _ = writeln!(entry, "{field}={value}");
        }
    }
    entry
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_a_field_a_line() {
        assert_eq!(
            entry("started task=ab step=x\n", Some("web-1"), Some("ab"), 6),
            "PRIORITY=6\nSYSLOG_IDENTIFIER=adit-guest\nMESSAGE=started task=ab step=x\nVM=web-1\nTASK=ab\n"
        );
    }

    #[test]
    fn nothing_is_sent_where_standard_error_is_no_journal() {
        assert!(!send("ready", None, 6));
    }
}
