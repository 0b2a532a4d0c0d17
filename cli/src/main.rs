//! The program `adit`: all of it is in the library, so that fuzz targets reach its parts.

use std::process::ExitCode;

fn main() -> ExitCode {
    adit_cli::main()
}
