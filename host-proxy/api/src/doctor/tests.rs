use serde_json::json;

use super::*;
use crate::{Holding, LastDial, Refused};

fn well() -> Vm {
    let json = json!({
        "name": "web-1", "cid": 3, "state": "ready", "agent": "0.1.0", "kernel": "6", "enrolled_as": null, "last_seen_ms": 0,
        "epoch": 7, "streams": 0, "queued": 0, "allow": [80], "allow_vsock": [], "port_pid": 7,
        "vhost_socket": "/run/adit/vm/web-1/vhost.sock", "fault": null, "vmm": true, "clock_ahead_ms": -1500,
    });
    serde_json::from_value(json).unwrap()
}

fn with(change: impl FnOnce(&mut Vm)) -> Vec<Finding> {
    let mut vm = well();
    change(&mut vm);
    of_vm(&vm)
}

fn faulty(kind: &str) -> Vec<Finding> {
    with(|vm| {
        vm.fault = Some("what is wrong".into());
        vm.faults = vec![VmFault {
            kind: kind.into(),
            text: "what is wrong".into(),
        }];
    })
}

fn dialled(ms_ago: u64) -> Vec<Finding> {
    with(|vm| {
        vm.last_dial = Some(LastDial {
            ms_ago,
            to: "VM `web-1` port 80".into(),
            took_us: 5,
            refused: Some(Refused {
                code: "dial-failed".into(),
                text: "nobody".into(),
                remedy: "start it".into(),
            }),
        });
    })
}

fn names(found: &[Finding], health: Health) -> Vec<&str> {
    let of = found.iter().filter(|f| f.health == health);
    of.map(|f| f.check.as_str()).collect()
}

#[test]
fn each_fact_fails_its_own_check_with_a_remedy_and_no_other() {
    let cases: Vec<(Vec<Finding>, &[&str])> = vec![
        (with(|_| {}), &[]),
        (
            with(|vm| (vm.state, vm.port_pid, vm.vmm) = (VmState::Down, None, Some(false))),
            &["port process"],
        ),
        (faulty("port-process"), &["port process"]),
        (
            with(|vm| (vm.state, vm.vmm) = (VmState::Waiting, Some(false))),
            &["VMM"],
        ),
        (with(|vm| vm.state = VmState::PowerCycle), &["VMM"]),
        (faulty("transport"), &["device"]),
        (with(|vm| vm.state = VmState::Waiting), &["session"]),
        (with(|vm| vm.state = VmState::Up), &["agent"]),
        (faulty("carrier"), &["carrier"]),
        (
            with(|vm| {
                vm.lock = Some(VmLock {
                    reason: "a new kernel".into(),
                    by: "user:root".into(),
                    since: "2026-12-01T00:00:00Z".into(),
                });
            }),
            &["lock"],
        ),
        (faulty("agent"), &["agent program"]),
        (faulty("enrolment"), &["identity"]),
        (faulty("clone"), &["identity"]),
        (faulty("trust"), &["trust"]),
        (faulty("policy"), &["policy"]),
        (faulty("journal"), &["journal"]),
        (faulty("card"), &["card"]),
        (with(|vm| vm.clock_ahead_ms = Some(59_999)), &[]),
        (with(|vm| vm.clock_ahead_ms = Some(60_000)), &["clock"]),
        (with(|vm| vm.clock_ahead_ms = Some(i64::MIN)), &["clock"]),
        (
            with(|vm| vm.pending = vec!["busy_poll_us".into()]),
            &["services"],
        ),
        (with(|vm| vm.goal_keys = Some(0)), &[]),
        (dialled(1000), &["last dial"]),
        (dialled(DIAL_IS_NEWS_MS), &[]),
        // Of an aditd of the version before, and of a later one.
        (with(|vm| vm.fault = Some("x".into())), &["fault"]),
        (faulty("of-a-later-version"), &["of-a-later-version"]),
    ];
    for (found, wanted) in cases {
        assert_eq!(names(&found, Health::Failed), wanted, "{found:#?}");
        for finding in &found {
            let has_remedy = !finding.remedy.is_empty();
            assert_eq!(has_remedy, finding.health == Health::Failed, "{finding:?}");
            assert!(!finding.says.is_empty(), "{finding:?}");
        }
    }
}

#[test]
fn what_comes_after_a_failure_is_unknown_and_not_called_well() {
    let found = with(|vm| {
        (vm.state, vm.port_pid, vm.vmm) = (VmState::Down, None, None);
        (vm.agent, vm.kernel, vm.clock_ahead_ms) = (None, None, None);
    });
    assert_eq!(names(&found, Health::Failed), ["port process"]);
    assert_eq!(names(&found, Health::Ok), ["lock", "services", "last dial"]);
    // What was said before stays a failure, though nobody is there to say it again.
    let mut away = well();
    away.state = VmState::Waiting;
    away.faults = faults("card");
    let found = of_vm(&away);
    assert_eq!(names(&found, Health::Failed), ["session", "card"]);
}

fn faults(kind: &str) -> Vec<VmFault> {
    vec![VmFault {
        kind: kind.into(),
        text: "x".into(),
    }]
}

#[test]
fn the_host_is_well_if_it_runs_by_its_file() {
    let at = |change: fn(&mut ConfigStatus)| {
        let mut config = ConfigStatus::default();
        change(&mut config);
        of_host(&config)
    };
    assert_eq!(at(|_| {}).len(), 2);
    assert!(names(&at(|_| {}), Health::Failed).is_empty());
    let wrong: [fn(&mut ConfigStatus); 2] = [
        |config| config.error = Some("line 3".into()),
        |config| config.restart = vec!["run_dir".into()],
    ];
    for change in wrong {
        assert_eq!(names(&at(change), Health::Failed), ["configuration"]);
    }
    let found = at(|config| config.users_unknown = Some("the kernel has no tcp_diag".into()));
    assert_eq!(names(&found, Health::Failed), ["users"]);
    let users = found.last().unwrap();
    assert!(users.says.contains("no tcp_diag"), "{users:?}");
    assert!(users.remedy.contains("modprobe tcp_diag"), "{users:?}");
}

#[test]
fn a_held_task_is_said_with_the_clock() {
    let found = with(|vm| {
        vm.holding = Some(Holding {
            task_id: "ab".into(),
            valid_from: "2027-01-01T00:00:00Z".into(),
            guest_time: "2026-01-01T00:00:00Z".into(),
        });
    });
    let clock = found.iter().find(|f| f.check == "clock").unwrap();
    assert!(clock.says.contains("ab"), "{clock:?}");
}

#[test]
fn who_reaches_a_vm_is_said_and_that_nobody_does() {
    let grant = |to: &str, may: &[&str], expired| GrantShown {
        place: "a.toml:1".into(),
        to: vec![to.into()],
        vms: vec!["*".into()],
        may: may.iter().map(|may| (*may).to_owned()).collect(),
        until: None,
        expired,
        connections_per_s: None,
        bytes_per_s: None,
        weight: None,
    };
    let grants = [
        grant("group:ops", &["see", "reach:22,80"], false),
        grant("user:old", &["reach"], true),
        grant("token:x", &["see", "task"], false),
    ];
    assert_eq!(access(&grants).says, "group:ops may reach:22,80");
    let nobody = access(&grants[1..]);
    assert_eq!(nobody.health, Health::Ok);
    assert!(nobody.says.starts_with("nobody"), "{}", nobody.says);
}

#[test]
fn a_vm_of_the_hosts_kernel_that_is_not_there_says_how_it_is_started() {
    let found = with(|vm| {
        (vm.state, vm.vmm) = (VmState::Waiting, Some(false));
        vm.carrier.kernel_cid = Some(42);
        vm.faults = faults("transport");
    });
    assert_eq!(names(&found, Health::Failed), ["VMM"]);
    let vmm = found.iter().find(|f| f.check == "VMM").unwrap();
    assert_eq!(vmm.says, "x");
    assert!(vmm.remedy.contains("guest-cid=42") && vmm.remedy.contains("modprobe vhost_vsock"));
    // It is there, and what the guest dials is not heard.
    let found = with(|vm| {
        vm.carrier.kernel_cid = Some(42);
        vm.faults = faults("transport");
    });
    assert_eq!(names(&found, Health::Failed), ["device"]);
}

#[test]
fn what_is_said_of_an_agent_is_never_more_than_what_its_vm_shows() {
    for (state, says) in [
        (VmState::Waiting, "no VMM is connected"),
        (VmState::Down, "no port process"),
        (VmState::Up, "the guest's driver runs"),
    ] {
        let found = with(|vm| {
            (vm.state, vm.agent, vm.last_seen_ms) = (state, None, None);
        });
        let agent = found.iter().find(|f| f.check == "agent").unwrap();
        assert!(agent.says.contains(says), "{state:?}: {agent:?}");
    }
}

#[test]
fn the_doctor_sends_nobody_to_the_doctor() {
    let found = with(|vm| {
        vm.last_dial = Some(LastDial {
            to: "VM `a` port 80".into(),
            ms_ago: 1,
            took_us: 1,
            refused: Some(Refused {
                code: "no-session".into(),
                text: "x".into(),
                remedy: "try again; `adit doctor` with its name says what is missing".into(),
            }),
        });
    });
    let dial = found.iter().find(|f| f.check == "last dial").unwrap();
    assert!(
        dial.health == Health::Failed && !dial.remedy.contains("doctor"),
        "{dial:?}"
    );
}
