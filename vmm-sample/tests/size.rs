//! The VMM is written to be read in an evening, so its length is limited.

use std::fs;
use std::path::{Path, PathBuf};

/// Most lines of the whole program, of the part that brings a guest to its first instruction and answers it, and of one file.
/// Tests at the end of a file do not count.
const ALL_MAX: usize = 4200;
const BOOT_MAX: usize = 1600;
const FILE_MAX: usize = 500;
/// Files and directories of that part.
const BOOT: [&str; 11] = [
    "acpi.rs",
    "boot",
    "bus.rs",
    "console.rs",
    "cpu.rs",
    "exit.rs",
    "gate.rs",
    "layout.rs",
    "machine.rs",
    "memory.rs",
    "vcpu.rs",
];

fn files(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => files(&path, found),
            false => found.push(path),
        }
    }
}

#[test]
fn the_program_can_be_read_in_an_evening() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut found = Vec::new();
    files(&src, &mut found);
    let (mut all, mut boot) = (0, 0);
    for path in found {
        let text = fs::read_to_string(&path).unwrap();
        let lines = text.lines().take_while(|l| *l != "#[cfg(test)]").count();
        assert!(lines <= FILE_MAX, "{}: {lines} lines", path.display());
        all += lines;
        if BOOT.iter().any(|part| path.starts_with(src.join(part))) {
            boot += lines;
        }
    }
    assert!(all <= ALL_MAX, "{all} lines");
    assert!(boot <= BOOT_MAX, "{boot} lines to the first instruction");
}
