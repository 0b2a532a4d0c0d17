//! Whether a program needs something of the image to start.

use elf::ElfBytes;
use elf::abi::PT_INTERP;
use elf::endian::AnyEndian;

/// Returns the path of the dynamic linker that a program names. `None`: it is static, or no ELF file.
pub(super) fn of(program: &[u8]) -> Option<String> {
    let file = ElfBytes::<AnyEndian>::minimal_parse(program).ok()?;
    let header = file.segments()?.iter().find(|s| s.p_type == PT_INTERP)?;
    let path = file.segment_data(&header).ok()?;
    let path = path.split(|byte| *byte == 0).next()?;
    String::from_utf8(path.to_vec()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dynamic_program_names_its_linker_and_anything_else_names_none() {
        let program = std::fs::read("/bin/true").unwrap();
        assert!(of(&program).unwrap().starts_with("/lib"));
        for other in [
            &b""[..],
            b"ELF",
            b"#!/bin/sh",
            &program[..program.len().min(80)],
        ] {
            assert_eq!(of(other), None);
        }
    }
}
