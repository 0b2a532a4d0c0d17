//! A disk image, and the file system in it that is the VM's root.
//!
//! | image | what is done |
//! |---|---|
//! | raw, a file system alone | it is the root |
//! | raw, GPT or MBR | the one partition with ext4 and `/etc` and `/usr` in it, or the one that the caller names |
//! | qcow2 | `qemu-img` makes it raw, and qcow2 again; one with a backing file or an external data file is refused before, because an image from somebody else could name a file of this host there |
//!
//! All work is done on a copy beside the image, which takes its place when it is whole: whatever happens, the old image or
//! the new one is there.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::fcntl::{FcntlArg, fcntl};
use tempfile::NamedTempFile;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned, big_endian};

use crate::ext4::{self, Ext4, Ext4Error};
use crate::program::{self, NoProgram};

/// Size of a sector in bytes, as partition tables of disk images count.
const SECTOR: u64 = 512;
/// Partitions that are looked at, at most: GPT's usual table.
const PARTITIONS_MAX: u32 = 128;

/// Why a disk image cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// It cannot be read, copied or replaced.
    #[error("cannot {what} {}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// With which file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// It is no regular file.
    #[error("{}: not a directory and not a disk image in a file", .0.display())]
    NoFile(PathBuf),
    /// A VM runs from it, or something else has it open for writing.
    #[error("{}: in use by another process: shut its VM down first", .0.display())]
    InUse(PathBuf),
    /// It holds something else.
    #[error(
        "{}: holds {what}, which cannot be written: install at the VM's first boot instead (`adit image cloud-init`), or into its root directory",
        path.display()
    )]
    Unsupported {
        /// The image.
        path: PathBuf,
        /// What it holds.
        what: &'static str,
    },
    /// Nothing in it is known.
    #[error("{}: neither a file system nor a partition table is recognised in it", .0.display())]
    Unknown(PathBuf),
    /// No partition is the root.
    #[error("{}: no partition holds an ext4 root file system (with /etc and /usr)", .0.display())]
    NoRoot(PathBuf),
    /// Several could be the root.
    #[error("{}: partitions {found:?} could each be the root: name one with --partition", path.display())]
    ManyRoots {
        /// The image.
        path: PathBuf,
        /// Their numbers.
        found: Vec<u32>,
    },
    /// The partition that was asked for is not there.
    #[error("{}: there is no partition {wanted} with an ext4 file system", path.display())]
    NoPartition {
        /// The image.
        path: PathBuf,
        /// Which was asked for.
        wanted: u32,
    },
    /// A qcow2 image names another file.
    #[error(
        "{}: has {what}: inject into that one, or make it one image first (`qemu-img convert -O qcow2`)",
        path.display()
    )]
    Backed {
        /// The image.
        path: PathBuf,
        /// What it has.
        what: &'static str,
    },
    /// A program failed.
    #[error("{program} failed: {said}")]
    Program {
        /// Its name.
        program: &'static str,
        /// What it said.
        said: String,
    },
    /// A program cannot be started.
    #[error(transparent)]
    NoProgram(#[from] NoProgram),
    /// The file system.
    #[error("{}", path.display())]
    Ext4 {
        /// The image.
        path: PathBuf,
        /// Why not.
        source: Ext4Error,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Format {
    Raw,
    Qcow2,
}

/// A copy of a disk image that is being worked on.
#[derive(Debug)]
pub struct Disk {
    image: PathBuf,
    format: Format,
    /// The raw copy.
    work: NamedTempFile,
    /// Where the root file system begins in it, in bytes.
    offset: u64,
    /// Keeps other processes out of the image, where they look at locks as QEMU does.
    _lock: Lock,
}

impl Disk {
    /// Copies an image and finds its root. `partition` is the number of the partition to use.
    ///
    /// # Errors
    /// It is in use, or has no root file system that can be written.
    pub fn open(image: &Path, partition: Option<u32>) -> Result<Self, DiskError> {
        let at = |what| on(what, image);
        let image = fs::canonicalize(image).map_err(at("open"))?;
        let meta = fs::metadata(&image).map_err(at("open"))?;
        if !meta.is_file() || meta.file_type().is_block_device() {
            return Err(DiskError::NoFile(image));
        }
        let lock = lock(&image)?;
        let mut head = [0; 4];
        let _ = lock.0.read_at(&mut head, 0).map_err(at("read"))?;
        let format = match &head {
            b"QFI\xfb" => Format::Qcow2,
            _ => Format::Raw,
        };
        let work = beside(&image)?;
        match format {
            Format::Raw => copy(&image, work.path())?,
            Format::Qcow2 => {
                check_alone(&image, &lock.0)?;
                convert(&image, Format::Qcow2, work.path(), Format::Raw)?;
            }
        }
        let file = File::open(work.path()).map_err(at("read the copy of"))?;
        let offset = root_of(&image, work.path(), &file, partition)?;
        Ok(Self {
            image,
            format,
            work,
            offset,
            _lock: lock,
        })
    }

    /// Opens the root file system.
    ///
    /// # Errors
    /// It cannot be read, or was not unmounted.
    pub fn root(&self) -> Result<Ext4, DiskError> {
        Ext4::open(self.work.path(), self.offset).map_err(|e| self.ext4(e))
    }

    /// Writes what was gathered in `root`, and puts the copy in the image's place.
    ///
    /// # Errors
    /// Something could not be written; the image is as it was.
    pub fn commit(self, root: Ext4) -> Result<(), DiskError> {
        root.commit().map_err(|e| self.ext4(e))?;
        let whole = match self.format {
            Format::Raw => self.work,
            Format::Qcow2 => {
                let packed = beside(&self.image)?;
                convert(self.work.path(), Format::Raw, packed.path(), Format::Qcow2)?;
                packed
            }
        };
        let at = |what| on(what, &self.image);
        let meta = fs::metadata(&self.image).map_err(at("read"))?;
        let file = OpenOptions::new()
            .write(true)
            .open(whole.path())
            .map_err(at("write"))?;
        file.set_permissions(fs::Permissions::from_mode(meta.mode() & 0o7777))
            .map_err(at("set the mode of"))?;
        // Only root can; for anybody else the copy is theirs as the image was.
        let _ = std::os::unix::fs::fchown(&file, Some(meta.uid()), Some(meta.gid()));
        file.sync_all().map_err(at("write"))?;
        whole
            .persist(&self.image)
            .map_err(|e| e.error)
            .map_err(at("replace"))?;
        let dir = self.image.parent().map(File::open);
        dir.map_or(Ok(()), |dir| dir.and_then(|d| d.sync_all()))
            .map_err(at("write the directory of"))
    }

    fn ext4(&self, source: Ext4Error) -> DiskError {
        DiskError::Ext4 {
            path: self.image.clone(),
            source,
        }
    }
}

fn on<'p>(what: &'static str, path: &'p Path) -> impl Fn(io::Error) -> DiskError + 'p {
    move |source| DiskError::Io {
        what,
        path: path.into(),
        source,
    }
}

/// An empty file beside an image, which is removed unless it takes the image's place.
fn beside(image: &Path) -> Result<NamedTempFile, DiskError> {
    let dir = image.parent().unwrap_or(Path::new("/"));
    let made = tempfile::Builder::new()
        .prefix(".adit-image-")
        .tempfile_in(dir);
    made.map_err(on("make a copy in", dir))
}

/// The byte of a file that QEMU checks before it opens the file for writing (block/file-posix.c: `RAW_LOCK_SHARED_BASE` and
/// the number of `BLK_PERM_WRITE`).
const QEMU_NO_WRITER: i64 = 200 + 1;

/// An image that QEMU does not write to while this is there.
#[derive(Debug)]
struct Lock(File);

/// A lock of `kind` on `len` bytes, 0 for all.
fn lock_of(kind: i32, start: i64, len: i64) -> nix::libc::flock {
    nix::libc::flock {
        l_type: kind as _,
        l_whence: nix::libc::SEEK_SET as _,
        l_start: start,
        l_len: len,
        l_pid: 0,
    }
}

impl Drop for Lock {
    /// Closing does not suffice: a program that another thread starts has the file until it runs.
    fn drop(&mut self) {
        let all = lock_of(nix::libc::F_UNLCK, 0, 0);
        let _ = fcntl(&self.0, FcntlArg::F_OFD_SETLK(&all));
    }
}

/// Refuses an image on which another process has a lock, as a VM has, and locks it. A file system without locks has none.
fn lock(image: &Path) -> Result<Lock, DiskError> {
    let file = OpenOptions::new().read(true).write(true).open(image);
    let file = file.map_err(on("write", image))?;
    let mut any = lock_of(nix::libc::F_WRLCK, 0, 0);
    let asked = fcntl(&file, FcntlArg::F_OFD_GETLK(&mut any));
    let free = i32::from(any.l_type) == nix::libc::F_UNLCK;
    if asked.is_ok() && !free {
        return Err(DiskError::InUse(image.into()));
    }
    let mine = lock_of(nix::libc::F_RDLCK, QEMU_NO_WRITER, 1);
    let _ = fcntl(&file, FcntlArg::F_OFD_SETLK(&mine));
    Ok(Lock(file))
}

/// Copies an image with its holes.
fn copy(from: &Path, to: &Path) -> Result<(), DiskError> {
    let mut cp = Command::new("cp");
    cp.args(["--sparse=always", "--reflink=auto", "--"])
        .arg(from)
        .arg(to);
    run("cp", "coreutils", cp)
}

fn convert(
    from: &Path,
    from_format: Format,
    to: &Path,
    to_format: Format,
) -> Result<(), DiskError> {
    let name = |format| match format {
        Format::Raw => "raw",
        Format::Qcow2 => "qcow2",
    };
    let mut qemu_img = Command::new("qemu-img");
    // The image is locked already, by this process.
    qemu_img.args([
        "convert",
        "-U",
        "-f",
        name(from_format),
        "-O",
        name(to_format),
    ]);
    qemu_img.arg(from).arg(to);
    run("qemu-img", "qemu-utils", qemu_img)
}

/// What is read of a qcow2 image's header (QEMU: docs/interop/qcow2.txt).
#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Qcow2Header {
    _magic: [u8; 4],
    version: big_endian::U32,
    backing_file_offset: big_endian::U64,
    _other: [u8; 56],
    /// From version 3 on.
    incompatible: big_endian::U64,
}

const _: () = assert!(size_of::<Qcow2Header>() == 80);

/// The data is in another file.
const EXTERNAL_DATA: u64 = 4;

/// Refuses a qcow2 image whose data is elsewhere. The header is read here: a `qemu-img` without the fix of CVE-2024-4467 opens
/// what the image names even when it is only asked for information.
fn check_alone(image: &Path, file: &File) -> Result<(), DiskError> {
    let mut header = [0; size_of::<Qcow2Header>()];
    let read = file.read_exact_at(&mut header, 0);
    read.map_err(on("read the header of", image))?;
    let header: Qcow2Header = zerocopy::transmute!(header);
    let data = header.version.get() >= 3 && header.incompatible.get() & EXTERNAL_DATA != 0;
    let what = match (header.backing_file_offset.get(), data) {
        (0, false) => return Ok(()),
        (0, true) => "an external data file",
        _ => "a backing file",
    };
    let path = image.to_owned();
    Err(DiskError::Backed { path, what })
}

fn run(program: &'static str, package: &'static str, command: Command) -> Result<(), DiskError> {
    let done = program::output(program, package, command)?;
    if done.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&done.stderr);
    let said = said.lines().take(3).collect::<Vec<_>>().join("; ");
    Err(DiskError::Program { program, said })
}

/// A partition: its number, and where it begins in bytes.
type Partition = (u32, u64);

/// Finds where the root file system begins.
fn root_of(image: &Path, work: &Path, file: &File, wanted: Option<u32>) -> Result<u64, DiskError> {
    if wanted.is_none() && ext4::is_at(file, 0) {
        return Ok(0);
    }
    let partitions = gpt(file).or_else(|| mbr(file));
    let Some(partitions) = partitions else {
        return Err(match known(file, 0) {
            Some(what) => DiskError::Unsupported {
                path: image.into(),
                what,
            },
            None => DiskError::Unknown(image.into()),
        });
    };
    let ext4 = |&&(_, begin): &&Partition| ext4::is_at(file, begin);
    if let Some(wanted) = wanted {
        let found = partitions.iter().filter(ext4).find(|(n, _)| *n == wanted);
        let none = || DiskError::NoPartition {
            path: image.into(),
            wanted,
        };
        return found.map(|(_, begin)| *begin).ok_or_else(none);
    }
    let roots: Vec<&Partition> = partitions
        .iter()
        .filter(ext4)
        .filter(|(_, begin)| {
            use crate::Root;
            // One that was not unmounted is a root, too: the caller hears of it when it is opened.
            match Ext4::open(work, *begin) {
                Ok(fs) => fs.has("etc") && fs.has("usr"),
                Err(Ext4Error::Unclean) => true,
                Err(_) => false,
            }
        })
        .collect();
    match roots[..] {
        [(_, begin)] => Ok(*begin),
        [] => Err(
            match partitions.iter().find_map(|(_, begin)| known(file, *begin)) {
                Some(what) => DiskError::Unsupported {
                    path: image.into(),
                    what,
                },
                None => DiskError::NoRoot(image.into()),
            },
        ),
        _ => Err(DiskError::ManyRoots {
            path: image.into(),
            found: roots.iter().map(|(n, _)| *n).collect(),
        }),
    }
}

/// What is read of GPT's header, which is the second sector (UEFI 2.10 §5.3.2).
#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct GptHeader {
    signature: [u8; 8],
    _other: [u8; 64],
    entries_lba: U64,
    entries: U32,
    entry_size: U32,
}

const _: () = assert!(size_of::<GptHeader>() == 88);

/// What is read of an entry of its table (UEFI 2.10 §5.3.3).
#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct GptEntry {
    kind: [u8; 16],
    _id: [u8; 16],
    first_lba: U64,
}

const _: () = assert!(size_of::<GptEntry>() == 40);

/// The partitions of a GPT. Its checksums are of no use here: what a partition holds is looked at. The copy of the table at
/// the end is not needed either: an image that was made larger has none there.
fn gpt(file: &File) -> Option<Vec<Partition>> {
    let mut header = [0; size_of::<GptHeader>()];
    file.read_exact_at(&mut header, SECTOR).ok()?;
    let header = GptHeader::ref_from_bytes(&header).ok()?;
    if header.signature != *b"EFI PART" {
        return None;
    }
    let table = header.entries_lba.get().checked_mul(SECTOR)?;
    let size = u64::from(header.entry_size.get());
    let mut found = Vec::new();
    for n in 0..header.entries.get().min(PARTITIONS_MAX) {
        let mut entry = [0; size_of::<GptEntry>()];
        let at = table.checked_add(u64::from(n) * size)?;
        file.read_exact_at(&mut entry, at).ok()?;
        let entry = GptEntry::ref_from_bytes(&entry).ok()?;
        let begin = entry.first_lba.get().checked_mul(SECTOR);
        if entry.kind != [0; 16]
            && let Some(begin) = begin
        {
            found.push((n + 1, begin));
        }
    }
    Some(found)
}

/// An entry of an MBR: offset 446 of the first sector, four of them.
#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct MbrEntry {
    boot: u8,
    first_chs: [u8; 3],
    kind: u8,
    last_chs: [u8; 3],
    first_lba: U32,
    sectors: U32,
}

const _: () = assert!(size_of::<MbrEntry>() == 16);

/// The kind of the entry that covers a disk with GPT.
const PROTECTIVE: u8 = 0xee;

/// Primary partitions only: a root in an extended one has not been seen for years.
fn mbr(file: &File) -> Option<Vec<Partition>> {
    let mut sector = [0; SECTOR as usize];
    file.read_exact_at(&mut sector, 0).ok()?;
    if sector[510..] != [0x55, 0xaa] {
        return None;
    }
    let entries = <[MbrEntry; 4]>::ref_from_bytes(&sector[446..510]).ok()?;
    let used = (1..)
        .zip(entries)
        .filter(|(_, e)| ![0, PROTECTIVE].contains(&e.kind) && e.sectors.get() != 0);
    let found: Vec<Partition> = used
        .map(|(n, e)| (n, u64::from(e.first_lba.get()) * SECTOR))
        .collect();
    (!found.is_empty()).then_some(found)
}

/// The name of what cannot be written, by its magic number.
fn known(file: &File, begin: u64) -> Option<&'static str> {
    const KNOWN: [(u64, &[u8], &str); 9] = [
        (0, b"XFSB", "an XFS file system"),
        (0x1_0040, b"_BHRfS_M", "a btrfs file system"),
        (0, b"hsqs", "a squashfs file system"),
        (1024, &[0xe2, 0xe1, 0xf5, 0xe0], "an EROFS file system"),
        (0, b"LUKS\xba\xbe", "an encrypted partition (LUKS)"),
        (512, b"LABELONE", "an LVM volume"),
        (0, b"KDMV", "a VMDK image"),
        (0, b"vhdxfile", "a VHDX image"),
        (0x8001, b"CD001", "an ISO image"),
    ];
    let holds = |at: u64, magic: &[u8]| {
        let mut found = vec![0; magic.len()];
        file.read_exact_at(&mut found, begin.saturating_add(at))
            .is_ok()
            && found == magic
    };
    KNOWN
        .iter()
        .find(|(at, magic, _)| holds(*at, magic))
        .map(|(_, _, what)| *what)
}
