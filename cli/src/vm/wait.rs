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

A port or service is dialled in the guest until somebody takes the connection, which is closed then.

Exit status: 0 it is ready; 124 it is not within --timeout (aditd says what is known of it); 4 there is no such VM, or it
was removed meanwhile; 3 aditd could not be reached within --timeout.";

/// `agent`, `port:N` or `service:NAME`.
#[derive(Clone)]
struct For(String);

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
            Some(_) => false,
        };
        is.then(|| Self(text.to_owned()))
            .ok_or_else(|| "it is `agent`, `port:80` or `service:NAME`".to_owned())
    }
}

#[derive(Args)]
#[command(after_help = EXAMPLE)]
pub struct Wait {
    /// Name of the VM
    #[arg(add = completion::vms())]
    vm: String,
    /// What to wait for: `agent`, it is connected; `port:80`, `service:docker`, somebody in the guest listens there
    #[arg(long = "for", default_value = "agent", value_name = "CONDITION")]
    condition: For,
    /// Give up after this long, for example 30s or 5m; an aditd that is not up yet is waited for as well
    #[arg(long, value_parser = duration, default_value = "60s", value_name = "DURATION")]
    timeout: Duration,
}

pub async fn wait(wait: &Wait, client: &Client, format: Format) -> Result<(), Failure> {
    let condition = &wait.condition.0;
    let path = super::path(&wait.vm)?;
    let begin = Instant::now();
    let mut told = false;
    let vm: Vm = loop {
        let left = wait.timeout.saturating_sub(begin.elapsed());
        let url = format!(
            "{path}/wait?for={condition}&timeout_ms={}",
            left.as_millis()
        );
        let failure = match client.patient(left).get(&url).await {
            Ok(vm) => break vm,
            Err(e) => Failure::from(e),
        };
        // aditd waits an hour for one request at most.
        let again = failure.passing || failure.code == "timeout";
        let left = wait.timeout.saturating_sub(begin.elapsed());
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
