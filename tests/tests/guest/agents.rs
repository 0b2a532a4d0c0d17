//! A guest's agent becomes another program over the channel, and after it was killed it is that one still.

use std::fs;

use adit_tests::guest::{Guest, Identity};
use adit_tests::host::Host;
use adit_tests::image::{Image, Kernel};
use adit_tests::process::wait_for;

use super::{BOOT, bins};

#[test]
fn an_agent_is_upgraded_over_the_channel_and_stays_so() {
    let Some(bins) = bins() else { return };
    let host = Host::start(&bins, &["web-1"]).unwrap();
    host.wait_port("web-1").unwrap();
    let trust = host.dir().join("trust");
    fs::create_dir(&trust).unwrap();
    for (name, role) in [("fleet", "goal"), ("agents", "agent")] {
        let key = trust.join(format!("{name}.key")).display().to_string();
        let new = ["key", "new", &key, "--role", role];
        assert!(host.adit(&new).unwrap().status.success());
    }
    let agent = adit_tests::guest_bin("adit-guest");
    // The same version, told from the other by its digest.
    let next = host.dir().join("adit-guest");
    let mut content = fs::read(&agent).unwrap();
    content.extend_from_slice(b"another build");
    fs::write(&next, content).unwrap();
    fs::set_permissions(&next, fs::metadata(&agent).unwrap().permissions()).unwrap();
    let image = Image::build(Kernel::V6_1, &|what| println!("{what}")).unwrap();
    let socket = host.vhost_socket("web-1");
    let who = Identity {
        name: "web-1",
        vhost_socket: &socket,
        agent: Some(&agent),
        trust: Some(&trust),
        script: "",
        boot_files: false,
    };
    let mut guest = Guest::boot(&image, &who, &host.dir().join("guest")).unwrap();
    guest.wait_ready(BOOT).unwrap();
    let adit = |args: &[&str]| {
        let out = host.adit(args).unwrap();
        let said = [&out.stdout[..], &out.stderr].concat();
        (out.status.code(), String::from_utf8(said).unwrap())
    };
    let wait = ["wait", "web-1", "--for", "agent", "--timeout", "60s"];
    assert_eq!(adit(&wait).0, Some(0), "{}", host.log());
    let (next, key) = (next.display().to_string(), |name: &str| {
        trust.join(name).display().to_string()
    });
    let upgrade = |sign: &str| {
        let (to, sign) = (["agent", "upgrade", "--to", "web-1"], key(sign));
        adit(&[&to[..], &["--package", &next, "--sign", &sign]].concat())
    };
    // A key for goals gives no agent.
    let (status, said) = upgrade("fleet.key");
    assert_eq!(status, Some(1), "{said}");
    assert!(said.contains("error[agent-untrusted]"), "{said}");
    let (status, said) = upgrade("agents.key");
    assert_eq!(
        status,
        Some(0),
        "{said}\n{}\n{}",
        host.log(),
        guest.serial()
    );
    let shown = || adit(&["vm", "show", "web-1"]).1;
    assert!(shown().contains("came over the channel"), "{}", shown());
    assert!(!shown().contains("\nfault"), "{}", shown());
    // Once more there is nothing to do.
    assert_eq!(upgrade("agents.key").0, Some(0));
    // The guest's init starts the image's program, which begins the other one.
    let kill = host.dir().join("kill.yaml");
    let steps = "steps: [{id: kill, script: {interpreter: /bin/sh, script: \"kill -9 $(pidof adit-guest)\"}}]";
    fs::write(&kill, steps).unwrap();
    let (file, sign) = (kill.display().to_string(), key("fleet.key"));
    let apply = [
        "goal", "apply", &file, "--sign", &sign, "--to", "web-1", "--watch",
    ];
    let (_, said) = adit(&[&apply[..], &["--timeout", "120s"]].concat());
    assert!(said.contains("interrupted"), "{said}\n{}", guest.serial());
    wait_for("the agent", BOOT, || {
        let shown = shown();
        let is_back = shown.contains("state          ready");
        Ok((is_back && shown.contains("came over the channel")).then_some(()))
    })
    .unwrap();
}
