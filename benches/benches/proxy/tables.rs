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
use adit_names::ServiceName;
use adit_port::control::Target;
use anyhow::ensure;

use crate::Options;

const GRANTS: usize = 1000;
const CALLS: usize = 20_000;

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
    Ok(out)
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
