//! The command line.

use std::path::PathBuf;

use adit_api::NewVm;
use adit_channel::device::GuestCid;
use anyhow::ensure;
use clap::{Args, Parser, Subcommand};

use crate::console::Line;
use crate::machine::CPUS_MAX;
use crate::pci::REGION_MAX;
use crate::seccomp::Filters;
use adit_names::VmId;
use adit_port::vmm::Registration;

const EXAMPLES: &str = "\
Examples:
  adit-vmm run --kernel /boot/vmlinuz --initrd initrd --cmdline 'console=ttyS0' --vsock cid=3,uds=/run/web-1.vsock
  adit-vmm run --kernel vmlinux --initrd initrd --vsock cid=3 --aditd /run/adit/aditd.sock --name web-1 --allow 80,22 --ring
  adit-vmm run --kernel vmlinux --disk state.ext4 --cpus 2 --memory 1G --serial web-1.log
  curl --unix-socket web-1.api -X PUT http://vm/pause; curl --unix-socket web-1.api -X PUT -d '{\"dir\":\"snap\"}' http://vm/snapshot
  adit-vmm restore --from snap --vsock cid=3,uds=/run/web-1.vsock

Exit status: 0 the guest switched itself off, 3 it asked for a reset (start it again), 1 an error.";

/// A small VMM that boots stock Linux with adit's vsock device in it.
#[derive(Debug, Parser)]
#[command(name = "adit-vmm", version, after_help = EXAMPLES)]
pub struct Options {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Boot a kernel and run it to its end
    Run(Run),
    /// Continue a VM from a snapshot, which PUT /snapshot of its API wrote
    Restore(Restore),
    /// Try KVM with a guest that needs no Linux, and only user mode of KVM
    Bare {
        /// The image: adit-bare, built for x86_64-unknown-none
        image: PathBuf,
        /// Run the guest's side of ring and engine, and print figures
        #[arg(long)]
        ring: bool,
    },
}

/// What to boot.
#[derive(Debug, Args)]
pub struct Boot {
    /// ELF kernel with a PVH note, or bzImage
    #[arg(long, value_name = "FILE")]
    pub kernel: PathBuf,
    /// Initramfs
    #[arg(long, value_name = "FILE")]
    pub initrd: Option<PathBuf>,
    /// Kernel command line
    #[arg(long, default_value = "console=ttyS0")]
    pub cmdline: String,
}

#[derive(Debug, Args)]
pub struct Run {
    #[command(flatten)]
    pub boot: Boot,
    /// Processors
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=i64::from(CPUS_MAX)))]
    pub cpus: u8,
    /// Memory: 512M, 2G
    #[arg(long, default_value = "512M", value_parser = size)]
    pub memory: u64,
    #[command(flatten)]
    pub host: Host,
}

#[derive(Debug, Args)]
pub struct Restore {
    /// The snapshot's directory; it does not change, and may be restored again
    #[arg(long, value_name = "DIR")]
    pub from: PathBuf,
    #[command(flatten)]
    pub host: Host,
}

#[derive(Debug, Args)]
pub struct Host {
    /// The serial line's other end: stdio (ctrl-a x stops the VM) or a file, of 64 MiB at most
    #[arg(long, default_value = "stdio")]
    pub serial: Line,
    /// Socket of the operator's API: GET /vm, PUT /pause, /resume, /snapshot, /stop
    #[arg(long, value_name = "SOCKET")]
    pub api: Option<PathBuf>,
    /// Let guest-driven threads make any system call
    #[arg(long)]
    no_seccomp: bool,
    /// Disk image, which the guest sees as /dev/vda
    #[arg(long, value_name = "FILE")]
    pub disk: Option<PathBuf>,
    /// cid=N[,uds=PATH]: the guest's address, and a Unix socket as in Firecracker (CONNECT PORT; PATH_PORT for the guest's dials)
    #[arg(long, value_parser = vsock)]
    pub vsock: Option<VsockOptions>,
    /// Have aditd serve the VM: its API socket (RUN_DIR/aditd.sock)
    #[arg(long, value_name = "SOCKET", requires_all = ["name", "vsock"])]
    aditd: Option<PathBuf>,
    /// The VM's name in aditd
    #[arg(long, requires = "aditd")]
    name: Option<VmId>,
    /// Give the guest a ring beside its vsock: memory of this size, a power of two, that it shares with the host
    #[arg(long, value_name = "SIZE", num_args = 0..=1, default_missing_value = "4M", value_parser = ring, requires = "aditd")]
    pub ring: Option<usize>,
    /// TCP ports of the guest that aditd lets clients reach
    #[arg(long, value_delimiter = ',', requires = "aditd")]
    allow: Vec<u16>,
    /// Plain vsock ports of the guest that aditd lets clients reach
    #[arg(long, value_delimiter = ',', requires = "aditd")]
    allow_vsock: Vec<u32>,
}

/// The vsock device.
#[derive(Clone, Debug)]
pub struct VsockOptions {
    pub cid: GuestCid,
    pub uds: Option<PathBuf>,
}

impl Host {
    /// The seccomp filters of the guest-driven threads.
    ///
    /// # Errors
    /// The filters cannot be made.
    pub fn filters(&self) -> anyhow::Result<Filters> {
        match self.no_seccomp {
            true => Ok(Filters::default()),
            false => Filters::on(),
        }
    }

    /// How aditd will know the VM. `None`: the guest's streams go to Unix sockets.
    ///
    /// # Errors
    /// The options name two owners of the guest's channel.
    pub fn registration(&self, vsock: &VsockOptions) -> anyhow::Result<Option<Registration>> {
        let (Some(aditd), Some(name)) = (&self.aditd, &self.name) else {
            return Ok(None);
        };
        ensure!(
            vsock.uds.is_none(),
            "uds= and --aditd exclude each other: the guest's channel has one owner"
        );
        Ok(Some(Registration {
            aditd: aditd.clone(),
            vm: NewVm {
                name: name.to_string(),
                cid: vsock.cid.get(),
                carrier: None,
                allow: self.allow.clone(),
                allow_vsock: self.allow_vsock.clone(),
                allow_services: vec![],
            },
        }))
    }
}

fn vsock(text: &str) -> Result<VsockOptions, String> {
    let (mut cid, mut uds) = (None, None);
    for part in text.split(',') {
        match part.split_once('=') {
            Some(("cid", n)) => {
                let n = number(n).map_err(|e| format!("cid {e}"))?;
                cid = Some(GuestCid::new(n).ok_or("guests' CIDs are 3 to 4294967294")?);
            }
            Some(("uds", path)) => uds = Some(path.into()),
            _ => return Err(format!("`{part}` is neither cid=N nor uds=PATH")),
        }
    }
    let cid = cid.ok_or("it needs cid=N")?;
    Ok(VsockOptions { cid, uds })
}

fn ring(text: &str) -> Result<usize, String> {
    let fits = Some(size(text)?).filter(|&b| b.is_power_of_two() && b <= REGION_MAX);
    fits.map(|b| b as usize)
        .ok_or_else(|| "a power of two, 1G at most".to_owned())
}

/// Digits only; `parse` alone would accept a sign.
fn number(text: &str) -> Result<u64, String> {
    if !text.bytes().all(|b| b.is_ascii_digit()) {
        return Err(format!("`{text}`: digits only"));
    }
    text.parse().map_err(|e| format!("`{text}`: {e}"))
}

fn size(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.as_bytes().last() {
        Some(b'M') => (&text[..text.len() - 1], 20),
        Some(b'G') => (&text[..text.len() - 1], 30),
        _ => return Err("a number with M or G, such as 512M".to_owned()),
    };
    number(digits)?
        .checked_mul(1 << shift)
        .ok_or_else(|| "too large".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_digits_and_nothing_else() {
        assert_eq!(size("512M"), Ok(512 << 20));
        for bad in [
            "+512M",
            "-1M",
            "M",
            "",
            "512",
            " 1M",
            "99999999999999999999M",
        ] {
            assert!(size(bad).is_err(), "{bad}");
        }
        assert!(vsock("cid=3").is_ok());
        for bad in ["cid=+3", "cid=-3", "cid=", "cid=2", "cid=0x3"] {
            assert!(vsock(bad).is_err(), "{bad}");
        }
    }
}
