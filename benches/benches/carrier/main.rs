//! `cargo bench --bench carrier [-- --rounds N] [--realtime] [--image FILE] [--json]`: streams over the ring, compared with the
//! bare ring below them and with a Unix socket, in the same run, round by round; and what it costs the device that a VMM
//! describes its memory as raw regions.
//!
//! - A cell is a process of its own that forks: two processes pinned to two processors ([`adit_benches::duel`]), with a port
//!   and a shard in each. `--cell NAME` runs one cell and prints its numbers.
//! - The cells whose name begins with `hybrid` are tunnels over the sockets of a VMM that has one for each stream, beside `socat`.
//! - Shards poll, as the ends of the bare ring do. The cells with tokio and with eventfds sleep.

mod bare;
mod first;
mod hybrid;
#[path = "../ring/others.rs"]
#[allow(dead_code)] // some of its contenders
mod others;
#[path = "../ring/ours.rs"]
#[allow(dead_code)]
mod ours;
mod packet;
mod streams;
mod tasks;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;

use adit_benches::duel::{self, Home, RING};
use adit_benches::report::{Better, Figure};
use hybrid::Way::{Chunks, Plain, Socat};

/// Bytes of a write in the bulk cells.
pub const BULK: usize = 64 << 10;
/// Bytes of a message in the round trips.
pub const SMALL: usize = 64;

/// Runs one cell in this process.
fn cell(name: &str) -> Vec<f64> {
    let processes = Home::Processes;
    match name {
        "bulk ring" => duel::stream(processes, ours::polling(RING, 1, 8), BULK).to_vec(),
        "bulk unix" => duel::stream(processes, others::unix_stream(), BULK).to_vec(),
        "bulk stream" => streams::bulk(),
        "trip ring" => {
            let ends = || ours::polling(RING, 1, 64);
            duel::round_trip(processes, ends(), ends(), SMALL).to_vec()
        }
        "trip stream" => streams::trips(),
        "first" => first::messages().to_vec(),
        "packet" => packet::both().to_vec(),
        "trip tokio" => tasks::trips(),
        "trip eventfd" => others::eventfds(),
        "hybrid to" => hybrid::bulk(Plain, true),
        "hybrid to, chunks" => hybrid::bulk(Chunks, true),
        "hybrid to, socat" => hybrid::bulk(Socat, true),
        "hybrid from" => hybrid::bulk(Plain, false),
        "hybrid from, chunks" => hybrid::bulk(Chunks, false),
        "hybrid from, socat" => hybrid::bulk(Socat, false),
        "hybrid trip" => hybrid::trips(Plain),
        "hybrid trip, chunks" => hybrid::trips(Chunks),
        "hybrid trip, socat" => hybrid::trips(Socat),
        "hybrid idle" => hybrid::idle(),
        "trip process" => bare::round_trip(None).to_vec(),
        "trip guest" => bare::round_trip(image().as_deref()).to_vec(),
        _ => panic!("no cell {name:?}"),
    }
}

const CELLS: [&str; 19] = [
    "hybrid to",
    "hybrid to, chunks",
    "hybrid to, socat",
    "hybrid from",
    "hybrid from, chunks",
    "hybrid from, socat",
    "hybrid trip",
    "hybrid trip, chunks",
    "hybrid trip, socat",
    "hybrid idle",
    "bulk ring",
    "bulk unix",
    "bulk stream",
    "trip ring",
    "trip stream",
    "first",
    "packet",
    "trip tokio",
    "trip eventfd",
];

/// What the numbers of cells `first`, `packet` and `hybrid idle` are; other cells have one figure, by their own name.
const FIRST: [&str; 3] = ["first opened", "first dialled", "first warm"];
const IDLE: [&str; 2] = ["hybrid idle", "hybrid wakeups"];
const PACKET: [&str; 2] = ["packet raw", "packet own"];

/// Cells that run beside a guest. They never run in real time: to make a guest, KVM needs threads of the kernel, and a side that
/// polls in real time would keep them from running.
const BESIDE_A_GUEST: [&str; 2] = ["trip process", "trip guest"];

/// The argument after `name` on the command line.
fn after(name: &str) -> Option<String> {
    std::env::args().skip_while(|arg| arg != name).nth(1)
}

/// The image of the guest without Linux (`--image`). `None`: there is no image, or no KVM.
fn image() -> Option<PathBuf> {
    let image = PathBuf::from(after("--image")?);
    let kvm = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm");
    kvm.ok().map(|_| image)
}

/// Runs a cell in a process of its own.
fn apart(name: &str) -> Vec<f64> {
    let this = std::env::current_exe().expect("this program");
    let mut command = Command::new("chrt");
    let mut command = match BESIDE_A_GUEST.contains(&name) {
        true => {
            command.args(["--other", "0"]).arg(this);
            command
        }
        false => Command::new(this),
    };
    command.args(["--cell", name]);
    if let Some(image) = after("--image") {
        command.args(["--image", &image]);
    }
    let out = command.output();
    let out = out.expect("the program of the cell");
    let errors = String::from_utf8_lossy(&out.stderr);
    assert!(
        out.status.success(),
        "cell {name:?}: {}\n{errors}",
        out.status
    );
    let said = String::from_utf8_lossy(&out.stdout);
    let number = |word: &str| word.parse().expect("a number");
    said.split_whitespace().map(number).collect()
}

fn figures(all: &BTreeMap<&str, Vec<f64>>) -> Vec<Figure> {
    let of = |name: &str| all[name].as_slice();
    let bulk = |name: &str| -> Vec<f64> {
        let bytes = |per_second: &f64| per_second * BULK as f64 / 1e6;
        of(name).iter().map(bytes).collect()
    };
    let stream = bulk("bulk stream");
    let (more, less) = (Better::Higher, Better::Lower);
    let trip = |name: &str, of_whom: &str| Figure::alone(name, "ns", less, of(of_whom));
    let mut figures = vec![
        Figure::alone(
            "stream, 64 KiB writes, two processes",
            "MB/s",
            more,
            &stream,
        )
        .beside("bare ring", &bulk("bulk ring"), 0.75, 0.9),
        Figure::alone(
            "stream, 64 KiB writes, two processes",
            "MB/s",
            more,
            &stream,
        )
        .beside("Unix stream", &bulk("bulk unix"), 2.0, 2.0),
        trip(
            "inline service, 64 B round trip, two processes",
            "trip stream",
        )
        .beside("bare ring", of("trip ring"), 2.0, 1.5),
        trip(
            "first 64 KiB of a new stream, from its opening",
            "first opened",
        )
        .beside("a warm stream", of("first warm"), 1.5, 1.1),
        trip(
            "first 64 KiB of a new stream, from the dial",
            "first dialled",
        )
        .beside("a warm stream", of("first warm"), 1.5, 1.1),
        trip(
            "through tokio, 64 B round trip, asleep in between",
            "trip tokio",
        ),
        trip("eventfds alone, round trip", "trip eventfd"),
        trip(
            "device through raw regions, TX packet with 64 B",
            "packet raw",
        )
        .beside("GuestAddressSpace", of("packet own"), 1.05, 1.0),
    ];
    figures.extend(hybrid_figures(&bulk, &of));
    if all.contains_key("trip guest") {
        let name = "bare ring, 64 B round trip with a guest that runs in user mode on KVM";
        let guest = trip(name, "trip guest");
        figures.push(guest.beside("two processes", of("trip process"), 1.3, 1.1));
    } else {
        eprintln!(
            "skipped: a guest on KVM: /dev/kvm cannot be opened, or there is no --image (`cargo xtask bench carrier` builds it)"
        );
    }
    figures
}

/// Tunnels over a socket for each stream.
fn hybrid_figures<'a>(
    bulk: &impl Fn(&str) -> Vec<f64>,
    of: &impl Fn(&str) -> &'a [f64],
) -> Vec<Figure> {
    let (more, less) = (Better::Higher, Better::Lower);
    let mut figures = Vec::new();
    for (way, what) in [("to", "to the guest"), ("from", "from the guest")] {
        let [plain, chunks, socat] =
            ["", ", chunks", ", socat"].map(|with| bulk(&format!("hybrid {way}{with}")));
        let name = format!("tunnel over a hybrid socket, 64 KiB writes {what}");
        figures.push(Figure::alone(&name, "MB/s", more, &plain).beside("socat", &socat, 1.5, 2.0));
        let name = format!("the same with ends among the bytes, {what}");
        figures
            .push(Figure::alone(name, "MB/s", more, &chunks).beside("without", &plain, 0.8, 0.95));
    }
    let trip = |name: &str, cell: &str| Figure::alone(name, "ns", less, of(cell));
    let socat = of("hybrid trip, socat");
    figures.extend([
        trip(
            "tunnel over a hybrid socket, 64 B round trip",
            "hybrid trip",
        )
        .beside("socat", socat, 0.9, 0.7),
        trip("the same with ends among the bytes", "hybrid trip, chunks")
            .beside("socat", socat, 0.9, 0.7),
        Figure::alone(
            "memory of an idle stream over a hybrid socket",
            "bytes",
            less,
            of("hybrid idle"),
        )
        .goal(1024.0, 1024.0),
        Figure::alone(
            "wake-ups of a thousand idle ones in a second",
            "",
            less,
            of("hybrid wakeups"),
        )
        .goal(0.0, 0.0),
    ]);
    figures
}

fn main() {
    let args: Vec<String> = std::env::args().collect();
    if let Some(name) = after("--cell") {
        let words: Vec<String> = cell(&name).iter().map(f64::to_string).collect();
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
    let progress = adit_benches::report::rounds(rounds);
    let mut all: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
    let guest = image().map_or(&[][..], |_| &BESIDE_A_GUEST);
    for _ in 0..rounds {
        for &name in CELLS.iter().chain(guest) {
            let names = match name {
                "first" => &FIRST[..],
                "packet" => &PACKET[..],
                "hybrid idle" => &IDLE[..],
                _ => std::slice::from_ref(&name),
            };
            for (&figure, number) in names.iter().zip(apart(name)) {
                all.entry(figure).or_default().push(number);
            }
        }
        progress.inc(1);
    }
    progress.finish_and_clear();
    let json = args.iter().any(|a| a == "--json");
    figures(&all).iter().for_each(|figure| figure.print(json));
}
