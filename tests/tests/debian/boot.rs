//! What the agent's unit adds to a boot: the same Debian boots with it and without it, in turn, and measures itself.

use std::time::Duration;

use adit_tests::debian::Init;

use super::unit::Booted;
use super::{BOOT, full};

/// Of each kind.
const BOOTS: usize = 3;

/// Runs at each boot, waits for its end, says how long user space took, how long the unit took to be active, and how much processor
/// time the agent took (us, by systemd's own clocks), and has the next boot be of the other kind.
const MEASURE: &str = r#"systemctl is-system-running --wait > /dev/null
kind=$(systemctl is-enabled adit-guest)
eval "$(systemctl show -p UserspaceTimestampMonotonic -p FinishTimestampMonotonic)"
eval "$(systemctl show adit-guest -p InactiveExitTimestampMonotonic -p ActiveEnterTimestampMonotonic -p CPUUsageNSec | grep -v "not set")"
echo "MEASURED $kind $((FinishTimestampMonotonic - UserspaceTimestampMonotonic)) $((ActiveEnterTimestampMonotonic - InactiveExitTimestampMonotonic)) $((CPUUsageNSec / 1000))" > /dev/ttyS0
if [ $kind = enabled ]; then
    systemd-analyze --no-pager critical-chain multi-user.target > /dev/ttyS0
    systemctl -q disable adit-guest
else
    systemctl -q enable adit-guest
fi
systemctl reboot
"#;

#[test]
fn the_units_share_of_a_boot_is_measured_against_boots_without_it() {
    if !full() {
        return println!("skipped: only `cargo xtask test --full` boots Debian seven times");
    }
    let Some(mut booted) = Booted::start(Init::Systemd) else {
        return;
    };
    booted.ssh(&format!("cat > /root/measure <<'END'\n{MEASURE}END"));
    let unit =
        "[Service]\\nExecStart=/bin/sh /root/measure\\n[Install]\\nWantedBy=multi-user.target\\n";
    booted.ssh(&format!(
        "printf '{unit}' > /etc/systemd/system/measure.service; systemctl -q enable measure; systemctl --no-block reboot"
    ));
    let measured = |log: &str| log.matches("MEASURED ").count();
    for boot in 1..=2 * BOOTS {
        let what = format!("boot {boot}");
        booted
            .guest
            .wait_serial(&what, 2 * BOOT, |log| measured(log) >= boot)
            .unwrap();
    }
    let log = booted.guest.serial();
    let of = |kind: &str, nth: usize| {
        let lines = log.lines().filter_map(|line| {
            // A prompt may be before it on the line.
            let mut words = line.trim().split_once("MEASURED ")?.1.split(' ');
            (words.next()? == kind).then(|| words.nth(nth))?
        });
        let mut of: Vec<Duration> = lines
            .map(|us| Duration::from_micros(us.parse().unwrap()))
            .collect();
        assert_eq!(of.len(), BOOTS, "{log}");
        of.sort();
        of
    };
    let (with, without) = (of("enabled", 0), of("disabled", 0));
    let (active, processor) = (of("enabled", 1), of("enabled", 2));
    println!("user space with the unit    {with:.1?}");
    println!("user space without it       {without:.1?}");
    println!("until the unit is active    {active:.3?}");
    println!("the agent's processor time  {processor:.2?}");
    let added = |nth: usize| with[nth].as_secs_f64() - without[nth].as_secs_f64();
    println!(
        "the unit adds {:.2} s (least), {:.2} s (median)",
        added(0),
        added(BOOTS / 2)
    );
    let chain = log
        .lines()
        .skip_while(|line| !line.contains("multi-user.target @"));
    chain.take(6).for_each(|line| println!("{line}"));
}
