//! A guest whose disk is a copy of another's enrols anew: it makes a key of its own, and the other one's is set aside. That it is one
//! is seen here by another name or another machine (`kept`), or by the host, which gives each guest an id when it
//! first sees it, and finds that this one has another guest's.
//!
//! The host is not trusted with more than that. Whatever it says of the id, the journal stays: a goal that ran in the original
//! does not run in the copy, and no host can make a guest forget what has run. What a host that lies can do is to have the guest
//! make a key; a guest whose card names the old one then runs nothing until it gets another card.

use std::fmt::Display;

use adit_tasks::wire;

use super::kept::{self, Kept};
use super::key::GuestKey;
use super::{Enrolment, Fault, of_state_dir};
use crate::config::Config;
use crate::log;

impl Enrolment {
    /// The id that a host has given this guest.
    pub fn id(&self) -> Option<wire::HostGiven> {
        self.kept.as_ref()?.id
    }

    /// The host has said which id this guest has from now on. One that had another is a copy.
    ///
    /// # Errors
    /// It cannot be kept.
    pub fn identified(&mut self, config: &Config, said: &wire::Identified) -> Result<(), Fault> {
        let Some(mut kept) = self.kept.clone() else {
            return Ok(());
        };
        if kept.id == Some(said.id) {
            return Ok(());
        }
        if kept.id.is_some() {
            let why = match said.copy_of.as_str() {
                "" => "the host gave it another id".into(),
                of => format!("the host has its id from {of}"),
            };
            self.begin_anew(config, &why)?;
        }
        kept.id = Some(said.id);
        self.write(config, kept)
    }

    /// Makes a key of its own.
    pub(super) fn begin_anew(&mut self, config: &Config, why: &dyn Display) -> Result<(), Fault> {
        // It is the other one's.
        self.key = None;
        let made = GuestKey::anew(&config.state_dir).map_err(|e| {
            let remedy = "make it writable, and restart the agent";
            of_state_dir(config, "no-guest-key", &e, remedy)
        });
        self.key = Some(made?);
        let does = "it is a copy of that one's disk, and has a new key";
        log::event("enrolled-anew", &[("why", &why), ("do", &does)]);
        Ok(())
    }

    pub(super) fn write(&mut self, config: &Config, kept: Kept) -> Result<(), Fault> {
        let written = kept::write(&config.state_dir, &kept);
        // It counts also where it is not on disk: else the host would not be asked again whose copy this is.
        self.kept = Some(kept);
        let code = "enrolment-not-kept";
        self.faults.retain(|fault| fault.code != code);
        written.map_err(|e| {
            let remedy = "make it writable: after a restart an older card would be believed";
            of_state_dir(config, code, &e, remedy)
        })
    }
}
