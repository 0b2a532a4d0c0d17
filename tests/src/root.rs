//! A bare Debian for packages: a root directory that mmdebstrap makes once, under target/roots. A test gets it as process 1 and
//! its descendants see it, with an empty `/run`; what it changes there is gone afterwards.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, ensure};

use crate::machine::as_this_machine_can;
use crate::namespace::{ASK, Namespace, PATH, is_up};
use crate::process::{output, wait_for};
use crate::shell::Shell;

const START_LIMIT: Duration = Duration::from_secs(20);
/// Where the root has what was printed by commands that are typed.
const SAID: &str = "/run/said";
/// Where the root has target/package.
pub const PACKAGES: &str = "/mnt";
/// Targets that need nothing: the units of a whole system are not for a namespace.
const TARGETS: [&str; 5] = ["default", "sysinit", "basic", "shutdown", "multi-user"];
/// Places that Debian's own programs write to whenever something is installed, and that are theirs.
const DEBIANS: [&str; 6] = [
    "/var/lib/dpkg/",
    "/var/lib/systemd/deb-systemd-",
    "/var/lib/apt/",
    "/var/cache/",
    "/var/log/",
    "/root/",
];

/// What a root has to start services with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Init {
    /// systemd, which runs.
    Systemd,
    /// The same, and apt has fetched its packages already: there is no network inside.
    Host,
    /// Nothing runs, as in a root that is being built; `systemd-sysusers` is there by itself.
    None,
}

impl Init {
    const fn name(self) -> &'static str {
        match self {
            Self::Systemd => "systemd",
            Self::Host => "host",
            Self::None => "none",
        }
    }

    const fn packages(self) -> &'static str {
        match self {
            Self::Systemd | Self::Host => "systemd,systemd-sysv",
            Self::None => "systemd-standalone-sysusers",
        }
    }
}

/// What a host for VMs installs beside adit.
const FETCHED: &str = "qemu-system-x86 qemu-utils curl sqlite3";

/// Makes a root directory, once. Returns its path.
///
/// # Errors
/// mmdebstrap is not there or fails.
pub fn build(init: Init) -> anyhow::Result<PathBuf> {
    // Of two tests, one makes it.
    static ONE: Mutex<()> = Mutex::new(());
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let roots = crate::target().join("roots");
    let root = roots.join(init.name());
    if root.join("etc/debian_version").exists() {
        return Ok(root);
    }
    fs::create_dir_all(&roots)?;
    let half = roots.join(format!("{}.{}", init.name(), std::process::id()));
    let mut make = Command::new("mmdebstrap");
    make.args(["--quiet", "--variant=minbase", "--format=directory"])
        .args(["--aptopt=Apt::Install-Recommends \"false\"", "--include"])
        .arg(init.packages());
    if init == Init::Host {
        let fetch = format!(
            "--customize-hook=chroot \"$1\" apt-get install -qq -y --download-only {FETCHED}"
        );
        make.args(["--skip=cleanup/apt", &fetch]);
    }
    let made = output(make.arg("bookworm").arg(&half));
    let placed = made.and_then(|_| Ok(fs::rename(&half, &root)?));
    if placed.is_err() && !root.exists() {
        let _ = fs::remove_dir_all(&half);
        placed?;
    }
    Ok(root)
}

/// A running one. Drop ends everything in it.
#[derive(Debug)]
pub struct Root {
    namespace: Namespace,
    _dir: tempfile::TempDir,
}

impl Root {
    /// The reason why there can be none here, if there is one.
    pub fn missing() -> Option<&'static str> {
        Namespace::missing()
    }

    /// Starts it, with this directory of packages. With `network`, which needs a systemd, it has a loopback of its own.
    ///
    /// # Errors
    /// It does not come up. The error contains its log.
    pub fn start(init: Init, network: bool, packages: &Path) -> anyhow::Result<Self> {
        let root = build(init)?;
        let dir = tempfile::Builder::new().prefix("adit-root-").tempdir()?;
        let targets = dir.path().join("units");
        fs::create_dir(&targets)?;
        for target in TARGETS {
            let unit = "[Unit]\nDefaultDependencies=no\n";
            fs::write(targets.join(format!("{target}.target")), unit)?;
        }
        let wants = "[Unit]\nDefaultDependencies=no\nWants=multi-user.target\n";
        fs::write(targets.join("default.target"), wants)?;
        let prepare = format!(
            "{loopback}o={dir}/over; mkdir $o; mount -t tmpfs tmpfs $o; mkdir $o/upper $o/work $o/root\n\
             mount -t overlay overlay -o lowerdir={root},upperdir=$o/upper,workdir=$o/work $o/root; cd $o/root\n\
             mount -t proc proc proc; mount --rbind /sys sys; mount --rbind /dev dev\n\
             mount -t tmpfs -o mode=755 tmpfs run; mkdir run/lock run/units; cp {dir}/units/* run/units\n\
             mount -t tmpfs tmpfs tmp; mount --bind {packages} mnt\n\
             rm -rf usr/lib/systemd/system/*.wants etc/systemd/system/*.wants\n\
             pivot_root . .; umount -l .; cd /\n",
            loopback = if network { "ip link set lo up; " } else { "" },
            dir = dir.path().display(),
            root = root.display(),
            packages = packages.display(),
        );
        let log = dir.path().join("log");
        let namespace = match init {
            Init::Systemd | Init::Host => {
                let units = "/run/units:/etc/systemd/system:/usr/lib/systemd/system";
                Namespace::start(&prepare, units, network, log)?
            }
            // No devices of the machine, no control groups, and no /run/systemd.
            Init::None => Namespace::start_bare(&(prepare + "umount -l /sys\n"), log)?,
        };
        let this = Self {
            namespace,
            _dir: dir,
        };
        let is_ready = || match init {
            Init::Systemd | Init::Host => this.run(&ASK).is_ok_and(|said| is_up(&said)),
            Init::None => this.run(&["test", "!", "-e", "/sys/kernel"]).is_ok(),
        };
        let up = wait_for("the root", START_LIMIT, || Ok(is_ready().then_some(())));
        up.with_context(|| format!("it said:\n{}", this.log()))?;
        Ok(this)
    }

    /// A command inside.
    fn command(&self, args: &[&str]) -> anyhow::Result<Command> {
        let mut command = self.namespace.enter()?;
        command
            .args(["env", "-i", "HOME=/root", "TERM=dumb"])
            .args(["DEBIAN_FRONTEND=noninteractive", "SYSTEMD_PAGER=cat"])
            .arg(format!("PATH={PATH}"))
            .args(args);
        Ok(command)
    }

    /// Runs a command. Returns what it printed.
    ///
    /// # Errors
    /// It fails. The error contains what it said.
    pub fn run(&self, args: &[&str]) -> anyhow::Result<String> {
        let out = output(&mut self.command(args)?)?;
        Ok(String::from_utf8_lossy(&out.stdout).into_owned())
    }

    /// Runs a command that may fail.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn attempt(&self, args: &[&str]) -> anyhow::Result<Output> {
        Ok(self.command(args)?.output()?)
    }

    /// Runs a line of shell.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub fn shell(&self, line: &str) -> anyhow::Result<String> {
        self.run(&["sh", "-ec", line])
    }

    /// A shell that commands are typed into, in this directory of the root, with a QEMU that this machine can run.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn type_in(&self, dir: &str) -> anyhow::Result<Shell> {
        let qemu = self.path("/usr/local/bin/qemu-system-x86_64");
        fs::write(&qemu, as_this_machine_can())?;
        fs::set_permissions(&qemu, fs::Permissions::from_mode(0o755))?;
        self.run(&["mkdir", "-p", dir, SAID])?;
        let path = format!("PATH=/usr/local/bin:{PATH}");
        let bash = format!("cd {dir}; exec bash --norc");
        let mut shell = self.command(&["env", &path, "bash", "-c", &bash])?;
        Shell::start_in(&mut shell, Path::new(SAID), &self.path(SAID))
    }

    /// A path of the root, as it is seen from outside.
    pub fn path(&self, inside: &str) -> PathBuf {
        // Without a process 1 there is no such path.
        let first = self.namespace.first().unwrap_or_default();
        PathBuf::from(format!("/proc/{first}/root{inside}"))
    }

    /// Every file of the root file system and of /run/adit*, with kind, mode, owner, target and, below /etc, its content's sum; but
    /// for the places that Debian's own programs keep.
    ///
    /// # Errors
    /// `find` fails.
    pub fn files(&self) -> anyhow::Result<BTreeMap<String, String>> {
        let listed = self.shell(
            "find / -xdev \\( -type d -printf '%p\\t%y %m %u\\n' -o -printf '%p\\t%y %m %u %l\\n' \\)\n\
             find /run -xdev -path '/run/adit*' -printf '%p\\t%y\\n'\n\
             find /etc -xdev -type f -exec sha256sum {} + | sed 's/^\\([^ ]*\\)  \\(.*\\)/\\2:sum\\t\\1/'",
        )?;
        let mut files = BTreeMap::new();
        for line in listed.lines() {
            let (path, what) = line.split_once('\t').context("find")?;
            if !DEBIANS.iter().any(|place| path.starts_with(place)) {
                files.insert(path.to_owned(), what.to_owned());
            }
        }
        ensure!(files.len() > 1000, "a root of {} files", files.len());
        Ok(files)
    }

    /// What process 1 said.
    pub fn log(&self) -> String {
        self.namespace.log()
    }
}

/// What is in one list of [`Root::files`] and not, or not so, in the other; the first with `-`.
pub fn changes(before: &BTreeMap<String, String>, after: &BTreeMap<String, String>) -> Vec<String> {
    let gone = before
        .iter()
        .filter(|(path, what)| after.get(*path) != Some(what));
    let come = after
        .iter()
        .filter(|(path, what)| before.get(*path) != Some(what));
    let gone = gone.map(|(path, what)| format!("- {path} {what}"));
    gone.chain(come.map(|(path, what)| format!("+ {path} {what}")))
        .collect()
}
