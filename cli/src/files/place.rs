//! `VM:PATH`, a path of this side, or `-`.

use crate::error::Failure;
use crate::exec::OWN;

/// One end of a copy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum End {
    Remote(Remote),
    Local(Local),
    /// Standard input or output.
    Pipe,
}

/// A place in a VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Remote {
    pub(super) vm: String,
    /// Plain: absolute, or below the user's home, which is an empty one.
    pub(super) path: String,
    /// It must be a directory: it was written with a slash at its end.
    pub(super) is_dir: bool,
    /// What is in it is meant: it was written with `/.` at its end.
    pub(super) contents: bool,
}

/// A path of this side.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Local {
    pub(super) path: Vec<u8>,
    pub(super) is_dir: bool,
    pub(super) contents: bool,
}

fn usage(message: impl Into<String>) -> Failure {
    Failure::new("usage", message).with_status(OWN)
}

impl End {
    pub(super) fn parse(text: &std::ffi::OsStr) -> Result<Self, Failure> {
        use std::os::unix::ffi::OsStrExt;
        let bytes = text.as_bytes();
        if bytes == b"-" {
            return Ok(Self::Pipe);
        }
        if bytes.is_empty() {
            return Err(usage("an empty path"));
        }
        // As scp has it: what has a slash before the first colon is a path.
        let colon = bytes.iter().position(|b| matches!(b, b':' | b'/'));
        if colon.is_none_or(|at| bytes[at] == b'/') {
            return Ok(Self::Local(Local {
                path: bytes.to_vec(),
                is_dir: bytes.ends_with(b"/"),
                contents: bytes.ends_with(b"/."),
            }));
        }
        let text = text
            .to_str()
            .ok_or_else(|| usage("the path in the VM is no UTF-8"))?;
        Remote::parse(text).map(Self::Remote)
    }
}

impl Remote {
    pub(super) fn parse(text: &str) -> Result<Self, Failure> {
        let (vm, path) = text
            .split_once(':')
            .ok_or_else(|| usage(format!("`{text}` is no place in a VM")).help("write VM:PATH"))?;
        if vm.parse::<adit_names::VmId>().is_err() {
            let text = format!("`{vm}` names no VM");
            return Err(usage(text).help("a file of this side whose name has a colon is ./NAME"));
        }
        let is_absolute = path.starts_with('/');
        let names: Vec<&str> = path
            .split('/')
            .filter(|name| !matches!(*name, "" | "."))
            .collect();
        if names.contains(&"..") {
            return Err(usage("a path in a VM is without `..`")
                .help("a link in it would make it lead elsewhere than it seems to"));
        }
        let plain = names.join("/");
        Ok(Self {
            vm: vm.to_owned(),
            path: match is_absolute {
                true => format!("/{plain}"),
                false => plain,
            },
            is_dir: path.ends_with('/') || path.ends_with("/.") || path == ".",
            contents: path.ends_with("/.") || path == ".",
        })
    }

    /// What it is called in a directory that it is copied to; empty: what is in it goes there.
    pub(super) fn name(&self) -> Vec<u8> {
        name(self.path.as_bytes(), self.contents)
    }
}

impl Local {
    /// As a place in a VM has it.
    pub(super) fn name(&self) -> Vec<u8> {
        name(&self.path, self.contents)
    }
}

fn name(path: &[u8], contents: bool) -> Vec<u8> {
    let end = path.iter().rposition(|b| *b != b'/').map_or(0, |at| at + 1);
    let last = path[..end].rsplit(|b| *b == b'/').next();
    match last.unwrap_or_default() {
        _ if contents => Vec::new(),
        b"." | b".." => Vec::new(),
        name => name.to_vec(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn remote(text: &str) -> (String, bool, String) {
        let End::Remote(remote) = End::parse(text.as_ref()).unwrap() else {
            panic!("{text} is none of a VM");
        };
        let name = String::from_utf8(remote.name()).unwrap();
        (remote.path, remote.is_dir, name)
    }

    #[test]
    fn places_are_read_as_scp_reads_them() {
        let of = |path: &str, is_dir, name: &str| (path.to_owned(), is_dir, name.to_owned());
        assert_eq!(remote("web-1:/srv/a"), of("/srv/a", false, "a"));
        assert_eq!(remote("web-1://srv//./a/"), of("/srv/a", true, "a"));
        assert_eq!(remote("web-1:a b/c"), of("a b/c", false, "c"));
        assert_eq!(remote("web-1:"), of("", false, ""));
        assert_eq!(remote("web-1:/"), of("/", true, ""));
        assert_eq!(remote("web-1:/srv/."), of("/srv", true, ""));
        assert_eq!(remote("web-1:."), of("", true, ""));
        assert_eq!(remote("web-1:/a:b"), of("/a:b", false, "a:b"));
        assert_eq!(End::parse("-".as_ref()).unwrap(), End::Pipe);
        for (text, name) in [
            ("a", "a"),
            ("./web-1:x", "web-1:x"),
            ("/tmp/a:b", "a:b"),
            ("dir/", "dir"),
            ("dir/.", ""),
            (".", ""),
            ("..", ""),
            ("/", ""),
        ] {
            let End::Local(local) = End::parse(text.as_ref()).unwrap() else {
                panic!("{text} is of a VM");
            };
            assert_eq!(local.name(), name.as_bytes(), "{text}");
        }
        for text in ["web-1:../x", "web-1:/srv/..", "Web_1:/x", ":/x", ""] {
            assert!(End::parse(text.as_ref()).is_err(), "{text}");
        }
    }
}
