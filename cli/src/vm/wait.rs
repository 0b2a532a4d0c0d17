//! `adit wait`: until a VM is ready, also while `aditd` itself is still starting.

use std::str::FromStr;
use std::time::{Duration, Instant};

use adit_api::Vm;
use clap::Args;

use crate::client::Client;
use crate::completion;
use crate::error::Failure;
use crate::output::{self, duration};
use crate::text;
use crate::text::Format;

/// How soon an aditd that is not there is looked for again.
const AGAIN: Duration = Duration::from_millis(200);

const EXAMPLE: &str = "\
Example:
  adit wait web-1 --timeout 5m && curl -x http://127.0.0.1:7080 http://web-1/
  adit wait web-1 --for port:80
  adit wait web-1 --for file:/run/app/ready --timeout 2m

A port or service is dialled in the guest until somebody takes the connection, which is closed then. A file may be
anything that has the path; the guest's policy must let --user read it there (`adit cp --help`).

Exit status: 0 it is ready; 124 it is not within --timeout (aditd says what is known of it); 4 there is no such VM, or it
was removed meanwhile; 3 aditd could not be reached within --timeout; 125 the guest does not let it be looked for, or it cannot be there.";

/// What is waited for.
#[derive(Clone)]
enum For {
    /// What aditd waits for itself, in its words: `agent`, `port:N` or `service:NAME`.
    Aditd(String),
    /// Something at this path of the guest.
    File(String),
}

impl FromStr for For {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let is_number = |n: &str| {
            n.parse::<u16>()
                .is_ok_and(|port| port > 0 && port.to_string() == n)
        };
        let is = match text.split_once(':') {
            None => text == "agent",
            Some(("port", n)) => is_number(n),
            Some(("service", name)) => name.parse::<adit_names::VmId>().is_ok(),
            Some(("file", path)) if adit_files::is_plain(path) => {
                return Ok(Self::File(path.to_owned()));
            }
            Some(("file", _)) => {
                return Err(
                    "its path is absolute, without `.`, `..`, `//` and a slash at its end".into(),
                );
            }
            Some(_) => false,
        };
        is.then(|| Self::Aditd(text.to_owned()))
            .ok_or_else(|| "it is `agent`, `port:80`, `service:NAME` or `file:/PATH`".to_owned())
    }
}

#[derive(Args)]
#[command(after_help = EXAMPLE)]
pub struct Wait {
    /// Name of the VM
    #[arg(add = completion::vms())]
    vm: String,
    /// What to wait for: `agent`, it is connected; `port:80`, `service:docker`, somebody in the guest listens there;
    /// `file:/run/ready`, it is there
    #[arg(long = "for", default_value = "agent", value_name = "CONDITION")]
    condition: For,
    /// Of `file`: user of the guest, by name or number, who looks for it
    #[arg(long, default_value = "root")]
    user: String,
    /// Give up after this long, for example 30s or 5m; an aditd that is not up yet is waited for as well
    #[arg(long, value_parser = duration, default_value = "60s", value_name = "DURATION")]
    timeout: Duration,
}

/// So much time there is.
struct Limit {
    begin: Instant,
    most: Duration,
}

impl Limit {
    fn left(&self) -> Duration {
        self.most.saturating_sub(self.begin.elapsed())
    }
}

pub async fn wait(wait: &Wait, client: &Client, format: Format) -> Result<(), Failure> {
    let limit = Limit {
        begin: Instant::now(),
        most: wait.timeout,
    };
    let vm = match &wait.condition {
        For::Aditd(condition) => asks(wait, client, (condition, format), &limit).await?,
        For::File(path) => loop {
            let there = crate::files::wait(client, &wait.vm, &wait.user, path);
            match tokio::time::timeout(limit.left(), there).await {
                Ok(Ok(())) => break client.get(&super::path(&wait.vm)?).await?,
                // There is no agent, or it or aditd has been started anew; or there is no room for one more who waits.
                Ok(Err(e)) if e.is_of_the_way() || e.passing || e.code == "unreached" => {
                    asks(wait, client, ("agent", format), &limit).await?;
                    tokio::time::sleep(AGAIN.min(limit.left())).await;
                }
                Ok(Err(e)) => return Err(e),
                Err(_) => {
                    let after = format!("{:?}", wait.timeout);
                    let text = format!("`{}` has no {path} after {after}", wait.vm);
                    return Err(Failure::timeout(text));
                }
            }
        },
    };
    match format {
        Format::Json => output::json(&vm),
        Format::Table => output::line(format_args!(
            "{} is ready: agent {}",
            text::escape(&vm.name),
            text::escape(vm.agent.as_deref().unwrap_or("-"))
        )),
    }
}

/// Has aditd wait.
async fn asks(
    wait: &Wait,
    client: &Client,
    (condition, format): (&str, Format),
    limit: &Limit,
) -> Result<Vm, Failure> {
    let path = super::path(&wait.vm)?;
    let mut told = false;
    loop {
        let left = limit.left();
        let url = format!(
            "{path}/wait?for={condition}&timeout_ms={}",
            left.as_millis()
        );
        let failure = match client.patient(left).get(&url).await {
            Ok(vm) => return Ok(vm),
            Err(e) => Failure::from(e),
        };
        // aditd waits an hour for one request at most.
        let again = failure.passing || failure.code == "timeout";
        let left = limit.left();
        if !again || left.is_zero() {
            return Err(failure);
        }
        if failure.passing {
            if !told && format == Format::Table {
                adit_print::note(format_args!(
                    "waiting for aditd: {}",
                    text::escape(&failure.message)
                ));
            }
            told = true;
            tokio::time::sleep(AGAIN.min(left)).await;
        }
    }
}
