//! Files that the host sends: whole and right, or not there.

use std::fs;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use adit_blob::Digest;
use adit_blob::wire::{BODY_MAX, Ended, Have, Kind, SERVICE, Want};
use adit_channel::frame;
use adit_channel::hello::{self, Common, Extensions, Hello, Opaque, Open};
use adit_channel::refusal::{Code, Refusal};
use adit_guest_driver::serve::blob::{BLOB_MAX, STREAMS_MAX};

use crate::host::Host;

const HANG: Duration = Duration::from_secs(60);

/// Dials a service of the agent, which may still be on its way.
pub fn dial(host: &Host, service: &str, arguments: Vec<u8>) -> Result<UnixStream, Refusal> {
    let begin = std::time::Instant::now();
    loop {
        match try_dial(host, service, arguments.clone()) {
            Ok(answered) => return answered,
            Err(e) => assert!(begin.elapsed() < HANG, "{e}: {}", host.log()),
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Dials a service of an agent that may be gone.
pub fn try_dial(
    host: &Host,
    service: &str,
    arguments: Vec<u8>,
) -> io::Result<Result<UnixStream, Refusal>> {
    let mut stream = UnixStream::connect(host.path("guest.sock"))?;
    stream.set_read_timeout(Some(HANG))?;
    let open = Open {
        extensions: Extensions {
            arguments: Opaque::try_from(arguments).unwrap(),
            ..Extensions::default()
        },
        ..Open::new(service.parse().unwrap(), Common::default())
    };
    stream.write_all(&Hello::Open(open).encode())?;
    Ok(match hello::read(&mut stream)? {
        Hello::Accept(_) => Ok(stream),
        Hello::Refuse(refuse) => Err(refuse.refusal),
        Hello::Open(_) => panic!("an open"),
    })
}

/// Offers a file. Returns the stream, and how much of the file is there.
pub fn offer(host: &Host, digest: Digest, size: u64) -> Result<(UnixStream, u64), Refusal> {
    let want = Want { digest, size };
    let mut stream = dial(host, SERVICE, want.encode())?;
    let (header, body) = frame::read(&mut stream, BODY_MAX).unwrap().unwrap();
    assert_eq!(header.kind, Kind::Have as u16);
    let have: Have = header.decode(&body).unwrap();
    Ok((stream, have.bytes))
}

pub fn ended(mut stream: UnixStream) -> Ended {
    let ended = said_of_end(&mut stream);
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    ended
}

fn said_of_end(stream: &mut UnixStream) -> Ended {
    let (header, body) = frame::read(stream, BODY_MAX).unwrap().unwrap();
    assert_eq!(header.kind, Kind::Ended as u16);
    header.decode(&body).unwrap()
}

/// Sends a file, or what is missing of it.
pub fn send(host: &Host, content: &[u8]) -> Ended {
    let offered = offer(host, Digest::of(content), content.len() as u64);
    let (mut stream, have) = offered.unwrap();
    let _ = stream.write_all(&content[have as usize..]);
    ended(stream)
}

fn content() -> Vec<u8> {
    (0..3_000_000_u32).map(|i| (i % 251) as u8).collect()
}

fn kept(host: &Host, digest: Digest) -> Option<Vec<u8>> {
    fs::read(host.path(&format!("state/blobs/{digest}"))).ok()
}

#[test]
fn a_file_goes_on_where_its_stream_ended_and_is_there_when_it_is_whole() {
    let mut host = Host::new();
    host.start(None);
    let (content, half) = (content(), 1_500_000);
    let digest = Digest::of(&content);
    let (mut stream, have) = offer(&host, digest, content.len() as u64).unwrap();
    assert_eq!(have, 0);
    stream.write_all(&content[..half]).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    assert_eq!(kept(&host, digest), None);
    // Also after the agent was killed.
    host.kill();
    fs::remove_file(host.path("guest.sock")).unwrap();
    host.start(None);
    let (mut stream, have) = offer(&host, digest, content.len() as u64).unwrap();
    assert_eq!(have, half as u64);
    stream.write_all(&content[half..]).unwrap();
    assert_eq!(ended(stream).refusal, 0);
    assert_eq!(kept(&host, digest).as_ref(), Some(&content));
    let mode = |path: &str| fs::metadata(host.path(path)).unwrap().mode() & 0o777;
    assert_eq!(mode("state/blobs"), 0o700);
    assert_eq!(mode(&format!("state/blobs/{digest}")), 0o600);
    // It is not sent again.
    let (stream, have) = offer(&host, digest, content.len() as u64).unwrap();
    assert_eq!(have, content.len() as u64);
    assert_eq!(ended(stream).refusal, 0);
}

#[test]
fn what_has_another_digest_is_refused_and_leaves_nothing() {
    let mut host = Host::new();
    host.start(None);
    let digest = Digest::of(b"what was meant");
    let (mut stream, _) = offer(&host, digest, 14).unwrap();
    stream.write_all(b"what was sent!").unwrap();
    let ended = ended(stream);
    assert_eq!(Code::of_hello(ended.refusal, 0), Code::Mismatch);
    assert!(ended.text.contains(&digest.to_string()), "{}", ended.text);
    assert_eq!(fs::read_dir(host.path("state/blobs")).unwrap().count(), 0);
    assert_eq!(send(&host, b"what was meant").refusal, 0);
}

#[test]
fn r101_a_host_has_so_many_streams_of_so_many_bytes_and_no_more() {
    let mut host = Host::new();
    host.start(None);
    let refused = |digest: Digest, size: u64| {
        let offered = offer(&host, digest, size);
        offered.map(drop).unwrap_err().code()
    };
    let digest = |n: u8| Digest([n; 32]);
    assert_eq!(refused(digest(1), BLOB_MAX + 1), Code::TooLarge);
    assert_eq!(refused(digest(1), u64::MAX), Code::TooLarge);
    for arguments in [vec![], vec![1; 39], vec![1; 41], vec![1; 512]] {
        let denied = dial(&host, SERVICE, arguments).unwrap_err();
        assert_eq!(denied.code(), Code::Denied);
    }
    // Nobody has made a file or a directory for any of these.
    assert!(!host.path("state/blobs").exists());
    let open: Vec<_> = (0..STREAMS_MAX as u8)
        .map(|n| offer(&host, digest(n), 10).unwrap())
        .collect();
    assert_eq!(refused(digest(9), 10), Code::Busy);
    // Ports and tasks go on.
    assert!(dial(&host, "ping", vec![]).is_ok());
    drop(open);
    let begin = std::time::Instant::now();
    while let Err(busy) = offer(&host, digest(9), 10) {
        assert_eq!(busy.code(), Code::Busy);
        assert!(begin.elapsed() < HANG);
    }
}

#[test]
fn r101_more_than_was_announced_is_not_read() {
    let mut host = Host::new();
    host.start(None);
    let (mut stream, _) = offer(&host, Digest::of(b"ten bytes!"), 10).unwrap();
    stream.write_all(b"ten bytes! and more").unwrap();
    assert_eq!(said_of_end(&mut stream).refusal, 0);
    assert_eq!(
        kept(&host, Digest::of(b"ten bytes!")).unwrap(),
        b"ten bytes!"
    );
}
