//! The same client for a thread that has no runtime. It starts no other thread.

use std::io;
use std::path::Path;
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::runtime::{Builder, Runtime};

use crate::{Answer, ClientError, Method};

/// Blocks until aditd has answered. Not for use inside a runtime.
#[derive(Debug)]
pub struct Client {
    client: crate::Client,
    runtime: Runtime,
}

impl Client {
    /// `limit`: how long aditd may take to answer.
    ///
    /// # Errors
    /// This process has no free descriptors.
    pub fn new(socket: &Path, limit: Duration) -> io::Result<Self> {
        Ok(Self {
            client: crate::Client::new(socket, limit),
            runtime: Builder::new_current_thread().enable_all().build()?,
        })
    }

    /// GETs JSON.
    ///
    /// # Errors
    /// As [`ClientError`] says.
    pub fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.runtime.block_on(self.client.get(path))
    }

    /// POSTs JSON and reads JSON.
    ///
    /// # Errors
    /// As [`ClientError`] says.
    pub fn post<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T, ClientError> {
        self.runtime.block_on(self.client.post(path, body))
    }

    /// DELETEs.
    ///
    /// # Errors
    /// As [`ClientError`] says.
    pub fn delete(&self, path: &str) -> Result<(), ClientError> {
        self.runtime.block_on(self.client.delete(path))
    }

    /// Makes a request, and returns the answer whatever its status is.
    ///
    /// # Errors
    /// There is no whole answer.
    pub fn request(
        &self,
        method: Method,
        path: &str,
        body: Option<Vec<u8>>,
    ) -> Result<Answer, ClientError> {
        self.runtime
            .block_on(self.client.request(method, path, body))
    }
}
