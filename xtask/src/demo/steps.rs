//! The demo's steps. Each runs commands that a user would type, and returns its evidence, or what was wrong.

use std::time::{Duration, Instant};

use anyhow::ensure;

use super::BOOT_LIMIT;
use super::stage::{Stage, VMS, expect};

/// A step.
pub struct Step {
    pub name: &'static str,
    pub title: &'static str,
    pub run: fn(&mut Stage) -> anyhow::Result<String>,
}

/// All steps, in order.
pub const ALL: [Step; 10] = [
    Step {
        name: "vms",
        title: "which VMs are there",
        run: vms,
    },
    Step {
        name: "by-name",
        title: "stock curl reaches a server inside each, by name",
        run: by_name,
    },
    Step {
        name: "failures",
        title: "failures have a status and a reason",
        run: failures,
    },
    Step {
        name: "goal",
        title: "a signed goal runs in both",
        run: goal,
    },
    Step {
        name: "refused",
        title: "the guest refuses what was changed after signing, or is for another VM",
        run: refused,
    },
    Step {
        name: "aditd-killed",
        title: "aditd is killed in the middle of a task and of downloads",
        run: aditd_killed,
    },
    Step {
        name: "port-killed",
        title: "a VM's port process is killed, then replaced, under the running VM",
        run: port_killed,
    },
    Step {
        name: "agent-killed",
        title: "the agent is killed in the middle of a task",
        run: agent_killed,
    },
    Step {
        name: "guest-rebooted",
        title: "a guest reboots in the middle of a task",
        run: guest_rebooted,
    },
    Step {
        name: "late-result",
        title: "a result that aditd missed arrives after a reboot",
        run: late_result,
    },
];

fn vms(stage: &mut Stage) -> anyhow::Result<String> {
    let said = stage.adit(&["vm", "ls"])?.text;
    let ready = said
        .lines()
        .filter(|l| VMS.iter().any(|vm| l.starts_with(vm)) && l.contains(" ready "))
        .count();
    ensure!(ready == VMS.len(), "{ready} VMs are ready:\n{said}");
    Ok(said)
}

fn by_name(stage: &mut Stage) -> anyhow::Result<String> {
    let mut pages = String::new();
    for vm in VMS {
        for how in [&[][..], &["-p"]] {
            // With CONNECT curl adds the port by itself.
            let said = stage.curl(&[how, &[&format!("http://{vm}/")]].concat())?;
            expect(&said, &format!("this is {vm}"))?;
            pages += said.lines().last().unwrap_or_default();
            pages.push('\n');
        }
    }
    Ok(pages)
}

fn failures(stage: &mut Stage) -> anyhow::Result<String> {
    let mut evidence = String::new();
    for (url, status, error) in [
        ("http://nobody/", "404", "destination_not_found"),
        ("http://web-1:8080/", "403", "http_request_denied"),
        ("http://web-1:81/", "502", "connection_refused"),
    ] {
        let said = stage.curl(&[url])?;
        ensure!(
            said.starts_with(&format!("HTTP/1.1 {status}")),
            "{url}: {said}"
        );
        expect(
            &said.to_lowercase(),
            &format!("proxy-status: adit; error={error}"),
        )?;
        evidence += &format!("{url}: {status} {error}\n");
    }
    Ok(evidence)
}

const GOAL: &str = "\
steps:
  - id: hello
    script: {interpreter: /bin/sh, script: \"echo hello from $(hostname), kernel $(uname -r)\\n\"}
  - id: motd
    idempotent: true
    file: {path: /etc/motd, content: \"managed by adit\\n\", mode: \"0644\"}
  - id: fails
    continue_on_error: true
    script: {interpreter: /bin/sh, script: \"echo this one fails >&2; exit 3\\n\"}
";

fn goal(stage: &mut Stage) -> anyhow::Result<String> {
    let id = stage.goal("goal.yaml", GOAL, "web-1,web-2", &["--save", "signed.json"])?;
    let tasks = stage.finish(&id)?;
    ensure!(tasks.len() == 6, "{tasks:?}");
    for vm in VMS {
        let of_vm: Vec<_> = tasks
            .iter()
            .filter(|t| t.vm == vm)
            .map(|t| t.state.as_str())
            .collect();
        ensure!(of_vm == ["done", "done", "failed"], "{vm}: {of_vm:?}");
        ensure!(
            tasks
                .iter()
                .any(|t| t.vm == vm && t.output.contains(&format!("hello from {vm}"))),
            "{tasks:?}"
        );
    }
    Ok("6 tasks ended as they should; output and exit status came back".into())
}

fn refused(stage: &mut Stage) -> anyhow::Result<String> {
    // One digit of the goal's id is changed in the signed file.
    let signed = std::fs::read_to_string(stage.host.dir().join("signed.json"))?;
    let tampered = adit_tests::tamper::tamper(&signed)?;
    std::fs::write(stage.host.dir().join("tampered.json"), tampered)?;
    let id = stage.apply(&["apply", "tampered.json", "--to", "web-1"])?;
    let tasks = stage.finish(&id)?;
    ensure!(
        tasks[0].state == "refused" && tasks[0].reason.starts_with("bad-signature"),
        "{tasks:?}"
    );
    let tampered = tasks[0].reason.clone();

    let text = "steps: [{id: hi, script: {interpreter: /bin/sh, script: \"true\"}}]\n";
    stage.goal(
        "one.yaml",
        text,
        "web-1",
        &["--save", "one.json", "--dry-run"],
    )?;
    let said = stage.adit(&["goal", "apply", "one.json", "--to", "web-2"])?;
    ensure!(
        said.code == 1,
        "aditd must refuse it at once: {}",
        said.text
    );
    let id = stage.apply(&["apply", "one.json", "--to", "web-2", "--relay-unchecked"])?;
    let tasks = stage.finish(&id)?;
    ensure!(
        tasks[0].state == "refused" && tasks[0].reason.starts_with("wrong-target"),
        "{tasks:?}"
    );
    Ok(format!("{tampered}\n{}", tasks[0].reason))
}

/// A step that notes on the guest's disk that it has started, then runs for a while.
fn noted(name: &str, then: &str, idempotent: bool) -> String {
    format!(
        "steps:\n  - id: {name}\n    idempotent: {idempotent}\n    script:\n      interpreter: /bin/sh\n      script: |\n        \
         echo begun >> /var/lib/{name}; sync\n        {then}\n"
    )
}

/// How often such a step has started on a VM.
fn begun(stage: &Stage, name: &str, vm: &str) -> anyhow::Result<String> {
    let text = format!(
        "steps: [{{id: count, script: {{interpreter: /bin/sh, script: \"wc -l < /var/lib/{name}\"}}}}]\n"
    );
    let id = stage.goal("count.yaml", &text, vm, &[])?;
    let tasks = stage.finish(&id)?;
    Ok(tasks[0].output.trim().to_owned())
}

fn aditd_killed(stage: &mut Stage) -> anyhow::Result<String> {
    const BYTES: &str = "16777216";
    let id = stage.goal(
        "long.yaml",
        &noted("long", "sleep 3; echo finished", false),
        "web-1",
        &[],
    )?;
    stage.wait_state(&id, "started")?;
    let tunnel = stage.download(true, "http://web-2/slow?mb=16")?;
    let relayed = stage.download(false, "http://web-2/slow?mb=16")?;
    println!(
        "$ kill -9 {} {}    # aditd: monitor and worker",
        stage.host.pid(),
        stage.host.worker()
    );
    stage.host.kill();
    let killed = Instant::now();
    let relayed = relayed.wait_with_output()?;
    let noticed = killed.elapsed();
    ensure!(
        !relayed.status.success(),
        "the download through aditd must end with an error"
    );
    ensure!(
        noticed < Duration::from_secs(2),
        "it ended only after {noticed:?}"
    );
    println!("$ aditd run &");
    stage.host.launch()?;
    let tunnel = tunnel.wait_with_output()?;
    let size = String::from_utf8_lossy(&tunnel.stdout).into_owned();
    ensure!(
        tunnel.status.success() && size == BYTES,
        "tunnel: {size} bytes, {}",
        String::from_utf8_lossy(&tunnel.stderr)
    );
    for vm in VMS {
        stage.wait_agent(vm)?;
    }
    let tasks = stage.finish(&id)?;
    ensure!(tasks.len() == 1 && tasks[0].state == "done", "{tasks:?}");
    let times = begun(stage, "long", "web-1")?;
    ensure!(times == "1", "it began {times} times");
    Ok(format!(
        "the CONNECT download got all {size} bytes, the other one ended after {} ms, the task is done and began once",
        noticed.as_millis()
    ))
}

fn port_killed(stage: &mut Stage) -> anyhow::Result<String> {
    const BOOT_ID: &str = "steps: [{id: boot, script: {interpreter: /bin/sh, script: \"cat /proc/sys/kernel/random/boot_id\"}}]\n";
    let boot_id = |stage: &Stage| {
        let id = stage.goal("boot-id.yaml", BOOT_ID, "web-1", &[])?;
        let tasks = stage.finish(&id)?;
        ensure!(tasks.len() == 1 && tasks[0].state == "done", "{tasks:?}");
        anyhow::Ok(tasks[0].output.trim().to_owned())
    };
    let port_pid = |stage: &Stage| {
        let vm = stage.adit_json(&["vm", "show", "web-1"])?;
        anyhow::Ok(vm["port_pid"].as_i64().unwrap_or(0))
    };
    let before = boot_id(stage)?;
    let id = stage.goal(
        "under.yaml",
        &noted("under", "sleep 3; echo finished", false),
        "web-1",
        &[],
    )?;
    stage.wait_state(&id, "started")?;
    let download = stage.download(true, "http://web-1/slow?mb=16")?;
    let pid = port_pid(stage)?;
    println!("$ kill -9 {pid}    # adit-port of web-1");
    let pid = i32::try_from(pid).map(nix::unistd::Pid::from_raw)?;
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL)?;
    let killed = Instant::now();
    let download = download.wait_with_output()?;
    let noticed = killed.elapsed();
    ensure!(
        !download.status.success(),
        "the download must end with an error"
    );
    let served = adit_tests::process::wait_for("web-1", BOOT_LIMIT, || {
        let out = stage.host.curl(&["http://web-1/"])?;
        let said = String::from_utf8_lossy(&out.stdout).into_owned();
        Ok(said.contains("this is web-1").then(|| killed.elapsed()))
    })?;
    stage.curl(&["http://web-1/"])?;
    stage.wait_agent("web-1")?;
    let tasks = stage.finish(&id)?;
    ensure!(tasks.len() == 1 && tasks[0].state == "done", "{tasks:?}");
    let times = begun(stage, "under", "web-1")?;
    ensure!(times == "1", "it began {times} times");
    // The same on purpose: a reload starts a new adit-port under a running VM.
    let said = stage.adit(&["vm", "reload", "web-1"])?;
    ensure!(said.code == 0, "{}", said.text);
    expect(&stage.curl(&["http://web-1/"])?, "this is web-1")?;
    stage.wait_agent("web-1")?;
    let after = boot_id(stage)?;
    ensure!(before == after, "the VM was rebooted: {before}, {after}");
    Ok(format!(
        "the download ended after {} ms, the next page came after {} ms, the task is done and began once, the VM never stopped",
        noticed.as_millis(),
        served.as_millis()
    ))
}

fn agent_killed(stage: &mut Stage) -> anyhow::Result<String> {
    let kill = "kill -9 $(pidof adit-guest); sleep 30";
    let id = stage.goal("cut.yaml", &noted("cut", kill, false), "web-1", &[])?;
    let tasks = stage.finish(&id)?;
    ensure!(
        tasks.len() == 1 && tasks[0].state == "interrupted",
        "{tasks:?}"
    );
    let times = begun(stage, "cut", "web-1")?;
    ensure!(times == "1", "it began {times} times");
    let once = "[ $(wc -l < /var/lib/again) -gt 1 ] || { kill -9 $(pidof adit-guest); sleep 30; }";
    let id = stage.goal("again.yaml", &noted("again", once, true), "web-1", &[])?;
    let tasks = stage.finish(&id)?;
    let ends: Vec<_> = tasks
        .iter()
        .map(|t| (t.attempt, t.state.as_str()))
        .collect();
    ensure!(ends == [(1, "interrupted"), (2, "done")], "{tasks:?}");
    let times = begun(stage, "again", "web-1")?;
    ensure!(times == "2", "it began {times} times");
    Ok("interrupted and not run again; the idempotent one was run again, and is done".into())
}

fn guest_rebooted(stage: &mut Stage) -> anyhow::Result<String> {
    let id = stage.goal(
        "boot.yaml",
        &noted("boot", "reboot -f; sleep 30", false),
        "web-2",
        &[],
    )?;
    stage.guests[1].wait_ready(BOOT_LIMIT)?;
    stage.wait_agent("web-2")?;
    let tasks = stage.finish(&id)?;
    ensure!(
        tasks.len() == 1 && tasks[0].state == "interrupted",
        "{tasks:?}"
    );
    let times = begun(stage, "boot", "web-2")?;
    ensure!(times == "1", "it began {times} times");
    Ok("interrupted, begun once; the VM is back with the same channel".into())
}

fn late_result(stage: &mut Stage) -> anyhow::Result<String> {
    let id = stage.goal(
        "late.yaml",
        &noted("late", "sleep 1; echo finished", false),
        "web-2",
        &[],
    )?;
    stage.wait_state(&id, "started")?;
    println!(
        "$ kill -9 {} {}    # aditd: monitor and worker",
        stage.host.pid(),
        stage.host.worker()
    );
    stage.host.kill();
    // The agent prints on its console when the result is on its disk.
    stage.guests[1].wait_serial("result on the guest's disk", BOOT_LIMIT, |log| {
        let since = log.rfind("step=late").unwrap_or(log.len());
        log[since..].contains("adit-guest: ended")
    })?;
    println!(
        "$ kill -9 {}; qemu-system-x86_64 …    # web-2 is power-cycled",
        stage.guests[1].pid()
    );
    stage.guests[1].power_cycle()?;
    stage.guests[1].wait_ready(BOOT_LIMIT)?;
    println!("$ aditd run &");
    stage.host.launch()?;
    stage.wait_agent("web-2")?;
    let tasks = stage.finish(&id)?;
    ensure!(
        tasks.len() == 1 && tasks[0].state == "done" && tasks[0].output.contains("finished"),
        "{tasks:?}"
    );
    let times = begun(stage, "late", "web-2")?;
    ensure!(times == "1", "it began {times} times");
    Ok("done, with its output, begun once".into())
}
