//! The cells of a round, and the table of their results.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use adit_benches::report::{Better, Figure, median};
use adit_testkit::DriverConfig;

use crate::measure::{self, End};
use crate::process::{Backend, Kind};
use crate::{Options, crowd, tunnel};

const PEER: &str = "vhost-device-vsock";
const SIZES: [(usize, &str); 3] = [(65536, "64 KiB"), (4096, "4 KiB"), (64, "64 B")];
const SPACING: Duration = Duration::from_millis(5);

/// Which backend, and which end of its streams.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Who {
    Socket,
    Inline,
    SocketAsleep,
    InlineAsleep,
    Peer,
}

impl Who {
    const fn end(self) -> End {
        match self {
            Self::Inline | Self::InlineAsleep => End::Inline,
            Self::Socket | Self::SocketAsleep | Self::Peer => End::Socket,
        }
    }

    const fn kind(self) -> Kind {
        match self {
            Self::Peer => Kind::Peer,
            Self::Socket | Self::Inline => Kind::Ours,
            Self::SocketAsleep | Self::InlineAsleep => Kind::OursSleeping,
        }
    }

    const fn name(self) -> &'static str {
        match self {
            Self::Socket => "socket",
            Self::Inline => "in process",
            Self::SocketAsleep => "socket (no polling)",
            Self::InlineAsleep => "in process (no polling)",
            Self::Peer => PEER,
        }
    }
}

const OURS: [Who; 4] = [
    Who::Socket,
    Who::Inline,
    Who::SocketAsleep,
    Who::InlineAsleep,
];

#[derive(Default)]
struct Series {
    values: BTreeMap<(String, Who), Vec<f64>>,
    failures: BTreeMap<Who, u64>,
    notes: Vec<String>,
}

impl Series {
    fn push(&mut self, name: &str, who: Who, value: f64) {
        let key = (name.to_owned(), who);
        self.values.entry(key).or_default().push(value);
    }

    fn get(&self, name: &str, who: Who) -> &[f64] {
        let key = (name.to_owned(), who);
        self.values.get(&key).map_or(&[], Vec::as_slice)
    }

    fn failed(&mut self, name: &str, who: Who, e: &anyhow::Error) {
        *self.failures.entry(who).or_default() += 1;
        self.notes.push(format!("{name}, {who:?}: {e:#}"));
    }
}

/// Measures and prints everything.
pub fn run(options: &Options) -> anyhow::Result<()> {
    let mut series = Series::default();
    let begin = Instant::now();
    for _ in 0..options.rounds {
        round(options, &mut series)?;
    }
    let mut table = table(&series, options.peer.is_some());
    table.extend(harness());
    table.retain(|figure| figure.ours != 0.0 || options.wants(""));
    for figure in &table {
        figure.print(options.json);
    }
    let crowd = if options.wants("crowd") {
        crowd::figures(options)?
    } else {
        Vec::new()
    };
    for figure in crowd {
        figure.print(options.json);
    }
    if options.wants("tunnel") {
        for figure in tunnel::figures(options)? {
            figure.print(options.json);
        }
    }
    for note in &series.notes {
        eprintln!("failed: {note}");
    }
    eprintln!(
        "{} rounds in {:.0} s; peer: {}",
        options.rounds,
        begin.elapsed().as_secs_f64(),
        options
            .peer
            .as_ref()
            .map_or("none".into(), |p| p.display().to_string())
    );
    Ok(())
}

/// Runs one round. Each backend is started anew, and the backends take turns in each cell.
fn round(options: &Options, series: &mut Series) -> anyhow::Result<()> {
    let peer = options.peer.as_deref();
    let mut everyone = OURS.to_vec();
    let mut kinds = vec![Kind::Ours, Kind::OursSleeping];
    if peer.is_some() {
        everyone.push(Who::Peer);
        kinds.push(Kind::Peer);
    }
    let start = |kind| Backend::start(kind, peer, DriverConfig::LINUX_6_1);
    let mut backends = BTreeMap::new();
    for kind in kinds {
        backends.insert(kind, start(kind)?);
    }
    let mut cell = |series: &mut Series, name: &str, who: Who, run: Cell<'_>| {
        let Some(backend) = backends
            .get_mut(&who.kind())
            .filter(|_| options.wants(name))
        else {
            return anyhow::Ok(());
        };
        if let Err(e) = run(series, backend) {
            series.failed(name, who, &e);
            // A stream that hangs may have broken the backend.
            *backend = start(who.kind())?;
        }
        Ok(())
    };
    let sockets: Vec<Who> = everyone
        .iter()
        .copied()
        .filter(|w| w.end() == End::Socket)
        .collect();
    for &who in &sockets {
        cell(series, "checked", who, &mut |_, backend| {
            measure::checked_transfer(backend)
        })?;
    }
    for (size, label) in SIZES {
        for &who in &everyone {
            let (up, down) = (format!("{label} up"), format!("{label} down"));
            cell(series, &up, who, &mut |series, backend| {
                let (rate, cpu) = measure::upload(backend, who.end(), size)?;
                series.push(&up, who, rate);
                series.push(&format!("{up} cpu"), who, cpu);
                Ok(())
            })?;
            cell(series, &down, who, &mut |series, backend| {
                let (rate, cpu) = measure::download(backend, who.end(), size)?;
                series.push(&down, who, rate);
                series.push(&format!("{down} cpu"), who, cpu);
                Ok(())
            })?;
        }
    }
    for &who in &everyone {
        cell(series, "rtt", who, &mut |series, backend| {
            let times = measure::round_trips(backend, who.end(), 64)?;
            let p50 = median(&times);
            series.push("rtt", who, p50);
            series.push("rtt p99/p50", who, times[times.len() * 99 / 100] / p50);
            Ok(())
        })?;
    }
    for &who in &sockets {
        cell(series, "paced", who, &mut |series, backend| {
            let share = measure::paced(backend)?;
            series.push("paced", who, share);
            Ok(())
        })?;
    }
    for &who in &sockets {
        for (name, spacing, n) in [
            ("connections", Duration::ZERO, 200),
            ("spaced", SPACING, 20),
        ] {
            cell(series, name, who, &mut |series, backend| {
                let made = measure::connections(backend, spacing, n);
                series.push(name, who, made.rate());
                let failed = made.failed as f64 / (made.completed + made.failed) as f64;
                series.push(&format!("{name} failed"), who, 100.0 * failed);
                if made.failed > 0 && who == Who::Peer {
                    // Connections that the peer lost track of must not slow the next cell.
                    *backend = start(Kind::Peer)?;
                }
                Ok(())
            })?;
        }
    }
    Ok(())
}

type Cell<'a> = &'a mut dyn FnMut(&mut Series, &mut Backend) -> anyhow::Result<()>;

const MIB: f64 = 1024.0 * 1024.0;

fn table(series: &Series, peer: bool) -> Vec<Figure> {
    let mut out = Vec::new();
    for who in OURS {
        compared(series, peer, who, &mut out);
    }
    for who in OURS {
        let name = format!("RTT 64 B p99/p50, {}", who.name());
        let values = series.get("rtt p99/p50", who);
        out.push(Figure::alone(name, "x", Better::Lower, values).goal(3.0, 2.0));
    }
    for who in [Who::Socket, Who::SocketAsleep, Who::Peer] {
        for (key, words) in [("connections", "at once"), ("spaced", "5 ms apart")] {
            let name = format!("new connections that failed, {words}, {}", who.name());
            let values = series.get(&format!("{key} failed"), who);
            out.push(Figure::alone(name, "%", Better::Lower, values));
        }
    }
    for who in OURS.into_iter().chain([Who::Peer]) {
        let n = series.failures.get(&who).copied().unwrap_or(0);
        let name = format!("cells that failed, {}", who.name());
        out.push(Figure::alone(name, "", Better::Lower, &[n as f64]));
    }
    out
}

/// The rows of `who` that are compared with the peer.
fn compared(series: &Series, peer: bool, who: Who, out: &mut Vec<Figure>) {
    let end = who.name();
    let mut row = |name: String, key: &str, unit, scale: f64, better, goals: (f64, f64)| {
        let scaled = |who| -> Vec<f64> { series.get(key, who).iter().map(|v| v / scale).collect() };
        let figure = Figure::alone(name, unit, better, &scaled(who));
        out.push(match peer {
            true => figure.beside(PEER, &scaled(Who::Peer), goals.0, goals.1),
            false => figure,
        });
    };
    let socket = who.end() == End::Socket;
    let asleep = who.kind() == Kind::OursSleeping;
    let (bulk, small, rtt, fresh) = match (socket, asleep) {
        (true, false) => ((2.0, 4.0), (2.5, 5.0), (0.5, 0.3), (3.0, 10.0)),
        (true, true) => ((2.0, 4.0), (2.5, 5.0), (0.95, 0.7), (1.2, 2.0)),
        (false, _) => ((4.0, 8.0), (5.0, 10.0), (0.3, 0.1), (1.2, 2.0)),
    };
    for (_, label) in SIZES {
        for (way, words) in [
            ("up", format!("guest to {end}")),
            ("down", format!("{end} to guest")),
        ] {
            let key = format!("{label} {way}");
            let (unit, scale, goals) = match (label, way) {
                // The sender's system calls are a part of it.
                ("64 B", "down") if socket => ("kmsg/s", 64_000.0, (1.2, 2.5)),
                ("64 B", _) => ("kmsg/s", 64_000.0, small),
                ("4 KiB", _) if socket && asleep => ("MiB/s", MIB, (1.2, 2.0)),
                _ => ("MiB/s", MIB, bulk),
            };
            let name = format!("{label} {words}");
            row(name, &key, unit, scale, Better::Higher, goals);
        }
    }
    let name = format!("RTT 64 B p50, {end}");
    row(name, "rtt", "us", 1000.0, Better::Lower, rtt);
    if !socket {
        return;
    }
    for (key, words) in [("64 KiB up cpu", "from"), ("64 KiB down cpu", "to")] {
        let name = format!("backend's CPU a KiB, 64 KiB {words} guest, {end}");
        row(name, key, "ns", 1.0 / 1024.0, Better::Lower, (0.7, 0.4));
    }
    for (key, words) in [("connections", "at once"), ("spaced", "5 ms apart")] {
        let name = format!("echoes on new connections, {words}, {end}");
        row(name, key, "1/s", 1.0, Better::Higher, fresh);
    }
    let name = format!("core used by 1,000 packets a second, {end}");
    row(name, "paced", "%", 1.0, Better::Lower, (1.0, 0.7));
}

/// The cost of the harness's own thread in a cell: only the host program's socket. And what no backend can be faster than.
fn harness() -> Vec<Figure> {
    let (mut rates, mut limits) = (Vec::new(), Vec::new());
    for _ in 0..5 {
        rates.push(measure::socket_alone().unwrap_or(0.0) / MIB);
        limits.push(measure::pieces_alone(64).unwrap_or(0.0) / 64.0 / 1000.0);
    }
    [
        (
            "harness: 64 KiB through a Unix socket, one thread",
            "MiB/s",
            rates,
        ),
        (
            "limit: 64 B through a Unix socket, two threads",
            "kmsg/s",
            limits,
        ),
    ]
    .map(|(name, unit, rates)| Figure::alone(name, unit, Better::Higher, &rates))
    .into()
}
