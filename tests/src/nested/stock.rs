//! In L1: VMMs that nobody has changed, whose streams L1's kernel carries, and aditd beside them: QEMU with `vhost-vsock-pci`, first
//! by hand and then by Debian's libvirt, which has adit's hook.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context;

use super::served::Served;
use super::{Nested, libraries};
use crate::image::{Image, Kernel};
use crate::process::output;
use crate::sshd;

const STOCK: &str = include_str!("stock.sh");
const LIBVIRT: &str = include_str!("libvirt.sh");
const QEMU: &str = "/usr/bin/qemu-system-x86_64";
/// What QEMU reads at its start: of the machine `microvm`, and of `pc`, which libvirt knows.
const FIRMWARE: [&str; 5] = [
    "/usr/share/qemu/bios-microvm.bin",
    "/usr/share/qemu/kvmvapic.bin",
    "/usr/share/qemu/linuxboot_dma.bin",
    "/usr/share/qemu/pvh.bin",
    "/usr/share/seabios/bios-256k.bin",
];
/// What libvirt's daemon loads, and what QEMU does when it asks what QEMU can. None of the others is needed.
const MODULES: [&str; 2] = [
    "/usr/lib/x86_64-linux-gnu/libvirt/connection-driver/libvirt_driver_qemu.so",
    "/usr/lib/x86_64-linux-gnu/qemu/accel-tcg-x86_64.so",
];
/// Processors that libvirt knows.
const CPU_MAP: &str = "/usr/share/libvirt/cpu_map";

impl Nested {
    /// Boots L1 to show the main job with VMMs that nobody has changed. QEMU has `-device vhost-vsock-pci`, and aditd
    /// `carrier = { vsock = { cid = 42 } }`: aditd and the port process are killed, a user of L1 dials the guest, the VM is saved, loaded
    /// and started again. Then libvirt starts a domain, its hook tells aditd, and the domain is reset. Lines for people begin with `SHOW`.
    ///
    /// # Errors
    /// As [`boot`](Self::boot), or `bins` lacks aditd, adit-port or adit, or libvirt is missing.
    pub fn stock(bins: &Path, dir: &Path) -> anyhow::Result<Self> {
        let image = Image::build(Kernel::V6_1, &|what| println!("{what}"))?;
        let mut served = Served::new(bins, dir)?;
        // QEMU saves a VM into such a disk only.
        let disk = dir.join("web-1.qcow2");
        let mut convert = Command::new("qemu-img");
        convert.args(["convert", "-O", "qcow2"]).arg(&image.disk);
        output(convert.arg(&disk)).context("apt-get install qemu-utils")?;
        served.file(disk, "/l2/web-1/disk.qcow2");
        served.program_in_place(Path::new(QEMU))?;
        for path in FIRMWARE {
            served.file(path, path);
        }
        // As docs/operate.md and the package have it.
        let dist = crate::root().join("host-proxy/dist");
        served.file(dist.join("20-adit.conf"), "/etc/ssh/ssh_config");
        served.program(Path::new("/usr/bin/ssh"))?;
        let key = dir.join("id_ed25519");
        let mut keygen = Command::new("ssh-keygen");
        keygen.args(["-q", "-t", "ed25519", "-N", "", "-f"]);
        output(keygen.arg(&key)).context("apt-get install openssh-client")?;
        served.file(&key, "/root/.ssh/id_ed25519");
        libvirt(&mut served).context("apt-get install libvirt-daemon libvirt-clients")?;
        let public = key.with_extension("pub");
        let mut guests = ["web-1", "web-4"].map(|name| served.guest(name, &image));
        for guest in &mut guests {
            guest.identity.script = sshd::START;
            guest.ssh = Some(&public);
        }
        served.boot(&image, &guests, &format!("{STOCK}\n{LIBVIRT}"))
    }
}

/// Puts what starts a domain into L1: the daemon, QEMU's driver, `virsh`, and the hook where the documentation has it.
fn libvirt(served: &mut Served) -> anyhow::Result<()> {
    for program in ["/usr/sbin/libvirtd", "/usr/bin/virsh"] {
        served.program_in_place(Path::new(program))?;
    }
    for module in MODULES {
        served.file(module, module);
        for (from, to) in libraries(Path::new(module))? {
            served.file(from, &to);
        }
    }
    for file in fs::read_dir(CPU_MAP)? {
        let path: PathBuf = file?.path();
        served.file(&path, &path.to_string_lossy());
    }
    let hook = crate::root().join("host-proxy/dist/libvirt-hook");
    served.file(hook, "/opt/libvirt-hook");
    Ok(())
}
