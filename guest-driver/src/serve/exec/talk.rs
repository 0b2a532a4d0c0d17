//! What is said on a stream before a session process has it: frames, in the clear or in sealed records, with a time at which it must be
//! over.

use std::io::{self, ErrorKind, Read, Write};
use std::time::{Duration, Instant};

use adit_channel::frame;
use adit_exec::seal::{self, Channel, Keys, Sealed};
use adit_exec::{Decoder, FRAME_MAX, Message, ToClient, ToGuest};

use super::{LIMIT, invalid};
use crate::transport::HostStream;

/// The talk.
pub(super) struct Talk<'s> {
    stream: &'s dyn HostStream,
    until: Instant,
    sealed: Option<Sealed>,
    /// What sealed records have brought.
    decoder: Decoder,
}

/// The stream, of which no read lasts longer than there is time: one that brings a byte now and then is over, too.
struct Until<'t> {
    stream: &'t dyn HostStream,
    until: Instant,
}

impl Read for Until<'_> {
    fn read(&mut self, piece: &mut [u8]) -> io::Result<usize> {
        let left = self.until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(ErrorKind::TimedOut.into());
        }
        self.stream.set_timeout(Some(left))?;
        self.stream.io().read(piece)
    }
}

impl<'s> Talk<'s> {
    pub(super) fn new(stream: &'s dyn HostStream) -> Self {
        Self {
            stream,
            until: Instant::now() + LIMIT,
            sealed: None,
            decoder: Decoder::default(),
        }
    }

    /// How long all that follows may take.
    pub(super) fn limit(&mut self, limit: Duration) {
        self.until = Instant::now() + limit;
    }

    fn reader(&self) -> Until<'s> {
        Until {
            stream: self.stream,
            until: self.until,
        }
    }

    /// The next message; none: the stream has ended.
    pub(super) fn next(&mut self) -> io::Result<Option<ToGuest>> {
        let mut reader = self.reader();
        let Some(sealed) = &mut self.sealed else {
            let Some((header, body)) = frame::read(&mut reader, FRAME_MAX)? else {
                return Ok(None);
            };
            return ToGuest::read(&header, &body).map(Some).map_err(invalid);
        };
        loop {
            if let Some(message) = self.decoder.poll_frame().map_err(invalid)? {
                return Ok(Some(message));
            }
            // Exactly a record, so that what follows is left to the session.
            let mut len = [0; 2];
            reader.read_exact(&mut len)?;
            let mut record = vec![0; usize::from(u16::from_le_bytes(len))];
            reader.read_exact(&mut record)?;
            let mut plain = Vec::new();
            sealed.push(&len);
            sealed.push(&record);
            sealed.open(&mut plain).map_err(invalid)?;
            self.decoder.push(&plain);
            if sealed.has_ended() {
                return Ok(None);
            }
        }
    }

    /// Answers a handshake with the guest's own key.
    pub(super) fn seal(&mut self, own: &[u8; 32], message: &[u8]) -> io::Result<Channel> {
        let (answer, keys, channel) = seal::answer(own, message).map_err(invalid)?;
        self.say(&ToClient::Sealed(answer))?;
        self.sealed = Some(Sealed::new(keys));
        Ok(channel)
    }

    pub(super) fn say(&mut self, message: &ToClient) -> io::Result<()> {
        let frame = message.encode();
        match &mut self.sealed {
            None => self.stream.io().write_all(&frame),
            Some(sealed) => {
                let mut out = Vec::new();
                sealed.seal(&frame, &mut out).map_err(invalid)?;
                self.stream.io().write_all(&out)
            }
        }
    }

    /// Says the last thing, and has it read: some carriers forget what was said when a stream is closed on bytes that nobody has read.
    pub(super) fn end(mut self, message: &ToClient) -> io::Result<()> {
        self.say(message)?;
        if let Some(sealed) = &mut self.sealed {
            let mut out = Vec::new();
            sealed.seal_end(&mut out).map_err(invalid)?;
            self.stream.io().write_all(&out)?;
        }
        self.stream.end_sending()?;
        self.limit(LIMIT);
        let (mut reader, mut rest) = (self.reader(), [0; 1024]);
        while reader.read(&mut rest).is_ok_and(|n| n > 0) {}
        Ok(())
    }

    /// What a session process goes on with, if the stream is sealed.
    ///
    /// # Errors
    /// The client has said more already than what was due.
    pub(super) fn keys(self) -> io::Result<Option<Keys>> {
        if self.decoder.is_in_frame() {
            return Err(invalid("it says more than is due"));
        }
        match self.sealed.map(Sealed::into_keys) {
            Some(None) => Err(invalid("it says more than is due")),
            keys => Ok(keys.flatten()),
        }
    }
}
