//! What a sender takes of its receiver.

use crate::wire::{Have, Message, Refused, Skipped, Totals, Violation};

/// What was heard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Heard {
    /// What the receiver has of the file that it was asked for.
    Have(Have),
    /// Something is not written.
    Skipped(Skipped),
    /// It ends here.
    Refused(Refused),
    /// All is where it belongs.
    Totals(Totals),
}

/// A sender's view of its receiver.
#[derive(Debug, Default)]
pub struct Outgoing {
    asked: bool,
    all_said: bool,
    over: bool,
}

impl Outgoing {
    /// A file's entry was sent, and the receiver is to say what it has of it.
    pub fn ask(&mut self) {
        self.asked = true;
    }

    /// All was sent.
    pub fn all(&mut self) {
        self.all_said = true;
    }

    /// Whether nothing more is to come.
    pub fn is_over(&self) -> bool {
        self.over
    }

    /// Takes what the receiver says.
    ///
    /// # Errors
    /// It breaks the rules.
    pub fn handle(&mut self, message: Message) -> Result<Heard, Violation> {
        if self.over {
            return Err(Violation::NotDue);
        }
        match message {
            Message::Have(have) if std::mem::take(&mut self.asked) => Ok(Heard::Have(have)),
            Message::Skipped(skipped) => Ok(Heard::Skipped(skipped)),
            Message::Refused(refused) => {
                self.over = true;
                Ok(Heard::Refused(refused))
            }
            Message::Totals(totals) if self.all_said => {
                self.over = true;
                Ok(Heard::Totals(totals))
            }
            _ => Err(Violation::NotDue),
        }
    }
}
