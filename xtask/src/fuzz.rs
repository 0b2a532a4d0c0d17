//! `cargo xtask fuzz` runs the targets of `fuzz/` under libFuzzer. The instrumentation is LLVM's own and needs no nightly compiler.
//! New inputs are kept in `target/fuzz/corpus`, and inputs that break a rule in `target/fuzz/found`.

use std::ffi::OsString;
use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Output, Stdio};

use anyhow::{Context, bail};

use crate::progress;

/// Compiler flags for libFuzzer's instrumentation.
const FLAGS: &str = "-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares -Clink-dead-code";
/// Set where this program stands between cargo and the compiler.
const AS_COMPILER: &str = "ADIT_XTASK_AS_COMPILER";
/// How many targets run at a time. Each has one thread.
const AT_ONCE: usize = 2;
const HOST: &str = "x86_64-unknown-linux-gnu";

/// What to fuzz, and for how long.
#[derive(clap::Args)]
pub struct Options {
    /// One target; by default all of them, two at a time
    target: Option<String>,
    /// Time for each target
    #[arg(long, default_value_t = 1.0)]
    minutes: f64,
    /// End each target after so many inputs, if that is sooner
    #[arg(long)]
    runs: Option<u64>,
}

pub fn run(options: &Options) -> anyhow::Result<bool> {
    let mut names = targets()?;
    if let Some(name) = &options.target {
        if !names.contains(name) {
            bail!("`{name}` is not a target: {}", names.join(", "));
        }
        names.retain(|n| n == name);
    }
    let seconds = (options.minutes * 60.0).ceil() as u64;
    let binary = build(Built::ToFind)?;
    let mut whole = true;
    for names in names.chunks(AT_ONCE) {
        whole &= fuzz(&binary, names, seconds, options.runs)?;
    }
    Ok(whole)
}

/// Time for each target in [`smoke`].
const SMOKE_S: u64 = 5;

/// A short run of every target.
pub fn smoke() -> anyhow::Result<()> {
    let binary = build(Built::ToSmoke)?;
    for names in targets()?.chunks(AT_ONCE) {
        if !fuzz(&binary, names, SMOKE_S, None)? {
            bail!("{} broke a rule", names.join(" or "));
        }
    }
    Ok(())
}

/// The names of all targets: each has a directory of seeds.
fn targets() -> anyhow::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(adit_tests::root().join("fuzz/corpus"))? {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}

/// What the targets are built for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Built {
    /// Minutes and hours: optimised, with the libraries that they use instrumented too.
    ToFind,
    /// Seconds: our own crates alone are instrumented, and the libraries are those of the tests.
    ToSmoke,
}

fn build(built: Built) -> anyhow::Result<PathBuf> {
    let target = adit_tests::target();
    let dir = target.join("fuzz");
    progress::during("building the fuzz targets", || {
        let mut command = Command::new("cargo");
        command.args(["build", "--quiet", "-p", "adit-fuzz"]).args([
            "--features",
            "libfuzzer",
            "--bin",
            "adit-fuzz",
        ]);
        match built {
            Built::ToFind => command
                .args(["--profile", "fuzz", "--target", HOST, "--target-dir"])
                .arg(&dir)
                .env("RUSTFLAGS", FLAGS),
            Built::ToSmoke => command
                .args(["--config", "profile.dev.opt-level=1"])
                .env("RUSTC_WORKSPACE_WRAPPER", std::env::current_exe()?)
                .env(AS_COMPILER, "1"),
        };
        let status = command.status().context("cannot start cargo")?;
        if !status.success() {
            bail!("the fuzz targets do not build");
        }
        Ok(())
    })?;
    Ok(match built {
        Built::ToFind => dir.join(HOST).join("fuzz/adit-fuzz"),
        Built::ToSmoke => target.join("debug/adit-fuzz"),
    })
}

/// Becomes the compiler that cargo asks for, with the instrumentation for a crate of ours; none: cargo asks for nothing.
pub fn compiler() -> Option<ExitCode> {
    std::env::var_os(AS_COMPILER)?;
    let args: Vec<OsString> = std::env::args_os().skip(1).collect();
    let (rustc, args) = args.split_first()?;
    // What runs while it builds has no fuzzer in it.
    let is_build = args.iter().any(|arg| arg == "build_script_build");
    let flags = FLAGS.split_whitespace().filter(|_| !is_build);
    let e = Command::new(rustc).args(args).args(flags).exec();
    eprintln!("cannot start {}: {e}", rustc.display());
    Some(ExitCode::FAILURE)
}

/// Runs several targets at once. Returns whether none of them found anything.
fn fuzz(binary: &Path, names: &[String], seconds: u64, runs: Option<u64>) -> anyhow::Result<bool> {
    let what = format!("{}, {seconds} s at most", names.join(" and "));
    let started = || names.iter().map(|name| start(binary, name, seconds, runs));
    let ended = progress::during(&what, || {
        let children = started().collect::<anyhow::Result<Vec<_>>>()?;
        // Read the output of all children meanwhile: a child blocks when its pipe is full.
        std::thread::scope(|scope| {
            let wait = |child: Child| scope.spawn(|| child.wait_with_output());
            let waiting: Vec<_> = children.into_iter().map(wait).collect();
            let joined = waiting.into_iter().map(|w| w.join().expect("no panic"));
            Ok(joined.collect::<std::io::Result<Vec<_>>>()?)
        })
    })?;
    let reported = names
        .iter()
        .zip(&ended)
        .map(|(name, out)| report(name, out));
    Ok(reported.fold(true, |whole, ok| whole & ok))
}

/// The directories for a target's new inputs, and for inputs that broke a rule.
fn kept(name: &str) -> [PathBuf; 2] {
    let base = adit_tests::target().join("fuzz");
    ["corpus", "found"].map(|kind| base.join(kind).join(name))
}

fn seeds(name: &str) -> PathBuf {
    adit_tests::root().join("fuzz/corpus").join(name)
}

fn start(binary: &Path, name: &str, seconds: u64, runs: Option<u64>) -> anyhow::Result<Child> {
    let [corpus, found] = kept(name);
    fs::create_dir_all(&corpus)?;
    fs::create_dir_all(&found)?;
    let mut command = Command::new(binary);
    command
        .env("ADIT_FUZZ_TARGET", name)
        .arg(format!("-max_total_time={seconds}"))
        .args([
            "-max_len=2048",
            "-rss_limit_mb=1024",
            "-print_final_stats=1",
        ])
        .arg(format!("-artifact_prefix={}/", found.display()))
        .args(runs.map(|n| format!("-runs={n}")))
        .arg(&corpus)
        .arg(seeds(name))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    Ok(command.spawn()?)
}

fn report(name: &str, out: &Output) -> bool {
    let said = String::from_utf8_lossy(&out.stderr);
    let count = said
        .lines()
        .find_map(|l| l.strip_prefix("stat::number_of_executed_units:"));
    let cover = said.lines().rev().find_map(|l| l.split_once("cov: "));
    let cover = cover.and_then(|(_, rest)| rest.split(' ').next());
    let (count, cover) = (count.unwrap_or("?").trim(), cover.unwrap_or("?"));
    println!("{name}: {count} inputs, {cover} places covered");
    if !out.status.success() {
        let tail: Vec<&str> = said.lines().rev().take(30).collect();
        tail.iter().rev().for_each(|line| eprintln!("{line}"));
        let [_, found] = kept(name);
        eprintln!(
            "the input is in {}: add it to {} with the fix",
            found.display(),
            seeds(name).display()
        );
    }
    out.status.success()
}
