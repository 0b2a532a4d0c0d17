//! `cargo xtask test`: every check, the quickest first, with a table of seconds at the end.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use adit_tests::debian::{Debian, Init, stock_image};
use adit_tests::guest::CPU;
use adit_tests::image::{Image, Kernel};
use adit_tests::root;
use anyhow::Context;

use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;

use crate::ahead::{self, Ahead};
use crate::{progress, setup};

/// What to skip.
#[derive(clap::Args)]
pub struct Options {
    /// Skip the real guests
    #[arg(long)]
    no_guests: bool,
    /// Also what takes long: agents killed 500 times while they are upgraded; fifty copies of a guest's disk; images that are made in
    /// other ways; boots that are measured; the real Debian with the newer kernel, with OpenRC, with larger files
    #[arg(long, conflicts_with = "no_guests")]
    full: bool,
    /// Begin with the step whose name begins so, as after one that failed and was mended
    #[arg(long, value_name = "STEP")]
    from: Option<String>,
}

/// A step, the seconds that it should take at most on two cores, and its function.
struct Step {
    name: &'static str,
    budget_s: u64,
    run: fn() -> anyhow::Result<()>,
}

const CHECKS: [Step; 12] = [
    Step {
        name: "format",
        budget_s: 10,
        run: || setup::cargo(&["fmt", "--all", "--check"]),
    },
    Step {
        name: "lint",
        budget_s: 180,
        run: || {
            setup::cargo(&[
                "clippy",
                "--quiet",
                "--workspace",
                "--all-targets",
                "--",
                "-D",
                "warnings",
            ])?;
            // What `cargo bench` leaves out, `--all-targets` does too.
            let benches = ["clippy", "--quiet", "-p", "adit-benches", "--bench", "*"];
            setup::cargo(&[&benches[..], &["--", "-D", "warnings"]].concat())
        },
    },
    Step {
        name: "engine and ring without a system",
        budget_s: 15,
        run: || {
            setup::cargo(&[
                "check",
                "--quiet",
                "--no-default-features",
                "-p",
                "adit-engine",
                "-p",
                "adit-ringbuf",
                "--target",
                "x86_64-unknown-none",
                "--target",
                "aarch64-unknown-none",
            ])
        },
    },
    Step {
        name: "device without a socket",
        budget_s: 30,
        run: || {
            setup::cargo(&[
                "clippy",
                "--quiet",
                "-p",
                "adit-channel",
                "--no-default-features",
                "--features",
                "device",
                "--",
                "-D",
                "warnings",
            ])
        },
    },
    Step {
        name: "a guest without Linux",
        budget_s: 80,
        run: bare,
    },
    Step {
        name: "documentation",
        budget_s: 120,
        run: documentation,
    },
    Step {
        name: "tests",
        budget_s: 600,
        run: || {
            // Many tests wait for a limit to pass.
            let threads = 2 * std::thread::available_parallelism()?.get();
            let threads = format!("env.RUST_TEST_THREADS='{threads}'");
            let all = ["test", "--workspace", "--no-fail-fast"];
            twice(&[&all[..], &["--config", &threads, "--"]].concat(), &[])
        },
    },
    Step {
        name: "host processes",
        budget_s: 120,
        run: || {
            [
                "host",
                "processes",
                "remote",
                "ways",
                "ways_hosts",
                "grants",
                "crowd",
                "exec",
                "files",
                "hybrid",
                "libvirt_hook",
                "with_vmm",
            ]
            .into_iter()
            .try_for_each(with_binaries)
        },
    },
    Step {
        name: "clients that people use",
        budget_s: 120,
        run: || {
            setup::browser();
            with_binaries("clients")
        },
    },
    Step {
        name: "what operators watch it with",
        budget_s: 150,
        run: observe,
    },
    Step {
        name: "fuzz targets, 5 s each",
        budget_s: 200,
        run: crate::fuzz::smoke,
    },
    Step {
        name: "benches build",
        budget_s: 60,
        run: || setup::cargo(&["build", "--quiet", "-p", "adit-benches", "--bench", "*"]),
    },
];

/// The first of [`GUESTS`] wait for what the others need.
const MADE: usize = 4;

/// Where the step's own time is what is left of it when the steps before have ended ([`AHEAD`]).
const GUESTS: [Step; 8] = [
    Step {
        name: "guest binaries",
        budget_s: 60,
        run: || made(BINARIES),
    },
    Step {
        name: "packages, by lintian",
        budget_s: 180,
        run: || made(PACKAGES),
    },
    Step {
        name: "guest images",
        budget_s: 60,
        run: || made(IMAGES),
    },
    Step {
        name: "Debian's disks, once",
        budget_s: 420,
        run: || made(DEBIAN),
    },
    Step {
        name: "packages, in real roots",
        budget_s: 60,
        run: packages,
    },
    Step {
        name: "real guests",
        budget_s: 330,
        run: || with_binaries("guest"),
    },
    Step {
        name: "a VMM's guests, in a guest",
        budget_s: 260,
        run: || with_binaries("nested"),
    },
    Step {
        name: "a real Debian",
        budget_s: 240,
        run: || with_binaries("debian"),
    },
];

const BINARIES: &str = "guest binaries";
const PACKAGES: &str = "packages";
const IMAGES: &str = "images";
const DEBIAN: &str = "Debian";

/// What is built while [`CHECKS`] run.
const BUILD: ahead::Jobs = &[
    (BINARIES, || {
        setup::guest_binaries().and_then(|()| setup::vmm_binary())
    }),
    (PACKAGES, crate::package::all_for_tests),
    (IMAGES, images),
    (DEBIAN, debian),
];
/// What is fetched meanwhile: Debian's packages, and directories of them.
const FETCH: ahead::Jobs = &[(DEBIAN, fetch)];

/// Both, begun.
static AHEAD: Mutex<Vec<Ahead>> = Mutex::new(Vec::new());

/// Waits until something is there.
fn made(what: &str) -> anyhow::Result<()> {
    let ahead = AHEAD.lock().unwrap_or_else(PoisonError::into_inner);
    let [build, fetch] = ahead.as_slice() else {
        anyhow::bail!("nothing was begun");
    };
    if what == DEBIAN {
        fetch.result(what)?;
    }
    build.result(what)
}

/// With `--full` only.
const FULL: [Step; 3] = [
    Step {
        name: "agents killed while they are upgraded, 500",
        budget_s: 300,
        run: || {
            let killed = "r132_an_agent_that_is_killed_at_every_step";
            let which = ["-p", "adit-guest-driver", "--test", "agent"];
            let args = [&["test"], &which[..], &["--", "--nocapture", killed]].concat();
            cargo_with(&args, &[at_length()])
        },
    },
    Step {
        name: "fifty copies of a guest's disk",
        budget_s: 600,
        run: || {
            let real = Real::of("guest")?;
            let env = [&real.env()[..], &[at_length()]].concat();
            cargo_with(&real.args(&["r133_copies_of"]), &env)
        },
    },
    Step {
        name: "a real Debian, at length",
        budget_s: 1200,
        run: || with_binaries_and("debian", &[at_length()]),
    },
];

/// What has tests run their longer variants.
fn at_length() -> (&'static str, &'static OsStr) {
    ("ADIT_TEST_FULL", OsStr::new("1"))
}

pub fn run(options: &Options) -> anyhow::Result<bool> {
    let steps = steps(options)?;
    setup::run()?;
    if !options.no_guests {
        let ahead = [BUILD, FETCH].map(Ahead::begin);
        *AHEAD.lock().unwrap_or_else(PoisonError::into_inner) = ahead.into();
    }
    let mut table = Vec::new();
    let mut failed = None;
    for step in steps {
        eprintln!("== {}", step.name);
        let (begin, processors) = (Instant::now(), processor_time()?);
        let result = (step.run)();
        let processors = processor_time()?.saturating_sub(processors);
        table.push((step, begin.elapsed(), processors, result.is_ok()));
        if let Err(e) = result {
            failed = Some((step.name, e));
            break;
        }
    }
    print_table(&table);
    for test in PASSED_ON_SECOND_RUN
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .iter()
    {
        eprintln!("passed only on its second run, so it must be fixed: {test}");
    }
    match failed {
        None => Ok(true),
        Some((name, e)) => {
            eprintln!("step `{name}`: {e:#}");
            Ok(false)
        }
    }
}

/// Those that are wanted, before anything is installed or built for them.
fn steps(options: &Options) -> anyhow::Result<Vec<&'static Step>> {
    let mut steps: Vec<&Step> = CHECKS.iter().collect();
    match options.no_guests {
        true => eprintln!("skipped: real guests (--no-guests)"),
        false => steps.extend(&GUESTS),
    }
    if options.full {
        steps.extend(&FULL);
    }
    if let Some(from) = &options.from {
        let first = steps.iter().position(|step| step.name.starts_with(from));
        let first = first.with_context(|| {
            let names: Vec<&str> = steps.iter().map(|step| step.name).collect();
            format!(
                "`--from {from}`: no step's name begins so; there are: {}",
                names.join("; ")
            )
        })?;
        // Whatever is left out, what it would have waited for is needed.
        let is_waited_for = |step: &&Step| GUESTS[..MADE].iter().any(|made| made.name == step.name);
        let kept: Vec<_> = steps[..first]
            .iter()
            .copied()
            .filter(is_waited_for)
            .collect();
        eprintln!(
            "not run: {} steps before `{}`",
            first - kept.len(),
            steps[first].name
        );
        steps.splice(..first, kept);
    }
    Ok(steps)
}

/// Of all processes that have ended, those that were started ahead too.
fn processor_time() -> anyhow::Result<Duration> {
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN)?;
    let [user, system] = [usage.user_time(), usage.system_time()]
        .map(|t| Duration::from_micros(t.num_microseconds().unsigned_abs()));
    Ok(user + system)
}

fn print_table(table: &[(&Step, Duration, Duration, bool)]) {
    eprintln!(
        "\n{:<36} {:>8} {:>8} {:>8}",
        "step", "budget s", "used s", "cpu s"
    );
    for (step, used, processors, ok) in table {
        let over = if used.as_secs() > step.budget_s {
            "  over budget"
        } else {
            ""
        };
        let failed = if *ok { "" } else { "  FAILED" };
        eprintln!(
            "{:<36} {:>8} {:>8.1} {:>8.1}{over}{failed}",
            step.name,
            step.budget_s,
            used.as_secs_f64(),
            processors.as_secs_f64(),
        );
    }
    let sum = |f: fn(&(&Step, Duration, Duration, bool)) -> Duration| {
        table.iter().map(f).sum::<Duration>().as_secs_f64()
    };
    let (used, processors) = (sum(|t| t.1), sum(|t| t.2));
    eprintln!("{:<36} {:>8} {used:>8.1} {processors:>8.1}", "in all", "");
}

fn debian() -> anyhow::Result<()> {
    if let Some(why) = Debian::missing() {
        eprintln!("skipped: {why}");
        return Ok(());
    }
    setup::debian(Kernel::V6_1, Init::Systemd).map(drop)
}

/// All of Debian that needs nothing of ours.
fn fetch() -> anyhow::Result<()> {
    roots()?;
    if Debian::missing().is_none() {
        progress::during("Debian's root directory", || {
            Debian::root(Kernel::V6_1, Init::Systemd, &progress::line)
        })?;
        progress::during("an image of Debian that boots by itself", || {
            stock_image(&progress::line)
        })?;
    }
    Ok(())
}

fn documentation() -> anyhow::Result<()> {
    let strict = ("RUSTDOCFLAGS", OsStr::new("-D warnings"));
    cargo_with(&["doc", "--quiet", "--workspace", "--no-deps"], &[strict])
}

fn images() -> anyhow::Result<()> {
    for kernel in [Kernel::V6_1, Kernel::V6_12] {
        Image::build(kernel, &|what| {
            progress::line(&format!("{}: {what}", kernel.name()))
        })?;
    }
    Ok(())
}

/// The roots that packages are installed into.
fn roots() -> anyhow::Result<()> {
    if root::Root::missing().is_none() {
        for init in [root::Init::Systemd, root::Init::Host, root::Init::None] {
            progress::during("making a root of Debian", || root::build(init))?;
        }
    }
    Ok(())
}

/// Installs, upgrades and removes the packages.
fn packages() -> anyhow::Result<()> {
    if let Some(why) = root::Root::missing() {
        eprintln!("skipped: {why}");
        return Ok(());
    }
    let dir = crate::package::For::Tests.directory();
    let args = [
        "test",
        "-p",
        "adit-tests",
        "--test",
        "packages",
        "--",
        "--nocapture",
    ];
    twice(&args, &[("ADIT_TEST_PACKAGES", dir.as_os_str())])
}

/// Uses the machine's KVM. Without KVM the tests print that and pass.
fn bare() -> anyhow::Result<()> {
    let image = setup::bare_image()?;
    cargo_with(
        &[
            "test",
            "-p",
            "adit-vmm-sample",
            "--test",
            "bare",
            "--test",
            "bare_cycles",
            "--",
            "--nocapture",
        ],
        &[("ADIT_BARE_IMAGE", image.as_os_str())],
    )
}

/// Tests that failed, and passed on the second run.
static PASSED_ON_SECOND_RUN: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// The environment of tests that run the real binaries.
struct Real {
    file: &'static str,
    bins: std::path::PathBuf,
}

impl Real {
    fn of(file: &'static str) -> anyhow::Result<Self> {
        let bins = setup::host_binaries(false)?;
        Ok(Self { file, bins })
    }

    /// Two at a time: while one guest waits, another one can use its processor.
    fn args<'a>(&'a self, which: &[&'a str]) -> Vec<&'a str> {
        let all = ["test", "-p", "adit-tests", "--test", self.file, "--"];
        let how = ["--nocapture", "--test-threads", "2"];
        [&all[..], &how, which].concat()
    }

    fn env(&self) -> [(&'static str, &OsStr); 2] {
        let cpu = OsStr::new("max,-erms,-fsrm");
        [("ADIT_TEST_BINS", self.bins.as_os_str()), (CPU, cpu)]
    }
}

/// Runs a file of tests that start the real binaries.
fn with_binaries(file: &'static str) -> anyhow::Result<()> {
    with_binaries_and(file, &[])
}

/// The same with more in the environment.
fn with_binaries_and(file: &'static str, more: &[(&str, &OsStr)]) -> anyhow::Result<()> {
    let real = Real::of(file)?;
    twice(&real.args(&[]), &[&real.env()[..], more].concat())
}

/// Prometheus, and the property tester of the API.
fn observe() -> anyhow::Result<()> {
    let schemathesis = setup::schemathesis()?;
    let more = schemathesis.iter();
    let more = more.map(|program| ("ADIT_TEST_SCHEMATHESIS", program.as_os_str()));
    with_binaries_and("observe", &more.collect::<Vec<_>>())
}

/// More that fail are no accident.
const SECOND_RUNS_MAX: usize = 3;

/// Runs tests. One that fails is run once more by itself, because an emulated machine, or a process of another test, can be late
/// when the real machine is busy. Both results are printed, and the test is named at the end.
fn twice(args: &[&str], env: &[(&str, &OsStr)]) -> anyhow::Result<()> {
    let failed = failures(args, env)?;
    anyhow::ensure!(
        failed.len() <= SECOND_RUNS_MAX,
        "{} tests failed, too many to run them once more: {}; again: {}",
        failed.len(),
        failed.join(", "),
        line(args, env)
    );
    for test in failed {
        eprintln!("== {test} failed; running it once more by itself");
        cargo_with(&[args, &["--exact", &test]].concat(), env)?;
        eprintln!("== {test} failed once, and passed once");
        let mut second = PASSED_ON_SECOND_RUN
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        second.push(test);
    }
    Ok(())
}

/// Runs tests and prints their output. Returns the names of those that failed.
fn failures(args: &[&str], env: &[(&str, &OsStr)]) -> anyhow::Result<Vec<String>> {
    let mut cargo = cargo_command(args, env).stdout(Stdio::piped()).spawn()?;
    let (mut failed, mut last, mut listed) = (Vec::new(), Vec::new(), false);
    let (mut begun, mut ended, mut counted) = (0, 0, 0);
    for line in BufReader::new(cargo.stdout.take().expect("piped")).lines() {
        let line = line?;
        println!("{line}");
        match (line.as_str(), line.strip_prefix("    ")) {
            // The list comes twice: first with each test's output, and at the end with the names alone.
            ("failures:", _) => (listed, last) = (true, Vec::new()),
            (_, Some(name)) if listed && !name.contains(' ') => last.push(name.to_owned()),
            ("", _) => {}
            (start, _) if is_beginning(start) => begun += 1,
            // One binary's tests have ended.
            (result, _) if result.starts_with("test result:") => {
                let count = result.split("; ").find_map(|n| n.strip_suffix(" failed"));
                counted += count.and_then(|n| n.parse().ok()).unwrap_or(0);
                ended += 1;
                failed.append(&mut last);
                listed = false;
            }
            _ => listed = false,
        }
    }
    let status = cargo.wait()?;
    // A binary that died, or a test in a comment, has no name to be run again by.
    anyhow::ensure!(
        status.success() || (!failed.is_empty() && failed.len() == counted && begun == ended),
        "{status}; {counted} tests failed, by name {failed:?}; {begun} files of tests began, {ended} ended; again: {}",
        line(args, env)
    );
    Ok(failed)
}

/// Whether a line is the first of one binary's tests.
fn is_beginning(line: &str) -> bool {
    let count = line.strip_prefix("running ");
    let count = count.and_then(|l| l.strip_suffix(" tests").or(l.strip_suffix(" test")));
    count.is_some_and(|n| n.parse::<usize>().is_ok())
}

fn cargo_command(args: &[&str], env: &[(&str, &OsStr)]) -> Command {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo
        .args(args)
        .envs(env.iter().copied())
        .current_dir(adit_tests::root());
    cargo
}

/// Runs cargo with additional environment variables.
fn cargo_with(args: &[&str], env: &[(&str, &OsStr)]) -> anyhow::Result<()> {
    let status = cargo_command(args, env).status()?;
    anyhow::ensure!(status.success(), "again: {}", line(args, env));
    Ok(())
}

/// The line that a person types to run that.
fn line(args: &[&str], env: &[(&str, &OsStr)]) -> String {
    let env = env.iter().map(|(n, v)| format!("{n}='{}' ", v.display()));
    format!("{}cargo {}", env.collect::<String>(), args.join(" "))
}
