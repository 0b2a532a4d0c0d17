//! The windows of goals on disk: one a key, see `adit_tasks::window`.
//!
//! | table | key | value |
//! |---|---|---|
//! | `windows-v1` | a signing key's id | its [`Window`] |
//! | `floors-v1` | a signing key's id | its highest goal: all that the version before knows |
//! | `mark-v1` | 0 | the last entry of `order-v1` that this version has seen or made |
//!
//! The version before may run again on the same disk: it finds `floors-v1` up to date. It drops tasks of every goal but a key's
//! highest, and each time adds an entry to `order-v1`. So where the mark is not the last entry, the windows may have goals of
//! which not every task is remembered, and each begins anew with the highest goal of its key.

use adit_tasks::window::{Place, Window};
use adit_tasks::wire::TaskId;
use redb::{ReadableTable, ReadableTableMetadata, Table, TableDefinition, WriteTransaction};

use super::{FLOORS, Floor, JournalError, KEYS_MAX, ORDER, Origin, Result, any, decode, encode};

pub(super) const WINDOWS: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("windows-v1");
const MARK: TableDefinition<'_, u8, &[u8]> = TableDefinition::new("mark-v1");

/// An entry of `order-v1`.
type Mark = (u64, TaskId);

/// The windows by key, in a transaction.
pub(super) type Windows<'tx> = Table<'tx, &'static [u8], &'static [u8]>;

/// Makes the tables, and begins the windows anew if the version before was here since.
pub(super) fn open(tx: &WriteTransaction) -> Result<()> {
    let mut windows = tx.open_table(WINDOWS).map_err(any)?;
    let mark = {
        let marks = tx.open_table(MARK).map_err(any)?;
        let mark = marks.get(0).map_err(any)?;
        mark.map(|m| decode::<Mark>(m.value())).transpose()?
    };
    if mark == last(tx)? {
        return Ok(());
    }
    let floors = tx.open_table(FLOORS).map_err(any)?;
    for row in floors.iter().map_err(any)? {
        let (key, floor) = row.map_err(any)?;
        let (key_seq, digest): Floor = decode(floor.value())?;
        write(&mut windows, key.value(), &Window::of_last(key_seq, digest))?;
    }
    set_mark(tx)
}

/// Records that this version has seen the last entry of `order-v1`.
pub(super) fn set_mark(tx: &WriteTransaction) -> Result<()> {
    if let Some(mark) = last(tx)? {
        let mut marks = tx.open_table(MARK).map_err(any)?;
        marks.insert(0, encode(&mark)?.as_slice()).map_err(any)?;
    }
    Ok(())
}

fn last(tx: &WriteTransaction) -> Result<Option<Mark>> {
    let order = tx.open_table(ORDER).map_err(any)?;
    let last = order.last().map_err(any)?;
    Ok(last.map(|(at, id)| (at.value(), *id.value())))
}

/// A key's window.
pub(super) fn read(
    windows: &impl ReadableTable<&'static [u8], &'static [u8]>,
    key: &[u8],
) -> Result<Window> {
    let window = windows.get(key).map_err(any)?;
    Ok(window
        .map(|w| decode(w.value()))
        .transpose()?
        .unwrap_or_default())
}

pub(super) fn write(windows: &mut Windows<'_>, key: &[u8], window: &Window) -> Result<()> {
    let value = encode(window)?;
    windows.insert(key, value.as_slice()).map_err(any)?;
    Ok(())
}

/// Admits a task's goal, unless it was admitted before.
pub(super) fn admit(tx: &WriteTransaction, origin: &Origin) -> Result<()> {
    let key = origin.key.as_slice();
    let mut windows = tx.open_table(WINDOWS).map_err(any)?;
    let mut window = read(&windows, key)?;
    match window.admit(origin.seq, origin.digest) {
        Place::Known => return Ok(()),
        Place::New => {}
        Place::Other | Place::Forgotten { .. } => {
            return Err(JournalError::Replay {
                key_seq: origin.seq,
            });
        }
    }
    let is_new = windows.get(key).map_err(any)?.is_none();
    if is_new && windows.len().map_err(any)? >= KEYS_MAX {
        return Err(JournalError::TooManyKeys);
    }
    write(&mut windows, key, &window)?;
    if window.last() == Some((origin.seq, origin.digest)) {
        let mut floors = tx.open_table(FLOORS).map_err(any)?;
        let floor: Floor = (origin.seq, origin.digest);
        floors
            .insert(key, encode(&floor)?.as_slice())
            .map_err(any)?;
    }
    Ok(())
}
