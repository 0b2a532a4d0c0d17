//! Room for one more task in a journal that has as many as it may.
//!
//! 1. The oldest task goes whose goal was forgotten: it can never be admitted again.
//! 2. If there is none, a goal is forgotten for it: of the key that has the most tasks here, the lowest number. Never a key's
//!    highest goal, and of the key of the task that comes, only a lower number than that task's.
//!
//! A result that the host does not have stays in any case, and so does a task that has started. If nothing may go, the task that
//! comes is refused.

use std::collections::BTreeMap;

use adit_tasks::window::Window;
use adit_tasks::wire::TaskId;
use redb::{ReadableTable, WriteTransaction};

use super::windows::{self, WINDOWS};
use super::{Entry, JournalError, ORDER, Origin, Phase, Result, TASKS, any, decode};

/// Tasks of one key that could be dropped if their goals were forgotten.
struct Candidates {
    count: u64,
    /// The lowest number among them, and its oldest task.
    lowest: (u64, u64, TaskId),
}

/// Drops one task, for one of this goal.
pub(super) fn make(tx: &WriteTransaction, coming: &Origin) -> Result<()> {
    let mut windows = tx.open_table(WINDOWS).map_err(any)?;
    let mut tasks = tx.open_table(TASKS).map_err(any)?;
    let mut order = tx.open_table(ORDER).map_err(any)?;
    let mut known: BTreeMap<Vec<u8>, Window> = BTreeMap::new();
    let mut candidates: BTreeMap<Vec<u8>, Candidates> = BTreeMap::new();
    let mut drop = None;
    for row in order.iter().map_err(any)? {
        let (at, id) = row.map_err(any)?;
        let Some(entry) = tasks.get(id.value()).map_err(any)? else {
            continue;
        };
        let Entry {
            key, seq, phase, ..
        } = decode(entry.value())?;
        if !matches!(phase, Phase::Acked(_) | Phase::Received) {
            continue;
        }
        if !known.contains_key(&key) {
            known.insert(key.clone(), windows::read(&windows, &key)?);
        }
        let window = &known[&key];
        if !window.has(seq) {
            drop = Some((at.value(), *id.value()));
            break;
        }
        let highest = window.last().is_some_and(|(last, _)| seq == last);
        if highest || (key == coming.key && seq >= coming.seq) {
            continue;
        }
        let task = (seq, at.value(), *id.value());
        let of_key = candidates.entry(key).or_insert(Candidates {
            count: 0,
            lowest: task,
        });
        of_key.count += 1;
        of_key.lowest = of_key.lowest.min(task);
    }
    if drop.is_none()
        && let Some((key, most)) = candidates.into_iter().max_by_key(|(_, c)| c.count)
    {
        let (seq, at, id) = most.lowest;
        let mut window = windows::read(&windows, &key)?;
        window.forget(seq);
        windows::write(&mut windows, &key, &window)?;
        drop = Some((at, id));
    }
    let (at, id) = drop.ok_or(JournalError::Full)?;
    order.remove(at).map_err(any)?;
    tasks.remove(&id).map_err(any)?;
    Ok(())
}
