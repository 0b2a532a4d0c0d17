//! PCI functions as sysfs shows them.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::exec::reap;

/// Where the kernel lists them.
pub const DEVICES: &str = "/sys/bus/pci/devices";
/// Red Hat's vendor, which QEMU's devices have.
const VENDOR: u32 = 0x1af4;
/// ivshmem.
const IVSHMEM: u32 = 0x1110;
/// A flag of a BAR: it is memory (Linux `IORESOURCE_MEM`).
const MEMORY: u64 = 0x200;

/// In configuration space: which pin it has, or none.
const INTERRUPT_PIN: usize = 0x3d;

/// A BAR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bar {
    /// Bytes.
    pub bytes: usize,
}

/// One function.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Function {
    /// Its directory in sysfs.
    pub dir: PathBuf,
    /// As `0000:00:04.0`.
    pub address: String,
}

/// The functions that may have a region, in the order of their addresses.
pub fn candidates(devices: &Path) -> Vec<Function> {
    let entries = fs::read_dir(devices).into_iter().flatten().flatten();
    let mut found: Vec<_> = entries
        .filter_map(|entry| {
            let function = Function {
                dir: entry.path(),
                address: entry.file_name().into_string().ok()?,
            };
            let is = |file, id| function.number(file) == Some(id);
            (is("vendor", VENDOR) && is("device", IVSHMEM)).then_some(function)
        })
        .collect();
    found.sort_by(|a, b| a.address.cmp(&b.address));
    found
}

impl Function {
    fn number(&self, file: &str) -> Option<u32> {
        let text = fs::read_to_string(self.dir.join(file)).ok()?;
        u32::from_str_radix(text.trim().strip_prefix("0x")?, 16).ok()
    }

    /// A BAR of memory.
    pub fn bar(&self, n: usize) -> Option<Bar> {
        let table = fs::read_to_string(self.dir.join("resource")).ok()?;
        let mut words = table.lines().nth(n)?.split_whitespace();
        let mut word = || u64::from_str_radix(words.next()?.strip_prefix("0x")?, 16).ok();
        let (start, end, flags) = (word()?, word()?, word()?);
        if flags & MEMORY == 0 {
            return None;
        }
        let bytes = usize::try_from(end.checked_sub(start)?.checked_add(1)?).ok()?;
        Some(Bar { bytes })
    }

    /// The driver that it is bound to.
    pub fn driver(&self) -> Option<String> {
        let link = fs::read_link(self.dir.join("driver")).ok()?;
        Some(link.file_name()?.to_string_lossy().into_owned())
    }

    /// Whether it has an interrupt pin.
    pub fn has_pin(&self) -> bool {
        // The first 64 bytes need no privilege.
        let config = fs::read(self.dir.join("config")).unwrap_or_default();
        config.get(INTERRUPT_PIN).is_some_and(|&pin| pin != 0)
    }

    /// The name of its device file below `/dev`, if its driver is one of uio's.
    pub fn uio(&self) -> Option<String> {
        let mut entries = fs::read_dir(self.dir.join("uio")).ok()?;
        entries.next()?.ok()?.file_name().into_string().ok()
    }

    /// Whether it is behind an IOMMU.
    pub fn has_iommu(&self) -> bool {
        self.dir.join("iommu_group").exists()
    }

    /// Has it decode its memory.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn enable(&self) -> io::Result<()> {
        fs::write(self.dir.join("enable"), "1")
    }

    /// Binds it to a driver; it has none yet.
    ///
    /// # Errors
    /// It is bound to another driver, or this one does not accept it.
    fn bind(&self, driver: &str) -> io::Result<()> {
        match self.driver() {
            Some(has) if has == driver => return Ok(()),
            Some(has) => return Err(io::Error::other(format!("it is bound to driver {has}"))),
            None => {}
        }
        fs::write(self.dir.join("driver_override"), driver)?;
        // PCI's own directory is the parent of the devices'.
        let bus = self.dir.parent().and_then(Path::parent);
        let probe = bus
            .unwrap_or(Path::new("/sys/bus/pci"))
            .join("drivers_probe");
        fs::write(probe, &self.address)?;
        match self.driver() {
            Some(has) if has == driver => Ok(()),
            _ => {
                // It is left as it was found.
                let _ = fs::write(self.dir.join("driver_override"), "\n");
                Err(io::Error::other(format!(
                    "driver {driver} does not accept it (is its module loaded?)"
                )))
            }
        }
    }

    /// Binds it to a driver and calls `take`; unbinds it if that fails.
    ///
    /// # Errors
    /// It cannot be bound, or `take` failed.
    pub fn with_driver<T, E: From<io::Error>>(
        &self,
        driver: &str,
        take: impl FnOnce() -> Result<T, E>,
    ) -> Result<T, E> {
        let had = self.driver().is_some();
        if !had {
            // The driver may be a module, or built in; then, and without modprobe, this does nothing.
            let mut modprobe = Command::new("modprobe");
            modprobe.args(["-q", driver]);
            let quiet = modprobe.stdin(Stdio::null()).stderr(Stdio::null());
            drop(reap::status(quiet));
        }
        self.bind(driver)?;
        let taken = take();
        if taken.is_err() && !had {
            self.release();
        }
        taken
    }

    /// Unbinds it from its driver.
    fn release(&self) {
        let _ = fs::write(self.dir.join("driver/unbind"), &self.address);
        let _ = fs::write(self.dir.join("driver_override"), "\n");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn function(at: &Path, address: &str, vendor: &str, device: &str) -> PathBuf {
        let dir = at.join(address);
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("vendor"), format!("{vendor}\n")).unwrap();
        fs::write(dir.join("device"), format!("{device}\n")).unwrap();
        dir
    }

    #[test]
    fn only_ivshmem_functions_are_found_and_their_bars_are_read() {
        let at = tempfile::tempdir().unwrap();
        let at = at.path();
        assert_eq!(candidates(&at.join("none")), vec![]);
        function(at, "0000:00:02.0", "0x1af4", "0x1053"); // a virtio device
        function(at, "0000:00:05.0", "0x8086", "0x1110");
        let dir = function(at, "0000:00:04.0", "0x1af4", "0x1110");
        function(at, "0000:00:03.0", "0x1af4", "0x1110");
        fs::create_dir(at.join("0000:00:06.0")).unwrap(); // gone while it is looked at
        let table = "0x00000000febf1000 0x00000000febf10ff 0x0000000000040200\n\
                     0x0000000000000000 0x0000000000000000 0x0000000000000000\n\
                     0x0000008000000000 0x00000080007fffff 0x000000000014220c\n\
                     0x000000000000c000 0x000000000000c03f 0x0000000000040101\n";
        fs::write(dir.join("resource"), table).unwrap();
        let found = candidates(at);
        let names: Vec<_> = found.iter().map(|f| f.address.as_str()).collect();
        assert_eq!(names, ["0000:00:03.0", "0000:00:04.0"]);
        let bars: Vec<_> = (0..5).map(|n| found[1].bar(n)).collect();
        let bytes = |bytes| Some(Bar { bytes });
        assert_eq!(bars, [bytes(256), None, bytes(8 << 20), None, None]);
        assert!(found[0].bar(2).is_none() && !found[1].has_iommu());
        assert!(!found[1].has_pin() && found[1].uio().is_none());
        let mut config = [0; 64];
        fs::write(dir.join("config"), config).unwrap();
        assert!(!found[1].has_pin());
        config[0x3d] = 1;
        fs::write(dir.join("config"), config).unwrap();
        fs::create_dir_all(dir.join("uio/uio3")).unwrap();
        assert!(found[1].has_pin());
        assert_eq!(found[1].uio().as_deref(), Some("uio3"));
    }

    #[test]
    fn a_function_that_another_driver_has_is_left_alone() {
        let at = tempfile::tempdir().unwrap();
        let dir = function(at.path(), "0000:00:04.0", "0x1af4", "0x1110");
        std::os::unix::fs::symlink("/drivers/somebodys", dir.join("driver")).unwrap();
        let found = candidates(at.path());
        assert!(found[0].bind("vfio-pci").is_err());
        assert!(!dir.join("driver_override").exists());
    }
}
