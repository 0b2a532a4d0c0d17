//! A function through sysfs: its memory and its doorbell register, and no interrupt.

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;

use adit_ringbuf::region::Region;

use super::map::{self, Registers};
use super::pci::Function;
use super::{Access, Device, Interrupt, OpenError, REGISTERS_BAR, SHARED_BAR, doorbell_values};

/// Where the kernel says how locked down it is.
const LOCKDOWN: &str = "/sys/kernel/security/lockdown";

/// Opens it.
///
/// # Errors
/// The kernel does not let its memory be mapped, under lockdown for instance.
pub fn open(function: &Function, register: usize) -> Result<Device, OpenError> {
    function.enable().map_err(refused)?;
    take(function, register).map(|(device, _)| device)
}

/// Maps its memory, which it decodes already.
///
/// # Errors
/// As [`open`].
pub fn take(function: &Function, register: usize) -> Result<(Device, Registers), OpenError> {
    let bar = |n| function.bar(n).ok_or(OpenError::NoBar { bar: n });
    let (registers, shared) = (bar(REGISTERS_BAR)?, bar(SHARED_BAR)?);
    // Never `resource2_wc`: write-combined stores overtake each other, and a ring depends on their order.
    let memory = resource(function, SHARED_BAR)?;
    let memory = map::memory(memory.as_fd(), 0, shared.bytes).map_err(refused)?;
    Region::read(&memory)?;
    let file = resource(function, REGISTERS_BAR)?;
    let registers = Registers::map(file.as_fd(), 0, registers.bytes).map_err(refused)?;
    let [data, space] = registers.doorbells(register, doorbell_values())?;
    let device = Device {
        function: function.address.clone(),
        memory,
        data,
        space,
        data_interrupt: Interrupt::Polled,
        space_interrupt: Interrupt::Polled,
        access: Access::Sysfs,
        why: String::new(),
        vfio: None,
    };
    Ok((device, registers))
}

fn resource(function: &Function, bar: usize) -> Result<fs::File, OpenError> {
    let path = function.dir.join(format!("resource{bar}"));
    let mut options = fs::OpenOptions::new();
    options.read(true).write(true).open(path).map_err(refused)
}

fn refused(e: io::Error) -> OpenError {
    match (e.kind(), lockdown(Path::new(LOCKDOWN))) {
        (io::ErrorKind::PermissionDenied, Some(level)) => OpenError::Lockdown { level },
        _ => OpenError::Io(e),
    }
}

/// The level in force: the one in brackets, unless it is "none".
fn lockdown(file: &Path) -> Option<String> {
    let text = fs::read_to_string(file).ok()?;
    let (_, rest) = text.split_once('[')?;
    let (level, _) = rest.split_once(']')?;
    (level != "none").then(|| level.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lockdown_is_the_level_in_brackets() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("lockdown");
        assert_eq!(lockdown(&file), None);
        for (text, level) in [
            ("[none] integrity confidentiality\n", None),
            ("none [integrity] confidentiality\n", Some("integrity")),
            (
                "none integrity [confidentiality]\n",
                Some("confidentiality"),
            ),
            ("garbage", None),
        ] {
            fs::write(&file, text).unwrap();
            assert_eq!(lockdown(&file).as_deref(), level);
        }
    }
}
