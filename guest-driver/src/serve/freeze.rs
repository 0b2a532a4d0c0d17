//! `freeze`: the guest's file systems stand still while the host saves its disks, and go on by themselves.
//!
//! What happens between a hello and its answer here writes nothing, not even a line of the log: it could wait for a disk that stands still.

use std::io::{self, Write};
use std::sync::Arc;

use adit_channel::frame;
use adit_channel::hello::Open as Hello;
use adit_channel::refusal::{Code, Refusal};
use adit_names::ServiceName;
use adit_tasks::freeze::{ANSWER, Answer, Asked, SERVICE, VERSION};

use super::services::{Run, Service};
use crate::freeze::Freezer;
use crate::transport::HostStream;

/// The service.
pub struct Freeze(Arc<Freezer>);

impl Freeze {
    /// One that has this freezer do it.
    pub fn new(freezer: Freezer) -> Self {
        Self(Arc::new(freezer))
    }
}

impl Service for Freeze {
    fn form(&self) -> &'static str {
        SERVICE
    }

    fn takes(&self, name: &ServiceName) -> bool {
        name.as_str() == SERVICE
    }

    fn is_for_the_host(&self) -> bool {
        true
    }

    fn open(&self, open: &Hello) -> Result<Run, Refusal> {
        let asked = Asked::parse(open.extensions.arguments.as_bytes());
        let asked = asked.ok_or_else(|| {
            Refusal::new(
                Code::Denied,
                "the arguments do not say what, and for how long",
            )
        })?;
        let freezer = self.0.clone();
        Ok(Box::new(move |stream| serve(&*stream, asked, &freezer)))
    }
}

fn serve(stream: &dyn HostStream, asked: Asked, freezer: &Freezer) -> io::Result<()> {
    let answer = freezer
        .ask(asked)
        .unwrap_or_else(|e| Answer::Refused(format!("the process that freezes: {e}")));
    let bytes = frame::encode(ANSWER, VERSION.into(), 1, 0, &answer).map_err(io::Error::other)?;
    let said = stream.io().write_all(&bytes);
    if said.is_err() && matches!(asked, Asked::Freeze(_)) {
        // Whoever asked has gone, and hears of nothing that stands still.
        let _ = freezer.ask(Asked::Thaw);
    }
    said?;
    stream.end_sending()
}
