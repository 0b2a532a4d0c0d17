//! The Debian packages in real roots: installed, upgraded, removed and purged as an administrator would.
//!
//! These tests need the packages that `cargo xtask test` makes. Without them they print that and pass.
#![allow(missing_docs)]

mod echo;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Output;
use std::time::Duration;

use adit_tests::before;
use adit_tests::page::{commands, missing};
use adit_tests::process::wait_for;
use adit_tests::root::{Init, PACKAGES, Root, changes};
use adit_tests::tour::line;
use echo::{CID, ECHO, Echo, Tunnels, connect};

const SOON: Duration = Duration::from_secs(30);
/// The version that a test upgrades from: the same programs.
const BEFORE: &str = "0.0.9-1";

/// A root with the packages. `None`, with the reason printed: there are none, or no root is to be had.
fn root(init: Init, network: bool) -> Option<Root> {
    let Some(packages) = std::env::var_os("ADIT_TEST_PACKAGES").map(PathBuf::from) else {
        println!(
            "skipped: ADIT_TEST_PACKAGES is not set; `cargo xtask test` makes the packages and sets it"
        );
        return None;
    };
    if let Some(why) = Root::missing() {
        println!("skipped: {why}");
        return None;
    }
    Some(Root::start(init, network, &packages).unwrap())
}

/// Where the root has a package of the present version, or of the one before.
fn file(package: &str, before: bool) -> String {
    let now = concat!(env!("CARGO_PKG_VERSION"), "-1");
    match before {
        false => format!("{PACKAGES}/{package}_{now}_amd64.deb"),
        true => format!("{PACKAGES}/{BEFORE}/{package}_{BEFORE}_amd64.deb"),
    }
}

fn said(out: &Output) -> String {
    [&out.stdout[..], &out.stderr]
        .map(String::from_utf8_lossy)
        .concat()
}

/// Runs dpkg, which must succeed. Returns all that it said.
fn dpkg(root: &Root, args: &[&str]) -> String {
    let out = root.attempt(&[&["dpkg"], args].concat()).unwrap();
    let said = said(&out);
    assert!(
        out.status.success(),
        "dpkg {args:?}: {said}\n{}",
        root.log()
    );
    said
}

/// What is in the root and was not, or the other way round. A system user that a package made stays, as Debian's rules have it:
/// another file may belong to its number.
fn left(root: &Root, before: &BTreeMap<String, String>) -> Vec<String> {
    let accounts = ["passwd", "group", "shadow", "gshadow"];
    let of_accounts = |line: &String| {
        let path = line.split(' ').nth(1).unwrap_or_default();
        let path = path.trim_end_matches(":sum").trim_end_matches('-');
        accounts.iter().any(|a| path == format!("/etc/{a}")) || path == "/etc/.pwd.lock"
    };
    let now = || {
        let mut left = changes(before, &root.files().unwrap());
        left.retain(|line| !of_accounts(line));
        left
    };
    // systemd takes a service's own directory for temporary files away by and by.
    let gone = wait_for("nothing left", SOON, || Ok(now().is_empty().then_some(())));
    gone.map_or_else(|_| now(), |()| vec![])
}

#[test]
fn the_agents_package_comes_and_goes_without_a_service_manager() {
    let Some(root) = root(Init::None, false) else {
        return;
    };
    let before = root.files().unwrap();
    let said = dpkg(&root, &["-i", &file("adit-guest", true)]);
    assert!(
        said.contains("not started: it has no /etc/adit-guest/adit-guest.toml"),
        "{said}"
    );
    // Each init system would start it at the next boot.
    root.shell("test -e /etc/systemd/system/multi-user.target.wants/adit-guest.service; test -e /etc/rc2.d/S01adit-guest").unwrap();
    root.shell("/etc/init.d/adit-guest status && exit 1 || test $? = 3")
        .unwrap();
    root.shell("adit-guest install --root / --init none --vm-id web-1; mkdir -p /var/lib/adit-guest; touch /var/lib/adit-guest/journal.redb").unwrap();
    let config = root.shell("cat /etc/adit-guest/adit-guest.toml").unwrap();
    dpkg(&root, &["-i", &file("adit-guest", false)]);
    assert_eq!(
        root.shell("cat /etc/adit-guest/adit-guest.toml").unwrap(),
        config
    );
    // As `adit-guest install --card` puts it there.
    root.shell("mkdir /etc/adit; touch /etc/adit/card").unwrap();
    dpkg(&root, &["--remove", "adit-guest"]);
    root.shell("test ! -e /usr/sbin/adit-guest; test -e /etc/adit-guest/adit-guest.toml; test -e /var/lib/adit-guest").unwrap();
    dpkg(&root, &["--purge", "adit-guest"]);
    let left = left(&root, &before);
    assert!(left.is_empty(), "{left:#?}");
}

#[test]
fn the_hosts_packages_come_and_go_without_a_service_manager() {
    let Some(root) = root(Init::None, false) else {
        return;
    };
    let before = root.files().unwrap();
    for package in ["aditd", "adit-vmm"] {
        dpkg(&root, &["-i", &file(package, false)]);
    }
    root.shell("aditd check-config; adit version; adit-vmm --version; getent passwd adit")
        .unwrap();
    root.shell("test -e /etc/systemd/system/multi-user.target.wants/aditd.service")
        .unwrap();
    // What an administrator changes there stays over an upgrade.
    let conffiles = root.run(&["dpkg-query", "-W", "-f", "${Conffiles}", "aditd"]);
    let conffiles = conffiles.unwrap();
    for file in ["/etc/adit/aditd.toml", "/etc/ssh/ssh_config.d/20-adit.conf"] {
        assert!(conffiles.contains(file), "{conffiles}");
    }
    // The agent for images is there.
    let inject = "mkdir /tmp/image; adit image inject /tmp/image --init none --vm-id web-1; /tmp/image/usr/sbin/adit-guest version";
    root.shell(inject).unwrap();
    for package in ["aditd", "adit-vmm"] {
        dpkg(&root, &["--purge", package]);
    }
    let left = left(&root, &before);
    assert!(left.is_empty(), "{left:#?}");
    // The files of a package that is in no list would stay in no list either.
    assert!(!root.shell("dpkg -l").unwrap().contains("adit"));
}

fn property(root: &Root, unit: &str, name: &str) -> String {
    let said = root.run(&["systemctl", "show", unit, "--value", "--property", name]);
    said.unwrap().trim().to_owned()
}

#[test]
fn the_agent_is_enabled_at_once_and_started_when_it_has_a_configuration() {
    let Some(root) = root(Init::Systemd, false) else {
        return;
    };
    let before = root.files().unwrap();
    dpkg(&root, &["-i", &file("adit-guest", true)]);
    assert_eq!(property(&root, "adit-guest", "UnitFileState"), "enabled");
    assert_eq!(property(&root, "adit-guest", "ActiveState"), "inactive");
    root.shell("adit-guest install --root / --init none --vm-id web-1")
        .unwrap();
    // A namespace is no virtual machine, and has no vsock of its own.
    root.shell(
        "mkdir -p /etc/systemd/system/adit-guest.service.d; cd /etc/systemd/system/adit-guest.service.d\n\
         printf '[Unit]\\nConditionVirtualization=\\n[Service]\\nExecStart=\\nExecStart=/bin/sleep infinity\\n' > test.conf",
    )
    .unwrap();
    root.run(&["systemctl", "daemon-reload"]).unwrap();
    root.run(&["systemctl", "start", "adit-guest"]).unwrap();
    let main = || property(&root, "adit-guest", "MainPID");

    // By a task of its own, whose control group has such a name: the agent would end dpkg with the task.
    let first = main();
    let install = format!(
        "mkdir -p /sys/fs/cgroup/adit-task-1; echo $$ > /sys/fs/cgroup/adit-task-1/cgroup.procs; dpkg -i {}",
        file("adit-guest", false)
    );
    root.shell(&install).unwrap();
    assert_eq!(main(), first);
    let remove = "echo $$ > /sys/fs/cgroup/adit-task-1/cgroup.procs; ! dpkg --remove adit-guest";
    root.shell(remove).unwrap();
    assert_eq!(main(), first);

    dpkg(&root, &["-i", &file("adit-guest", false)]);
    let second = main();
    assert!(second != first && second != "0");
    // A configuration that the new agent cannot use does not cost the one that runs.
    root.shell("echo 'no_such_key = 1' >> /etc/adit-guest/adit-guest.toml")
        .unwrap();
    let out = root
        .attempt(&["dpkg", "-i", &file("adit-guest", false)])
        .unwrap();
    assert!(
        !out.status.success() && said(&out).contains("no_such_key"),
        "{}",
        said(&out)
    );
    assert_eq!(main(), second);
    root.shell("sed -i /no_such_key/d /etc/adit-guest/adit-guest.toml")
        .unwrap();
    dpkg(&root, &["--configure", "adit-guest"]);
    assert_ne!(main(), second);

    // One that was stopped stays so over an upgrade. Removed, it is gone, and one that is installed is started.
    root.run(&["systemctl", "stop", "adit-guest"]).unwrap();
    dpkg(&root, &["-i", &file("adit-guest", false)]);
    assert_eq!(property(&root, "adit-guest", "ActiveState"), "inactive");
    assert_eq!(property(&root, "adit-guest", "UnitFileState"), "enabled");
    dpkg(&root, &["--remove", "adit-guest"]);
    dpkg(&root, &["-i", &file("adit-guest", false)]);
    assert_eq!(property(&root, "adit-guest", "ActiveState"), "active");
    dpkg(&root, &["--remove", "adit-guest"]);
    assert_eq!(property(&root, "adit-guest", "ActiveState"), "inactive");
    dpkg(&root, &["--purge", "adit-guest"]);
    root.shell("rm -r /etc/systemd/system/adit-guest.service.d")
        .unwrap();
    let left = left(&root, &before);
    assert!(left.is_empty(), "{left:#?}");
}

const CONFIG: &str = "[proxy]\nlisten = \"127.0.0.1:0\"\n\
    [[grant]]\nto = [\"anyone\"]\nvms = [\"*\"]\nmay = [\"reach\"]\n[[vm]]\nname = \"a\"\n";

/// Puts the programs of the version before into the root, in the places of those of its package.
fn programs_before(root: &Root) {
    let dir = before::programs().unwrap();
    for name in ["aditd", "adit-port", "adit"] {
        let to = root.path("/usr/bin").join(name);
        assert!(to.exists(), "{}", to.display());
        fs::remove_file(&to).unwrap();
        fs::copy(dir.join(name), to).unwrap();
    }
}

/// The proxy's address, when aditd has written it.
fn proxy(root: &Root) -> std::net::SocketAddr {
    let file = root.path("/run/adit/proxy.addr");
    let text = wait_for("aditd serves", SOON, || Ok(fs::read_to_string(&file).ok()));
    let text = text.unwrap_or_else(|e| panic!("{e:#}\n{}", root.log()));
    text.trim().parse().unwrap()
}

/// Waits until the proxy makes new tunnels.
fn serves(root: &Root) {
    wait_for("a new tunnel", SOON, || Ok(connect(proxy(root))))
        .unwrap_or_else(|e| panic!("{e:#}\n{}", root.log()));
}

#[test]
fn an_upgrade_of_aditd_loses_no_tunnel_and_no_task_and_a_broken_configuration_stops_nothing() {
    let Some(root) = root(Init::Systemd, false) else {
        return;
    };
    let before = root.files().unwrap();
    // As whoever builds an image has it: nothing is started. The default port may be another's here.
    let policy = "/usr/sbin/policy-rc.d";
    root.shell(&format!(
        "printf '#!/bin/sh\\nexit 101\\n' > {policy}; chmod 755 {policy}"
    ))
    .unwrap();
    dpkg(&root, &["-i", &file("aditd", true)]);
    assert_eq!(property(&root, "aditd", "ActiveState"), "inactive");
    assert_eq!(property(&root, "aditd", "UnitFileState"), "enabled");
    root.run(&["rm", policy]).unwrap();
    programs_before(&root);
    let config = format!("{CONFIG}cid = {CID}\nallow_vsock = [{ECHO}]\n");
    let path = Path::new("/etc/adit/aditd.toml");
    let write = |text: &str| fs::write(root.path(path.to_str().unwrap()), text).unwrap();
    // Before there were grants every local user could use the port.
    let (first_lines, rest) = config.split_once("[[grant]]").unwrap();
    let vm = rest.split_once("[[vm]]").unwrap().1;
    write(&format!("{first_lines}[[vm]]{vm}"));
    root.run(&["systemctl", "start", "aditd"]).unwrap();
    let socket = root.path("/run/adit/vm/a/vhost.sock");
    wait_for("the VM's socket", SOON, || {
        Ok(socket.exists().then_some(()))
    })
    .unwrap();
    let _guest = Echo::boot(&socket);
    serves(&root);
    let tunnels = Tunnels::open(proxy(&root));
    let goal = "adit key new /tmp/key >/dev/null; \
                printf 'steps: [{id: one, script: {interpreter: /bin/sh, script: \"true\"}}]' | \
                adit goal apply - --sign /tmp/key --to a";
    root.shell(goal).unwrap();
    let tasks = || root.run(&["adit", "task", "ls", "-o", "json"]).unwrap();
    let queued = tasks();
    assert!(queued.contains("\"queued\""), "{queued}");
    let main = || property(&root, "aditd", "MainPID");

    let first = main();
    write(&config);
    dpkg(&root, &["-i", &file("aditd", false)]);
    assert_ne!(main(), first);
    tunnels.all_go_on();
    let ids = |list: &str| {
        let tasks: Vec<serde_json::Value> = serde_json::from_str(list).unwrap();
        let each = tasks.iter().map(|t| (t["id"].clone(), t["state"].clone()));
        each.collect::<Vec<_>>()
    };
    assert_eq!(ids(&tasks()), ids(&queued));
    assert_eq!(
        fs::read_to_string(root.path(path.to_str().unwrap())).unwrap(),
        config
    );
    serves(&root);

    let second = main();
    write(&config.replace("allow_vsock", "allow_vsok"));
    let out = root
        .attempt(&["dpkg", "-i", &file("aditd", false)])
        .unwrap();
    let why = said(&out);
    assert!(!out.status.success() && why.contains("allow_vsok"), "{why}");
    assert!(why.contains("dpkg --configure aditd"), "{why}");
    assert_eq!(main(), second, "the old one goes on");
    serves(&root);
    write(&config);
    dpkg(&root, &["--configure", "aditd"]);
    assert_ne!(main(), second);
    serves(&root);
    tunnels.all_go_on();

    // What serves VMs goes on until the purge.
    let removed = dpkg(&root, &["--remove", "aditd"]);
    assert!(removed.contains("port processes of VMs go on"), "{removed}");
    assert_eq!(property(&root, "aditd", "ActiveState"), "inactive");
    tunnels.all_go_on();
    tunnels.end();
    dpkg(&root, &["--purge", "aditd"]);
    let gone = || {
        root.shell("test ! -e /run/adit; ! ls -l /proc/[0-9]*/exe 2>/dev/null | grep /usr/bin/adit")
    };
    wait_for("the end of the port processes", SOON, || Ok(gone().ok())).unwrap();
    let left = left(&root, &before);
    assert!(left.is_empty(), "{left:#?}");
}

#[test]
fn an_upgrade_starts_nothing_that_was_stopped_and_a_newer_database_stops_nothing_that_runs() {
    let Some(root) = root(Init::Host, true) else {
        return;
    };
    let state = || property(&root, "aditd", "ActiveState");
    dpkg(&root, &["-i", &file("aditd", true)]);
    assert_eq!(state(), "active", "{}", root.log());
    let documents = property(&root, "aditd", "Documentation");
    for path in documents.split_whitespace() {
        if let Some(path) = path.strip_prefix("file:") {
            root.run(&["test", "-e", path]).unwrap();
        }
    }
    root.run(&["systemctl", "stop", "aditd"]).unwrap();
    dpkg(&root, &["-i", &file("aditd", false)]);
    assert_eq!(state(), "inactive");
    assert_eq!(property(&root, "aditd", "UnitFileState"), "enabled");
    // Removed, it is gone, and one that is installed is started.
    dpkg(&root, &["--remove", "aditd"]);
    dpkg(&root, &["-i", &file("aditd", false)]);
    assert_eq!(state(), "active", "{}", root.log());

    // As after a step back: the database is that of a newer version.
    let main = property(&root, "aditd", "MainPID");
    root.shell("apt-get install -qq -y sqlite3").unwrap();
    let sqlite = |sql: &str| {
        let said = root.run(&[
            "sqlite3",
            "-cmd",
            // aditd may be writing.
            ".timeout 20000",
            "/var/lib/adit/aditd.db",
            sql,
        ]);
        said.unwrap().trim().to_owned()
    };
    let own = sqlite("PRAGMA user_version");
    sqlite("PRAGMA user_version = 99");
    let back = ["dpkg", "-i", &file("aditd", true)];
    let out = root.attempt(&back).unwrap();
    let why = said(&out);
    assert!(!out.status.success() && why.contains("newer"), "{why}");
    assert_eq!(property(&root, "aditd", "MainPID"), main);
    sqlite(&format!("PRAGMA user_version = {own}"));
    dpkg(&root, &["--configure", "aditd"]);
    assert_ne!(property(&root, "aditd", "MainPID"), main);
    assert_eq!(state(), "active");
}

#[test]
fn the_commands_of_the_page_do_what_it_says() {
    let Some(root) = root(Init::Systemd, true) else {
        return;
    };
    let page = fs::read_to_string(adit_tests::root().join("docs/install.md")).unwrap();
    // The walk boots a VM, and is typed where those are: tests/debian/walk.rs.
    let begin = line(&page, "\n## On the host\n");
    let run = commands(&page).into_iter();
    let run = run.filter(|c| c.not_run.is_none() && c.line > begin);
    let mut count = 0;
    for command in run {
        count += 1;
        let line = format!("cd {PACKAGES}; {}", command.text);
        let typed = || {
            let out = root.attempt(&["sh", "-c", &line]).unwrap();
            let said = said(&out);
            let as_shown =
                out.status.code() == Some(command.exit) && missing(&command.shown, &said).is_none();
            (as_shown, said)
        };
        let (mut as_shown, mut told) = typed();
        if command.text.starts_with("adit vm ls") {
            // A reload is asked for, and comes a moment later.
            let shown = wait_for("the list", SOON, || {
                (as_shown, told) = typed();
                Ok(as_shown.then_some(()))
            });
            shown.unwrap_or_else(|e| panic!("{e:#}: {told}"));
        }
        assert!(as_shown, "`{}`: {told}\n{}", command.text, root.log());
    }
    assert!(count > 8, "{count} commands");
}
