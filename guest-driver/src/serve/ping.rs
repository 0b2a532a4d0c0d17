//! `ping`: sends back what it reads, so that the host can compare carriers.

use std::io::{self, Read};

use adit_channel::hello::Open;
use adit_channel::refusal::Refusal;
use adit_channel::ring::bell::PING;
use adit_names::ServiceName;

use super::services::{Run, Service};
use crate::transport::HostStream;

/// Arguments of a hello that wants its echo behind its end. Agents before this one answer at once.
const END: &[u8] = b"end";
/// Most bytes that are kept until then.
const HEARD_MAX: u64 = 1024;

/// The service. It needs no rule: it reaches nothing.
pub struct Ping;

impl Service for Ping {
    fn form(&self) -> &'static str {
        PING
    }

    fn takes(&self, name: &ServiceName) -> bool {
        name.as_str() == PING
    }

    fn open(&self, open: &Open) -> Result<Run, Refusal> {
        let waits = open.extensions.arguments.as_bytes() == END;
        Ok(Box::new(move |stream| {
            // Whoever breaks it off, or says nothing for as long as a hello may take, has ended it.
            let _ = match waits {
                true => echo_behind_the_end(&*stream),
                false => echo(&*stream),
            };
            Ok(())
        }))
    }
}

/// Says what it has heard only when the host has ended its sending: by that the host knows whether ends come through.
fn echo_behind_the_end(stream: &dyn HostStream) -> io::Result<()> {
    let mut heard = Vec::new();
    stream.io().take(HEARD_MAX).read_to_end(&mut heard)?;
    stream.io().write_all(&heard)?;
    stream.end_sending()
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
