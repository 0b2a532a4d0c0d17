//! Where a card may be, and what reads it there. The order is that of [`Place::ALL`].
//!
//! | place | where | put there by |
//! |---|---|---|
//! | file | `card` of the configuration, `/etc/adit/card` | whoever made the image, cloud-init |
//! | credential | `$CREDENTIALS_DIRECTORY/adit.card`, or systemd's own `/run/credentials/@system/adit.card` | systemd, which may have it from SMBIOS, fw_cfg or a file |
//! | SMBIOS | a string `io.adit.card=…` of type 11 in `/sys/firmware/dmi/tables/DMI` | `-smbios type=11,value=…` of QEMU (q35; microvm has no SMBIOS) |
//! | fw_cfg | `/sys/firmware/qemu_fw_cfg/by_name/opt/io.adit.card/raw` (kernel module `qemu_fw_cfg`) | `-fw_cfg name=opt/io.adit.card,file=…` |
//! | kernel command line | the word `adit.card=…` in `/proc/cmdline` | whatever boots the kernel |
//!
//! A trust document is looked for in the same places: `trust.json` beside the card's file, `adit.trust`, `io.adit.trust`.

use std::fs::OpenOptions;
use std::io::{self, ErrorKind, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use adit_tasks::card::{from_fields, from_smbios, from_text_as};
use adit_tasks::dsse::Type;

use super::PlaceError;

/// The file with a trust document, beside that with the card.
pub const TRUST_FILE: &str = "trust.json";

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

    /// The envelope of this type in what is there; none if there is none.
    fn envelope(self, of: Type, bytes: &[u8]) -> Result<Option<Vec<u8>>, PlaceError> {
        let name = name(of);
        Ok(match self {
            Self::File | Self::Credential | Self::FwCfg => Some(from_text_as(of, bytes)?),
            Self::Smbios => from_smbios(of, bytes, &format!("io.adit.{name}="))?,
            Self::CommandLine => from_fields(of, bytes, &format!("adit.{name}="))?,
        })
    }
}

/// How places call an envelope of this type.
fn name(of: Type) -> &'static str {
    match of {
        Type::Trust => "trust",
        _ => "card",
    }
}

/// What has the places.
pub trait Places {
    /// The bytes of a place where an envelope of this type may be; none if this machine does not have it.
    ///
    /// # Errors
    /// It is there, and cannot be read.
    fn read(&self, of: Type, place: Place) -> io::Result<Option<Vec<u8>>>;

    /// The envelope in a place.
    ///
    /// # Errors
    /// What is there cannot be used.
    fn look(&self, of: Type, place: Place) -> Result<Option<Vec<u8>>, PlaceError> {
        match self.read(of, place)? {
            Some(bytes) => place.envelope(of, &bytes),
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
    fn read(&self, of: Type, place: Place) -> io::Result<Option<Vec<u8>>> {
        let name = name(of);
        let files: Vec<PathBuf> = match place {
            Place::File if of == Type::Trust => vec![self.card.with_file_name(TRUST_FILE)],
            Place::File => vec![self.card.into()],
            Place::Credential => std::env::var_os("CREDENTIALS_DIRECTORY")
                .into_iter()
                .map(PathBuf::from)
                .chain(["/run/credentials/@system".into()])
                .map(|dir| dir.join(format!("adit.{name}")))
                .collect(),
            Place::Smbios => vec!["/sys/firmware/dmi/tables/DMI".into()],
            Place::FwCfg => {
                let of_qemu = "/sys/firmware/qemu_fw_cfg/by_name/opt/io.adit";
                vec![format!("{of_qemu}.{name}/raw").into()]
            }
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
