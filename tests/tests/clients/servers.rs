//! The VM's servers.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};

use adit_tests::process::{Reaped, bound};
use adit_tests::servers::{echoes, serving};

use super::{beside, run};

/// They end with this.
pub struct Servers {
    _process: Reaped,
    _files: tempfile::TempDir,
    /// The page, its WebSocket, and files.
    pub page: u16,
    /// gRPC.
    pub grpc: u16,
    /// Sends back what it gets, and the end.
    pub echo: u16,
}

impl Servers {
    pub fn start() -> Self {
        let files = tempfile::tempdir().unwrap();
        std::fs::write(files.path().join("hello"), "this is web-1\n").unwrap();
        repository(files.path());
        let mut child = bound("/usr/bin/python3")
            .arg(beside("server.py"))
            .arg(files.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        let process = Reaped(child);
        let [page, grpc]: [u16; 2] = serde_json::from_str(&line).unwrap();
        Self {
            _process: process,
            _files: files,
            page,
            grpc,
            echo: serving(echoes).unwrap(),
        }
    }

    pub fn ports(&self) -> [u16; 3] {
        [self.page, self.grpc, self.echo]
    }
}

/// A repository with one commit, as a server of plain files has it.
fn repository(files: &Path) {
    let git = |args: &[&str]| {
        let mut git = Command::new("git");
        git.current_dir(files)
            .args(["-c", "user.name=x", "-c", "user.email=x@localhost"]);
        run(git.args(args));
    };
    git(&["init", "-q", "site"]);
    git(&["-C", "site", "commit", "-q", "--allow-empty", "-m", "first"]);
    git(&["clone", "-q", "--bare", "site", "site.git"]);
    git(&["-C", "site.git", "update-server-info"]);
}
