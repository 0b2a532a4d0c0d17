//! Every fault of a VM is in its JSON, in the metrics and once in the log.

use std::io::{Read, Write};

use adit_port::control::{Status, Stuck};
use adit_port::control_io::Message;
use adit_tasks::wire::{Facts, WireKind};

use crate::host::Host;

fn metric(kind: &str) -> String {
    format!("adit_vm_fault{{vm=\"a\",kind=\"{kind}\"}} 1")
}

fn metrics(host: &Host) -> String {
    host.api("GET", "/metrics", "").body
}

fn fault(host: &Host) -> Option<String> {
    host.get("/v1/vms/a")["fault"].as_str().map(str::to_owned)
}

/// Lines of the log that say such a fault.
fn logged(host: &Host, kind: &str) -> usize {
    let log = host.log();
    let of_kind = |l: &&str| l.contains("has a fault") && l.contains(&format!("kind=\"{kind}\""));
    log.lines().filter(of_kind).count()
}

#[test]
fn an_image_of_another_vm_is_a_fault_in_json_metrics_and_log() {
    let (host, ports) = Host::serving(&[("a", 3)], "");
    let control = ports[0].connected();
    let mut agent = control.agent();
    host.until("the agent is there", |h| {
        (h.get("/v1/vms/a")["state"] == "ready").then_some(())
    });
    assert_eq!(fault(&host), None);
    assert!(!metrics(&host).contains("adit_vm_fault{"));
    let facts = Facts {
        agent_version: "1".into(),
        kernel: "6".into(),
        os: "x".into(),
        vm_id: "gold-image".into(),
        anchors: 1,
        boot_nonce: [1; 16],
    };
    // Twice: it is logged once.
    agent.say(WireKind::Facts, 0, &facts);
    agent.say(WireKind::Facts, 0, &facts);
    let said = host.until("it is shown", fault);
    assert!(said.contains("`gold-image`"), "{said}");
    assert!(
        metrics(&host).contains(&metric("enrolment")),
        "{}",
        metrics(&host)
    );
    assert_eq!(logged(&host, "enrolment"), 1);
    // The image is put right.
    let facts = Facts {
        vm_id: "a".into(),
        ..facts
    };
    agent.say(WireKind::Facts, 0, &facts);
    host.until("it is over", |h| fault(h).is_none().then_some(()));
    assert!(!metrics(&host).contains("adit_vm_fault{"));
    assert!(host.log().contains("the fault is over"));
}

#[test]
fn faults_of_the_channel_are_in_json_metrics_and_log_too() {
    let (host, ports) = Host::serving(&[("a", 3)], "");
    let control = ports[0].connected();
    let bad = Status {
        last_fault: "descriptor out of range".into(),
        ..ports[0].status(false)
    };
    control.say(&Message::Status(bad), None);
    host.until("it is shown", |h| {
        fault(h)?.contains("descriptor").then_some(())
    });
    assert!(metrics(&host).contains(&metric("transport")));
    let reason = "a VMM is connected to a port process that was killed".into();
    control.say(&Message::Stuck(Stuck { reason }), None);
    // The gravest first, and none hides another.
    let said = host.until("both are shown", |h| {
        fault(h).filter(|f| f.starts_with("a VMM"))
    });
    assert!(said.contains("descriptor"), "{said}");
    assert!(metrics(&host).contains(&metric("power-cycle")));
    // Nobody serves it: /bin/false is the port process.
    drop((control, ports));
    host.until("it is shown", |h| {
        metrics(h).contains(&metric("port-process")).then_some(())
    });
    for kind in ["transport", "power-cycle", "port-process"] {
        assert_eq!(logged(&host, kind), 1, "{kind}");
    }
}

/// The table is what users read: name, kind, labels and text of each metric.
#[test]
fn the_table_of_metrics_is_what_is_scraped() {
    let (host, ports) = Host::serving(&[("a", 3)], "");
    let control = ports[0].connected();
    let reason = "x".into();
    control.say(&Message::Stuck(Stuck { reason }), None);
    host.until("it has a fault", fault);
    // A counter appears when it counts for the first time.
    let mut client = host.proxy();
    client
        .write_all(b"CONNECT x:80 HTTP/1.1\r\nhost: x\r\n\r\n")
        .unwrap();
    let mut answer = [0; 12];
    client.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"HTTP/1.1 404");
    assert_eq!(crate::tasks::apply(&host, 1).status, 200);
    let mut agent = control.agent();
    let id = agent.pull().task_id;
    agent.report(id, adit_tasks::wire::Outcome::Done);
    let text = metrics(&host);
    let table = adit_host_proxy::metrics::METRICS;
    for metric in table {
        let family = metric.name.trim_end_matches("_total");
        let kind = match metric.name {
            "adit_vm_dial_seconds" | "adit_vm_first_byte_seconds" => "histogram",
            name if name == family => "gauge",
            _ => "counter",
        };
        assert!(
            text.contains(&format!("# TYPE {family} {kind}\n")),
            "{family}: {text}"
        );
        assert!(
            text.contains(&format!("# HELP {family} {}", metric.help)),
            "{family}: {text}"
        );
        for line in text
            .lines()
            .filter(|l| l.starts_with(&format!("{}{{", metric.name)))
        {
            let labels = line.split(['{', '}']).nth(1).unwrap();
            let labels: Vec<_> = labels
                .split(',')
                .map(|l| l.split('=').next().unwrap())
                .collect();
            assert_eq!(labels, metric.labels, "{line}");
        }
    }
    let families = text.lines().filter(|l| l.starts_with("# TYPE ")).count();
    assert_eq!(families, table.len(), "{text}");
}
