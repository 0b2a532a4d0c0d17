//! What a hello of the service `files` says beside its name: as whom, what, where, and beneath which directory.
//!
//! | off | size | field |
//! |---|---|---|
//! | 0 | 1 | version, 1 |
//! | 1 | 1 | what: 1 read, 2 write, 3 list, 4 stat, 5 remove, 6 remove with all that is below, 7 wait for it |
//! | 2 | 1 | length of the user's name |
//! | 3 | 2 | so many bytes of the path, from its beginning, are the directory that nothing may lead out of; 0: any |
//! | 5 | .. | the user's name, then the path: absolute and plain, or below the user's home |
//!
//! aditd writes it, of what it has let through: the directory is that of the grant, and the guest holds to it beside its own policy.

use serde::{Deserialize, Serialize};

/// Most bytes of a user's name.
pub const USER_MAX: usize = 64;
/// Most bytes of a path.
pub const PATH_MAX: usize = 400;
const VERSION: u8 = 1;
const HEAD_LEN: usize = 5;

/// The arguments of a hello.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Asked {
    /// As whom.
    pub user: String,
    /// What.
    pub what: What,
    /// Where: absolute and plain, or below the user's home.
    pub path: String,
    /// Bytes of the path that are the directory which the host's grant is for; 0: any.
    pub under: u16,
}

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum What {
    /// A file or a tree, from the guest.
    Read,
    /// A file or a tree, to the guest.
    Write,
    /// What is in a directory.
    List,
    /// What is known of one file.
    Stat,
    /// That it is removed.
    Remove {
        /// With all that is below.
        all: bool,
    },
    /// When something is there.
    Wait,
}

impl What {
    /// Whether something is changed by it.
    pub fn is_write(self) -> bool {
        matches!(self, Self::Write | Self::Remove { .. })
    }
}

/// Whether a path is spelled in the one way that counts: absolute, no `.`, `..`, `//` or slash at its end, no NUL; or `/` itself.
pub fn is_plain(path: &str) -> bool {
    path == "/" || path.strip_prefix('/').is_some_and(is_plain_below)
}

/// The same of a path below a directory; an empty one is the directory itself.
fn is_plain_below(path: &str) -> bool {
    let is_name = |part: &str| !matches!(part, "" | "." | "..") && !part.contains('\0');
    path.split('/').all(is_name)
}

impl Asked {
    /// The directory that nothing may lead out of, if the host names one.
    pub fn root(&self) -> Option<&str> {
        (self.under > 0).then(|| &self.path[..self.under.into()])
    }

    fn is_well_formed(&self) -> bool {
        let is_path = self.path.is_empty() || is_plain(&self.path) || is_plain_below(&self.path);
        let (root, rest) = match self.path.split_at_checked(self.under.into()) {
            Some(parts) => parts,
            None => return false,
        };
        let is_root = self.under == 0
            || is_plain(root) && (root == "/" || rest.is_empty() || rest.starts_with('/'));
        is_path
            && is_root
            && (1..=USER_MAX).contains(&self.user.len())
            && self.path.len() <= PATH_MAX
    }

    /// As the arguments of a hello; none: a text is too long, or not what it should be.
    pub fn encode(&self) -> Option<Vec<u8>> {
        if !self.is_well_formed() {
            return None;
        }
        let what = match self.what {
            What::Read => 1,
            What::Write => 2,
            What::List => 3,
            What::Stat => 4,
            What::Remove { all: false } => 5,
            What::Remove { all: true } => 6,
            What::Wait => 7,
        };
        let mut bytes = vec![VERSION, what, u8::try_from(self.user.len()).ok()?];
        bytes.extend(self.under.to_le_bytes());
        bytes.extend(self.user.as_bytes());
        bytes.extend(self.path.as_bytes());
        Some(bytes)
    }

    /// Reads the arguments of a hello; none if they are not these.
    pub fn parse(arguments: &[u8]) -> Option<Self> {
        let (head, rest) = arguments.split_first_chunk::<HEAD_LEN>()?;
        let [VERSION, what, user, low, high] = *head else {
            return None;
        };
        let (user, path) = rest.split_at_checked(user.into())?;
        let asked = Self {
            user: std::str::from_utf8(user).ok()?.to_owned(),
            what: match what {
                1 => What::Read,
                2 => What::Write,
                3 => What::List,
                4 => What::Stat,
                5 => What::Remove { all: false },
                6 => What::Remove { all: true },
                7 => What::Wait,
                _ => return None,
            },
            path: std::str::from_utf8(path).ok()?.to_owned(),
            under: u16::from_le_bytes([low, high]),
        };
        asked.is_well_formed().then_some(asked)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(what: What, path: &str, under: u16) -> Asked {
        let (user, path) = ("ops".into(), path.into());
        Asked {
            user,
            what,
            path,
            under,
        }
    }

    #[test]
    fn arguments_have_golden_bytes() {
        for (asked, bytes) in [
            (
                asked(What::Read, "/srv/a", 4),
                &b"\x01\x01\x03\x04\x00ops/srv/a"[..],
            ),
            (asked(What::Write, "a/b", 0), b"\x01\x02\x03\x00\x00opsa/b"),
            (asked(What::List, "", 0), b"\x01\x03\x03\x00\x00ops"),
            (asked(What::Stat, "/", 1), b"\x01\x04\x03\x01\x00ops/"),
            (
                asked(What::Remove { all: false }, "/a", 2),
                b"\x01\x05\x03\x02\x00ops/a",
            ),
            (
                asked(What::Remove { all: true }, "/a", 0),
                b"\x01\x06\x03\x00\x00ops/a",
            ),
            (asked(What::Wait, "/a", 0), b"\x01\x07\x03\x00\x00ops/a"),
        ] {
            assert_eq!(asked.encode().unwrap(), bytes);
            assert_eq!(Asked::parse(bytes), Some(asked));
        }
    }

    #[test]
    fn r116_a_path_that_is_not_plain_is_none() {
        for path in [
            "/srv/../etc",
            "..",
            "../x",
            "/srv//a",
            "/srv/",
            "a/",
            "./a",
            "/.",
            "//",
            "a\0b",
            "/\0",
        ] {
            assert_eq!(asked(What::Read, path, 0).encode(), None, "{path:?}");
        }
        // A directory that is not one of the path's, and one that only begins like one.
        for (path, under) in [("/srv/a", 3), ("/srv/a", 5), ("/srv", 9), ("a/b", 1)] {
            assert_eq!(
                asked(What::Read, path, under).encode(),
                None,
                "{path} {under}"
            );
        }
        assert_eq!(
            asked(What::Read, &"x".repeat(PATH_MAX + 1), 0).encode(),
            None
        );
        for bytes in [
            &b""[..],
            b"\x02\x01\x03\x00\x00ops/a",
            b"\x01\x08\x03\x00\x00ops/a",
            b"\x01\x01\x00\x00\x00/a",
            b"\x01\x01\x09\x00\x00ops/a",
            b"\x01\x01\x03\x00\x00op\xff/a",
            b"\x01\x01\x03\x00\x00ops/a/../b",
        ] {
            assert_eq!(Asked::parse(bytes), None, "{bytes:?}");
        }
    }
}
