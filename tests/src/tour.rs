//! A page of the documentation is typed into a machine, from its first command to its last. What the page shows of an output
//! must come. It panics where it does not, as tests do.

use std::fs;
use std::ops::Range;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::guest::Guest;
use crate::machine::{CLONE, Machine};
use crate::page::{self, commands};
use crate::process::wait_for;

/// How long what a page shows may take to become so.
const PATIENCE: Duration = Duration::from_secs(180);

/// Commands that only look: what they show may take a moment to be so, and a person who sees something else looks again.
const LOOKS: [&str; 6] = [
    "adit vm ls",
    "adit vm show",
    "adit config",
    "curl -s ",
    "journalctl ",
    "systemctl show ",
];

/// The line on which a text begins.
///
/// # Panics
/// It is not on the page.
pub fn line(page: &str, text: &str) -> usize {
    let at = page.find(text).unwrap_or_else(|| panic!("no `{text}`"));
    page[..at].matches('\n').count() + 1
}

/// A page's text.
///
/// # Panics
/// There is no such page.
pub fn read(page: &str) -> String {
    fs::read_to_string(crate::root().join(page)).unwrap()
}

/// Checks what a command did.
///
/// # Panics
/// It did something else.
pub fn check(
    page: &str,
    command: &page::Command,
    status: i32,
    said: &str,
    more: &dyn Fn() -> String,
) {
    let shown = page::missing(&command.shown, said);
    assert!(
        status == command.exit && shown.is_none(),
        "{page}, `{}`: status {status} and not {}, or {shown:?} is not in it:\n{said}\n{}",
        command.text,
        command.exit,
        more()
    );
}

/// What is typed for a command. One that asks for a terminal gets one, where `exit` is typed.
fn typed(text: &str) -> String {
    if text.starts_with("ssh -t ") {
        return format!("echo exit | script -qec \"{text}\" /dev/null");
    }
    text.to_owned()
}

/// A machine that a page is typed into, and what the test does at it besides.
#[derive(Debug)]
pub struct Tour {
    page: &'static str,
    /// The machine.
    pub machine: Machine,
    /// The guest that the test boots, once it does.
    pub guest: Option<Guest>,
    dir: tempfile::TempDir,
}

impl Tour {
    /// Sets up a machine. `bins` is the directory of aditd, adit-port and adit.
    ///
    /// # Errors
    /// It does not come up.
    pub fn start(page: &'static str, bins: &Path) -> anyhow::Result<Self> {
        Ok(Self {
            page,
            machine: Machine::start(bins)?,
            guest: None,
            dir: tempfile::tempdir()?,
        })
    }

    /// A directory for the test's files.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Types the commands of some lines.
    ///
    /// # Panics
    /// One does not do what the page shows.
    pub fn follow(&mut self, text: &str, lines: Range<usize>) {
        for command in commands(text) {
            if !lines.contains(&command.line) {
                continue;
            }
            println!("{}:{}: $ {}", self.page, command.line, command.text);
            if let Some(reason) = &command.not_run {
                println!("not run: {reason}");
                continue;
            }
            let begin = Instant::now();
            let looks = LOOKS.iter().any(|look| command.text.starts_with(look));
            loop {
                let (status, said) = self.machine.run(&typed(&command.text)).unwrap();
                let shown = page::missing(&command.shown, &said).is_none();
                if shown || !looks || begin.elapsed() > PATIENCE {
                    check(self.page, &command, status, &said, &|| self.log());
                    break;
                }
            }
            if command.text.starts_with("aditd run") {
                // A person is slower than this.
                let served = self.machine.path("/run/adit/proxy.addr");
                wait_for("aditd", PATIENCE, || Ok(served.exists().then_some(()))).unwrap();
            }
        }
    }

    /// What everybody said.
    pub fn log(&self) -> String {
        let read = |path: &str| fs::read_to_string(self.machine.path(path)).unwrap_or_default();
        let serial = self.guest.as_ref().map(Guest::serial).unwrap_or_default();
        let port = read("/run/adit/vm/web-1/port.log");
        let own = read(&format!("{CLONE}/web-1.log"));
        format!("{}\n{port}\n{serial}\n{own}", self.machine.log())
    }
}
