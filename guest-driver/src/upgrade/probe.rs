//! A program is tried before it may become the agent: it says its version, and reads this guest's configuration. So one that this
//! kernel or processor cannot run, that is not what its package says, or that would not take the configuration, never gets as
//! far as a trial.

use std::io::{ErrorKind, Read};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use semver::Version;

use super::Refused;
use super::program::{ARCHITECTURE, HEAD, architecture};
use crate::exec::reap;

/// How long it may take for each.
const LIMIT: Duration = Duration::from_secs(10);
/// How often it is asked whether it has ended.
const LOOK: Duration = Duration::from_millis(10);
/// Most bytes of what it says.
const SAID_MAX: u64 = 4096;

/// Checks that a file is a program for this machine.
///
/// # Errors
/// It is not.
pub fn is_program(mut file: impl Read) -> Result<(), Refused> {
    let mut head = Vec::new();
    let read = file.by_ref().take(HEAD as u64).read_to_end(&mut head);
    read.map_err(super::place::refused)?;
    match architecture(&head) {
        Some(is) if is == ARCHITECTURE => Ok(()),
        Some(is) => {
            let text = format!("the program is for {is}, and this is {ARCHITECTURE}");
            Err(Refused::new("agent-foreign", text))
        }
        None => Err(Refused::new(
            "agent-not-elf",
            "what is signed is no program",
        )),
    }
}

/// Tries a program.
///
/// # Errors
/// It does not run, or is not what it should be.
pub fn run(program: &Path, version: &Version, config: &Path) -> Result<(), Refused> {
    let cannot = |why: String| Refused::new("agent-cannot-run", why);
    let said = ask(Command::new(program).arg("version")).map_err(cannot)?;
    let wanted = format!("adit-guest {version}");
    if said.trim_end() != wanted {
        let said = adit_names::escape(said.trim_end()).at_most(80).to_string();
        let text = format!("the program says that it is `{said}`, and its package `{wanted}`");
        return Err(Refused::new("agent-wrong-version", text));
    }
    let checked = ask(Command::new(program).arg("check-config").arg(config));
    checked.map(drop).map_err(|why| {
        cannot(format!(
            "it cannot use this guest's configuration: {why}; mend that first"
        ))
    })
}

/// Runs a command to its end, and returns what it wrote.
fn ask(command: &mut Command) -> Result<String, String> {
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let until = Instant::now() + LIMIT;
    let (mut child, _claim) = loop {
        match reap::spawn(|| command.spawn()) {
            // A child of another thread's has inherited the file as it was written, and is on its way to its own program.
            Err(e) if e.kind() == ErrorKind::ExecutableFileBusy && Instant::now() < until => {
                thread::sleep(LOOK);
            }
            started => break started.map_err(|e| format!("it cannot be run here: {e}"))?,
        }
    };
    let (out, err) = (child.stdout.take(), child.stderr.take());
    let status = loop {
        match child.try_wait() {
            Ok(Some(status)) => break status,
            Ok(None) if Instant::now() < until => thread::sleep(LOOK),
            // A pipe that is full, too: what is asked for is short.
            _ => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(format!("it did not end within {LIMIT:?}"));
            }
        }
    };
    match status.success() {
        true => Ok(read(out)),
        false => {
            let said = read(err);
            let said = adit_names::escape(said.trim()).at_most(300).to_string();
            Err(format!("{status}: {said}"))
        }
    }
}

/// What a program that has ended wrote. Whoever has inherited the other end may keep it open, and is not waited for.
fn read(pipe: Option<impl Read + AsFd>) -> String {
    let mut bytes = Vec::new();
    if let Some(pipe) = pipe
        && fcntl(&pipe, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).is_ok()
    {
        let _ = pipe.take(SAID_MAX).read_to_end(&mut bytes);
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use nix::sys::signal::{Signal, kill};
    use nix::unistd::Pid;

    use super::*;

    #[test]
    fn what_has_ended_is_read_while_a_process_that_it_left_has_its_pipes() {
        let mut sh = Command::new("sh");
        let said = ask(sh.args(["-c", "sleep 1000 & echo $!"])).unwrap();
        let left = Pid::from_raw(said.trim_end().parse().unwrap());
        kill(left, Signal::SIGKILL).unwrap();
    }
}
