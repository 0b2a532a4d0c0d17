//! `cargo xtask sim` runs engine pairs in virtual time, with many seeds, in a release build.

use std::process::Command;

use anyhow::bail;

/// Which seeds to run.
#[derive(clap::Args)]
pub struct Options {
    /// How many seeds
    #[arg(long, default_value_t = 100_000, conflicts_with = "seed")]
    seeds: u64,
    /// The first seed
    #[arg(long, default_value_t = 0, conflicts_with = "seed")]
    first: u64,
    /// Replay one seed
    #[arg(long)]
    seed: Option<u64>,
}

pub fn run(options: &Options) -> anyhow::Result<bool> {
    let (first, seeds) = options
        .seed
        .map_or((options.first, options.seeds), |s| (s, 1));
    let status = Command::new("cargo")
        .args(["test", "--quiet", "--release", "-p", "adit-engine", "--lib"])
        .args(["r57_every_byte", "--", "--nocapture"])
        .env("ADIT_SIM_FIRST", first.to_string())
        .env("ADIT_SIM_SEEDS", seeds.to_string())
        .status()?;
    if !status.success() {
        bail!("a seed failed: see its number above");
    }
    Ok(true)
}
