//! This program itself: its version, its architecture, and whether a file is a program for this machine.

use elf::abi::{EM_AARCH64, EM_RISCV, EM_X86_64};
use elf::endian::AnyEndian;
use elf::file::{Class, FileHeader, parse_ident};
use semver::Version;

/// What this program runs on, as `uname -m` says it.
pub const ARCHITECTURE: &str = std::env::consts::ARCH;

/// Bytes from a program's start in which its header is.
pub const HEAD: usize = 64;

/// This program's version.
pub fn version() -> Version {
    let text = test::version().unwrap_or_else(|| env!("CARGO_PKG_VERSION").into());
    // Cargo has parsed it already.
    Version::parse(&text).unwrap_or(Version::new(0, 0, 0))
}

/// The architecture that a program is for, by its first [`HEAD`] bytes; none: it is no ELF program.
pub fn architecture(head: &[u8]) -> Option<String> {
    let (ident, rest) = head.split_first_chunk::<{ elf::abi::EI_NIDENT }>()?;
    let ident = parse_ident::<AnyEndian>(ident).ok()?;
    let is_64 = ident.1 == Class::ELF64;
    let header = FileHeader::parse_tail(ident, rest.get(..HEAD - elf::abi::EI_NIDENT)?).ok()?;
    Some(match header.e_machine {
        EM_X86_64 if is_64 => "x86_64".into(),
        EM_AARCH64 if is_64 => "aarch64".into(),
        EM_RISCV if is_64 => "riscv64".into(),
        other => format!("machine_{other}"),
    })
}

/// What a test has written at the end of the program: another version, and how it fails.
pub mod test {
    #[cfg(feature = "test-util")]
    pub use there::{behaves, version};

    #[cfg(feature = "test-util")]
    mod there {
        use std::fs::File;
        use std::os::unix::fs::FileExt;
        use std::sync::LazyLock;

        /// `\nadit-test=VERSION,BEHAVIOUR\n` as the last bytes.
        static MARK: LazyLock<Option<(String, String)>> = LazyLock::new(|| {
            let file = File::open("/proc/self/exe").ok()?;
            let len = file.metadata().ok()?.len();
            let mut end = [0; 64];
            file.read_exact_at(&mut end, len.checked_sub(64)?).ok()?;
            let text = String::from_utf8_lossy(&end);
            let (_, mark) = text.trim_end().rsplit_once("\nadit-test=")?;
            let (version, behaves) = mark.split_once(',')?;
            Some((version.into(), behaves.into()))
        });

        /// The version that it is to have.
        pub fn version() -> Option<String> {
            MARK.clone().map(|(version, _)| version)
        }

        /// Whether it is to fail in this way.
        pub fn behaves(how: &str) -> bool {
            MARK.as_ref().is_some_and(|(_, behaves)| behaves == how)
        }
    }

    #[cfg(not(feature = "test-util"))]
    pub(super) fn version() -> Option<String> {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_program_is_for_this_machine_and_other_files_are_for_none() {
        let own = std::fs::read("/proc/self/exe").unwrap();
        assert_eq!(architecture(&own[..HEAD]).as_deref(), Some(ARCHITECTURE));
        assert_eq!(architecture(&own).as_deref(), Some(ARCHITECTURE));
        let mut foreign = own[..HEAD].to_vec();
        foreign[18] = 183;
        assert_eq!(architecture(&foreign).as_deref(), Some("aarch64"));
        foreign[18] = 8;
        assert_eq!(architecture(&foreign).as_deref(), Some("machine_8"));
        for other in [
            &b"#!/bin/sh\necho adit-guest 9.9.9\n"[..],
            b"",
            &own[1..HEAD],
            &own[..HEAD - 1],
        ] {
            assert_eq!(architecture(other), None);
        }
    }
}
