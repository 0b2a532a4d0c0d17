//! `cargo xtask demo --vmm`: the main job through `adit-vmm`, in an emulated guest that has KVM.

use std::time::Duration;

use adit_tests::image::Kernel;
use adit_tests::nested::Nested;

use crate::{progress, setup};

const LIMIT: Duration = Duration::from_secs(600);

pub fn run(kernel: Kernel) -> anyhow::Result<bool> {
    setup::run()?;
    let bins = setup::host_binaries(true)?;
    setup::guest_binaries()?;
    setup::vmm_binary()?;
    let dir = adit_tests::target().join("tests/demo-vmm");
    let _ = std::fs::remove_dir_all(&dir);
    std::fs::create_dir_all(&dir)?;
    let mut l1 = Nested::managed(&bins, kernel, &dir)?;
    l1.follow("NESTED-DONE", LIMIT, |line| {
        if let Some(what) = line.strip_prefix("SHOW ") {
            progress::line(what);
        }
    })?;
    println!(
        "all of it inside one emulated guest; its log is {}",
        dir.join("serial.log").display()
    );
    Ok(true)
}
