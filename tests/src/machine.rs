//! A machine to be set up by hand: a shell in namespaces of its own, where `/usr`, `/etc`, `/var` and `/root` are as on this
//! machine and every change of them is gone afterwards, with an empty `/run`, a network of its own and a systemd. What a page
//! tells an administrator to do is done there.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::Context;

use crate::guest::{Accel, emulated_cpu, tsc_arguments};
use crate::namespace::{Namespace, PATH};
use crate::process::wait_for;
use crate::shell::Shell;

const START_LIMIT: Duration = Duration::from_secs(20);
/// Where the machine has its clone of the repository.
pub const CLONE: &str = "/root/adit";

/// What the system manager of the machine boots into: itself and its journal. Units that a service of a whole system comes
/// after are there, and empty.
const UNITS: [(&str, &str); 7] = [
    (
        "default.target",
        "[Unit]\nDefaultDependencies=no\nWants=systemd-journald.service\n",
    ),
    ("sysinit.target", "[Unit]\nDefaultDependencies=no\n"),
    ("basic.target", "[Unit]\nDefaultDependencies=no\n"),
    ("shutdown.target", "[Unit]\nDefaultDependencies=no\n"),
    ("multi-user.target", "[Unit]\nDefaultDependencies=no\n"),
    (
        "systemd-journald.socket",
        "[Unit]\nDefaultDependencies=no\n[Socket]\nListenStream=/run/systemd/journal/stdout\n\
         ListenDatagram=/run/systemd/journal/socket\nPassCredentials=yes\nPassSecurity=yes\nReceiveBuffer=8M\n",
    ),
    (
        "systemd-journald.service",
        "[Unit]\nDefaultDependencies=no\nRequires=systemd-journald.socket\nAfter=systemd-journald.socket\n[Service]\n\
         Type=notify\nExecStart=/lib/systemd/systemd-journald\n",
    ),
];

/// The machine. Dropped = everything in it is gone.
#[derive(Debug)]
pub struct Machine {
    namespace: Namespace,
    shell: Option<Shell>,
    dir: tempfile::TempDir,
}

impl Machine {
    /// Tells why there can be none, if so.
    pub fn missing() -> Option<&'static str> {
        Namespace::missing()
    }

    /// Sets one up; `bins` become the clone's `target/release`.
    ///
    /// # Errors
    /// It does not come up; what it said is in the message.
    pub fn start(bins: &Path) -> anyhow::Result<Self> {
        let dir = tempfile::Builder::new().prefix("adit-machine-").tempdir()?;
        for name in ["over", "units", "bin"] {
            fs::create_dir(dir.path().join(name))?;
        }
        for (name, text) in UNITS {
            fs::write(dir.path().join("units").join(name), text)?;
        }
        let prepare = format!(
            "ip link set lo up; o={dir}/over; mount -t tmpfs tmpfs $o\n\
             over() {{ mkdir -p $o/$2.upper $o/$2.work; mount -t overlay overlay -o lowerdir=$1,upperdir=$o/$2.upper,workdir=$o/$2.work $3; }}\n\
             mkdir $o/bins $o/static; mount --bind {bins} $o/bins; mount --bind {static_bins} $o/static\n\
             for d in usr etc var root; do over /$d $d /$d; done\n\
             mkdir -p {CLONE}; over {root} clone {CLONE}; mkdir -p {CLONE}/target; mount -t tmpfs tmpfs {CLONE}/target\n\
             mkdir -p {CLONE}/target/release {CLONE}/target/{STATIC}\n\
             mount --bind $o/bins {CLONE}/target/release; mount --bind $o/static {CLONE}/target/{STATIC}\n\
             mount -t tmpfs -o mode=755 tmpfs /run; mkdir /run/lock /run/units; cp {dir}/units/* /run/units\n\
             mount -t tmpfs -o mode=755 tmpfs /mnt; mount -t tmpfs -o mode=755 tmpfs /var/log; rm -f /etc/machine-id; \
             echo 0123456789abcdef0123456789abcdef > /etc/machine-id\n\
             printf '[Journal]\\nStorage=volatile\\nReadKMsg=no\\nAudit=no\\n' > /etc/systemd/journald.conf",
            dir = dir.path().display(),
            bins = bins.display(),
            static_bins = crate::target().join(STATIC).display(),
            root = crate::root().display(),
        );
        let log = dir.path().join("systemd.log");
        let units = "/etc/systemd/system:/run/units";
        let mut machine = Self {
            namespace: Namespace::start(&prepare, units, true, log)?,
            shell: None,
            dir,
        };
        let up = wait_for("the machine", START_LIMIT, || {
            let Ok(mut ready) = machine.enter(&["systemctl", "is-system-running"]) else {
                return Ok(None);
            };
            let out = ready.output()?;
            let running = String::from_utf8_lossy(&out.stdout).into_owned();
            Ok(["running", "degraded"]
                .contains(&running.trim())
                .then_some(()))
        });
        up.with_context(|| format!("it said:\n{}", machine.log()))?;
        let mut shell = machine.enter(&["bash", "-c", &format!("cd {CLONE}; exec bash --norc")])?;
        machine.shell = Some(Shell::start(&mut shell, machine.dir.path())?);
        machine.program("qemu-system-x86_64", &as_this_machine_can())?;
        Ok(machine)
    }

    /// A command inside.
    fn enter(&self, args: &[&str]) -> anyhow::Result<Command> {
        let mut command = self.namespace.enter()?;
        command
            .args(["env", "-i", "HOME=/root", "TERM=dumb", "SYSTEMD_PAGER=cat"])
            .arg(format!(
                "PATH={}:{PATH}",
                self.dir.path().join("bin").display()
            ))
            .args(args);
        Ok(command)
    }

    /// Types a command into the machine's shell. Returns its exit status and what it printed.
    ///
    /// # Errors
    /// The shell is gone.
    pub fn run(&mut self, text: &str) -> anyhow::Result<(i32, String)> {
        self.shell.as_mut().context("no shell")?.run(text)
    }

    /// A path of the machine, as it is seen from outside.
    pub fn path(&self, inside: &str) -> PathBuf {
        // Without a process 1 there is no such path.
        let first = self.namespace.first().unwrap_or_default();
        PathBuf::from(format!("/proc/{first}/root{inside}"))
    }

    /// Puts a program into the machine, before those of its system.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn program(&self, name: &str, text: &str) -> anyhow::Result<()> {
        let path = self.dir.path().join("bin").join(name);
        fs::write(&path, text)?;
        Ok(fs::set_permissions(
            path,
            fs::Permissions::from_mode(0o755),
        )?)
    }

    /// What its system manager said.
    pub fn log(&self) -> String {
        self.namespace.log()
    }
}

/// Below a target directory: what guests run.
const STATIC: &str = "x86_64-unknown-linux-musl";

/// A `qemu-system-x86_64` for command lines that name KVM, on whatever machine this is.
pub(crate) fn as_this_machine_can() -> String {
    let (accel, cpu) = match Accel::detect() {
        Accel::Kvm => ("kvm".to_owned(), "host".to_owned()),
        Accel::Tcg => ("tcg,thread=multi".to_owned(), emulated_cpu()),
    };
    format!(
        "#!/bin/bash\nargs=() before=\nfor a; do\n case \"$before $a\" in\n '-accel kvm') a={accel} ;;\n '-cpu host') a={cpu} ;;\n \
         '-append '*) a=\"$a{tsc}\" ;;\n esac\n args+=(\"$a\") before=$a\ndone\nexec /usr/bin/qemu-system-x86_64 \"${{args[@]}}\"\n",
        tsc = tsc_arguments(),
    )
}
