//! The program for libFuzzer. It runs the target that `ADIT_FUZZ_TARGET` names.
#![no_main]

use std::sync::LazyLock;

use adit_fuzz::{TARGETS, Target};

static TARGET: LazyLock<Target> = LazyLock::new(|| {
    let name = std::env::var("ADIT_FUZZ_TARGET").unwrap_or_default();
    let found = TARGETS.iter().find(|(n, _)| *n == name);
    found
        .unwrap_or_else(|| panic!("ADIT_FUZZ_TARGET=`{name}` is not a target"))
        .1
});

libfuzzer_sys::fuzz_target!(|data: &[u8]| TARGET(data));
