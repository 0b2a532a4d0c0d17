//! Which way to the guest is taken where the configuration leaves it open (`carrier = "auto"`). Pure: what there is goes in, a choice and
//! its reason come out.
//!
//! | order | way | there is one when |
//! |---|---|---|
//! | 1 | ring | both sides use it. Services of the agent only: a ring has no vsock ports |
//! | 2 | vhost-user | a VMM is connected to vhost.sock |
//! | 3 | the host's kernel | a VM has the CID there |
//! | 4 | hybrid | the VMM's socket is there |
//!
//! The first that there is is taken. A way that has open streams is kept, whatever came since, until they have ended.

use std::fmt;

/// A way to the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// A VMM that connects to vhost.sock.
    VhostUser,
    /// AF_VSOCK of the host's kernel.
    Kernel,
    /// A VMM that has a socket for each stream.
    Hybrid,
}

/// In the order in which they are taken.
const ORDER: [Way; 3] = [Way::VhostUser, Way::Kernel, Way::Hybrid];

impl Way {
    /// Its number in a control frame; 0 is none.
    pub fn number(of: Option<Self>) -> u8 {
        match of {
            None => 0,
            Some(Self::VhostUser) => 1,
            Some(Self::Kernel) => 2,
            Some(Self::Hybrid) => 3,
        }
    }

    /// The way with this number. One that this build does not know is none.
    pub fn numbered(number: u8) -> Option<Self> {
        ORDER
            .into_iter()
            .find(|way| Self::number(Some(*way)) == number)
    }
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::VhostUser => "vhost-user",
            Self::Kernel => "the host's kernel",
            Self::Hybrid => "hybrid",
        })
    }
}

/// What there is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// Both sides use a ring.
    pub ring: bool,
    /// A VMM is connected to vhost.sock.
    pub vhost_user: bool,
    /// Why no VM has the CID in the host's kernel; `None`: one has. Empty: nobody looks for it.
    pub kernel: Option<String>,
    /// The same of the VMM's socket.
    pub hybrid: Option<String>,
}

/// What is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Choice {
    /// Services of the agent take the ring.
    pub ring: bool,
    /// What everything else takes. `None`: there is nothing yet.
    pub way: Option<Way>,
}

/// Which of them exist, for the choice alone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct There {
    /// As [`Found::ring`].
    pub ring: bool,
    /// As [`Found::vhost_user`].
    pub vhost_user: bool,
    /// A VM has the CID.
    pub kernel: bool,
    /// The VMM's socket is there.
    pub hybrid: bool,
}

impl There {
    fn has(self, way: Way) -> bool {
        match way {
            Way::VhostUser => self.vhost_user,
            Way::Kernel => self.kernel,
            Way::Hybrid => self.hybrid,
        }
    }
}

/// Chooses. `busy`: the present way, if it has open streams.
pub fn choose(there: There, busy: Option<Way>) -> Choice {
    let first = || ORDER.into_iter().find(|way| there.has(*way));
    Choice {
        ring: there.ring,
        way: busy.or_else(first),
    }
}

impl Found {
    /// Which of them exist.
    pub fn there(&self) -> There {
        There {
            ring: self.ring,
            vhost_user: self.vhost_user,
            kernel: self.kernel.is_none(),
            hybrid: self.hybrid.is_none(),
        }
    }

    /// Says why that was chosen, for people.
    pub fn why(&self, choice: Choice) -> String {
        let mut parts = Vec::new();
        if self.ring {
            parts.push("services of the agent take the ring, the rest does not".to_owned());
        }
        if let Some(way) = choice.way {
            parts.push(match way {
                _ if !self.there().has(way) => "its last streams have not ended".into(),
                Way::VhostUser => "a VMM is connected to vhost.sock".into(),
                Way::Kernel => "a VM has this CID in the host's kernel".into(),
                Way::Hybrid => "the VMM's socket is there".into(),
            });
            let ahead = ORDER.into_iter().take_while(|other| *other != way);
            for other in ahead.clone().filter(|other| self.there().has(*other)) {
                parts.push(format!(
                    "it is kept while it has streams: {other}, which comes first, came later"
                ));
            }
            parts.extend(ahead.filter_map(|other| self.missing(other)));
        } else {
            parts.push("nothing yet".into());
            parts.extend(ORDER.into_iter().filter_map(|way| self.missing(way)));
        }
        parts.join("; ")
    }

    /// Why there is no such way.
    fn missing(&self, way: Way) -> Option<String> {
        match way {
            Way::VhostUser => {
                (!self.vhost_user).then(|| "no VMM is connected to vhost.sock".into())
            }
            Way::Kernel => self.kernel.clone().filter(|why| !why.is_empty()),
            Way::Hybrid => self.hybrid.clone().filter(|why| !why.is_empty()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every combination, by a row: ring, vhost-user, kernel, hybrid, the busy one; what services take, what the rest takes.
    #[test]
    fn the_first_that_there_is_is_taken_and_a_busy_one_is_kept() {
        for bits in 0..16 {
            let there = There {
                ring: bits & 8 != 0,
                vhost_user: bits & 4 != 0,
                kernel: bits & 2 != 0,
                hybrid: bits & 1 != 0,
            };
            let first = match bits & 7 {
                0 => None,
                1 => Some(Way::Hybrid),
                2 | 3 => Some(Way::Kernel),
                _ => Some(Way::VhostUser),
            };
            let ring = bits & 8 != 0;
            assert_eq!(choose(there, None), Choice { ring, way: first });
            for busy in ORDER {
                let way = Some(busy);
                assert_eq!(choose(there, way), Choice { ring, way });
            }
        }
    }

    #[test]
    fn the_reason_names_what_is_there_and_why_what_comes_before_it_is_not() {
        let none = Found {
            kernel: Some("no VM has CID 5".into()),
            hybrid: Some("no v.sock".into()),
            ..Found::default()
        };
        let why = |found: &Found, busy| found.why(choose(found.there(), busy));
        assert_eq!(
            why(&none, None),
            "nothing yet; no VMM is connected to vhost.sock; no VM has CID 5; no v.sock"
        );
        let hybrid = Found {
            hybrid: None,
            ..none.clone()
        };
        assert_eq!(
            why(&hybrid, None),
            "the VMM's socket is there; no VMM is connected to vhost.sock; no VM has CID 5"
        );
        let both = Found {
            vhost_user: true,
            ring: true,
            kernel: None,
            ..none.clone()
        };
        assert_eq!(
            why(&both, None),
            "services of the agent take the ring, the rest does not; a VMM is connected to vhost.sock"
        );
        assert_eq!(
            why(
                &Found {
                    ring: false,
                    ..both
                },
                Some(Way::Kernel)
            ),
            "a VM has this CID in the host's kernel; it is kept while it has streams: vhost-user, which comes first, came later"
        );
        // Nobody looks for it, so nothing is said of it.
        let unlooked = Found {
            kernel: Some(String::new()),
            ..none
        };
        assert!(!unlooked.there().kernel && !why(&unlooked, None).contains(";;"));
    }

    #[test]
    fn numbers_of_the_wire_stay() {
        for (way, number) in [
            (None, 0),
            (Some(Way::VhostUser), 1),
            (Some(Way::Kernel), 2),
            (Some(Way::Hybrid), 3),
        ] {
            assert_eq!((Way::number(way), Way::numbered(number)), (number, way));
        }
        assert_eq!(Way::numbered(9), None);
    }
}
