//! A cloud-config that puts files in their places when a VM boots first.
//!
//! It is JSON, which is YAML: nothing in a path or key can mean something else.

use std::fmt;
use std::io;

use adit_image::Root;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Serialize;

/// Gathers files as a root.
#[derive(Default, Serialize)]
pub struct CloudConfig {
    write_files: Vec<WriteFile>,
    runcmd: Vec<Vec<String>>,
}

/// An entry of cloud-init's module `write_files`.
#[derive(Serialize)]
struct WriteFile {
    path: String,
    owner: &'static str,
    permissions: String,
    encoding: &'static str,
    content: String,
}

impl Root for CloudConfig {
    /// What the image has is not known.
    fn has(&self, _: &str) -> bool {
        false
    }

    fn is_same(&self, _: &str, _: &str) -> bool {
        false
    }

    fn place(&mut self, path: &str, content: &[u8], mode: u32) -> io::Result<bool> {
        self.write_files.push(WriteFile {
            path: format!("/{path}"),
            owner: "root:root",
            permissions: format!("{mode:04o}"),
            encoding: "b64",
            content: STANDARD.encode(content),
        });
        Ok(true)
    }

    fn place_link(&mut self, path: &str, target: &str) -> io::Result<bool> {
        let path = format!("/{path}");
        if let Some((dir, _)) = path.rsplit_once('/') {
            self.command(&["mkdir", "-p", dir]);
        }
        self.command(&["ln", "-sfn", target, &path]);
        Ok(true)
    }
}

impl CloudConfig {
    fn command(&mut self, words: &[&str]) {
        let words = words.iter().map(|word| (*word).to_owned());
        self.runcmd.push(words.collect());
    }
}

/// The whole document, with what starts the agent at the end.
impl fmt::Display for CloudConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let start: [&[&str]; 3] = [
            &["chmod", "700", "/etc/adit-guest"],
            &["systemctl", "daemon-reload"],
            &["systemctl", "start", "--no-block", "adit-guest.service"],
        ];
        let words = |line: &&[&str]| line.iter().map(|w| (*w).to_owned()).collect::<Vec<_>>();
        let runcmd: Vec<_> = self
            .runcmd
            .iter()
            .cloned()
            .chain(start.iter().map(words))
            .collect();
        let whole = serde_json::json!({ "write_files": self.write_files, "runcmd": runcmd });
        write!(f, "#cloud-config\n{whole:#}")
    }
}
