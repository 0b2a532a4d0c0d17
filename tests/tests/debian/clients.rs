//! `docs/clients.md` is typed, from its first command to its last, at a real Debian.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use adit_tests::debian::Init;
use adit_tests::image::prometheus;
use adit_tests::machine::Machine;
use adit_tests::process::wait_for;
use adit_tests::tour::{Tour, read};

use super::{BOOT, built, full};

const PAGE: &str = "docs/clients.md";

/// What the page takes for granted: `aditd` with the VM of its own example, keys and the VM's certificate.
const BEFORE: &str = r#"set -e
mkdir -p -m 700 ~/.ssh; rm -f ~/.ssh/*
cp /run/given/id_ed25519 ~/.ssh/; chmod 600 ~/.ssh/id_ed25519
printf 'StrictHostKeyChecking accept-new\nLogLevel ERROR\n' > ~/.ssh/config
cp /run/given/web-1.crt .
{ printf '[proxy]\nlisten = "127.0.0.1:7080"\n[metrics]\nlisten = "127.0.0.1:7081"\n'; sed -n '/^```toml/,/^```$/p' docs/clients.md | grep -v '^```'; } > /etc/aditd.toml
export PATH=$PWD/target/release:$PATH
aditd run --config /etc/aditd.toml &
set +e"#;

#[test]
fn the_clients_of_the_page_reach_a_debian_guest() {
    let Some((bins, debian)) = built(Init::Systemd) else {
        return;
    };
    if let Some(why) = Machine::missing() {
        return println!("skipped: {why}");
    }
    let mut tour = Tour::start(PAGE, &bins).unwrap();
    let at = |path: &str| tour.machine.path(path);
    fs::create_dir(at("/run/given")).unwrap();
    for file in ["id_ed25519", "web-1.crt"] {
        fs::copy(debian.file(file), at("/run/given").join(file)).unwrap();
    }
    let program = prometheus(&|what| println!("{what}")).unwrap();
    fs::copy(program, at("/usr/bin/prometheus")).unwrap();
    fs::set_permissions(at("/usr/bin/prometheus"), fs::Permissions::from_mode(0o755)).unwrap();
    let (status, said) = tour.machine.run(BEFORE).unwrap();
    assert_eq!(status, 0, "{said}");

    let socket = tour.machine.path("/run/adit/vm/web-1/vhost.sock");
    wait_for("port process", BOOT, || Ok(socket.exists().then_some(())))
        .unwrap_or_else(|e| panic!("{e}: {}", tour.log()));
    tour.guest = Some(debian.boot(&socket, &tour.dir().join("web-1")).unwrap());
    // The agent is there before the servers are.
    for up in [
        "adit wait web-1 --for agent --timeout 1s",
        "curl -sS -f -x http://127.0.0.1:7080 http://web-1/",
        "curl -sS -x http://127.0.0.1:7080 http://web-1:8765/",
        "ssh -o ProxyCommand='socat - PROXY:127.0.0.1:%h:%p,proxyport=7080' root@web-1 true",
    ] {
        wait_for(up, BOOT, || {
            let (status, _) = tour.machine.run(up)?;
            Ok((status == 0).then_some(()))
        })
        .unwrap_or_else(|e| panic!("{e}: {}", tour.log()));
    }

    let page = read(PAGE);
    let size = if full() { "256M" } else { "64M" };
    tour.follow(
        &page.replace("-c 64M", &format!("-c {size}")),
        1..usize::MAX,
    );
}
