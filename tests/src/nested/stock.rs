//! In L1: stock QEMU with `vhost-vsock-pci`, whose streams L1's kernel carries, and aditd beside it.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context;

use super::{HELPERS, Inner, Nested};
use crate::guest::Identity;
use crate::image::{Image, Kernel};
use crate::process::output;

const STOCK: &str = include_str!("stock.sh");
const QEMU: &str = "/usr/bin/qemu-system-x86_64";
/// What QEMU reads at its start on such a machine, wherever Debian has it.
const FIRMWARE: [&str; 3] = ["bios-microvm.bin", "linuxboot_dma.bin", "pvh.bin"];

impl Nested {
    /// Boots L1 to show the main job with a VMM that nobody has changed: QEMU with `-device vhost-vsock-pci`, and
    /// `carrier = { vsock = { cid = 42 } }`. aditd and the port process are killed, a user of L1 dials the guest, the VM is saved, loaded
    /// and started again. Lines for people begin with `SHOW`.
    ///
    /// # Errors
    /// As [`boot`](Self::boot), or `bins` lacks aditd, adit-port or adit.
    pub fn stock(bins: &Path, dir: &Path) -> anyhow::Result<Self> {
        let image = Image::build(Kernel::V6_1, &|what| println!("{what}"))?;
        let mut key = Command::new(bins.join("adit"));
        output(key.args(["key", "new", "fleet.key"]).current_dir(dir))?;
        // QEMU saves a VM into such a disk only.
        let disk = dir.join("web-1.qcow2");
        let mut convert = Command::new("qemu-img");
        convert.args(["convert", "-O", "qcow2"]).arg(&image.disk);
        output(convert.arg(&disk)).context("apt-get install qemu-utils")?;
        let (agent, trust) = (crate::guest_bin("adit-guest"), dir.join("fleet.key.pub"));
        let inner = [Inner {
            image: &image,
            identity: Identity {
                name: "web-1",
                vhost_socket: Path::new(""),
                agent: Some(&agent),
                trust: Some(&trust),
                script: "",
                boot_files: false,
            },
            packed: false,
        }];
        let mut programs = vec![
            (dir.join("fleet.key"), "/etc/fleet.key".to_owned()),
            (disk, "/l2/web-1/disk.qcow2".to_owned()),
        ];
        for name in FIRMWARE {
            let dirs =
                ["/usr/share/qemu", "/usr/share/seabios"].map(|dir| Path::new(dir).join(name));
            let found = dirs.into_iter().find(|path| path.exists());
            let found = found.with_context(|| format!("QEMU has no {name}"))?;
            programs.push((found, format!("/usr/share/qemu/{name}")));
        }
        let ours = ["aditd", "adit-port", "adit"].map(|name| bins.join(name));
        let others = ["/usr/bin/curl", QEMU].map(PathBuf::from);
        for program in ours.iter().chain(&others) {
            programs.extend(Self::with_libraries(program, &dir.join("stripped"))?);
        }
        let script = format!("{HELPERS}\n{STOCK}");
        Self::boot(&image, &inner, &programs, &script, dir)
    }
}
