use adit_names::ServiceName;
use proptest::prelude::*;
use proptest::sample::{select, subsequence};

use super::super::caller::Person;
use super::*;

const NOW: i64 = 1000;

fn grant(to: &[&str], vms: &[&str], may: &[&str], until_ms: Option<i64>) -> Grant {
    Grant {
        to: to.iter().map(|s| s.parse().unwrap()).collect(),
        vms: vms.iter().map(|s| s.parse().unwrap()).collect(),
        may: may.iter().map(|s| s.parse().unwrap()).collect(),
        until_ms,
        connections_per_s: None,
        bytes_per_s: None,
        weight: 1,
        place: "a.toml:1".into(),
    }
}

fn tcp(port: u16) -> Target {
    Target::Service(ServiceName::tcp(port))
}

fn user(name: &str, groups: &[&str]) -> Caller {
    Caller::anonymous("x").with_person(&Person {
        uid: 1000,
        name: Some(name.into()),
        groups: groups.iter().map(|g| (*g).into()).collect(),
    })
}

struct Vm {
    name: &'static str,
    allow: Vec<u16>,
    labels: BTreeMap<String, String>,
    card: BTreeMap<String, String>,
}

impl Vm {
    fn new(name: &'static str, allow: &[u16]) -> Self {
        Self {
            name,
            allow: allow.into(),
            labels: BTreeMap::new(),
            card: BTreeMap::new(),
        }
    }

    fn view(&self) -> VmView<'_> {
        VmView {
            name: self.name,
            allow: &self.allow,
            allow_vsock: &[5000],
            allow_services: &[],
            labels: &self.labels,
            card: Some(&self.card),
        }
    }
}

fn may(grants: &Grants, caller: &Caller, verb: Verb<'_>, vm: &Vm) -> bool {
    matches!(
        grants.decide(caller, verb, vm.view(), NOW),
        Access::Allow(_)
    )
}

#[test]
fn without_a_grant_nobody_but_the_owner_may_anything() {
    let (none, vm) = (Grants::default(), Vm::new("web-1", &[80]));
    let target = tcp(80);
    for verb in [
        Verb::Reach(&target),
        Verb::See,
        Verb::Task,
        Verb::Goal,
        Verb::Manage,
    ] {
        for caller in [
            Caller::anonymous("x"),
            user("root", &["root"]),
            user("a", &[]).with_token("t"),
        ] {
            let denied = none.decide(&caller, verb, vm.view(), NOW);
            let Access::Deny(denial) = denied else {
                panic!("{caller} {verb:?}")
            };
            assert_eq!(
                (denial.reason, denial.is_hidden),
                (Reason::NotGranted, true)
            );
        }
        assert!(may(&none, &Caller::owner(), verb, &vm));
    }
}

#[test]
fn a_label_that_is_not_known_might_give_what_a_grant_says_and_no_more() {
    let grants = Grants::new(vec![
        grant(&["user:a"], &["label:env=prod"], &["reach:80"], None),
        grant(&["user:b"], &["label:env=prod"], &["reach"], Some(NOW)),
        grant(&["user:c"], &["web-*"], &["reach"], None),
    ]);
    let mut vm = Vm::new("web-1", &[80]);
    let might = |who: &str, port: u16, vm: &Vm| {
        grants.by_some_label(&user(who, &[]), Verb::Reach(&tcp(port)), vm.view(), NOW)
    };
    assert!(grants.has_labels() && might("a", 80, &vm));
    assert!(!might("a", 81, &vm) && !might("b", 80, &vm) && !might("c", 80, &vm));
    // What the configuration says comes before a card.
    vm.labels.insert("env".into(), "test".into());
    assert!(!might("a", 80, &vm));
    assert!(!Grants::default().has_labels());
}

#[test]
fn forward_is_for_listeners_that_lead_to_one_place_and_keeps_to_the_vms_lists() {
    let grants = Grants::new(vec![grant(&["anyone"], &["web-1"], &["forward"], None)]);
    let (web, nobody) = (Vm::new("web-1", &[22]), Caller::anonymous("x"));
    assert!(may(&grants, &nobody.led(), Verb::Reach(&tcp(22)), &web));
    assert!(!may(&grants, &nobody.led(), Verb::Reach(&tcp(80)), &web));
    assert!(!may(&grants, &nobody, Verb::Reach(&tcp(22)), &web));
    let db = Vm::new("db-1", &[22]);
    assert!(!may(&grants, &nobody.led(), Verb::Reach(&tcp(22)), &db));
    // By way of another host it is that one's listener, and not ours.
    let via = nobody.led().by_way_of(&"beta".parse().unwrap(), vec![]);
    assert!(!may(&grants, &via, Verb::Reach(&tcp(22)), &web));
    for verb in [Verb::See, Verb::Task, Verb::Goal, Verb::Manage] {
        assert!(!may(&grants, &nobody.led(), verb, &web));
    }
}

#[test]
fn r125_every_part_of_a_grant_must_fit_and_no_verb_implies_another() {
    let grants = Grants::new(vec![
        grant(&["user:deploy"], &["web-*"], &["reach:80"], None),
        grant(&["group:ops"], &["label:env=prod"], &["see", "goal"], None),
        grant(&["token:prom"], &["*"], &["reach:9100"], Some(NOW)),
    ]);
    let web = Vm::new("web-1", &[80, 22, 9100]);
    let db = Vm::new("db-1", &[80]);
    let deploy = user("deploy", &[]);
    assert!(may(&grants, &deploy, Verb::Reach(&tcp(80)), &web));
    assert!(!may(&grants, &deploy, Verb::Reach(&tcp(22)), &web));
    assert!(!may(&grants, &deploy, Verb::Reach(&tcp(80)), &db));
    assert!(!may(&grants, &deploy, Verb::See, &web));
    for other in ["Deploy", "deploy2", "deplo"] {
        assert!(!may(
            &grants,
            &user(other, &[]),
            Verb::Reach(&tcp(80)),
            &web
        ));
    }
    // A group or a token of the same name is somebody else.
    assert!(!may(
        &grants,
        &user("x", &["deploy"]).with_token("deploy"),
        Verb::Reach(&tcp(80)),
        &web
    ));
    let ops = user("x", &["ops"]);
    let mut prod = Vm::new("db-1", &[80]);
    assert!(!may(&grants, &ops, Verb::Goal, &prod));
    prod.card.insert("env".into(), "prod".into());
    assert!(may(&grants, &ops, Verb::Goal, &prod));
    assert!(!may(&grants, &ops, Verb::Task, &prod) && !may(&grants, &ops, Verb::Manage, &prod));
    // What the configuration says of a label is the last word.
    prod.labels.insert("env".into(), "test".into());
    assert!(!may(&grants, &ops, Verb::Goal, &prod));
    let expired = grants.decide(
        &user("x", &[]).with_token("prom"),
        Verb::Reach(&tcp(9100)),
        web.view(),
        NOW,
    );
    let place = "a.toml:1".to_owned();
    assert_eq!(
        expired,
        Access::Deny(Denial {
            reason: Reason::Expired { place },
            is_hidden: true
        })
    );
}

#[test]
fn a_vms_own_lists_hold_for_everybody_and_each_for_its_kind_of_port() {
    let grants = Grants::new(vec![grant(&["anyone"], &["*"], &["reach", "see"], None)]);
    let vm = Vm::new("a", &[80]);
    for (caller, verb) in [
        (Caller::owner(), "owner"),
        (Caller::anonymous("x"), "anyone"),
    ] {
        let reason =
            |target: &Target| match grants.decide(&caller, Verb::Reach(target), vm.view(), NOW) {
                Access::Deny(denial) => {
                    assert!(!denial.is_hidden);
                    Some(denial.reason)
                }
                Access::Allow(_) => None,
            };
        assert_eq!(reason(&tcp(80)), None, "{verb}");
        assert_eq!(reason(&Target::VsockPort(5000)), None);
        let not = |port, list| Some(Reason::NotListed { port, list });
        assert_eq!(reason(&tcp(5000)), not(5000, "allow"));
        assert_eq!(reason(&Target::VsockPort(80)), not(80, "allow_vsock"));
        assert_eq!(
            reason(&Target::VsockPort(u32::MAX)),
            not(u32::MAX, "allow_vsock")
        );
        let docker = Target::Service(ServiceName::named("docker").unwrap());
        let not_named = Reason::NotNamed {
            service: "docker".into(),
        };
        assert_eq!(reason(&docker), Some(not_named));
        let service = "ping".to_owned();
        assert_eq!(
            reason(&Target::Service("ping".parse().unwrap())),
            Some(Reason::NoRule { service })
        );
        for owners in OWNERS {
            let target = Target::Service(owners.parse().unwrap());
            assert_eq!(reason(&target).is_none(), caller.is_owner());
        }
    }
}

const TO: [&str; 5] = ["user:a", "user:b", "group:g", "token:t", "anyone"];
const VMS: [&str; 5] = ["web-1", "web-*", "*", "db-1", "label:env=prod"];
const MAY: [&str; 6] = ["reach", "reach:80", "reach:80-90", "see", "goal", "task"];

fn some_grant() -> impl Strategy<Value = Grant> {
    let (to, vms) = (subsequence(&TO[..], 1..3), subsequence(&VMS[..], 1..3));
    let until = select(&[None, Some(NOW - 1), Some(NOW + 1)][..]);
    (to, vms, subsequence(&MAY[..], 1..3), until)
        .prop_map(|(to, vms, may, until)| grant(&to, &vms, &may, until))
}

proptest! {
    /// The index finds what a reading of every grant finds.
    #[test]
    fn a_grant_is_found_if_and_only_if_one_fits(
        grants in proptest::collection::vec(some_grant(), 0..24),
        name in select(&["web-1", "web-2", "db-1"][..]),
        port in select(&[22_u16, 80, 85][..]),
        (is_user, is_token, in_group, prod) in any::<(bool, bool, bool, bool)>(),
    ) {
        let mut caller = Caller::anonymous("x");
        if is_user {
            caller = user("a", if in_group { &["g"] } else { &[] });
        }
        if is_token {
            caller = caller.with_token("t");
        }
        let mut vm = Vm::new(name, &[22, 80]);
        if prod {
            vm.card.insert("env".into(), "prod".into());
        }
        let target = tcp(port);
        let fits = |verb: Verb<'_>| grants.iter().any(|grant| {
            let to = grant.to.iter().any(|to| caller.subjects().contains(to));
            let vms = grant.vms.iter().any(|vms| vms.has(name, |key| (prod && key == "env").then_some("prod")));
            to && vms && grant.may.iter().any(|may| may.covers(verb, caller.is_led())) && grant.until_ms.is_none_or(|until| NOW < until)
        });
        let index = Grants::new(grants.clone());
        for verb in [Verb::Reach(&target), Verb::See, Verb::Goal, Verb::Task, Verb::Manage] {
            let listed = !matches!(verb, Verb::Reach(_)) || vm.allow.contains(&port);
            match index.decide(&caller, verb, vm.view(), NOW) {
                Access::Allow(by) => {
                    prop_assert!(by.is_some() && fits(verb) && listed);
                }
                Access::Deny(denial) => {
                    prop_assert!(!(fits(verb) && listed));
                    prop_assert_eq!(denial.is_hidden, !fits(Verb::See));
                }
            }
        }
    }
}
