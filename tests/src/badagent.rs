//! `adit-badagent`: an agent that passes every check before it runs, and then ends at once. How is at the end of its own file:
//! `\nends=STATUS`, or `\nends=abort`.

use std::process::ExitCode;

fn main() -> anyhow::Result<ExitCode> {
    match std::env::args().nth(1).as_deref() {
        Some("version") => println!("adit-guest {}", env!("CARGO_PKG_VERSION")),
        Some("run") => return end(),
        // `check-config`.
        _ => {}
    }
    Ok(ExitCode::SUCCESS)
}

fn end() -> anyhow::Result<ExitCode> {
    let own = std::fs::read("/proc/self/exe")?;
    let last = own.rsplit(|b| *b == b'\n').next().unwrap_or_default();
    match String::from_utf8_lossy(last).strip_prefix("ends=") {
        Some("abort") => std::process::abort(),
        Some(status) => Ok(ExitCode::from(status.parse::<u8>()?)),
        None => anyhow::bail!("nobody has said how to end"),
    }
}
