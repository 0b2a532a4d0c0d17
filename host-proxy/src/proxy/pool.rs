//! Connections to guests' servers that wait for the next request: a dial costs several round trips through the guest.
//!
//! - A connection is used again only for the VM and target that it was made for, over the same port process and the same
//!   session of the guest's driver, and by whoever has the same limit of bytes.
//! - Only a request that may be made twice gets one: the server may be closing it at this moment, and then the request is
//!   made once more over a new connection (`absolute`).
//! - A connection that waits is no request under way: it has no share of the proxy. How many wait is bounded for each VM and
//!   in all; the newest is used first, and the oldest is closed first.
//! - One that ends, and waits for its server to end it too, has the same bounds, and is closed in the same way.
//! - It is closed after `IDLE_LIMIT`, when its VM is removed, when descriptors are short, and whenever the guest closes it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use adit_names::VmId;
use adit_port::control::{Limit, Target};
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::guest::Guest;
use crate::link::Link;
use crate::vm::VmEntry;

/// How long a connection waits. Less than the 5 s after which common servers (Apache, Node.js) close theirs.
pub(super) const IDLE_LIMIT: Duration = Duration::from_secs(4);
/// Connections to one VM that wait at most.
const OF_A_VM_MAX: usize = 16;
/// Connections that wait at most, however many requests there may be.
const IN_ALL_MAX: usize = 256;
/// One connection may wait for so many requests that the proxy has room for: each takes a descriptor.
const REQUESTS_FOR_EACH: usize = 4;

/// The connections that wait, of all VMs.
pub struct Pool {
    table: Mutex<Table<Route, Guest>>,
    /// Those that have ended their sending, until their servers end theirs.
    ending: Mutex<Table<VmId, DropGuard>>,
    next_id: AtomicU64,
}

/// Where a connection leads, and by way of whom.
#[derive(Clone, Debug)]
pub(super) struct Route {
    vm: VmId,
    target: Target,
    link: Weak<Link>,
    epoch: u64,
    /// Those who use it have one rate together, or none.
    limits: Vec<Limit>,
}

impl Route {
    /// The way to a target as it is now; none while the guest has no session, in which a dial says why.
    pub(super) fn new(
        vm: &VmEntry,
        target: &Target,
        link: &Arc<Link>,
        limits: &[Limit],
    ) -> Option<Self> {
        let status = link.status().filter(|status| status.session)?;
        Some(Self {
            vm: vm.name.clone(),
            target: target.clone(),
            link: Arc::downgrade(link),
            epoch: status.epoch,
            limits: limits.to_vec(),
        })
    }
}

impl PartialEq for Route {
    fn eq(&self, other: &Self) -> bool {
        self.vm == other.vm
            && self.target == other.target
            && self.epoch == other.epoch
            && self.limits == other.limits
            && Weak::ptr_eq(&self.link, &other.link)
    }
}

impl Keyed for VmId {
    type Owner = Self;

    fn owner(&self) -> &Self {
        self
    }
}

impl Keyed for Route {
    type Owner = VmId;

    fn owner(&self) -> &VmId {
        &self.vm
    }
}

impl Pool {
    /// An empty one, in a proxy that has room for so many requests.
    pub fn new(requests: usize) -> Arc<Self> {
        let max = (requests / REQUESTS_FOR_EACH).min(IN_ALL_MAX);
        Arc::new(Self {
            table: Mutex::new(Table::new(max)),
            ending: Mutex::new(Table::new(max)),
            next_id: AtomicU64::new(0),
        })
    }

    /// A number for a new connection.
    pub(super) fn next_id(&self) -> u64 {
        self.next_id.fetch_add(1, Ordering::Relaxed)
    }

    /// A connection that leads there.
    pub(super) fn take(&self, route: &Route) -> Option<Guest> {
        self.table().take(route, Guest::is_ready)
    }

    /// Lets a connection wait.
    pub(super) fn put(&self, id: u64, route: Route, guest: Guest) {
        self.table().put(id, route, guest, Instant::now());
    }

    /// Closes a connection if it has waited for long. Returns when to look again.
    pub(super) fn expire(&self, id: u64) -> Instant {
        self.table().expire(id, Instant::now())
    }

    /// Closes a connection if it waits.
    pub(super) fn forget(&self, id: u64) {
        self.table().forget(id);
    }

    /// Closes all that wait: descriptors are short.
    pub fn clear(&self) {
        self.table().idle.clear();
        self.ending().idle.clear();
    }

    /// Waits for the end of a connection to this VM, unless others need its descriptor.
    pub(super) async fn end(&self, id: u64, vm: VmId, ended: impl Future<Output = ()>) {
        let cut = CancellationToken::new();
        let guard = cut.clone().drop_guard();
        self.ending().put(id, vm, guard, Instant::now());
        tokio::select! {
            () = ended => {}
            () = cut.cancelled() => {}
        }
        self.ending().forget(id);
    }

    fn ending(&self) -> MutexGuard<'_, Table<VmId, DropGuard>> {
        self.ending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn table(&self) -> MutexGuard<'_, Table<Route, Guest>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What belongs to somebody who has a bound of their own.
trait Keyed: PartialEq {
    type Owner: PartialEq;
    fn owner(&self) -> &Self::Owner;
}

/// What waits, the oldest first. No clock and no socket: a connection that is dropped closes.
struct Table<K, C> {
    idle: Vec<Idle<K, C>>,
    max: usize,
}

struct Idle<K, C> {
    id: u64,
    key: K,
    conn: C,
    since: Instant,
}

impl<K: Keyed, C> Table<K, C> {
    fn new(max: usize) -> Self {
        Self {
            idle: Vec::new(),
            max,
        }
    }

    fn take(&mut self, key: &K, usable: impl Fn(&C) -> bool) -> Option<C> {
        let found = |idle: &Idle<K, C>| idle.key == *key && usable(&idle.conn);
        let at = self.idle.iter().rposition(found)?;
        Some(self.idle.remove(at).conn)
    }

    fn put(&mut self, id: u64, key: K, conn: C, now: Instant) {
        let of_owner = |idle: &Idle<K, C>| idle.key.owner() == key.owner();
        if self.idle.iter().filter(|idle| of_owner(idle)).count() >= OF_A_VM_MAX
            && let Some(oldest) = self.idle.iter().position(of_owner)
        {
            self.idle.remove(oldest);
        }
        if self.idle.len() >= self.max {
            if self.max == 0 {
                return;
            }
            self.idle.remove(0);
        }
        let since = now;
        self.idle.push(Idle {
            id,
            key,
            conn,
            since,
        });
    }

    fn expire(&mut self, id: u64, now: Instant) -> Instant {
        let waits = self.idle.iter().find(|idle| idle.id == id);
        match waits.map(|idle| idle.since + IDLE_LIMIT) {
            Some(end) if end > now => return end,
            Some(_) => self.forget(id),
            // It is in use.
            None => {}
        }
        now + IDLE_LIMIT
    }

    fn forget(&mut self, id: u64) {
        self.idle.retain(|idle| idle.id != id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Owner and session.
    type Key = (char, u32);

    impl Keyed for Key {
        type Owner = char;

        fn owner(&self) -> &char {
            &self.0
        }
    }

    fn table(max: usize, keys: &[Key]) -> Table<Key, usize> {
        let mut table = Table::new(max);
        let now = Instant::now();
        for (n, key) in keys.iter().enumerate() {
            table.put(n as u64, *key, n, now);
        }
        table
    }

    #[test]
    fn the_newest_usable_connection_of_the_same_route_is_taken() {
        let mut t = table(9, &[('a', 1), ('a', 1), ('b', 1), ('a', 2), ('a', 1)]);
        assert_eq!(t.take(&('a', 1), |conn| *conn != 4), Some(1));
        assert_eq!(t.take(&('a', 1), |_| true), Some(4));
        assert_eq!(t.take(&('a', 1), |_| true), Some(0));
        assert_eq!(t.take(&('a', 1), |_| true), None);
        assert_eq!(t.take(&('b', 2), |_| true), None);
        assert_eq!(t.take(&('b', 1), |_| true), Some(2));
    }

    #[test]
    fn an_owner_has_its_bound_and_the_oldest_makes_room() {
        let mut keys = vec![('b', 1)];
        keys.extend([('a', 1); OF_A_VM_MAX + 2]);
        let t = table(9 * OF_A_VM_MAX, &keys);
        assert_eq!(t.idle.len(), OF_A_VM_MAX + 1);
        assert_eq!((t.idle[0].conn, t.idle[1].conn), (0, 3));
    }

    #[test]
    fn all_together_have_a_bound_and_the_oldest_makes_room() {
        let t = table(2, &[('a', 1), ('b', 1), ('c', 1)]);
        assert_eq!(t.idle.iter().map(|i| i.conn).collect::<Vec<_>>(), [1, 2]);
        assert!(table(0, &[('a', 1)]).idle.is_empty());
    }

    #[test]
    fn one_that_waited_for_long_is_closed_and_one_in_use_is_looked_at_again() {
        let mut t = table(9, &[('a', 1), ('a', 1)]);
        let since = t.idle[0].since;
        let soon = since + IDLE_LIMIT / 2;
        assert_eq!(t.expire(0, soon), since + IDLE_LIMIT);
        assert_eq!(t.idle.len(), 2);
        t.expire(0, since + IDLE_LIMIT);
        assert_eq!(t.idle.iter().map(|i| i.id).collect::<Vec<_>>(), [1]);
        assert_eq!(t.expire(7, soon), soon + IDLE_LIMIT);
        t.forget(1);
        assert!(t.idle.is_empty());
    }
}
