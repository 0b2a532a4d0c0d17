//! The emulated processor of L1. QEMU's SVM (7.2, as in Debian 12) has two bugs that a guest of a guest sometimes triggers: L1
//! sleeps for ever, or L2's kernel panics. This file works around both.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::{env, fs, io::Write};

use anyhow::Context;
use memchr::memmem;
use nix::sched::{CpuSet, sched_getaffinity};
use nix::unistd::Pid;

use crate::process::bound;

const QEMU: &str = "qemu-system-x86_64";

/// How many L1s run on each processor.
static TAKEN: Mutex<BTreeMap<usize, u32>> = Mutex::new(BTreeMap::new());

/// The processor that an L1 runs on.
///
/// To mark an interrupt of L2 as pending, QEMU's emulated SVM changes a word without a lock (`helper_vmrun`: `interrupt_request
/// |= ...`, QEMU 7.2). If another thread marks an interrupt of L1 there at the same time, that mark is lost. If it was the timer's,
/// nothing ever wakes L1 again. The change is one instruction, so it cannot be interrupted by a thread on the same processor: all
/// threads of QEMU must share one.
#[derive(Debug)]
pub(super) struct Processor(usize);

impl Processor {
    /// Takes the processor with the fewest L1s of this process.
    pub(super) fn take() -> anyhow::Result<Self> {
        let may = sched_getaffinity(Pid::from_raw(0))?;
        let mut taken = TAKEN.lock().unwrap_or_else(PoisonError::into_inner);
        let least = (0..CpuSet::count())
            .filter(|&n| may.is_set(n).unwrap_or(false))
            .min_by_key(|n| taken.get(n).copied().unwrap_or(0))
            .context("no processor")?;
        *taken.entry(least).or_default() += 1;
        Ok(Self(least))
    }

    /// QEMU on this processor. A changed copy of it may be written to `dir`.
    pub(super) fn qemu(&self, dir: &Path) -> anyhow::Result<Command> {
        let mut command = bound("taskset");
        command.args(["-c", &self.0.to_string()]);
        let installed = installed()
            .with_context(|| format!("there is no {QEMU}: apt-get install qemu-system-x86"))?
            .canonicalize()?;
        let Some(program) = delivers_once(fs::read(&installed)?) else {
            eprintln!(
                "{} is not Debian 12's QEMU 7.2: if its SVM delivers an interrupt twice, a guest of a guest may panic",
                installed.display()
            );
            command.arg(installed);
            return Ok(command);
        };
        let copy = dir.join(QEMU);
        write_program(&copy, &program)?;
        // It finds its files relative to its own path.
        let prefix = installed
            .parent()
            .and_then(Path::parent)
            .context("no /usr")?;
        command.env("QEMU_MODULE_DIR", prefix.join("lib/x86_64-linux-gnu/qemu"));
        command.arg(copy);
        for data in ["share/qemu", "share/seabios"] {
            command.arg("-L").arg(prefix.join(data));
        }
        Ok(command)
    }
}

impl Drop for Processor {
    fn drop(&mut self) {
        let mut taken = TAKEN.lock().unwrap_or_else(PoisonError::into_inner);
        taken.entry(self.0).and_modify(|n| *n -= 1);
    }
}

fn installed() -> Option<PathBuf> {
    let path: OsString = env::var_os("PATH")?;
    env::split_paths(&path)
        .map(|dir| dir.join(QEMU))
        .find(|program| program.is_file())
}

fn write_program(to: &Path, program: &[u8]) -> anyhow::Result<()> {
    // A process may still run the previous copy, and then it cannot be overwritten: remove it.
    match fs::remove_file(to) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error.into()),
        _ => {}
    }
    let mut options = fs::OpenOptions::new();
    let mut file = options.write(true).create_new(true).mode(0o755).open(to)?;
    Ok(file.write_all(program)?)
}

/// When the VMCB names an interrupt for L2, `helper_vmrun` delivers it, and also stores the vector in `exception_index`:
/// `mov %esi, exception_index`. What it stores next to it are `exception_is_int` and `exception_next_eip`.
const NOTED: [u8; 6] = [0x89, 0xb3, 0x54, 0xef, 0xff, 0xff];
const BESIDE: [u8; 21] = [
    0xc7, 0x83, 0x84, 0x33, 0, 0, 0, 0, 0, 0, //
    0x48, 0xc7, 0x83, 0x88, 0x33, 0, 0, 0xff, 0xff, 0xff, 0xff,
];
/// A no-op of the same length.
const NOTHING: [u8; 6] = [0x66, 0x0f, 0x1f, 0x44, 0, 0];

/// The program without that store. `None` if the program is not the known one.
///
/// Nothing clears the stored vector before L2's next exit. If another thread meanwhile asks the processor to stop for a moment, the
/// processor may see that request before its reason (`cpu_handle_interrupt` reads `interrupt_request`, then `exit_request`). Then it
/// takes the vector for an exception and delivers the same interrupt again, with interrupts off. Often that is at the first
/// instruction of the entry from user mode, and no kernel survives it there.
fn delivers_once(mut program: Vec<u8>) -> Option<Vec<u8>> {
    let known = [&NOTED[..], &BESIDE[..]].concat();
    let found: Vec<_> = memmem::find_iter(&program, &known).take(2).collect();
    let [at] = found[..] else { return None };
    program[at..at + NOTHING.len()].copy_from_slice(&NOTHING);
    Some(program)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_known_qemu_is_changed() {
        let known = [&NOTED[..], &BESIDE[..]].concat();
        let program = [&[0x90; 100][..], &known, &[0x90; 100]].concat();
        let changed = delivers_once(program.clone()).unwrap();
        assert_eq!(changed.len(), program.len());
        let differ: Vec<_> = (0..program.len())
            .filter(|&at| program[at] != changed[at])
            .collect();
        assert!(differ.iter().all(|at| (100..106).contains(at)));
        assert_eq!(changed[100..106], NOTHING);

        assert_eq!(delivers_once(changed), None);
        assert_eq!(delivers_once([&program[..], &program].concat()), None);
        assert_eq!(delivers_once(vec![0; 1000]), None);
    }
}
