//! A real Debian: `adit exec` and `adit cp` beside ssh with a warm ControlMaster, scp and rsync into the same guest, over the same channel.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use adit_benches::report::{Better, Figure};
use adit_tests::debian::{Debian, Init};
use adit_tests::guest::Guest;
use adit_tests::host::Host;
use adit_tests::image::Kernel;
use adit_tests::process::wait_for;
use anyhow::{Context, ensure};

use crate::Options;

const BOOT: Duration = Duration::from_secs(300);
const POLICY: &str = "default = \"deny\"\n[[exec]]\nallow = \"host\"\nusers = \"any\"\ncommands = \"any\"\n\
                      [[files]]\nallow = \"host\"\nusers = \"any\"\nread = \"any\"\nwrite = \"any\"\n\
                      [[service]]\nnames = [\"tcp:22\"]\n";
/// Commands of a round.
const COMMANDS: u32 = 10;
/// Bytes of the large file.
const LARGE: u64 = 256 << 20;
/// Small files, and bytes of each.
const SMALL: (usize, usize) = (10_000, 4 << 10);
/// Rounds of the copies at most: they take long where the guest is emulated.
const COPIES: usize = 3;

struct Setup {
    host: Host,
    guest: Guest,
    debian: Debian,
    adit: PathBuf,
    /// Of ssh: a connection that is there already.
    master: PathBuf,
}

impl Setup {
    fn new(options: &Options) -> anyhow::Result<Self> {
        let debian = Debian::build(Kernel::V6_1, Init::Systemd, &|what| eprintln!("{what}"))?;
        let host = Host::start(&options.binaries, &["web-1"])?;
        host.wait_port("web-1")?;
        let guest = debian.boot(&host.vhost_socket("web-1"), &host.dir().join("web-1"))?;
        let setup = Self {
            master: host.dir().join("master"),
            adit: options.binaries.join("adit"),
            host,
            guest,
            debian,
        };
        let ready = "systemctl is-system-running --wait > /dev/null; true";
        wait_for("sshd", BOOT, || Ok(setup.ssh(&[ready]).ok()))
            .with_context(|| setup.guest.serial())?;
        let file = "/etc/adit-guest/policy.toml";
        let write = format!("cat > {file} <<'END'\n{POLICY}END\nsystemctl reload adit-guest");
        setup.ssh(&[&write])?;
        wait_for("the policy", BOOT, || Ok(setup.exec(&["true"]).ok()))?;
        Ok(setup)
    }

    /// Options of ssh, as those who use it often have them.
    fn options(&self) -> Vec<String> {
        let of = self.debian.ssh(self.host.proxy());
        let args = of.get_args().map(|arg| arg.to_string_lossy().into_owned());
        let mut args: Vec<String> = args.collect();
        // Whom it is for comes last.
        args.pop();
        let master = format!("ControlPath={}", self.master.display());
        for option in ["ControlMaster=auto", "ControlPersist=600", &master] {
            args.extend(["-o".to_owned(), option.to_owned()]);
        }
        args
    }

    fn ssh(&self, command: &[&str]) -> anyhow::Result<()> {
        let mut ssh = Command::new("ssh");
        ssh.args(self.options()).arg("root@web-1").args(command);
        run(&mut ssh)
    }

    fn adit(&self, args: &[&str]) -> anyhow::Result<()> {
        let mut adit = Command::new(&self.adit);
        let socket = self.host.vm_dir("web-1").join("../../aditd.sock");
        run(adit.args(args).env("ADIT_SOCKET", socket))
    }

    fn exec(&self, command: &[&str]) -> anyhow::Result<()> {
        self.adit(&[&["exec", "web-1", "--"], command].concat())
    }

    fn scp(&self, from: &Path, to: &str) -> anyhow::Result<()> {
        let mut scp = Command::new("scp");
        scp.args(self.options()).args(["-q", "-r"]).arg(from);
        run(scp.arg(format!("root@web-1:{to}")))
    }

    fn rsync(&self, from: &Path, to: &str) -> anyhow::Result<()> {
        // rsync parts the words by itself.
        let options = self
            .options()
            .into_iter()
            .map(|option| format!("'{option}'"));
        let options: Vec<String> = options.collect();
        let mut rsync = Command::new("rsync");
        rsync.args(["-a", "-e", &format!("ssh {}", options.join(" "))]);
        rsync.arg(format!("{}/", from.display()));
        run(rsync.arg(format!("root@web-1:{to}/")))
    }
}

fn run(command: &mut Command) -> anyhow::Result<()> {
    // Not read to its end: the connection that ssh keeps has these open.
    command.stdin(Stdio::null()).stdout(Stdio::null());
    let status = command.stderr(Stdio::null()).status()?;
    ensure!(status.success(), "{command:?}: {status}");
    Ok(())
}

/// Seconds.
fn took(what: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<f64> {
    let begin = Instant::now();
    what()?;
    Ok(begin.elapsed().as_secs_f64())
}

fn commands(run: impl Fn() -> anyhow::Result<()>) -> anyhow::Result<f64> {
    let each = took(|| (0..COMMANDS).try_for_each(|_| run()))? / f64::from(COMMANDS);
    Ok(each * 1e6)
}

/// Bytes that nothing on the way can make fewer.
fn write_source(at: &Path, bytes: usize, seed: u64) -> anyhow::Result<()> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let words = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    let bytes: Vec<u8> = words.flatten().take(bytes).collect();
    Ok(fs::write(at, bytes)?)
}

pub fn figures(options: &Options) -> anyhow::Result<Vec<Figure>> {
    if let Some(why) = Debian::missing() {
        eprintln!("skipped: {why}");
        return Ok(Vec::new());
    }
    let setup = Setup::new(options)?;
    let mut figures = Vec::new();
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for _ in 0..options.rounds {
        ours.push(commands(|| setup.exec(&["true"]))?);
        theirs.push(commands(|| setup.ssh(&["true"]))?);
    }
    let name = "adit exec -- true, a real guest";
    let figure = Figure::alone(name, "us", Better::Lower, &ours);
    figures.push(figure.beside("ssh with a warm ControlMaster", &theirs, 0.5, 0.25));

    let source = setup.host.dir().join("source");
    fs::create_dir(&source)?;
    let (large, small) = (source.join("large"), source.join("small"));
    write_source(&large, usize::try_from(LARGE)?, 1)?;
    fs::create_dir(&small)?;
    for n in 0..SMALL.0 {
        write_source(&small.join(n.to_string()), SMALL.1, n as u64 + 2)?;
    }
    let rounds = options.rounds.min(COPIES);
    // Each into a directory that is not there, and nothing of the one before is still to be written.
    let empty = || setup.ssh(&["rm -rf /root/to; mkdir /root/to; sync"]);
    let name = |path: &Path| path.to_string_lossy().into_owned();
    let mut beside = |what: &str,
                      peer,
                      goals: (f64, f64),
                      ours: &dyn Fn() -> anyhow::Result<()>,
                      theirs: &dyn Fn() -> anyhow::Result<()>,
                      unit,
                      amount: f64| {
        let (mut with, mut without) = (Vec::new(), Vec::new());
        for _ in 0..rounds {
            empty()?;
            with.push(amount / took(ours)?);
            empty()?;
            without.push(amount / took(theirs)?);
        }
        let figure = Figure::alone(what, unit, Better::Higher, &with);
        figures.push(figure.beside(peer, &without, goals.0, goals.1));
        anyhow::Ok(())
    };
    let cp = |from: &Path| setup.adit(&["cp", &name(from), "web-1:/root/to/"]);
    let mb = LARGE as f64 / 1e6;
    beside(
        "adit cp of 256 MiB to a real guest",
        "scp",
        (1.5, 2.0),
        &|| cp(&large),
        &|| setup.scp(&large, "/root/to/"),
        "MB/s",
        mb,
    )?;
    let get = |ours: bool| {
        let back = source.join("back");
        let _ = fs::remove_file(&back);
        match ours {
            true => setup.adit(&["cp", "web-1:/root/to/large", &name(&back)]),
            false => {
                let mut scp = Command::new("scp");
                scp.args(setup.options())
                    .args(["-q", "root@web-1:/root/to/large"]);
                run(scp.arg(&back))
            }
        }
    };
    setup.scp(&large, "/root/large")?;
    let (mut with, mut without) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        setup.ssh(&[
            "mkdir -p /root/to; ln -f /root/large /root/to/large; cat /root/large > /dev/null",
        ])?;
        with.push(mb / took(|| get(true))?);
        without.push(mb / took(|| get(false))?);
    }
    let figure = Figure::alone(
        "adit cp of 256 MiB from a real guest",
        "MB/s",
        Better::Higher,
        &with,
    );
    let from = figure.beside("scp", &without, 1.5, 2.0);
    beside(
        "adit cp of 10,000 files of 4 KiB to a real guest",
        "rsync",
        (3.0, 6.0),
        &|| cp(&small),
        &|| setup.rsync(&small, "/root/to/small"),
        "/s",
        SMALL.0 as f64,
    )?;
    figures.push(from);
    let mut stop = Command::new("ssh");
    let _ = run(stop
        .args(setup.options())
        .args(["-O", "exit", "root@web-1"]));
    Ok(figures)
}
