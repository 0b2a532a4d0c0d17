//! The pages are typed, from their first command to their last: README's first commands at what `demo --keep` leaves running,
//! the rest of it and `docs/operate.md` on a machine each, with a real guest. What a page shows of an output must come.

use std::fs;
use std::process::Command;

use adit_tests::guest::{Guest, Identity};
use adit_tests::image::{Image, Kernel};
use adit_tests::machine::{CLONE, Machine};
use adit_tests::page::commands;
use adit_tests::process::wait_for;
use adit_tests::shell::Shell;
use adit_tests::sshd;
use adit_tests::tour::{Tour, check, line, read};

use super::{BOOT, bins, setup};

/// Part of the README that is about what `cargo xtask demo --keep` left running.
const FIRST: &str = "\n## Five commands\n";
const THEN: &str = "\n## A tour\n";

#[test]
fn readmes_first_commands_do_what_it_says() {
    let Some(setup) = setup(Kernel::V6_1, "", false) else {
        return;
    };
    let dir = setup.host.dir();
    fs::create_dir(dir.join("target")).unwrap();
    fs::write(dir.join("target/demo.env"), setup.host.environment()).unwrap();
    let mut bash = Command::new("bash");
    bash.arg("--norc").current_dir(dir);
    let mut shell = Shell::start(&mut bash, dir).unwrap();
    let page = read("README.md");
    let lines = line(&page, FIRST)..line(&page, THEN);
    let all = commands(&page);
    let run = all
        .iter()
        .filter(|c| c.not_run.is_none() && lines.contains(&c.line));
    assert!(run.clone().count() > 4);
    for command in run {
        let (status, said) = shell.run(&command.text).unwrap();
        check("README.md", command, status, &said, &|| setup.host.log());
    }
}

/// `None`, with the reason printed, if there is nothing to boot or no machine to be had.
fn start(page: &'static str) -> Option<Tour> {
    let bins = bins()?;
    if let Some(why) = Machine::missing() {
        println!("skipped: {why}");
        return None;
    }
    Some(Tour::start(page, &bins).unwrap())
}

/// What `cargo xtask guest-image` does, in the image of a page, and an SSH server, as images have one.
fn guest_image(tour: &Tour) {
    let at = |path: &str| tour.machine.path(&format!("{CLONE}/{path}"));
    let root = at("web-1");
    fs::create_dir_all(root.join("etc")).unwrap();
    fs::write(root.join("etc/hostname"), "web-1\n").unwrap();
    let public = tour.machine.path("/root/.ssh/id_ed25519.pub");
    sshd::install(&root, &public, tour.dir()).unwrap();
    fs::write(root.join("etc/adit-test"), sshd::START).unwrap();
    let image = Image::build(Kernel::V6_1, &|what| println!("{what}")).unwrap();
    image.copy_to(&at("image"), Some(&root)).unwrap();
}

#[test]
fn readmes_tour_does_what_it_says() {
    let Some(mut tour) = start("README.md") else {
        return;
    };
    let (status, said) = tour
        .machine
        .run("mkdir -p -m 700 ~/.ssh && rm -f ~/.ssh/* && ssh-keygen -q -t ed25519 -N '' -f ~/.ssh/id_ed25519 && \
              printf 'StrictHostKeyChecking accept-new\\nLogLevel ERROR\\n' > ~/.ssh/config")
        .unwrap();
    assert_eq!(status, 0, "{said}");
    let page = read("README.md");
    // Cargo is what runs this: the image is made where its command is.
    let image = line(&page, "$ cargo xtask guest-image");
    tour.follow(&page, line(&page, THEN)..image);
    guest_image(&tour);
    tour.follow(&page, image + 1..usize::MAX);
}

#[test]
fn operate_does_what_it_says() {
    let Some(mut tour) = start("docs/operate.md") else {
        return;
    };
    let page = read("docs/operate.md");
    let (status, said) = tour.machine.run("mkdir /mnt/image").unwrap();
    assert_eq!(status, 0, "{said}");
    // The reader's own VM is started there; the test's is.
    let boots = line(&page, "<!-- here the test boots web-1 -->");
    tour.follow(&page, 1..boots);
    let socket = tour.machine.path("/run/adit/vm/web-1/vhost.sock");
    wait_for("port process", BOOT, || Ok(socket.exists().then_some(()))).unwrap();
    // Both keys that the page has made.
    let trust = tour.machine.path(CLONE);
    let agent = adit_tests::guest_bin("adit-guest");
    let who = Identity {
        name: "web-1",
        vhost_socket: &socket,
        agent: Some(&agent),
        trust: Some(&trust),
        script: "",
        boot_files: false,
    };
    let image = Image::build(Kernel::V6_12, &|what| println!("{what}")).unwrap();
    let mut guest = Guest::boot(&image, &who, &tour.dir().join("web-1")).unwrap();
    guest.wait_ready(BOOT).unwrap();
    tour.guest = Some(guest);
    tour.follow(&page, boots..usize::MAX);
    // "Stop everything" does.
    wait_for("nothing of adit runs", BOOT, || {
        let (status, _) = tour.machine.run("pgrep -x 'aditd|adit-port'")?;
        Ok((status == 1).then_some(()))
    })
    .unwrap();
}
