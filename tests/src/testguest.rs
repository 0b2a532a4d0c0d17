//! `adit-testguest`: the servers and clients of the test guest. One static binary, with a thread for each connection.
//!
//! - `http PORT NAME`: `/` is NAME's page; `/big?mb=N` is N MiB of the test pattern; `/slow?mb=N` the same at 8 MiB/s
//!   `/ended`, `/waits` and `/cut` begin an answer without a length, and then end it, wait for the client's end, or reset
//! - `tcp-echo PORT`, `vsock-echo PORT`: echo, and end when the peer ends
//! - `dial-echo PORT FIRST`: dials the host. PORT echoes 1 B to 64 MiB in odd pieces, and many streams in quick succession.
//!   On FIRST the host sends and ends first, and then gets all of it back. Prints DIALS-OK
//! - `dial-few PORT`: the same with less data, for slow machines. Prints DIALS-OK
//! - `hold PORT`: dials the host, and prints how the stream ends
//! - `rtt PROXY TO LEN TIMES`: round trips of LEN bytes to an echo behind aditd's proxy; prints the median, in us
//! - `uds-echo PATH`, `uds-dial PATH PORT LEN`, `uds-hello PATH SERVICE`: the host's side of a VMM with Unix sockets: echoes
//!   what the guest sends; sends LEN bytes to the guest's PORT and checks the echo; the same with SERVICE of the guest's agent
//! - `vsock-stranger CID SERVICE`: dials the agent of the guest with this CID as any user of its host can, without the host's key; prints
//!   STRANGER-REFUSED and the code, or STRANGER-SERVED
//! - `kexec KERNEL INITRD`: starts them as if after a reset
//! - `vsock-sink PORT`: reads as many bytes as the first eight say, and answers with one byte
//! - `bench NAME CID ECHO SINK [FIGURE]`: measures against such ports (`guest/bench.rs`)
//! - `ring-echo [PORT]`: finds the ring and echoes the records of its second lane. With PORT, and without an interrupt, bytes
//!   on a stream to that port are the doorbell. Prints RING-ATTACHED
//! - `ring-poison PORT`: reads a number from each stream to PORT, poisons the ring's region so often, 5 ms apart, beside the
//!   process that uses it, and answers with a byte
//! - `ring-attack BOOT`, `ring-attack CASE`, `ring-attack list`: attacks the ring's region; prints a verdict like `adit-hostile`
//! - `dial-host N`: dials the host's well-known port N times in quick succession; each is answered with a refusal

#![allow(unsafe_code)] // `kexec`: a system call for which no crate has a wrapper

#[path = "guest/bench.rs"]
mod bench;
#[path = "guest/ring.rs"]
mod ring;
#[path = "guest/ring_attacks.rs"]
mod ring_attacks;
#[path = "guest/ring_unhelpful.rs"]
mod ring_unhelpful;

use std::ffi::CString;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread;
use std::time::{Duration, Instant};

use adit_channel::hello::{self, Common, Hello, Open};
use adit_channel::refusal::Code;
use adit_tests::connect::{connect, pattern};
use nix::fcntl::{SpliceFFlags, splice};
use nix::sys::reboot::RebootMode;
use vsock::{VsockListener, VsockStream};

fn main() -> anyhow::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["http", port, name] => http(port.parse()?, name),
        ["tcp-echo", port] => tcp_echo(port.parse()?),
        ["vsock-echo", port] => vsock_echo(port.parse()?),
        ["dial-echo", port, first] => dial_echo(port.parse()?, first.parse()?),
        ["rtt", proxy, to, len, times] => rtt(proxy.parse()?, to, len.parse()?, times.parse()?),
        ["hold", port] => hold(port.parse()?),
        ["dial-few", port] => dial_few(port.parse()?),
        ["uds-echo", path] => uds_echo(path),
        ["uds-dial", path, port, len] => uds_dial(path, port.parse()?, len.parse()?),
        ["uds-hello", path, service] => uds_hello(path, service),
        ["vsock-stranger", cid, service] => vsock_stranger(cid.parse()?, service),
        ["kexec", kernel, initrd] => kexec(kernel, initrd),
        ["ring-echo"] => ring::echo(None),
        ["ring-echo", port] => ring::echo(Some(port.parse()?)),
        ["ring-poison", port] => ring::poison(port.parse()?),
        ["ring-attack", "list"] => {
            ring_attacks::list();
            Ok(())
        }
        ["ring-attack", case] => ring_attacks::attack_ring(case),
        ["dial-host", times] => dial_host(times.parse()?),
        ["vsock-sink", port] => vsock_sink(port.parse()?),
        ["bench", name, cid, echo, sink, ref only @ ..] => {
            let only = only.first().unwrap_or(&"");
            bench::run(name, cid.parse()?, echo.parse()?, sink.parse()?, only);
            Ok(())
        }
        _ => {
            anyhow::bail!(
                "usage: adit-testguest http PORT NAME | tcp-echo PORT | vsock-echo PORT | dial-echo PORT FIRST | dial-few PORT | hold PORT | rtt PROXY TO LEN TIMES | uds-echo PATH | uds-dial PATH PORT LEN | uds-hello PATH SERVICE | vsock-stranger CID SERVICE | kexec KERNEL INITRD | ring-echo [PORT] | ring-poison PORT | ring-attack BOOT | dial-host N | vsock-sink PORT | bench NAME CID ECHO SINK [FIGURE]"
            )
        }
    }
}

/// Bytes that an echo handles at a time. Large, so that a measurement through the echo measures little of the echo.
const ECHO_BYTES: usize = 64 << 10;

fn tcp_echo(port: u16) -> anyhow::Result<()> {
    for stream in TcpListener::bind(("127.0.0.1", port))?.incoming() {
        let stream = stream?;
        // Without this the last piece of an answer waits 40 ms for an acknowledgement.
        stream.set_nodelay(true)?;
        thread::Builder::new()
            .stack_size(128 << 10)
            .spawn(move || {
                let _ = splice_back(&stream);
                let _ = stream.shutdown(Shutdown::Write);
            })?;
    }
    Ok(())
}

/// Echoes without copying, so that a measurement through this echo measures the way to it.
fn splice_back(stream: &TcpStream) -> io::Result<()> {
    let (from, to) = nix::unistd::pipe()?;
    let some = SpliceFFlags::SPLICE_F_MOVE;
    loop {
        let mut left = splice(stream, None, &to, None, ECHO_BYTES, some)?;
        if left == 0 {
            return Ok(());
        }
        while left > 0 {
            left -= splice(&from, None, stream, None, left, some)?;
        }
    }
}

fn vsock_echo(port: u32) -> anyhow::Result<()> {
    let listener = VsockListener::bind_with_cid_port(vsock::VMADDR_CID_ANY, port)?;
    // The library's backlog is 128. On a busy machine more dials may wait, and the kernel would reset them.
    nix::sys::socket::listen(&listener, nix::sys::socket::Backlog::MAXALLOWABLE)?;
    for stream in listener.incoming() {
        let stream = stream?;
        thread::Builder::new()
            .stack_size(128 << 10)
            .spawn(move || {
                let _ = echo(&stream, &stream);
                let _ = stream.shutdown(Shutdown::Write);
            })?;
    }
    Ok(())
}

fn vsock_sink(port: u32) -> anyhow::Result<()> {
    for stream in VsockListener::bind_with_cid_port(vsock::VMADDR_CID_ANY, port)?.incoming() {
        let mut stream = stream?;
        thread::spawn(move || -> io::Result<()> {
            let (mut len, mut buf) = ([0; 8], vec![0; 256 << 10]);
            stream.read_exact(&mut len)?;
            let mut left = u64::from_le_bytes(len);
            while left > 0 {
                match stream.read(&mut buf)? {
                    0 => break,
                    n => left = left.saturating_sub(n as u64),
                }
            }
            stream.write_all(&[1])
        });
    }
    Ok(())
}

fn dial(port: u32) -> io::Result<VsockStream> {
    VsockStream::connect_with_cid_port(vsock::VMADDR_CID_HOST, port)
}

fn dial_echo(port: u32, first: u32) -> anyhow::Result<()> {
    for len in [1, 43, 4096, 65_536, 65_537, 1 << 20, 64 << 20] {
        dial_one(port, len)?;
    }
    for n in 0..2000 {
        dial_one(port, n * 37 % 5000 + 1)?;
    }
    let mut stream = dial(first)?;
    let mut said = Vec::new();
    // The host has ended its half; ours is still open.
    stream.read_to_end(&mut said)?;
    stream.write_all(&said)?;
    stream.shutdown(Shutdown::Write)?;
    anyhow::ensure!(stream.read(&mut [0])? == 0, "a byte after the end");
    println!("DIALS-OK");
    Ok(())
}

fn dial_few(port: u32) -> anyhow::Result<()> {
    for len in [1, 43, 4096, 65_537, 1 << 20] {
        dial_one(port, len)?;
    }
    for n in 0..50 {
        dial_one(port, n * 37 % 5000 + 1)?;
    }
    println!("DIALS-OK");
    Ok(())
}

fn rtt(proxy: SocketAddr, to: &str, len: usize, times: usize) -> anyhow::Result<()> {
    let mut stream = connect(proxy, to)?;
    stream.set_nodelay(true)?;
    let (sent, mut got) = (vec![0x5a; len], vec![0; len]);
    let mut took = Vec::with_capacity(times);
    // The first round trips warm up caches and windows.
    for round in 0..times + times / 10 {
        let begin = Instant::now();
        stream.write_all(&sent)?;
        stream.read_exact(&mut got)?;
        if round >= times / 10 {
            took.push(begin.elapsed().as_nanos() / 1000);
        }
    }
    took.sort_unstable();
    println!("{}", took[took.len() / 2]);
    Ok(())
}

fn hold(port: u32) -> anyhow::Result<()> {
    let mut stream = dial(port)?;
    println!("HELD");
    match stream.read(&mut [0]) {
        Ok(n) => println!("HELD-ENDED {n} bytes"),
        Err(e) => println!("HELD-ENDED {:?}", e.kind()),
    }
    Ok(())
}

fn dial_one(port: u32, len: u64) -> anyhow::Result<()> {
    let stream = dial(port)?;
    let sender = stream.try_clone()?;
    round_trip(stream, sender, |s| s.shutdown(Shutdown::Write), len)
}

/// Sends `len` bytes of the pattern and reads them back at the same time, to the end.
fn round_trip<S: Read + Write + Send + 'static>(
    mut stream: S,
    mut sender: S,
    end: fn(&S) -> io::Result<()>,
    len: u64,
) -> anyhow::Result<()> {
    let sending = thread::spawn(move || -> io::Result<()> {
        send_pattern(&mut sender, len)?;
        end(&sender)
    });
    expect_pattern(&mut stream, len)?;
    match sending.join() {
        Ok(sent) => Ok(sent?),
        Err(_) => anyhow::bail!("sender panicked"),
    }
}

/// Sends in pieces of changing sizes.
fn send_pattern(to: &mut impl Write, len: u64) -> io::Result<()> {
    let (mut at, mut piece) = (0, 1);
    while at < len {
        let n = (len - at).min(piece);
        let bytes: Vec<u8> = (at..at + n).map(pattern).collect();
        to.write_all(&bytes)?;
        at += n;
        piece = piece * 3 % 100_003 + 1;
    }
    Ok(())
}

fn expect_pattern(from: &mut impl Read, len: u64) -> anyhow::Result<()> {
    let (mut at, mut buf) = (0, vec![0; 70_001]);
    loop {
        let n = from.read(&mut buf)?;
        if n == 0 {
            break;
        }
        let same = (at..).zip(&buf[..n]).all(|(i, &b)| b == pattern(i));
        anyhow::ensure!(same, "bytes from {at} of {len} differ");
        at += n as u64;
    }
    anyhow::ensure!(at == len, "{at} of {len} bytes came back");
    Ok(())
}

fn uds_echo(path: &str) -> anyhow::Result<()> {
    for stream in UnixListener::bind(path)?.incoming() {
        let stream = stream?;
        thread::Builder::new()
            .stack_size(128 << 10)
            .spawn(move || {
                let _ = echo(&stream, &stream);
                let _ = stream.shutdown(Shutdown::Write);
            })?;
    }
    Ok(())
}

/// A stream to a port of the guest, through a socket like Firecracker's.
fn uds_connect(path: &str, port: u32) -> anyhow::Result<UnixStream> {
    let mut stream = UnixStream::connect(path)?;
    writeln!(stream, "CONNECT {port}")?;
    let (mut line, mut byte) = (String::new(), [0]);
    while stream.read(&mut byte)? == 1 && byte != *b"\n" {
        line.push(char::from(byte[0]));
    }
    anyhow::ensure!(line.starts_with("OK "), "port {port}: `{line}`");
    Ok(stream)
}

fn uds_dial(path: &str, port: u32, len: u64) -> anyhow::Result<()> {
    let stream = uds_connect(path, port)?;
    uds_check(stream, len)?;
    println!("DIAL-OK {port} {len}");
    Ok(())
}

fn uds_check(stream: UnixStream, len: u64) -> anyhow::Result<()> {
    let sender = stream.try_clone()?;
    round_trip(stream, sender, |s| s.shutdown(Shutdown::Write), len)
}

fn uds_hello(path: &str, service: &str) -> anyhow::Result<()> {
    let mut stream = uds_connect(path, hello::PORT)?;
    let open = Open::new(service.parse()?, Common::default());
    stream.write_all(&Hello::Open(open).encode())?;
    match hello::read(&mut stream)? {
        Hello::Accept(accept) => println!("HELLO-OK {service} version {}", accept.version),
        other => anyhow::bail!("{other:?}"),
    }
    uds_check(stream, 100_000)
}

fn vsock_stranger(cid: u32, service: &str) -> anyhow::Result<()> {
    let mut stream = VsockStream::connect_with_cid_port(cid, hello::PORT)?;
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    let open = Open::new(service.parse()?, Common::default());
    stream.write_all(&Hello::Open(open).encode())?;
    match hello::read(&mut stream)? {
        Hello::Refuse(refuse) => println!(
            "STRANGER-REFUSED {} nonce {:?}",
            refuse.refusal.code(),
            refuse.common.boot_nonce
        ),
        other => println!("STRANGER-SERVED {other:?}"),
    }
    Ok(())
}

/// kexec_file_load(2), with this kernel's own command line.
fn kexec(kernel: &str, initrd: &str) -> anyhow::Result<()> {
    let (kernel, initrd) = (File::open(kernel)?, File::open(initrd)?);
    let line = std::fs::read_to_string("/proc/cmdline")?;
    let line = CString::new(line.trim_end())?;
    let (fds, len) = (
        [kernel.as_raw_fd(), initrd.as_raw_fd()],
        line.as_bytes_with_nul().len(),
    );
    // SAFETY: two open descriptors, and a string of `len` bytes including its NUL, which the kernel copies.
    let done = unsafe {
        libc::syscall(
            libc::SYS_kexec_file_load,
            fds[0],
            fds[1],
            len,
            line.as_ptr(),
            0,
        )
    };
    nix::errno::Errno::result(done)?;
    match nix::sys::reboot::reboot(RebootMode::RB_KEXEC)? {}
}

/// Each stream asks for an unknown service: a complete round trip without a side effect.
fn dial_host(times: u32) -> anyhow::Result<()> {
    for n in 0..times {
        let mut stream = dial(hello::PORT)?;
        let open = Open::new("none".parse()?, Common::default());
        stream.write_all(&Hello::Open(open).encode())?;
        match hello::read(&mut stream)? {
            Hello::Refuse(r) if r.refusal.code() == Code::UnknownService => {}
            other => anyhow::bail!("stream {n}: {other:?}"),
        }
    }
    println!("{times} answers");
    Ok(())
}

fn echo(mut from: impl Read, mut to: impl Write) -> io::Result<()> {
    let mut buf = vec![0; ECHO_BYTES];
    loop {
        match from.read(&mut buf)? {
            0 => return Ok(()),
            n => to.write_all(&buf[..n])?,
        }
    }
}

fn http(port: u16, name: &str) -> anyhow::Result<()> {
    for stream in TcpListener::bind(("127.0.0.1", port))?.incoming() {
        let (stream, name) = (stream?, name.to_owned());
        thread::Builder::new()
            .stack_size(128 << 10)
            .spawn(move || {
                let _ = answer(&stream, &name);
            })?;
    }
    Ok(())
}

fn answer(mut stream: &TcpStream, name: &str) -> io::Result<()> {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let path = line.split(' ').nth(1).unwrap_or("/").to_owned();
    while line.trim_end() != "" {
        line.clear();
        reader.read_line(&mut line)?;
    }
    if ["/ended", "/waits", "/cut"].contains(&path.as_str()) {
        // Only the way in which the stream ends says whether the answer is complete.
        stream.write_all(b"HTTP/1.1 200 OK\r\n\r\nthe first half")?;
        match path.as_str() {
            "/waits" => drop(reader.read(&mut [0])?),
            "/cut" => {
                // Wait, so that the bytes are sent and not only queued before the reset.
                thread::sleep(Duration::from_millis(200));
                let now = nix::libc::linger {
                    l_onoff: 1,
                    l_linger: 0,
                };
                nix::sys::socket::setsockopt(stream, nix::sys::socket::sockopt::Linger, &now)?;
            }
            _ => {}
        }
        return Ok(());
    }
    let mib = path.split("mb=").nth(1).and_then(|n| n.parse::<u64>().ok());
    let Some(mib) = mib else {
        let page = format!("this is {name}\n");
        return write!(
            stream,
            "HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{page}",
            page.len()
        );
    };
    let len = mib << 20;
    write!(
        stream,
        "HTTP/1.1 200 OK\r\nContent-Length: {len}\r\nConnection: close\r\n\r\n"
    )?;
    let mut at = 0;
    while at < len {
        let chunk: Vec<u8> = (at..len.min(at + (64 << 10))).map(pattern).collect();
        stream.write_all(&chunk)?;
        at += chunk.len() as u64;
        if path.starts_with("/slow") {
            thread::sleep(Duration::from_millis(8));
        }
    }
    Ok(())
}
