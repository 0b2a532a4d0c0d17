//! The tickets that were used, on disk before anything is done for them: a directory with an empty file for each, and what is known of
//! those that were forgotten.
//!
//! | file | what |
//! |---|---|
//! | `HEX-HEX-HEX` | a ticket: its end and its beginning in unix ms, its nonce |
//! | `floor` | `HEX HEX`: the latest end and the latest beginning of all that were forgotten |
//!
//! One is used once its file is made and its directory is on disk: whoever is killed before has used none, and whoever is killed
//! afterwards has used it up, whether anything ran or not. That a file is made only once is also what holds between two agents, of
//! which one is about to follow the other. What is to be kept is decided in [`adit_tasks::ticket`].

use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use adit_blob::disk;
use adit_tasks::ticket::{Change, Floor, Ledger, Spent, SpentError};
use adit_tasks::{Ticket, hex, unhex};

use crate::clock;

/// Name of the directory, in the state directory.
pub const DIR: &str = "tickets";
const FLOOR: &str = "floor";

/// Why a ticket is not used. Nothing is to be done for it.
#[derive(Debug, thiserror::Error)]
pub enum SpendError {
    /// What is remembered forbids it.
    #[error(transparent)]
    Spent(#[from] SpentError),
    /// Its time has ended meanwhile.
    #[error("the ticket's time has ended meanwhile")]
    Late,
    /// It cannot be remembered.
    #[error("it cannot be remembered that the ticket was used: {0}")]
    Io(#[from] io::Error),
}

/// The directory.
pub struct Tickets {
    dir: PathBuf,
    /// Held by whoever uses one.
    using: Mutex<()>,
}

impl Tickets {
    /// Those of an agent with this state_dir.
    pub fn of(state_dir: &Path) -> Self {
        Self {
            dir: state_dir.join(DIR),
            using: Mutex::new(()),
        }
    }

    /// What time it is, at least: the host may have set the clock back.
    ///
    /// # Errors
    /// What is remembered cannot be read.
    pub fn now_ms(&self) -> io::Result<i64> {
        Ok(self.read()?.now_ms(clock::unix_ms()))
    }

    /// Uses a ticket: that it was is on disk when this returns.
    ///
    /// # Errors
    /// It was used, its time is over, or it cannot be remembered.
    pub fn spend(&self, ticket: &Ticket) -> Result<(), SpendError> {
        let _one = self.using.lock().unwrap_or_else(PoisonError::into_inner);
        disk::own_dir(&self.dir)?;
        let mut ledger = self.read()?;
        let now_ms = ledger.now_ms(clock::unix_ms());
        if now_ms > ticket.not_after.as_millisecond() {
            return Err(SpendError::Late);
        }
        let Change {
            floor,
            forgotten,
            spent,
        } = ledger.spend(ticket, now_ms)?;
        if let Some(Floor {
            not_after_ms,
            not_before_ms,
        }) = floor
        {
            let text = format!("{not_after_ms:x} {not_before_ms:x}\n");
            disk::replace(&self.dir.join(FLOOR), text.as_bytes())?;
        }
        for old in &forgotten {
            disk::remove(&self.dir.join(name(old)))?;
        }
        let made = disk::create(&self.dir.join(name(&spent)), 0o600);
        let file = made.map_err(|e| match e.kind() {
            ErrorKind::AlreadyExists => SpendError::Spent(SpentError::Again),
            _ => SpendError::Io(e),
        })?;
        disk::sync(&file)?;
        disk::sync_dir(&self.dir)?;
        Ok(())
    }

    fn read(&self) -> io::Result<Ledger> {
        let entries = match fs::read_dir(&self.dir) {
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Ledger::default()),
            entries => entries?,
        };
        let (mut floor, mut spent) = (Floor::default(), Vec::new());
        for entry in entries {
            let path = entry?.path();
            let bad = || {
                let text = format!(
                    "{} is damaged, or none of a ticket: remove it",
                    path.display()
                );
                io::Error::new(ErrorKind::InvalidData, text)
            };
            match path.file_name().and_then(|name| name.to_str()) {
                Some(FLOOR) => {
                    floor = fs::read_to_string(&path)
                        .ok()
                        .and_then(|text| floor_of(&text))
                        .ok_or_else(bad)?;
                }
                // A floor that was not in force yet.
                Some("floor.new") => {}
                Some(name) => spent.push(of_name(name).ok_or_else(bad)?),
                None => return Err(bad()),
            }
        }
        Ok(Ledger::new(floor, spent))
    }
}

fn name(one: &Spent) -> String {
    let Spent {
        not_after_ms,
        not_before_ms,
        nonce,
    } = one;
    format!("{not_after_ms:x}-{not_before_ms:x}-{}", hex(nonce))
}

fn of_name(name: &str) -> Option<Spent> {
    let (ends, rest) = name.split_once('-')?;
    let (begins, nonce) = rest.split_once('-')?;
    Some(Spent {
        not_after_ms: i64::from_str_radix(ends, 16).ok()?,
        not_before_ms: i64::from_str_radix(begins, 16).ok()?,
        nonce: unhex(nonce)?,
    })
}

fn floor_of(text: &str) -> Option<Floor> {
    let (ends, begins) = text.trim().split_once(' ')?;
    Some(Floor {
        not_after_ms: i64::from_str_radix(ends, 16).ok()?,
        not_before_ms: i64::from_str_radix(begins, 16).ok()?,
    })
}

#[cfg(test)]
mod tests {
    use adit_tasks::ticket::{List, Verb};

    use super::*;

    fn ticket(nonce: u8, from_s: i64, to_s: i64) -> Ticket {
        let at = |s: i64| clock::unix_ms() / 1000 + s;
        let stamp = |s| jiff::Timestamp::from_second(at(s)).unwrap();
        Ticket {
            vm_id: "web-1".parse().unwrap(),
            user: String::new(),
            verb: Verb::List(List {}),
            not_before: stamp(from_s),
            not_after: stamp(to_s),
            nonce: [nonce; 16],
            channel: None,
        }
    }

    #[test]
    fn a_ticket_is_used_once_also_by_the_next_agent() {
        let dir = tempfile::tempdir().unwrap();
        let one = ticket(1, 0, 60);
        Tickets::of(dir.path()).spend(&one).unwrap();
        let again = Tickets::of(dir.path());
        let e = again.spend(&one).unwrap_err();
        assert!(matches!(e, SpendError::Spent(SpentError::Again)), "{e}");
        // The same nonce, with another time.
        let e = again.spend(&ticket(1, 0, 61)).unwrap_err();
        assert!(matches!(e, SpendError::Spent(SpentError::Again)), "{e}");
        again.spend(&ticket(2, 0, 60)).unwrap();
        let e = again.spend(&ticket(3, -60, -1)).unwrap_err();
        assert!(matches!(e, SpendError::Late), "{e}");
    }

    #[test]
    fn of_many_who_bring_a_ticket_at_once_one_uses_it_also_beside_another_agent() {
        let dir = tempfile::tempdir().unwrap();
        let (one, agents) = (ticket(1, 0, 60), [(); 2].map(|()| Tickets::of(dir.path())));
        let used = std::thread::scope(|scope| {
            let each = (0..8).map(|n| {
                scope.spawn({
                    let (agent, one) = (&agents[n % 2], &one);
                    move || agent.spend(one).is_ok()
                })
            });
            let each: Vec<_> = each.collect();
            each.into_iter()
                .map(|t| t.join().unwrap())
                .filter(|used| *used)
                .count()
        });
        assert_eq!(used, 1);
    }

    #[test]
    fn what_is_damaged_forbids_all_and_says_so() {
        let dir = tempfile::tempdir().unwrap();
        let tickets = Tickets::of(dir.path());
        tickets.spend(&ticket(1, 0, 60)).unwrap();
        for (name, text) in [(FLOOR, "x"), (FLOOR, ""), ("1-2", ""), ("1-2-zz", "")] {
            let file = dir.path().join(DIR).join(name);
            fs::write(&file, text).unwrap();
            let e = tickets.spend(&ticket(2, 0, 60)).unwrap_err();
            assert!(e.to_string().contains(&file.display().to_string()), "{e}");
            assert!(tickets.now_ms().is_err());
            fs::remove_file(&file).unwrap();
        }
        // One that a power cut left.
        fs::write(dir.path().join(DIR).join("floor.new"), "").unwrap();
        tickets.spend(&ticket(2, 0, 60)).unwrap();
    }

    #[test]
    fn a_floor_is_kept_and_the_time_does_not_go_back() {
        let dir = tempfile::tempdir().unwrap();
        let tickets = Tickets::of(dir.path());
        disk::own_dir(&tickets.dir).unwrap();
        let ahead = clock::unix_ms() + 600_000;
        let text = format!("{:x} {ahead:x}\n", ahead + 1000);
        fs::write(tickets.dir.join(FLOOR), text).unwrap();
        assert_eq!(tickets.now_ms().unwrap(), ahead - 60_000);
        let e = tickets.spend(&ticket(1, 0, 60)).unwrap_err();
        assert!(matches!(e, SpendError::Late), "{e}");
        let e = tickets.spend(&ticket(1, 541, 600)).unwrap_err();
        assert!(matches!(e, SpendError::Spent(SpentError::Forgotten)), "{e}");
        tickets.spend(&ticket(1, 541, 660)).unwrap();
    }
}
