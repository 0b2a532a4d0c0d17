//! `adit agent …`: gives VMs the next agent over the channel, signed where the manager is.
//!
//! ```text
//! FILE ─► its digest and version ─► the package, signed ─► aditd has the file ─► for each VM: sent ─► ordered ─► it runs
//! ```

use std::fs::File;
use std::io::{self, Read, Seek};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use adit_api::{AgentAnswer, AgentOrder, Blob, PIECE_MAX, Transfer, Vm, VmState};
use adit_blob::Digest;
use adit_client::Method;
use adit_guest_driver::upgrade::program::{HEAD, architecture};
use adit_names::VmId;
use adit_tasks::Package;
use adit_tasks::dsse::{Type, sign_as};
use adit_tasks::package::{SIZE_MAX, version};
use clap::{Args, Subcommand};
use jiff::{SignedDuration, Timestamp};

use crate::client::Client;
use crate::error::Failure;
use crate::output::{self, duration};
use crate::text::{Format, escape};
use crate::{completion, key};

/// How long a package may be taken if nobody says otherwise.
const VALID: SignedDuration = SignedDuration::from_hours(30 * 24);
/// How often aditd is asked how far something is.
const LOOK: Duration = Duration::from_millis(200);
/// How often it is said how far something is.
const SAY: Duration = Duration::from_secs(2);
/// How long a guest may take to copy and to try the program.
const TAKE_LIMIT: Duration = Duration::from_secs(300);

const EXAMPLE: &str = "\
Example:
  adit key new agents.key --role agent              # its .pub file is an anchor in the VMs' images
  adit agent upgrade --to web-1,web-2 --package adit-guest --sign agents.key

FILE is the static program adit-guest, which is run here to learn its version. A VM keeps it beside the program of its image and
becomes it when no task runs; tunnels into the VM end then. A program that has had no hello with the host within 60 s, or ended
thrice before, is taken back. VMs are upgraded one after the other, and the first that fails ends the command.

From then on a VM takes, and goes back to, nothing older than --oldest-fallback. If it is not given, that is the oldest version
that any of the VMs runs now, as they say.

Exit status: 0 every VM runs it; 1 one refused it, or has taken it back; 4 there is no such VM; 124 --timeout is over.";

#[derive(Subcommand)]
pub enum AgentCommand {
    /// Sign an agent, and have VMs become it
    #[command(after_help = EXAMPLE)]
    Upgrade(Upgrade),
}

#[derive(Args)]
pub struct Upgrade {
    /// VMs that get it, one after the other
    #[arg(long, value_delimiter = ',', value_name = "VM,…", required = true, add = completion::vms())]
    to: Vec<String>,
    /// The static program adit-guest
    #[arg(long, value_name = "FILE")]
    package: PathBuf,
    /// Private key to sign with; the guests need its public half as an anchor of the role agent
    #[arg(long, value_name = "KEY")]
    sign: PathBuf,
    /// The oldest version that these VMs may take, or go back to, from now on
    #[arg(long, value_name = "VERSION")]
    oldest_fallback: Option<String>,
    /// Until when it may be taken, as 2027-11-21T22:00:00Z [default: 30 days from now]
    #[arg(long, value_name = "TIME")]
    not_after: Option<Timestamp>,
    /// How long one VM may take from the order until the new agent is heard; a running task is waited for
    #[arg(long, value_parser = duration, default_value = "5m", value_name = "DURATION")]
    timeout: Duration,
}

pub async fn run(command: &AgentCommand, client: &Client, format: Format) -> Result<(), Failure> {
    let AgentCommand::Upgrade(upgrade) = command;
    let program = Program::read(&upgrade.package)?;
    let mut vms = Vec::new();
    for name in &upgrade.to {
        vms.push(ready(client, name).await?);
    }
    let package = package(upgrade, &program, &vms)?;
    let payload = package.payload();
    // What no guest would take is not signed.
    Package::parse(&payload).map_err(|e| bad(e.to_string()))?;
    let envelope = sign_as(Type::Agent, &payload, &key::read(&upgrade.sign)?);
    let mut said = Said::new(format);
    said.now(format_args!(
        "agent {} for {}, {} bytes, sha256 {}; nothing older than {} from then on",
        package.version,
        package.architecture,
        program.size,
        program.digest,
        package.oldest_fallback
    ));
    program.upload(client, &mut said).await?;
    for vm in &vms {
        let state = give(client, vm, &program, &envelope, upgrade.timeout, &mut said).await?;
        let version = &package.version;
        match format {
            Format::Json => output::json(&serde_json::json!({
                "vm": vm.name, "version": version.to_string(), "sha256": program.digest.to_string(), "state": state,
            }))?,
            Format::Table => output::line(format_args!("{} runs agent {version}", vm.name))?,
        }
    }
    Ok(())
}

fn bad(what: impl Into<String>) -> Failure {
    Failure::new("bad-agent", what)
}

/// What is said meanwhile, to people only.
struct Said {
    format: Format,
    last: Instant,
}

impl Said {
    fn new(format: Format) -> Self {
        let last = Instant::now();
        Self { format, last }
    }

    fn now(&mut self, text: impl std::fmt::Display) {
        self.last = Instant::now();
        if self.format == Format::Table {
            adit_print::note(text);
        }
    }

    /// The same, unless something was said just now.
    fn meanwhile(&mut self, text: impl std::fmt::Display) {
        if self.last.elapsed() >= SAY {
            self.now(text);
        }
    }
}

/// The file.
struct Program {
    file: File,
    size: u64,
    digest: Digest,
    architecture: String,
    version: String,
}

impl Program {
    fn read(path: &Path) -> Result<Self, Failure> {
        let shown = path.display();
        let io = |e: io::Error| Failure::io(&format!("cannot read {shown}"), &e);
        let mut file = File::open(path).map_err(io)?;
        let size = file.metadata().map_err(io)?.len();
        let mut head = Vec::new();
        file.by_ref()
            .take(HEAD as u64)
            .read_to_end(&mut head)
            .map_err(io)?;
        let help = "give the static program: `cargo build --profile guest --target x86_64-unknown-linux-musl -p \
                    adit-guest-driver` makes it, and the package adit-guest has it";
        let architecture =
            architecture(&head).ok_or_else(|| bad(format!("{shown} is no program")).help(help))?;
        if size > SIZE_MAX {
            let text = format!("{shown} has {size} bytes, at most {SIZE_MAX} are taken");
            return Err(bad(text).help(help));
        }
        file.rewind().map_err(io)?;
        let (digest, size) = Digest::of_reader(file.by_ref().take(size)).map_err(io)?;
        let version = ask_version(path).map_err(|why| bad(format!("{shown}: {why}")).help(help))?;
        Ok(Self {
            file,
            size,
            digest,
            architecture,
            version,
        })
    }

    /// Has aditd keep it.
    async fn upload(&self, client: &Client, said: &mut Said) -> Result<(), Failure> {
        let digest = self.digest;
        let mut here: Blob = client.get(&format!("/v1/blobs/{digest}")).await?;
        if here.size != Some(self.size) {
            here.bytes = 0;
        }
        while !here.whole {
            let mut piece = vec![0; PIECE_MAX];
            let read = self.file.read_at(&mut piece, here.bytes);
            let read = read.map_err(|e| Failure::io("cannot read the program", &e))?;
            piece.truncate(read);
            let path = format!("/v1/blobs/{digest}?size={}&from={}", self.size, here.bytes);
            let before = here.bytes;
            here = client
                .request(Method::PUT, &path, Some(piece))
                .await?
                .accepted()?
                .json()?;
            if !here.whole && here.bytes <= before {
                return Err(Failure::new("bad-answer", "the upload does not get on"));
            }
            said.meanwhile(format_args!("upload: {}", part(here.bytes, self.size)));
        }
        Ok(())
    }
}

/// Runs the program to learn its version.
fn ask_version(path: &Path) -> Result<String, String> {
    // A name without a slash is looked for elsewhere.
    let path = path.canonicalize().map_err(|e| e.to_string())?;
    let run = Command::new(path)
        .arg("version")
        .stdin(Stdio::null())
        .output();
    let said = run.map_err(|e| format!("cannot be run here to learn its version: {e}"))?;
    let text = String::from_utf8_lossy(&said.stdout);
    match text.trim_end().strip_prefix("adit-guest ") {
        Some(version) if said.status.success() => Ok(version.to_owned()),
        _ => Err(format!(
            "is no adit-guest: it says `{}`",
            escape(text.trim_end())
        )),
    }
}

/// A VM whose agent is there.
async fn ready(client: &Client, name: &str) -> Result<Vm, Failure> {
    let id: VmId = name.parse().map_err(|e| {
        Failure::new("unknown-vm", format!("`{}` names no VM: {e}", escape(name)))
            .help("`adit vm ls` lists the names")
    })?;
    let vm: Vm = client.get(&format!("/v1/vms/{id}")).await?;
    match vm.state {
        VmState::Ready => Ok(vm),
        state => {
            let text = format!("{id} is {}, and its agent is not connected", state.name());
            Err(Failure::new("not-ready", text).help(format!("`adit vm show {id}` says why")))
        }
    }
}

fn package(upgrade: &Upgrade, program: &Program, vms: &[Vm]) -> Result<Package, Failure> {
    let own = version(&program.version).map_err(bad)?;
    let oldest_fallback = match &upgrade.oldest_fallback {
        Some(text) => version(text).map_err(|e| bad(format!("--oldest-fallback: {e}")))?,
        None => {
            // What a VM says of itself is no more than a proposal: a lie makes it older, or as new as this one.
            let running = vms
                .iter()
                .filter_map(|vm| version(vm.agent.as_deref()?).ok());
            running
                .min()
                .unwrap_or_else(|| own.clone())
                .min(own.clone())
        }
    };
    let now = Timestamp::now();
    let now = Timestamp::from_second(now.as_second()).unwrap_or(now);
    let not_after = match upgrade.not_after {
        Some(at) if at <= now => return Err(bad(format!("--not-after {at} is over already"))),
        Some(at) => at,
        None => now.saturating_add(VALID).unwrap_or(Timestamp::MAX),
    };
    Ok(Package {
        version: own,
        architecture: program.architecture.clone(),
        size: program.size,
        digest: program.digest.0,
        oldest_fallback,
        not_after,
    })
}

/// Gives it to one VM, and waits until it runs there. Returns a word for what happened.
async fn give(
    client: &Client,
    vm: &Vm,
    program: &Program,
    envelope: &str,
    limit: Duration,
    said: &mut Said,
) -> Result<&'static str, Failure> {
    let name = &vm.name;
    let digest = program.digest.to_string();
    let runs = |vm: &Vm| {
        let program_now = vm.program.as_ref().and_then(|p| p.sha256.as_ref());
        vm.state == VmState::Ready && program_now == Some(&digest)
    };
    // One that runs it already is told all the same what it may not go back to.
    if !runs(vm) {
        send(client, name, &digest, said).await?;
    }
    let envelope = envelope.to_owned();
    let patient = client.patient(TAKE_LIMIT);
    let answer: AgentAnswer = patient
        .post(&format!("/v1/vms/{name}/agent"), &AgentOrder { envelope })
        .await?;
    if answer.already {
        return Ok("already");
    }
    if answer.waits {
        said.now(format_args!(
            "{name}: waits for the end of the task that runs"
        ));
    }
    let begin = Instant::now();
    loop {
        let now: Vm = client.get(&format!("/v1/vms/{name}")).await?;
        if runs(&now) {
            return Ok("runs");
        }
        let back = now.program.as_ref().and_then(|p| p.taken_back.as_ref());
        if back == Some(&digest) {
            let why = now.fault.unwrap_or_default();
            let text = format!("{name} has taken the agent back: {}", escape(&why));
            return Err(Failure::new("taken-back", text).help(format!(
                "{name} runs agent {}; see the agent's log in the guest",
                escape(now.agent.as_deref().unwrap_or("-"))
            )));
        }
        if begin.elapsed() >= limit {
            let text = format!("{name} has the agent, and does not run it after {limit:?}");
            return Err(Failure::timeout(text).help(format!(
                "it waits for a task, or for its first hello: `adit vm show {name}`, `adit task ls --vm {name}`"
            )));
        }
        said.meanwhile(format_args!(
            "{name}: waits for the new agent, {}",
            output::span(begin.elapsed())
        ));
        tokio::time::sleep(LOOK).await;
    }
}

/// Has aditd send it, and waits until the guest has it.
async fn send(client: &Client, name: &str, digest: &str, said: &mut Said) -> Result<(), Failure> {
    let path = format!("/v1/vms/{name}/blobs/{digest}");
    loop {
        let sent: Transfer = client.post(&path, &()).await?;
        if sent.kept {
            return Ok(());
        }
        said.meanwhile(format_args!("{name}: sent {}", part(sent.sent, sent.size)));
        tokio::time::sleep(LOOK).await;
    }
}

/// `41 % of 4.5 MiB`.
fn part(done: u64, of: u64) -> String {
    let percent = done.saturating_mul(100) / of.max(1);
    let tenths = of.saturating_mul(10) >> 20;
    format!("{percent} % of {}.{} MiB", tenths / 10, tenths % 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn how_far_it_is_is_said_in_per_cent_of_mib() {
        assert_eq!(part(0, 0), "0 % of 0.0 MiB");
        assert_eq!(part(2_411_724, 4_823_449), "49 % of 4.5 MiB");
    }
}
