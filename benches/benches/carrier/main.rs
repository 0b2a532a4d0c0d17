//! `cargo bench --bench carrier [-- --rounds N] [--realtime] [--image FILE] [--json]`: streams over the ring, compared with the
//! bare ring below them and with a Unix socket, in the same run, round by round; and what it costs the device that a VMM
//! describes its memory as raw regions.
//!
//! - A cell is a process of its own that forks: two processes pinned to two processors ([`adit_benches::duel`]), with a port
//!   and a shard in each. `--cell NAME` runs one cell and prints its numbers.
//! - Shards poll, as the ends of the bare ring do. The cells with tokio and with eventfds sleep.

mod bare;
mod first;
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
        "trip process" => bare::round_trip(None).to_vec(),
        "trip guest" => bare::round_trip(image().as_deref()).to_vec(),
        _ => panic!("no cell {name:?}"),
    }
}

const CELLS: [&str; 9] = [
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

/// What the numbers of the cells `first` and `packet` are; other cells have one figure, by their own name.
const FIRST: [&str; 3] = ["first opened", "first dialled", "first warm"];
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
