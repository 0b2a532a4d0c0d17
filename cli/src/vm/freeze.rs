//! `adit vm freeze` and `adit vm thaw`: a VM's file systems stand still while its disks are saved.

use std::time::Duration;

use adit_api::{Frozen, NewFreeze};
use clap::Args;

use super::path;
use crate::client::Client;
use crate::completion;
use crate::error::Failure;
use crate::output::{self, duration};
use crate::text::{self, Format};

const FREEZE_EXAMPLE: &str = "\
Example:
  adit vm freeze web-1 --lease 30s && lvcreate -s -n web-1-snap -L 5G vg0/web-1; adit vm thaw web-1

Programs in the guest's /etc/adit-guest/freeze.d are called with `freeze` before, and with `thaw` afterwards. Whoever writes there waits.
All go on when --lease is over, whatever becomes of this host; the same again has them stand still for --lease from then on.";

/// Have a VM's file systems stand still for a while, so that its disks can be saved
#[derive(Args)]
#[command(after_help = FREEZE_EXAMPLE)]
pub struct Freeze {
    /// Name of the VM
    #[arg(add = completion::vms())]
    name: String,
    /// For how long at most, from 1s to 5m
    #[arg(long, value_parser = duration, default_value = "30s", value_name = "DURATION")]
    lease: Duration,
}

/// Freezes.
pub async fn freeze(freeze: &Freeze, client: &Client, format: Format) -> Result<(), Failure> {
    let lease_ms = u32::try_from(freeze.lease.as_millis()).unwrap_or(u32::MAX);
    let url = format!("{}/freeze", path(&freeze.name)?);
    let frozen: Frozen = client
        .patient(LIMIT)
        .post(&url, &NewFreeze { lease_ms })
        .await?;
    match format {
        Format::Json => output::json(&frozen),
        Format::Table => {
            let count = usize::try_from(frozen.count).unwrap_or(0);
            let more = match count.saturating_sub(frozen.file_systems.len()) {
                0 => String::new(),
                n => format!(" and {n} more"),
            };
            let all: Vec<_> = frozen
                .file_systems
                .iter()
                .map(|at| text::escape(at).to_string())
                .collect();
            output::line(format_args!(
                "{} stands still for {} s: {}{more}; `adit vm thaw {}` has it go on",
                text::escape(&freeze.name),
                frozen.left_ms.div_ceil(1000),
                all.join(", "),
                text::escape(&freeze.name)
            ))
        }
    }
}

/// Thaws.
pub async fn thaw(name: &str, client: &Client, format: Format) -> Result<(), Failure> {
    let url = format!("{}/freeze", path(name)?);
    client.patient(LIMIT).delete(&url).await?;
    match format {
        Format::Json => output::json(&client.get::<Frozen>(&url).await?),
        Format::Table => output::line(format_args!("{} goes on", text::escape(name))),
    }
}

/// How long the guest's hooks and file systems may take.
const LIMIT: Duration = Duration::from_secs(100);
