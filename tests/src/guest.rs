//! A guest: a QEMU process without a network device, with its serial line in a file.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

use crate::image::Image;
use crate::process::{Reaped, bound, wait_for};

/// The environment variable with QEMU's CPU model; the default is `max`. Tests leave `erms` and `fsrm` out: a guest's kernel uses
/// string moves as the fast way if it has them, but QEMU emulates them a byte at a time, and would spend most of its time there.
/// Benches keep QEMU's default, as its users do.
pub const CPU: &str = "ADIT_TEST_CPU";

/// How the guest's instructions run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accel {
    /// On the processor.
    Kvm,
    /// Emulated by QEMU.
    Tcg,
}

impl Accel {
    /// KVM if this machine's KVM can boot Linux, otherwise emulation.
    pub fn detect() -> Self {
        match Self::plain_kvm() {
            Ok(()) => Self::Kvm,
            Err(_) => Self::Tcg,
        }
    }

    /// Checks that the processor has virtualization and that /dev/kvm opens. A nested KVM without both cannot boot Linux.
    ///
    /// # Errors
    /// The reason why this machine's KVM cannot boot Linux.
    pub fn plain_kvm() -> Result<(), String> {
        fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/kvm")
            .map_err(|e| format!("/dev/kvm: {e}"))?;
        let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let flags = info
            .lines()
            .find(|l| l.starts_with("flags"))
            .unwrap_or_default();
        if flags.split_whitespace().any(|f| f == "vmx" || f == "svm") {
            return Ok(());
        }
        Err("/dev/kvm opens, but the processor has neither vmx nor svm".into())
    }

    /// The name, as QEMU and people write it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }
}

/// The guest's identity, and the socket of its device.
#[derive(Clone, Debug)]
pub struct Identity<'a> {
    /// Host name, and the agent's VM id.
    pub name: &'a str,
    /// The vhost-user socket of its port process.
    pub vhost_socket: &'a Path,
    /// The agent to install; `None`: a guest without it.
    pub agent: Option<&'a Path>,
    /// The manager's public key.
    pub trust: Option<&'a Path>,
    /// More shell text that the guest runs when it is up.
    pub script: &'a str,
    /// Puts kernel and initramfs into the guest's /boot, so that it can start them itself.
    pub boot_files: bool,
}

/// An ivshmem function for a guest.
#[derive(Clone, Copy, Debug)]
pub struct Ring<'a> {
    /// The server's socket.
    pub socket: &'a Path,
    /// Behind an IOMMU (a q35 machine), so that the guest can receive its interrupts.
    pub iommu: bool,
    /// Additional parameters for the kernel.
    pub parameters: &'a str,
}

/// How a guest that is not told its VM id is handed its card.
#[derive(Clone, Copy, Debug)]
pub enum Carried<'a> {
    /// As a file in its image, put there by whatever this says: `adit image inject`, for example, and its arguments but the last,
    /// which is the image's root directory.
    Injected(&'a [&'a str]),
    /// As an SMBIOS string: a q35 machine.
    Smbios(&'a str),
    /// By QEMU's configuration device.
    FwCfg(&'a str),
    /// On the kernel's command line.
    CommandLine(&'a str),
}

/// A running guest.
#[derive(Debug)]
pub struct Guest {
    qemu: Reaped,
    dir: PathBuf,
    started: Instant,
    boots: usize,
    args: Vec<String>,
}

/// Memory of a guest, MiB.
const MEMORY_MIB: u32 = 256;

impl Guest {
    /// Boots a guest. Its files are in `dir`.
    ///
    /// # Errors
    /// A file cannot be written, or QEMU or the agent's installer does not start.
    pub fn boot(image: &Image, who: &Identity<'_>, dir: &Path) -> anyhow::Result<Self> {
        Self::boot_as(image, who, None, None, dir)
    }

    /// Boots a guest that is who its card says.
    ///
    /// # Errors
    /// As [`Guest::boot`].
    pub fn boot_by_card(
        image: &Image,
        who: &Identity<'_>,
        card: Carried<'_>,
        dir: &Path,
    ) -> anyhow::Result<Self> {
        Self::boot_as(image, who, None, Some(card), dir)
    }

    /// Boots a guest with an ivshmem function.
    ///
    /// # Errors
    /// As [`Guest::boot`].
    pub fn boot_with(
        image: &Image,
        who: &Identity<'_>,
        ring: Option<Ring<'_>>,
        dir: &Path,
    ) -> anyhow::Result<Self> {
        Self::boot_as(image, who, ring, None, dir)
    }

    fn boot_as(
        image: &Image,
        who: &Identity<'_>,
        ring: Option<Ring<'_>>,
        card: Option<Carried<'_>>,
        dir: &Path,
    ) -> anyhow::Result<Self> {
        fs::create_dir_all(dir)?;
        let initrd = dir.join("initrd");
        let root = overlay_of(who, card.is_none(), dir)?;
        if let Some(Carried::Injected(command)) = card {
            let mut inject = std::process::Command::new(command[0]);
            crate::process::output(inject.args(&command[1..]).arg(&root))?;
        }
        image.with_overlay(&root, &initrd)?;
        if who.boot_files {
            let boot = root.join("boot");
            fs::create_dir_all(&boot)?;
            fs::copy(&image.bzimage, boot.join("vmlinuz"))?;
            fs::copy(&initrd, boot.join("initrd"))?;
            image.with_overlay(&root, &initrd)?;
        }
        let disk = dir.join("state.ext4");
        if !disk.exists() {
            fs::copy(&image.disk, &disk)?;
        }
        let args = qemu_args(image, who, ring, card, &initrd, &disk, dir);
        Self::start(args, dir)
    }

    /// Starts QEMU with these arguments. They put its serial line and its monitor into `dir`.
    ///
    /// # Errors
    /// It does not start.
    pub(crate) fn start(args: Vec<String>, dir: &Path) -> anyhow::Result<Self> {
        let qemu = start(&args, dir)?;
        Ok(Self {
            qemu,
            dir: dir.to_owned(),
            started: Instant::now(),
            boots: 1,
            args,
        })
    }

    /// Types on the guest's serial line.
    ///
    /// # Errors
    /// QEMU is gone.
    pub fn press(&self, keys: &[u8]) -> anyhow::Result<()> {
        let mut line = UnixStream::connect(self.dir.join("serial.sock"))?;
        Ok(line.write_all(keys)?)
    }

    /// Sends QEMU a QMP command. `stop` and `cont` are what `virsh suspend`, `virsh resume` and a backup use.
    ///
    /// # Errors
    /// QEMU is gone, or refuses.
    pub fn qmp(&self, command: &str) -> anyhow::Result<()> {
        let mut line = UnixStream::connect(self.dir.join("qmp.sock"))?;
        line.set_read_timeout(Some(Duration::from_secs(30)))?;
        let mut said = BufReader::new(line.try_clone()?).lines();
        // First the greeting, then an answer to each command. Events may come in between.
        let mut heard = |what: &str| -> anyhow::Result<()> {
            loop {
                let answer = said.next().context("QEMU closed the connection")??;
                if answer.contains("\"error\"") {
                    bail!("{command}: {answer}");
                }
                if answer.contains(what) {
                    return Ok(());
                }
            }
        };
        heard("\"QMP\"")?;
        for command in ["qmp_capabilities", command] {
            writeln!(line, "{{\"execute\": \"{command}\"}}")?;
            heard("\"return\"")?;
        }
        Ok(())
    }

    /// Kills QEMU, as a power cut would.
    ///
    /// # Errors
    /// It cannot be killed.
    pub fn kill(&mut self) -> anyhow::Result<()> {
        Ok(self.qemu.kill()?)
    }

    /// Waits until QEMU has ended: the guest has switched itself off.
    ///
    /// # Errors
    /// It does not end.
    pub fn wait_end(&mut self, limit: Duration) -> anyhow::Result<()> {
        let ended = wait_for("QEMU's end", limit, || {
            Ok(self.qemu.0.try_wait()?.map(drop))
        });
        ended.with_context(|| format!("guest in {}:\n{}", self.dir.display(), self.said()))
    }

    /// Kills QEMU if it still runs, and boots again with the same disk.
    ///
    /// # Errors
    /// QEMU does not start.
    pub fn power_cycle(&mut self) -> anyhow::Result<()> {
        self.kill()?;
        self.qemu = start(&self.args, &self.dir)?;
        self.started = Instant::now();
        self.boots = 1;
        Ok(())
    }

    /// Waits for the next "ready" on the serial line. Returns the time since QEMU's start.
    ///
    /// # Errors
    /// "Ready" does not come, or QEMU ends. The error contains the end of the serial log.
    pub fn wait_ready(&mut self, limit: Duration) -> anyhow::Result<Duration> {
        let want = self.boots;
        self.wait_serial(&format!("boot {want}"), limit, |log| {
            log.matches("ADIT-READY").count() >= want
        })?;
        self.boots += 1;
        Ok(self.started.elapsed())
    }

    /// Waits until the serial log satisfies a condition.
    ///
    /// # Errors
    /// As [`Guest::wait_ready`].
    pub fn wait_serial(
        &mut self,
        what: &str,
        limit: Duration,
        ok: impl Fn(&str) -> bool,
    ) -> anyhow::Result<()> {
        let found = wait_for(what, limit, || {
            if ok(&self.serial()) {
                return Ok(Some(()));
            }
            match self.qemu.0.try_wait()? {
                Some(status) => bail!("QEMU ended: {status}"),
                None => Ok(None),
            }
        });
        found.with_context(|| format!("guest in {}:\n{}", self.dir.display(), self.said()))
    }

    /// The serial log so far.
    pub fn serial(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.dir.join("serial.log")).unwrap_or_default())
            .into_owned()
    }

    /// Time since QEMU's start.
    pub fn age(&self) -> Duration {
        self.started.elapsed()
    }

    /// Process id of QEMU.
    pub fn pid(&self) -> u32 {
        self.qemu.pid()
    }

    /// The end of the serial log, and QEMU's own output.
    fn said(&self) -> String {
        let (log, err) = (
            self.serial(),
            fs::read_to_string(self.dir.join("qemu.err")).unwrap_or_default(),
        );
        let skip = log.lines().count().saturating_sub(20);
        let noise = |l: &&str| !l.contains("TCG doesn't support requested feature");
        log.lines()
            .skip(skip)
            .chain(err.lines().filter(noise))
            .collect::<Vec<_>>()
            .join("\n")
    }
}

/// Makes the VM's own files: host name, agent, trust anchor.
pub(crate) fn overlay(who: &Identity<'_>, dir: &Path) -> anyhow::Result<PathBuf> {
    overlay_of(who, true, dir)
}

/// `by_id`: the agent is told its VM id, so that it needs no card.
fn overlay_of(who: &Identity<'_>, by_id: bool, dir: &Path) -> anyhow::Result<PathBuf> {
    let root = dir.join("overlay");
    fs::create_dir_all(root.join("etc"))?;
    fs::write(root.join("etc/hostname"), format!("{}\n", who.name))?;
    fs::write(root.join("etc/adit-test"), who.script)?;
    if let Some(agent) = who.agent {
        let mut install = std::process::Command::new(agent);
        install.args(["install", "--init", "busybox", "--allow-port", "80,7,81,22"]);
        if by_id {
            install.args(["--vm-id", who.name]);
        }
        install.arg("--root").arg(&root);
        if let Some(trust) = who.trust {
            install.arg("--trust").arg(trust);
        }
        crate::process::output(&mut install)?;
    }
    Ok(root)
}

/// What is emulated where there is no KVM.
pub(crate) fn emulated_cpu() -> String {
    std::env::var(CPU).unwrap_or_else(|_| "max".to_owned())
}

/// One processor, which knows that there could be another: where there cannot, QEMU before 8.1 leaves memory barriers out of what it
/// translates, and the devices' processes are others for which the guest's kernel has them.
pub(crate) const ONE_CPU: &str = "1,maxcpus=2";

/// Kernel parameters with the TSC's frequency. Without a PIT the kernel sometimes hangs when it measures the TSC against an
/// emulated timer.
pub(crate) fn tsc_arguments() -> String {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let mhz = info
        .lines()
        .find_map(|l| l.strip_prefix("cpu MHz"))
        .and_then(|l| l.split(':').nth(1));
    mhz.map_or(String::new(), |m| {
        format!(" tsc_early_khz={} tsc=reliable", m.trim().replace('.', ""))
    })
}

fn qemu_args(
    image: &Image,
    who: &Identity<'_>,
    ring: Option<Ring<'_>>,
    card: Option<Carried<'_>>,
    initrd: &Path,
    disk: &Path,
    dir: &Path,
) -> Vec<String> {
    let accel = Accel::detect();
    let cpu = match accel {
        Accel::Kvm => "host".to_owned(),
        Accel::Tcg => emulated_cpu(),
    };
    let accel = if accel == Accel::Kvm {
        "kvm"
    } else {
        "tcg,thread=multi"
    };
    let tsc = tsc_arguments();
    let word = match card {
        Some(Carried::CommandLine(card)) => format!(" adit.card={card}"),
        _ => String::new(),
    };
    let memory = format!("{MEMORY_MIB}M");
    let iommu = ring.is_some_and(|ring| ring.iommu);
    let (machine, more) = match (iommu, accel) {
        (false, _) if matches!(card, Some(Carried::Smbios(_))) => ("q35", ""),
        (false, _) => ("microvm,pcie=on", ""),
        // Behind an IOMMU interrupts are remapped, which KVM's own interrupt chip cannot do.
        (true, "kvm") => ("q35,kernel-irqchip=split", " intel_iommu=on"),
        (true, _) => ("q35", " intel_iommu=on"),
    };
    let mut args: Vec<String> = [
        "-accel",
        accel,
        "-cpu",
        &cpu,
        "-smp",
        ONE_CPU,
        "-m",
        &memory,
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-M",
        machine,
        "-object",
        &format!("memory-backend-memfd,id=ram,size={memory},share=on"),
        "-machine",
        "memory-backend=ram",
        "-chardev",
        &format!(
            "socket,id=tty,path={0}/serial.sock,server=on,wait=off,logfile={0}/serial.log",
            dir.display()
        ),
        "-serial",
        "chardev:tty",
        "-kernel",
        &image.vmlinux.display().to_string(),
        "-initrd",
        &initrd.display().to_string(),
        "-append",
        &format!(
            "console=ttyS0 quiet panic=1 reboot=t mitigations=off{tsc}{more}{word} {}",
            ring.map_or("", |ring| ring.parameters)
        ),
        "-chardev",
        &format!("socket,id=vu,path={}", who.vhost_socket.display()),
        "-device",
        "vhost-user-vsock-pci-non-transitional,chardev=vu",
        "-drive",
        &format!("if=none,id=state,format=raw,file={}", disk.display()),
        "-device",
        "virtio-blk-pci-non-transitional,drive=state",
        "-qmp",
        &format!("unix:{}/qmp.sock,server=on,wait=off", dir.display()),
    ]
    .map(str::to_owned)
    .into();
    if let Some(ring) = ring {
        let socket = format!("socket,id=ring,path={}", ring.socket.display());
        let device = "ivshmem-doorbell,chardev=ring,vectors=2";
        args.extend(["-chardev", &socket, "-device", device].map(str::to_owned));
    }
    if let Some(Carried::FwCfg(card)) = card {
        let file = format!("name=opt/io.adit.card,string={card}");
        args.extend(["-fw_cfg", &file].map(str::to_owned));
    }
    if let Some(Carried::Smbios(card)) = card {
        let string = format!("type=11,value=io.adit.card={card}");
        args.extend(["-smbios", &string].map(str::to_owned));
    }
    if iommu {
        args.extend(["-device", "intel-iommu,intremap=on"].map(str::to_owned));
    }
    args
}

fn start(args: &[String], dir: &Path) -> anyhow::Result<Reaped> {
    let err = fs::File::create(dir.join("qemu.err"))?;
    fs::write(dir.join("serial.log"), "")?;
    let child = bound("qemu-system-x86_64")
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(err)
        .spawn()
        .context("cannot start qemu-system-x86_64: apt-get install qemu-system-x86")?;
    Ok(Reaped(child))
}
