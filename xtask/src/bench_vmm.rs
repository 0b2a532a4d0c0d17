//! `cargo xtask bench vmm`: compares adit-vmm with QEMU's microvm. Both run with KVM, in turn, in one emulated guest (L1), with the
//! same kernel, initramfs, aditd and client. Under emulation every figure is larger than on hardware: only the ratios count.
//!
//! QEMU's device is on PCI with MSI-X and in a process of its own. Ours is on virtio-mmio and in the VMM. A virtio-mmio interrupt
//! is acknowledged, which costs an exit to KVM; with MSI-X there is none. For a round trip, the number of exits is printed, and
//! how many of them reached the VMM.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use adit_tests::guest::Identity;
use adit_tests::image::{Image, Kernel};
use adit_tests::nested::{Inner, Nested};
use adit_tests::process::output;
use anyhow::Context;

use crate::{progress, setup};

/// The bench takes two minutes on an idle machine.
const LIMIT: Duration = Duration::from_secs(900);
/// Files that QEMU's microvm loads into the guest besides the kernel.
const FIRMWARE: [&str; 4] = [
    "/usr/share/qemu/qboot.rom",
    "/usr/share/qemu/pvh.bin",
    "/usr/share/qemu/linuxboot_dma.bin",
    "/usr/share/seabios/bios-microvm.bin",
];
const SCRIPT: &str = include_str!("bench_vmm.sh");

/// A figure of one VMM: its name, unit, and value in each round.
struct Figure {
    name: String,
    unit: String,
    ours: Vec<f64>,
    qemu: Vec<f64>,
}

pub fn run(json: bool) -> anyhow::Result<()> {
    setup::run()?;
    let bins = setup::host_binaries(true)?;
    setup::guest_binaries()?;
    setup::vmm_binary()?;
    let image = |kernel| Image::build(kernel, &|what| progress::line(what));
    let (outer, inner) = (image(Kernel::V6_1)?, image(Kernel::V6_12)?);
    let dir = adit_tests::target().join("tests/bench-vmm");
    let _ = std::fs::remove_dir_all(&dir);
    std::fs::create_dir_all(&dir)?;
    let agent = adit_tests::guest_bin("adit-guest");
    let guest = |name| Inner {
        image: &inner,
        identity: Identity {
            name,
            vhost_socket: Path::new(""),
            agent: Some(&agent),
            trust: None,
            script: "",
            boot_files: false,
        },
        packed: false,
    };
    let mut programs = vec![(adit_tests::vmm_bin(), "/bin/adit-vmm".to_owned())];
    let ours = ["aditd", "adit-port", "adit"].map(|name| bins.join(name));
    let qemu = which("qemu-system-x86_64")?;
    for program in ours.iter().chain([&qemu]) {
        programs.extend(Nested::with_libraries(program, &dir.join("stripped"))?);
    }
    for path in FIRMWARE.into_iter().filter(|path| Path::new(path).exists()) {
        programs.push((PathBuf::from(path), path.to_owned()));
    }
    let guests = [guest("ours"), guest("qemu")];
    let mut l1 = Nested::boot(&outer, &guests, &programs, SCRIPT, &dir)?;
    progress::during("three rounds of both", || {
        l1.wait_said("NESTED-DONE", LIMIT)
    })?;
    for figure in figures(&l1.said())? {
        figure.print(json);
    }
    Ok(())
}

fn which(program: &str) -> anyhow::Result<PathBuf> {
    let out = output(Command::new("sh").args(["-c", &format!("command -v {program}")]))?;
    Ok(PathBuf::from(String::from_utf8(out.stdout)?.trim()))
}

/// Reads `FIGURE VMM NAME VALUE UNIT` lines.
fn figures(said: &str) -> anyhow::Result<Vec<Figure>> {
    let mut all: Vec<Figure> = Vec::new();
    for line in said.lines().filter(|l| l.starts_with("FIGURE ")) {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [_, vmm, name, value, unit] = words[..] else {
            anyhow::bail!("no figure: {line}");
        };
        let at = all.iter().position(|f| f.name == name).unwrap_or_else(|| {
            all.push(Figure {
                name: name.to_owned(),
                unit: unit.to_owned(),
                ours: vec![],
                qemu: vec![],
            });
            all.len() - 1
        });
        let value: f64 = value.parse().with_context(|| line.to_owned())?;
        match vmm {
            "ours" => all[at].ours.push(value),
            _ => all[at].qemu.push(value),
        }
    }
    anyhow::ensure!(!all.is_empty(), "no figures:\n{said}");
    Ok(all)
}

fn middle(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}

impl Figure {
    fn print(&self, json: bool) {
        let (ours, qemu) = (middle(&self.ours), middle(&self.qemu));
        let (name, unit, ratio) = (&self.name, &self.unit, ours / qemu);
        if json {
            let line = serde_json::json!({
                "bench": "vmm", "name": name, "unit": unit, "adit_vmm": ours, "qemu_microvm": qemu,
                "ratio": ratio, "rounds": { "adit_vmm": self.ours, "qemu_microvm": self.qemu },
            });
            println!("{line}");
        } else {
            println!(
                "{name:<28} adit-vmm {ours:>10.1} {unit:<4} QEMU {qemu:>10.1} {unit:<4} ratio {ratio:.2}"
            );
        }
    }
}
