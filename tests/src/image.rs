//! What a guest boots: the ELF kernel from Debian's package, an initramfs with busybox and our static binaries, and an ext4
//! state disk of 64 MiB, so that journals survive a reboot. Cached under `target/guest`.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, anyhow, bail};

use crate::cpio;
use crate::process::output;

/// Modules that the guest loads. Dependencies are added, and built-in modules are skipped.
const MODULES: [&str; 5] = [
    "virtio_pci",
    "virtio_mmio",
    "virtio_blk",
    "vmw_vsock_virtio_transport",
    "qemu_fw_cfg",
];
/// Modules that a guest loads to run guests of its own, on a processor with SVM, and for their vsock.
const KVM: [&str; 2] = ["kvm_amd", "vhost_vsock"];
/// File systems and their helpers, if the kernel has them as modules.
const FILE_SYSTEM: [&str; 2] = ["crc32c_generic", "ext4"];
/// Modules that are only stored, for scripts that load them.
const SPARE: [&str; 1] = ["vsock_loopback"];
/// Drivers with which user space gets the interrupts of an ivshmem function. Loaded if there is an IOMMU.
const RING: [&str; 2] = ["vfio_pci", "vfio_iommu_type1"];
/// The same for the interrupt of its pin. Loaded if there is such a function.
const UIO: [&str; 1] = ["uio_pci_generic"];
/// Our programs in every test guest.
const PROGRAMS: [&str; 2] = ["adit-testguest", "adit-hostile"];
const DISK_MIB: u64 = 64;
const INIT: &str = include_str!("guest/init.sh");
const RC: &str = include_str!("guest/rc.sh");
const INITTAB: &str = "::sysinit:/etc/rc\n::ctrlaltdel:/bin/busybox reboot -f\n";

/// A kernel of Debian 12.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kernel {
    /// Debian 12's standard kernel.
    V6_1,
    /// The newer kernel in Debian 12's security archive.
    V6_12,
}

impl Kernel {
    /// The version, as people write it.
    pub fn name(self) -> &'static str {
        match self {
            Self::V6_1 => "6.1",
            Self::V6_12 => "6.12",
        }
    }

    /// Debian's package that depends on the newest one.
    pub(crate) fn meta_package(self) -> &'static str {
        match self {
            Self::V6_1 => "linux-image-cloud-amd64",
            Self::V6_12 => "linux-image-6.12-cloud-amd64",
        }
    }
}

impl std::str::FromStr for Kernel {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "6.1" => Ok(Self::V6_1),
            "6.12" => Ok(Self::V6_12),
            _ => Err(format!("`{s}` is not a known kernel: use 6.1 or 6.12")),
        }
    }
}

/// What a guest boots.
#[derive(Clone, Debug)]
pub struct Image {
    /// The kernel's version.
    pub kernel: Kernel,
    /// Uncompressed ELF with a PVH entry.
    pub vmlinux: PathBuf,
    /// The same kernel, as the package has it.
    pub bzimage: PathBuf,
    /// The initramfs without an identity.
    pub initrd: PathBuf,
    /// An empty state disk.
    pub disk: PathBuf,
}

impl Image {
    /// Builds what does not exist yet. `say` is called before each step that takes time.
    ///
    /// # Errors
    /// A package cannot be downloaded, or a tool fails. The error says which.
    pub fn build(kernel: Kernel, say: &dyn Fn(&str)) -> anyhow::Result<Self> {
        // Tests that run at the same time would write the same files.
        static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
        let _one = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        let base = crate::target().join("guest");
        let cache = base.join("cache");
        fs::create_dir_all(&cache)?;
        let package = package(kernel)?;
        let tree = cache.join(&package);
        if !tree.exists() {
            say(&format!("downloading {package}"));
            unpack(&package, &cache, &tree)?;
        }
        let release = package.trim_start_matches("linux-image-");
        let vmlinux = tree.join("vmlinux");
        let bzimage = tree.join("boot").join(format!("vmlinuz-{release}"));
        if !vmlinux.exists() {
            say("unpacking the kernel");
            extract(&bzimage, &vmlinux)?;
        }
        let initrd = base.join(format!("initrd-{}", kernel.name()));
        let mut newest = vec![std::env::current_exe()?];
        newest.extend(PROGRAMS.map(crate::guest_bin));
        if !newer_than_all(&initrd, &newest) {
            say("building the initramfs");
            let modules = tree.join("lib/modules").join(release);
            write_whole(&initrd, &initramfs(&modules)?)?;
        }
        let disk = base.join("state.ext4");
        if !disk.exists() {
            make_disk(&disk)?;
        }
        Ok(Self {
            kernel,
            vmlinux,
            bzimage,
            initrd,
            disk,
        })
    }

    /// The modules of KVM, in an order in which they can be loaded.
    ///
    /// # Errors
    /// The kernel has none.
    pub fn kvm_modules(&self) -> anyhow::Result<Vec<(String, Vec<u8>)>> {
        let release = self.bzimage.file_name().unwrap_or_default();
        let release = release.to_string_lossy().replace("vmlinuz-", "");
        let tree = self.vmlinux.parent().context("no kernel tree")?;
        load_order(&tree.join("lib/modules").join(release), &KVM)
    }

    /// Copies it to a directory, with the files below `root` on top of its initramfs.
    ///
    /// # Errors
    /// A file cannot be read or written.
    pub fn copy_to(&self, dir: &Path, root: Option<&Path>) -> anyhow::Result<Self> {
        fs::create_dir_all(dir)?;
        let copy = Self {
            vmlinux: dir.join("vmlinux"),
            bzimage: dir.join("bzImage"),
            initrd: dir.join("initrd"),
            disk: dir.join("state.ext4"),
            ..self.clone()
        };
        fs::copy(&self.vmlinux, &copy.vmlinux)?;
        fs::copy(&self.bzimage, &copy.bzimage)?;
        fs::copy(&self.disk, &copy.disk)?;
        match root {
            Some(root) => self.with_overlay(root, &copy.initrd)?,
            None => drop(fs::copy(&self.initrd, &copy.initrd)?),
        }
        Ok(copy)
    }

    /// Writes an initramfs that contains the files below `root` as well.
    ///
    /// # Errors
    /// The files cannot be read, or `to` cannot be written.
    pub fn with_overlay(&self, root: &Path, to: &Path) -> anyhow::Result<()> {
        let mut archive = cpio::Writer::new(fs::read(&self.initrd)?);
        archive.tree(root)?;
        fs::write(to, archive.finish()?)?;
        Ok(())
    }
}

/// Debian's Prometheus. Unpacked and not installed, because Debian would start it as a service of this machine.
///
/// # Errors
/// It cannot be downloaded or unpacked.
pub fn prometheus(say: &dyn Fn(&str)) -> anyhow::Result<PathBuf> {
    let cache = crate::target().join("guest/cache");
    fs::create_dir_all(&cache)?;
    let tree = cache.join("prometheus");
    if !tree.exists() {
        say("downloading prometheus");
        unpack("prometheus", &cache, &tree)?;
    }
    Ok(tree.join("usr/bin/prometheus"))
}

fn newer_than_all(file: &Path, others: &[PathBuf]) -> bool {
    let time = |p: &Path| p.metadata().and_then(|m| m.modified()).ok();
    let Some(mine) = time(file) else { return false };
    others.iter().all(|o| time(o).is_some_and(|t| t < mine))
}

/// Writes a file so that it exists completely or not at all.
fn write_whole(to: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    let part = to.with_extension("part");
    fs::write(&part, bytes)?;
    fs::rename(&part, to)?;
    Ok(())
}

/// The package to which the meta-package currently refers.
fn package(kernel: Kernel) -> anyhow::Result<String> {
    let depends = || -> anyhow::Result<Option<String>> {
        let out = output(Command::new("apt-cache").args(["depends", kernel.meta_package()]))?;
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        let line = text
            .lines()
            .find_map(|l| l.trim().strip_prefix("Depends: linux-image-"));
        Ok(line.map(|rest| format!("linux-image-{rest}")))
    };
    if let Ok(Some(name)) = depends() {
        return Ok(name);
    }
    output(Command::new("apt-get").args(["-q", "update"]))?;
    depends()?.ok_or_else(|| {
        anyhow!(
            "apt does not know {}: is bookworm-security among its sources?",
            kernel.meta_package()
        )
    })
}

fn unpack(package: &str, cache: &Path, tree: &Path) -> anyhow::Result<()> {
    let dir = tempfile::tempdir_in(cache)?;
    let download = || {
        output(
            Command::new("apt-get")
                .args(["-q", "download", package])
                .current_dir(dir.path()),
        )
    };
    if download().is_err() {
        output(Command::new("apt-get").args(["-q", "update"]))?;
        download()?;
    }
    let deb = fs::read_dir(dir.path())?
        .filter_map(Result::ok)
        .map(|e| e.path())
        .find(|p| p.extension().is_some_and(|e| e == "deb"))
        .ok_or_else(|| anyhow!("apt-get download {package} left no .deb"))?;
    let part = dir.path().join("tree");
    output(Command::new("dpkg").arg("-x").arg(deb).arg(&part))?;
    // Debian is moving /lib into /usr/lib.
    let (lib, usr_lib) = (part.join("lib/modules"), part.join("usr/lib/modules"));
    if !lib.exists() && usr_lib.exists() {
        fs::create_dir_all(part.join("lib"))?;
        fs::rename(usr_lib, lib)?;
    }
    match fs::rename(part, tree) {
        // Another test was quicker, with the same.
        Err(_) if tree.exists() => Ok(()),
        renamed => Ok(renamed?),
    }
}

/// Extracts the ELF image from a bzImage (Linux Documentation/arch/x86/boot.rst: setup_sects, payload_offset, payload_length).
fn extract(bzimage: &Path, to: &Path) -> anyhow::Result<()> {
    let bytes = fs::read(bzimage).with_context(|| format!("no {}", bzimage.display()))?;
    let word = |at: usize| {
        bytes
            .get(at..at + 4)
            .map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]) as usize)
    };
    let header = (bytes.get(0x1f1), word(0x248), word(0x24c));
    let (Some(&sectors), Some(offset), Some(len)) = header else {
        bail!("{} is not a bzImage", bzimage.display())
    };
    let begin = (usize::from(sectors) + 1) * 512 + offset;
    let payload = bytes
        .get(begin..begin + len)
        .ok_or_else(|| anyhow!("{} is cut off", bzimage.display()))?;
    let tool = match payload {
        [0x02, 0x21, 0x4c, 0x18, ..] => "lz4",
        [0xfd, b'7', b'z', ..] => "xz",
        [0x28, 0xb5, 0x2f, 0xfd, ..] => "zstd",
        [0x1f, 0x8b, ..] => "gzip",
        _ => bail!("{} has an unknown compression", bzimage.display()),
    };
    // The length follows the compressed kernel, so the tools warn about trailing bytes.
    let elf = filter(tool, &["-dcq"], payload)?;
    if !elf.starts_with(b"\x7fELF") {
        bail!("{tool} did not unpack the kernel of {}", bzimage.display());
    }
    write_whole(to, &elf)
}

/// Runs bytes through a program.
fn filter(program: &str, args: &[&str], input: &[u8]) -> anyhow::Result<Vec<u8>> {
    let mut child = Command::new(program)
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .with_context(|| format!("{program} is missing: apt-get install {program}"))?;
    let (mut to, mut from) = (child.stdin.take(), child.stdout.take());
    let mut out = Vec::new();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            use std::io::Write;
            if let Some(mut to) = to.take() {
                let _ = to.write_all(input);
            }
        });
        from.as_mut().map_or(Ok(0), |f| f.read_to_end(&mut out))
    })?;
    child.wait()?;
    Ok(out)
}

fn make_disk(disk: &Path) -> anyhow::Result<()> {
    let part = disk.with_extension("part");
    fs::File::create(&part)?.set_len(DISK_MIB << 20)?;
    let mke2fs = if Path::new("/usr/sbin/mke2fs").exists() {
        "/usr/sbin/mke2fs"
    } else {
        "/sbin/mke2fs"
    };
    output(
        Command::new(mke2fs)
            .args(["-F", "-q", "-t", "ext4", "-E", "lazy_itable_init=0"])
            .arg(&part),
    )?;
    fs::rename(part, disk)?;
    Ok(())
}

fn initramfs(modules: &Path) -> anyhow::Result<Vec<u8>> {
    let mut archive = cpio::Writer::new(Vec::new());
    for dir in [
        "bin",
        "sbin",
        "usr",
        "usr/sbin",
        "usr/bin",
        "dev",
        "proc",
        "sys",
        "tmp",
        "run",
        "etc",
        "etc/init.d",
        "root",
    ] {
        archive.dir(dir)?;
    }
    for dir in ["var", "var/lib", "lib", "lib/adit", "mnt", "srv", "opt"] {
        archive.dir(dir)?;
    }
    archive.file(
        "bin/busybox",
        0o755,
        &fs::read("/bin/busybox").or_else(|_| fs::read("/usr/bin/busybox"))?,
    )?;
    for name in PROGRAMS {
        let path = crate::guest_bin(name);
        let bytes = fs::read(&path).with_context(|| format!("no {}", path.display()))?;
        archive.file(&format!("bin/{name}"), 0o755, &bytes)?;
    }
    archive.file("init", 0o755, INIT.as_bytes())?;
    archive.file("etc/rc", 0o755, RC.as_bytes())?;
    archive.file("etc/inittab", 0o644, INITTAB.as_bytes())?;
    archive.file(
        "etc/passwd",
        0o644,
        b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\n",
    )?;
    archive.file("etc/group", 0o644, b"root:x:0:\nnogroup:x:65534:\n")?;
    let mut listed = BTreeSet::new();
    let lists: [(&str, Vec<&str>); 4] = [
        ("modules", MODULES.into_iter().chain(FILE_SYSTEM).collect()),
        ("modules-ring", RING.into()),
        ("modules-uio", UIO.into()),
        ("modules-spare", SPARE.into()),
    ];
    for (list, wanted) in lists {
        let mut order = String::new();
        for (name, bytes) in load_order(modules, &wanted)? {
            if listed.insert(name.clone()) {
                archive.file(&format!("lib/adit/{name}.ko"), 0o644, &bytes)?;
                order += &format!("{name}\n");
            }
        }
        archive.file(&format!("lib/adit/{list}"), 0o644, order.as_bytes())?;
    }
    Ok(archive.finish()?)
}

/// The modules with their dependencies, in an order in which they can be loaded.
fn load_order(dir: &Path, wanted: &[&str]) -> anyhow::Result<Vec<(String, Vec<u8>)>> {
    let mut files = BTreeMap::new();
    find_modules(dir, &mut files)?;
    let builtin: BTreeSet<String> = fs::read_to_string(dir.join("modules.builtin"))?
        .lines()
        .map(|l| module_name(Path::new(l)))
        .collect();
    let mut order = Vec::new();
    let mut seen = BTreeSet::new();
    for name in wanted {
        add_module(name, &files, &builtin, &mut seen, &mut order)?;
    }
    Ok(order)
}

fn module_name(path: &Path) -> String {
    let file = path.file_name().unwrap_or_default().to_string_lossy();
    file.split(".ko")
        .next()
        .unwrap_or_default()
        .replace('-', "_")
}

fn find_modules(dir: &Path, files: &mut BTreeMap<String, PathBuf>) -> anyhow::Result<()> {
    for entry in fs::read_dir(dir).with_context(|| format!("no {}", dir.display()))? {
        let path = entry?.path();
        if path.is_dir() && !path.is_symlink() {
            find_modules(&path, files)?;
        } else if path.to_string_lossy().contains(".ko") {
            files.insert(module_name(&path), path);
        }
    }
    Ok(())
}

fn add_module(
    name: &str,
    files: &BTreeMap<String, PathBuf>,
    builtin: &BTreeSet<String>,
    seen: &mut BTreeSet<String>,
    order: &mut Vec<(String, Vec<u8>)>,
) -> anyhow::Result<()> {
    let name = name.replace('-', "_");
    if builtin.contains(&name) || !seen.insert(name.clone()) {
        return Ok(());
    }
    let Some(path) = files.get(&name) else {
        // The helpers of the file system differ between kernels. If one is really missing, mounting fails.
        return if FILE_SYSTEM.contains(&name.as_str()) {
            Ok(())
        } else {
            Err(anyhow!("the kernel has no module {name}"))
        };
    };
    let packed = fs::read(path)?;
    let bytes = match path.extension().and_then(|e| e.to_str()) {
        Some("xz") => filter("xz", &["-dc"], &packed)?,
        Some("zst") => filter("zstd", &["-dcq"], &packed)?,
        _ => packed,
    };
    // .modinfo: "depends=a,b\0"
    let key = b"\0depends=";
    if let Some(at) = bytes.windows(key.len()).position(|w| w == key) {
        let rest = &bytes[at + key.len()..];
        let list = rest.split(|&b| b == 0).next().unwrap_or_default();
        for dependency in String::from_utf8_lossy(list)
            .split(',')
            .filter(|d| !d.is_empty())
        {
            add_module(dependency, files, builtin, seen, order)?;
        }
    }
    order.push((name, bytes));
    Ok(())
}
