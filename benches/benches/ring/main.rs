//! `cargo bench --bench ring [-- --rounds N] [--realtime] [--peers PROGRAM] [--plot FILE] [--json]`: the ring compared with other
//! ways to send messages and with the limits of the machine, in the same run, round by round.
//!
//! - A cell is one contender with one task. It is a process of its own that forks: two processes pinned to two processors
//!   ([`adit_benches::duel`]). `--cell KIND NAME SIZE` runs one cell and prints its numbers.
//! - `--peers`: the program with the contenders that need more than Rust to build (`benches/peers`).
//! - Ours polls like its peers, except where its name says that it sleeps.

mod figures;
mod others;
mod ours;
#[path = "../common/plot.rs"]
mod plot;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use adit_benches::duel::{self, Ends, Home, RING};
use adit_benches::report::median;
use adit_ringbuf_io::Spin;
use others::Flags;
use plot::Plot;

/// Message sizes of the plot. The figures use some of them.
pub const SIZES: [usize; 6] = [64, 256, 1024, 4096, 16_384, 65_536];
/// Bytes of the smaller ring that one figure uses.
const SMALL: usize = 256 << 10;

/// Contenders that this program runs.
const STREAMS: [&str; 7] = [
    "ours",
    "rtrb",
    "pipe",
    "Unix stream",
    "seqpacket",
    "cross-core stream",
    "published index",
];
/// Contenders that the other program runs.
const PEERS: [&str; 3] = ["iceoryx2", "shmem-ipc", "ipmpsc"];

/// Values of every cell, one for each round.
#[derive(Default)]
pub struct Rounds(BTreeMap<(String, usize), Vec<f64>>);

impl Rounds {
    fn add(&mut self, name: impl Into<String>, size: usize, value: f64) {
        self.0.entry((name.into(), size)).or_default().push(value);
    }

    /// All values of one name and size.
    pub fn of(&self, name: &str, size: usize) -> &[f64] {
        self.0
            .get(&(name.to_owned(), size))
            .map_or(&[], Vec::as_slice)
    }
}

/// A contender by name.
fn contender(name: &str, size: usize) -> (Home, Ends) {
    let asleep = Spin::new(Duration::ZERO);
    let processes = |ends| (Home::Processes, ends);
    let threads = |ends| (Home::Threads, ends);
    match name {
        "ours" => processes(ours::polling(RING, 1, 8)),
        "ours, lines" => processes(ours::polling(RING, 1, 64)),
        "ours, 32 at a time" => processes(ours::polling(RING, 32, 8)),
        "ours, drained" => processes(ours::drained(1)),
        "ours, 32 at a time, drained" => processes(ours::drained(32)),
        "ours, unchecked" => processes(ours::unchecked()),
        "ours, small" => processes(ours::polling(SMALL, 1, 8)),
        "ours, small, sleeping" => processes(ours::waiting(SMALL, 8, Spin::default())),
        "ours, sleeping" => processes(ours::waiting(RING, 8, Spin::default())),
        "ours, lines, sleeping" => processes(ours::waiting(RING, 64, Spin::default())),
        "ours, at once asleep" => processes(ours::waiting(RING, 64, asleep)),
        "rtrb" => threads(others::rtrb_bytes(1, false)),
        "rtrb, 32 at a time" => threads(others::rtrb_bytes(32, false)),
        "rtrb, 32 at a time, drained" => threads(others::rtrb_bytes(32, true)),
        "rtrb, elements" => threads(others::rtrb_elements()),
        "pipe" => processes(others::pipe()),
        "Unix stream" => processes(others::unix_stream()),
        "seqpacket" => processes(others::seqpacket()),
        "cross-core stream" => processes(others::slots(size)),
        "published index" => processes(others::published(1, false)),
        "published index, 32 at a time" => processes(others::published(32, false)),
        "published index, 32 at a time, drained" => processes(others::published(32, true)),
        _ => panic!("no contender {name:?}"),
    }
}

/// Runs one cell in this process.
fn cell(kind: &str, name: &str, size: usize) -> Vec<f64> {
    match kind {
        "stream" => {
            let (home, ends) = contender(name, size);
            duel::stream(home, ends, size).to_vec()
        }
        "trip" => {
            let (home, there) = contender(name, size);
            duel::round_trip(home, there, contender(name, size).1, size).to_vec()
        }
        "flags" => match name {
            "one line" => others::flags(Flags::OneLine),
            "two lines" => others::flags(Flags::TwoLines),
            "payload" => others::flags(Flags::Payload),
            _ => others::eventfds(),
        },
        "rate" => ours::rate(),
        "lanes" => ours::lanes(name == "full"),
        "duplex" => ours::duplex(size),
        _ => panic!("no cell {kind:?}"),
    }
}

/// Runs cells in processes of their own.
struct Cells {
    this: PathBuf,
    peers: Option<PathBuf>,
}

impl Cells {
    /// Returns a cell's numbers. An error has the cell's output.
    fn run(
        &self,
        program: &PathBuf,
        kind: &str,
        name: &str,
        size: usize,
    ) -> Result<Vec<f64>, String> {
        let mut command = Command::new(program);
        command.args(["--cell", kind, name, &size.to_string()]);
        let out = command.output().expect("the program of the cell");
        if !out.status.success() {
            let errors = String::from_utf8_lossy(&out.stderr);
            return Err(format!("{kind} {name:?} {size}: {}\n{errors}", out.status));
        }
        let said = String::from_utf8_lossy(&out.stdout);
        let number = |word: &str| word.parse().expect("a number");
        Ok(said.split_whitespace().map(number).collect())
    }

    /// The numbers of a cell of ours. It must not fail.
    fn ours(&self, kind: &str, name: &str, size: usize) -> Vec<f64> {
        self.run(&self.this, kind, name, size)
            .unwrap_or_else(|why| panic!("cell {why}"))
    }

    /// The first number of a cell of ours.
    fn first(&self, kind: &str, name: &str, size: usize) -> f64 {
        self.ours(kind, name, size)[0]
    }

    fn round(&self, all: &mut Rounds) {
        for size in SIZES {
            for name in STREAMS {
                all.add(name, size, self.first("stream", name, size));
            }
            for (program, name) in self.peers.iter().flat_map(|p| PEERS.map(|n| (p, n))) {
                match self.run(program, "stream", name, size) {
                    Ok(said) => all.add(name, size, said[0]),
                    // A peer that loses a message or hangs is counted, and the round continues.
                    Err(why) => {
                        let why = why.lines().find(|l| l.contains("message")).unwrap_or(&why);
                        eprintln!("{name} failed at {size} bytes: {why}");
                    }
                }
            }
            let [p50, p99] = [0, 1].map(|n| move |said: &[f64]| said[n]);
            let said = self.ours("trip", "ours, lines", size);
            all.add("RTT ours", size, p50(&said));
            all.add("RTT tail", size, p99(&said) / p50(&said));
        }
        for name in [
            "ours, 32 at a time",
            "ours, drained",
            "ours, 32 at a time, drained",
            "ours, unchecked",
            "rtrb, elements",
            "rtrb, 32 at a time",
            "rtrb, 32 at a time, drained",
            "published index, 32 at a time",
            "published index, 32 at a time, drained",
        ] {
            all.add(name, 64, self.first("stream", name, 64));
        }
        let batches = "ours, 32 at a time";
        all.add(batches, 1024, self.first("stream", batches, 1024));
        let said = self.ours("stream", "ours, sleeping", 64);
        all.add("ours, sleeping", 64, said[0]);
        all.add("doorbells", 64, said[1]);
        for name in ["ours, small", "ours, small, sleeping"] {
            all.add(name, 65_536, self.first("stream", name, 65_536));
        }
        for name in ["one line", "two lines", "payload", "eventfds"] {
            all.add(name, 64, self.first("flags", name, 0));
        }
        all.add("RTT ours", 48, self.first("trip", "ours, lines", 48));
        for name in [
            "rtrb, elements",
            "published index",
            "ours, lines, sleeping",
            "ours, at once asleep",
        ] {
            all.add(format!("RTT {name}"), 64, self.first("trip", name, 64));
        }
        all.add("rate", 64, self.first("rate", "", 64));
        for name in ["idle", "full"] {
            all.add(format!("lanes {name}"), 64, self.first("lanes", name, 64));
        }
        for size in [4096, 65_536] {
            all.add("duplex", size, self.first("duplex", "", size));
        }
    }
}

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let after = |name: &str| {
        let at = args.iter().position(|a| a == name)?;
        args.get(at + 1).cloned()
    };
    if let [_, flag, kind, name, size] = &args[..]
        && flag == "--cell"
    {
        let said = cell(kind, name, size.parse().expect("a size"));
        let words: Vec<String> = said.iter().map(f64::to_string).collect();
        println!("{}", words.join(" "));
        return;
    }
    if args.iter().any(|a| a == "--realtime") {
        adit_benches::realtime::realtime();
    }
    if std::thread::available_parallelism().map_or(1, usize::from) < 2 {
        eprintln!("skipped: a ring between two processors needs two");
        return;
    }
    let rounds = after("--rounds").and_then(|n| n.parse().ok()).unwrap_or(5);
    let cells = Cells {
        this: std::env::current_exe().expect("this program"),
        peers: after("--peers").map(PathBuf::from),
    };
    let progress = adit_benches::report::rounds(rounds);
    let mut all = Rounds::default();
    for _ in 0..rounds {
        cells.round(&mut all);
        progress.inc(1);
    }
    progress.finish_and_clear();
    let json = args.iter().any(|a| a == "--json");
    figures::all(&all)
        .iter()
        .for_each(|figure| figure.print(json));
    if let Some(path) = after("--plot") {
        match plot(&all).draw(&SIZES, &path) {
            Ok(()) => eprintln!("plot over sizes: {path}"),
            Err(e) => eprintln!("no plot: {path}: {e}"),
        }
    }
}

/// GB/s of every contender over message sizes.
fn plot(all: &Rounds) -> Plot<'static> {
    let gb_s = |name, size| {
        let of = all.of(name, size);
        (!of.is_empty()).then(|| (size as f64, median(of) * size as f64 / 1e9))
    };
    let line = |&name| {
        let points: Vec<_> = SIZES.iter().filter_map(|&size| gb_s(name, size)).collect();
        (name, points, if name == "ours" { 4 } else { 2 })
    };
    let lines = STREAMS.iter().chain(&PEERS).map(line);
    Plot {
        caption: "One way between two processes, copied in and out",
        y: ("GB/s", 0.03..60.0),
        lines: lines.filter(|(_, points, _)| !points.is_empty()).collect(),
    }
}
