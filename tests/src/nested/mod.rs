//! A guest that runs guests: a Debian guest (L1) on QEMU's emulated processor with SVM has a real /dev/kvm, in which `adit-vmm`
//! boots Debian (L2). So the complete VMM can be tested on any machine.

mod emulator;
mod served;
mod stock;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, bail};

use self::emulator::Processor;
pub use self::served::Served;
use crate::guest::{Identity, ONE_CPU, overlay, tsc_arguments};
use crate::image::Image;
use crate::process::{Reaped, bound, output, wait_for};
use crate::sshd;

/// Memory of L1, MiB: for its root, and for two guests at a time.
const MEMORY_MIB: u32 = 1536;

/// L1 runs this first.
const PREPARE: &str = r#"
mount -t tmpfs tmpfs /tmp
for m in $(cat /lib/adit/kvm); do [ -d /sys/module/$m ] || insmod /lib/adit/$m.ko; done
[ -c /dev/kvm ] || echo "NESTED-FAIL no /dev/kvm in L1"
"#;

/// The path in L1 of the target directory of [`Nested::itself`].
const TARGET: &str = "/target";
/// Makes that directory look as if nothing had to be built: files that are not needed are empty, files that are built from others
/// are newer than those, and apt-cache reports the kernel that is there.
pub const BUILT: &str = r#"
export CARGO_TARGET_DIR=/target ADIT_TEST_BINS=/target/debug
printf '#!/bin/sh\necho "Depends: %s"\n' $(ls /target/guest/cache) > /bin/apt-cache
chmod +x /bin/apt-cache
touch /target/guest/cache/$(ls /target/guest/cache)/vmlinux /target/guest/state.ext4 /target/guest/initrd-*
"#;

const HOSTILE_KERNEL: &str = include_str!("hostile_kernel.s");
/// Shell functions for L1's scripts.
pub const HELPERS: &str = include_str!("helpers.sh");
const HOSTILE: &str = include_str!("hostile.sh");

/// A guest in L1.
#[derive(Clone, Debug)]
pub struct Inner<'a> {
    /// What it boots. In L1 this is /l2/NAME/{vmlinux or bzimage,initrd}.
    pub image: &'a Image,
    /// Its identity.
    pub identity: Identity<'a>,
    /// Boots the bzImage in place of the ELF kernel.
    pub packed: bool,
    /// Has an SSH server ([`sshd`]), with which this public key is root.
    pub ssh: Option<&'a Path>,
}

impl Inner<'_> {
    /// Writes what it boots below `to`. Intermediate files go to `dir`.
    fn write(&self, to: &Path, dir: &Path) -> anyhow::Result<()> {
        let to = to.join(self.identity.name);
        fs::create_dir_all(&to)?;
        let dir = dir.join(self.identity.name);
        let files = overlay(&self.identity, &dir)?;
        if let Some(key) = self.ssh {
            sshd::install(&files, key, &dir.join("stripped"))?;
        }
        self.image.with_overlay(&files, &to.join("initrd"))?;
        match self.packed {
            false => fs::copy(&self.image.vmlinux, to.join("vmlinux"))?,
            true => fs::copy(&self.image.bzimage, to.join("bzimage"))?,
        };
        Ok(())
    }
}

/// Runs a script for L1 on this machine itself, whose KVM can boot Linux. `programs` are in its path. Returns its output.
///
/// # Errors
/// A file cannot be written, or the script does not end in time.
pub fn here(
    inner: &[Inner<'_>],
    programs: &[PathBuf],
    script: &str,
    dir: &Path,
    limit: Duration,
) -> anyhow::Result<String> {
    let bin = dir.join("bin");
    fs::create_dir_all(&bin)?;
    for program in programs {
        let name = program.file_name().context("no program")?;
        std::os::unix::fs::symlink(program, bin.join(name))?;
    }
    let l2 = dir.join("l2");
    for guest in inner {
        guest.write(&l2, dir)?;
    }
    let mut path = bin.into_os_string();
    path.push(":/sbin:/usr/sbin:");
    path.push(std::env::var_os("PATH").unwrap_or_default());
    let log = fs::File::create(dir.join("serial.log"))?;
    // Ends what the script leaves running.
    let script = format!("trap 'kill $(jobs -p) 2>/dev/null' EXIT\n{script}");
    let mut shell = bound("sh")
        .args(["-c", &script])
        .env("PATH", path)
        .env("T", dir)
        .env("L2", l2)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .map(Reaped)?;
    let ended = wait_for("the script's end", limit, || Ok(shell.0.try_wait()?));
    ended.with_context(|| serial(dir))?;
    Ok(serial(dir))
}

/// A running L1.
#[derive(Debug)]
pub struct Nested {
    qemu: Reaped,
    image: Image,
    processor: Processor,
    dir: PathBuf,
}

impl Nested {
    /// Boots L1 with the files of the guests `inner` and with `programs` (host path, path in L1), and runs `script` in it.
    ///
    /// # Errors
    /// A file cannot be read or written, or QEMU does not start.
    pub fn boot(
        image: &Image,
        inner: &[Inner<'_>],
        programs: &[(PathBuf, String)],
        script: &str,
        dir: &Path,
    ) -> anyhow::Result<Self> {
        let who = Identity {
            name: "l1",
            vhost_socket: Path::new(""),
            agent: None,
            trust: None,
            script: &format!("{PREPARE}{script}"),
            boot_files: false,
        };
        fs::create_dir_all(dir)?;
        let root = overlay(&who, dir)?;
        let modules = root.join("lib/adit");
        fs::create_dir_all(&modules)?;
        let mut order = String::new();
        for (name, bytes) in image.kvm_modules()? {
            fs::write(modules.join(format!("{name}.ko")), bytes)?;
            order.push_str(&format!("{name}\n"));
        }
        fs::write(modules.join("kvm"), order)?;
        for (from, to) in programs {
            let to = root.join(to.trim_start_matches('/'));
            fs::create_dir_all(to.parent().context("a path in L1 has a directory")?)?;
            fs::copy(from, &to).with_context(|| format!("no {}", from.display()))?;
            fs::set_permissions(&to, fs::Permissions::from_mode(0o755))?;
        }
        for guest in inner {
            guest.write(&root.join("l2"), dir)?;
        }
        let initrd = dir.join("initrd");
        image.with_overlay(&root, &initrd)?;
        fs::remove_dir_all(&root)?;
        let processor = Processor::take()?;
        let qemu = start(image, &initrd, &processor, dir)?;
        Ok(Self {
            qemu,
            image: image.clone(),
            processor,
            dir: dir.to_owned(),
        })
    }

    /// Kernels that do everything to their VMM that a kernel should not, one for each way to end: power-off, triple fault, halt.
    ///
    /// # Errors
    /// The assembler or the linker is missing.
    pub fn hostile_kernels(dir: &Path) -> anyhow::Result<Vec<(PathBuf, String)>> {
        let source = dir.join("hostile_kernel.s");
        fs::write(&source, HOSTILE_KERNEL)?;
        let mut kernels = Vec::new();
        for ending in 0..3 {
            let (object, kernel) = (dir.join("hostile.o"), dir.join(format!("hostile{ending}")));
            let mut assemble = Command::new("as");
            assemble.args(["--64", "--defsym", &format!("ENDING={ending}"), "-o"]);
            output(assemble.arg(&object).arg(&source))?;
            let mut link = Command::new("ld");
            link.args(["-Ttext=0x100000", "-e", "_start", "-o"]);
            output(link.arg(&kernel).arg(&object))?;
            kernels.push((kernel, format!("/l2/hostile{ending}")));
        }
        Ok(kernels)
    }

    /// What L1 needs to run a program of the host: the program without debug information, and its libraries.
    ///
    /// # Errors
    /// The program does not exist, or a tool fails.
    pub fn with_libraries(program: &Path, dir: &Path) -> anyhow::Result<Vec<(PathBuf, String)>> {
        fs::create_dir_all(dir)?;
        let name = program.file_name().context("no program")?;
        let small = dir.join(name);
        output(Command::new("strip").arg("-o").arg(&small).arg(program))?;
        let mut files = vec![(small, format!("/bin/{}", name.to_string_lossy()))];
        files.extend(libraries(program)?);
        Ok(files)
    }

    /// What L1 needs to run this very test program, which then boots `image` as on a machine with plain KVM: the program, and a
    /// target directory with what it would otherwise build there. [`BUILT`] completes it in L1.
    ///
    /// # Errors
    /// As [`with_libraries`](Self::with_libraries).
    pub fn itself(image: &Image, dir: &Path) -> anyhow::Result<Vec<(PathBuf, String)>> {
        let mut files = Self::with_libraries(&std::env::current_exe()?, dir)?;
        // The same name after each build.
        if let Some((_, name)) = files.first_mut() {
            *name = "/bin/itself".to_owned();
        }
        files.extend(Self::with_libraries(Path::new("/usr/bin/setpriv"), dir)?);
        let guest = ["adit-guest", "adit-testguest", "adit-hostile"].map(crate::guest_bin);
        let boots = [image.bzimage.clone(), image.initrd.clone()];
        let built = guest.into_iter().chain(boots).chain([crate::vmm_bin()]);
        let target = crate::target();
        files.extend(built.map(|file| {
            let below = file.strip_prefix(&target).unwrap_or(&file);
            let to = Path::new(TARGET).join(below);
            let to = to.to_string_lossy().into_owned();
            (file, to)
        }));
        Ok(files)
    }

    /// Waits for a line of L1 that starts with `marker`.
    ///
    /// # Errors
    /// There is no such line, or L1 prints `NESTED-FAIL`, or QEMU ends. The error contains the serial log.
    pub fn wait_said(&mut self, marker: &str, limit: Duration) -> anyhow::Result<()> {
        self.follow(marker, limit, |_| ())
    }

    /// The same; `each` gets every line once.
    ///
    /// # Errors
    /// As [`wait_said`](Self::wait_said).
    pub fn follow(
        &mut self,
        marker: &str,
        limit: Duration,
        mut show: impl FnMut(&str),
    ) -> anyhow::Result<()> {
        let mut shown = 0;
        let (dir, qemu) = (self.dir.clone(), &mut self.qemu);
        let again = || start(&self.image, &dir.join("initrd"), &self.processor, &dir);
        let said = wait_for(marker, limit, || {
            let log = serial(&dir);
            // Only complete lines.
            let whole = log.rfind('\n').map_or(0, |end| end + 1);
            log.get(shown..whole)
                .unwrap_or_default()
                .lines()
                .for_each(&mut show);
            shown = whole;
            if let Some(line) = log.lines().find(|l| l.starts_with("NESTED-FAIL")) {
                bail!("{line}");
            }
            if log.lines().any(|l| l.starts_with(marker)) {
                return Ok(Some(()));
            }
            match qemu.0.try_wait()? {
                // Guest's init says why.
                Some(_) if log.contains("ADIT-NO-TIMER") => {
                    *qemu = again()?;
                    shown = 0;
                    Ok(None)
                }
                Some(status) => bail!("QEMU ended: {status}"),
                None => Ok(None),
            }
        });
        said.with_context(|| format!("L1 in {}:\n{}", dir.display(), serial(&dir)))
    }

    /// L1's output so far.
    pub fn said(&self) -> String {
        serial(&self.dir)
    }
}

/// The libraries of a program of the host, or of another library, which L1 has at the same paths.
fn libraries(program: &Path) -> anyhow::Result<Vec<(PathBuf, String)>> {
    let list = output(Command::new("ldd").arg(program))?;
    let list = String::from_utf8_lossy(&list.stdout).into_owned();
    // "libc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x…)", and the loader without the arrow.
    let paths = list.split_whitespace().filter(|w| w.starts_with('/'));
    Ok(paths.map(|path| (path.into(), path.to_owned())).collect())
}

fn serial(dir: &Path) -> String {
    let log = fs::read(dir.join("serial.log")).unwrap_or_default();
    String::from_utf8_lossy(&log).replace('\r', "")
}

fn start(
    image: &Image,
    initrd: &Path,
    processor: &Processor,
    dir: &Path,
) -> anyhow::Result<Reaped> {
    let err = fs::File::create(dir.join("qemu.err"))?;
    let cmdline = format!(
        "console=ttyS0 quiet panic=-1 mitigations=off{}",
        tsc_arguments()
    );
    let child = processor
        .qemu(dir)?
        // Always emulated, so the result is the same on every machine and needs nothing of the host. Without erms and fsrm, because
        // QEMU emulates string moves a byte at a time.
        .args(["-accel", "tcg,thread=multi", "-cpu", "max,+svm,-erms,-fsrm"])
        .args(["-smp", ONE_CPU, "-m", &format!("{MEMORY_MIB}M")])
        .args(["-nodefaults", "-no-user-config", "-display", "none"])
        .args(["-no-reboot", "-M", "microvm"])
        .args([
            "-serial",
            &format!("file:{}", dir.join("serial.log").display()),
        ])
        .arg("-kernel")
        .arg(&image.vmlinux)
        .arg("-initrd")
        .arg(initrd)
        .args(["-append", &cmdline])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(err)
        .spawn()
        .context("cannot start taskset: apt-get install util-linux")?;
    Ok(Reaped(child))
}
