//! `cargo xtask bench NAME`: runs the bench of that name and passes its lines through. Its exit status says whether it
//! could measure, never how good the figures are.

use crate::setup;

/// What to measure.
#[derive(clap::Args)]
pub struct Options {
    /// Name of the bench: vsock
    name: String,
    /// One JSON object a line for each figure
    #[arg(long)]
    json: bool,
}

pub fn run(options: &Options) -> anyhow::Result<bool> {
    let mut args = vec![
        "bench",
        "--quiet",
        "-p",
        "adit-benches",
        "--bench",
        &options.name,
    ];
    if options.json {
        args.extend(["--", "--json"]);
    }
    setup::cargo(&args).map(|()| true)
}
