//! What is kept of VMs' enrolments: generations and keys, ids, trust documents.

use adit_names::VmId;
use adit_tasks::wire::HostGiven;

use super::store::enrolments::Seen;
use super::store::trust::{Document, Row};
use super::store::{enrolments, identities, trust};
use super::{Desk, DeskError};

/// Trust documents that are kept for all VMs, and for each.
pub const DOCUMENTS_MAX: usize = 32;

/// What a guest's id says of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Whose {
    /// It has none yet.
    New,
    /// It is this VM's.
    Own,
    /// It is not known here and is of this host, whose database has forgotten it.
    Forgotten,
    /// It was given to this VM.
    Vm(String),
    /// Another host has given it.
    OtherHost,
}

impl Desk {
    /// A guest has shown a card of this generation that is believed (0: none), and said its key. Returns what is known of
    /// the VM now. A higher generation begins anew with the key.
    ///
    /// # Errors
    /// The database fails.
    pub async fn enrol(
        &self,
        vm: &VmId,
        generation: u64,
        guest_pk: Option<[u8; 32]>,
    ) -> Result<Seen, DeskError> {
        let vm = vm.clone();
        self.db
            .run(move |c| {
                let before = enrolments::seen(c, vm.as_str())?;
                let first = match generation > before.generation {
                    true => guest_pk,
                    false => before.guest_pk.or(guest_pk),
                };
                let now = Seen {
                    generation: generation.max(before.generation),
                    guest_pk: first,
                };
                if now != before {
                    enrolments::put(c, vm.as_str(), &now)?;
                }
                Ok(now)
            })
            .await
    }

    /// A guest has said which id it has. Returns whose that is; unless it is this VM's, the guest has `new` from now on, which is
    /// on disk. One that this host gave and has forgotten stays.
    ///
    /// # Errors
    /// The database fails.
    pub async fn identify(
        &self,
        vm: &VmId,
        said: Option<HostGiven>,
        new: HostGiven,
    ) -> Result<Whose, DeskError> {
        let (vm, now_ms) = (vm.clone(), self.now_ms());
        self.db
            .run(move |c| {
                let owner = match said {
                    Some(id) if id.host == new.host => Some(identities::owner(c, id.guest)?),
                    Some(_) => None,
                    None => {
                        identities::put(c, vm.as_str(), new.guest, now_ms)?;
                        return Ok(Whose::New);
                    }
                };
                let whose = match owner {
                    Some(Some(owner)) if owner == vm.as_str() => return Ok(Whose::Own),
                    Some(Some(owner)) => Whose::Vm(owner),
                    Some(None) => Whose::Forgotten,
                    None => Whose::OtherHost,
                };
                let id = match (&whose, said) {
                    (Whose::Forgotten, Some(id)) => id.guest,
                    _ => new.guest,
                };
                identities::put(c, vm.as_str(), id, now_ms)?;
                Ok(whose)
            })
            .await
    }

    /// Keeps a trust document for these VMs (none: for all, also those that come). Again with the same bytes it changes nothing.
    ///
    /// # Errors
    /// A newer one of its signer, or another one of the same sequence, is kept; there are too many; the database fails.
    pub async fn keep_trust(&self, document: Document, vms: Vec<VmId>) -> Result<(), DeskError> {
        let now_ms = self.now_ms();
        self.db
            .run(move |c| {
                let mut names: Vec<&str> = vms.iter().map(VmId::as_str).collect();
                if names.is_empty() {
                    names.push("");
                }
                for vm in names {
                    let sequence = document.sequence;
                    match trust::get(c, vm, document.signer, document.own)? {
                        Some((kept, _)) if sequence < kept => {
                            return Err(DeskError::TrustOld { sequence, kept });
                        }
                        Some((kept, bytes)) if sequence == kept => {
                            if bytes != document.envelope {
                                return Err(DeskError::TrustTaken { sequence });
                            }
                            continue;
                        }
                        None if trust::count(c, vm)? >= DOCUMENTS_MAX => {
                            return Err(DeskError::TrustFull);
                        }
                        _ => trust::put(c, vm, &document, now_ms)?,
                    }
                }
                Ok(())
            })
            .await
    }

    /// The trust documents that a VM is to be given.
    ///
    /// # Errors
    /// The database fails.
    pub async fn trust_of(&self, vm: &VmId) -> Result<Vec<Document>, DeskError> {
        let vm = vm.clone();
        self.db
            .run(move |c| Ok(trust::of_vm(c, vm.as_str())?))
            .await
    }

    /// Where trust documents are kept.
    ///
    /// # Errors
    /// The database fails.
    pub async fn trusts(&self) -> Result<Vec<Row>, DeskError> {
        self.db.run(|c| Ok(trust::all(c)?)).await
    }

    /// Keeps no trust document of a signer any more, for one VM or at all. Guests that have one keep it.
    ///
    /// # Errors
    /// There is none, or the database fails.
    pub async fn forget_trust(&self, signer: [u8; 16], vm: Option<VmId>) -> Result<(), DeskError> {
        self.db
            .run(move |c| {
                let vm = vm.as_ref().map(VmId::as_str);
                match trust::forget(c, signer, vm)? {
                    0 => Err(DeskError::UnknownTrust),
                    _ => Ok(()),
                }
            })
            .await
    }
}
