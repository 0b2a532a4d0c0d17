use std::time::Instant;

use adit_names::ServiceName;
use adit_port::control::Target;
use serde_json::Value;

use super::*;

fn visits(dir: &Path, log: AccessLog, allows: bool) -> Arc<Visits> {
    let audit = Arc::new(Audit::start(dir, allows).unwrap());
    Arc::new(Visits::start(dir, log, audit, [7; 16]).unwrap())
}

fn to(vm: &str) -> Destination {
    Destination {
        vm: vm.parse().unwrap(),
        host: None,
        target: Target::Service(ServiceName::tcp(80)),
    }
}

fn lines(dir: &Path, file: &str, at_least: usize) -> Vec<Value> {
    let begin = Instant::now();
    loop {
        let text = std::fs::read_to_string(dir.join(file)).unwrap_or_default();
        if text.lines().count() >= at_least {
            return text
                .lines()
                .map(|line| serde_json::from_str(line).unwrap())
                .collect();
        }
        assert!(begin.elapsed() < Duration::from_secs(30), "{text}");
        std::thread::yield_now();
    }
}

fn begun(visits: &Arc<Visits>) -> Visit {
    let visit = visits.begin("127.0.0.1:7080", "http", None, 0);
    visit.method("CONNECT");
    visit.caller(&Caller::anonymous("192.0.2.1:9").with_token("ci"));
    visit.to(&to("a"));
    visit.allowed(Some("aditd.toml:3"));
    visit
}

fn end(note: Vec<u8>) -> TunnelEnd {
    TunnelEnd {
        note,
        to_guest: 10,
        from_guest: 20,
        lasted_us: 3_500,
        dial_us: Some(1_250),
        first_byte_us: None,
        broken_off: false,
    }
}

fn ends(end: TunnelEnd) -> Ends {
    Ends {
        seq: 1,
        ends: vec![end],
        lost: 0,
    }
}

#[test]
fn a_visit_is_written_once_when_the_last_copy_is_dropped() {
    let dir = tempfile::tempdir().unwrap();
    let visits = visits(dir.path(), AccessLog::File, true);
    let visit = begun(&visits);
    let copy = visit.clone();
    copy.add_to_vm(5);
    visit.answered(200, "");
    visit.ended();
    drop(visit);
    copy.add_from_vm(6);
    drop(copy);
    let line = &lines(dir.path(), FILE, 1)[0];
    assert_eq!(line["listener"], "127.0.0.1:7080");
    assert_eq!(line["caller"], "token:ci");
    assert_eq!(
        (&line["vm"], &line["target"]),
        (&"a".into(), &"tcp:80".into())
    );
    assert_eq!(
        (line["status"].as_u64(), line["bytes_to_vm"].as_u64()),
        (Some(200), Some(5))
    );
    assert_eq!(line["bytes_from_vm"], 6);
    assert_eq!(line.get("broken_off"), None);
    let allow = &lines(dir.path(), "aditd.audit", 1)[0];
    assert_eq!(allow["decision"], "allow");
    assert_eq!(allow["reason"], "aditd.toml:3");
    assert_eq!(allow["trace_id"], line["trace_id"]);
}

#[test]
fn an_end_is_written_by_the_next_aditd_as_the_first_would_have() {
    let dir = tempfile::tempdir().unwrap();
    let visit = begun(&visits(dir.path(), AccessLog::File, true));
    let (note, id) = (visit.note().unwrap(), visit.trace().id());
    visit.handed(true);
    drop(visit);
    let next = visits(dir.path(), AccessLog::File, true);
    next.ended_all(&"a".parse().unwrap(), &ends(end(note)));
    let line = &lines(dir.path(), FILE, 1)[0];
    assert_eq!(line["trace_id"], id.as_str());
    assert_eq!(line["method"], "CONNECT");
    assert_eq!(
        (line["dial_ms"].as_f64(), line["duration_ms"].as_u64()),
        (Some(1.25), Some(3))
    );
    assert_eq!(lines(dir.path(), "aditd.audit", 1)[0]["bytes_from_vm"], 20);
}

#[test]
fn r115_a_port_process_cannot_make_up_a_visit_nor_take_one_to_another_vm() {
    let dir = tempfile::tempdir().unwrap();
    let visits = visits(dir.path(), AccessLog::File, true);
    let visit = begun(&visits);
    let note = visit.note().unwrap();
    visit.handed(true);
    let mut forged = note.clone();
    let at = forged.len() - 3;
    forged[at] ^= 1;
    let unsealed = note[SEAL..].to_vec();
    for (vm, note) in [
        ("a", forged),
        ("a", unsealed),
        ("a", vec![]),
        ("a", vec![0; 16]),
        ("b", note.clone()),
    ] {
        visits.ended_all(&vm.parse().unwrap(), &ends(end(note)));
    }
    visits.ended_all(&"a".parse().unwrap(), &ends(end(note)));
    // The one that is true is the first that is written.
    assert_eq!(lines(dir.path(), FILE, 1).len(), 1);
    assert_eq!(lines(dir.path(), "aditd.audit", 1).len(), 1);
}

#[test]
fn without_anybody_who_wants_it_nothing_is_noted() {
    let dir = tempfile::tempdir().unwrap();
    let visit = begun(&visits(dir.path(), AccessLog::Off, false));
    assert_eq!(visit.note(), None);
    visit.handed(false);
    drop(visit);
    assert!(!dir.path().join(FILE).exists());
}

#[test]
fn r72_what_clients_say_is_bounded_in_a_line_and_in_a_note() {
    let dir = tempfile::tempdir().unwrap();
    let visits = visits(dir.path(), AccessLog::File, false);
    let visit = begun(&visits);
    let hostile = "\n\u{1b}[2J\"é".repeat(10_000);
    visit.method(&hostile);
    visit.caller(&Caller::anonymous(&hostile).with_token(&hostile));
    visit.allowed(Some(&hostile));
    if let Some(note) = visit.note() {
        assert!(note.len() <= NOTE_MAX);
    }
    visit.answered(200, "");
    drop(visit);
    let text = lines(dir.path(), FILE, 1)[0].to_string();
    assert!(text.len() < 4096, "{}", text.len());
    assert!(!text.contains('\u{1b}'));
}
