//! `ping`: sends back what it reads, so that the host can compare carriers.

use std::io;

use adit_channel::hello::Open;
use adit_channel::refusal::Refusal;
use adit_channel::ring::bell::PING;
use adit_names::ServiceName;

use super::services::{Run, Service};
use crate::transport::HostStream;

/// The service. It needs no rule: it reaches nothing.
pub struct Ping;

impl Service for Ping {
    fn form(&self) -> &'static str {
        PING
    }

    fn takes(&self, name: &ServiceName) -> bool {
        name.as_str() == PING
    }

    fn open(&self, _: &Open) -> Result<Run, Refusal> {
        Ok(Box::new(|stream| {
            // Whoever breaks it off, or says nothing for as long as a hello may take, has ended it.
            let _ = echo(&*stream);
            Ok(())
        }))
    }
}

fn echo(stream: &dyn HostStream) -> io::Result<()> {
    let (mut io, mut buf) = (stream.io(), [0; 1024]);
    loop {
        match io.read(&mut buf)? {
            0 => return stream.end_sending(),
            n => io.write_all(&buf[..n])?,
        }
    }
}
