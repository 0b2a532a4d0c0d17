//! `cargo bench --bench exec -- --binaries DIR --program ADIT-GUEST [--rounds N] [--only CELL] [--realtime] [--json]`: commands through a
//! real `aditd`, its port process, and the guest's agent as a process on a ring; beside the same commands started by this program.
//!
//! ```text
//! ours:  client ─ Unix socket ─ aditd, then adit-port ══ ring ══ agent ── session process ── command
//! bare:  client ── command
//! ```
//! - There is no VM around the agent, so that no guest's kernel is measured; but for the cell `guest` (`real.rs`).
//! - A round trip is one of 64 bytes through a tunnel to a server of the same VM, in the same run.
//! - Contenders take turns in each round; figures are medians.

mod client;
mod real;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use adit_benches::report::{Better, Figure};
use adit_tests::agent;
use adit_tests::host::Host;
use adit_tests::process::{Reaped, bound, wait_for};
use anyhow::{Context, ensure};

const LIMIT: Duration = Duration::from_secs(30);
const POLICY: &str =
    "default = \"deny\"\n[[exec]]\nallow = \"host\"\nusers = \"any\"\ncommands = \"any\"\n";
/// Commands of a round, one after the other.
const ONE_BY_ONE: u32 = 50;
/// Round trips of a round.
const TRIPS: u32 = 500;
/// Commands at once, and how often each is run in a round.
const AT_ONCE: usize = 32;
const EACH: usize = 8;
/// Bytes of output of a round.
const OUTPUT: u64 = 1 << 30;

struct Options {
    binaries: PathBuf,
    program: PathBuf,
    rounds: usize,
    only: Option<String>,
}

impl Options {
    fn wants(&self, cell: &str) -> bool {
        self.only.as_ref().is_none_or(|only| cell.contains(only))
    }
}

fn main() -> anyhow::Result<()> {
    let mut args = std::env::args().skip(1);
    let (mut binaries, mut program, mut rounds, mut json, mut only) = (None, None, 9, false, None);
    while let Some(arg) = args.next() {
        let mut value = || args.next().with_context(|| format!("{arg} needs a value"));
        match arg.as_str() {
            "--agent" => {
                let (vm, program, run_dir) = (value()?, value()?, value()?);
                let port = value()?.parse()?;
                return serve(vm.as_ref(), (program.as_ref(), run_dir.as_ref()), port);
            }
            "--binaries" => binaries = Some(PathBuf::from(value()?)),
            "--program" => program = Some(PathBuf::from(value()?)),
            "--rounds" => rounds = value()?.parse().context("--rounds")?,
            "--realtime" => adit_benches::realtime::realtime(),
            "--only" => only = Some(value()?),
            "--json" => json = true,
            // Arguments that `cargo bench` adds.
            _ => {}
        }
    }
    let (Some(binaries), Some(program)) = (binaries, program) else {
        eprintln!(
            "skipped: --binaries DIR says where aditd and adit-port are, and --program where adit-guest is; `cargo xtask bench exec` builds them"
        );
        return Ok(());
    };
    let options = Options {
        binaries,
        program,
        rounds,
        only,
    };
    for figure in figures(&options)? {
        figure.print(json);
    }
    if options.wants("guest") {
        for figure in real::figures(&options)? {
            figure.print(json);
        }
    }
    Ok(())
}

/// The agent, until its port process ends.
fn serve(vm: &Path, (program, run_dir): (&Path, &Path), port: u16) -> anyhow::Result<()> {
    let policy = format!("{POLICY}[[service]]\nnames = [\"tcp:{port}\"]\n");
    agent::start_running(vm, &[port], program, run_dir, &policy)?;
    loop {
        std::thread::park();
    }
}

/// A host, and its VM `a`.
struct Setup {
    host: Host,
    _agent: Reaped,
    _run: tempfile::TempDir,
    /// A server in the VM, which sends back what it gets.
    port: u16,
}

impl Setup {
    fn new(options: &Options) -> anyhow::Result<Self> {
        let server = TcpListener::bind("127.0.0.1:0")?;
        let port = server.local_addr()?.port();
        std::thread::spawn(move || {
            while let Ok((mut stream, _)) = server.accept() {
                let _ = stream.set_nodelay(true);
                std::thread::spawn(move || {
                    let mut message = [0; 64];
                    while stream.read_exact(&mut message).is_ok()
                        && stream.write_all(&message).is_ok()
                    {}
                });
            }
        });
        let config = format!(
            "[proxy]\nlisten = \"127.0.0.1:0\"\n[[grant]]\nto = [\"anyone\"]\nvms = [\"*\"]\nmay = [\"reach\"]\n\
             [[vm]]\nname = \"a\"\ncid = 3\nallow = [{port}]\n"
        );
        let host = Host::start_configured(&options.binaries, &config)?;
        let run = tempfile::tempdir()?;
        let agent = bound(std::env::current_exe()?)
            .arg("--agent")
            .arg(host.vm_dir("a"))
            .arg(&options.program)
            .arg(run.path())
            .arg(port.to_string())
            .stdin(Stdio::null())
            .spawn()?;
        let setup = Self {
            host,
            _agent: Reaped(agent),
            _run: run,
            port,
        };
        wait_for("the ring carries", LIMIT, || {
            Ok(setup.run(&["true"]).is_ok().then_some(()))
        })?;
        Ok(setup)
    }

    /// Runs a command to its end. Returns the bytes that it wrote.
    fn run(&self, argv: &[&str]) -> anyhow::Result<u64> {
        Ok(self.ran(argv)?.written)
    }

    fn ran(&self, argv: &[&str]) -> anyhow::Result<client::Ran> {
        client::run(&self.host.vm_dir("a").join("../../aditd.sock"), argv)
    }

    /// ns of a round trip of 64 bytes.
    fn trip(&self) -> anyhow::Result<f64> {
        let mut stream = TcpStream::connect(self.host.proxy())?;
        stream.set_nodelay(true)?;
        let (port, mut head) = (self.port, Vec::new());
        write!(
            stream,
            "CONNECT a:{port} HTTP/1.1\r\nHost: a:{port}\r\n\r\n"
        )?;
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            stream.read_exact(&mut byte)?;
            head.extend(byte);
        }
        ensure!(head.starts_with(b"HTTP/1.1 200"), "no tunnel");
        let mut message = [1; 64];
        let begin = Instant::now();
        for _ in 0..TRIPS {
            stream.write_all(&message)?;
            stream.read_exact(&mut message)?;
        }
        Ok(begin.elapsed().as_nanos() as f64 / f64::from(TRIPS))
    }
}

/// Runs a command to its end without anything between. Returns the bytes that it wrote.
fn bare(argv: &[&str]) -> anyhow::Result<u64> {
    let (program, args) = argv.split_first().context("a command")?;
    let mut child = Command::new(program)
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let (mut out, mut all, mut piece) =
        (child.stdout.take().context("a pipe")?, 0, vec![0; 1 << 18]);
    loop {
        match out.read(&mut piece)? {
            0 => break,
            n => all += n as u64,
        }
    }
    ensure!(child.wait()?.success(), "{argv:?} failed");
    Ok(all)
}

type Run<'a> = &'a (dyn Fn(&[&str]) -> anyhow::Result<u64> + Sync);

/// ns of a command that does nothing.
fn one_by_one(run: Run<'_>) -> anyhow::Result<f64> {
    let begin = Instant::now();
    for _ in 0..ONE_BY_ONE {
        run(&["true"])?;
    }
    Ok(begin.elapsed().as_nanos() as f64 / f64::from(ONE_BY_ONE))
}

/// Commands a second, of many at once.
fn at_once(run: Run<'_>) -> anyhow::Result<f64> {
    let begin = Instant::now();
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..AT_ONCE)
            .map(|_| scope.spawn(|| (0..EACH).try_for_each(|_| run(&["true"]).map(drop))))
            .collect();
        threads
            .into_iter()
            .try_for_each(|t| t.join().expect("a client"))
    })?;
    Ok((AT_ONCE * EACH) as f64 / begin.elapsed().as_secs_f64())
}

/// MB/s of output.
fn output(run: Run<'_>) -> anyhow::Result<f64> {
    let begin = Instant::now();
    let bytes = OUTPUT.to_string();
    let got = run(&["head", "-c", &bytes, "/dev/zero"])?;
    ensure!(got == OUTPUT, "{got} of {OUTPUT} bytes");
    Ok(got as f64 / 1e6 / begin.elapsed().as_secs_f64())
}

fn figures(options: &Options) -> anyhow::Result<Vec<Figure>> {
    if !["true", "many", "output"]
        .into_iter()
        .any(|cell| options.wants(cell))
    {
        return Ok(Vec::new());
    }
    let setup = Setup::new(options)?;
    let ours = |argv: &[&str]| setup.run(argv);
    let mut figures = Vec::new();
    if options.wants("true") {
        let (mut trips, mut over) = (Vec::new(), Vec::new());
        for _ in 0..options.rounds {
            let (with, without) = (one_by_one(&ours)?, one_by_one(&bare)?);
            over.push(with - without);
            trips.push(setup.trip()?);
        }
        let name = "exec -- true there and back, over the bare spawn";
        let figure = Figure::alone(name, "ns", Better::Lower, &over);
        figures.push(figure.beside("a round trip of 64 B", &trips, 4.0, 2.0));
        let mut steps = [const { Vec::new() }; 3];
        for _ in 0..ONE_BY_ONE {
            let at = setup.ran(&["true"])?.at;
            let since = [at[0], at[1] - at[0], at[2] - at[1]];
            for (all, one) in steps.iter_mut().zip(since) {
                all.push(one.as_nanos() as f64);
            }
        }
        let names = [
            "until aditd lets it through",
            "from there until it runs",
            "from there to its end",
        ];
        for (name, all) in names.into_iter().zip(steps) {
            figures.push(Figure::alone(
                format!("of it: {name}"),
                "ns",
                Better::Lower,
                &all,
            ));
        }
    }
    let mut beside = |cell: &str,
                      name: &str,
                      unit,
                      measure: fn(Run<'_>) -> anyhow::Result<f64>,
                      goals: (f64, f64),
                      peer| {
        if !options.wants(cell) {
            return Ok(());
        }
        let (mut with, mut without) = (Vec::new(), Vec::new());
        for _ in 0..options.rounds {
            with.push(measure(&ours)?);
            without.push(measure(&bare)?);
        }
        let figure = Figure::alone(name, unit, Better::Higher, &with);
        figures.push(figure.beside(peer, &without, goals.0, goals.1));
        anyhow::Ok(())
    };
    beside(
        "many",
        "commands a second, 32 at once",
        "/s",
        at_once,
        (0.5, 0.8),
        "fork and exec",
    )?;
    beside(
        "output",
        "output of 1 GiB",
        "MB/s",
        output,
        (0.5, 0.8),
        "a pipe",
    )?;
    Ok(figures)
}
