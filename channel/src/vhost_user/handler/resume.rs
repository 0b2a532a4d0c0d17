//! The state that a handler passes to its successor, and how the successor continues.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::Ordering;

use adit_passed::Passed;
use vhost::vhost_user::{Error, Result};
use vm_memory::{Bytes, GuestAddress};

use super::{Handler, QUEUES, Vring, refused};
use crate::vhost_user::handover::{Handover, HandoverError, Parts, Record, Region, VringRecord};
use crate::vhost_user::memory::{self, MemTable};

impl Handler {
    /// Everything that the frontend has configured, with duplicates of its descriptors.
    pub(in crate::vhost_user) fn handover(
        &self,
        changes: u64,
        frontend: BorrowedFd<'_>,
    ) -> std::result::Result<Handover, HandoverError> {
        let mut fds = vec![frontend.try_clone_to_owned()?];
        let mut regions = Vec::new();
        for (region, file) in self.table.iter().flat_map(MemTable::regions) {
            regions.push(region);
            fds.push(file.try_clone_to_owned()?);
        }
        let mut vrings = [VringRecord::default(); QUEUES];
        for (record, vring) in vrings.iter_mut().zip(&self.vrings) {
            *record = VringRecord {
                size: vring.size,
                base: vring.base,
                lag: vring.lag,
                addrs: vring.addrs,
                kick: vring.kick.is_some(),
                call: vring.call.is_some(),
                enabled: vring.enabled,
            };
            for fd in [&vring.kick, &vring.call].into_iter().flatten() {
                fds.push(fd.try_clone()?);
            }
        }
        let record = Record {
            changes,
            features: self.features,
            protocol_features: self.protocol_features,
            regions,
            vrings,
            running: self.running,
        };
        Handover::new(&record, fds)
    }

    /// Continues from the state of another process. The features have been set again already. If a session was
    /// running, it begins again.
    pub(in crate::vhost_user) fn resume(&mut self, parts: Parts) -> Result<()> {
        let record = parts.record;
        if !record.regions.is_empty() {
            let regions: Vec<_> = record.regions.iter().map(Region::as_message).collect();
            let files = memory::take(parts.memory, self.policy).map_err(refused)?;
            let table = MemTable::map(&regions, files, self.policy).map_err(refused)?;
            self.table = Some(table);
        }
        for ((vring, was), fds) in self.vrings.iter_mut().zip(record.vrings).zip(parts.vrings) {
            let good = was.size == 0
                || was.size.is_power_of_two() && was.size <= self.queue_max && was.size > 0;
            if !good {
                return Err(refused(format!("vring of size {}", was.size)));
            }
            *vring = Vring {
                size: was.size,
                base: was.base,
                addrs: was.addrs,
                lag: was.lag,
                kick: doorbell(fds.kick)?,
                call: doorbell(fds.call)?,
                enabled: was.enabled,
            };
        }
        self.may_be_repeated = true;
        if !record.running {
            return Ok(());
        }
        self.settle()?;
        match self.running {
            true => Ok(()),
            false => Err(refused(
                "the vrings were running, but the record is incomplete",
            )),
        }
    }
}

fn doorbell(fd: Option<Passed>) -> Result<Option<OwnedFd>> {
    let doorbell = fd.map(Passed::eventfd).transpose();
    doorbell.map_err(Error::ReqHandlerError)
}

/// The used index of a virtqueue in guest memory.
pub(super) fn used_index(used_ring: u64, table: &MemTable) -> Result<u16> {
    let at = used_ring
        .checked_add(2)
        .ok_or_else(|| refused("the address of the used ring wraps"))?;
    table
        .memory()
        .load(GuestAddress(at), Ordering::Acquire)
        .map(u16::from_le)
        .map_err(|e| refused(e.to_string()))
}
