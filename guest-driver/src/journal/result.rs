//! How a result gets into the journal of a guest whose disk may be full.
//!
//! ```text
//! whole ── no space ─► give the reserve up ─► without its output ─► whole, in its place ── no space ─► stays without
//! ```
//! The outcome first: a write that fails for want of space may use some up.

use adit_tasks::wire::Report;

use super::{Journal, JournalError, Phase, Result, any};
use crate::crash::{self, Point};
use crate::runner::remark;

/// How much of a result the journal has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kept {
    /// All of it.
    Whole,
    /// The outcome; the disk had no space for the output.
    WithoutOutput,
}

impl Journal {
    /// Records how a task ended. On a full disk the reserve is used, and what does not fit then is the output.
    ///
    /// # Errors
    /// The task has not started, or not even its outcome can be written.
    pub fn result(&mut self, report: &Report) -> Result<Kept> {
        match self.write_result(report, None) {
            Err(JournalError::NoSpace(_)) => self.reserve.release(),
            done => return done.map(|()| Kept::Whole),
        }
        let mut short = report.clone();
        (short.stdout, short.stderr) = Default::default();
        let why = "guest disk full: its output could not be kept";
        remark(&mut short.reason, why);
        self.write_result(&short, None)?;
        Ok(match self.write_result(report, Some(&short)) {
            Ok(()) => Kept::Whole,
            Err(_) => Kept::WithoutOutput,
        })
    }

    /// `instead_of`: what is there already.
    fn write_result(&mut self, report: &Report, instead_of: Option<&Report>) -> Result<()> {
        crash::disk_full(Point::ResultStored).map_err(any)?;
        self.advance(&report.task_id, |phase| {
            let may = match phase {
                Phase::Received | Phase::Started { .. } => true,
                Phase::Result(old) => instead_of == Some(old),
                Phase::Acked(_) => false,
            };
            may.then(|| Phase::Result(Box::new(report.clone())))
        })
    }
}
