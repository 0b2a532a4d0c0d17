//! What is looked up for every request, in this process.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::hint::black_box;
use std::path::Path;
use std::time::Instant;

use adit_benches::report::{Better, Figure};
use adit_host_proxy::access::caller::Person;
use adit_host_proxy::access::{Access, Caller, Grants, Verb, VmView};
use adit_host_proxy::config::Config;
use adit_names::{ServiceName, VmId};
use adit_port::control::Target;
use adit_reach::map::VmMap;
use adit_reach::resolve::Place;
use adit_reach::rows;
use anyhow::{Context, ensure};

use crate::Options;

const GRANTS: usize = 1000;
const CALLS: usize = 20_000;
const VMS: usize = 100_000;
const HOSTS: usize = 100;

/// Decisions with many grants.
pub fn figures(options: &Options) -> anyhow::Result<Vec<Figure>> {
    let mut out = Vec::new();
    // A host of many people, each with grants of their own; and the worst: all are one group's.
    for (title, to) in [
        ("access decision, 1,000 grants to 1,000 users", "user"),
        (
            "access decision, 1,000 grants to the caller's group",
            "group",
        ),
    ] {
        let grants = grants(to)?;
        let mut took = Vec::new();
        for _ in 0..options.rounds {
            took.push(decide(&grants)?);
        }
        let figure = Figure::alone(title, "us", Better::Lower, &took);
        out.push(figure.goal(2.0, 0.5));
    }
    let (mut looks, mut kept, mut reloads) = (Vec::new(), Vec::new(), Vec::new());
    let text: String = (0..VMS)
        .map(|n| format!("web-{n} host-{}\n", n % HOSTS))
        .collect();
    for _ in 0..options.rounds {
        let (look, bytes, reload) = mapped(&text)?;
        looks.push(look);
        // What one map has given back the next one has without asking the kernel.
        if kept.is_empty() {
            kept.push(bytes);
        }
        reloads.push(reload);
    }
    for (title, unit, figures, must) in [
        ("map of 100,000 VMs: lookup", "us", looks, 1.0),
        ("map of 100,000 VMs: memory of each", "B", kept, 400.0),
        ("map of 100,000 VMs: read anew", "s", reloads, 2.0),
    ] {
        let figure = Figure::alone(title, unit, Better::Lower, &figures);
        out.push(figure.goal(must, must));
    }
    Ok(out)
}

/// Microseconds of a lookup, bytes of a VM, and seconds until the file of a map is read.
fn mapped(text: &str) -> anyhow::Result<(f64, f64, f64)> {
    let name = |text: &str| -> anyhow::Result<VmId> { Ok(text.parse()?) };
    let before = resident()?;
    let begin = Instant::now();
    let mut map = VmMap::default();
    let hosts = (0..HOSTS).map(|n| name(&format!("host-{n}")));
    map.set_hosts(hosts.collect::<anyhow::Result<_>>()?);
    map.set_rows(rows::parse(text, |_, _| Ok(()))?);
    let reload = begin.elapsed().as_secs_f64();
    let kept = resident()?.saturating_sub(before);
    let asked: Vec<VmId> = (0..CALLS)
        .map(|n| name(&format!("web-{}", n * 7919 % VMS)))
        .collect::<anyhow::Result<_>>()?;
    let begin = Instant::now();
    for vm in &asked {
        let found = map.look(black_box(vm), None, None, 0);
        ensure!(matches!(found.place, Some(Place::At(_))), "it has a row");
    }
    let look = begin.elapsed().as_secs_f64() * 1e6 / CALLS as f64;
    Ok((look, kept as f64 / VMS as f64, reload))
}

/// Bytes of this process that are in memory.
fn resident() -> anyhow::Result<usize> {
    let statm = std::fs::read_to_string("/proc/self/statm")?;
    let pages = statm.split_whitespace().nth(1).context("statm")?;
    Ok(pages.parse::<usize>()? * 4096)
}

fn grants(to: &str) -> anyhow::Result<Grants> {
    let mut text = String::new();
    for n in 0..GRANTS {
        let who = match to {
            "user" => format!("user:u{n}"),
            _ => "group:ops".to_owned(),
        };
        write!(
            text,
            "[[grant]]\nto = [\"{who}\"]\nvms = [\"web-{n}\", \"label:team=t{n}\"]\nmay = [\"reach:22,80\"]\n"
        )?;
    }
    Ok(Config::parse(Path::new("bench.toml"), &text)?.grants())
}

/// Microseconds of one decision that ends well, by the last grant.
fn decide(grants: &Grants) -> anyhow::Result<f64> {
    let last = GRANTS - 1;
    let caller = Caller::anonymous("127.0.0.1:1").with_person(&Person {
        uid: 1000,
        name: Some(format!("u{last}")),
        groups: (0..16)
            .map(|n| format!("g{n}"))
            .chain(["ops".into()])
            .collect(),
    });
    let labels: BTreeMap<String, String> = [("env", "prod"), ("tier", "web")]
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .into();
    let name = format!("web-{last}");
    let vm = VmView {
        name: &name,
        allow: &[22, 80],
        allow_vsock: &[],
        allow_services: &[],
        labels: &labels,
        card: None,
    };
    let target = Target::Service(ServiceName::tcp(80));
    let begin = Instant::now();
    for now in 0..CALLS {
        let decided = grants.decide(black_box(&caller), Verb::Reach(&target), vm, now as i64);
        ensure!(matches!(decided, Access::Allow(Some(_))), "it is granted");
    }
    Ok(begin.elapsed().as_secs_f64() * 1e6 / CALLS as f64)
}
