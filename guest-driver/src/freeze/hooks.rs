//! The guest's own programs before and after: each is called with `freeze`, then with `thaw`, as qemu-ga's hooks are.

use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use crate::exec::script::DEFAULT_PATH;

/// How long one may take.
const LIMIT: Duration = Duration::from_secs(10);
/// How long all of them may take.
const ALL: Duration = Duration::from_secs(30);
/// Between two looks at one that runs.
const LOOK: Duration = Duration::from_millis(5);

/// Those that were told to freeze, and are to be told to thaw.
#[derive(Debug, Default)]
pub struct Hooks(Vec<PathBuf>);

/// The programs of a directory, by their names. There may be no such directory.
fn of(dir: &Path) -> Result<Vec<PathBuf>, String> {
    let failed = |e: io::Error| format!("{}: {e}", dir.display());
    let meta = match fs::metadata(dir) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        meta => meta.map_err(failed)?,
    };
    let mine = nix::unistd::geteuid().as_raw();
    let is_owners = |meta: &fs::Metadata| {
        (meta.uid() == mine || meta.uid() == 0) && meta.permissions().mode() & 0o022 == 0
    };
    if !is_owners(&meta) {
        let dir = dir.display();
        return Err(format!(
            "{dir} belongs to somebody else, or others may write there"
        ));
    }
    let mut all = Vec::new();
    for entry in fs::read_dir(dir).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        let meta = fs::metadata(&path).map_err(failed)?;
        if !meta.is_file() || meta.permissions().mode() & 0o111 == 0 {
            continue;
        }
        if !is_owners(&meta) {
            let path = path.display();
            return Err(format!(
                "{path} belongs to somebody else, or others may write it"
            ));
        }
        all.push(path);
    }
    all.sort();
    Ok(all)
}

impl Hooks {
    /// Tells each to freeze. If one fails, those before it hear `thaw`, and so does it.
    ///
    /// # Errors
    /// Which did not, and why.
    pub fn freeze(dir: &Path) -> Result<Self, String> {
        let (mut told, until) = (Self::default(), Instant::now() + ALL);
        for hook in of(dir)? {
            told.0.push(hook.clone());
            if let Err(why) = call(&hook, "freeze", until) {
                told.thaw();
                return Err(format!("{} freeze: {why}", hook.display()));
            }
        }
        Ok(told)
    }

    /// Tells each to thaw, the last first. Returns what went wrong.
    pub fn thaw(self) -> Vec<String> {
        let until = Instant::now() + ALL;
        let all = self.0.into_iter().rev();
        all.filter_map(|hook| {
            let why = call(&hook, "thaw", until).err()?;
            Some(format!("{} thaw: {why}", hook.display()))
        })
        .collect()
    }
}

fn call(hook: &Path, word: &str, until: Instant) -> Result<(), String> {
    let until = until.min(Instant::now() + LIMIT);
    let mut command = Command::new(hook);
    command.arg(word).env_clear().env("PATH", DEFAULT_PATH);
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .current_dir("/")
        .process_group(0);
    let mut child = command.spawn().map_err(|e| e.to_string())?;
    match ended(&mut child, until) {
        Ok(Some(status)) if status.success() => Ok(()),
        Ok(Some(status)) => Err(status.to_string()),
        Ok(None) => {
            // With what it has started.
            let _ = killpg(Pid::from_raw(child.id().cast_signed()), Signal::SIGKILL);
            let _ = child.wait();
            Err(format!("not done within {LIMIT:?}"))
        }
        Err(e) => Err(e.to_string()),
    }
}

fn ended(child: &mut Child, until: Instant) -> io::Result<Option<std::process::ExitStatus>> {
    loop {
        match child.try_wait()? {
            None if Instant::now() < until => std::thread::sleep(LOOK),
            status => return Ok(status),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exec::alone;

    fn hook(dir: &Path, name: &str, text: &str) {
        let at = dir.join(name);
        fs::write(&at, format!("#!/bin/sh\n{text}\n")).unwrap();
        fs::set_permissions(&at, fs::Permissions::from_mode(0o755)).unwrap();
    }

    #[test]
    fn each_hears_freeze_and_thaw_and_one_that_fails_undoes_those_before() {
        // Others reap children.
        let _alone = alone();
        let dir = tempfile::tempdir().unwrap();
        let (hooks, log) = (dir.path().join("d"), dir.path().join("log"));
        assert!(Hooks::freeze(&hooks).unwrap().thaw().is_empty());
        fs::create_dir(&hooks).unwrap();
        let says = |name: &str| format!("echo {name} $1 >> {}", log.display());
        hook(&hooks, "10-a", &says("a"));
        hook(&hooks, "20-b", &says("b"));
        fs::write(hooks.join("README"), "no program").unwrap();
        let told = Hooks::freeze(&hooks).unwrap();
        assert!(told.thaw().is_empty());
        let said = || fs::read_to_string(&log).unwrap();
        assert_eq!(said(), "a freeze\nb freeze\nb thaw\na thaw\n");
        fs::write(&log, "").unwrap();
        hook(&hooks, "20-b", &format!("{}; [ $1 = thaw ]", says("b")));
        let why = Hooks::freeze(&hooks).unwrap_err();
        assert!(why.contains("20-b freeze: exit status: 1"), "{why}");
        assert_eq!(said(), "a freeze\nb freeze\nb thaw\na thaw\n");
        // Whoever may write it says what root runs.
        fs::set_permissions(hooks.join("20-b"), fs::Permissions::from_mode(0o777)).unwrap();
        assert!(
            Hooks::freeze(&hooks)
                .unwrap_err()
                .contains("others may write it")
        );
        fs::set_permissions(&hooks, fs::Permissions::from_mode(0o777)).unwrap();
        assert!(Hooks::freeze(&hooks).unwrap_err().contains("write there"));
    }
}
