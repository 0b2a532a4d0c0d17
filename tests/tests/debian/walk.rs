//! The walk of `docs/install.md`, typed from its first command to its last: a bare Debian becomes a host, and an image as a
//! distribution has it becomes a VM there.

use std::fs;
use std::time::{Duration, Instant};

use adit_tests::debian::{self, Debian};
use adit_tests::page::{commands, missing};
use adit_tests::root::{Init, Root};
use adit_tests::tour::{check, line, read};

const PAGE: &str = "docs/install.md";
const WALK: &str = "\n## From nothing to a VM's page\n";
const THEN: &str = "\n## On the host\n";
/// What somebody promised.
const COMMANDS: usize = 10;
/// Where the commands are typed.
const HERE: &str = "/root/adit";
/// How long the server in the guest may take to be there, after the goal that starts it is done.
const PATIENCE: Duration = Duration::from_secs(60);

#[test]
fn ten_commands_lead_from_a_bare_host_and_a_stock_image_to_a_vms_page() {
    if std::env::var_os("ADIT_TEST_BINS").is_none() {
        return println!("skipped: `cargo xtask test` builds what is needed");
    }
    if let Some(why) = Debian::missing().or(Root::missing()) {
        return println!("skipped: {why}");
    }
    let image = debian::stock_image(&|what| println!("{what}")).unwrap();
    let packages = adit_tests::packages();
    let root = Root::start(Init::Host, true, &packages).unwrap();
    let mut shell = root.type_in(HERE).unwrap();
    let own = format!("cp /mnt/aditd_{}-1_amd64.deb .", env!("CARGO_PKG_VERSION"));
    assert_eq!(shell.run(&own).unwrap().0, 0, "{}", root.log());

    let page = read(PAGE);
    let walk = line(&page, WALK)..line(&page, THEN);
    let mut count = 0;
    for command in commands(&page).iter().filter(|c| walk.contains(&c.line)) {
        count += 1;
        println!("{PAGE}:{}: $ {}", command.line, command.text);
        if let Some(reason) = &command.not_run {
            println!("not run: {reason}");
            assert!(command.text.ends_with(".qcow2"), "the image, and no other");
            fs::copy(&image, root.path(&format!("{HERE}/web-1.qcow2"))).unwrap();
            continue;
        }
        let begin = Instant::now();
        loop {
            let (status, said) = shell.run(&command.text).unwrap();
            let shown = status == command.exit && missing(&command.shown, &said).is_none();
            // Whoever sees something else looks again.
            let looks = command.text.starts_with("curl ") && begin.elapsed() < PATIENCE;
            if shown || !looks {
                let more = || {
                    let at = |path: &str| fs::read_to_string(root.path(path)).unwrap_or_default();
                    let console = at(&format!("{HERE}/web-1.log"));
                    format!(
                        "{}\n{}\n{console}",
                        root.log(),
                        at("/run/adit/vm/web-1/port.log")
                    )
                };
                check(PAGE, command, status, &said, &more);
                break;
            }
        }
        println!("({} s)", begin.elapsed().as_secs());
    }
    assert_eq!(count, COMMANDS);
}
