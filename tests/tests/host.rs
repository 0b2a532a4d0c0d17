//! aditd and its port processes without a guest: mistakes of people and clients, and restarts.
//!
//! These tests need the binaries that `cargo xtask test` builds. Without them they print that and pass.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::Command;
use std::time::Instant;

use adit_channel::ring::{RingBells, RingCarrier};
use adit_channel::shard::Shard;
use adit_engine::EngineConfig;
use adit_ringbuf::Mapped;
use adit_ringbuf::region::Features;
use adit_ringbuf_io::attach::{Bells, Offer, Socket};
use adit_tests::host::Host;

fn start(vms: &[&str]) -> Option<(Host, PathBuf)> {
    let Some(bins) = std::env::var_os("ADIT_TEST_BINS").map(PathBuf::from) else {
        println!(
            "skipped: ADIT_TEST_BINS is not set; `cargo xtask test` builds what is needed and sets it"
        );
        return None;
    };
    let host = Host::start(&bins, vms).unwrap();
    vms.iter().for_each(|vm| host.wait_port(vm).unwrap());
    Some((host, bins))
}

fn adit(host: &Host, args: &[&str]) -> (i32, String) {
    let out = host.adit(args).unwrap();
    let text =
        String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
    (out.status.code().unwrap_or(-1), text)
}

fn port_pids(host: &Host, count: usize) -> Vec<u64> {
    adit_tests::process::wait_for(
        "every port process",
        std::time::Duration::from_secs(10),
        || {
            let (_, text) = adit(host, &["vm", "ls", "-o", "json"]);
            let vms: serde_json::Value = serde_json::from_str(&text)?;
            let pids: Vec<u64> = vms
                .as_array()
                .into_iter()
                .flatten()
                .filter_map(|v| v["port_pid"].as_u64())
                .collect();
            Ok((pids.len() == count).then_some(pids))
        },
    )
    .unwrap()
}

#[test]
fn a_killed_aditd_finds_its_port_processes_again() {
    let Some((mut host, _)) = start(&["a", "b"]) else {
        return;
    };
    let before = port_pids(&host, 2);
    for _ in 0..5 {
        host.kill();
        host.launch().unwrap();
        assert_eq!(port_pids(&host, 2), before);
    }
}

#[test]
fn a_killed_port_process_and_a_reloaded_one_are_replaced() {
    let Some((host, _)) = start(&["a", "b"]) else {
        return;
    };
    let before = port_pids(&host, 2);
    let changed = |since: &[u64]| {
        adit_tests::process::wait_for("another", std::time::Duration::from_secs(10), || {
            let now = port_pids(&host, 2);
            Ok((now[0] != since[0]).then_some(now))
        })
        .unwrap()
    };
    // More often than a process may be started without a back-off.
    let mut pids = before.clone();
    for _ in 0..10 {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(pids[0]).unwrap());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
        pids = changed(&pids);
    }
    let (code, said) = adit(&host, &["vm", "reload", "a"]);
    assert_eq!(code, 0, "{said}");
    assert!(said.contains("is served by process"), "{said}");
    let after = changed(&pids);
    assert_eq!(after[1], before[1]);
    let (_, said) = adit(&host, &["vm", "show", "a"]);
    assert!(
        said.contains("waiting") && !said.contains("fault"),
        "{said}"
    );
}

/// A file of a process in /proc.
fn proc(pid: u64, file: &str) -> String {
    std::fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap()
}

fn user(pid: u64) -> u32 {
    let status = proc(pid, "status");
    let line = status.lines().find_map(|l| l.strip_prefix("Uid:")).unwrap();
    line.split_whitespace().next().unwrap().parse().unwrap()
}

fn signal(pid: u64, signal: nix::sys::signal::Signal) {
    let pid = nix::unistd::Pid::from_raw(i32::try_from(pid).unwrap());
    nix::sys::signal::kill(pid, signal).unwrap();
}

#[test]
fn r115_each_port_process_is_a_user_of_its_own_and_so_is_its_successor() {
    let Some((mut host, _)) = start(&["a", "b"]) else {
        return;
    };
    let before = port_pids(&host, 2);
    for &pid in &before {
        assert_eq!(proc(pid, "environ"), "");
    }
    let users: Vec<u32> = before.iter().map(|&pid| user(pid)).collect();
    if !nix::unistd::Uid::effective().is_root() {
        println!("skipped: users of their own take root");
        assert!(host.log().contains("run as aditd's own user"));
        return;
    }
    assert!(users[0] != users[1] && users.iter().all(|u| *u >= 70_000));
    // The next aditd must know the users of running processes, and give the same ones to those that it starts itself.
    host.kill();
    host.launch().unwrap();
    assert_eq!(port_pids(&host, 2), before);
    signal(before[0], nix::sys::signal::Signal::SIGKILL);
    let after =
        adit_tests::process::wait_for("another", std::time::Duration::from_secs(30), || {
            let now = port_pids(&host, 2);
            Ok((now[0] != before[0]).then_some(now))
        })
        .unwrap();
    let again: Vec<u32> = after.iter().map(|&pid| user(pid)).collect();
    assert_eq!(again, users);
    // A process that ignores the request to make room, or to end, is killed.
    signal(after[0], nix::sys::signal::Signal::SIGSTOP);
    let (code, said) = adit(&host, &["vm", "reload", "a"]);
    assert_eq!(code, 0, "{said}");
    assert_ne!(port_pids(&host, 2)[0], after[0]);
    signal(after[1], nix::sys::signal::Signal::SIGSTOP);
    host.shut_down().unwrap();
    host.kill();
    let gone = || {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", after[1]));
        // At most a zombie, if the reaper of orphans is slow.
        let ended = stat.is_err() || stat.is_ok_and(|s| s.contains(") Z "));
        Ok(ended.then_some(()))
    };
    adit_tests::process::wait_for(
        "the port process's end",
        std::time::Duration::from_secs(30),
        gone,
    )
    .unwrap();
}

#[test]
fn a_killed_aditd_serves_a_hundred_vms_again() {
    let names: Vec<String> = (0..100).map(|n| format!("vm-{n}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let Some((mut host, _)) = start(&names) else {
        return;
    };
    let before = port_pids(&host, names.len());
    for _ in 0..3 {
        host.kill();
        let begin = Instant::now();
        host.launch().unwrap();
        // Each VM has its old port process: none was started twice, and none is missing.
        assert_eq!(port_pids(&host, names.len()), before);
        let answer = host.curl(&["http://vm-99/"]).unwrap();
        let answer = String::from_utf8_lossy(&answer.stdout).into_owned();
        assert!(answer.starts_with("HTTP/1.1 503"), "no guest: {answer}");
        println!("100 VMs again after {} ms", begin.elapsed().as_millis());
    }
}

#[test]
fn a_second_aditd_a_busy_port_and_a_bad_file_say_what_to_do() {
    let Some((host, bins)) = start(&["a"]) else {
        return;
    };
    let run = |file: &str, text: &str| {
        let path = host.dir().join(file);
        std::fs::write(&path, text).unwrap();
        // With a limit, because an aditd that starts after all would not end.
        let out = Command::new("timeout")
            .arg("20")
            .arg(bins.join("aditd"))
            .args(["run", "--config"])
            .arg(path)
            .output()
            .unwrap();
        assert!(!out.status.success());
        String::from_utf8_lossy(&out.stderr).into_owned()
    };
    let first = std::fs::read_to_string(host.dir().join("aditd.toml")).unwrap();
    let said = run("again.toml", &first);
    assert!(
        said.contains("already") && said.contains(&host.pid().to_string()),
        "{said}"
    );
    let dir = host.dir().display();
    let dirs = format!("run_dir = \"{dir}/r2\"\nstate_dir = \"{dir}/s2\"\n");
    let said = run(
        "busy.toml",
        &format!("{dirs}[proxy]\nlisten = \"{}\"\n", host.proxy()),
    );
    assert!(
        said.contains("cannot listen") && said.contains("[proxy]"),
        "{said}"
    );
    let said = run(
        "bad.toml",
        &format!("{dirs}[proxy]\nlissten = \"127.0.0.1:0\"\n"),
    );
    assert!(
        said.contains("bad.toml:4") && said.contains("lissten"),
        "{said}"
    );
    std::fs::create_dir(host.dir().join("s3")).unwrap();
    std::fs::write(host.dir().join("s3/aditd.db"), [0x5a; 5000]).unwrap();
    let dirs = format!("run_dir = \"{dir}/r3\"\nstate_dir = \"{dir}/s3\"\n");
    let said = run(
        "junk.toml",
        &format!("{dirs}[proxy]\nlisten = \"127.0.0.1:0\"\n"),
    );
    assert!(
        said.contains("s3/aditd.db") && said.contains("move it away"),
        "{said}"
    );
}

#[test]
fn vms_are_added_kept_and_removed_and_used_names_are_refused() {
    let Some((mut host, _)) = start(&["a"]) else {
        return;
    };
    assert_eq!(
        adit(&host, &["vm", "add", "b", "--cid", "9", "--allow", "80"]).0,
        0
    );
    let (code, said) = adit(&host, &["vm", "set", "b", "--allow", "443,80"]);
    assert!(code == 0 && said.contains("443, 80"), "{said}");
    let (code, said) = adit(&host, &["vm", "set", "a", "--allow", "443"]);
    assert!(code == 1 && said.contains("aditd.toml"), "{said}");
    for args in [
        ["vm", "add", "b", "--cid", "10"],
        ["vm", "add", "c", "--cid", "9"],
        ["vm", "add", "c", "--cid", "3"],
    ] {
        let (code, said) = adit(&host, &args);
        assert!(code == 1 && said.contains("error[taken]"), "{said}");
    }
    host.kill();
    host.launch().unwrap();
    assert_eq!(port_pids(&host, 2).len(), 2);
    let goal = "steps: [{id: x, script: {interpreter: /bin/sh, script: id}}]\n";
    std::fs::write(host.dir().join("goal.yaml"), goal).unwrap();
    assert_eq!(adit(&host, &["key", "new", "fleet.key"]).0, 0);
    let apply = [
        "goal",
        "apply",
        "goal.yaml",
        "--sign",
        "fleet.key",
        "--to",
        "b",
    ];
    assert_eq!(adit(&host, &apply).0, 0);
    let (code, said) = adit(&host, &["vm", "rm", "b"]);
    assert_eq!(code, 0, "{said}");
    let (_, list) = adit(&host, &["task", "ls"]);
    assert!(
        list.contains("expired") && list.contains("removed"),
        "{list}"
    );
    assert_eq!(adit(&host, &["vm", "show", "b"]).0, 4);
    let (code, said) = adit(&host, &["vm", "rm", "a"]);
    assert!(code == 1 && said.contains("aditd.toml"), "{said}");
}

/// Sends bytes and reads until the proxy closes.
fn talk(host: &Host, bytes: &[u8]) -> String {
    let mut stream = TcpStream::connect(host.proxy()).unwrap();
    stream
        .set_read_timeout(Some(std::time::Duration::from_secs(30)))
        .unwrap();
    stream.write_all(bytes).unwrap();
    let mut answer = Vec::new();
    // The end after the answer may be a reset or a regular close.
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).into_owned()
}

#[test]
fn r66_bytes_after_a_refused_connect_are_never_a_request() {
    let Some((host, _)) = start(&["a"]) else {
        return;
    };
    let smuggled = b"CONNECT nobody:80 HTTP/1.1\r\nHost: nobody:80\r\n\r\nGET http://a/ HTTP/1.1\r\nHost: a\r\n\r\n";
    let said = talk(&host, smuggled);
    assert!(said.starts_with("HTTP/1.1 404"), "{said}");
    assert_eq!(said.matches("HTTP/1.1 ").count(), 1, "{said}");
}

#[test]
fn r64_ports_in_any_other_spelling_are_refused() {
    let Some((host, _)) = start(&["a"]) else {
        return;
    };
    for authority in [
        "a:0",
        "a:65536",
        "a:+80",
        "a",
        "a:080",
        "a..:80",
        "a_:80",
        "127.0.0.1:80",
        "[::1]:80",
        "a:8080",
    ] {
        let said = talk(
            &host,
            format!("CONNECT {authority} HTTP/1.1\r\nHost: a\r\n\r\n").as_bytes(),
        );
        let status = said.split(' ').nth(1).unwrap_or_default();
        assert!(
            ["400", "403", "404"].contains(&status),
            "{authority}: {said}"
        );
    }
}

#[test]
fn a_vm_without_a_guest_gets_503_with_the_reason() {
    let Some((host, _)) = start(&["a"]) else {
        return;
    };
    let said = talk(&host, b"GET http://a/ HTTP/1.1\r\nHost: a\r\n\r\n");
    assert!(said.starts_with("HTTP/1.1 503"), "{said}");
    assert!(
        said.to_lowercase().contains("retry-after: 1") && said.contains("destination_unavailable"),
        "{said}"
    );
    let (code, said) = adit(&host, &["wait", "a", "--timeout", "50ms"]);
    assert!(code == 124 && said.contains("waiting"), "{said}");
}

/// RssAnon of a process, KiB.
fn anonymous_kib(pid: u64) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status
        .lines()
        .find_map(|l| l.strip_prefix("RssAnon:"))
        .unwrap();
    line.trim().trim_end_matches(" kB").trim().parse().unwrap()
}

#[test]
fn idle_processes_are_small() {
    let Some((host, _)) = start(&["a", "b"]) else {
        return;
    };
    let aditd = anonymous_kib(host.worker().into());
    assert!(aditd <= 32 << 10, "aditd: {aditd} KiB");
    for pid in port_pids(&host, 2) {
        let port = anonymous_kib(pid);
        println!("aditd {aditd} KiB, port process {port} KiB");
        assert!(port <= 2 << 10, "port process: {port} KiB");
    }
}

/// A VMM at `ring.sock`, and a guest that uses the ring: `adit vm show` reports each step.
#[test]
fn vm_show_says_which_carrier_is_used_and_why() {
    let Some((host, _)) = start(&["a"]) else {
        return;
    };
    let shows = |what: &str| {
        adit_tests::process::wait_for(what, std::time::Duration::from_secs(20), || {
            let (_, said) = adit(&host, &["vm", "show", "a"]);
            Ok(said.contains(what).then_some(said))
        })
        .unwrap()
    };
    shows("carrier        vsock: no VMM has offered a ring");
    let bytes = 4 << 20;
    let (memory, fd) = Mapped::memfd(bytes).unwrap();
    let bells = Bells::new().unwrap();
    let ring = host.vhost_socket("a").with_file_name("ring.sock");
    let socket = Socket::connect(&ring).unwrap();
    let offer = Offer {
        vm: "a".into(),
        bytes: bytes as u64,
        lanes: 2,
    };
    socket.offer(&offer, 1, fd.as_fd(), &bells).unwrap();
    let said = shows("carrier        vsock: the guest does not use the ring yet");
    assert!(
        said.contains("ring memory    memfd by attach socket, 4096 KiB, ")
            && said.contains(" ns a line, 0 streams"),
        "{said}"
    );
    let carrier = RingCarrier::guest(memory, 1 << 20, Features::NONE, RingBells::of_guest(bells));
    let mut shard = Shard::new().unwrap();
    shard
        .add(carrier.unwrap(), EngineConfig::default(), 9)
        .unwrap();
    let guest = shard.spawn("guest").unwrap();
    let said = shows("carrier        ring: both sides use the ring");
    // Nobody is at the other end of vsock, so there is nothing to compare and no latency is measured.
    assert!(!said.contains("latency"), "{said}");
    drop(socket);
    let said = shows(
        "carrier        vsock: the ring was removed: the other side closed the attach socket",
    );
    assert!(!said.contains("ring memory"), "{said}");
    drop(guest);
}
