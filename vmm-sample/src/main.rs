//! `adit-vmm`: see the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    adit_vmm_sample::main()
}
