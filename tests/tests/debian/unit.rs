//! The services that adit ships, on a Debian that was booted: what its init system says of it, and what a task may do in it.

use std::fs;
use std::process::Command;

use adit_tests::debian::{Debian, Init};
use adit_tests::guest::Guest;
use adit_tests::host::Host;
use adit_tests::process::wait_for;
use serde_json::Value;

use super::{BOOT, built, freeze, full, upgrade};

pub(super) struct Booted {
    pub(super) guest: Guest,
    pub(super) host: Host,
    debian: Debian,
}

impl Booted {
    /// `None`, with the reason printed, if nothing can be booted.
    pub(super) fn start(init: Init) -> Option<Self> {
        let (bins, debian) = built(init)?;
        let host = Host::start(&bins, &["web-1"]).unwrap();
        host.wait_port("web-1").unwrap();
        // A card, as systemd hands credentials on. The image does not trust its signer yet.
        for args in [
            &["key", "new", "enrol.key", "--role", "card"][..],
            &["card", "new", "web-1", "--sign", "enrol.key", "--word"],
        ] {
            let out = host.adit(args).unwrap();
            assert!(out.status.success());
            fs::write(host.dir().join("card"), out.stdout).unwrap();
        }
        let card = fs::read_to_string(host.dir().join("card")).unwrap();
        let credential = format!(
            "type=11,value=io.systemd.credential:adit.card={}",
            card.trim()
        );
        let (socket, dir) = (host.vhost_socket("web-1"), host.dir().join("web-1"));
        let guest = debian.boot_with(&socket, &dir, &["-smbios", &credential]);
        let booted = Self {
            guest: guest.unwrap(),
            host,
            debian,
        };
        booted.wait_agent();
        println!(
            "{} ready after {} ms",
            init.name(),
            booted.guest.age().as_millis()
        );
        // sshd comes after the agent.
        wait_for("sshd", BOOT, || Ok(booted.try_ssh("true").ok()))
            .unwrap_or_else(|e| panic!("{e}:\n{}", booted.log()));
        // A key that may give it work. Keys are read for every task.
        assert_eq!(booted.adit(&["key", "new", "fleet.key"]).0, 0);
        booted.trust("fleet.key.pub");
        Some(booted)
    }

    /// Puts a public key of the host's directory into the guest.
    pub(super) fn trust(&self, name: &str) {
        let key = fs::read_to_string(self.host.dir().join(name)).unwrap();
        let (dir, key) = ("/etc/adit-guest/trust", key.trim());
        self.ssh(&format!(
            "umask 077; mkdir -p {dir}; echo '{key}' > {dir}/{name}"
        ));
    }

    fn wait_agent(&self) {
        let limit = format!("{}s", BOOT.as_secs());
        let (code, said) = self.adit(&["wait", "web-1", "--for", "agent", "--timeout", &limit]);
        assert_eq!(code, 0, "{said}\n{}", self.log());
    }

    pub(super) fn log(&self) -> String {
        format!("{}\n{}", self.guest.serial(), self.host.log())
    }

    pub(super) fn adit(&self, args: &[&str]) -> (i32, String) {
        let out = self.host.adit(args).unwrap();
        let text = String::from_utf8_lossy(&out.stdout).into_owned()
            + &String::from_utf8_lossy(&out.stderr);
        (out.status.code().unwrap_or(-1), text)
    }

    pub(super) fn try_ssh(&self, command: &str) -> Result<String, String> {
        let mut ssh: Command = self.debian.ssh(self.host.proxy());
        let out = ssh.arg(command).output().unwrap();
        let said = String::from_utf8_lossy(&out.stdout).into_owned();
        if out.status.success() {
            return Ok(said);
        }
        Err(format!("{said}{}", String::from_utf8_lossy(&out.stderr)))
    }

    pub(super) fn ssh(&self, command: &str) -> String {
        self.try_ssh(command)
            .unwrap_or_else(|e| panic!("`{command}`: {e}\n{}", self.log()))
    }

    /// Runs a script as a task. Returns the task's id, its state and what it printed.
    pub(super) fn task(&self, user: &str, script: &str) -> (String, String, String) {
        let script = script.replace('\n', "\n        ");
        let goal = format!(
            "steps:\n  - id: try\n    script:\n      interpreter: /bin/sh\n      run_as: {user}\n      script: |\n        {script}\n"
        );
        std::fs::write(self.host.dir().join("goal.yaml"), goal).unwrap();
        let (code, said) = self.adit(&[
            "goal",
            "apply",
            "goal.yaml",
            "--sign",
            "fleet.key",
            "--to",
            "web-1",
        ]);
        assert_eq!(code, 0, "{said}");
        let goal = said.split_whitespace().nth(1).unwrap_or_default();
        self.adit(&["task", "watch", "--goal", goal, "--timeout", "60s"]);
        let last = self.last_task();
        let text = |key: &str| last[key].as_str().unwrap_or_default().to_owned();
        let id = text("task_id");
        let (_, out) = self.adit(&["task", "output", &id]);
        let (_, err) = self.adit(&["task", "output", &id, "--stream", "stderr"]);
        (id, text("state"), out + &err)
    }

    /// Stops the agent, runs a command, and starts it again.
    fn restart(&self, meanwhile: &str) {
        let script = format!("systemctl stop adit-guest; {meanwhile}; systemctl start adit-guest");
        // The tunnel of this command ends with the agent.
        self.ssh(&format!("systemd-run -q --collect sh -c '{script}'"));
    }

    pub(super) fn last_task(&self) -> Value {
        let (_, list) = self.adit(&["task", "ls", "-o", "json"]);
        let mut all: Vec<Value> = serde_json::from_str(&list).unwrap();
        all.pop().unwrap()
    }
}

/// As root, without anything that a service manager could take away: see `install.rs`.
const AS_ROOT: &str = "set -e
[ \"$(ulimit -Sn)\" -lt 65536 ]
[ \"$(cat /proc/self/oom_score_adj)\" = 0 ]
grep -q '^NoNewPrivs:.*0$' /proc/self/status
grep -q '^Seccomp:.*0$' /proc/self/status
[ \"$(grep CapEff /proc/self/status | cut -f 2)\" = \"$(grep CapEff /proc/1/status | cut -f 2)\" ]
[ \"$(readlink /proc/self/ns/mnt)\" = \"$(readlink /proc/1/ns/mnt)\" ]
touch /usr/bin/written /etc/written /root/written /boot/written
mkdir -p /mnt/t; mount -t tmpfs t /mnt/t; grep -q ' /mnt/t ' /proc/1/mounts; umount /mnt/t
nft add table inet t; nft delete table inet t
sysctl -q -w kernel.hostname=other; sysctl -q -w kernel.hostname=web-1
modprobe dummy
RESTART nginx
apt-get --version > /dev/null; dpkg --configure -a
su deploy -c 'test $(id -un) = deploy'
setsid sleep 1000 > /dev/null 2>&1 < /dev/null &
grep -q adit-tasks /proc/self/cgroup
if grep -q adit-guest.service /proc/self/cgroup; then exit 1; fi
echo all of it";

#[test]
fn the_unit_does_on_systemd_what_it_should() {
    let Some(booted) = Booted::start(Init::Systemd) else {
        return;
    };
    let unit = |property: &str| {
        let said = booted.ssh(&format!("systemctl show adit-guest --value -p {property}"));
        said.trim().to_owned()
    };
    assert_eq!(
        booted.ssh("systemctl is-enabled adit-guest").trim(),
        "enabled"
    );
    assert_eq!(
        booted.ssh("systemctl is-active adit-guest").trim(),
        "active"
    );
    // It does not wait for a network, which there is none of.
    for property in ["After", "Requires", "Requisite", "BindsTo", "Wants"] {
        let of = unit(property);
        assert!(!of.contains("network"), "{property}={of}");
    }
    booted.ssh("systemctl is-system-running --wait || systemctl --failed --no-legend --plain");
    assert_eq!(booted.ssh("systemctl --failed --no-legend --plain"), "");
    println!("{}", booted.ssh("systemd-analyze; systemd-analyze blame --no-pager | grep -n '' | grep -e adit-guest -e '^[1-5]:'"));
    println!(
        "{}",
        booted.ssh("systemd-analyze security --no-pager adit-guest | tail -n 1")
    );

    card_by_credential(&booted);

    // What a task may do.
    let (root_task, state, said) =
        booted.task("root", &AS_ROOT.replace("RESTART", "systemctl restart"));
    assert_eq!(
        (state.as_str(), said.as_str()),
        ("done", "all of it\n"),
        "{}",
        booted.log()
    );
    let (_, state, said) = booted.task("deploy", "id -un; sudo -n id -un");
    assert_eq!((state.as_str(), said.as_str()), ("done", "deploy\nroot\n"));

    // Its lines in the journal have fields to look for.
    let found = booted.ssh(&format!("journalctl -q -o cat VM=web-1 TASK={root_task}"));
    assert!(
        found.contains("started") && found.contains("ended"),
        "{found}"
    );
    let all = booted.ssh("journalctl -q -o cat -u adit-guest");
    assert!(found.lines().all(|l| all.contains(l)), "{all}");

    // Killed, it is started again; a daemon of a task goes on.
    let before = unit("MainPID");
    // It takes along the tunnel that this comes through.
    let _ = booted.try_ssh(&format!("kill -KILL {before}"));
    wait_for("another agent", BOOT, || {
        booted.wait_agent();
        let after = booted.try_ssh("systemctl show adit-guest --value -p MainPID");
        Ok(after.ok().filter(|pid| pid.trim() != before))
    })
    .unwrap();
    assert_eq!(unit("NRestarts"), "1");
    assert_eq!(booted.ssh("pgrep -c -x sleep").trim(), "1");
    let (_, state, said) = booted.task("deploy", "echo again");
    assert_eq!((state.as_str(), said.as_str()), ("done", "again\n"));
    freeze::under_load(&booted);
    freeze::though_all_are_killed(&booted);
    bad_input(&booted);
    no_driver(&booted);
    upgrade::works_or_goes(&booted);
}

/// Where udev has not loaded the driver of the vsock device, the agent has it loaded.
fn no_driver(booted: &Booted) {
    let unload = "until modprobe -r vmw_vsock_virtio_transport; do sleep 1; done; \
        test -e /sys/module/vmw_vsock_virtio_transport || touch /root/unloaded";
    booted.restart(unload);
    wait_for("the driver was unloaded, and is loaded", BOOT, || {
        booted.wait_agent();
        Ok(booted.try_ssh("test -e /root/unloaded").ok())
    })
    .unwrap_or_else(|e| panic!("{e}: {}", booted.log()));
}

/// What is wrong in a guest is one line with its remedy on the console and in the journal, and `adit vm show` says it.
fn bad_input(booted: &Booted) {
    const STATE: &str = "/var/lib/adit-guest";
    const CONFIG: &str = "/etc/adit-guest/adit-guest.toml";
    const DROP_IN: &str = "/run/systemd/system/adit-guest.service.d";
    let shown = || booted.adit(&["vm", "show", "web-1"]).1;
    let wait_shown = |what: &str, is: bool| {
        let seen = wait_for(what, BOOT, || {
            Ok((shown().contains(what) == is).then_some(()))
        });
        seen.unwrap_or_else(|e| panic!("{e}: {}\n{}", shown(), booted.log()));
    };
    let put_card = |vm: &str, more: &[&str]| {
        let new = ["card", "new", vm, "--word", "--sign", "enrol.key"];
        let (status, card) = booted.adit(&[&new[..], more].concat());
        assert_eq!(status, 0, "{card}");
        format!("mkdir -p /etc/adit; echo {} > /etc/adit/card", card.trim())
    };
    // Over when its turn comes: nobody signs one that is over already.
    let soon = jiff::Timestamp::now() + jiff::SignedDuration::from_secs(5);
    let no_card = || String::from("rm /etc/adit/card");
    let cases = [
        (
            "journal-corrupt",
            format!(
                "cp -a {STATE} /root/kept; f={STATE}/journal.redb; n=$(stat -c %s $f); \
                 dd if=/dev/urandom of=$f bs=4096 seek=1 count=$((n / 4096 - 1)) conv=notrunc"
            ),
            format!("rm -r {STATE}; cp -a /root/kept {STATE}"),
        ),
        (
            "journal-unavailable",
            format!("mount --bind {STATE} {STATE}; mount -o remount,bind,ro {STATE}"),
            format!("umount {STATE}"),
        ),
        // The whole root, as it is after an error of the disk.
        (
            "journal-unavailable",
            format!(
                "mkdir -p {DROP_IN}; printf \"[Service]\\nStateDirectory=\\nReadOnlyPaths=/\\nReadWritePaths=/run\\n\" > {DROP_IN}/ro.conf; systemctl daemon-reload"
            ),
            format!("rm -r {DROP_IN}; systemctl daemon-reload"),
        ),
        // The disk is full.
        (
            "no-space",
            format!(
                "cp -a {STATE} /root/kept2; mount -t tmpfs -o size=64k,mode=0700 full {STATE}; cp /root/kept2/enrol* /root/kept2/guest {STATE}; \
                 dd if=/dev/zero of={STATE}/full bs=4096"
            ),
            format!("umount {STATE}"),
        ),
        (
            "card-damaged",
            "mkdir -p /etc/adit; echo nothing > /etc/adit/card".into(),
            no_card(),
        ),
        ("card-foreign", put_card("web-2", &[]), no_card()),
        (
            "card-expired",
            put_card("web-1", &["--not-after", &soon.to_string()]),
            no_card(),
        ),
        // Two cards that are believed, and an image that does not say which of the two VMs it is.
        (
            "card-doubled",
            format!(
                "{}; sed -i s/^vm_id/#vm_id/ {CONFIG}",
                put_card("web-2", &[])
            ),
            format!("{}; sed -i s/^#vm_id/vm_id/ {CONFIG}", no_card()),
        ),
        (
            "it runs no task",
            "mv /etc/adit-guest/trust /root/trust".into(),
            "mv /root/trust /etc/adit-guest/trust".into(),
        ),
    ];
    for (said, breaks, mends) in &cases {
        booted.restart(breaks);
        wait_shown(said, true);
        let code = if said.contains(' ') {
            "no-trust-anchor"
        } else {
            said
        };
        let journal = booted.ssh("journalctl -q -o cat -p err -u adit-guest");
        let line = journal.lines().find(|line| line.contains(code));
        assert!(
            line.is_some_and(|line| line.contains("do=")),
            "{code}: {journal}"
        );
        assert!(booted.guest.serial().contains(code), "{}", booted.log());
        booted.restart(mends);
        wait_shown(said, false);
    }
    // Without vsock nothing is to be seen from outside, so the guest says it on its console and in its journal, and goes on when it
    // is there. A stream that was closed keeps the module for some seconds.
    let without = "echo install vsock /bin/false > /etc/modprobe.d/none.conf; systemctl stop adit-guest; \
                   for n in 1 2 3 4 5 6 7 8 9 10 11 12; do modprobe -q -r vmw_vsock_virtio_transport; \
                   modprobe -q -r vsock_loopback; modprobe -q -r vsock; test -e /sys/module/vsock || break; sleep 1; done; \
                   lsmod | grep vsock > /dev/console; systemctl start adit-guest; sleep 3; \
                   rm /etc/modprobe.d/none.conf; modprobe vmw_vsock_virtio_transport; systemctl restart adit-guest";
    booted.ssh(&format!("systemd-run -q --collect sh -c '{without}'"));
    let said = "this kernel has no vsock";
    let serial = || Ok(booted.guest.serial().contains(said).then_some(()));
    wait_for(said, BOOT / 3, serial).unwrap_or_else(|e| panic!("{e}\n{}", booted.log()));
    let back = wait_for("the agent is back", BOOT, || {
        Ok(booted.try_ssh("true").ok())
    });
    back.unwrap_or_else(|e| panic!("{e}\n{}", booted.log()));
    let journal = booted.ssh("journalctl -q -o cat -u adit-guest");
    let line = journal.lines().find(|line| line.contains(said));
    assert!(line.is_some_and(|l| l.contains("modprobe")), "{journal}");
    // A second one ends with one line.
    let second = booted.try_ssh("/usr/sbin/adit-guest run").unwrap_err();
    assert!(second.contains("another agent"), "{second}");
    // A clock that was never set.
    booted.ssh("date +%s > /root/now; date -s @1000");
    booted.restart("true");
    wait_shown("behind", true);
    booted.ssh("date -s @$(cat /root/now)");
    let (_, state, said) = booted.task("deploy", "echo mended");
    assert_eq!(
        (state.as_str(), said.as_str()),
        ("done", "mended\n"),
        "{}",
        booted.log()
    );
}

/// The card that systemd has from the machine is not believed; once its signer is trusted, a reload has it believed.
fn card_by_credential(booted: &Booted) {
    let shown = || booted.adit(&["vm", "show", "web-1"]).1;
    let said = shown();
    assert!(
        said.contains("card-untrusted") && said.contains("(systemd credential)"),
        "{said}"
    );
    // In the guest too, and there to people as well as to the agent.
    let status = || booted.ssh("adit-guest status");
    let line = |text: &str, key: &str| {
        let line = text.lines().find(|line| line.starts_with(key));
        line.unwrap_or_else(|| panic!("{key}: {text}")).to_owned()
    };
    let said = status();
    assert!(line(&said, "goes by card").ends_with(" none"), "{said}");
    let not_used = line(&said, "not used");
    assert!(
        not_used.contains("card-untrusted") && not_used.contains("(systemd credential)"),
        "{said}"
    );
    booted.trust("enrol.key.pub");
    booted.ssh("systemctl reload adit-guest");
    wait_for("the card is believed", BOOT, || {
        let said = shown();
        Ok((!said.contains("card-untrusted") && said.contains("\ncard ")).then_some(()))
    })
    .unwrap_or_else(|e| panic!("{e}: {}\n{}", shown(), booted.log()));
    let said = status();
    let by = line(&said, "goes by card");
    assert!(
        by.contains(" web-1, generation ") && by.contains(" from systemd credential,"),
        "{said}"
    );
    assert!(!said.contains("\nnot used"), "{said}");
    let place = booted.ssh("journalctl -q -o cat -u adit-guest | grep '^card '");
    assert!(place.contains("place=\"systemd credential\""), "{place}");
}

#[test]
fn the_service_does_on_openrc_what_it_should() {
    if !full() {
        return println!("skipped: only `cargo xtask test --full` boots OpenRC");
    }
    let Some(booted) = Booted::start(Init::Openrc) else {
        return;
    };
    println!(
        "{}",
        booted.ssh("rc-service adit-guest status && rc-status default")
    );
    let as_root = AS_ROOT.replace("RESTART nginx", "rc-service nginx restart > /dev/null");
    let (_, state, said) = booted.task("root", &as_root);
    assert_eq!(
        (state.as_str(), said.as_str()),
        ("done", "all of it\n"),
        "{}",
        booted.log()
    );

    // Killed, it is started again; a daemon of a task goes on.
    let pid = || booted.try_ssh("pidof adit-guest");
    let before = pid().unwrap();
    let _ = booted.try_ssh(&format!("kill -KILL {before}"));
    wait_for("another agent", BOOT, || {
        booted.wait_agent();
        Ok(pid().ok().filter(|after| *after != before))
    })
    .unwrap();
    assert_eq!(booted.ssh("pgrep -c -x sleep").trim(), "1");
    booted.ssh("rc-service adit-guest reload");
    let (_, state, said) = booted.task("deploy", "echo again");
    assert_eq!((state.as_str(), said.as_str()), ("done", "again\n"));
    upgrade::works_or_goes(&booted);
}
