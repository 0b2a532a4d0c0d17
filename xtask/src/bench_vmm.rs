//! `cargo xtask bench vmm`: compares adit-vmm with QEMU's microvm. Both run with KVM, in turn, in one emulated guest (L1), with the
//! same kernel, initramfs, aditd and client. Under emulation every figure is larger than on hardware: only the ratios count.
//!
//! QEMU's device is on PCI with MSI-X and in a process of its own. Ours is on virtio-mmio and in the VMM. A virtio-mmio interrupt
//! is acknowledged, which costs an exit to KVM; with MSI-X there is none. For a round trip, the number of exits is printed, and
//! how many of them reached the VMM.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use adit_benches::report::{Better, Figure};
use adit_tests::image::{Image, Kernel};
use adit_tests::nested::Served;
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

/// What both VMMs said of one thing, round by round.
#[derive(Default)]
struct Rounds {
    name: String,
    unit: String,
    ours: Vec<f64>,
    qemu: Vec<f64>,
}

/// What is measured: its name in the script, its unit, and the ratio to QEMU that it must have and that we aim for. Less is
/// better everywhere.
const GOALS: [(&str, &str, f64, f64); 8] = [
    ("ready", "s", 1.0, 0.8),
    ("memory-beyond-guest", "KiB", 0.5, 0.2),
    ("rtt-64", "us", 1.0, 0.8),
    ("exits-64", "a trip", 1.2, 1.0),
    ("exits-to-vmm-64", "a trip", 1.0, 0.5),
    ("rtt-65536", "us", 1.0, 0.8),
    ("exits-65536", "a trip", 1.2, 1.0),
    ("exits-to-vmm-65536", "a trip", 1.0, 0.5),
];

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
    let mut served = Served::new(&bins, &dir)?;
    served.vmm();
    served.program(&which("qemu-system-x86_64")?)?;
    for path in FIRMWARE.into_iter().filter(|path| Path::new(path).exists()) {
        served.file(path, path);
    }
    let guests = ["ours", "qemu"].map(|name| served.guest(name, &inner));
    let mut l1 = served.boot(&outer, &guests, SCRIPT)?;
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
    let mut all: Vec<Rounds> = Vec::new();
    for line in said.lines().filter(|l| l.starts_with("FIGURE ")) {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [_, vmm, name, value, unit] = words[..] else {
            anyhow::bail!("no figure: {line}");
        };
        let at = all.iter().position(|f| f.name == name).unwrap_or_else(|| {
            all.push(Rounds {
                name: name.to_owned(),
                unit: unit.to_owned(),
                ..Rounds::default()
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
    all.iter().map(Rounds::figure).collect()
}

impl Rounds {
    fn figure(&self) -> anyhow::Result<Figure> {
        let goal = GOALS.iter().find(|(name, ..)| *name == self.name);
        let &(name, unit, must, aim) =
            goal.with_context(|| format!("{} has no goal", self.name))?;
        anyhow::ensure!(
            unit.replace(' ', "-") == self.unit,
            "{name} is in {}, and was to be in {unit}",
            self.unit
        );
        let ours = Figure::alone(name, unit, Better::Lower, &self.ours);
        Ok(ours.beside("QEMU microvm", &self.qemu, must, aim))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_scripts_lines_are_figures_with_the_fields_of_every_bench() {
        let said = "noise\nFIGURE ours ready 1.5 s\nFIGURE qemu ready 2.0 s\nFIGURE ours ready 1.0 s\n\
                    FIGURE qemu ready 2.0 s\nFIGURE ours exits-64 6 a-trip\nFIGURE qemu exits-64 4 a-trip\n";
        let all = figures(said).unwrap();
        let ready = serde_json::to_value(&all[0]).unwrap();
        for field in [
            "name", "unit", "ours", "peer", "ratio", "must", "aim", "met", "aim_met",
        ] {
            assert!(!ready[field].is_null(), "{field}: {ready}");
        }
        assert_eq!((all[0].met, all[0].rounds), (Some(true), 2));
        assert_eq!(all[1].met, Some(false));
        assert!(figures("FIGURE ours unheard-of 1 s\n").is_err());
    }

    #[test]
    fn each_figure_of_the_script_has_a_goal() {
        for line in SCRIPT.lines().filter(|l| l.contains("echo \"FIGURE")) {
            let name = line
                .split_whitespace()
                .skip_while(|w| !w.ends_with("FIGURE"))
                .nth(2);
            let name = name.unwrap().replace("-$len", "-64");
            assert!(GOALS.iter().any(|(goal, ..)| *goal == name), "{line}");
        }
    }
}
