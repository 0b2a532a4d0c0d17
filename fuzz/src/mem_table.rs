//! Memory tables of arbitrary regions over files that a frontend might pass.

use std::fs::File;
use std::os::fd::OwnedFd;

use adit_channel::vhost_user::{MemoryPolicy, map_table};
use arbitrary::{Result, Unstructured};
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

pub fn run(data: &[u8]) {
    let _ = attack(&mut Unstructured::new(data));
}

fn attack(u: &mut Unstructured<'_>) -> Result<()> {
    let count = u.int_in_range(0..=6usize)?;
    let regions: Vec<[u64; 4]> = (0..count).map(|_| region(u)).collect::<Result<_>>()?;
    let more = u.int_in_range(0..=15u8)?;
    let files = match more {
        0 => count + 1,
        1 => count.saturating_sub(1),
        _ => count,
    };
    let files: Vec<File> = (0..files).map(|_| file(u)).collect::<Result<_>>()?;
    let any: bool = u.arbitrary()?;
    let policy = if any {
        MemoryPolicy::AnyFile
    } else {
        MemoryPolicy::SealedMemfd
    };
    let Ok(mem) = map_table(&regions, files, policy) else {
        return Ok(());
    };
    // What was taken can be touched: no fault, to the last byte.
    for region in mem.iter() {
        let last = region.start_addr().0 + region.len() - 1;
        for at in [region.start_addr().0, last] {
            mem.write_obj(7u8, GuestAddress(at)).expect("mapped");
        }
    }
    assert_eq!(mem.num_regions(), regions.len());
    Ok(())
}

/// Guest address, size, user address, offset.
fn region(u: &mut Unstructured<'_>) -> Result<[u64; 4]> {
    let number = |u: &mut Unstructured<'_>| -> Result<u64> {
        Ok(match u.int_in_range(0..=5u8)? {
            0 => u.arbitrary()?,
            1 => u64::MAX - u64::from(u.arbitrary::<u16>()?),
            2 => u64::from(u.arbitrary::<u16>()?),
            _ => 4096 * u64::from(u.int_in_range(0..=40u8)?),
        })
    };
    Ok([number(u)?, number(u)?, number(u)?, number(u)?])
}

fn file(u: &mut Unstructured<'_>) -> Result<File> {
    let kind = u.int_in_range(0..=5u8)?;
    if kind == 0 {
        let (_, write) = nix::unistd::pipe().expect("a pipe");
        return Ok(write.into());
    }
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let fd: OwnedFd = memfd_create(c"fuzz", flags).expect("memfd");
    let file = File::from(fd);
    let pages: u16 = u.int_in_range(0..=64)?;
    let len = 4096 * u64::from(pages) + u64::from(kind == 1);
    file.set_len(len).expect("size");
    if kind != 2 {
        fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK)).expect("seal");
    }
    Ok(file)
}
