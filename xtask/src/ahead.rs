//! What the tests with guests need is made while the steps before them run, by a thread with less right to the processors:
//! most tests wait for a limit to pass, and leave them idle.

use std::process::Command;
use std::sync::mpsc::{Receiver, channel};

use adit_tests::process::output;
use anyhow::Context;

/// What there is to make, in this order: its name, and how.
pub type Jobs = &'static [(&'static str, fn() -> anyhow::Result<()>)];

/// The thread's results.
pub struct Ahead(Receiver<(&'static str, anyhow::Result<()>)>);

impl Ahead {
    /// Begins. After a job that fails there are no more.
    pub fn begin(jobs: Jobs) -> Self {
        let (tell, results) = channel();
        std::thread::spawn(move || {
            yield_to_others();
            for (name, job) in jobs {
                let result = job();
                let failed = result.is_err();
                if tell.send((*name, result)).is_err() || failed {
                    return;
                }
            }
        });
        Self(results)
    }

    /// Waits for a job's result. They are asked for in the order of the jobs, and each once.
    ///
    /// # Errors
    /// The job's own, or an earlier one failed.
    pub fn result(&self, of: &str) -> anyhow::Result<()> {
        loop {
            let received = self.0.recv();
            let (name, result) = received.with_context(|| format!("`{of}` was not made"))?;
            if name == of {
                return result;
            }
            result.with_context(|| format!("{of} needs {name}"))?;
        }
    }
}

/// This thread, and what it starts, runs where others leave a processor idle.
fn yield_to_others() {
    let thread = nix::unistd::gettid().to_string();
    let result = output(Command::new("renice").args(["-n", "15", "-p", &thread]));
    if let Err(e) = result {
        eprintln!("what is made ahead disturbs the tests: {e:#}");
    }
}
