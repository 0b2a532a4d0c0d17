//! `adit shell`: a login shell on a terminal.

use std::process::ExitCode;

use adit_exec::{Open, ToGuest, What};
use clap::Args;

use super::stream::{self, Carries, Ended, Signals};
use super::{env, ours, terminal, usage, with_term};
use crate::client::Client;
use crate::completion;
use crate::error::Failure;

const EXAMPLES: &str = "\
Examples:
  adit shell web-1
  adit shell web-1 --user deploy --env EDITOR=vi

It is the shell that the user has in the guest's /etc/passwd, and the guest's policy must allow that program (see
`adit exec --help`). `~.` at the beginning of a line leaves it, as with ssh, and ends the shell with all that it has started;
`~~` is a tilde. A command that is to go on without you: `adit exec --detach`.

Exit status: that of the shell; 125 adit or aditd refused; 255 the guest was not reached, the connection broke off, or `~.`.";

/// Log in to a VM: its user's shell, with a terminal
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub struct Shell {
    /// User of the guest, by name or number
    #[arg(long, default_value = "root")]
    user: String,
    /// Set a variable of its environment; KEY alone takes our value
    #[arg(long = "env", value_name = "KEY=VALUE")]
    env: Vec<String>,
    /// Name of the VM
    #[arg(add = completion::vms())]
    vm: String,
}

/// Runs a login shell.
pub async fn shell(shell: &Shell, client: &Client) -> Result<ExitCode, Failure> {
    run(shell, client).await.map_err(ours)
}

async fn run(shell: &Shell, client: &Client) -> Result<ExitCode, Failure> {
    let size = terminal::size().ok_or_else(|| {
        usage("a shell is for a terminal, and standard input is none")
            .help("give a program: `adit exec VM -- PROGRAM`, with -i for its input")
    })?;
    let open = Open {
        env: with_term(env(&shell.env)?),
        tty: Some(size),
        stdin: true,
        ..Open::default()
    };
    open.check_shell()
        .map_err(|e| usage(format!("the shell cannot be run: {e}")))?;
    let mut stream = stream::open(client, &shell.vm, Some(&shell.user), &What::Shell).await?;
    stream.say(&ToGuest::Open(open)).await?;
    let carries = Carries {
        input: true,
        tty: true,
        escapes: true,
        signals: Signals::Forwarded,
    };
    match stream.carry(carries).await? {
        Ended::Exit(exit) => Ok(stream::status(&exit)),
        Ended::Left(_) => {
            adit_print::note("left: the shell ends");
            Ok(ExitCode::from(super::WAY))
        }
    }
}
