//! The version before and this one do the main job together, and the one takes over from the other.

use std::io::{Read, Write};

use adit_tests::before;
use adit_tests::connect::connect;
use adit_tests::host::Host;
use adit_tests::image::Kernel;

use super::{Setup, bins, boot, boot_agent, echo, run_goal};

/// Bytes by name, HTTP by name, and signed work that is done once.
fn main_job(setup: &Setup, what: &str) {
    echo(&setup.host, "web-1:7", 1 << 20);
    assert!(
        setup.curl(&["http://web-1/"]).contains("this is web-1"),
        "{what}"
    );
    let goal = format!(
        "steps: [{{id: {what}, script: {{interpreter: /bin/sh, script: \"echo {what} >> /root/ran; grep -c {what} /root/ran\"}}}}]\n"
    );
    let list = run_goal(setup, &goal);
    let line = list.lines().find(|line| line.contains(what));
    assert!(
        line.is_some_and(|line| line.contains("done") && line.trim_end().ends_with('1')),
        "{what}: {list}\n{}",
        setup.guest.serial()
    );
}

#[test]
fn a_guest_of_the_version_before_does_the_main_job_on_this_host() {
    let Some(bins) = bins() else { return };
    let agent = before::programs().unwrap().join("adit-guest");
    let services = "allow_services = [\"docker\"]";
    let host = Host::start_with(&bins, &["web-1"], services).unwrap();
    let setup = boot_agent(Kernel::V6_1, host, "", false, None, &agent);
    main_job(&setup, "agent-before");
    // It has no names for services.
    for curl in [
        &["http://docker.web-1.svc/"][..],
        &["-p", "http://docker.web-1.svc/"],
    ] {
        let said = setup.curl(curl);
        assert!(said.contains("HTTP/1.1 403"), "{said}");
    }
    let proxy = format!("http://{}", setup.host.proxy());
    let (code, said) = setup.adit(&["connect", "docker.web-1.svc", "--proxy", &proxy]);
    assert_eq!(code, 1, "{said}");
    for words in ["this agent serves", "another version"] {
        assert!(said.contains(words), "{said}");
    }
}

/// One host of the version before becomes one of this version, under a running guest, an open tunnel, and a database with tasks.
#[test]
fn a_host_of_the_version_before_serves_this_guest_and_is_upgraded_under_it() {
    let Some(bins) = bins() else { return };
    let host = Host::start_before(&before::programs().unwrap(), &["web-1"]).unwrap();
    let mut setup = boot(Kernel::V6_1, host, "", false);
    main_job(&setup, "host-before");
    let mut tunnel = connect(setup.host.proxy(), "web-1:7").unwrap();
    let mut talk = |text: &[u8]| {
        tunnel.write_all(text).unwrap();
        let mut got = vec![0; text.len()];
        tunnel.read_exact(&mut got).unwrap();
        assert_eq!(got, text);
    };
    talk(b"to the version before");

    setup.host.kill();
    setup.host.upgrade(&bins).unwrap();
    setup.host.launch().unwrap();
    setup.wait_agent();
    talk(b"the port process of the version before has it still");
    main_job(&setup, "port-before");
    let (_, list) = setup.adit(&["task", "ls"]);
    assert!(list.contains("host-before"), "{list}");

    let (code, said) = setup.adit(&["vm", "reload", "web-1"]);
    assert_eq!(code, 0, "{said}");
    setup.wait_agent();
    main_job(&setup, "all-of-now");
}
