//! What each init gets, and that its script or unit does what it is for.

use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::*;
use crate::config::Config;
use adit_tasks::dsse::Type;

/// The text of a public key.
fn key_line(seed: u8) -> String {
    let private = ed25519_dalek::SigningKey::from_bytes(&[seed; 32]);
    adit_tasks::PublicKey::of(&private, "test").to_string()
}

fn install_into(root: &Path, init: Option<Init>, trust: &[PathBuf]) -> Vec<String> {
    let vm_id = "web-1".parse().unwrap();
    let binary = root.join("the-binary");
    fs::write(&binary, "ELF").unwrap();
    install(&Install {
        root,
        init,
        vm_id: Some(&vm_id),
        trust,
        card: None,
        trust_document: None,
        policy: None,
        ports: &[80, 22],
        binary: Some(&binary),
    })
    .unwrap()
}

#[test]
fn each_init_gets_its_files_and_a_second_run_changes_nothing() {
    for (init, file) in [
        (
            Init::Systemd,
            "etc/systemd/system/multi-user.target.wants/adit-guest.service",
        ),
        (Init::Openrc, "etc/runlevels/default/adit-guest"),
        (Init::Busybox, "etc/init.d/S50adit-guest"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let key = dir.path().join("manager.pub");
        let line = key_line(7);
        fs::write(&key, &line).unwrap();
        let trust = [key];
        let said = install_into(dir.path(), Some(init), &trust);
        assert!(said.iter().all(|l| l.starts_with("wrote ")), "{said:?}");
        assert!(
            fs::symlink_metadata(dir.path().join(file)).is_ok(),
            "{file}"
        );
        let path = dir.path().join(CONFIG);
        assert_eq!(
            fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600
        );
        let config = Config::load(&path).unwrap();
        assert_eq!(
            (config.vm_id.unwrap().as_str(), config.allow_ports),
            ("web-1", vec![80, 22])
        );
        assert_eq!(
            fs::read(dir.path().join(TRUST_DIR).join("manager.pub")).unwrap(),
            line.as_bytes()
        );
        let said = install_into(dir.path(), Some(init), &trust);
        assert!(said.iter().all(|l| l.starts_with("keeps ")), "{said:?}");
    }
}

fn try_install(
    root: &Path,
    init: Option<Init>,
    trust: &[PathBuf],
) -> Result<Vec<String>, InstallError> {
    let vm_id = "web-1".parse().unwrap();
    let binary = Path::new("/bin/true");
    install(&Install {
        root,
        init,
        vm_id: Some(&vm_id),
        trust,
        card: None,
        trust_document: None,
        policy: None,
        ports: &[],
        binary: Some(binary),
    })
}

#[test]
fn keys_come_from_many_files_and_directories_and_none_hides_another() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    for (name, seed) in [
        ("a.pub", 1),
        ("keys/b.pub", 2),
        ("keys/c.pub", 3),
        ("other/a.pub", 4),
        ("same/a.pub", 1),
    ] {
        fs::create_dir_all(at(name).parent().unwrap()).unwrap();
        fs::write(at(name), key_line(seed)).unwrap();
    }
    fs::write(at("keys/README"), "no key").unwrap();
    fs::create_dir_all(at("empty")).unwrap();
    fs::write(at("bad.pub"), "ssh-ed25519 AAAA").unwrap();
    let root = at("root");
    fs::create_dir(&root).unwrap();
    let init = Some(Init::None);
    let trust = [at("a.pub"), at("keys"), at("same")];
    try_install(&root, init, &trust).unwrap();
    let placed = pub_files(&root.join(TRUST_DIR)).unwrap();
    let names: Vec<_> = placed.iter().map(|p| p.file_name().unwrap()).collect();
    assert_eq!(names, ["a.pub", "b.pub", "c.pub"]);
    let fails = |trust: &[PathBuf]| try_install(&root, init, trust).unwrap_err();
    let same = fails(&[at("a.pub"), at("other")]);
    assert!(
        matches!(&same, InstallError::SameName { one, other } if *one == at("a.pub") && *other == at("other/a.pub"))
    );
    assert!(matches!(fails(&[at("empty")]), InstallError::NoKeys { .. }));
    assert!(matches!(fails(&[at("bad.pub")]), InstallError::Key(_)));
    assert!(matches!(fails(&[at("none.pub")]), InstallError::Key(_)));
    let many: Vec<String> = (0..=64).map(key_line).collect();
    fs::write(at("x.pub"), many[..33].join("\n")).unwrap();
    fs::write(at("y.pub"), many[33..].join("\n")).unwrap();
    assert!(matches!(
        fails(&[at("x.pub"), at("y.pub")]),
        InstallError::TooManyKeys { count: 65 }
    ));
}

#[test]
fn a_key_that_can_be_read_only_once_is_installed_whole() {
    use std::io::Write;
    use std::os::fd::AsRawFd;
    let dir = tempfile::tempdir().unwrap();
    let (read, mut write) = std::io::pipe().unwrap();
    write.write_all(key_line(7).as_bytes()).unwrap();
    drop(write);
    // As a shell's `--trust <(...)` names it.
    let key = PathBuf::from(format!("/proc/self/fd/{}", read.as_raw_fd()));
    try_install(dir.path(), Some(Init::None), &[key]).unwrap();
    let placed = pub_files(&dir.path().join(TRUST_DIR)).unwrap();
    assert_eq!(fs::read_to_string(&placed[0]).unwrap(), key_line(7));
}

#[test]
fn a_card_is_checked_by_keys_that_can_be_read_only_once() {
    use std::io::Write;
    use std::os::fd::AsRawFd;
    let dir = tempfile::tempdir().unwrap();
    let private = ed25519_dalek::SigningKey::from_bytes(&[7; 32]);
    let payload =
        r#"{"vm_id":"web-1","generation":1,"labels":{},"not_after":"2999-01-01T00:00:00Z"}"#;
    let card = dir.path().join("card");
    let signed = adit_tasks::dsse::sign_as(Type::Card, payload.as_bytes(), &private);
    fs::write(&card, signed).unwrap();
    let (read, mut write) = std::io::pipe().unwrap();
    write
        .write_all(format!("roles=card {}", key_line(7)).as_bytes())
        .unwrap();
    drop(write);
    let said = install(&Install {
        root: dir.path(),
        init: Some(Init::None),
        vm_id: None,
        trust: &[PathBuf::from(format!("/proc/self/fd/{}", read.as_raw_fd()))],
        card: Some(&card),
        trust_document: None,
        policy: None,
        ports: &[],
        binary: Some(Path::new("/bin/true")),
    })
    .unwrap();
    assert!(
        said.iter().any(|l| l == "wrote  /etc/adit/card"),
        "{said:?}"
    );
    assert!(
        !said.iter().any(|l| l.contains("--trust counts")),
        "{said:?}"
    );
}

#[test]
fn what_the_agent_would_not_read_is_not_installed() {
    let dir = tempfile::tempdir().unwrap();
    let key = dir.path().join("long.pub");
    fs::write(
        &key,
        format!("#{}\n{}\n", "x".repeat(64 << 10), key_line(7)),
    )
    .unwrap();
    let root = dir.path().join("root");
    fs::create_dir(&root).unwrap();
    let long = try_install(&root, Some(Init::None), &[key]).unwrap_err();
    assert!(matches!(long, InstallError::Key(_)), "{long}");
    let (vm_id, many) = ("web-1".parse().unwrap(), vec![80; 257]);
    for ports in [&[80, 0][..], &many] {
        let done = install(&Install {
            root: &root,
            init: Some(Init::None),
            vm_id: Some(&vm_id),
            trust: &[],
            card: None,
            trust_document: None,
            policy: None,
            ports,
            binary: Some(Path::new("/bin/true")),
        });
        assert!(matches!(done, Err(InstallError::Config(_))), "{done:?}");
    }
    assert_eq!(
        fs::read_dir(&root).unwrap().count(),
        0,
        "half an installation"
    );
}

#[test]
fn the_images_init_is_found_or_asked_for() {
    let made = |paths: &[&str]| {
        let dir = tempfile::tempdir().unwrap();
        for path in paths {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "").unwrap();
        }
        dir
    };
    for (paths, service) in [
        (
            &["usr/lib/systemd/systemd"][..],
            "etc/systemd/system/adit-guest.service",
        ),
        (
            &["lib/systemd/systemd", "etc/init.d/rcS"],
            "etc/systemd/system/adit-guest.service",
        ),
        (
            &["sbin/openrc-run", "etc/init.d/rcS"],
            "etc/init.d/adit-guest",
        ),
        (&["etc/init.d/rcS"], "etc/init.d/S50adit-guest"),
    ] {
        let dir = made(paths);
        try_install(dir.path(), None, &[]).unwrap();
        assert!(fs::exists(dir.path().join(service)).unwrap(), "{paths:?}");
    }
    // As in a merged image, absolute: it leads to the image's own directory.
    let merged = made(&["usr/lib/systemd/systemd"]);
    std::os::unix::fs::symlink("/usr/lib", merged.path().join("lib")).unwrap();
    assert!(try_install(merged.path(), None, &[]).is_ok());
    let both = made(&["usr/lib/systemd/systemd", "sbin/openrc-run"]);
    let none = made(&[]);
    for (dir, none) in [(&both, false), (&none, true)] {
        match try_install(dir.path(), None, &[]).unwrap_err() {
            InstallError::Init(detect::Unknown::None { .. }) => assert!(none),
            InstallError::Init(detect::Unknown::Both { .. }) => assert!(!none),
            other => panic!("{other}"),
        }
        assert!(
            !fs::exists(dir.path().join("usr/sbin")).unwrap(),
            "half an installation"
        );
        assert!(try_install(dir.path(), Some(Init::None), &[]).is_ok());
    }
}

/// Debian with OpenRC mostly has systemd's package as well. What the kernel starts decides.
#[test]
fn of_two_init_systems_it_takes_the_one_that_sbin_init_is() {
    for (init, service) in [
        (
            Some("/lib/systemd/systemd"),
            "etc/systemd/system/adit-guest.service",
        ),
        (None, "etc/init.d/adit-guest"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        for path in ["lib/systemd", "sbin"] {
            fs::create_dir_all(root.join(path)).unwrap();
        }
        for path in ["lib/systemd/systemd", "sbin/openrc-run"] {
            fs::write(root.join(path), "").unwrap();
        }
        match init {
            Some(to) => std::os::unix::fs::symlink(to, root.join("sbin/init")).unwrap(),
            None => fs::write(root.join("sbin/init"), "").unwrap(),
        }
        try_install(root, None, &[]).unwrap();
        assert!(fs::exists(root.join(service)).unwrap(), "{init:?}");
    }
}

#[test]
fn an_error_says_nothing_twice() {
    let dir = tempfile::tempdir().unwrap();
    let error = try_install(dir.path(), None, &[]).unwrap_err();
    let said = crate::log::chain(&error);
    assert_eq!(said.matches("no init system").count(), 1, "{said}");
}

#[test]
fn without_a_key_it_says_that_no_task_will_run() {
    let dir = tempfile::tempdir().unwrap();
    let said = install_into(dir.path(), Some(Init::Busybox), &[]);
    assert!(said.last().unwrap().contains("runs no task"));
}

#[test]
fn program_and_service_of_debians_package_are_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    for (path, text) in [(BINARY, "the package's"), (PACKAGED, "[Unit]")] {
        fs::create_dir_all(dir.path().join(path).parent().unwrap()).unwrap();
        fs::write(dir.path().join(path), text).unwrap();
    }
    for init in [None, Some(Init::Systemd), Some(Init::Openrc)] {
        let said = try_install(dir.path(), init, &[]).unwrap();
        assert!(said.iter().any(|l| l.contains("(package adit-guest)")));
        let etc: Vec<_> = fs::read_dir(dir.path().join("etc"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        assert_eq!(etc, ["adit-guest"]);
    }
    let binary = fs::read_to_string(dir.path().join(BINARY)).unwrap();
    assert_eq!(binary, "the package's");
    // Nobody has to have a program for that.
    let what = |root| Install {
        root,
        init: Some(Init::None),
        vm_id: None,
        trust: &[],
        card: None,
        trust_document: None,
        policy: None,
        ports: &[],
        binary: None,
    };
    install(&what(dir.path())).unwrap();
    let other = tempfile::tempdir().unwrap();
    let refused = install(&what(other.path())).unwrap_err();
    assert!(matches!(refused, InstallError::NoAgent), "{refused}");
    assert_eq!(fs::read_dir(other.path()).unwrap().count(), 0);
}

/// The script as installed, with a program in the agent's place.
struct Busybox(tempfile::TempDir);

impl Busybox {
    /// `agent`: shell text; `FIFO` in it is a fifo that this test reads.
    fn with(agent: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let this = Self(dir);
        let script = BUSYBOX
            .replace("/usr/sbin/adit-guest run", &this.at("agent"))
            .replace(
                "/usr/sbin/adit-guest on-trial",
                &format!("rm {}", this.at("trial")),
            )
            .replace("/run/adit-guest.pid", &this.at("pid"))
            .replace("/proc/", &(this.at("proc") + "/"));
        std::os::unix::fs::symlink("/proc", this.at("proc")).unwrap();
        let mut image = Dir::open(this.0.path()).unwrap();
        let name = "S50adit-guest";
        image.place(name, script.as_bytes(), 0o755).unwrap();
        let made = Command::new("mkfifo").arg(this.at("fifo")).status();
        assert!(made.unwrap().success());
        let agent = format!("#!/bin/sh\n{agent}\n").replace("FIFO", &this.at("fifo"));
        image.place("agent", agent.as_bytes(), 0o755).unwrap();
        this
    }

    fn at(&self, name: &str) -> String {
        self.0.path().join(name).to_str().unwrap().to_owned()
    }

    fn run(&self, verb: &str) {
        // By the shell that it is for, where that is installed.
        let shell = ["/bin/busybox", "/usr/bin/busybox"];
        let shell = shell.iter().find(|path| fs::exists(path).unwrap());
        let mut command = Command::new(shell.unwrap_or(&"/bin/sh"));
        if shell.is_some() {
            command.arg("sh");
        }
        command.arg(self.at("S50adit-guest")).arg(verb);
        let silent = command.stdout(Stdio::null()).stderr(Stdio::null());
        assert!(silent.status().unwrap().success());
    }

    /// The next line that the agent writes to the fifo.
    fn line(&self) -> String {
        let mut line = String::new();
        // Whoever wrote the line before may not have closed the fifo yet: then this one ends without a line.
        while line.is_empty() {
            let mut fifo = BufReader::new(fs::File::open(self.at("fifo")).unwrap());
            fifo.read_line(&mut line).unwrap();
        }
        line.trim().to_owned()
    }
}

fn until_gone(pid: i32) {
    let Some(first) = crate::exec::proc::read(pid) else {
        return;
    };
    let begin = Instant::now();
    while crate::exec::proc::read(pid).is_some_and(|p| p.id == first.id && !p.zombie) {
        assert!(begin.elapsed() < Duration::from_secs(60), "{pid} goes on");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn the_busybox_script_starts_the_agent_again_after_a_kill_and_stops_it() {
    let _alone = crate::exec::alone();
    let script = Busybox::with("echo $$ >FIFO\nexec sleep 1000");
    let next_pid = || script.line().parse::<i32>().unwrap();
    script.run("start");
    let first = next_pid();
    script.run("start");
    crate::exec::proc::kill(crate::exec::proc::read(first).unwrap().id).unwrap();
    let second = next_pid();
    assert_ne!(first, second);
    script.run("stop");
    until_gone(second);
    assert!(!fs::exists(script.at("pid")).unwrap());
}

#[test]
fn the_busybox_script_passes_a_reload_on_and_goes_on_supervising() {
    let _alone = crate::exec::alone();
    let agent = "trap 'echo hup >FIFO' HUP\necho $$ >FIFO\nwhile :; do sleep 5 & wait $!; done";
    let script = Busybox::with(agent);
    script.run("start");
    let first = script.line().parse::<i32>().unwrap();
    for _ in 0..2 {
        script.run("reload");
        assert_eq!(script.line(), "hup");
    }
    crate::exec::proc::kill(crate::exec::proc::read(first).unwrap().id).unwrap();
    let second = script.line().parse::<i32>().unwrap();
    script.run("stop");
    until_gone(second);
}

#[test]
fn the_busybox_script_starts_the_agent_whatever_else_has_a_name_or_a_number_like_its_own() {
    let _alone = crate::exec::alone();
    // Without a pid file: a kernel's command line that has the name in it.
    let script = Busybox::with("echo $$ >FIFO\nexec sleep 1000");
    fs::remove_file(script.at("proc")).unwrap();
    fs::create_dir(script.at("proc")).unwrap();
    fs::write(script.at("proc/cmdline"), "root=/dev/S50adit-guest").unwrap();
    fs::write(script.at("proc/uptime"), "1.0 1.0").unwrap();
    script.run("start");
    let agent = script.line().parse::<i32>().unwrap();
    fs::remove_dir_all(script.at("proc")).unwrap();
    std::os::unix::fs::symlink("/proc", script.at("proc")).unwrap();
    script.run("stop");
    until_gone(agent);
    // With one of an earlier boot, whose number another service's script has now.
    let mut other = Command::new("sh")
        .args(["-c", "read x", "/etc/init.d/S50sshd", "start"])
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    fs::write(script.at("pid"), other.id().to_string()).unwrap();
    script.run("stop");
    assert!(other.try_wait().unwrap().is_none(), "killed another's");
    fs::write(script.at("pid"), other.id().to_string()).unwrap();
    script.run("start");
    let agent = script.line().parse::<i32>().unwrap();
    script.run("stop");
    until_gone(agent);
    drop(other.stdin.take());
    other.wait().unwrap();
}

#[test]
fn no_init_starts_an_agent_again_whose_configuration_cannot_be_used() {
    use crate::config::BAD_CONFIG;
    let _alone = crate::exec::alone();
    let script = Busybox::with(&format!("cat FIFO\nexit {BAD_CONFIG}"));
    script.run("start");
    let supervisor = fs::read_to_string(script.at("pid")).unwrap();
    let supervisor = supervisor.trim().parse::<i32>().unwrap();
    fs::write(script.at("fifo"), "").unwrap();
    until_gone(supervisor);
    assert!(!fs::exists(script.at("pid")).unwrap());
    let line = format!("RestartPreventExitStatus={BAD_CONFIG}");
    assert!(SYSTEMD.lines().any(|l| l == line));
    assert!(OPENRC.contains("\t$command check-config >/dev/null\n}"));
}

#[test]
fn r132_a_program_on_trial_is_started_again_whatever_status_it_ends_with() {
    use crate::config::BAD_CONFIG;
    let _alone = crate::exec::alone();
    let script = Busybox::with(&format!("echo $$ >FIFO\nexit {BAD_CONFIG}"));
    // For as long as the file is there.
    fs::write(script.at("trial"), "").unwrap();
    script.run("start");
    let supervisor = fs::read_to_string(script.at("pid")).unwrap();
    let (first, second) = (script.line(), script.line());
    assert_ne!(first, second);
    until_gone(supervisor.trim().parse().unwrap());
    // systemd's unit is tried in a Debian.
    let asks =
        format!("[ \"$EXIT_STATUS\" != {BAD_CONFIG} ] || ! /usr/sbin/adit-guest on-trial ||");
    assert!(SYSTEMD.contains(&asks));
}

#[test]
fn r114_no_init_gives_the_agent_what_its_tasks_would_inherit() {
    // Of the unit's own, or of its cgroup, in which no task is.
    let harmless = [
        "ExecStart",
        "ExecReload",
        "ExecStopPost",
        "Restart",
        "RestartSec",
        "RestartPreventExitStatus",
        "Delegate",
        "KillMode",
        "OOMPolicy",
        "TimeoutStopSec",
        "StateDirectory",
        "StateDirectoryMode",
        // Every task gets one of its own.
        "UMask",
        "TasksMax",
    ];
    let service = SYSTEMD.split("[Service]").nth(1).unwrap();
    let service = service.split("[Install]").next().unwrap();
    for line in service
        .lines()
        .filter(|l| !l.is_empty() && !l.starts_with('#'))
    {
        let (key, value) = line.split_once('=').unwrap();
        assert!(harmless.contains(&key), "{line}");
        assert!(key != "KillMode" || value == "process", "{line}");
    }
    for (text, init) in [(OPENRC, "OpenRC"), (BUSYBOX, "busybox")] {
        for taken in [
            "ulimit",
            "oom",
            "capabilities",
            "no_new_privs",
            "secbits",
            "rc_cgroup",
        ] {
            assert!(!text.contains(taken), "{init}: {taken}");
        }
    }
}

#[test]
fn systemd_has_nothing_to_say_against_its_unit() {
    let _alone = crate::exec::alone();
    let dir = tempfile::tempdir().unwrap();
    let unit = dir.path().join("adit-guest.service");
    fs::write(&unit, SYSTEMD.replace("/usr/sbin/adit-guest", "/bin/true")).unwrap();
    let verify = Command::new("systemd-analyze")
        .args(["verify", "--man=no", "--recursive-errors=no"])
        .arg(&unit)
        .output();
    let Ok(out) = verify else {
        return eprintln!("skipped: systemd-analyze is not installed");
    };
    let said = String::from_utf8_lossy(&out.stderr);
    let of_unit = said
        .lines()
        .filter(|l| l.contains("adit-guest"))
        .collect::<Vec<_>>();
    assert!(out.status.success() && of_unit.is_empty(), "{said}");
}

#[test]
fn the_busybox_script_is_valid_shell() {
    let _alone = crate::exec::alone();
    let out = Command::new("sh")
        .args(["-n", "-c", BUSYBOX])
        .output()
        .unwrap();
    assert!(
        out.status.success(),
        "{}",
        String::from_utf8_lossy(&out.stderr)
    );
}

#[test]
fn a_program_that_cannot_start_in_the_image_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let vm_id = "web-1".parse().unwrap();
    let told = || {
        let said = install(&Install {
            root: dir.path(),
            init: Some(Init::None),
            vm_id: Some(&vm_id),
            trust: &[],
            card: None,
            trust_document: None,
            policy: None,
            ports: &[],
            binary: Some(Path::new("/bin/true")),
        });
        said.unwrap().iter().any(|l| l.contains("will not start"))
    };
    assert!(told());
    let needs = interpreter::of(&fs::read("/bin/true").unwrap()).unwrap();
    let needs = dir.path().join(needs.trim_start_matches('/'));
    fs::create_dir_all(needs.parent().unwrap()).unwrap();
    fs::write(needs, "").unwrap();
    assert!(!told());
}

#[test]
fn an_image_for_many_vms_has_no_id_and_says_what_it_needs() {
    let dir = tempfile::tempdir().unwrap();
    let said = install(&Install {
        root: dir.path(),
        init: Some(Init::None),
        vm_id: None,
        trust: &[],
        card: None,
        trust_document: None,
        policy: None,
        ports: &[],
        binary: Some(Path::new("/bin/true")),
    });
    assert!(said.unwrap().iter().any(|l| l.contains("adit card new")));
    let config = Config::load(&dir.path().join(CONFIG)).unwrap();
    assert_eq!(config.vm_id, None);
}

#[test]
fn a_policy_goes_in_if_it_can_be_used_and_has_to_be_there_from_then_on() {
    let dir = tempfile::tempdir().unwrap();
    let (root, given) = (dir.path().join("root"), dir.path().join("minimal.toml"));
    fs::create_dir(&root).unwrap();
    let put = |text: &str| {
        fs::write(&given, text).unwrap();
        install(&Install {
            root: &root,
            init: Some(Init::None),
            vm_id: None,
            trust: &[],
            card: None,
            trust_document: None,
            policy: Some(&given),
            ports: &[],
            binary: Some(Path::new("/bin/true")),
        })
    };
    let bad = put("default = \"deny\"\n[[service]]\nnames = [\"*\"]\n").unwrap_err();
    let place = format!("--policy: {}:3:10: key `names`: ", given.display());
    assert!(bad.to_string().starts_with(&place), "{bad}");
    assert!(
        fs::read_dir(&root).unwrap().next().is_none(),
        "nothing is written"
    );
    let good = "default = \"deny\"\n[[service]]\nnames = [\"ping\"]\n";
    let said = put(good).unwrap();
    assert!(
        said.iter()
            .any(|l| l == "wrote  /etc/adit-guest/policy.toml"),
        "{said:?}"
    );
    let placed = root.join(POLICY);
    assert_eq!(fs::read_to_string(&placed).unwrap(), good);
    let mode = fs::metadata(&placed).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let config = Config::load(&root.join(CONFIG)).unwrap();
    assert_eq!(
        config.policy.as_deref(),
        Some(Path::new("/etc/adit-guest/policy.toml"))
    );
    assert!(
        put(good)
            .unwrap()
            .iter()
            .any(|l| l == "keeps  /etc/adit-guest/policy.toml")
    );
}
