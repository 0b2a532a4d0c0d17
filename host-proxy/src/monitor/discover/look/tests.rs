use std::fs::Permissions;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::os::unix::net::UnixListener;

use super::*;

/// No user of the host has it.
const UID: u32 = 54_321;

/// A directory that is looked after, and nobody waits for.
struct Place {
    dir: tempfile::TempDir,
    watcher: Watcher,
}

fn is_root() -> bool {
    let is_root = geteuid().is_root();
    if !is_root {
        println!("skipped: only root gives files away");
    }
    is_root
}

impl Place {
    fn new(pattern: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let toml = format!(
            "dir = \"{}\"\npattern = \"{pattern}\"\n",
            dir.path().join("fc").display()
        );
        let watcher = Watcher::new(toml::from_str(&toml).unwrap()).unwrap();
        Self { dir, watcher }
    }

    fn at(&self, path: &str) -> PathBuf {
        self.dir.path().join("fc").join(path)
    }

    fn make(&self, path: &str) -> PathBuf {
        let at = self.at(path);
        fs::create_dir_all(&at).unwrap();
        fs::set_permissions(&at, Permissions::from_mode(0o755)).unwrap();
        fs::set_permissions(self.at(""), Permissions::from_mode(0o755)).unwrap();
        at
    }

    /// A socket; nobody need listen there.
    fn socket(&self, path: &str) -> PathBuf {
        let at = self.at(path);
        self.make(Path::new(path).parent().unwrap().to_str().unwrap());
        drop(UnixListener::bind(&at).unwrap());
        at
    }

    /// Names with a socket, and without.
    fn look(&mut self) -> (Vec<String>, Vec<String>) {
        let found = self.watcher.look();
        let of = |has: bool| {
            let names = found.vms.iter().filter(|(_, socket)| *socket == has);
            names.map(|(name, _)| name.to_string()).collect()
        };
        (of(true), of(false))
    }

    /// What is refused: nothing is found.
    fn refused(&mut self) -> String {
        let found = self.watcher.look();
        assert!(found.vms.iter().all(|(_, socket)| !socket), "{found:?}");
        assert_eq!(found.refused.len(), 1, "{found:?}");
        found.refused[0].clone()
    }
}

fn names(all: &[&str]) -> Vec<String> {
    all.iter().map(ToString::to_string).collect()
}

#[test]
fn a_name_has_a_socket_or_is_there_without_one_or_is_gone() {
    let mut place = Place::new("{name}/run/v.sock");
    assert_eq!(
        place.look(),
        (vec![], vec![]),
        "nobody has made the directory"
    );
    let socket = place.socket("web-1/run/v.sock");
    place.make("web-2");
    place.make("Web_3");
    fs::write(place.at("web-4"), "a file").unwrap();
    assert_eq!(place.look(), (names(&["web-1"]), names(&["web-2"])));
    // A VMM that is started again.
    fs::remove_file(&socket).unwrap();
    assert_eq!(place.look(), (vec![], names(&["web-1", "web-2"])));
    fs::remove_dir_all(place.at("web-1")).unwrap();
    assert_eq!(place.look(), (vec![], names(&["web-2"])));
    let mut flat = Place::new("vm-{name}.sock");
    let socket = flat.socket("vm-web-1.sock");
    flat.socket("other.sock");
    assert_eq!(flat.look(), (names(&["web-1"]), vec![]));
    fs::remove_file(socket).unwrap();
    assert_eq!(flat.look(), (vec![], vec![]));
}

#[test]
fn a_name_that_is_none_is_said_once_it_has_a_socket() {
    let mut place = Place::new("{name}/v.sock");
    place.socket("Web_1/v.sock");
    let line = place.refused();
    assert!(
        line.contains("Web_1") && line.contains("names no VM"),
        "{line}"
    );
}

#[test]
fn r127_what_somebody_else_could_have_put_there_is_not_used() {
    let mut place = Place::new("{name}/v.sock");
    let socket = place.socket("web-1/v.sock");
    assert_eq!(place.look().0, ["web-1"]);
    // A link in place of the socket, of its directory, of the directory of all, above it.
    fs::rename(&socket, place.at("web-1/real")).unwrap();
    symlink(place.at("web-1/real"), &socket).unwrap();
    assert!(place.refused().contains("is a link"));
    fs::remove_file(&socket).unwrap();
    fs::write(&socket, "a file").unwrap();
    assert!(place.refused().contains("not a socket"));
    fs::remove_dir_all(place.at("web-1")).unwrap();
    let elsewhere = tempfile::tempdir().unwrap();
    drop(UnixListener::bind(elsewhere.path().join("v.sock")).unwrap());
    symlink(elsewhere.path(), place.at("web-1")).unwrap();
    assert!(place.refused().contains("is a link"));
    fs::remove_file(place.at("web-1")).unwrap();
    let socket = place.socket("web-1/v.sock");
    // Directories in which others may write.
    let dir = place.at("web-1");
    fs::set_permissions(&dir, Permissions::from_mode(0o777)).unwrap();
    assert!(place.refused().contains("chmod o-w"));
    fs::set_permissions(&dir, Permissions::from_mode(0o755)).unwrap();
    for mode in [0o775, 0o757, 0o1777] {
        fs::set_permissions(place.at(""), Permissions::from_mode(mode)).unwrap();
        assert!(place.refused().contains("chmod go-w"), "{mode:o}");
        // Nothing is known of what is in it, and so nothing is gone.
        assert!(!place.watcher.look().is_whole);
    }
    fs::set_permissions(place.at(""), Permissions::from_mode(0o755)).unwrap();
    fs::set_permissions(place.dir.path(), Permissions::from_mode(0o777)).unwrap();
    assert!(place.refused().contains("could put another one there"));
    fs::set_permissions(place.dir.path(), Permissions::from_mode(0o755)).unwrap();
    assert_eq!(place.look().0, ["web-1"]);
    if is_root() {
        // Of another user: the socket alone; with its directory it is the VMM's.
        chown(&socket, Some(UID), Some(UID)).unwrap();
        assert!(place.refused().contains(&format!("user {UID}")));
        chown(&dir, Some(UID), Some(UID)).unwrap();
        assert_eq!(place.look().0, ["web-1"]);
        // The one above is somebody's who could put another directory there.
        chown(place.dir.path(), Some(UID), Some(UID)).unwrap();
        assert!(place.refused().contains("could put another one there"));
        chown(place.dir.path(), Some(0), Some(0)).unwrap();
    }
    let moved = place.dir.path().join("real");
    fs::rename(place.at(""), &moved).unwrap();
    symlink(&moved, place.dir.path().join("fc")).unwrap();
    assert!(place.watcher.look().vms.is_empty(), "a link leads there");
}

#[test]
fn a_directory_brings_so_many_vms_and_those_that_were_first_stay() {
    let mut place = Place::new("{name}.sock");
    for n in 0..FOUND_MAX {
        place.socket(&format!("b{n:04}.sock"));
    }
    assert_eq!(place.look().0.len(), FOUND_MAX);
    place.socket("a.sock");
    let found = place.watcher.look();
    assert_eq!(found.vms.len(), FOUND_MAX);
    assert!(found.vms.iter().all(|(name, _)| name.as_str() != "a"));
    assert!(found.refused[0].contains("1 sockets more"), "{found:?}");
    for n in 0..ENTRIES_MAX {
        fs::write(place.at(&format!("x{n}.sock")), "").unwrap();
    }
    let found = place.watcher.look();
    let many = |line: &String| line.contains("entries");
    assert!(found.refused.iter().any(many), "{found:?}");
    // As many lines as there is room for, and how many there are besides.
    let mut place = Place::new("{name}/v.sock");
    for n in 0..REFUSED_MAX + 5 {
        let dir = place.make(&format!("a{n}"));
        fs::write(dir.join("v.sock"), "").unwrap();
    }
    let found = place.watcher.look();
    assert_eq!(found.refused.len(), REFUSED_MAX + 1);
    assert_eq!(found.refused[REFUSED_MAX], "and 5 more");
}

#[test]
fn what_changes_is_told_and_nothing_else_and_the_thread_ends_with_its_section() {
    let place = Place::new("{name}/v.sock");
    place.make("web-1");
    let root = place.dir.path().to_owned();
    let (stop, stopped) = io::pipe().unwrap();
    let (tell, mut found) = watch::channel(HasFound::default());
    let Place { dir, watcher } = place;
    let thread = std::thread::spawn(move || watcher.run(&stop, &tell));
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap();
    let mut next = |what: &[(&str, bool)]| {
        let is = |found: &HasFound| {
            let vms = found
                .vms
                .iter()
                .map(|(name, socket)| (name.as_str(), *socket));
            found.version > 0 && vms.eq(what.iter().copied())
        };
        runtime.block_on(found.wait_for(is)).unwrap().version
    };
    let first = next(&[("web-1", false)]);
    let listener = UnixListener::bind(root.join("fc/web-1/v.sock")).unwrap();
    let second = next(&[("web-1", true)]);
    // What means nothing is no news.
    fs::write(root.join("fc/web-1/v.sock_741"), "").unwrap();
    drop(listener);
    fs::remove_dir_all(root.join("fc/web-1")).unwrap();
    let third = next(&[]);
    assert!(first < second && second < third);
    drop(stopped);
    thread.join().unwrap();
    drop(dir);
}
