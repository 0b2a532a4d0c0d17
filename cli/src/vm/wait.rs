//! `adit wait`: until a VM is ready, also while `aditd` itself is still starting.

use std::time::{Duration, Instant};

use adit_api::Vm;
use clap::{Args, ValueEnum};

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

Exit status: 0 it is ready; 124 it is not within --timeout (aditd says what is known of it); 4 there is no such VM, or it
was removed meanwhile; 3 aditd could not be reached within --timeout.";

/// What to wait for.
#[derive(Clone, Copy, ValueEnum)]
pub enum For {
    /// The agent is connected
    Agent,
}

#[derive(Args)]
#[command(after_help = EXAMPLE)]
pub struct Wait {
    /// Name of the VM
    #[arg(add = completion::vms())]
    vm: String,
    /// What to wait for
    #[arg(
        long = "for",
        value_enum,
        default_value = "agent",
        value_name = "CONDITION"
    )]
    condition: For,
    /// Give up after this long, for example 30s or 5m; an aditd that is not up yet is waited for as well
    #[arg(long, value_parser = duration, default_value = "60s", value_name = "DURATION")]
    timeout: Duration,
}

pub async fn wait(wait: &Wait, client: &Client, format: Format) -> Result<(), Failure> {
    let For::Agent = wait.condition;
    let path = super::path(&wait.vm)?;
    let begin = Instant::now();
    let mut told = false;
    let vm: Vm = loop {
        let left = wait.timeout.saturating_sub(begin.elapsed());
        let url = format!("{path}/wait?for=agent&timeout_ms={}", left.as_millis());
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
