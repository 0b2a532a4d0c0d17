//! What a guest has taken of trust documents, and what that makes of the keys that its image and its card trust.
//!
//! - A revoked key is out for good, whoever names it, and what it had brought goes with it.
//! - The anchors of a document count while its signer is trusted. Where a signer revokes the one who brought it, its trust would
//!   end with that: its document *stands* by itself then, if it names its signer among its anchors. No other does.
//! - A sequence never goes back. The documents of a revoked signer need not be remembered: none of it is taken again.

use std::collections::{BTreeMap, BTreeSet};

use adit_names::VmId;
use serde::{Deserialize, Serialize};

use super::{Proved, TrustError};
use crate::anchor::{Anchor, Role, TrustStore};
use crate::key::KeyId;

/// Most signers whose documents are kept, those for all guests and those for one VM counted apart.
pub const DOCUMENTS_MAX: usize = 64;
/// Most revoked keys that are kept.
pub const REVOKED_MAX: usize = 512;

/// What was taken.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Held {
    documents: Vec<Taken>,
    /// Each with who revoked it.
    revoked: BTreeMap<KeyId, KeyId>,
}

/// A document that was taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Taken {
    /// Who signed it.
    pub signer: KeyId,
    /// The VM that it is for; none: every guest.
    pub vm_id: Option<VmId>,
    /// Which.
    pub sequence: u64,
    /// sha256 of its payload.
    pub digest: [u8; 32],
    anchors: Vec<Anchor>,
    /// Its anchors count although nobody else brings its signer.
    stands: bool,
}

impl Held {
    /// The documents, in the order in which their signers' first ones came.
    pub fn documents(&self) -> &[Taken] {
        &self.documents
    }

    /// The revoked keys, each with who revoked it.
    pub fn revoked(&self) -> impl Iterator<Item = (&KeyId, &KeyId)> {
        self.revoked.iter()
    }

    /// What is trusted where an image and its card trust these keys, by a guest that is this VM (none: nobody). Anchors for which
    /// there is no room are left out: an image may have got more keys since the documents were taken.
    pub fn applied_to(&self, keys: &TrustStore, me: Option<&VmId>) -> TrustStore {
        self.apply(keys, me).0
    }

    /// The same, and which anchors were left out.
    fn apply(&self, keys: &TrustStore, me: Option<&VmId>) -> (TrustStore, BTreeSet<KeyId>) {
        let (mut trust, mut left_out) = (keys.clone(), BTreeSet::new());
        for id in self.revoked.keys() {
            trust.revoke(*id);
        }
        let mine = |taken: &&Taken| taken.vm_id.is_none() || taken.vm_id.as_ref() == me;
        let documents: Vec<&Taken> = self.documents.iter().filter(mine).collect();
        // Each signer may have been brought by another: until nothing is added any more, which takes a round a document at most.
        for _ in 0..=documents.len() {
            for taken in &documents {
                let signer = trust.get(&taken.signer).map(|anchor| anchor.roles);
                let signer = signer.filter(|roles| roles.has(Role::Card));
                let counts =
                    |a: &&Anchor| taken.stands || signer.is_some_and(|s| a.roles.within(s));
                for anchor in taken.anchors.iter().filter(counts) {
                    // Nothing is removed below, so where there is no room there is none later.
                    if trust.add(anchor.clone()).is_err() {
                        left_out.insert(anchor.key.id());
                    }
                }
            }
        }
        (trust, left_out)
    }

    /// Takes a document that was [`check`](super::check)ed, by a guest whose image and card trust these keys. Returns whether
    /// that changed anything: the same document again does not.
    ///
    /// # Errors
    /// It is older than one that was taken, or another one of the same sequence; it leaves no key for cards; there is no room.
    /// Nothing was changed.
    pub fn take(
        &mut self,
        proved: Proved,
        keys: &TrustStore,
        me: Option<&VmId>,
    ) -> Result<bool, TrustError> {
        let Proved {
            document,
            key: signer,
            digest,
        } = proved;
        let is_its = |t: &Taken| t.signer == signer && t.vm_id == document.vm_id;
        let (sequence, at) = (document.sequence, self.documents.iter().position(is_its));
        match at.map(|at| &self.documents[at]) {
            Some(taken) if sequence < taken.sequence => {
                let held = taken.sequence;
                return Err(TrustError::Old { sequence, held });
            }
            Some(taken) if sequence == taken.sequence => {
                return match taken.digest == digest {
                    true => Ok(false),
                    false => Err(TrustError::Changed { sequence }),
                };
            }
            _ => {}
        }
        let stood = at.is_some_and(|at| self.documents[at].stands);
        let mut next = self.clone();
        let names_itself = document.anchors.iter().any(|a| a.key.id() == signer);
        let taken = Taken {
            signer,
            vm_id: document.vm_id,
            sequence,
            digest,
            anchors: document.anchors,
            stands: stood && names_itself,
        };
        match at {
            Some(at) => next.documents[at] = taken,
            None => next.documents.push(taken),
        }
        for id in document.revoked {
            next.revoked.entry(id).or_insert(signer);
        }
        let Self { documents, revoked } = &mut next;
        documents.retain(|t| !revoked.contains_key(&t.signer));
        // Whoever brought the signer is out now: what it says of itself carries it on.
        let is_left = next.applied_to(keys, me).get(&signer).is_some();
        if names_itself && !is_left {
            let of_it = next
                .documents
                .iter_mut()
                .find(|t| t.signer == signer && t.digest == digest);
            of_it.into_iter().for_each(|t| t.stands = true);
        }
        if next.documents.len() > DOCUMENTS_MAX || next.revoked.len() > REVOKED_MAX {
            return Err(TrustError::Full);
        }
        let (trust, left_out) = next.apply(keys, me);
        if trust.count(Role::Card) == 0 && !document.leaves_no_card_key {
            return Err(TrustError::NoCardKey);
        }
        let of_it = next
            .documents
            .iter()
            .find(|t| t.signer == signer && t.digest == digest);
        let mut brought = of_it.into_iter().flat_map(|t| &t.anchors);
        let fits = !brought.any(|a| left_out.contains(&a.key.id()));
        // Its anchors come before those of later signers, which must not lose their place to them.
        if !fits || !left_out.is_subset(&self.apply(keys, me).1) {
            return Err(TrustError::Full);
        }
        *self = next;
        Ok(true)
    }
}

/// As it is on disk: texts, so that somebody can read it.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    version: u64,
    documents: Vec<WrittenDocument>,
    revoked: BTreeMap<String, String>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenDocument {
    signer: String,
    vm_id: Option<VmId>,
    sequence: u64,
    digest: String,
    anchors: Vec<String>,
    stands: bool,
}

/// Version of what is on disk.
const VERSION: u64 = 1;

impl Held {
    /// The text that [`parse`](Self::parse) reads.
    pub fn text(&self) -> Vec<u8> {
        let document = |t: &Taken| WrittenDocument {
            signer: t.signer.to_string(),
            vm_id: t.vm_id.clone(),
            sequence: t.sequence,
            digest: crate::hex(&t.digest),
            anchors: t.anchors.iter().map(ToString::to_string).collect(),
            stands: t.stands,
        };
        let revoked = self.revoked.iter();
        let written = Written {
            version: VERSION,
            documents: self.documents.iter().map(document).collect(),
            revoked: revoked
                .map(|(id, by)| (id.to_string(), by.to_string()))
                .collect(),
        };
        // Texts, numbers, lists and a map with texts as keys always serialise.
        serde_json::to_vec(&written).unwrap_or_default()
    }

    /// Reads what [`text`](Self::text) has written.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(text: &[u8]) -> Result<Self, String> {
        let written: Written = serde_json::from_slice(text).map_err(|e| e.to_string())?;
        if written.version != VERSION {
            let found = written.version;
            return Err(format!(
                "it has version {found}, and this agent knows {VERSION} only"
            ));
        }
        if written.documents.len() > DOCUMENTS_MAX || written.revoked.len() > REVOKED_MAX {
            return Err("it has more than an agent keeps".into());
        }
        let id = |text: &str| text.parse::<KeyId>().map_err(|e| e.to_string());
        let document = |t: WrittenDocument| {
            let anchors = t.anchors.iter().map(|line| Anchor::parse(line));
            let anchors = anchors.collect::<Result<_, _>>();
            Ok::<_, String>(Taken {
                signer: id(&t.signer)?,
                vm_id: t.vm_id,
                sequence: t.sequence,
                digest: crate::unhex(&t.digest).ok_or("a digest is none")?,
                anchors: anchors.map_err(|e| e.to_string())?,
                stands: t.stands,
            })
        };
        let revoked = written.revoked.iter();
        Ok(Self {
            documents: written
                .documents
                .into_iter()
                .map(document)
                .collect::<Result<_, _>>()?,
            revoked: revoked
                .map(|(key, by)| Ok::<_, String>((id(key)?, id(by)?)))
                .collect::<Result<_, _>>()?,
        })
    }
}
