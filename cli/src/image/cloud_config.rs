//! User data for cloud-init that puts files in their places when a VM boots first.
//!
//! | part | what | read as |
//! |---|---|---|
//! | cloud-config | files and commands, in JSON, which is YAML: nothing in a path or key can mean something else | YAML, several times in a boot |
//! | shell script, one for each large file | writes that file; runs before the commands | text |
//!
//! cloud-init reads YAML by a parser in Python, a character at a time: megabytes of it take seconds, and minutes where the VM is
//! emulated. Without a large file the cloud-config is all there is.

use std::fmt;
use std::io;

use adit_image::Root;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Serialize;

/// Bytes of a file that are not read as YAML.
const LARGE: usize = 64 << 10;
/// Between the parts. A line of JSON or base64 has no such beginning.
const BOUNDARY: &str = "==adit==";
/// Characters of a line of base64, as RFC 2045 has it.
const LINE: usize = 76;

/// Gathers files as a root.
#[derive(Default, Serialize)]
pub struct CloudConfig {
    write_files: Vec<WriteFile>,
    runcmd: Vec<Vec<String>>,
    #[serde(skip)]
    large: Vec<WriteFile>,
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
        let files = match content.len() {
            0..LARGE => &mut self.write_files,
            _ => &mut self.large,
        };
        files.push(WriteFile {
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
        if self.large.is_empty() {
            return write!(f, "#cloud-config\n{whole:#}");
        }
        writeln!(f, "Content-Type: multipart/mixed; boundary=\"{BOUNDARY}\"")?;
        writeln!(f, "MIME-Version: 1.0\n\n--{BOUNDARY}")?;
        writeln!(f, "Content-Type: text/cloud-config\n")?;
        writeln!(f, "#cloud-config\n{whole:#}")?;
        for (nth, file) in self.large.iter().enumerate() {
            writeln!(f, "--{BOUNDARY}\nContent-Type: text/x-shellscript")?;
            // cloud-init runs them in the order of their names, and the commands under the name `runcmd`.
            let name = format!("adit-file-{nth}");
            writeln!(f, "Content-Disposition: attachment; filename=\"{name}\"\n")?;
            file.script(f)?;
        }
        write!(f, "--{BOUNDARY}--")
    }
}

impl WriteFile {
    /// Writes a script that puts the file there whole. It has the content behind its first empty line.
    fn script(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (path, mode) = (quoted(&self.path), &self.permissions);
        writeln!(
            f,
            "#!/bin/sh\nset -e\nto={path}\nmkdir -p \"${{to%/*}}\"\nsed '1,/^$/d' \"$0\" | base64 -d >\"$to.new\"\n\
             chmod {mode} \"$to.new\"\nmv -f \"$to.new\" \"$to\"\nexit 0\n"
        )?;
        let mut rest = self.content.as_str();
        while !rest.is_empty() {
            // Base64 is ASCII.
            let (line, after) = rest.split_at(LINE.min(rest.len()));
            writeln!(f, "{line}")?;
            rest = after;
        }
        Ok(())
    }
}

/// A word of shell.
fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', "'\\''"))
}
