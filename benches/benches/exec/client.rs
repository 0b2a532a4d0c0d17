//! A client of aditd that runs a command and drops what it writes.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use adit_exec::{Client, Decoder, Heard, How, Open, ToGuest};
use anyhow::{Context, bail, ensure};

/// More than an answer's head.
const HEAD_MAX: usize = 4 << 10;
/// Bytes that are read at once.
const PIECE: usize = 256 << 10;

/// What became of a command.
#[derive(Clone, Copy, Debug, Default)]
pub struct Ran {
    /// Bytes that it wrote.
    pub written: u64,
    /// From its beginning: aditd has let it through; it runs; it has ended.
    pub at: [Duration; 3],
}

/// Runs a command to its end.
pub fn run(socket: &Path, argv: &[&str]) -> anyhow::Result<Ran> {
    let (begin, mut ran) = (Instant::now(), Ran::default());
    let mut stream = UnixStream::connect(socket)?;
    let program = argv.first().context("a command")?;
    let head = format!(
        "POST /v1/vms/a/exec?user=root&run={program} HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: adit-exec\r\nContent-Length: 0\r\n\r\n"
    );
    stream.write_all(head.as_bytes())?;
    let mut head = vec![0; HEAD_MAX];
    // Nothing follows it before the command's first frame.
    let n = stream.read(&mut head)?;
    head.truncate(n);
    ran.at[0] = begin.elapsed();
    ensure!(
        head.starts_with(b"HTTP/1.1 101") && head.ends_with(b"\r\n\r\n"),
        "{}",
        String::from_utf8_lossy(&head)
    );
    let open = Open {
        argv: argv.iter().map(|text| text.as_bytes().to_vec()).collect(),
        ..Open::default()
    };
    stream.write_all(&ToGuest::Open(open).encode())?;
    let (mut client, mut decoder) = (Client::new(), Decoder::default());
    let mut piece = vec![0; PIECE];
    loop {
        while let Some(message) = decoder.poll_frame()? {
            match client.handle(message)? {
                Heard::Output(_, bytes) => ran.written += bytes.len() as u64,
                Heard::Exit(exit) => {
                    let well = How::of(exit.how) == Some(How::Code) && exit.value == 0;
                    ensure!(well, "{argv:?}: {exit:?}");
                    ran.at[2] = begin.elapsed();
                    return Ok(ran);
                }
                Heard::Started(_) => ran.at[1] = begin.elapsed(),
                Heard::Nothing => {}
                other => bail!("{other:?}"),
            }
        }
        match stream.read(&mut piece)? {
            0 => bail!("{argv:?}: the stream has ended"),
            n => decoder.push(&piece[..n]),
        }
    }
}
