//! A shell that commands are typed into, one after the other.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::Context;

/// A running shell. Dropped = killed.
#[derive(Debug)]
pub struct Shell {
    child: Child,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
    dir: PathBuf,
    seen: PathBuf,
    commands: usize,
}

impl Shell {
    /// Starts one; what its commands print goes to files in `dir`.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start(shell: &mut Command, dir: &Path) -> anyhow::Result<Self> {
        Self::start_in(shell, dir, dir)
    }

    /// The same for a shell that has another root directory: `seen` is `dir` as it is seen from here.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start_in(shell: &mut Command, dir: &Path, seen: &Path) -> anyhow::Result<Self> {
        let shell = shell
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null());
        let mut child = shell.spawn().context("cannot start a shell")?;
        let to = child.stdin.take().context("piped")?;
        let from = BufReader::new(child.stdout.take().context("piped")?);
        Ok(Self {
            child,
            to,
            from,
            dir: dir.to_owned(),
            seen: seen.to_owned(),
            commands: 0,
        })
    }

    /// Types a command. Returns its exit status and what it printed; what goes on in the background prints to the same file.
    ///
    /// # Errors
    /// The shell is gone.
    pub fn run(&mut self, text: &str) -> anyhow::Result<(i32, String)> {
        self.commands += 1;
        let name = format!("command-{}", self.commands);
        let out = self.dir.join(&name);
        let file = out.display();
        // Through the pipe come statuses only.
        writeln!(self.to, "{{\n{text}\n}} >{file} 2>&1 </dev/null\necho $?")?;
        self.to.flush()?;
        let mut status = String::new();
        self.from.read_line(&mut status)?;
        let said = String::from_utf8_lossy(&fs::read(self.seen.join(name)).unwrap_or_default())
            .into_owned();
        let status = status.trim().parse();
        let status = status.with_context(|| format!("the shell has ended:\n{said}"))?;
        Ok((status, said))
    }
}

impl Drop for Shell {
    fn drop(&mut self) {
        // Gone already is fine.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
