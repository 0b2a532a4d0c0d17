//! Trust anchors: public keys, each with its roles, and the set of those that a guest or a host trusts.
//!
//! One a line: `roles=card,goal adit-ed25519 BASE64 comment`. A line without `roles=` has the role `goal`, as every line had
//! before there were roles. The roles stand first, so that a reader from before roles takes such a line for no key at all: it
//! trusts the key for less, never for more.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::str::FromStr;

use crate::key::{KeyError, KeyId, PublicKey};

/// Most anchors that a guest has.
pub const ANCHORS_MAX: usize = 64;
const ROLES_TAG: &str = "roles=";

/// What a key is trusted for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Role {
    /// To say who a guest is.
    Card = 1,
    /// To order goals.
    Goal = 2,
    /// To open a shell or run a command at once.
    Exec = 4,
    /// To replace the agent itself.
    Agent = 8,
}

impl Role {
    /// All of them, in the order in which they are written.
    pub const ALL: [Self; 4] = [Self::Card, Self::Goal, Self::Exec, Self::Agent];

    /// As it is written.
    pub fn name(self) -> &'static str {
        match self {
            Self::Card => "card",
            Self::Goal => "goal",
            Self::Exec => "exec",
            Self::Agent => "agent",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Role {
    type Err = AnchorError;

    fn from_str(text: &str) -> Result<Self, AnchorError> {
        let found = Self::ALL.into_iter().find(|role| role.name() == text);
        found.ok_or_else(|| AnchorError::Role(adit_names::escape(text).at_most(32).to_string()))
    }
}

/// Some roles, at least one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Roles(u8);

impl Roles {
    /// Whether this is one of them.
    pub fn has(self, role: Role) -> bool {
        self.0 & role as u8 != 0
    }

    /// Whether all of them are among `others`.
    pub fn within(self, others: Self) -> bool {
        self.0 & !others.0 == 0
    }

    /// These and others.
    pub fn and(self, others: Self) -> Self {
        Self(self.0 | others.0)
    }
}

impl From<Role> for Roles {
    fn from(role: Role) -> Self {
        Self(role as u8)
    }
}

impl fmt::Display for Roles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = Role::ALL.into_iter().filter(|role| self.has(*role));
        f.write_str(&names.map(Role::name).collect::<Vec<_>>().join(","))
    }
}

impl FromStr for Roles {
    type Err = AnchorError;

    fn from_str(text: &str) -> Result<Self, AnchorError> {
        let mut roles = 0;
        for name in text.split(',') {
            let role: Role = name.parse()?;
            if roles & role as u8 != 0 {
                return Err(AnchorError::Twice(role));
            }
            roles |= role as u8;
        }
        Ok(Self(roles))
    }
}

/// Why text is no anchor.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AnchorError {
    /// It has no such key.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// A word that is no role.
    #[error("`{0}` is no role of a key: it could be card, goal, exec or agent")]
    Role(String),
    /// A role that is named twice.
    #[error("the role `{0}` is named twice")]
    Twice(Role),
    /// More anchors than [`ANCHORS_MAX`].
    #[error("{count} trust anchors, at most {ANCHORS_MAX} are allowed")]
    TooMany {
        /// How many were given.
        count: usize,
    },
    /// A line of a trust file is wrong.
    #[error("line {line}: {source}")]
    Line {
        /// From 1.
        line: usize,
        /// What is wrong.
        #[source]
        source: Box<AnchorError>,
    },
}

/// A key, and what it is trusted for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Anchor {
    /// The key.
    pub key: PublicKey,
    /// Its roles.
    pub roles: Roles,
}

impl Anchor {
    /// Parses one line.
    ///
    /// # Errors
    /// It has no key, or a role that is not known.
    pub fn parse(line: &str) -> Result<Self, AnchorError> {
        let line = line.trim();
        let (roles, line) = match line.strip_prefix(ROLES_TAG) {
            Some(rest) => {
                let (roles, line) = rest.split_once(' ').unwrap_or((rest, ""));
                (roles.parse()?, line)
            }
            None => (Role::Goal.into(), line),
        };
        let key = PublicKey::parse(line)?;
        Ok(Self { key, roles })
    }
}

impl From<PublicKey> for Anchor {
    fn from(key: PublicKey) -> Self {
        let roles = Role::Goal.into();
        Self { key, roles }
    }
}

impl fmt::Display for Anchor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Without the word where it can be left out: then a reader from before roles reads it too.
        if self.roles != Role::Goal.into() {
            write!(f, "{ROLES_TAG}{} ", self.roles)?;
        }
        self.key.fmt(f)
    }
}

/// The keys that are trusted, and for what; and those that never are again, whoever names them.
#[derive(Clone, Debug, Default)]
pub struct TrustStore {
    anchors: BTreeMap<KeyId, Anchor>,
    /// As many as [`trust`](crate::trust) keeps.
    revoked: BTreeSet<KeyId>,
}

impl TrustStore {
    /// Adds the anchors of a file: one a line, empty lines and lines with `#` are skipped.
    ///
    /// # Errors
    /// A line is no anchor, or there are too many.
    pub fn add_text(&mut self, text: &str) -> Result<(), AnchorError> {
        for (at, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let anchor = Anchor::parse(line).map_err(|source| AnchorError::Line {
                line: at + 1,
                source: Box::new(source),
            })?;
            self.add(anchor)?;
        }
        Ok(())
    }

    /// Adds an anchor. A key that is there already has the roles of both; one that is revoked is not added.
    ///
    /// # Errors
    /// There are too many; then nothing is added.
    pub fn add(&mut self, anchor: impl Into<Anchor>) -> Result<(), AnchorError> {
        let anchor = anchor.into();
        let id = anchor.key.id();
        if self.is_revoked(&id) {
            return Ok(());
        }
        if let Some(known) = self.anchors.get_mut(&id) {
            known.roles = known.roles.and(anchor.roles);
            return Ok(());
        }
        match self.anchors.len() + 1 {
            count if count > ANCHORS_MAX => return Err(AnchorError::TooMany { count }),
            _ => self.anchors.insert(id, anchor),
        };
        Ok(())
    }

    /// Trusts a key no longer, and not again when it is added again.
    pub fn revoke(&mut self, id: KeyId) {
        self.anchors.remove(&id);
        self.revoked.insert(id);
    }

    /// Whether a key was revoked.
    pub fn is_revoked(&self, id: &KeyId) -> bool {
        self.revoked.contains(id)
    }

    /// True if no key is trusted, and none ever was.
    pub fn knows_nobody(&self) -> bool {
        self.anchors.is_empty() && self.revoked.is_empty()
    }

    /// The anchors, in the order of their keys' ids.
    pub fn anchors(&self) -> impl Iterator<Item = &Anchor> {
        self.anchors.values()
    }

    /// Number of keys.
    pub fn len(&self) -> usize {
        self.anchors.len()
    }

    /// True if no key is trusted.
    pub fn is_empty(&self) -> bool {
        self.anchors.is_empty()
    }

    /// Number of keys that have a role.
    pub fn count(&self, role: Role) -> usize {
        self.anchors().filter(|a| a.roles.has(role)).count()
    }

    /// The anchor of a key.
    pub fn get(&self, id: &KeyId) -> Option<&Anchor> {
        self.anchors.get(id)
    }
}

#[cfg(test)]
mod tests {
    use ed25519_dalek::SigningKey;

    use super::*;

    fn line(seed: u8) -> String {
        PublicKey::of(&SigningKey::from_bytes(&[seed; 32]), "a b").to_string()
    }

    #[test]
    fn an_anchor_has_the_roles_that_stand_before_its_key() {
        for (text, roles) in [
            (line(7), "goal"),
            (format!("roles=card,goal {}", line(7)), "card,goal"),
            (
                format!("  roles=agent,card,exec {} ", line(7)),
                "card,exec,agent",
            ),
        ] {
            let anchor = Anchor::parse(&text).unwrap();
            assert_eq!(anchor.roles.to_string(), roles);
            assert_eq!(anchor.key.comment(), "a b");
            assert_eq!(Anchor::parse(&anchor.to_string()), Ok(anchor));
        }
        // Written as it was before there were roles.
        assert_eq!(
            Anchor::parse(&format!("roles=goal {}", line(7)))
                .unwrap()
                .to_string(),
            line(7)
        );
    }

    #[test]
    fn r102_a_reader_from_before_roles_takes_a_key_with_roles_for_none() {
        let with = Anchor::parse(&format!("roles=card {}", line(7))).unwrap();
        let old = PublicKey::parse(&with.to_string());
        assert!(matches!(old, Err(KeyError::Tag { .. })));
    }

    #[test]
    fn what_is_no_role_is_refused_and_not_left_out() {
        let role = |text: &str| Anchor::parse(&format!("{text} {}", line(7))).unwrap_err();
        assert_eq!(role("roles=goals"), AnchorError::Role("goals".into()));
        assert_eq!(role("roles="), AnchorError::Role(String::new()));
        assert_eq!(role("roles=card,"), AnchorError::Role(String::new()));
        assert_eq!(role("roles=card,card"), AnchorError::Twice(Role::Card));
        assert!(matches!(
            role("Roles=card"),
            AnchorError::Key(KeyError::Tag { .. })
        ));
        assert!(matches!(
            Anchor::parse("roles=card"),
            Err(AnchorError::Key(_))
        ));
    }

    #[test]
    fn a_key_that_is_named_twice_has_the_roles_of_both() {
        let mut store = TrustStore::default();
        store
            .add_text(&format!("{}\nroles=card {}\n", line(7), line(7)))
            .unwrap();
        let roles: Vec<_> = store.anchors().map(|a| a.roles.to_string()).collect();
        assert_eq!(roles, ["card,goal"]);
        assert_eq!([Role::Card, Role::Exec].map(|r| store.count(r)), [1, 0]);
    }

    #[test]
    fn a_revoked_key_is_not_trusted_again_whoever_adds_it() {
        let mut store = TrustStore::default();
        store
            .add_text(&format!("{}\n{}\n", line(7), line(8)))
            .unwrap();
        let id = Anchor::parse(&line(7)).unwrap().key.id();
        store.revoke(id);
        store.add_text(&format!("roles=card {}", line(7))).unwrap();
        assert!(store.get(&id).is_none() && store.is_revoked(&id));
        assert_eq!((store.len(), store.knows_nobody()), (1, false));
    }

    #[test]
    fn a_bad_line_is_named() {
        let mut store = TrustStore::default();
        let e = store.add_text(&format!("# anchors\n\n{}\nssh-ed25519 AAAA\n", line(7)));
        assert!(matches!(e, Err(AnchorError::Line { line: 4, .. })));
        assert_eq!(store.len(), 1);
    }

    #[test]
    fn so_many_anchors_are_taken_and_no_more() {
        let mut store = TrustStore::default();
        let texts: Vec<_> = (0..=ANCHORS_MAX as u8).map(line).collect();
        store.add_text(&texts[1..].join("\n")).unwrap();
        let e = store.add_text(&texts[0]);
        let count = ANCHORS_MAX + 1;
        assert_eq!(e, Err(AnchorError::TooMany { count }));
        assert_eq!(store.len(), ANCHORS_MAX);
        store.add_text(&texts[1]).unwrap();
    }
}
