//! `adit exec`, `shell`, `ps`, `attach` and `kill`: commands in a VM.
//!
//! `stream` has the connection and what is said on it, `terminal` this side's terminal, `files` standard input and output, each on a thread
//! of its own: they may block for as long as they like, and a signal is forwarded meanwhile. `all` runs a command in many VMs.

mod all;
mod files;
mod sessions;
mod shell;
pub mod sign;
mod stream;
mod terminal;
mod typed;

use std::process::ExitCode;
use std::time::Duration;

use adit_exec::{Open, ToGuest, What};
use adit_tasks::ticket::{Input, Run, Verb};
use adit_tasks::vms::Vms;
use clap::Args;

use crate::client::Client;
use crate::completion;
use crate::error::Failure;
use crate::output::{self, duration};
use crate::text::Format;

pub use sessions::{Attach, Kill, Ps, attach, kill, ps};
pub use shell::{Shell, shell};
use stream::{Carries, Ended, Signals};

/// adit itself failed.
pub(crate) const OWN: u8 = 125;
/// There is no way to the guest, or it broke off.
pub(crate) const WAY: u8 = 255;

const EXAMPLES: &str = "\
Examples:
  adit exec web-1 -- uname -a
  adit exec web-1 -- sh -c 'cd /srv && make test'      # what a shell is to read, a shell must be given
  tar c src | adit exec -i web-1 -- tar x -C /srv
  adit exec web-1 --user deploy --env CI=1 --cwd /srv --timeout 10m -- ./deploy.sh
  adit exec -t web-1 -- top
  id=$(adit exec --detach web-1 -- make -C /srv) && adit attach $id
  adit exec --all label:tier=web -- systemctl is-active nginx
  adit exec --sign ops.key web-1 -- uptime                            # signed here: where the guest does not believe its host
  adit exec --sign ops.key --seal --guest-pk web-1.pk -t web-1 -- top # and sealed end to end

The command is elements, not a line: no shell reads it, on either side. It gets PATH, HOME, USER, LOGNAME, SHELL and LANG of
its user, what --env says, and nothing of this side. Without -i it has no input.

It needs two permissions: of the host, where it is not its owner who asks, a grant with `exec:USER`; and of the guest, whose
owner's policy (/etc/adit-guest/policy.toml) has a rule such as
  [[exec]]
  allow = \"host\"
  users = [\"deploy\"]
  commands = [\"/usr/bin/uname\"]

INT, TERM, QUIT, HUP and TSTP go to the command, with -t by its terminal. When this adit ends, the command and all that it has
started end, too, unless --detach says that it goes on. What it leaves in the background ends with it, except for daemons that
made themselves a session of their own (`setsid`).

Exit status: that of the command; 128 + N where signal N ended it; 124 its time was over; 125 adit or aditd refused;
126 the program cannot be run; 127 there is no such program; 255 the guest was not reached, or the connection broke off.
Of --all: 0 where it was 0 in every VM, else the highest of them.

With --all lines come as they are written, each with its VM's name in front, and at the end one line for each VM whose status is
not 0. With -o json each is an object: {\"vm\", \"stream\", \"line\"}, and at the end of a VM {\"vm\", \"status\"}, with an \"error\"
where it was not run.";

/// Run a command in a VM, with its input, output and exit status here
///
/// Nothing is cut or lost: a reader here that is slow makes the command wait.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub struct Exec {
    /// Give the command our standard input
    #[arg(short, long)]
    interactive: bool,
    /// Give the command a terminal, and make ours its window
    #[arg(short, long)]
    tty: bool,
    /// Set a variable of its environment; KEY alone takes our value
    #[arg(long = "env", value_name = "KEY=VALUE")]
    env: Vec<String>,
    /// Working directory in the guest [default: the user's home]
    #[arg(long, value_name = "DIRECTORY")]
    cwd: Option<String>,
    /// User of the guest, by name or number
    #[arg(long, default_value = "root")]
    user: String,
    /// End it, with all that it has started, after this long, for example 30s or 10m
    #[arg(long, value_parser = duration, value_name = "DURATION")]
    timeout: Option<Duration>,
    /// Print its id, and let it go on without us: `adit attach` shows what it writes
    #[arg(long, conflicts_with = "interactive")]
    detach: bool,
    /// Run it in all of this host's VMs that this names: `label:NAME=VALUE`, or a name with one `*`
    #[arg(long, value_name = "VMS", conflicts_with_all = ["vm", "interactive", "tty", "detach", "sign"])]
    all: Option<Vms>,
    /// In so many of them at once
    #[arg(long, value_name = "N", default_value = "16", requires = "all", value_parser = clap::value_parser!(u16).range(1..=256))]
    parallel: u16,
    #[command(flatten)]
    sign: sign::Sign,
    /// Seal all of it to the guest's key, with --sign: also a terminal, live input and signals
    #[arg(long, requires = "sign")]
    seal: bool,
    /// Name of the VM
    #[arg(add = completion::vms(), required_unless_present = "all")]
    vm: Option<String>,
    /// Program and arguments
    #[arg(last = true, required = true, value_name = "COMMAND")]
    command: Vec<std::ffi::OsString>,
}

fn usage(message: impl Into<String>) -> Failure {
    Failure::new("usage", message).with_status(OWN)
}

/// Makes a failure one of ours, as other programs that run programs have it.
pub(crate) fn ours(failure: Failure) -> Failure {
    match failure.code.as_str() {
        "closed-pipe" | "interrupted" => failure,
        _ if failure.settled => failure,
        _ if failure.is_of_the_way() => failure.with_status(WAY),
        _ => failure.with_status(OWN),
    }
}

/// With the terminal's kind, if nothing is said of it.
fn with_term(mut env: Variables) -> Variables {
    if !env.iter().any(|(name, _)| name == b"TERM") {
        let term = std::env::var("TERM").unwrap_or_else(|_| "dumb".into());
        env.push((b"TERM".to_vec(), term.into_bytes()));
    }
    env
}

/// Names and values.
pub type Variables = Vec<(Vec<u8>, Vec<u8>)>;

pub fn env(pairs: &[String]) -> Result<Variables, Failure> {
    use std::os::unix::ffi::OsStringExt;
    let one = |pair: &String| match pair.split_once('=') {
        Some((name, value)) => Ok((name.into(), value.into())),
        None => match std::env::var_os(pair) {
            Some(value) => Ok((pair.clone().into_bytes(), value.into_vec())),
            None => Err(
                usage(format!("--env {pair}: there is no such variable here"))
                    .help("write KEY=VALUE, or set it"),
            ),
        },
    };
    pairs.iter().map(one).collect()
}

/// Runs a command.
pub async fn run(command: &Exec, client: &Client, format: Format) -> Result<ExitCode, Failure> {
    run_it(command, client, format).await.map_err(ours)
}

async fn run_it(exec: &Exec, client: &Client, format: Format) -> Result<ExitCode, Failure> {
    use std::os::unix::ffi::OsStrExt;
    let argv: Vec<Vec<u8>> = exec
        .command
        .iter()
        .map(|text| text.as_bytes().to_vec())
        .collect();
    let program = exec.command.first().and_then(|text| text.to_str());
    let program = program.ok_or_else(|| usage("the program's name is no UTF-8"))?;
    let mut env = env(&exec.env)?;
    let tty = match exec.tty && !exec.detach {
        true => Some(terminal::size().ok_or_else(|| {
            usage("-t is for a terminal, and standard input is none")
                .help("leave it out, or give the command input with -i")
        })?),
        // Nobody looks at it yet.
        false => exec.tty.then_some(adit_exec::Size { rows: 24, cols: 80 }),
    };
    if tty.is_some() {
        env = with_term(env);
    }
    let timeout = exec
        .timeout
        .map(|limit| u64::try_from(limit.as_millis()).unwrap_or(u64::MAX));
    let open = Open {
        argv,
        env,
        cwd: exec.cwd.clone().unwrap_or_default().into_bytes(),
        tty,
        stdin: exec.interactive || exec.tty,
        timeout_ms: timeout.unwrap_or(0),
        detach: exec.detach,
    };
    open.check()
        .map_err(|e| usage(format!("the command cannot be run: {e}")))?;
    let vm = match (&exec.vm, &exec.all) {
        (Some(vm), _) => vm,
        (None, Some(vms)) => {
            let parallel = usize::from(exec.parallel);
            let command = all::Command::new(&exec.user, program, open);
            return all::run(command, client, (vms, parallel), format).await;
        }
        (None, None) => return Err(usage("no VM is named")),
    };
    let signed = exec.sign.sign.is_some();
    let mut stream = match signed {
        true => by_ticket(exec, vm, open, client).await?,
        false => {
            let what = What::Run(program.to_owned());
            let mut stream = stream::open(client, vm, Some(&exec.user), &what).await?;
            stream.say(&ToGuest::Open(open)).await?;
            stream
        }
    };
    if exec.detach {
        return detached(&mut stream, vm, format).await;
    }
    let is_bound = signed && !exec.seal;
    let carries = Carries {
        input: (exec.interactive || exec.tty) && !is_bound,
        tty: exec.tty,
        escapes: false,
        signals: match is_bound {
            true => Signals::Cut,
            false => Signals::Forwarded,
        },
    };
    match stream.carry(carries).await? {
        Ended::Exit(exit) => Ok(stream::status(&exit)),
        Ended::Left(_) => Ok(ExitCode::SUCCESS),
    }
}

/// A stream for a command that is signed here.
async fn by_ticket(
    exec: &Exec,
    vm: &str,
    open: Open,
    client: &Client,
) -> Result<stream::Stream, Failure> {
    if exec.tty && !exec.seal {
        return Err(
            usage("a terminal cannot be signed: the host could type into it")
                .help("give --seal: then all of it is sealed to the guest's key"),
        );
    }
    let (names, values): (Vec<_>, Vec<_>) = open.env.into_iter().unzip();
    let (names, values) = (sign::texts(&names)?, sign::texts(&values)?);
    let mut run = Run {
        argv: sign::texts(&open.argv)?,
        env: names.into_iter().zip(values).collect(),
        cwd: exec.cwd.clone().unwrap_or_default(),
        tty: open.tty.map(|size| (size.rows, size.cols)),
        stdin: match open.stdin {
            true => Input::Live,
            false => Input::None,
        },
        timeout_ms: open.timeout_ms,
        detach: open.detach,
    };
    if exec.seal {
        let to = (vm, Some(exec.user.as_str()));
        return sign::sealed(client, to, Verb::Run(run), &exec.sign).await;
    }
    let key = exec.sign.key()?.ok_or_else(|| usage("--sign is missing"))?;
    let mut input = Vec::new();
    if open.stdin {
        (input, run.stdin) = sign::whole_stdin()?;
    }
    let from = (jiff::Timestamp::now(), exec.sign.life()?);
    let ticket = sign::ticket(vm, &exec.user, Verb::Run(run), from)?;
    let envelope = sign::signed(&ticket, &key)?;
    sign::bring(client, &ticket, envelope, &input).await
}

/// Runs what a ticket says that was signed elsewhere. `input`: what it has a digest of.
pub async fn run_ticket(
    client: &Client,
    ticket: &adit_tasks::Ticket,
    envelope: Vec<u8>,
    input: &[u8],
    format: Format,
) -> Result<ExitCode, Failure> {
    let done = async {
        let mut stream = sign::bring(client, ticket, envelope, input).await?;
        if matches!(&ticket.verb, Verb::Run(run) if run.detach) {
            return detached(&mut stream, ticket.vm_id.as_str(), format).await;
        }
        let carries = Carries {
            input: false,
            tty: false,
            escapes: false,
            signals: Signals::Cut,
        };
        match stream.carry(carries).await? {
            Ended::Exit(exit) => Ok(stream::status(&exit)),
            Ended::Left(_) => Ok(ExitCode::SUCCESS),
        }
    };
    done.await.map_err(ours)
}

async fn detached(
    stream: &mut stream::Stream,
    vm: &str,
    format: Format,
) -> Result<ExitCode, Failure> {
    let started = stream.started().await?;
    let id = format!("{vm}/{}", started.id);
    match format {
        Format::Json => output::json(&serde_json::json!({ "session": id }))?,
        Format::Table => output::line(id)?,
    }
    Ok(ExitCode::SUCCESS)
}
