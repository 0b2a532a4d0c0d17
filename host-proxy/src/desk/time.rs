//! What happens because time passes: tasks end exactly when their goal's time is over, what was held begins, and what ended
//! long ago is forgotten.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

use super::store::{self, retention};
use super::{Desk, DeskError, change};

/// How soon a database that has failed is asked again.
const AGAIN_MS: i64 = 10_000;
/// Each look reads all that is open. After one, the next for a change waits so many times as long as it took, so that many
/// changes in a row do not keep the database at it; ...
const REST: u32 = 9;
/// ... but no longer than this, as what is new may be due.
const REST_MAX: Duration = Duration::from_secs(1);
/// Longest sleep. A clock that is set is noticed within the hour.
const SLEEP_MAX_MS: u64 = 3_600_000;

impl Desk {
    /// Does so until the stop.
    pub async fn keep_time(&self, stop: &CancellationToken) {
        let mut released = self.now_ms();
        while !stop.is_cancelled() {
            let changed = self.bell.timetable.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            let (now, begin) = (self.now_ms(), Instant::now());
            let next = match self.expire(now).await {
                Ok(next) => {
                    self.release(&mut released, now).await;
                    next.into_iter().chain(self.retire(now).await).min()
                }
                Err(e) => {
                    tracing::error!(error = %e, "cannot look for expired tasks");
                    Some(now + AGAIN_MS)
                }
            };
            let due = async {
                match next {
                    Some(at) => {
                        let ms = u64::try_from(at - now + 1).unwrap_or(1).min(SLEEP_MAX_MS);
                        tokio::time::sleep(Duration::from_millis(ms)).await;
                    }
                    None => std::future::pending().await,
                }
            };
            let rest = begin.elapsed().saturating_mul(REST).min(REST_MAX);
            let rested = async {
                tokio::time::sleep(rest).await;
                changed.await;
            };
            tokio::select! {
                () = rested => {}
                () = due => {}
                () = stop.cancelled() => {}
            }
        }
    }

    /// Ends tasks whose time is over. Returns when there is next something to do.
    async fn expire(&self, now: i64) -> Result<Option<i64>, DeskError> {
        let keep = self.keep;
        self.change(move |c| {
            let (next, ended) = change::expire(c, now)?;
            let vms: BTreeSet<&str> = ended.iter().map(|t| t.vm.as_str()).collect();
            for vm in vms {
                retention::trim(c, vm, &keep)?;
            }
            Ok((next, ended))
        })
        .await
    }

    /// Wakes the agents that wait for a goal which was held until now.
    async fn release(&self, since: &mut i64, now: i64) {
        let from = *since;
        let released = self
            .db
            .run::<_, DeskError, _>(move |c| Ok(store::released(c, from, now)?));
        match released.await {
            Ok(vms) => {
                *since = now;
                let vms = vms
                    .iter()
                    .filter_map(|vm| self.bell.registry.get(&vm.parse().ok()?));
                vms.for_each(|vm| vm.queued.notify_waiters());
            }
            Err(e) => tracing::error!(error = %e, "cannot look for what was held"),
        }
    }

    /// Forgets what ended long ago. Returns when to look again.
    async fn retire(&self, now: i64) -> Option<i64> {
        let keep = self.keep;
        let retired = self
            .db
            .run::<_, DeskError, _>(move |c| Ok(retention::retire(c, &keep, now)?));
        match retired.await {
            Ok((gone, next)) => {
                if gone > 0 {
                    tracing::info!(gone, "tasks that ended long ago are forgotten");
                }
                next
            }
            Err(e) => {
                tracing::error!(error = %e, "cannot forget what ended long ago");
                Some(now + AGAIN_MS)
            }
        }
    }
}
