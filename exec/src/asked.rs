//! What a hello of the service `exec` says beside its name: as whom, and what.
//!
//! | off | size | field |
//! |---|---|---|
//! | 0 | 1 | version, 1 |
//! | 1 | 1 | what: 1 run, 2 attach, 3 list, 4 end, 5 what a ticket says, 6 shell |
//! | 2 | 1 | length of the user's name, 0: any user, which run and shell do not take |
//! | 3 | 1 | signal of 4; 0: end it with all that it has started |
//! | 4 | .. | the user's name, then the program (run), the session's id (attach, end), or what the client says of its ticket |
//!
//! aditd writes it, of what it has let through. So the guest takes the user from here, and the program that it starts is this one. Where
//! there is a ticket, the guest takes both from that, and refuses it if they are not these.

/// Most bytes of a user's name.
pub const USER_MAX: usize = 64;
/// Most bytes of a program's name, as the client gives it.
pub const WHAT_MAX: usize = 400;
const VERSION: u8 = 1;
const HEAD_LEN: usize = 4;

/// The arguments of a hello.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Asked {
    /// As whom; none: whoever the session is of.
    pub user: Option<String>,
    /// What.
    pub what: What,
}

/// What is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum What {
    /// A command whose first element is this.
    Run(String),
    /// The user's login shell, which the guest knows.
    Shell,
    /// The session of this id.
    Attach(String),
    /// All sessions.
    List,
    /// The end of a session, or a signal to it.
    End {
        /// Its id.
        id: String,
        /// Number of the signal; 0: it is ended with all that it has started.
        signal: u8,
    },
    /// What a ticket says that comes on the sealed stream: this is for whoever writes it down, and decides nothing.
    Ticket(String),
}

impl Asked {
    /// As the arguments of a hello; none: a text is too long, or a command has no user.
    pub fn encode(&self) -> Option<Vec<u8>> {
        let user = self.user.as_deref().unwrap_or_default();
        let (kind, signal, what) = match &self.what {
            What::Run(program) if user.is_empty() || program.is_empty() => return None,
            What::Shell if user.is_empty() => return None,
            What::Run(program) => (1, 0, program.as_str()),
            What::Attach(id) => (2, 0, id.as_str()),
            What::List => (3, 0, ""),
            What::End { id, signal } => (4, *signal, id.as_str()),
            What::Ticket(of) => (5, 0, of.as_str()),
            What::Shell => (6, 0, ""),
        };
        if user.len() > USER_MAX || what.len() > WHAT_MAX {
            return None;
        }
        let mut bytes = vec![VERSION, kind, u8::try_from(user.len()).ok()?, signal];
        bytes.extend(user.as_bytes());
        bytes.extend(what.as_bytes());
        Some(bytes)
    }

    /// Reads the arguments of a hello; none if they are not these.
    pub fn parse(arguments: &[u8]) -> Option<Self> {
        let (head, rest) = arguments.split_first_chunk::<HEAD_LEN>()?;
        let [VERSION, kind, user, signal] = *head else {
            return None;
        };
        let (user, what) = rest.split_at_checked(user.into())?;
        let (user, what) = (std::str::from_utf8(user), std::str::from_utf8(what));
        let (user, what) = (user.ok()?.to_owned(), what.ok()?.to_owned());
        let asked = Self {
            user: (!user.is_empty()).then_some(user),
            what: match (kind, signal) {
                (1, 0) => What::Run(what),
                (2, 0) => What::Attach(what),
                (3, 0) if what.is_empty() => What::List,
                (4, signal) => What::End { id: what, signal },
                (5, 0) => What::Ticket(what),
                (6, 0) if what.is_empty() => What::Shell,
                _ => return None,
            },
        };
        // One spelling, and its limits.
        (asked.encode()? == arguments).then_some(asked)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(user: Option<&str>, what: What) -> Asked {
        let user = user.map(str::to_owned);
        Asked { user, what }
    }

    #[test]
    fn arguments_have_golden_bytes() {
        for (asked, bytes) in [
            (
                asked(Some("root"), What::Run("/bin/ls".into())),
                &b"\x01\x01\x04\x00root/bin/ls"[..],
            ),
            (
                asked(Some("ops"), What::Attach("3fa9".into())),
                b"\x01\x02\x03\x00ops3fa9",
            ),
            (asked(None, What::List), b"\x01\x03\x00\x00"),
            (asked(Some("ops"), What::Shell), b"\x01\x06\x03\x00ops"),
            (
                asked(
                    None,
                    What::End {
                        id: "3fa9".into(),
                        signal: 15,
                    },
                ),
                b"\x01\x04\x00\x0f3fa9",
            ),
            (
                asked(Some("ops"), What::Ticket("attach 3fa9".into())),
                b"\x01\x05\x03\x00opsattach 3fa9",
            ),
        ] {
            assert_eq!(asked.encode().unwrap(), bytes);
            assert_eq!(Asked::parse(bytes), Some(asked));
        }
    }

    #[test]
    fn what_is_not_said_in_the_one_way_is_refused() {
        for bytes in [
            &b""[..],
            b"\x01\x01\x04",
            // Another version; a kind that there is not; a signal to what takes none.
            b"\x02\x01\x04\x00rootls",
            b"\x01\x07\x04\x00rootls",
            b"\x01\x06\x04\x00rootls",
            b"\x01\x05\x04\x01rootls",
            b"\x01\x01\x04\x09rootls",
            // A command of no user, or none.
            b"\x01\x01\x00\x00ls",
            b"\x01\x01\x04\x00root",
            b"\x01\x06\x00\x00",
            // The user is longer than all there is.
            b"\x01\x01\x09\x00rootls",
            b"\x01\x03\x00\x00x",
            b"\x01\x01\x01\x00\xffls",
        ] {
            assert_eq!(Asked::parse(bytes), None, "{bytes:?}");
        }
        let long = asked(Some(&"u".repeat(USER_MAX + 1)), What::List);
        assert_eq!(long.encode(), None);
        let long = asked(Some("u"), What::Run("x".repeat(WHAT_MAX + 1)));
        assert_eq!(long.encode(), None);
    }
}
