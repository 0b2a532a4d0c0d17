//! File systems of a whole Debian that stand still under load: journald, a writer that syncs and one that logs have to wait, and all of it goes
//! on by itself.

use adit_tests::process::wait_for;

use super::BOOT;
use super::unit::Booted;

/// Writes as much as it can, also by journald. Then says ten times a second how many writes its disk has taken.
const LOAD: &str = "\
    systemd-run --quiet --unit load-disk sh -c 'while :; do dd if=/dev/urandom of=/var/tmp/load bs=64k count=4 conv=fsync 2>/dev/null; done'; \
    systemd-run --quiet --unit load-log sh -c 'while :; do logger load; sleep 0.05; done'; \
    for n in $(seq 120); do awk '{ print $5 }' /sys/block/vda/stat; sleep 0.1; done; \
    systemctl kill -s KILL load-disk load-log";

/// The longest run of samples that are alike, and what is written behind it.
fn stillness(samples: &[u64]) -> (usize, u64) {
    let mut best = (0, 0);
    let mut from = 0;
    for at in 1..=samples.len() {
        if at == samples.len() || samples[at] != samples[from] {
            let behind = samples.last().unwrap() - samples[from];
            best = best.max((at - from, behind));
            from = at;
        }
    }
    best
}

/// A file system on a file of another one: whichever goes on first must not wait for the other.
const LOOP: &str = "\
    truncate -s 8M /var/tmp/loop.img && mkfs.ext4 -q /var/tmp/loop.img && mkdir -p /mnt/loop && mount -o loop /var/tmp/loop.img /mnt/loop";

/// Kills the process that freezes and the agent at once, when all stands still.
const KILLS: &str = "\
    AGENT=$(systemctl show adit-guest --value -p MainPID); \
    systemd-run --quiet --unit kills sh -c \"until ls /run/adit-guest/frozen.* 2>/dev/null; do sleep 0.2; done; sleep 3; \
    kill -KILL \\$(pgrep -x adit-freezer) $AGENT\"";

/// The next agent starts, which it could not if the disk still stood still.
pub(super) fn though_all_are_killed(booted: &Booted) {
    booted.ssh(LOOP);
    let main = || {
        booted.try_ssh("systemctl show adit-guest --value -p MainPID; date > /var/tmp/date; date > /mnt/loop/date")
    };
    let before = main().unwrap();
    booted.ssh(KILLS);
    let (status, said) = booted.adit(&["vm", "freeze", "web-1", "--lease", "300s"]);
    assert!(status == 0 && said.contains(": /mnt/loop, /"), "{said}");
    wait_for("another agent, and writes", BOOT, || {
        Ok(main().ok().filter(|after| *after != before))
    })
    .unwrap_or_else(|e| panic!("{e}:\n{}", booted.log()));
    booted.ssh("umount /mnt/loop; ls /run/adit-guest; ! ls /run/adit-guest/frozen.*");
}

pub(super) fn under_load(booted: &Booted) {
    let samples = std::thread::scope(|s| {
        let load = s.spawn(|| booted.ssh(LOAD));
        // It writes.
        std::thread::sleep(std::time::Duration::from_secs(3));
        let (status, said) = booted.adit(&["vm", "freeze", "web-1", "--lease", "4s"]);
        assert!(status == 0 && said.contains(": /"), "{said}");
        load.join().unwrap()
    });
    let samples: Vec<u64> = samples.lines().map(|line| line.parse().unwrap()).collect();
    let (longest, behind) = stillness(&samples);
    // A sample takes longer than its tenth of a second where the guest is emulated.
    println!(
        "frozen for 4 s: {longest} of {} samples alike, and {behind} writes afterwards",
        samples.len()
    );
    assert!(longest >= 5 && behind > 0, "{samples:?}");
    // The log is whole again, and says why they go on.
    let said = booted.ssh("journalctl -q -o cat --no-pager | grep thawed");
    assert!(said.contains("its time is over"), "{said}");
}
