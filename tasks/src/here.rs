//! What is asked alike of cards and of trust documents: both say something of guests, and may bring anchors.

use adit_names::VmId;
use jiff::Timestamp;

use crate::anchor::{Anchor, Roles};

/// Where one is checked.
#[derive(Clone, Copy, Debug)]
pub struct Here<'a> {
    /// Who the guest is, if that is known without what is checked; none: nobody.
    pub vm_id: Option<&'a VmId>,
    /// Unix ms.
    pub now_ms: i64,
}

impl Here<'_> {
    /// Whether this time is over.
    pub(crate) fn is_after(&self, not_after: Timestamp) -> bool {
        self.now_ms > not_after.as_millisecond()
    }
}

/// The roles of an anchor that may more than its signer; none: there is no such one.
pub(crate) fn wider(anchors: &[Anchor], signer: Roles) -> Option<Roles> {
    let wide = anchors.iter().find(|a| !a.roles.within(signer));
    wide.map(|a| a.roles)
}

/// A clock, for people.
pub(crate) fn shown(now_ms: i64) -> String {
    match Timestamp::from_millisecond(now_ms) {
        Ok(now) => now.to_string(),
        Err(_) => format!("{now_ms} ms off 1970"),
    }
}
