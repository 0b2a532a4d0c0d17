//! What is asked of each frame from the host.

use std::io::{self, ErrorKind};

use adit_channel::frame::{self, Header};
use serde::de::DeserializeOwned;

/// Whether a frame answers this message of ours.
pub fn answers(header: &Header, id: u32) -> io::Result<()> {
    match header.id == id {
        true => Ok(()),
        false => Err(invalid(&format!(
            "answer to message {}, expected one to {id}",
            header.id
        ))),
    }
}

pub fn decode<T: DeserializeOwned>(header: &Header, body: &[u8]) -> io::Result<T> {
    let decoded = header.decode(body);
    decoded.map_err(|e| io::Error::new(ErrorKind::InvalidData, e))
}

pub fn ignorable(header: &Header) -> io::Result<()> {
    let Header {
        kind,
        version,
        flags,
        ..
    } = header;
    if flags & frame::IGNORABLE == 0 {
        return Err(invalid(&format!(
            "unexpected frame of kind {kind} version {version}"
        )));
    }
    Ok(())
}

pub fn invalid(what: &str) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, what.to_owned())
}
