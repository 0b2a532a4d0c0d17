//! Where a card may be, and what reads it there. The order is that of [`Place::ALL`].
//!
//! | place | where | put there by |
//! |---|---|---|
//! | file | `card` of the configuration, `/etc/adit/card` | whoever made the image, cloud-init |
//! | credential | `$CREDENTIALS_DIRECTORY/adit.card`, or systemd's own `/run/credentials/@system/adit.card` | systemd, which may have it from SMBIOS, fw_cfg or a file |
//! | SMBIOS | a string `io.adit.card=…` of type 11 in `/sys/firmware/dmi/tables/DMI` | `-smbios type=11,value=…` of QEMU (q35; microvm has no SMBIOS) |
//! | fw_cfg | `/sys/firmware/qemu_fw_cfg/by_name/opt/io.adit.card/raw` (kernel module `qemu_fw_cfg`) | `-fw_cfg name=opt/io.adit.card,file=…` |
//! | kernel command line | the word `adit.card=…` in `/proc/cmdline` | whatever boots the kernel |

use std::fs::OpenOptions;
use std::io::{self, ErrorKind, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use adit_tasks::card::{from_fields, from_smbios, from_text};

use super::PlaceError;

/// Most bytes that are read of a place: SMBIOS has all tables in one.
const READ_MAX: u64 = 1 << 20;

/// A place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    /// A file in the image.
    File,
    /// A credential of systemd.
    Credential,
    /// A string of the machine's maker.
    Smbios,
    /// QEMU's configuration device.
    FwCfg,
    /// The kernel's command line.
    CommandLine,
}

impl Place {
    /// All of them, the first that counts first.
    pub const ALL: [Self; 5] = [
        Self::File,
        Self::Credential,
        Self::Smbios,
        Self::FwCfg,
        Self::CommandLine,
    ];

    /// For people.
    pub fn name(self) -> &'static str {
        match self {
            Self::File => "file",
            Self::Credential => "systemd credential",
            Self::Smbios => "SMBIOS",
            Self::FwCfg => "fw_cfg",
            Self::CommandLine => "kernel command line",
        }
    }

    /// The card's envelope in what is there; none if there is none.
    fn envelope(self, bytes: &[u8]) -> Result<Option<Vec<u8>>, PlaceError> {
        Ok(match self {
            Self::File | Self::Credential | Self::FwCfg => Some(from_text(bytes)?),
            Self::Smbios => from_smbios(bytes, "io.adit.card=")?,
            Self::CommandLine => from_fields(bytes, "adit.card=")?,
        })
    }
}

/// What has the places.
pub trait Places {
    /// The bytes of a place; none if this machine does not have it.
    ///
    /// # Errors
    /// It is there, and cannot be read.
    fn read(&self, place: Place) -> io::Result<Option<Vec<u8>>>;

    /// The envelope in a place.
    ///
    /// # Errors
    /// What is there cannot be used.
    fn look(&self, place: Place) -> Result<Option<Vec<u8>>, PlaceError> {
        match self.read(place)? {
            Some(bytes) => place.envelope(&bytes),
            None => Ok(None),
        }
    }
}

/// This machine's.
#[derive(Debug)]
pub struct System<'a> {
    /// The file of the configuration.
    pub card: &'a Path,
}

impl Places for System<'_> {
    fn read(&self, place: Place) -> io::Result<Option<Vec<u8>>> {
        let files: Vec<PathBuf> = match place {
            Place::File => vec![self.card.into()],
            Place::Credential => std::env::var_os("CREDENTIALS_DIRECTORY")
                .into_iter()
                .map(PathBuf::from)
                .chain(["/run/credentials/@system".into()])
                .map(|dir| dir.join("adit.card"))
                .collect(),
            Place::Smbios => vec!["/sys/firmware/dmi/tables/DMI".into()],
            Place::FwCfg => vec!["/sys/firmware/qemu_fw_cfg/by_name/opt/io.adit.card/raw".into()],
            Place::CommandLine => vec!["/proc/cmdline".into()],
        };
        for file in files {
            match read(&file) {
                // Not this machine's; or its owner's only, and the agent runs as somebody else.
                Err(e) if e.kind() == ErrorKind::NotFound => continue,
                Err(e) if e.kind() == ErrorKind::PermissionDenied && place != Place::File => {
                    continue;
                }
                bytes => return bytes.map(Some),
            }
        }
        Ok(None)
    }
}

fn read(file: &Path) -> io::Result<Vec<u8>> {
    // A fifo is not waited for.
    let mut options = OpenOptions::new();
    let open = options.read(true).custom_flags(libc::O_NONBLOCK);
    let mut bytes = Vec::new();
    open.open(file)?.take(READ_MAX).read_to_end(&mut bytes)?;
    Ok(bytes)
}
