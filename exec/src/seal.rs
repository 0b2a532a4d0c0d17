//! A stream that is sealed end to end, to a guest's own key: the host carries it, and can delay and cut it, and nothing else.
//!
//! ```text
//! client ─ Seal: e, es ─────────────► guest, by its key        Noise_NK_25519_ChaChaPoly_SHA256, without payloads
//!        ◄ Sealed: e, ee ─ guest                                both have two keys, and the hash of all that was said
//!        ═ records ═══════════════ in both directions; the first of the client have its ticket, which names that hash
//! ```
//! A record is a transport message of Noise: a length (u16, little-endian), and so many bytes, which are the ciphertext and tag of a kind
//! and its bytes. The nth record of a direction is sealed with the nonce n, so that one which is changed, left out, put in, said twice or
//! in another order is none; after that nothing counts any more.
//!
//! | kind | what |
//! |---|---|
//! | 0 | bytes of the stream, 1 to [`RECORD_MAX`] |
//! | 1 | its end: a stream that ends without it was cut |
//!
//! Whoever has made the handshake may hand the stream over with its [`Keys`]: the agent does so, to the process that has the command.
//! The client is nobody for the handshake. Who it is the ticket says, which is good for this handshake alone.

use chacha20poly1305::{AeadInPlace, ChaCha20Poly1305, KeyInit, Nonce, Tag};
use serde::{Deserialize, Serialize};
use snow::{Builder, HandshakeState};
use zeroize::Zeroize;

/// Most bytes of a stream in a record.
pub const RECORD_MAX: usize = 48 << 10;
const PATTERN: &str = "Noise_NK_25519_ChaChaPoly_SHA256";
/// What both sides must have meant.
const PROLOGUE: &[u8] = b"adit exec 1";
const KEY_LEN: usize = 32;
const TAG_LEN: usize = 16;
const LEN_LEN: usize = 2;
/// Bytes of a message of the handshake: a key and a tag.
const HANDSHAKE_LEN: usize = KEY_LEN + TAG_LEN;
/// No record has this number, which Noise keeps for itself.
const NUMBERS_MAX: u64 = u64::MAX;
const BYTES: u8 = 0;
const END: u8 = 1;

/// Hash of a handshake: no two streams have the same.
pub type Channel = [u8; 32];

/// Why a stream is not sealed, or not any more. Always the peer's fault, or that of whoever carries it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SealError {
    /// The handshake is none, or not for this key.
    #[error("the handshake fails: whoever answers does not have the key that is expected")]
    Handshake,
    /// A record of a length that none has.
    #[error("a sealed record has {0} bytes")]
    Length(usize),
    /// A record that is none, or not the next.
    #[error("a sealed record was changed, left out, put in or said twice on the way")]
    Forged,
    /// The stream was cut.
    #[error("the sealed stream was cut off")]
    Cut,
    /// More comes after the end.
    #[error("something comes after the end of the sealed stream")]
    AfterEnd,
    /// There are no numbers left.
    #[error("the sealed stream has had as many records as it may")]
    Numbers,
}

/// What a stream goes on with.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Keys {
    send: [u8; KEY_LEN],
    receive: [u8; KEY_LEN],
    /// Records that were sent and received with them.
    sent: u64,
    received: u64,
}

impl std::fmt::Debug for Keys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { sent, received, .. } = self;
        write!(f, "Keys {{ sent: {sent}, received: {received}, .. }}")
    }
}

impl Drop for Keys {
    fn drop(&mut self) {
        self.send.zeroize();
        self.receive.zeroize();
    }
}

/// The client's side of a handshake.
pub struct Asking(HandshakeState);

fn builder() -> Result<Builder<'static>, SealError> {
    let params = PATTERN.parse().map_err(|_| SealError::Handshake)?;
    let builder = Builder::new(params).prologue(PROLOGUE);
    builder.map_err(|_| SealError::Handshake)
}

fn split(mut state: HandshakeState, is_client: bool) -> Result<(Keys, Channel), SealError> {
    let hash = state.get_handshake_hash().try_into();
    let (to_guest, to_client) = state.dangerously_get_raw_split();
    let (send, receive) = match is_client {
        true => (to_guest, to_client),
        false => (to_client, to_guest),
    };
    let keys = Keys {
        send,
        receive,
        sent: 0,
        received: 0,
    };
    Ok((keys, hash.map_err(|_| SealError::Handshake)?))
}

impl Asking {
    /// Begins a handshake with whoever has the other half of this key. Returns what is to be said.
    ///
    /// # Errors
    /// There are no random numbers.
    pub fn new(guest: &[u8; KEY_LEN]) -> Result<(Self, Vec<u8>), SealError> {
        let builder = builder()?.remote_public_key(guest);
        let builder = builder.map_err(|_| SealError::Handshake)?;
        let mut state = builder
            .build_initiator()
            .map_err(|_| SealError::Handshake)?;
        let message = said(&mut state)?;
        Ok((Self(state), message))
    }

    /// Takes the answer.
    ///
    /// # Errors
    /// Whoever has answered does not have the key.
    pub fn finish(mut self, message: &[u8]) -> Result<(Keys, Channel), SealError> {
        heard(&mut self.0, message)?;
        split(self.0, true)
    }
}

/// Answers a handshake with the guest's own key. Returns what is to be said, too.
///
/// # Errors
/// It is none, or for another key.
pub fn answer(own: &[u8; KEY_LEN], message: &[u8]) -> Result<(Vec<u8>, Keys, Channel), SealError> {
    let builder = builder()?.local_private_key(own);
    let builder = builder.map_err(|_| SealError::Handshake)?;
    let mut state = builder
        .build_responder()
        .map_err(|_| SealError::Handshake)?;
    heard(&mut state, message)?;
    let answer = said(&mut state)?;
    let (keys, channel) = split(state, false)?;
    Ok((answer, keys, channel))
}

fn said(state: &mut HandshakeState) -> Result<Vec<u8>, SealError> {
    let mut message = vec![0; HANDSHAKE_LEN];
    let len = state.write_message(&[], &mut message);
    message.truncate(len.map_err(|_| SealError::Handshake)?);
    Ok(message)
}

fn heard(state: &mut HandshakeState, message: &[u8]) -> Result<(), SealError> {
    let mut payload = [0; HANDSHAKE_LEN];
    match state.read_message(message, &mut payload) {
        Ok(0) => Ok(()),
        _ => Err(SealError::Handshake),
    }
}

fn nonce(number: u64) -> Nonce {
    let mut nonce = [0; 12];
    nonce[4..].copy_from_slice(&number.to_le_bytes());
    nonce.into()
}

/// Both directions of a sealed stream, without IO.
pub struct Sealed {
    keys: Keys,
    seals: ChaCha20Poly1305,
    opens: ChaCha20Poly1305,
    /// Bytes of records that were not opened.
    bytes: Vec<u8>,
    ended: bool,
    has_said_end: bool,
    broken: Option<SealError>,
}

impl Sealed {
    /// Goes on with these keys.
    pub fn new(keys: Keys) -> Self {
        Self {
            seals: ChaCha20Poly1305::new(&keys.send.into()),
            opens: ChaCha20Poly1305::new(&keys.receive.into()),
            keys,
            bytes: Vec::new(),
            ended: false,
            has_said_end: false,
            broken: None,
        }
    }

    /// What somebody else goes on with; none: it has part of a record.
    pub fn into_keys(self) -> Option<Keys> {
        self.bytes.is_empty().then(|| self.keys.clone())
    }

    /// Seals bytes, as records behind `out`.
    ///
    /// # Errors
    /// There are no numbers left.
    pub fn seal(&mut self, bytes: &[u8], out: &mut Vec<u8>) -> Result<(), SealError> {
        let mut chunks = bytes.chunks(RECORD_MAX);
        chunks.try_for_each(|chunk| self.record(BYTES, chunk, out))
    }

    /// Seals the end.
    ///
    /// # Errors
    /// There are no numbers left.
    pub fn seal_end(&mut self, out: &mut Vec<u8>) -> Result<(), SealError> {
        match std::mem::replace(&mut self.has_said_end, true) {
            true => Ok(()),
            false => self.record(END, &[], out),
        }
    }

    fn record(&mut self, kind: u8, bytes: &[u8], out: &mut Vec<u8>) -> Result<(), SealError> {
        let number = self.keys.sent;
        if number == NUMBERS_MAX {
            return Err(SealError::Numbers);
        }
        let len = u16::try_from(1 + bytes.len() + TAG_LEN).map_err(|_| SealError::Numbers)?;
        out.extend(len.to_le_bytes());
        let at = out.len();
        out.push(kind);
        out.extend(bytes);
        let sealed = self
            .seals
            .encrypt_in_place_detached(&nonce(number), &[], &mut out[at..]);
        out.extend(sealed.map_err(|_| SealError::Numbers)?);
        self.keys.sent += 1;
        Ok(())
    }

    /// Takes what has come. All that can be opened is to be taken out before more is put in.
    pub fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// Opens whole records, and appends the bytes of the stream.
    ///
    /// # Errors
    /// One is none. Nothing that comes counts any more.
    pub fn open(&mut self, out: &mut Vec<u8>) -> Result<(), SealError> {
        if let Some(broken) = self.broken {
            return Err(broken);
        }
        let mut at = 0;
        let opened = loop {
            match self.open_one(&mut at, out) {
                Ok(true) => {}
                Ok(false) => break Ok(()),
                Err(e) => break Err(e),
            }
        };
        self.bytes.drain(..at);
        self.broken = opened.err();
        opened
    }

    /// False: it needs more bytes.
    fn open_one(&mut self, at: &mut usize, out: &mut Vec<u8>) -> Result<bool, SealError> {
        let rest = &mut self.bytes[*at..];
        if self.ended && !rest.is_empty() {
            return Err(SealError::AfterEnd);
        }
        let Some((len, rest)) = rest.split_first_chunk_mut::<LEN_LEN>() else {
            return Ok(false);
        };
        let len = usize::from(u16::from_le_bytes(*len));
        if !(1 + TAG_LEN..=1 + RECORD_MAX + TAG_LEN).contains(&len) {
            return Err(SealError::Length(len));
        }
        let Some(record) = rest.get_mut(..len) else {
            return Ok(false);
        };
        if self.keys.received == NUMBERS_MAX {
            return Err(SealError::Numbers);
        }
        let (bytes, tag) = record.split_at_mut(len - TAG_LEN);
        let nonce = nonce(self.keys.received);
        self.opens
            .decrypt_in_place_detached(&nonce, &[], bytes, Tag::from_slice(tag))
            .map_err(|_| SealError::Forged)?;
        self.keys.received += 1;
        *at += LEN_LEN + len;
        match bytes {
            [BYTES, bytes @ ..] if !bytes.is_empty() => out.extend_from_slice(bytes),
            [END] => self.ended = true,
            // Sealed by whoever has the key, who does not keep to the protocol.
            _ => return Err(SealError::Length(len)),
        }
        Ok(true)
    }

    /// The stream below has ended.
    ///
    /// # Errors
    /// The other side has not said that.
    pub fn finish(&self) -> Result<(), SealError> {
        match (self.ended, self.bytes.is_empty()) {
            (true, true) => Ok(()),
            _ => Err(SealError::Cut),
        }
    }

    /// Whether the other side has said that nothing more comes.
    pub fn has_ended(&self) -> bool {
        self.ended
    }
}

#[cfg(test)]
mod tests;
