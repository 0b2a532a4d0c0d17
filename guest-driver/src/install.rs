//! `adit-guest install`: puts agent, service, configuration and trust anchor into an image's root.
//!
//! Every file is written beside its place and renamed, and only if it differs, so that installing twice changes
//! nothing and a cut installation leaves no half file. No link in the image leads out of it (`image`). An existing configuration is replaced: the command line says
//! what the image is to be.

mod image;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use adit_tasks::VmId;

use image::Image;

/// Where the agent goes.
const BINARY: &str = "usr/sbin/adit-guest";
const CONFIG: &str = "etc/adit-guest/adit-guest.toml";
const TRUST_DIR: &str = "etc/adit-guest/trust";

/// The image's init system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Init {
    /// A unit, enabled for multi-user.target.
    Systemd,
    /// A supervised service in runlevel default.
    Openrc,
    /// `/etc/init.d/S50adit-guest`, which supervises by itself.
    Busybox,
}

/// What to install.
#[derive(Clone, Debug)]
pub struct Install<'a> {
    /// The image's root directory.
    pub root: &'a Path,
    /// Its init system.
    pub init: Init,
    /// The id that the image is enrolled with.
    pub vm_id: &'a VmId,
    /// Public key file of the manager.
    pub trust: Option<&'a Path>,
    /// Local TCP ports that the host may reach.
    pub ports: &'a [u16],
    /// The agent's binary.
    pub binary: &'a Path,
}

/// Why it could not be installed.
#[derive(Debug, thiserror::Error)]
#[error("cannot {what} {}", path.display())]
pub struct InstallError {
    what: &'static str,
    path: PathBuf,
    #[source]
    source: io::Error,
}

fn at<'p>(what: &'static str, path: &'p Path) -> impl Fn(io::Error) -> InstallError + 'p {
    move |source| InstallError {
        what,
        path: path.to_owned(),
        source,
    }
}

/// Installs, and returns one line a file for people.
///
/// # Errors
/// Something cannot be read or written; what was written before is complete and harmless.
pub fn install(what: &Install<'_>) -> Result<Vec<String>, InstallError> {
    let root = what.root;
    let image = Image::open(root).map_err(at("use root", root))?;
    let mut said = Vec::new();
    let mut put = |path: &str, content: &[u8], mode: u32| -> Result<(), InstallError> {
        let full = root.join(path);
        let changed = image.place(path, content, mode);
        let changed = changed.map_err(at("write", &full))?;
        said.push(format!(
            "{} /{path}",
            if changed { "wrote " } else { "keeps " }
        ));
        Ok(())
    };
    let binary = fs::read(what.binary).map_err(at("read binary", what.binary))?;
    let key = what
        .trust
        .map(|file| Ok((file, fs::read(file).map_err(at("read key", file))?)))
        .transpose()?;
    put(BINARY, &binary, 0o755)?;
    put(CONFIG, config(what).as_bytes(), 0o600)?;
    if let Some((file, key)) = &key {
        let stem = file
            .file_stem()
            .and_then(|s| s.to_str())
            .unwrap_or("manager");
        put(&format!("{TRUST_DIR}/{stem}.pub"), key, 0o600)?;
    }
    let mut link = None;
    match what.init {
        Init::Systemd => {
            put(
                "etc/systemd/system/adit-guest.service",
                SYSTEMD.as_bytes(),
                0o644,
            )?;
            link = Some((
                "etc/systemd/system/multi-user.target.wants/adit-guest.service",
                "../adit-guest.service",
            ));
        }
        Init::Openrc => {
            put("etc/init.d/adit-guest", OPENRC.as_bytes(), 0o755)?;
            link = Some(("etc/runlevels/default/adit-guest", "/etc/init.d/adit-guest"));
        }
        Init::Busybox => put("etc/init.d/S50adit-guest", BUSYBOX.as_bytes(), 0o755)?,
    }
    if let Some((path, target)) = link {
        let full = root.join(path);
        let changed = image.place_link(path, target);
        let changed = changed.map_err(at("link", &full))?;
        said.push(format!(
            "{} /{path} -> {target}",
            if changed { "wrote " } else { "keeps " }
        ));
    }
    if key.is_none() {
        said.push("no --trust: this image has no trust anchor of ours; its agent serves ports and runs no task".into());
    }
    Ok(said)
}

fn config(what: &Install<'_>) -> String {
    let ports = what
        .ports
        .iter()
        .map(u16::to_string)
        .collect::<Vec<_>>()
        .join(", ");
    format!(
        "# Written by `adit-guest install`.\n\
         vm_id = \"{}\"\ntrust_dir = \"/{TRUST_DIR}\"\nstate_dir = \"/var/lib/adit-guest\"\nallow_ports = [{ports}]\n",
        what.vm_id
    )
}

/// Tasks are children of the agent, and may be told to do whatever root can. So nothing stands here that a child inherits
/// and could not give back: no filter of system calls, no bounding set, no limit, no mount namespace, nothing that switches
/// one of these on by the way (`ProtectClock`, `LockPersonality`, …), no score. What the agent can give back it takes by
/// itself (`protect.rs`). Tasks have cgroups outside of the unit's (`exec/cgroup.rs`); where they cannot, they are below it,
/// and then, too, neither a restart ends the daemons that they left, nor one that runs out of memory the agent.
const SYSTEMD: &str = "\
[Unit]
Description=adit guest agent
After=local-fs.target
ConditionVirtualization=vm
StartLimitIntervalSec=0

[Service]
ExecStartPre=-/sbin/modprobe -q vmw_vsock_virtio_transport
ExecStart=/usr/sbin/adit-guest run
Restart=always
RestartSec=250ms
Delegate=yes
KillMode=process
OOMPolicy=continue
TimeoutStopSec=10
StateDirectory=adit-guest
StateDirectoryMode=0700
UMask=0022
TasksMax=4096

[Install]
WantedBy=multi-user.target
";

/// As for systemd: no limit, no score, no capability. OpenRC ends the supervised process and leaves what is beside it.
const OPENRC: &str = "\
#!/sbin/openrc-run
description=\"adit guest agent\"
supervisor=supervise-daemon
command=/usr/sbin/adit-guest
command_args=run
respawn_delay=1
respawn_max=0
output_log=/var/log/adit-guest.log
error_log=/var/log/adit-guest.log

depend() {
	need localmount
	after modules
}

start_pre() {
	modprobe -q vmw_vsock_virtio_transport || true
}
";

/// The supervising loop is a child of init; `stop` ends the loop first, so that it starts nothing new.
const BUSYBOX: &str = "\
#!/bin/sh
# adit guest agent: start | stop | restart. Starts it again when it ended, whatever ended it: in a moment, or in a second
# if it had only just begun.
PIDFILE=/run/adit-guest.pid
case \"$1\" in
start)
	mkdir -p /run
	if grep -q S50 \"/proc/$(cat $PIDFILE 2>/dev/null)/cmdline\" 2>/dev/null; then exit 0; fi
	modprobe -q vmw_vsock_virtio_transport 2>/dev/null
	(
		agent=
		trap 'kill $agent 2>/dev/null; exit 0' TERM
		while :; do
			read -r began rest </proc/uptime
			/usr/sbin/adit-guest run </dev/null &
			agent=$!
			wait $agent
			read -r now rest </proc/uptime
			if [ $((${now%.*} - ${began%.*})) -ge 1 ]; then sleep 0.1 2>/dev/null && continue; fi
			sleep 1
		done
	) &
	echo $! >$PIDFILE
	;;
stop)
	if grep -q S50 \"/proc/$(cat $PIDFILE 2>/dev/null)/cmdline\" 2>/dev/null; then kill \"$(cat $PIDFILE)\"; fi
	rm -f $PIDFILE
	;;
restart)
	\"$0\" stop
	\"$0\" start
	;;
*)
	echo \"usage: $0 start|stop|restart\" >&2
	exit 2
	;;
esac
";

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::config::Config;

    fn install_into(root: &Path, init: Init, trust: Option<&Path>) -> Vec<String> {
        let vm_id = "web-1".parse().unwrap();
        let binary = root.join("the-binary");
        fs::write(&binary, "ELF").unwrap();
        install(&Install {
            root,
            init,
            vm_id: &vm_id,
            trust,
            ports: &[80, 22],
            binary: &binary,
        })
        .unwrap()
    }

    #[test]
    fn each_init_gets_its_files_and_a_second_run_changes_nothing() {
        for (init, file) in [
            (
                Init::Systemd,
                "etc/systemd/system/multi-user.target.wants/adit-guest.service",
            ),
            (Init::Openrc, "etc/runlevels/default/adit-guest"),
            (Init::Busybox, "etc/init.d/S50adit-guest"),
        ] {
            let dir = tempfile::tempdir().unwrap();
            let key = dir.path().join("manager.pub");
            fs::write(&key, "key").unwrap();
            let said = install_into(dir.path(), init, Some(&key));
            assert!(said.iter().all(|l| l.starts_with("wrote ")), "{said:?}");
            assert!(
                fs::symlink_metadata(dir.path().join(file)).is_ok(),
                "{file}"
            );
            let path = dir.path().join(CONFIG);
            assert_eq!(
                fs::metadata(&path).unwrap().permissions().mode() & 0o777,
                0o600
            );
            let config = Config::load(&path).unwrap();
            assert_eq!(
                (config.vm_id.as_str(), config.allow_ports),
                ("web-1", vec![80, 22])
            );
            assert_eq!(
                fs::read(dir.path().join(TRUST_DIR).join("manager.pub")).unwrap(),
                b"key"
            );
            let said = install_into(dir.path(), init, Some(&key));
            assert!(said.iter().all(|l| l.starts_with("keeps ")), "{said:?}");
        }
    }

    #[test]
    fn without_a_key_it_says_that_no_task_will_run() {
        let dir = tempfile::tempdir().unwrap();
        let said = install_into(dir.path(), Init::Busybox, None);
        assert!(said.last().unwrap().contains("runs no task"));
    }

    /// The script as installed, with a program in the agent's place that tells its pid through a fifo.
    #[test]
    fn the_busybox_script_starts_the_agent_again_after_a_kill_and_stops_it() {
        let _alone = crate::exec::alone();
        use std::io::{BufRead, BufReader};
        use std::process::{Command, Stdio};
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
        let script = BUSYBOX
            .replace("/usr/sbin/adit-guest run", &at("agent"))
            .replace("/run/adit-guest.pid", &at("pid"));
        let image = Image::open(dir.path()).unwrap();
        image.place("S50", script.as_bytes(), 0o755).unwrap();
        assert!(
            Command::new("mkfifo")
                .arg(at("fifo"))
                .status()
                .unwrap()
                .success()
        );
        let agent = format!("#!/bin/sh\necho $$ >{}\nexec sleep 1000\n", at("fifo"));
        image.place("agent", agent.as_bytes(), 0o755).unwrap();
        let run = |verb: &str| {
            let mut command = Command::new(at("S50"));
            assert!(
                command
                    .arg(verb)
                    .stdout(Stdio::null())
                    .stderr(Stdio::null())
                    .status()
                    .unwrap()
                    .success()
            );
        };
        let next_pid = || {
            let mut line = String::new();
            BufReader::new(fs::File::open(at("fifo")).unwrap())
                .read_line(&mut line)
                .unwrap();
            line.trim().parse::<i32>().unwrap()
        };
        run("start");
        let first = next_pid();
        run("start");
        crate::exec::proc::kill(crate::exec::proc::read(first).unwrap().id).unwrap();
        let second = next_pid();
        assert_ne!(first, second);
        let id = crate::exec::proc::read(second).unwrap().id;
        run("stop");
        let alive = || crate::exec::proc::read(second).is_some_and(|p| p.id == id && !p.zombie);
        while alive() {
            std::thread::yield_now();
        }
        assert!(!fs::exists(at("pid")).unwrap());
    }

    #[test]
    fn r114_no_init_gives_the_agent_what_its_tasks_would_inherit() {
        // Of the unit's own, or of its cgroup, in which no task is.
        let harmless = [
            "ExecStartPre",
            "ExecStart",
            "Restart",
            "RestartSec",
            "Delegate",
            "KillMode",
            "OOMPolicy",
            "TimeoutStopSec",
            "StateDirectory",
            "StateDirectoryMode",
            // Every task gets one of its own.
            "UMask",
            "TasksMax",
        ];
        let service = SYSTEMD.split("[Service]").nth(1).unwrap();
        let service = service.split("[Install]").next().unwrap();
        for line in service.lines().filter(|l| !l.is_empty()) {
            let (key, value) = line.split_once('=').unwrap();
            assert!(harmless.contains(&key), "{line}");
            assert!(key != "KillMode" || value == "process", "{line}");
        }
        for (text, init) in [(OPENRC, "OpenRC"), (BUSYBOX, "busybox")] {
            for taken in [
                "ulimit",
                "oom",
                "capabilities",
                "no_new_privs",
                "secbits",
                "rc_cgroup",
            ] {
                assert!(!text.contains(taken), "{init}: {taken}");
            }
        }
    }

    #[test]
    fn systemd_has_nothing_to_say_against_its_unit() {
        let _alone = crate::exec::alone();
        let dir = tempfile::tempdir().unwrap();
        let unit = dir.path().join("adit-guest.service");
        fs::write(&unit, SYSTEMD.replace("/usr/sbin/adit-guest", "/bin/true")).unwrap();
        let verify = std::process::Command::new("systemd-analyze")
            .args(["verify", "--man=no", "--recursive-errors=no"])
            .arg(&unit)
            .output();
        let Ok(out) = verify else {
            return eprintln!("skipped: systemd-analyze is not installed");
        };
        let said = String::from_utf8_lossy(&out.stderr);
        let of_unit = said
            .lines()
            .filter(|l| l.contains("adit-guest"))
            .collect::<Vec<_>>();
        assert!(out.status.success() && of_unit.is_empty(), "{said}");
    }

    #[test]
    fn the_busybox_script_is_valid_shell() {
        let _alone = crate::exec::alone();
        let out = std::process::Command::new("sh")
            .args(["-n", "-c", BUSYBOX])
            .output()
            .unwrap();
        assert!(
            out.status.success(),
            "{}",
            String::from_utf8_lossy(&out.stderr)
        );
    }
}
