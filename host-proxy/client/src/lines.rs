//! A body that comes line by line.

use http_body_util::BodyExt;
use hyper::body::Incoming;
use serde::de::DeserializeOwned;

use crate::{ANSWER_MAX, ClientError};

/// A body of JSON values, one a line.
#[derive(Debug)]
pub struct Lines {
    body: Incoming,
    buffer: Vec<u8>,
    /// Bytes of it that hold no end of a line.
    searched: usize,
}

impl Lines {
    pub(crate) fn new(body: Incoming) -> Self {
        Self {
            body,
            buffer: Vec::new(),
            searched: 0,
        }
    }

    /// Returns the next line as JSON, or `None` at the end, which says nothing of why it ends.
    ///
    /// # Errors
    /// The stream was cut off, or a line is no such value.
    pub async fn next<T: DeserializeOwned>(&mut self) -> Result<Option<T>, ClientError> {
        loop {
            let rest = &self.buffer[self.searched..];
            if let Some(end) = rest.iter().position(|&b| b == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=self.searched + end).collect();
                self.searched = 0;
                let value = serde_json::from_slice(&line);
                return value.map(Some).map_err(ClientError::Answer);
            }
            self.searched = self.buffer.len();
            if self.buffer.len() > ANSWER_MAX {
                return Err(ClientError::Line);
            }
            match self.body.frame().await {
                None => return Ok(None),
                Some(Ok(frame)) => self
                    .buffer
                    .extend_from_slice(frame.data_ref().map_or(&[][..], |d| d)),
                Some(Err(e)) => return Err(ClientError::WentAway(e)),
            }
        }
    }
}
