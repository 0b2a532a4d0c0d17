//! Target `grants`: an operator's words and a caller's names. What is taken has one spelling; and what is decided is what a second
//! reader finds: some grant in time has one of the caller's names, the VM and the verb, and the VM's lists have the port.
//!
//! Input: lines. `s` a subject of the caller, `t` one that is granted to, `v` VMs, `m` what may be done, `n` the VM's name, `u` an
//! end of time; `.` ends a grant.

use std::collections::BTreeMap;

use adit_host_proxy::access::{Access, Caller, Grant, Grants, May, Subject, Verb, VmView};
use adit_port::control::Target;
use adit_tasks::vms::Vms;

/// The time of all decisions.
const NOW_MS: i64 = 1000;

fn empty(place: usize) -> Grant {
    Grant {
        to: vec![],
        vms: vec![],
        may: vec![],
        until_ms: None,
        connections_per_s: None,
        bytes_per_s: None,
        weight: 1,
        place: place.to_string(),
    }
}

/// Parses a text, which then has one spelling.
fn taken<T: std::str::FromStr + ToString + PartialEq + std::fmt::Debug>(text: &str) -> Option<T> {
    let taken: T = text.parse().ok()?;
    assert!(text.is_ascii() && !text.contains(char::is_control));
    assert_eq!(taken.to_string().parse::<T>().ok().as_ref(), Some(&taken));
    Some(taken)
}

pub fn run(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let (mut grants, mut grant) = (Vec::new(), empty(0));
    let (mut names, mut name) = (Vec::<Subject>::new(), "web-1");
    for (nth, line) in text.lines().enumerate() {
        let mut rest = line.chars();
        match (rest.next(), rest.as_str()) {
            (Some('s'), rest) => names.extend(taken(rest)),
            (Some('t'), rest) => grant.to.extend(taken(rest)),
            (Some('v'), rest) => grant.vms.extend(taken(rest)),
            (Some('m'), rest) => grant.may.extend(taken(rest)),
            (Some('n'), rest) => name = rest,
            (Some('u'), rest) => grant.until_ms = rest.parse().ok(),
            (Some('.'), _) => grants.push(std::mem::replace(&mut grant, empty(nth))),
            _ => {}
        }
    }
    grants.push(grant);
    let caller = Caller::anonymous("x").with(names);
    let labels = BTreeMap::from([("env".to_owned(), "prod".to_owned())]);
    let card = BTreeMap::from([
        ("env".to_owned(), "test".to_owned()),
        ("tier".to_owned(), "db".to_owned()),
    ]);
    let vm = VmView {
        name,
        allow: &[80],
        allow_vsock: &[5000],
        allow_services: &[],
        labels: &labels,
        card: Some(&card),
    };
    let (listed, unlisted) = (
        Target::Service("tcp:80".parse().expect("a name")),
        Target::VsockPort(7),
    );
    let verbs = [
        (Verb::Reach(&listed), true),
        (Verb::Reach(&unlisted), false),
        (Verb::See, true),
        (Verb::Task, true),
        (Verb::Goal, true),
        (Verb::Manage, true),
    ];
    let all = Grants::new(grants.clone());
    for (verb, is_listed) in verbs {
        let has = |grant: &Grant| {
            grant.to.iter().any(|to| caller.subjects().contains(to))
                && grant.vms.iter().any(|vms| is_about(vms, name))
                && grant.may.iter().any(|may: &May| may.covers(verb, false))
                && grant.until_ms.is_none_or(|until| NOW_MS < until)
        };
        match all.decide(&caller, verb, vm, NOW_MS) {
            Access::Allow(by) => {
                assert!(is_listed && has(by.expect("it is not the owner's")));
            }
            Access::Deny(denial) => {
                assert!(!is_listed || !grants.iter().any(has));
                let sees = |grant: &Grant| {
                    grant.may.contains(&May::See)
                        && grant.to.iter().any(|to| caller.subjects().contains(to))
                        && grant.vms.iter().any(|vms| is_about(vms, name))
                        && grant.until_ms.is_none_or(|until| NOW_MS < until)
                };
                assert_eq!(denial.is_hidden, !grants.iter().any(sees));
            }
        }
        assert_eq!(
            all.decide(&Caller::owner(), verb, vm, NOW_MS) == Access::Allow(None),
            is_listed
        );
    }
}

/// The same in other words.
fn is_about(vms: &Vms, name: &str) -> bool {
    match vms {
        Vms::Named(whole, None) => whole == name,
        Vms::Named(begin, Some(end)) => name
            .strip_prefix(begin.as_str())
            .is_some_and(|rest| rest.ends_with(end.as_str())),
        Vms::Labelled(key, value) => {
            let has = match key.as_str() {
                "env" => Some("prod"),
                "tier" => Some("db"),
                _ => None,
            };
            has == Some(value)
        }
    }
}
