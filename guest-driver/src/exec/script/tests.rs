//! Real children: exact arguments, floods, trees that hide. One at a time: the tree is "everything below this process".

use super::*;
use crate::exec::{alone, cgroup};

fn script(text: &str) -> Script {
    let me = User::from_uid(Uid::effective()).unwrap().unwrap();
    let of = serde_json::json!({"interpreter": "/bin/sh", "script": text, "run_as": me.name, "output_cap": 131_072});
    serde_json::from_value(of).unwrap()
}

/// Runs in a directory of its own.
fn exec(script: &Script, task: &str, cgroups: Option<PathBuf>, timeout_ms: u64) -> Executed {
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(
        dir.path(),
        std::os::unix::fs::PermissionsExt::from_mode(0o711),
    )
    .unwrap();
    let place = Dirs {
        cgroups,
        dir: dir.path().join("run"),
    };
    prepare(&place.dir).unwrap();
    let got = run_for(script, task, &place, Duration::from_millis(timeout_ms));
    assert_eq!(
        fs::read_dir(&place.dir).unwrap().count(),
        0,
        "the text is left behind"
    );
    got
}

fn text(c: &adit_tasks::wire::Captured) -> String {
    String::from_utf8_lossy(&[&c.head[..], &c.tail[..]].concat()).into_owned()
}

#[test]
fn r92_arguments_reach_the_program_byte_for_byte() {
    let _alone = alone();
    let hostile = [
        "; echo x", "`id`", "$(id)", "a\nb", "-n", "'\"\\", "*", "&&", "é\u{7f}", "",
    ];
    let mut script = script("printf '%s\\036' \"$@\"");
    script.args = hostile.map(str::to_owned).into();
    let got = exec(&script, "92", None, 30_000);
    assert_eq!(got.outcome, Outcome::Done, "{}", got.reason);
    assert_eq!(
        text(&got.stdout),
        hostile.map(|h| format!("{h}\x1e")).concat()
    );
}

#[test]
fn r97_the_child_gets_only_what_is_declared() {
    let _alone = alone();
    let mut script = script("env; umask; pwd; ls /proc/self/fd | tr '\\n' ' '; cat");
    script.env = [("A".to_owned(), "1 2".to_owned())].into();
    script.cwd = "/tmp".into();
    let got = exec(&script, "97", None, 30_000);
    let out = text(&got.stdout);
    let env: Vec<&str> = out
        .lines()
        .filter(|l| l.contains('='))
        .filter(|l| !l.starts_with("PWD="))
        .collect();
    let mut env: Vec<&str> = env
        .into_iter()
        .filter(|l| !l.starts_with("SHLVL=") && !l.starts_with("_="))
        .collect();
    env.sort_unstable();
    let keys: Vec<&str> = env.iter().map(|l| l.split_once('=').unwrap().0).collect();
    assert_eq!(keys, ["A", "ADIT_TASK_ID", "HOME", "LANG", "PATH", "USER"]);
    // Descriptor 3 is ls's own view of the directory; standard input is empty.
    assert!(out.ends_with("0022\n/tmp\n0 1 2 3 "), "{out}");
}

#[test]
fn run_as_changes_user_and_groups() {
    let _alone = alone();
    if !Uid::effective().is_root() {
        return eprintln!("skipped: needs root to become another user");
    }
    let mut script = script("id -u; id -G; cat /etc/shadow");
    script.run_as = "nobody".into();
    let got = exec(&script, "98", None, 30_000);
    assert_eq!(
        (text(&got.stdout).as_str(), got.outcome),
        ("65534\n65534\n", Outcome::Failed)
    );
    script.run_as = "no-such-user".into();
    assert!(
        exec(&script, "98", None, 30_000)
            .reason
            .contains("no-such-user")
    );
}

#[test]
fn a_program_that_is_not_there_fails_with_its_name() {
    let _alone = alone();
    let mut script = script("");
    script.interpreter = "/no/such/program".into();
    let got = exec(&script, "1", None, 30_000);
    assert_eq!((got.outcome, got.exit), (Outcome::Failed, None));
    assert!(got.reason.contains("/no/such/program"));
}

#[test]
fn exit_codes_and_signals_are_told_apart() {
    let _alone = alone();
    let code = |s: &str| exec(&script(s), "2", None, 30_000);
    assert_eq!(
        (code("exit 0").outcome, code("exit 0").exit),
        (Outcome::Done, Some(0))
    );
    assert_eq!(
        (code("exit 3").outcome, code("exit 3").exit),
        (Outcome::Failed, Some(3))
    );
    let killed = code("kill -9 $$");
    assert_eq!(
        (killed.exit, killed.reason.as_str()),
        (Some(137), "killed by signal 9")
    );
    // What a program says itself is never taken for a signal.
    for said in [129, 137, 255] {
        let got = code(&format!("exit {said}"));
        assert_eq!(
            (got.exit, got.reason),
            (Some(said), format!("exit status {said}"))
        );
    }
}

#[test]
fn r113_the_tasks_user_can_open_its_output_again() {
    let _alone = alone();
    let mut script =
        script("echo out >/dev/stdout; echo err >/dev/stderr; echo more >>/dev/stdout");
    if Uid::effective().is_root() {
        script.run_as = "nobody".into();
    }
    let got = exec(&script, "113", None, 30_000);
    assert_eq!(
        (text(&got.stdout).as_str(), text(&got.stderr).as_str()),
        ("out\nmore\n", "err\n"),
        "{}",
        got.reason
    );
}

#[test]
fn r113_a_script_runs_although_its_directory_was_removed() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let place = Dirs {
        cgroups: None,
        dir: dir.path().join("run"),
    };
    prepare(&place.dir).unwrap();
    fs::remove_dir(&place.dir).unwrap();
    let got = run_for(&script("echo ran"), "114", &place, Duration::from_secs(30));
    assert_eq!(
        (got.outcome, text(&got.stdout).as_str()),
        (Outcome::Done, "ran\n"),
        "{}",
        got.reason
    );
}

#[test]
fn r93_a_flood_is_capped_and_never_blocks_the_child() {
    let _alone = alone();
    for (what, least) in [("yes", 1 << 20), ("cat /dev/zero", 1 << 20)] {
        // A busy machine may not begin with a child in half a second.
        let mut limits = [500, 5_000, 30_000].into_iter();
        let got = loop {
            let ms = limits.next().expect(what);
            let got = exec(&script(what), "93", None, ms);
            assert_eq!(got.outcome, Outcome::TimedOut);
            if got.stdout.total > least {
                break got;
            }
        };
        assert_eq!(
            (got.stdout.head.len(), got.stdout.tail.len()),
            (65536, 65536)
        );
    }
    // One line of 64 MiB to each stream, no newline: all of it is taken, the child ends by itself.
    let got = exec(
        &script("head -c 67108864 /dev/zero; head -c 67108864 /dev/zero >&2"),
        "93",
        None,
        60_000,
    );
    assert_eq!(
        (got.outcome, got.stdout.total, got.stderr.total),
        (Outcome::Done, 1 << 26, 1 << 26)
    );
}

/// Fifty processes that ignore TERM, half of them in sessions of their own, a double fork, all holding the pipe.
const TREE: &str = "trap '' TERM; i=0; while [ $i -lt 24 ]; do sleep 1000 & setsid sleep 1000 & i=$((i+1)); done; \
                    (setsid sh -c 'trap \"\" TERM HUP; sleep 1000 & sleep 1000' &) ; echo up; wait; sleep 1000";

fn living(marker: &str) -> usize {
    living_that(marker, |_| true)
}

/// Those of them that are this, by their pid.
fn living_that(marker: &str, is: impl Fn(i32) -> bool) -> usize {
    let want = format!("{MARKER}={marker}");
    let bears = |pid: i32| {
        let env = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        env.split(|&b| b == 0).any(|v| v == want.as_bytes())
    };
    super::super::proc::table()
        .values()
        .filter(|p| !p.zombie && bears(p.id.pid) && is(p.id.pid))
        .count()
}

#[test]
fn r95_nothing_of_the_tree_outlives_the_timeout_without_a_cgroup() {
    let _alone = alone();
    let got = exec(&script(TREE), "9500", None, 1500);
    assert_eq!(
        (got.outcome, text(&got.stdout).as_str()),
        (Outcome::TimedOut, "up\n")
    );
    assert_eq!(living("9500"), 0);
    assert!(!got.reason.contains("could not"), "{}", got.reason);
}

#[test]
fn r95_nothing_of_the_tree_outlives_the_timeout_with_a_cgroup() {
    let _alone = alone();
    let Some(base) = cgroup::base() else {
        return eprintln!("skipped: no cgroup2 here");
    };
    let task = format!("95{}", std::process::id());
    let Some(probe) = cgroup::Cgroup::create(&base, &task) else {
        return eprintln!("skipped: cgroup2 is read-only");
    };
    probe.release();
    let got = exec(&script(TREE), &task, Some(base.clone()), 1500);
    assert_eq!(
        (got.outcome, text(&got.stdout).as_str()),
        (Outcome::TimedOut, "up\n")
    );
    assert_eq!(living(&task), 0);
    assert!(
        cgroup::Cgroup::find(&base, &task).is_none(),
        "cgroup left behind"
    );
}

/// Starts a daemon that holds the pipe, and ends once the daemon has a session of its own.
const DAEMON: &str =
    "f=$(mktemp -u); mkfifo $f; setsid sh -c 'echo up >$0; exec sleep 1000' $f & cat $f; rm $f";

#[test]
fn r95_a_result_does_not_wait_for_a_pipe_that_a_daemon_holds() {
    let _alone = alone();
    let got = exec(&script(DAEMON), "9501", None, 30_000);
    assert_eq!(got.outcome, Outcome::Done);
    // The daemon was to stay; a later task's timeout spares it.
    assert_eq!(living("9501"), 1);
    assert_eq!(
        exec(&script("sleep 1000"), "9502", None, 200).outcome,
        Outcome::TimedOut
    );
    assert_eq!((living("9501"), living("9502")), (1, 0));
    assert!(super::super::tree::kill_orphans("9501", None));
    assert_eq!(living("9501"), 0);
}

/// A daemon that starts two workers when it is told to, each of which it is not the parent of: one in its session, one in
/// a session of the worker's own.
const WORKERS: &str = "setsid sh -c 'echo begun >\"$1\"; read go <\"$0\"; (sleep 1000 &); (setsid sleep 1000 &); \
                       echo did >\"$1\"; exec sleep 1000' \"$1\" \"$2\" >/dev/null 2>&1 & cat \"$2\"";

fn workers_of_an_earlier_task_are_not_a_later_ones(
    earlier: &str,
    later: &str,
    base: Option<PathBuf>,
) {
    let dir = tempfile::tempdir().unwrap();
    let fifos = ["go", "did"].map(|name| dir.path().join(name));
    for path in &fifos {
        nix::unistd::mkfifo(path, nix::sys::stat::Mode::S_IRWXU).unwrap();
    }
    let mut daemon = script(WORKERS);
    daemon.args = fifos
        .iter()
        .map(|f| f.to_str().unwrap().to_owned())
        .collect();
    let got = exec(&daemon, earlier, base.clone(), 30_000);
    assert_eq!(got.outcome, Outcome::Done, "{}", got.reason);
    let tree = Tree::new(later, base.as_deref());
    fs::write(&fifos[0], "go\n").unwrap();
    assert_eq!(fs::read_to_string(&fifos[1]).unwrap(), "did\n");
    // All three have become what they stay: a shell between may be there for a moment, and a worker not yet.
    let sleeps = |pid: i32| {
        let name = std::fs::read_to_string(format!("/proc/{pid}/comm"));
        name.is_ok_and(|name| name == "sleep\n")
    };
    while living_that(earlier, sleeps) < 3 || living(earlier) != 3 {
        std::thread::yield_now();
    }
    assert!(tree.kill(0));
    assert_eq!((living(earlier), tree.release(0)), (3, 0));
    assert!(super::super::tree::kill_orphans(earlier, base.as_deref()));
    assert_eq!(living(earlier), 0);
}

#[test]
fn r95_workers_that_an_earlier_daemon_starts_are_not_a_later_tasks_without_a_cgroup() {
    let _alone = alone();
    workers_of_an_earlier_task_are_not_a_later_ones("9504", "9505", None);
}

#[test]
fn r95_workers_that_an_earlier_daemon_starts_are_not_a_later_tasks_with_a_cgroup() {
    let _alone = alone();
    let Some(base) = cgroup::base() else {
        return eprintln!("skipped: no cgroup2 here");
    };
    let [earlier, later] = ["9504", "9505"].map(|task| format!("{task}{}", std::process::id()));
    let Some(probe) = cgroup::Cgroup::create(&base, &earlier) else {
        return eprintln!("skipped: cgroup2 is read-only");
    };
    probe.release();
    workers_of_an_earlier_task_are_not_a_later_ones(&earlier, &later, Some(base.clone()));
    // What a daemon was in is removed before the next task, once it is empty.
    cgroup::sweep(&base);
    assert!(cgroup::Cgroup::create(&base, &later).is_some_and(|c| c.release() == 0));
    for task in [earlier, later] {
        assert!(cgroup::Cgroup::find(&base, &task).is_none(), "{task} stays");
    }
}

#[test]
fn background_jobs_end_with_their_script() {
    let _alone = alone();
    let got = exec(
        &script("sleep 1000 & sleep 1000 & exit 0"),
        "9503",
        None,
        30_000,
    );
    assert_eq!((got.outcome, living("9503")), (Outcome::Done, 0));
}

/// A file system of a process that never answers.
struct Silent {
    at: tempfile::TempDir,
    _fuse: File,
}

impl Silent {
    fn new() -> Option<Self> {
        let fuse = fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/fuse")
            .ok()?;
        let at = tempfile::tempdir().unwrap();
        let options = format!(
            "fd={},rootmode=40000,user_id=0,group_id=0",
            std::os::fd::AsRawFd::as_raw_fd(&fuse)
        );
        let flags = nix::mount::MsFlags::empty();
        let mounted = nix::mount::mount(
            Some("silent"),
            at.path(),
            Some("fuse"),
            flags,
            Some(&*options),
        );
        mounted.ok().map(|()| Self { at, _fuse: fuse })
    }
}

impl Drop for Silent {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(self.at.path(), nix::mount::MntFlags::MNT_DETACH);
    }
}

#[test]
fn a_directory_that_does_not_answer_has_the_steps_time_and_no_more() {
    let _alone = alone();
    let Some(silent) = Silent::new() else {
        println!("skipped: it takes root and /dev/fuse");
        return;
    };
    let mut script = script("true");
    script.cwd = silent.at.path().join("below").display().to_string();
    let got = exec(&script, "silent", None, 500);
    assert_eq!(got.outcome, Outcome::TimedOut, "{}", got.reason);
    // The next one is as ever.
    let got = exec(&self::script("echo next"), "next", None, 30_000);
    assert_eq!(text(&got.stdout), "next\n");
}
