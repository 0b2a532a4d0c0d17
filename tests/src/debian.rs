//! A guest as people run them: Debian 12 with its init system, sshd, nginx and git, on a disk. No network device.
//!
//! What is slow, Debian's root directory and its kernel, is made once (`root.sh`). A changed agent costs only the disk
//! (`image.sh`). Both are cached under `target/guest`, by the digest of what goes in. Each VM has an overlay of that disk.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};

use anyhow::Context;
use sha2::{Digest, Sha256};

use crate::guest::{Accel, Guest, ONE_CPU, emulated_cpu};
use crate::image::Kernel;
use crate::process::output;

const ROOT: &str = include_str!("debian/root.sh");
const IMAGE: &str = include_str!("debian/image.sh");
/// Ours for everybody who makes images.
const STOCK: &str = include_str!("../../guest-driver/dist/debian-image.sh");
/// Memory of a VM, MiB.
const MEMORY_MIB: u32 = 768;

/// Tests that run at the same time would write the same files.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// The init system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Init {
    /// Debian's default.
    Systemd,
    /// Debian's OpenRC.
    Openrc,
}

impl Init {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Systemd => "systemd",
            Self::Openrc => "openrc",
        }
    }
}

/// A disk with what boots from it, enrolled as `web-1`. It trusts no key yet.
#[derive(Clone, Debug)]
pub struct Debian {
    /// `vmlinuz`, `initrd`, `disk.ext4`, and what clients need: `id_ed25519`, `web-1.crt`.
    dir: PathBuf,
}

impl Debian {
    /// The reason why none can be built here, if there is one.
    pub fn missing() -> Option<&'static str> {
        let root = nix::unistd::geteuid().is_root();
        (!root).then_some("building Debian's root directory needs root")
    }

    /// Builds what does not exist yet. `say` is called before each step that takes time.
    ///
    /// # Errors
    /// A package cannot be downloaded, or a tool fails. The error says which.
    pub fn build(kernel: Kernel, init: Init, say: &dyn Fn(&str)) -> anyhow::Result<Self> {
        let _one = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        let base = base(kernel, init);
        let root = make_root(kernel, init, say)?;
        let agent = package();
        let bytes = fs::read(&agent);
        let bytes = bytes.with_context(|| {
            let agent = agent.display();
            format!("no {agent}: `cargo xtask guest-image debian` makes it")
        })?;
        let name = root.file_name().unwrap_or_default();
        let made_of = [IMAGE.as_bytes(), &bytes, name.as_encoded_bytes()];
        let dir = cached(&base, "image", &made_of, |part| {
            say("making Debian's disk");
            fs::create_dir_all(part)?;
            script(
                IMAGE,
                &[root.as_os_str(), part.as_os_str(), agent.as_os_str()],
            )
        })?;
        Ok(Self { dir })
    }

    /// Makes its root directory, which has nothing of ours, if it is not there yet.
    ///
    /// # Errors
    /// As [`Debian::build`].
    pub fn root(kernel: Kernel, init: Init, say: &dyn Fn(&str)) -> anyhow::Result<PathBuf> {
        let _one = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        make_root(kernel, init, say)
    }

    /// Boots it. Its own files are in `dir`; what it writes is in an overlay there.
    ///
    /// # Errors
    /// A file cannot be written, or QEMU does not start.
    pub fn boot(&self, vhost_socket: &Path, dir: &Path) -> anyhow::Result<Guest> {
        self.boot_with(vhost_socket, dir, &[])
    }

    /// The same with more arguments for QEMU.
    ///
    /// # Errors
    /// As [`boot`](Self::boot).
    pub fn boot_with(
        &self,
        vhost_socket: &Path,
        dir: &Path,
        more: &[&str],
    ) -> anyhow::Result<Guest> {
        let overlay = self.overlay(dir)?;
        let (kernel, initrd) = (self.file("vmlinuz"), self.file("initrd"));
        let direct = format!("-kernel {} -initrd {}", kernel.display(), initrd.display());
        let mut args = qemu(vhost_socket, &overlay, &direct, dir);
        let line = "root=/dev/vda rw console=ttyS0 quiet panic=-1 mitigations=off";
        args.extend(["-append", line].map(str::to_owned));
        args.extend(more.iter().map(|arg| (*arg).to_owned()));
        Guest::start(args, dir)
    }

    /// The disk of a VM whose files are in `dir`: an overlay, made if it is not there.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn overlay(&self, dir: &Path) -> anyhow::Result<PathBuf> {
        overlay(&self.file("disk.ext4"), "raw", dir)
    }

    /// One of its files.
    pub fn file(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// `ssh root@web-1` through the proxy; the command is yet to come.
    pub fn ssh(&self, proxy: SocketAddr) -> Command {
        let through = format!(
            "socat - PROXY:{}:%h:%p,proxyport={}",
            proxy.ip(),
            proxy.port()
        );
        let mut ssh = Command::new("ssh");
        ssh.args([
            "-F",
            "none",
            "-o",
            "BatchMode=yes",
            "-o",
            "StrictHostKeyChecking=no",
        ])
        .args(["-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR"])
        .args([
            "-o",
            "ConnectTimeout=30",
            "-o",
            &format!("ProxyCommand={through}"),
            "-i",
        ])
        .arg(self.file("id_ed25519"))
        .arg("root@web-1");
        ssh
    }
}

/// An overlay of a disk, in `dir`, made if it is not there.
fn overlay(disk: &Path, format: &str, dir: &Path) -> anyhow::Result<PathBuf> {
    fs::create_dir_all(dir)?;
    let overlay = dir.join("disk.qcow2");
    if !overlay.exists() {
        let mut create = Command::new("qemu-img");
        create.args(["create", "-q", "-f", "qcow2", "-F", format, "-b"]);
        output(create.arg(disk).arg(&overlay))?;
    }
    Ok(overlay)
}

fn qemu(vhost_socket: &Path, disk: &Path, more: &str, dir: &Path) -> Vec<String> {
    let (accel, cpu) = match Accel::detect() {
        Accel::Kvm => ("kvm", "host".to_owned()),
        Accel::Tcg => ("tcg,thread=multi", emulated_cpu()),
    };
    let (dir, memory) = (dir.display(), format!("{MEMORY_MIB}M"));
    // As in docs/operate.md.
    let text = format!(
        "-M q35 -accel {accel} -cpu {cpu} -smp {ONE_CPU} -m {memory} -nodefaults -no-user-config -display none \
         -object memory-backend-memfd,id=ram,size={memory},share=on -machine memory-backend=ram \
         -chardev socket,id=vu,path={vhost} -device vhost-user-vsock-pci,chardev=vu \
         -drive if=none,id=disk,format=qcow2,cache=unsafe,file={disk} -device virtio-blk-pci,drive=disk {more} \
         -chardev socket,id=tty,path={dir}/serial.sock,server=on,wait=off,logfile={dir}/serial.log -serial chardev:tty \
         -qmp unix:{dir}/qmp.sock,server=on,wait=off",
        vhost = vhost_socket.display(),
        disk = disk.display(),
    );
    text.split_whitespace().map(str::to_owned).collect()
}

/// Makes an image of Debian 12 that boots by itself, with cloud-init, and with these packages of ours.
///
/// # Errors
/// A package cannot be downloaded, or a tool fails.
pub fn make_image(image: &Path, packages: &[PathBuf]) -> anyhow::Result<()> {
    let packages = packages.iter().map(|package| package.as_os_str());
    let args: Vec<_> = [image.as_os_str()].into_iter().chain(packages).collect();
    script(STOCK, &args)
}

/// An image as a distribution has it: nothing of adit is in it. Made once.
///
/// # Errors
/// As [`make_image`].
pub fn stock_image(say: &dyn Fn(&str)) -> anyhow::Result<PathBuf> {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _one = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let base = crate::target().join("guest/debian-stock");
    fs::create_dir_all(&base)?;
    let dir = cached(&base, "image", &[STOCK.as_bytes()], |part| {
        say("making an image of Debian 12 that boots by itself: a minute or two, once");
        fs::create_dir_all(part)?;
        make_image(&part.join("debian-12.qcow2"), &[])
    })?;
    Ok(dir.join("debian-12.qcow2"))
}

/// Boots an overlay of an image that boots by itself, `*.qcow2` or raw; `seed` is a disk for cloud-init.
///
/// # Errors
/// A file cannot be written, or QEMU does not start.
pub fn boot_image(
    image: &Path,
    seed: Option<&Path>,
    vhost_socket: &Path,
    dir: &Path,
) -> anyhow::Result<Guest> {
    let format = match image.extension() {
        Some(name) if name == "qcow2" => "qcow2",
        _ => "raw",
    };
    let overlay = overlay(image, format, dir)?;
    let seed = seed.map_or_else(String::new, |seed| {
        let file = seed.display();
        format!("-drive if=none,id=seed,format=raw,readonly=on,file={file} -device virtio-blk-pci,drive=seed")
    });
    Guest::start(qemu(vhost_socket, &overlay, &seed, dir), dir)
}

/// The agent's package, as `cargo xtask package` makes it.
pub fn package() -> PathBuf {
    let name = concat!("adit-guest_", env!("CARGO_PKG_VERSION"), "-1_amd64.deb");
    crate::packages().join(name)
}

fn base(kernel: Kernel, init: Init) -> PathBuf {
    let kind = format!("debian-{}-{}", kernel.name(), init.name());
    crate::target().join("guest").join(kind)
}

fn make_root(kernel: Kernel, init: Init, say: &dyn Fn(&str)) -> anyhow::Result<PathBuf> {
    let base = base(kernel, init);
    fs::create_dir_all(&base)?;
    let of_kernel = kernel.meta_package();
    let made_of = [ROOT, of_kernel, init.name()].map(str::as_bytes);
    cached(&base, "root", &made_of, |part| {
        say("installing Debian 12 into a directory: a minute or two, once");
        script(
            ROOT,
            &[part.as_os_str(), of_kernel.as_ref(), init.name().as_ref()],
        )
    })
}

/// The directory `what-DIGEST` in `base`. If it is not there, `make` makes it, and those of other digests are removed.
fn cached(
    base: &Path,
    what: &str,
    made_of: &[&[u8]],
    make: impl FnOnce(&Path) -> anyhow::Result<()>,
) -> anyhow::Result<PathBuf> {
    let mut digest = Sha256::new();
    for part in made_of {
        digest.update(part.len().to_le_bytes());
        digest.update(part);
    }
    let digest: String = digest.finalize()[..6]
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect();
    let dir = base.join(format!("{what}-{digest}"));
    if dir.exists() {
        return Ok(dir);
    }
    for old in fs::read_dir(base)?.filter_map(Result::ok) {
        if old.file_name().to_string_lossy().starts_with(what) {
            fs::remove_dir_all(old.path())?;
        }
    }
    let part = base.join(format!("{what}.part"));
    make(&part)?;
    fs::rename(&part, &dir)?;
    Ok(dir)
}

/// Runs a script to its end, in a mount namespace: what it mounts ends with it, also when it is killed.
fn script(text: &str, args: &[&std::ffi::OsStr]) -> anyhow::Result<()> {
    let mut unshare = Command::new("unshare");
    unshare.args([
        "--mount",
        "--pid",
        "--fork",
        "--kill-child",
        "sh",
        "-c",
        text,
        "sh",
    ]);
    output(unshare.args(args)).map(drop)
}
