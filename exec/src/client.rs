//! A client's half: what it has had, what it may send, and whether the guest keeps to the rules.

use crate::stdin::STDIN_WINDOW;
use crate::wire::{DATA_MAX, Exit, Out, Refused, Row, Started, ToClient, ToGuest};

/// So much arrives until the guest hears of it.
const ACK_STEP: u64 = 64 << 10;

/// What the client hears.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Heard {
    /// The command runs.
    Started(Started),
    /// It has written this.
    Output(Out, Vec<u8>),
    /// It has ended, and this was all.
    Exit(Exit),
    /// It is not done.
    Refused(Refused),
    /// The sessions.
    Rows(Vec<Row>),
    /// What was asked for is done.
    Done,
    /// Nothing to act on.
    Nothing,
}

/// The guest does not keep to the protocol. What it says is not to be believed any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ClientError {
    /// A piece is not the next one.
    #[error("output is missing: bytes from {expected} on are due, and {got} came")]
    Missing {
        /// Where it should go on.
        expected: u64,
        /// Where it does.
        got: u64,
    },
    /// Something that is not due.
    #[error("the guest says what is not due now")]
    NotDue,
}

/// A client.
#[derive(Debug, Default)]
pub struct Client {
    started: bool,
    over: bool,
    /// The end has come, and the guest has not heard that.
    owes_exit: bool,
    kept: bool,
    input: bool,
    had: [u64; 2],
    acked: [u64; 2],
    sent: u64,
    taken: u64,
    stdin_ended: bool,
}

impl Client {
    /// One that has said what it wants.
    pub fn new() -> Self {
        Self::default()
    }

    /// How many bytes of each output it has had, from the session's beginning.
    pub fn had(&self) -> [u64; 2] {
        self.had
    }

    /// Takes what the guest says.
    ///
    /// # Errors
    /// The guest breaks the protocol.
    pub fn handle(&mut self, message: ToClient) -> Result<Heard, ClientError> {
        if self.over {
            return Err(ClientError::NotDue);
        }
        match message {
            ToClient::Started(started) => {
                if std::mem::replace(&mut self.started, true) {
                    return Err(ClientError::NotDue);
                }
                (self.kept, self.input) = (started.kept, started.input);
                self.had = [started.stdout, started.stderr];
                self.acked = self.had;
                (self.sent, self.taken) = (started.stdin, started.taken.min(started.stdin));
                Ok(Heard::Started(started))
            }
            ToClient::Refused(refused) => {
                self.over = true;
                Ok(Heard::Refused(refused))
            }
            ToClient::Rows(rows) if !self.started => {
                self.over = true;
                Ok(Heard::Rows(rows))
            }
            ToClient::Done if !self.started => {
                self.over = true;
                Ok(Heard::Done)
            }
            ToClient::Output { out, offset, bytes } if self.started => {
                let had = &mut self.had[match out {
                    Out::Stdout => 0,
                    Out::Stderr => 1,
                }];
                if offset != *had {
                    let (expected, got) = (*had, offset);
                    return Err(ClientError::Missing { expected, got });
                }
                // Nobody has so much; a guest that says so lies.
                let end = offset.checked_add(bytes.len() as u64);
                *had = end.ok_or(ClientError::NotDue)?;
                Ok(Heard::Output(out, bytes))
            }
            ToClient::Taken { stdin } if self.started => {
                if stdin > self.sent || stdin < self.taken {
                    return Err(ClientError::NotDue);
                }
                self.taken = stdin;
                Ok(Heard::Nothing)
            }
            ToClient::StdinClosed if self.started => {
                self.input = false;
                Ok(Heard::Nothing)
            }
            ToClient::Exit(exit) if self.started => {
                for (expected, got) in self.had.into_iter().zip([exit.stdout, exit.stderr]) {
                    if expected != got {
                        return Err(ClientError::Missing { expected, got });
                    }
                }
                self.over = true;
                self.owes_exit = self.kept;
                Ok(Heard::Exit(exit))
            }
            _ => Err(ClientError::NotDue),
        }
    }

    /// How many bytes of input may be sent now.
    pub fn stdin_room(&self) -> usize {
        if !self.takes_input() {
            return 0;
        }
        let ahead = usize::try_from(self.sent - self.taken).unwrap_or(STDIN_WINDOW);
        STDIN_WINDOW.saturating_sub(ahead).min(DATA_MAX)
    }

    /// Whether the command reads what is sent.
    pub fn takes_input(&self) -> bool {
        self.started && self.input && !self.stdin_ended && !self.over
    }

    /// The frame of the next input: no more than there is room for.
    pub fn stdin(&mut self, bytes: &[u8]) -> Vec<u8> {
        let offset = self.sent;
        self.sent += bytes.len() as u64;
        ToGuest::Stdin {
            offset,
            bytes: bytes.to_vec(),
        }
        .encode()
    }

    /// The frame of the input's end.
    pub fn stdin_end(&mut self) -> Vec<u8> {
        self.stdin_ended = true;
        ToGuest::StdinEnd { offset: self.sent }.encode()
    }

    /// What the guest is to hear of what has arrived, and was passed on; none: nothing now.
    #[must_use]
    pub fn poll_ack(&mut self) -> Option<Vec<u8>> {
        let [stdout, stderr] = self.had;
        let since = |nth: usize| self.had[nth] - self.acked[nth];
        let is_due = self.kept && (since(0) >= ACK_STEP || since(1) >= ACK_STEP);
        (is_due || std::mem::take(&mut self.owes_exit)).then(|| {
            self.acked = self.had;
            ToGuest::Ack { stdout, stderr }.encode()
        })
    }
}
