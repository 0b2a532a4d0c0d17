//! `adit exec --all`: one command in many VMs at once, and one stream of lines of all of them.
//!
//! ```text
//! VM ── frames ── a task each ── lines ──┐
//! VM ── frames ── a task each ── lines ──┴─► one channel with few places ──► a thread that prints
//! ```
//! Whoever reads slowly makes the commands wait, as with one VM: a task that has a line waits until the channel takes it.

use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use adit_api::Vm;
use adit_exec::{ClientError, Exit, Heard, Open, Out, ToGuest, What};
use adit_print::PrintError;
use adit_tasks::vms::Vms;
use serde::Serialize;
use tokio::sync::{broadcast, mpsc};
use tokio::task::JoinSet;

use super::ours;
use super::stream::{self, Caught, IMPATIENT, INT, WINCH};
use crate::client::Client;
use crate::error::Failure;
use crate::output;
use crate::text::{Format, escape};

/// Longest line that is waited for; a longer one is printed in pieces.
const LINE_MAX: usize = 64 << 10;
/// Lines that wait to be printed.
const WAITING: usize = 64;

/// What is to be run.
pub(super) struct Command {
    user: String,
    what: What,
    open: Open,
}

impl Command {
    pub(super) fn new(user: &str, program: &str, open: Open) -> Self {
        Self {
            user: user.to_owned(),
            what: What::Run(program.to_owned()),
            open,
        }
    }
}

/// Something to print.
enum Said {
    Line(Arc<str>, Out, Vec<u8>),
    End(Ended),
}

/// How it went in a VM.
#[derive(Serialize)]
struct Ended {
    vm: String,
    status: u8,
    /// Why it was not run, or did not end in order.
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<Failure>,
}

/// A line, for programs.
#[derive(Serialize)]
struct Shown<'a> {
    vm: &'a str,
    stream: &'a str,
    line: &'a str,
}

/// Runs a command in all these VMs, in so many at once.
pub(super) async fn run(
    command: Command,
    client: &Client,
    (vms, parallel): (&Vms, usize),
    format: Format,
) -> Result<ExitCode, Failure> {
    let mut left = chosen(client, vms).await?.into_iter();
    let (total, command) = (left.len(), Arc::new(command));
    let (say, said) = mpsc::channel(WAITING);
    let mut printing = tokio::task::spawn_blocking(move || print(said, format));
    let (tell, _) = broadcast::channel::<u8>(16);
    let mut caught = Caught::of_many().map_err(|e| Failure::io("cannot catch signals", &e))?;
    let (mut running, mut over) = (JoinSet::new(), Vec::with_capacity(total));
    let (mut pressed, mut stopped): (Vec<Instant>, bool) = (Vec::new(), false);
    while over.len() < total {
        while running.len() < parallel && !stopped {
            let Some(vm) = left.next() else { break };
            let one = One {
                vm,
                client: client.clone(),
                command: command.clone(),
                say: say.clone(),
                signals: tell.subscribe(),
            };
            running.spawn(one.run());
        }
        if stopped && running.is_empty() {
            for vm in left.by_ref() {
                let error = Failure::interrupted("it was not begun");
                over.push(end(&say, vm, Err(error)).await);
            }
            continue;
        }
        tokio::select! {
            ended = running.join_next() => match ended {
                Some(Ok(ended)) => over.push(ended),
                // None panics, and none is cancelled.
                Some(Err(e)) => return Err(Failure::new("internal", e.to_string())),
                None => {}
            },
            number = caught.next() => {
                if number == WINCH {
                    continue;
                }
                stopped = true;
                let (many, within) = IMPATIENT;
                if number == INT {
                    pressed.retain(|at| at.elapsed() < within);
                    pressed.push(Instant::now());
                    if pressed.len() >= many {
                        return Err(Failure::interrupted("Ctrl-C: the commands are left, and end with that"));
                    }
                }
                // Nobody may be there to hear it.
                let _ = tell.send(number);
            }
            printed = &mut printing => {
                printed.map_err(|e| Failure::new("internal", e.to_string()))??;
                return Err(Failure::new("internal", "nobody prints any more"));
            }
        }
    }
    drop(say);
    let printed = printing.await;
    printed.map_err(|e| Failure::new("internal", e.to_string()))??;
    over.sort();
    if format == Format::Table {
        tell_failed(&over);
    }
    let worst = over.iter().map(|(_, status, _)| *status).max();
    Ok(ExitCode::from(worst.unwrap_or(0)))
}

/// A VM's name, its status, and what is to be said of it.
type Over = (Arc<str>, u8, String);

fn tell_failed(over: &[Over]) {
    let failed: Vec<_> = over.iter().filter(|(_, status, _)| *status != 0).collect();
    for (vm, _, text) in &failed {
        adit_print::note(format_args!("{}: {}", escape(vm), escape(text)));
    }
    if !failed.is_empty() {
        let (total, failed) = (over.len(), failed.len());
        adit_print::note(format_args!("{failed} of {total} VMs: not status 0"));
    }
}

async fn chosen(client: &Client, vms: &Vms) -> Result<Vec<Arc<str>>, Failure> {
    let all: Vec<Vm> = client.get("/v1/vms").await?;
    let has = |vm: &Vm| vms.has(&vm.name, |key| vm.labels.get(key).map(String::as_str));
    let chosen: Vec<_> = all
        .iter()
        .filter(|vm| has(vm))
        .map(|vm| vm.name.as_str().into())
        .collect();
    match chosen.is_empty() {
        true => Err(
            Failure::new("unknown-vm", format!("this host has no VM that is `{vms}`"))
                .help("`adit vm ls` lists them, `adit vm show` has their labels"),
        ),
        false => Ok(chosen),
    }
}

/// One of the VMs.
struct One {
    vm: Arc<str>,
    client: Client,
    command: Arc<Command>,
    say: mpsc::Sender<Said>,
    signals: broadcast::Receiver<u8>,
}

impl One {
    async fn run(mut self) -> Over {
        let ended = self.carry().await.map_err(ours);
        end(&self.say, self.vm, ended).await
    }

    async fn carry(&mut self) -> Result<Exit, Failure> {
        let Command { user, what, open } = &*self.command;
        let mut stream = stream::open(&self.client, &self.vm, Some(user), what).await?;
        stream.say(&ToGuest::Open(open.clone())).await?;
        let mut lines = [Lines::default(), Lines::default()];
        loop {
            let heard = tokio::select! {
                heard = stream.hear() => heard?,
                Ok(number) = self.signals.recv() => {
                    stream.say(&ToGuest::Signal(number)).await?;
                    continue;
                }
            };
            match heard {
                Heard::Output(out, bytes) => {
                    lines[usize::from(out == Out::Stderr)].push(&bytes);
                    self.tell(&mut lines, false).await;
                }
                Heard::Exit(exit) => {
                    self.tell(&mut lines, true).await;
                    return Ok(exit);
                }
                Heard::Refused(why) => return Err(stream::no(&why)),
                Heard::Started(_) | Heard::Nothing => {}
                Heard::Rows(_) | Heard::Done => return Err(stream::lies(ClientError::NotDue)),
            }
        }
    }

    async fn tell(&self, lines: &mut [Lines; 2], is_end: bool) {
        for (out, lines) in [Out::Stdout, Out::Stderr].into_iter().zip(lines) {
            while let Some(line) = lines.pop(is_end) {
                // Whoever prints has gone, and that is seen there.
                let _ = self.say.send(Said::Line(self.vm.clone(), out, line)).await;
            }
        }
    }
}

/// Says how it went.
async fn end(say: &mpsc::Sender<Said>, vm: Arc<str>, ended: Result<Exit, Failure>) -> Over {
    let (status, text, error) = match ended {
        Ok(exit) => {
            let status = stream::number(&exit);
            let text = match exit.text.is_empty() {
                true => format!("status {status}"),
                false => format!("status {status}: {}", exit.text),
            };
            (status, text, None)
        }
        Err(e) => {
            let help = match e.help.is_empty() {
                true => String::new(),
                false => format!("; {}", e.help),
            };
            let text = format!("error[{}]: {}{help}", e.code, e.message);
            (e.status().max(1), text, Some(e))
        }
    };
    let said = Ended {
        vm: vm.to_string(),
        status,
        error,
    };
    let _ = say.send(Said::End(said)).await;
    (vm, status, text)
}

/// Whole lines of bytes that come in pieces.
#[derive(Default)]
struct Lines(Vec<u8>);

impl Lines {
    fn push(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    /// The next line without its end; at the end of all also one that has none.
    fn pop(&mut self, is_end: bool) -> Option<Vec<u8>> {
        let end = self.0.iter().position(|b| *b == b'\n');
        let (len, taken) = match end {
            Some(at) if at <= LINE_MAX => (at, at + 1),
            _ if self.0.len() > LINE_MAX => (LINE_MAX, LINE_MAX),
            _ if is_end && !self.0.is_empty() => (self.0.len(), self.0.len()),
            _ => return None,
        };
        let rest = self.0.split_off(taken);
        let mut line = std::mem::replace(&mut self.0, rest);
        line.truncate(len);
        Some(line)
    }
}

/// Prints what is said until nobody says anything any more.
fn print(mut said: mpsc::Receiver<Said>, format: Format) -> Result<(), Failure> {
    let is_terminal = [io::stdout().is_terminal(), io::stderr().is_terminal()];
    while let Some(said) = said.blocking_recv() {
        match (said, format) {
            (Said::Line(vm, out, line), Format::Json) => output::json(&Shown {
                vm: &vm,
                stream: match out {
                    Out::Stdout => "stdout",
                    Out::Stderr => "stderr",
                },
                line: &String::from_utf8_lossy(&line),
            })?,
            (Said::End(ended), Format::Json) => output::json(&ended)?,
            (Said::End(_), Format::Table) => {}
            (Said::Line(vm, out, line), Format::Table) => {
                let line = match is_terminal[usize::from(out == Out::Stderr)] {
                    true => output::for_terminal(&line).into_bytes(),
                    false => line,
                };
                let whole = [vm.as_bytes(), b": ", &line, b"\n"].concat();
                match out {
                    Out::Stdout => adit_print::bytes(&whole)?,
                    Out::Stderr => io::stderr()
                        .lock()
                        .write_all(&whole)
                        .map_err(PrintError::from)?,
                }
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(pieces: &[&[u8]]) -> Vec<Vec<u8>> {
        let (mut lines, mut out) = (Lines::default(), Vec::new());
        for piece in pieces {
            lines.push(piece);
            out.extend(std::iter::from_fn(|| lines.pop(false)));
        }
        out.extend(std::iter::from_fn(|| lines.pop(true)));
        out
    }

    #[test]
    fn lines_are_whole_however_they_come() {
        assert_eq!(lines(&[b"a", b"b\nc\n\nd"]), [&b"ab"[..], b"c", b"", b"d"]);
        assert_eq!(lines(&[b"a\n"]), [b"a"]);
        assert_eq!(lines(&[]), Vec::<Vec<u8>>::new());
        let long = vec![b'x'; LINE_MAX + 1];
        assert_eq!(lines(&[&long, b"\n"]), [&long[..LINE_MAX], b"x"]);
    }
}
