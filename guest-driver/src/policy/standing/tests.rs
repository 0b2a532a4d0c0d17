//! Which file is used, and what becomes of the one before when it is not.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::time::{Duration, Instant};

use super::*;

const PING: &str = "default = \"deny\"\n[[service]]\nnames = [\"ping\"]\n";

struct Room {
    dir: tempfile::TempDir,
    config: Config,
}

/// A directory of root's, and a configuration that names a policy in it.
fn room() -> Room {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("policy.toml");
    let text = format!("vm_id = \"web-1\"\npolicy = \"{}\"\n", file.display());
    let config = Config::parse(&dir.path().join("adit-guest.toml"), &text).unwrap();
    fs::write(&file, PING).unwrap();
    Room { dir, config }
}

impl Room {
    fn file(&self) -> PathBuf {
        self.dir.path().join("policy.toml")
    }

    fn put(&self, text: &str) {
        fs::write(self.file(), text).unwrap();
    }

    fn code(&self) -> Option<&'static str> {
        let standing = Standing::at_start(&self.config);
        let code = standing.fault().map(|fault| fault.code);
        assert_eq!(standing.policy().is_none(), code.is_some());
        assert_eq!(is_dialled(&standing, "ping"), code.is_none(), "closed");
        code
    }
}

fn is_dialled(standing: &Standing, service: &str) -> bool {
    standing.dial(&service.parse().unwrap()).is_ok()
}

fn mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

#[test]
fn a_file_that_others_can_change_is_not_used_and_nothing_is_allowed() {
    let room = room();
    assert_eq!(room.code(), None);
    for bad in [0o620, 0o602, 0o666, 0o777, 0o664] {
        mode(&room.file(), bad);
        assert_eq!(room.code(), Some("policy-writable"), "{bad:o}");
    }
    for good in [0o600, 0o400, 0o644, 0o755] {
        mode(&room.file(), good);
        assert_eq!(room.code(), None, "{good:o}");
    }
    for bad in [0o770, 0o1777] {
        mode(room.dir.path(), bad);
        assert_eq!(room.code(), Some("policy-writable"), "{bad:o}");
    }
    mode(room.dir.path(), 0o755);
    if nix::unistd::geteuid().is_root() {
        chown(room.file(), Some(65534), None).unwrap();
        assert_eq!(room.code(), Some("policy-writable"));
        chown(room.file(), Some(0), Some(65534)).unwrap();
        assert_eq!(room.code(), None, "a group that may not write");
    }
}

#[test]
fn what_is_no_regular_file_is_not_used_and_not_waited_for() {
    let room = room();
    let begin = Instant::now();
    let other = room.dir.path().join("other.toml");
    fs::rename(room.file(), &other).unwrap();
    assert_eq!(room.code(), Some("policy-missing"));
    symlink(&other, room.file()).unwrap();
    assert_eq!(room.code(), Some("policy-unreadable"));
    fs::remove_file(room.file()).unwrap();
    symlink("/nowhere", room.file()).unwrap();
    assert_eq!(
        room.code(),
        Some("policy-unreadable"),
        "it is there, and leads nowhere"
    );
    fs::remove_file(room.file()).unwrap();
    nix::unistd::mkfifo(&room.file(), nix::sys::stat::Mode::S_IRUSR).unwrap();
    assert_eq!(room.code(), Some("policy-unreadable"));
    fs::remove_file(room.file()).unwrap();
    fs::create_dir(room.file()).unwrap();
    assert_eq!(room.code(), Some("policy-unreadable"));
    fs::remove_dir(room.file()).unwrap();
    let sparse = fs::File::create(room.file()).unwrap();
    sparse.set_len(10 << 20).unwrap();
    assert_eq!(room.code(), Some("policy-bad"));
    assert!(begin.elapsed() < Duration::from_secs(5));
    room.put("");
    assert_eq!(
        room.code(),
        Some("policy-bad"),
        "a file that was emptied by a full disk"
    );
}

#[test]
fn a_reload_takes_what_is_good_and_keeps_what_was_there_before_anything_else() {
    let room = room();
    let start = Standing::at_start(&room.config);
    assert!(is_dialled(&start, "ping") && !is_dialled(&start, "tcp:80"));
    room.put("default = \"deny\"\n[[service]]\nnames = [\"tcp:80\"]\n");
    let second = start.next(&room.config);
    assert!(!is_dialled(&second, "ping") && is_dialled(&second, "tcp:80"));
    let keeps = |was: &Standing, code: &str| {
        let now = was.next(&room.config);
        let fault = now.fault().unwrap();
        assert_eq!(fault.code, code);
        assert!(
            fault.remedy.contains("the policy before stays in force"),
            "{fault}"
        );
        assert!(!is_dialled(&now, "ping") && is_dialled(&now, "tcp:80"));
        now
    };
    room.put("default = \"deny\"\n[[service]]\n");
    let third = keeps(&second, "policy-bad");
    fs::remove_file(room.file()).unwrap();
    let fourth = keeps(&third, "policy-missing");
    // Not even if the configuration names it no longer.
    let none = Config::parse(
        &room.config.path,
        "vm_id = \"web-1\"\npolicy = \"/nowhere/p.toml\"\n",
    );
    let none = fourth.next(&none.unwrap());
    assert!(is_dialled(&none, "tcp:80") && none.fault().is_some());
    room.put(PING);
    let mended = fourth.next(&room.config);
    assert!(mended.fault().is_none() && is_dialled(&mended, "ping"));
}

#[test]
fn a_start_without_the_file_that_is_named_is_closed_until_it_is_there() {
    let room = room();
    fs::remove_file(room.file()).unwrap();
    let closed = Standing::at_start(&room.config);
    assert!(!is_dialled(&closed, "ping"));
    let refused = closed.step(Touches::script("root")).unwrap_err();
    assert!(refused.contains("policy-missing"), "{refused}");
    let still = closed.next(&room.config);
    assert!(!is_dialled(&still, "ping") && still.fault().is_some());
    room.put(PING);
    assert!(is_dialled(&still.next(&room.config), "ping"));
}

#[test]
fn without_a_file_that_anybody_speaks_of_the_configuration_decides_alone() {
    let config = Config::parse("/etc/a.toml".as_ref(), "vm_id = \"web-1\"\n").unwrap();
    assert_eq!(file_of(&config), (Path::new(DEFAULT_FILE), false));
    let none = Standing::default();
    assert!(is_dialled(&none, "tcp:22") && none.step(Touches::script("root")) == Ok(None));
    if !Path::new(DEFAULT_FILE).exists() {
        let none = none.next(&config);
        assert!(is_dialled(&none, "tcp:22") && none.fault().is_none());
    }
}

#[test]
fn a_refusal_of_a_dial_names_file_and_line() {
    let room = room();
    let standing = Standing::at_start(&room.config);
    let refused = standing.dial(&"tcp:80".parse().unwrap()).unwrap_err();
    assert_eq!(refused.code(), Code::Denied);
    let place = format!("{}:1: ", room.file().display());
    assert!(refused.text().contains(&place), "{}", refused.text());
}
