//! Computes the figures from the cells, with their goals.

use adit_benches::report::{Better, Figure, median};

use crate::{PEERS, Rounds};

/// Every figure, in the order of the table.
pub fn all(all: &Rounds) -> Vec<Figure> {
    let mut figures = small(all);
    for size in [1024, 4096, 16_384, 65_536] {
        figures.extend(bulk(all, size));
    }
    let batches = rate(all, "ours, 32 at a time", 1024);
    let stream = rate(all, "cross-core stream", 1024);
    figures.push(
        Figure::alone("1 KiB, batches of 32", "GB/s", Better::Higher, &batches).beside(
            "cross-core stream",
            &stream,
            0.93,
            1.0,
        ),
    );
    figures.extend(round_trips(all));
    figures.extend(asleep(all));
    figures.extend(more(all));
    figures.retain(|figure| figure.rounds > 0);
    figures
}

/// The best of several contenders.
fn best<'a>(all: &'a Rounds, names: &[&'static str], size: usize) -> (&'static str, &'a [f64]) {
    let all = names.iter().map(|&name| (name, all.of(name, size)));
    all.max_by(|a, b| median(a.1).total_cmp(&median(b.1)))
        .unwrap_or(("none", &[]))
}

fn small(all: &Rounds) -> Vec<Figure> {
    let alone = |to: &str| {
        let name = format!("64 B, each published alone, beside {to}");
        Figure::alone(name, "msgs/s", Better::Higher, all.of("ours", 64))
    };
    let modes = ["rtrb", "rtrb, elements", "rtrb, 32 at a time"];
    let (rtrb, rtrb_rounds) = best(all, &modes, 64);
    let batch = |name: &'static str| {
        Figure::alone(
            "64 B, batches of 32",
            "msgs/s",
            Better::Higher,
            all.of(name, 64),
        )
    };
    let mut figures = vec![alone("rtrb's best").beside(rtrb, rtrb_rounds, 1.2, 1.5)];
    if !all.of("iceoryx2", 64).is_empty() {
        figures.push(alone("iceoryx2").beside("iceoryx2", all.of("iceoryx2", 64), 40.0, 40.0));
    }
    let unix = all.of("Unix stream", 64);
    figures.push(alone("a socket").beside("Unix stream", unix, 60.0, 60.0));
    figures.push(batch("ours, 32 at a time").beside(rtrb, rtrb_rounds, 1.25, 1.65));
    let published = all.of("published index", 64);
    let modes = [&modes[..], &["rtrb, 32 at a time, drained"]].concat();
    let (rtrb, rtrb_rounds) = best(all, &modes, 64);
    // A receiver that takes up to 32 in one call, as rtrb's does here.
    let drained = |what: &str, of, to: &str| {
        let name = format!("64 B, {what}, drained, beside {to}");
        Figure::alone(name, "msgs/s", Better::Higher, all.of(of, 64))
    };
    let alone_drained = |to| drained("each published alone", "ours, drained", to);
    figures.push(alone_drained("rtrb's best").beside(rtrb, rtrb_rounds, 1.0, 1.25));
    figures.push(alone_drained("published index").beside("published index", published, 2.5, 2.5));
    let batches = drained(
        "batches of 32",
        "ours, 32 at a time, drained",
        "rtrb's best",
    );
    figures.push(batches.beside(rtrb, rtrb_rounds, 1.25, 1.65));
    figures.push(
        Figure::alone(
            "64 B without the checks",
            "msgs/s",
            Better::Lower,
            all.of("ours, unchecked", 64),
        )
        .beside("ours", all.of("ours", 64), 1.05, 1.02),
    );
    let spike = [
        (
            "ours",
            "published index",
            "layout: 64 B, each published alone",
        ),
        (
            "ours, 32 at a time",
            "published index, 32 at a time",
            "layout: 64 B, batches of 32",
        ),
        (
            "ours, 32 at a time, drained",
            "published index, 32 at a time, drained",
            "layout: 64 B, batches of 32, drained",
        ),
    ];
    figures.extend(spike.map(|(ours, other, name)| {
        Figure::alone(name, "msgs/s", Better::Higher, all.of(ours, 64)).beside(
            "published index",
            all.of(other, 64),
            1.0,
            1.0,
        )
    }));
    figures
}

/// GB per second.
fn rate(all: &Rounds, name: &str, size: usize) -> Vec<f64> {
    let scale = size as f64 / 1e9;
    all.of(name, size).iter().map(|n| n * scale).collect()
}

fn bulk(all: &Rounds, size: usize) -> Vec<Figure> {
    let mut peers = vec!["rtrb", "pipe", "Unix stream", "seqpacket"];
    peers.extend(PEERS);
    let (peer, _) = best(all, &peers, size);
    let kib = size / 1024;
    let must = if size == 1024 { 0.93 } else { 0.95 };
    let ours = |name: String| Figure::alone(name, "GB/s", Better::Higher, &rate(all, "ours", size));
    let stream = "cross-core stream";
    vec![
        ours(format!("{kib} KiB")).beside(stream, &rate(all, stream, size), must, 1.0),
        ours(format!("{kib} KiB, and the best peer")).beside(
            peer,
            &rate(all, peer, size),
            0.97,
            1.05,
        ),
    ]
}

fn round_trips(all: &Rounds) -> Vec<Figure> {
    let ours = |size: usize| {
        let rounds = all.of("RTT ours", size);
        Figure::alone(format!("RTT {size} B p50"), "ns", Better::Lower, rounds)
    };
    let flags = |name| all.of(name, 64);
    vec![
        ours(64).beside("flag and payload", flags("payload"), 1.2, 1.08),
        ours(64).beside("rtrb", all.of("RTT rtrb, elements", 64), 1.0, 1.0),
        ours(64).beside(
            "published index",
            all.of("RTT published index", 64),
            1.0,
            1.0,
        ),
        ours(48).beside("a line each way", flags("two lines"), 1.3, 1.15),
        Figure::alone(
            "RTT 64 B p99/p50",
            "x",
            Better::Lower,
            all.of("RTT tail", 64),
        )
        .goal(2.0, 1.6),
        Figure::alone(
            "limit: one line there and back",
            "ns",
            Better::Lower,
            flags("one line"),
        ),
    ]
}

fn asleep(all: &Rounds) -> Vec<Figure> {
    let lower = |name: &str, unit, rounds| Figure::alone(name, unit, Better::Lower, rounds);
    vec![
        lower(
            "RTT 64 B, polls for 50 us, then sleeps",
            "ns",
            all.of("RTT ours, lines, sleeping", 64),
        )
        .beside("own busy-poll", all.of("RTT ours", 64), 1.1, 1.0),
        lower(
            "its share of a processor at 1,000 messages/s",
            "%",
            all.of("rate", 64),
        )
        .goal(10.0, 10.0),
        lower(
            "RTT 64 B, sleeps at once",
            "ns",
            all.of("RTT ours, at once asleep", 64),
        )
        .beside("raw eventfds", all.of("eventfds", 64), 1.08, 1.03),
        Figure::alone(
            "64 KiB over 256 KiB, polls, then sleeps",
            "GB/s",
            Better::Higher,
            &rate(all, "ours, small, sleeping", 65_536),
        )
        .beside(
            "own busy-poll",
            &rate(all, "ours, small", 65_536),
            0.95,
            1.0,
        ),
        lower("doorbells per message of 64 B", "", all.of("doorbells", 64)).goal(0.001, 0.0001),
    ]
}

fn more(all: &Rounds) -> Vec<Figure> {
    let mut figures: Vec<Figure> = [4096, 65_536]
        .map(|size| {
            let name = format!("{} KiB both ways at once, sum", size / 1024);
            Figure::alone(name, "GB/s", Better::Higher, &rate(all, "duplex", size)).beside(
                "one way",
                &rate(all, "ours", size),
                0.8,
                1.0,
            )
        })
        .into();
    let full = all.of("lanes full", 64);
    figures.push(
        Figure::alone("echo on lane 0, lane 1 full", "ns", Better::Lower, full).beside(
            "lane 1 idle",
            all.of("lanes idle", 64),
            1.5,
            1.1,
        ),
    );
    figures
}
