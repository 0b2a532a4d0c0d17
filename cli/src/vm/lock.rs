//! `adit vm lock`, `adit vm unlock`, and `adit vm rm --drain`: a VM to which nothing new goes, until what is there has ended.

use std::io;
use std::time::{Duration, Instant};

use adit_api::{NewLock, Vm};
use clap::Args;
use tokio::signal::unix::{SignalKind, signal};

use super::{path, show};
use crate::client::Client;
use crate::completion;
use crate::error::Failure;
use crate::output::{self, duration};
use crate::text::{self, Format};

/// For so long aditd is asked at a time. Then it says what is still open.
const ASKED: Duration = Duration::from_secs(1);
/// How soon an aditd that has gone is looked for again.
const AGAIN: Duration = Duration::from_millis(200);
/// From when on that is said.
const QUIET: Duration = Duration::from_secs(2);
/// Why a VM is locked that is to be removed, if nobody has locked it before.
const DRAINED: &str = "it is being removed";

const LOCK_EXAMPLE: &str = "\
Example:
  adit vm lock web-1 --reason \"a new kernel, until noon\"

New tunnels are refused with the reason, and new tasks stay queued. What is open goes on. It is kept over restarts of aditd.";

/// Let nothing new into a VM: no tunnel, no task
#[derive(Args)]
#[command(after_help = LOCK_EXAMPLE)]
pub struct Lock {
    /// Name of the VM
    #[arg(add = completion::vms())]
    name: String,
    /// Why, in one line: whoever is refused reads it
    #[arg(
        long,
        default_value = "",
        hide_default_value = true,
        value_name = "TEXT"
    )]
    reason: String,
}

pub async fn lock(lock: &Lock, client: &Client, format: Format) -> Result<(), Failure> {
    let new = NewLock {
        reason: lock.reason.clone(),
    };
    let vm: Vm = client
        .post(&format!("{}/lock", path(&lock.name)?), &new)
        .await?;
    match format {
        Format::Json => show::show(&vm, format),
        Format::Table => output::line(format_args!(
            "{} is locked; `adit vm unlock {}` opens it again",
            text::escape(&vm.name),
            text::escape(&vm.name)
        )),
    }
}

pub async fn unlock(name: &str, client: &Client, format: Format) -> Result<(), Failure> {
    client.delete(&format!("{}/lock", path(name)?)).await?;
    match format {
        Format::Json => output::json(&serde_json::json!({ "unlocked": name })),
        Format::Table => output::line(format_args!("{name} is open")),
    }
}

// How a VM is drained. (No doc comment: it would be the help of `rm`.)
#[derive(Args)]
pub struct Drain {
    /// Let nothing new in, and remove it when its tunnels and tasks have ended
    #[arg(long)]
    drain: bool,
    /// How long that may take, for example 30s or 5m. Then it stays locked, or with --force it is removed all the same
    #[arg(long, requires = "drain", value_parser = duration, default_value = "5m", value_name = "DURATION")]
    timeout: Duration,
}

impl Drain {
    /// Waits until nothing is open in the VM any more, if that is wanted. `force`: the end of the time is good enough.
    pub async fn run(
        &self,
        name: &str,
        force: bool,
        client: &Client,
        format: Format,
    ) -> Result<(), Failure> {
        if !self.drain {
            return Ok(());
        }
        // From here on, so that nobody leaves a lock behind without hearing of it.
        let cannot = |e: io::Error| Failure::io("cannot wait for signals", &e);
        let mut interrupt = signal(SignalKind::interrupt()).map_err(cannot)?;
        let mut terminate = signal(SignalKind::terminate()).map_err(cannot)?;
        let at = path(name)?;
        let vm: Vm = client.get(&at).await?;
        refused(&vm, force)?;
        if vm.lock.is_none() {
            let lock = NewLock {
                reason: DRAINED.into(),
            };
            let _: Vm = client.post(&format!("{at}/lock"), &lock).await?;
        }
        let drained = tokio::select! {
            drained = self.drained(&at, client, format) => drained,
            _ = interrupt.recv() => Err(stopped(name)),
            _ = terminate.recv() => Err(stopped(name)),
        };
        match drained {
            Err(late) if force && late.code == "timeout" => {
                if format == Format::Table {
                    adit_print::note(text::escape(&late.message));
                }
                Ok(())
            }
            drained => drained,
        }
    }

    async fn drained(&self, at: &str, client: &Client, format: Format) -> Result<(), Failure> {
        let begin = Instant::now();
        let mut said = String::new();
        loop {
            let left = self.timeout.saturating_sub(begin.elapsed());
            let asked = ASKED.min(left);
            let url = format!("{at}/wait?for=drained&timeout_ms={}", asked.as_millis());
            let not_yet = match client.patient(asked).get::<Vm>(&url).await {
                Ok(_) => return Ok(()),
                Err(e) => Failure::from(e),
            };
            // An aditd that is started anew meanwhile still has the lock.
            let goes_on = not_yet.code == "timeout" || not_yet.passing;
            if !goes_on || left <= ASKED {
                return Err(not_yet);
            }
            if not_yet.passing {
                tokio::time::sleep(AGAIN).await;
                continue;
            }
            if begin.elapsed() >= QUIET && format == Format::Table && said != not_yet.message {
                adit_print::note(text::escape(&not_yet.message));
                said = not_yet.message;
            }
        }
    }
}

/// What aditd would refuse when it is drained, it refuses before.
fn refused(vm: &Vm, force: bool) -> Result<(), Failure> {
    if vm.origin.as_deref() == Some("file") {
        let message = format!("`{}` is configured in aditd.toml", vm.name);
        return Err(Failure::new("configured", message).help(
            "lock it with `adit vm lock`; take it out there, then `systemctl reload aditd`",
        ));
    }
    if vm.origin.as_deref() == Some("found") {
        let message = format!("`{}` is there because its VMM's socket was found", vm.name);
        return Err(Failure::new("found", message).help(
            "lock it with `adit vm lock`; it goes when the socket and its directory are gone",
        ));
    }
    match vm.held_by {
        Some(pid) if !force => {
            let message = format!(
                "process {pid}, the VMM of `{}`, serves its channel itself",
                vm.name
            );
            Err(Failure::new("held", message)
                .help("lock it with `adit vm lock`; when the VM ends, its VMM removes it here"))
        }
        _ => Ok(()),
    }
}

/// Somebody has pressed Ctrl-C.
fn stopped(name: &str) -> Failure {
    Failure::interrupted(format!("`{name}` is not removed, and stays locked")).help(format!(
        "`adit vm rm {name} --drain` goes on; `adit vm unlock {name}` opens it again"
    ))
}
