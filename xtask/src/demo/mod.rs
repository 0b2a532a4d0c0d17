//! `cargo xtask demo`: two real VMs without a network device, and everything that adit does with them, step by step.

mod stage;
mod steps;
mod vmm;

use std::time::{Duration, Instant};

use adit_tests::guest::Accel;
use adit_tests::image::{Image, Kernel};
use anyhow::Context;
use serde::Serialize;

use crate::{progress, setup};
use stage::Stage;

/// How to show it.
#[derive(clap::Args)]
pub struct Options {
    /// Guest kernel: 6.1 or 6.12
    #[arg(long, default_value = "6.1")]
    kernel: Kernel,
    /// Leave everything running at the end, to explore; Enter or Ctrl-C ends it
    #[arg(long)]
    keep: bool,
    /// Use adit-vmm, with snapshot and restore, in an emulated guest that has KVM
    #[arg(long, conflicts_with_all = ["keep", "json"])]
    vmm: bool,
    /// End with one line of JSON that sums it up
    #[arg(long)]
    json: bool,
}

/// One step's result, as `--json` prints it.
#[derive(Serialize)]
struct Done {
    name: &'static str,
    ok: bool,
    ms: u64,
    evidence: String,
}

#[derive(Serialize)]
struct Summary {
    ok: bool,
    kernel: &'static str,
    accel: &'static str,
    guest_ready_s: Vec<f64>,
    steps: Vec<Done>,
}

pub fn run(options: &Options) -> anyhow::Result<bool> {
    if options.vmm {
        return vmm::run(options.kernel);
    }
    setup::run()?;
    let bins = setup::host_binaries(true)?;
    setup::guest_binaries()?;
    let image = progress::during(
        &format!("guest image, kernel {}", options.kernel.name()),
        || Image::build(options.kernel, &|what| progress::line(what)),
    )?;
    let begin = Instant::now();
    let mut stage = Stage::set(&bins, image)?;
    stage::clean_up_on_signal(&stage);
    let guest_ready_s = stage.boot()?;
    let mut done = Vec::new();
    for step in steps::ALL {
        println!("\n── {}", step.title);
        let begin = Instant::now();
        let result = (step.run)(&mut stage);
        let ms = u64::try_from(begin.elapsed().as_millis()).unwrap_or(u64::MAX);
        let ok = result.is_ok();
        let evidence = result.unwrap_or_else(|e| format!("{e:#}"));
        println!(
            "{} {} ({ms} ms)",
            if ok { "✓" } else { "✗" },
            evidence.lines().next().unwrap_or_default()
        );
        done.push(Done {
            name: step.name,
            ok,
            ms,
            evidence,
        });
    }
    let ok = done.iter().all(|d| d.ok);
    println!(
        "\n{} in {:.0} s",
        if ok {
            "everything worked"
        } else {
            "NOT everything worked"
        },
        begin.elapsed().as_secs_f64()
    );
    if options.keep {
        keep(&stage)?;
    }
    if options.json {
        let accel = Accel::detect().name();
        let summary = Summary {
            ok,
            kernel: options.kernel.name(),
            accel,
            guest_ready_s,
            steps: done,
        };
        println!("{}", serde_json::to_string(&summary)?);
    }
    if !ok {
        eprintln!("{}", stage.logs());
    }
    Ok(ok)
}

fn keep(stage: &Stage) -> anyhow::Result<()> {
    let file = adit_tests::target().join("demo.env");
    std::fs::write(&file, stage.host.environment())?;
    println!("\nleft running; in another terminal:\n");
    println!("  . {}", file.display());
    println!("  adit vm ls");
    println!("  curl -x $ADIT_PROXY http://web-1/");
    println!("  adit goal apply GOAL.yaml --sign $ADIT_KEY --to web-1\n");
    println!("Enter ends it.");
    std::io::stdin()
        .read_line(&mut String::new())
        .map(drop)
        .context("cannot read the terminal")
}

/// Longest wait for a guest.
const BOOT_LIMIT: Duration = Duration::from_secs(60);
