//! The way back: from an agent that crashes, that hangs, or that no host hears.

use super::*;

/// The agent that was there before the last one, which says why.
fn accept_fallback(host: &mut Host, environment: &[(&str, &str)]) -> (Session, String) {
    let (session, facts) = accept_as(host, environment, |session, _| {
        session.program.taken_back.is_some()
    });
    assert_eq!(facts.agent_version, "0.1.0");
    let fault = session.program.faults[0].clone();
    (session, fault)
}

#[test]
fn r132_one_that_crashes_is_taken_back_after_three_starts() {
    let mut host = host();
    host.start(None);
    host.accept();
    let bad = program("0.2.0", "crash");
    give(&host, &bad, "0.2.0", "0.1.0");
    let (session, fault) = accept_fallback(&mut host, &[]);
    assert_eq!(session.program.taken_back, Some(Digest::of(&bad).0));
    assert!(
        fault.starts_with("agent-taken-back: 0.2.0") && fault.contains("3 times"),
        "{fault}"
    );
    let starts = host.log().matches("agent version=0.2.0").count();
    assert_eq!(starts, 3, "{}", host.log());
    assert!(
        status(&host).contains("agent-taken-back"),
        "{}",
        status(&host)
    );
    serves(&host);
    // Not for ever: who gives it again has it tried again, and one that works is taken.
    let good = program("0.2.0", "ok");
    let (session, facts) = upgrade(&mut host, &good, "0.2.0", "0.1.0");
    assert_eq!(facts.agent_version, "0.2.0");
    assert_eq!(
        (session.program.taken_back, session.program.faults.len()),
        (None, 0)
    );
}

#[test]
fn r132_one_that_has_no_hello_in_time_goes_back_by_itself_and_says_why() {
    let trial = [("ADIT_TEST_TRIAL_MS", "800")];
    let mut host = host();
    host.start_in(&trial);
    host.accept();
    let pid = host.pid();
    let mute = program("0.2.0", "mute");
    give(&host, &mute, "0.2.0", "0.1.0");
    let (_session, fault) = accept_fallback(&mut host, &trial);
    assert_eq!((host.pid(), host.ended()), (pid, None));
    assert!(
        fault.contains("no hello") && fault.contains("mute"),
        "{fault}"
    );
    serves(&host);
    // The kernel's alarm for the one on trial would come a second after its time.
    let begin = Instant::now();
    while begin.elapsed() < Duration::from_secs(3) {
        assert_eq!((host.pid(), host.ended()), (pid, None), "{}", host.log());
        std::thread::sleep(Duration::from_millis(50));
    }
    serves(&host);
}

#[test]
fn r132_one_that_hangs_at_once_is_ended_by_the_kernel() {
    let trial = [("ADIT_TEST_TRIAL_MS", "800")];
    let mut host = host();
    host.start_in(&trial);
    host.accept();
    let hangs = program("0.2.0", "hang");
    give(&host, &hangs, "0.2.0", "0.1.0");
    let (_session, fault) = accept_fallback(&mut host, &trial);
    assert!(fault.contains("no hello within"), "{fault}");
}

#[test]
fn r132_no_host_that_withholds_the_hello_gets_an_older_agent_than_the_floor() {
    let trial = [("ADIT_TEST_TRIAL_MS", "300")];
    let mut host = host();
    host.start_in(&trial);
    let _session = host.accept();
    let mute = program("0.2.0", "mute");
    give(&host, &mute, "0.2.0", "0.2.0");
    let begin = Instant::now();
    while !host.log().contains("agent-on-trial") {
        assert!(begin.elapsed() < HANG, "{}", host.log());
    }
    // Also one that is killed meanwhile.
    for _ in 0..5 {
        host.kill();
        host.start_in(&trial);
        let begin = Instant::now();
        let runs = || fs::read_link(format!("/proc/{}/exe", host.pid())).unwrap();
        while !runs().starts_with(host.path("state/agent")) {
            assert!(begin.elapsed() < HANG, "{}", host.log());
        }
    }
    assert!(!host.is_dialled(), "an older agent runs");
    assert!(
        status(&host).contains("agent-no-way-back"),
        "{}",
        status(&host)
    );
}
