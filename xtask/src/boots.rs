//! `cargo xtask soak --boots 50`: adit-vmm boots Debian 50 times, on one processor and on two in turn, in one emulated guest that
//! has KVM (L1). The first boot that hangs ends the run; the known cause of a hang is a missing clock to calibrate against.

use std::path::Path;
use std::time::Duration;

use adit_tests::guest::Identity;
use adit_tests::image::{Image, Kernel};
use adit_tests::nested::{HELPERS, Inner, Nested};

use crate::{progress, setup};

/// A boot takes 3 s to 20 s, depending on the machine's other work.
const BOOT_LIMIT: Duration = Duration::from_secs(60);

/// Runs in L2: prints that it is up, then ends.
const INNER: &str = r#"
echo "CPUS $(nproc) CLOCK $(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)"
poweroff -f
"#;

/// Runs in L1. LOG is the serial line and the VMM's output of the last boot.
const OUTER: &str = r#"
LOG=/tmp/boot.log boot=0
while [ $boot -lt $BOOTS ]; do
    boot=$((boot + 1)) cpus=$((2 - boot % 2)) begin=$(now)
    start --kernel /l2/vm/vmlinux --initrd /l2/vm/initrd --memory 192M --cpus $cpus \
        --cmdline "console=ttyS0 quiet panic=-1 mitigations=off"
    until_said ADIT-READY 60 || break
    echo "BOOTED $boot $(awk "BEGIN { print $(now) - $begin }")"
    ended 0 "switched itself off"
    grep -q "CPUS $cpus CLOCK kvm-clock" $LOG || fail "$(grep CPUS $LOG)"
done
echo NESTED-DONE boots
"#;

pub fn run(boots: u32, kernel: Kernel) -> anyhow::Result<bool> {
    setup::guest_binaries()?;
    setup::vmm_binary()?;
    let image = |kernel| Image::build(kernel, &|what| progress::line(what));
    let (outer, inner) = (image(Kernel::V6_1)?, image(kernel)?);
    let dir = adit_tests::target().join("tests/boots");
    let _ = std::fs::remove_dir_all(&dir);
    std::fs::create_dir_all(&dir)?;
    let guest = Inner {
        image: &inner,
        identity: Identity {
            name: "vm",
            vhost_socket: Path::new(""),
            agent: None,
            trust: None,
            script: INNER,
            boot_files: false,
        },
        packed: false,
        ssh: None,
    };
    let programs = [(adit_tests::vmm_bin(), "/bin/adit-vmm".to_owned())];
    let script = format!("{HELPERS}\nBOOTS={boots}\n{OUTER}");
    let mut l1 = Nested::boot(&outer, &[guest], &programs, &script, &dir)?;
    let mut took = Vec::new();
    l1.follow("NESTED-DONE", BOOT_LIMIT * (boots + 1), |line| {
        let seconds = line.strip_prefix("BOOTED ").and_then(|l| l.split_once(' '));
        took.extend(seconds.and_then(|(_, s)| s.parse::<f64>().ok()));
    })?;
    took.sort_by(f64::total_cmp);
    println!(
        "{} boots of {boots}, Linux {}: ready after {:.1} s (least), {:.1} s (median), {:.1} s (most)",
        took.len(),
        kernel.name(),
        took.first().copied().unwrap_or_default(),
        took.get(took.len() / 2).copied().unwrap_or_default(),
        took.last().copied().unwrap_or_default(),
    );
    Ok(took.len() == boots as usize)
}
