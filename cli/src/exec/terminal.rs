//! The terminal of whoever runs `adit exec -t`: raw while the command has it, and as it was after any end.

use std::io;

use adit_exec::Size;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};

/// Size of the terminal that standard input is; none: it is none.
pub(super) fn size() -> Option<Size> {
    let size = tcgetwinsize(io::stdin()).ok()?;
    Some(Size {
        rows: size.ws_row,
        cols: size.ws_col,
    })
}

/// A raw terminal. Dropped, it is as before.
pub(super) struct Raw(Termios);

impl Raw {
    /// Takes the terminal that standard input is.
    pub(super) fn take() -> io::Result<Self> {
        let before = tcgetattr(io::stdin())?;
        let raw = Self(before);
        raw.again()?;
        Ok(raw)
    }

    /// Makes it raw again.
    pub(super) fn again(&self) -> io::Result<()> {
        let mut raw = self.0.clone();
        raw.make_raw();
        Ok(tcsetattr(io::stdin(), OptionalActions::Drain, &raw)?)
    }

    /// Makes it as before.
    pub(super) fn restore(&self) {
        // The terminal may have gone.
        let _ = tcsetattr(io::stdin(), OptionalActions::Drain, &self.0);
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        self.restore();
    }
}
