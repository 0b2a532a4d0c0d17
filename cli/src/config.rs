//! `adit config`, `adit reload`: whether aditd runs by the configuration file as it is now.

use adit_api::ConfigStatus;
use adit_api::doctor::CONFIG_REFUSED;

use crate::client::Client;
use crate::error::Failure;
use crate::output;
use crate::text::Format;

pub const EXAMPLE: &str = "\
Example:
  systemctl reload aditd && adit config

Exit status: 0 the file was taken; 1 it was refused, and aditd goes on with what it had.";

pub const RELOAD_EXAMPLE: &str = "\
Example:
  aditd check-config && adit reload

It does what `systemctl reload aditd` does, and says what became of it.

Exit status: 0 the configuration was taken; 1 it was refused, and aditd goes on with what it had.";

/// Has the configuration read again, and shows what became of it.
pub async fn reload(client: &Client, format: Format) -> Result<(), Failure> {
    print(client.post("/v1/reload", &()).await?, format)
}

pub async fn show(client: &Client, format: Format) -> Result<(), Failure> {
    print(client.get("/v1/config").await?, format)
}

fn print(status: ConfigStatus, format: Format) -> Result<(), Failure> {
    if let Some(why) = status.error {
        let message = format!("aditd has refused its configuration file: {why}");
        return Err(Failure::new("bad-config", message).help(CONFIG_REFUSED));
    }
    match format {
        Format::Json => output::json(&status),
        Format::Table => {
            let taken = match status.restart.is_empty() {
                true => "as in the file",
                false => "as in the file, but for what takes a restart",
            };
            let mut rows = vec![["configuration".to_owned(), taken.to_owned()]];
            let restart = status.restart.into_iter();
            rows.extend(restart.map(|what| ["takes a restart".to_owned(), what]));
            output::pairs(16, &rows)
        }
    }
}
