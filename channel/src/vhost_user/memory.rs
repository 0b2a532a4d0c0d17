//! The memory table of a frontend: it is checked, mapped, and used to translate the frontend's addresses to guest
//! addresses.
//!
//! | rule | if it is broken |
//! |---|---|
//! | 1..=32 regions, and the same number of descriptors | refused by crate `vhost` |
//! | no wrap-around in gpa, user address, or offset, each plus size | refused |
//! | regions overlap neither in guest nor in user addresses | refused |
//! | offset + size is within the file; whole pages if they are huge | refused: an access could raise SIGBUS |
//! | the file cannot shrink (F_SEAL_SHRINK), unless the VM's policy allows it | refused |
//!
//! A refused table changes nothing. Its descriptors are closed with the values that own them.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use adit_passed::Passed;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use rustix::fs::{AtFlags, FileType, StatxFlags, fstatfs, statx};
use vhost::vhost_user::message::VhostUserMemoryRegion;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap, MmapRegion,
};

use super::handover::Region;

/// Guest memory, mapped from the frontend's descriptors.
pub type VmMemory = GuestMemoryMmap<()>;

/// Which descriptors a frontend may pass as guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemoryPolicy {
    /// Only memfds that are sealed against shrinking (the default of QEMU's memory-backend-memfd).
    SealedMemfd,
    /// Any file, for example on hugetlbfs. A process that can truncate the file can end the process that maps it
    /// (SIGBUS).
    AnyFile,
}

/// `f_type` of a file system with huge pages.
const HUGETLBFS_MAGIC: u128 = 0x958458f6;

/// Why a memory table was refused: the frontend's fault.
#[derive(Debug, thiserror::Error)]
pub(super) enum TableError {
    #[error("{regions} regions with {files} descriptors")]
    Count { regions: usize, files: usize },
    #[error("region {index}: {what} {start:#x} + {size:#x} wraps, or the size is 0")]
    Wraps {
        index: usize,
        what: &'static str,
        start: u64,
        size: u64,
    },
    #[error("regions overlap in {what} addresses at {at:#x}")]
    Overlap { what: &'static str, at: u64 },
    #[error("region {index}: not a regular file or memfd")]
    NotAFile { index: usize },
    #[error("region {index}: ends at {end:#x} of a file of {file_bytes:#x} bytes")]
    PastEnd {
        index: usize,
        end: u64,
        file_bytes: u64,
    },
    #[error(
        "region {index}: memory is not a memfd sealed against shrinking: use memory-backend-memfd with seal=on (QEMU's default), or allow any file as this VM's memory (allow_any_memory = true in aditd.toml)"
    )]
    NotSealed { index: usize },
    #[error(
        "region {index}: offset or size is not a whole number of its huge pages of {page} bytes"
    )]
    Pages { index: usize, page: u64 },
    #[error("region {index}: cannot be mapped: {reason}")]
    Map { index: usize, reason: String },
}

/// A region in the frontend's address space, with the file that it is mapped from.
#[derive(Clone, Debug)]
struct UserRegion {
    user: u64,
    gpa: u64,
    size: u64,
    offset: u64,
    file: Arc<File>,
}

/// A mapped memory table.
#[derive(Debug)]
pub(super) struct MemTable {
    mem: Arc<VmMemory>,
    regions: Vec<UserRegion>,
}

impl MemTable {
    /// Checks a table and maps it.
    pub(super) fn map(
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        policy: MemoryPolicy,
    ) -> Result<Self, TableError> {
        if regions.is_empty() || regions.len() != files.len() {
            return Err(TableError::Count {
                regions: regions.len(),
                files: files.len(),
            });
        }
        let mut user_regions = Vec::with_capacity(regions.len());
        for (index, (region, file)) in regions.iter().zip(files).enumerate() {
            check_ranges(index, region)?;
            user_regions.push(UserRegion {
                user: region.user_addr,
                gpa: region.guest_phys_addr,
                size: region.memory_size,
                offset: region.mmap_offset,
                file: Arc::new(file),
            });
        }
        check_overlap("guest", user_regions.iter().map(|r| (r.gpa, r.size)))?;
        check_overlap("user", user_regions.iter().map(|r| (r.user, r.size)))?;

        let mut mapped = Vec::with_capacity(regions.len());
        for (index, (region, ours)) in regions.iter().zip(&user_regions).enumerate() {
            check_file(index, region, &ours.file, policy)?;
            let failed = |reason: String| TableError::Map { index, reason };
            let offset = FileOffset::from_arc(ours.file.clone(), ours.offset);
            let size = usize::try_from(ours.size).map_err(|e| failed(e.to_string()))?;
            // Without MAP_NORESERVE the kernel reserves huge pages now. If there are too few, this call fails;
            // otherwise a later access would raise SIGBUS.
            let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
            let mmap = MmapRegion::build(Some(offset), size, prot, flags)
                .map_err(|e| failed(e.to_string()))?;
            let gpa = GuestAddress(region.guest_phys_addr);
            mapped.push(
                GuestRegionMmap::new(mmap, gpa)
                    .ok_or_else(|| failed("address wraps".to_owned()))?,
            );
        }
        mapped.sort_by_key(GuestMemoryRegion::start_addr);
        let mem = VmMemory::from_regions(mapped).map_err(|e| TableError::Map {
            index: 0,
            reason: e.to_string(),
        })?;
        Ok(Self {
            mem: Arc::new(mem),
            regions: user_regions,
        })
    }

    pub(super) fn memory(&self) -> &Arc<VmMemory> {
        &self.mem
    }

    /// Returns the regions as the frontend described them, with their descriptors.
    pub(super) fn regions(&self) -> impl Iterator<Item = (Region, BorrowedFd<'_>)> {
        self.regions.iter().map(|r| {
            let region = Region {
                gpa: r.gpa,
                size: r.size,
                user: r.user,
                offset: r.offset,
            };
            (region, r.file.as_fd())
        })
    }

    /// Translates an address of the frontend to a guest address.
    pub(super) fn translate(&self, user: u64) -> Option<u64> {
        self.regions.iter().find_map(|r| {
            let offset = user.checked_sub(r.user)?;
            (offset < r.size).then(|| r.gpa + offset)
        })
    }
}

/// Converts passed descriptors to memory, as far as this can be checked without asking a file system.
pub(super) fn take(fds: Vec<Passed>, policy: MemoryPolicy) -> Result<Vec<File>, TableError> {
    let take = |(index, fd): (usize, Passed)| match policy {
        MemoryPolicy::SealedMemfd => fd.memory().map_err(|_| TableError::NotSealed { index }),
        MemoryPolicy::AnyFile => fd
            .regular_file()
            .map_err(|_| TableError::NotAFile { index }),
    };
    let taken = fds.into_iter().enumerate().map(take);
    taken.map(|fd| fd.map(File::from)).collect()
}

fn check_ranges(index: usize, region: &VhostUserMemoryRegion) -> Result<(), TableError> {
    let size = region.memory_size;
    let starts = [
        ("guest address", region.guest_phys_addr),
        ("user address", region.user_addr),
        ("file offset", region.mmap_offset),
    ];
    for (what, start) in starts {
        if size == 0 || start.checked_add(size).is_none() || usize::try_from(size).is_err() {
            return Err(TableError::Wraps {
                index,
                what,
                start,
                size,
            });
        }
    }
    Ok(())
}

fn check_overlap(
    what: &'static str,
    ranges: impl Iterator<Item = (u64, u64)>,
) -> Result<(), TableError> {
    let mut ranges: Vec<_> = ranges.collect();
    ranges.sort_unstable();
    for pair in ranges.windows(2) {
        let (start, size) = pair[0];
        let (next, _) = pair[1];
        if start + size > next {
            return Err(TableError::Overlap { what, at: next });
        }
    }
    Ok(())
}

fn check_file(
    index: usize,
    region: &VhostUserMemoryRegion,
    file: &File,
    policy: MemoryPolicy,
) -> Result<(), TableError> {
    // This check comes first: only memory has seals, so the calls after it cannot block on a file server.
    let seals = fcntl(file, FcntlArg::F_GET_SEALS).map(SealFlag::from_bits_truncate);
    if policy == MemoryPolicy::SealedMemfd
        && !seals.is_ok_and(|seals| seals.contains(SealFlag::F_SEAL_SHRINK))
    {
        return Err(TableError::NotSealed { index });
    }
    let failed = |reason: String| TableError::Map { index, reason };
    // Use only attributes that the kernel has cached, because a file server may never answer.
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let wanted = StatxFlags::TYPE | StatxFlags::SIZE;
    let stat = statx(file, c"", flags, wanted).map_err(|e| failed(e.to_string()))?;
    if FileType::from_raw_mode(stat.stx_mode.into()) != FileType::RegularFile {
        return Err(TableError::NotAFile { index });
    }
    if seals.is_ok() {
        // A part of a huge page cannot be unmapped.
        let pages = fstatfs(file).map_err(|e| failed(e.to_string()))?;
        let page = u64::try_from(pages.f_bsize).unwrap_or(u64::MAX).max(1);
        let whole = |n: u64| n.is_multiple_of(page);
        if u128::try_from(pages.f_type) == Ok(HUGETLBFS_MAGIC)
            && !(whole(region.mmap_offset) && whole(region.memory_size))
        {
            return Err(TableError::Pages { index, page });
        }
    }
    let end = region.mmap_offset + region.memory_size;
    let file_bytes = stat.stx_size;
    if end > file_bytes {
        return Err(TableError::PastEnd {
            index,
            end,
            file_bytes,
        });
    }
    Ok(())
}
