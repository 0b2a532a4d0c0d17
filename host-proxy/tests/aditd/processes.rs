//! aditd's two processes: the monitor, which is root, and the worker, which serves strangers.

use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::Duration;

use adit_port::control_io::Message;
use nix::sys::signal::Signal;
use nix::sys::socket::{MsgFlags, getsockopt, send as send_bytes, sockopt};
use nix::unistd::Uid;
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

use crate::host::{Host, Port};

/// A running aditd of two processes with VM `a`.
fn two() -> Option<(Host, Vec<Port>)> {
    let (mut host, ports) = Host::new(&[("a", 3)], "");
    host.start();
    host.until("it answers", |h| h.try_api("GET", "/v1/vms", "").ok());
    if host.worker() == host.pid() {
        println!("skipped: aditd is one process here: {}", host.log());
        return None;
    }
    Some((host, ports))
}

/// Waits until another worker than this one answers.
fn another(host: &Host, than: u32) -> u32 {
    let now = host.until("another worker", |h| {
        Some(h.worker()).filter(|now| *now != than)
    });
    host.until("it answers", |h| h.try_api("GET", "/v1/vms", "").ok());
    now
}

/// The worker's end of its socket to the monitor, as somebody has it who has taken the worker over.
fn stolen(host: &Host) -> OwnedFd {
    let worker = Pid::from_raw(host.worker().cast_signed()).unwrap();
    let worker_fd = pidfd_open(worker, PidfdFlags::empty()).unwrap();
    for number in crate::kinds::open_in(host.worker()) {
        let number = i32::try_from(number).unwrap();
        let Ok(fd) = pidfd_getfd(&worker_fd, number, PidfdGetfdFlags::empty()) else {
            continue;
        };
        let is_packets = getsockopt(&fd, sockopt::SockType)
            .is_ok_and(|of| of == nix::sys::socket::SockType::SeqPacket);
        let peer = getsockopt(&fd, sockopt::PeerCredentials);
        if is_packets && peer.is_ok_and(|peer| peer.pid().cast_unsigned() == host.pid()) {
            return fd;
        }
    }
    panic!("the worker has no socket to its monitor");
}

#[test]
fn a_worker_that_says_garbage_or_floods_its_monitor_is_ended_and_the_next_one_serves() {
    let Some((host, ports)) = two() else { return };
    let mut worker = host.worker();
    let _control = ports[0].connected();
    // `Status{text: "x"}`, which is in order, and no end of it.
    let request = adit_channel::frame::encode(11, 1, 0, 0, &"x").unwrap();
    let socket = stolen(&host);
    let begin = std::time::Instant::now();
    loop {
        assert!(begin.elapsed() < crate::host::HANG, "{}", host.log());
        match send_bytes(socket.as_raw_fd(), &request, MsgFlags::MSG_NOSIGNAL) {
            Ok(_) => {}
            Err(nix::errno::Errno::EAGAIN) => std::thread::yield_now(),
            Err(_) => break,
        }
    }
    drop(socket);
    worker = another(&host, worker);
    assert!(host.log().contains("it asks too much"), "{}", host.log());
    for _ in 0..3 {
        let socket = stolen(&host);
        send_bytes(socket.as_raw_fd(), &[0xff; 100], MsgFlags::MSG_NOSIGNAL).unwrap();
        worker = another(&host, worker);
        assert_eq!(host.get("/v1/vms").as_array().unwrap().len(), 1);
    }
    let _control = ports[0].connected();
    host.until("the VM is up again", |h| {
        (h.get("/v1/vms/a")["state"] == "up").then_some(())
    });
}

#[test]
fn the_worker_has_no_privilege_and_the_operators_socket_is_still_roots() {
    let Some((host, _ports)) = two() else { return };
    let status = fs::read_to_string(format!("/proc/{}/status", host.worker())).unwrap();
    let field = |name: &str| {
        let line = status.lines().find_map(|l| l.strip_prefix(name)).unwrap();
        line.split_whitespace()
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    let users = field("Uid:");
    assert!(
        users.iter().all(|uid| *uid == users[0] && uid != "0"),
        "{status}"
    );
    assert!(field("Gid:").iter().all(|gid| gid != "0"), "{status}");
    assert!(field("Groups:").is_empty(), "{status}");
    for set in ["CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"] {
        assert_eq!(field(set), ["0000000000000000"], "{set}");
    }
    assert_eq!(
        (field("NoNewPrivs:"), field("Seccomp:")),
        (vec!["1".into()], vec!["2".into()])
    );
    let root = fs::read_link(format!("/proc/{}/root", host.worker())).unwrap();
    assert_eq!(root, host.state_dir().canonicalize().unwrap());
    use std::os::unix::fs::MetadataExt;
    let run = host.config_file().with_file_name("run");
    let socket = fs::metadata(run.join("aditd.sock")).unwrap();
    assert_eq!((socket.uid(), socket.mode() & 0o777), (0, 0o600));
    let database = fs::metadata(host.state_dir().join("aditd.db")).unwrap();
    assert_eq!(
        (database.uid().to_string(), database.mode() & 0o777),
        (users[0].clone(), 0o600)
    );
    // It is not a VM's.
    assert_ne!(host.get("/v1/vms/a")["port_pid"], host.worker());
}

#[test]
fn a_worker_that_is_killed_while_vms_are_added_has_those_that_were_answered_and_no_other() {
    let Some((host, _ports)) = two() else { return };
    let mut added = vec!["a".to_owned()];
    for round in 0..4u64 {
        let worker = host.worker();
        std::thread::scope(|s| {
            let host = &host;
            let adding = s.spawn(move || {
                let mut added = Vec::new();
                for n in 0..50 {
                    let name = format!("vm-{round}-{n}");
                    let body = format!(r#"{{"name":"{name}","cid":{}}}"#, 100 + round * 100 + n);
                    match host.try_api("POST", "/v1/vms", &body) {
                        Ok(answer) if answer.status == 200 => added.push(name),
                        // Cut off, or by the next worker: it may be there or not.
                        _ => break,
                    }
                }
                added
            });
            std::thread::sleep(Duration::from_millis(20 * (round + 1)));
            host.kill_worker();
            added.extend(adding.join().unwrap());
        });
        another(&host, worker);
    }
    let there = host.get("/v1/vms");
    let there: Vec<_> = there
        .as_array()
        .unwrap()
        .iter()
        .map(|vm| vm["name"].as_str().unwrap())
        .collect();
    for name in &added {
        assert!(there.contains(&name.as_str()), "{name} is lost: {there:?}");
    }
    // At most the one that was under way, each time.
    assert!(there.len() <= added.len() + 4, "{there:?}");
}

#[test]
fn a_monitor_that_is_killed_while_a_vm_starts_is_followed_by_one_that_finds_it() {
    let bin = tempfile::tempdir().unwrap();
    let slow = bin.path().join("slow");
    let (begun, go) = (bin.path().join("begun"), bin.path().join("go"));
    // One that is started when the test is over ends, too.
    let script = format!(
        "#!/bin/sh\necho $$ >> {begun}\nwhile test -e {begun} && ! test -e {go}; do sleep 0.05; done\n",
        begun = begun.display(),
        go = go.display()
    );
    fs::write(&slow, script).unwrap();
    fs::set_permissions(&slow, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let (mut host, ports) = Host::new(&[("a", 3)], "[[vm]]\nname = \"b\"\ncid = 4\n");
    host.port_bin = slow;
    host.start();
    if host.worker() == host.pid() {
        println!("skipped: aditd is one process here");
        return;
    }
    let control = ports[0].connected();
    host.until("b is being started", |_| fs::read_to_string(&begun).ok());
    let worker = host.worker();
    host.kill_monitor();
    // The worker goes on, and says what is missing.
    host.until("it is said", |h| {
        let fault = h.get("/v1/vms/b")["fault"]
            .as_str()
            .unwrap_or_default()
            .to_owned();
        fault.contains("monitor is not there").then_some(())
    });
    assert_eq!(host.get("/v1/vms/a")["state"], "up");
    // b's port process serves by now, without anybody having seen it start.
    let b = host.port("b", 4);
    fs::write(&go, "").unwrap();
    host.start();
    assert_eq!(host.worker(), worker);
    let of_b = b.connected();
    host.until("b is up", |h| {
        (h.get("/v1/vms/b")["state"] == "up" && h.get("/v1/vms/b")["fault"].is_null()).then_some(())
    });
    // Nothing happened to a's connection.
    control.say(&Message::Status(ports[0].status(true)), None);
    drop(of_b);
}

#[test]
fn both_killed_at_once_are_followed_by_two_that_serve() {
    let Some((mut host, ports)) = two() else {
        return;
    };
    let control = ports[0].connected();
    let added = host.api("POST", "/v1/vms", r#"{"name":"c","cid":5}"#);
    assert_eq!(added.status, 200);
    host.kill();
    drop(control);
    host.start();
    let _control = ports[0].connected();
    host.until("they serve", |h| {
        (h.get("/v1/vms/a")["state"] == "up").then_some(())
    });
    assert_eq!(host.get("/v1/vms/c")["name"], "c");
}

#[test]
fn a_found_worker_with_other_settings_is_replaced_and_one_with_other_vms_goes_on() {
    let Some((mut host, ports)) = two() else {
        return;
    };
    let worker = host.worker();
    let _control = ports[0].connected();
    let path = host.config_file();
    let change = |what: &str| {
        let text = fs::read_to_string(&path).unwrap();
        fs::write(&path, what.to_owned() + &text).unwrap();
    };
    host.kill_monitor();
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, text + "[[vm]]\nname = \"d\"\ncid = 9\n").unwrap();
    host.start();
    assert_eq!(host.worker(), worker, "{}", host.log());
    host.until("the new VM is there", |h| {
        (h.try_api("GET", "/v1/vms/d", "").ok()?.status == 200).then_some(())
    });
    // Another value of what takes a restart: this is one.
    host.kill_monitor();
    let elsewhere = host.config_file().with_file_name("state-2");
    let text = fs::read_to_string(&path).unwrap();
    let without: Vec<_> = text
        .lines()
        .filter(|l| !l.starts_with("state_dir"))
        .collect();
    fs::write(&path, without.join("\n") + "\n").unwrap();
    change(&format!("state_dir = \"{}\"\n", elsewhere.display()));
    host.start();
    another(&host, worker);
    assert!(elsewhere.join("aditd.db").exists());
    assert_eq!(host.get("/v1/config")["restart"], serde_json::json!([]));
}

#[test]
fn a_worker_that_is_replaced_has_the_configuration_as_it_was_read_last() {
    let Some((host, _ports)) = two() else { return };
    let worker = host.worker();
    let status = host.reload(|text| text + "[[vm]]\nname = \"d\"\ncid = 9\nallow = [22]\n");
    assert!(status["error"].is_null(), "{status}");
    // A file with a mistake is not what a successor gets.
    let status = host.reload(|text| text + "alow = 1\n");
    assert!(!status["error"].is_null(), "{status}");
    host.kill_worker();
    another(&host, worker);
    assert_eq!(host.get("/v1/vms/d")["allow"], serde_json::json!([22]));
}

#[test]
fn a_worker_that_reads_nothing_does_not_keep_aditd_from_stopping() {
    let Some((mut host, _ports)) = two() else {
        return;
    };
    let worker = nix::unistd::Pid::from_raw(host.worker().cast_signed());
    let socket = stolen(&host);
    nix::sys::signal::kill(worker, Signal::SIGSTOP).unwrap();
    // `Gone{vm: "a"}`: as many answers as have room.
    let request = adit_channel::frame::encode(7, 1, 1, 0, &"a").unwrap();
    for _ in 0..2000 {
        while let Err(nix::errno::Errno::EAGAIN) =
            send_bytes(socket.as_raw_fd(), &request, MsgFlags::MSG_NOSIGNAL)
        {
            std::thread::yield_now();
        }
    }
    drop(socket);
    host.signal(Signal::SIGHUP);
    std::thread::sleep(Duration::from_millis(500));
    host.terminate();
    assert!(host.ended());
    assert!(!fs::exists(format!("/proc/{worker}")).unwrap());
}

#[test]
fn a_run_directory_that_takes_no_file_keeps_no_worker_from_serving() {
    let Some((host, ports)) = two() else { return };
    let run = host.config_file().with_file_name("run");
    // As if there was no room.
    fs::create_dir(run.join("worker.pid.new")).unwrap();
    host.kill_worker();
    host.until("it is said", |h| {
        let said = h.log().contains("does not say which process");
        said.then_some(())
    });
    let _control = ports[0].connected();
    host.until("the VM is up", |h| {
        let answer = h.try_api("GET", "/v1/vms/a", "").ok()?;
        (answer.status == 200).then_some(())
    });
}

#[test]
fn vms_that_take_all_descriptors_keep_no_worker_from_being_started() {
    let (mut host, ports) = Host::new(&[("a", 3)], "");
    host.start_with(128);
    if host.worker() == host.pid() {
        println!("skipped: aditd is one process here");
        return;
    }
    let worker = host.worker();
    for n in 0..80 {
        let body = format!(r#"{{"name":"vm-{n}","cid":{}}}"#, 100 + n);
        assert_eq!(host.api("POST", "/v1/vms", &body).status, 200);
    }
    host.until("there are no more", |h| {
        h.log().contains("Too many open files").then_some(())
    });
    host.kill_worker();
    another(&host, worker);
    let _control = ports[0].connected();
    host.until("the VM is up again", |h| {
        (h.get("/v1/vms/a")["state"] == "up").then_some(())
    });
}

#[test]
fn a_found_worker_that_is_not_the_user_of_the_database_any_more_is_replaced() {
    let Some((mut host, _ports)) = two() else {
        return;
    };
    let worker = host.worker();
    host.kill_monitor();
    let user = 78_150;
    std::os::unix::fs::chown(host.state_dir(), Some(user), Some(user)).unwrap();
    host.start();
    let now = another(&host, worker);
    let status = fs::read_to_string(format!("/proc/{now}/status")).unwrap();
    assert!(status.contains(&format!("Uid:\t{user}\t")), "{status}");
    let added = host.api("POST", "/v1/vms", r#"{"name":"c","cid":5}"#);
    assert_eq!(added.status, 200);
}

#[test]
fn a_stop_ends_both_in_order_and_leaves_no_socket() {
    let Some((mut host, _ports)) = two() else {
        return;
    };
    let worker = host.worker();
    // As the whole control group gets it.
    let pid = nix::unistd::Pid::from_raw(worker.cast_signed());
    nix::sys::signal::kill(pid, Signal::SIGHUP).unwrap();
    assert_eq!(host.get("/v1/config")["reads"], 1);
    host.terminate();
    assert!(host.ended());
    assert!(!fs::exists(format!("/proc/{worker}")).unwrap());
    let run = host.config_file().with_file_name("run");
    for file in ["aditd.sock", "work.sock", "proxy.addr", "worker.pid"] {
        assert!(!run.join(file).exists(), "{file}");
    }
}

#[test]
fn run_by_an_ordinary_user_it_is_one_process_and_says_so() {
    if !Uid::effective().is_root() {
        println!("skipped: every other test shows it here");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let user = 78_100;
    // Its program and its files where it may reach them.
    let at = dir.path();
    fs::set_permissions(at, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let program = at.join("aditd");
    fs::copy(env!("CARGO_BIN_EXE_aditd"), &program).unwrap();
    let home = at.join("home");
    fs::create_dir(&home).unwrap();
    std::os::unix::fs::chown(&home, Some(user), Some(user)).unwrap();
    let shown = home.display();
    let text = format!(
        "run_dir = \"{shown}/run\"\nstate_dir = \"{shown}/state\"\n[proxy]\nlisten = \"127.0.0.1:0\"\n"
    );
    let config = at.join("aditd.toml");
    fs::write(&config, text).unwrap();
    let log = fs::File::create(at.join("log")).unwrap();
    let mut aditd = Command::new(&program)
        .args(["run", "--port-bin", "/bin/false", "--config"])
        .arg(&config)
        .stdin(Stdio::null())
        .stderr(log)
        .uid(user)
        .gid(user)
        .spawn()
        .unwrap();
    let socket = home.join("run/aditd.sock");
    let begin = std::time::Instant::now();
    while !home.join("run/proxy.addr").exists() {
        assert!(
            begin.elapsed() < crate::host::HANG,
            "{}",
            fs::read_to_string(at.join("log")).unwrap()
        );
        std::thread::sleep(Duration::from_millis(10));
    }
    std::os::unix::net::UnixStream::connect(socket).unwrap();
    let said = fs::read_to_string(at.join("log")).unwrap();
    assert_eq!(said.matches("aditd is one process").count(), 1, "{said}");
    let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", aditd.id())).unwrap();
    assert_eq!(children, "");
    assert!(!home.join("run/worker.pid").exists());
    let _ = aditd.kill();
    aditd.wait().unwrap();
}
