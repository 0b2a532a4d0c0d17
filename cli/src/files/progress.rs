//! What is shown of a copy while it goes on: on a terminal a line that moves, and anywhere what is not copied.

use std::io::{self, IsTerminal};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use adit_files::tree::Watch;
use indicatif::{ProgressBar, ProgressStyle};

use crate::text::escape;

/// Most things that are named one by one.
const NAMED_MAX: u64 = 100;

/// What one copy has done so far, over all its attempts.
pub(super) struct Progress {
    bar: ProgressBar,
    moved: AtomicU64,
    skipped: AtomicU64,
}

impl Progress {
    /// `is_quiet`: nothing moves.
    pub(super) fn new(is_quiet: bool) -> Self {
        let bar = match is_quiet || !io::stderr().is_terminal() {
            true => ProgressBar::hidden(),
            false => ProgressBar::new_spinner(),
        };
        let style = ProgressStyle::with_template("{spinner} {bytes} {bytes_per_sec} {wide_msg}");
        if let Ok(style) = style {
            bar.set_style(style);
        }
        bar.enable_steady_tick(Duration::from_millis(200));
        Self {
            bar,
            moved: AtomicU64::new(0),
            skipped: AtomicU64::new(0),
        }
    }

    /// Bytes that have gone through.
    pub(super) fn moved(&self) -> u64 {
        self.moved.load(Ordering::Relaxed)
    }

    /// Nothing moves any more.
    pub(super) fn end(&self) {
        self.bar.finish_and_clear();
    }

    /// Says something beside the line.
    pub(super) fn note(&self, text: &str) {
        self.bar.suspend(|| adit_print::note(text));
    }

    /// Things that are not named.
    pub(super) fn unnamed(&self) -> u64 {
        let skipped = self.skipped.load(Ordering::Relaxed);
        skipped.saturating_sub(NAMED_MAX)
    }

    /// The next attempt tells all of it again.
    pub(super) fn again(&self) {
        self.bar.reset();
        self.skipped.store(0, Ordering::Relaxed);
    }
}

impl Watch for Progress {
    fn moved(&self, bytes: u64) {
        self.moved.fetch_add(bytes, Ordering::Relaxed);
        self.bar.inc(bytes);
    }

    fn entry(&self, path: &[u8]) {
        if !self.bar.is_hidden() {
            self.bar.set_message(escape(&String::from_utf8_lossy(path)));
        }
    }

    fn skipped(&self, path: &[u8], why: &str) {
        if self.skipped.fetch_add(1, Ordering::Relaxed) < NAMED_MAX {
            let path = escape(&String::from_utf8_lossy(path));
            self.note(&format!("adit: not copied: {path}: {}", escape(why)));
        }
    }
}
