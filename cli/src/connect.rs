//! `adit connect`: a tunnel on standard input and output, or its socket for ssh.
//!
//! ```text
//!              ┌─ thread: standard input ─► tunnel; at its end, our half ends
//!   main ◄─ what happened
//!              └─ thread: tunnel ─► standard output, closed at the guest's end; then it waits for the socket's end
//! ```
//! - Each direction ends by itself. It is over when both have ended, or when nobody is left to send to.
//! - What broke off is no end: the status is 1, and the other side gets a reset, also if this process is killed.
//! - With `--fdpass` none of this runs: ssh has the socket, and not one byte of it was read here.

use std::fs::File;
use std::io::{self, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};

use adit_guest_driver::conn::Conn;
use adit_print::PrintError;
use clap::Args;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, Shutdown, sendmsg, sockopt,
};

use crate::completion;
use crate::error::Failure;
use crate::proxy::{Destination, Options, port};

/// Bytes that are read at once.
const BUFFER: usize = 64 * 1024;

const EXAMPLES: &str = "\
Examples:
  adit connect web-1 25                            # type at a mail server; Ctrl-D ends your half
  adit connect web-1 5432 < request > answer
  adit connect docker.web-1.svc                    # what the guest's own configuration calls `docker`
  adit connect adit://alpha/web-1/docker           # the same of the VM of host `alpha`
  ssh -o ProxyUseFdpass=yes -o ProxyCommand='adit connect --fdpass %h %p' root@web-1

The package of aditd has the last one as /etc/ssh/ssh_config.d/20-adit.conf, so that this works with no option at all:
  ssh root@web-1.adit

Exit status: 0 both directions have ended, or ssh has the socket; 1 the proxy refuses, or the tunnel was broken off; 3 the
proxy cannot be reached; 4 there is no such VM; 124 there is no tunnel within --timeout.";

/// Arguments of `adit connect`.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub struct Connect {
    /// Name of the VM, also with `.adit` behind it; `vsock-PORT.` before it for a port of AF_VSOCK; SERVICE.VM.svc or
    /// adit://HOST/VM/SERVICE for a service that the guest has a name for
    #[arg(add = completion::vms())]
    vm: String,
    /// TCP port in the VM, where the name does not say what is meant
    #[arg(value_parser = port)]
    port: Option<u16>,
    /// Pass the connected socket over standard output, as ssh wants it with `ProxyUseFdpass yes`, and end
    #[arg(long)]
    fdpass: bool,
    #[command(flatten)]
    options: Options,
}

pub async fn connect(command: &Connect) -> Result<(), Failure> {
    let to = Destination::new(&command.vm, command.port)?;
    let proxy = command.options.proxy()?;
    if command.fdpass && sockopt::socket_domain(io::stdout()) != Ok(AddressFamily::UNIX) {
        let message = "--fdpass passes a socket over standard output, which is no Unix socket";
        return Err(Failure::new("usage", message).help(
            "it is for ssh: `ProxyCommand adit connect --fdpass %h %p` with `ProxyUseFdpass yes`",
        ));
    }
    let socket = proxy.open(&to).await?;
    let blocking = || {
        let fd = socket.into_fd()?;
        let flags = fcntl_getfl(&fd)?;
        fcntl_setfl(&fd, flags - OFlags::NONBLOCK)?;
        Ok(fd)
    };
    let fd = blocking().map_err(|e: io::Error| Failure::io("cannot use the tunnel", &e))?;
    match command.fdpass {
        true => pass(fd.as_fd()),
        false => carry(fd, &to),
    }
}

/// Passes a descriptor over standard output, with the one byte that ssh expects.
fn pass(fd: BorrowedFd<'_>) -> Result<(), Failure> {
    let fds = [fd];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    control.push(SendAncillaryMessage::ScmRights(&fds));
    let sent = sendmsg(
        io::stdout(),
        &[IoSlice::new(&[0])],
        &mut control,
        SendFlags::NOSIGNAL,
    );
    sent.map_err(|e| PrintError::from(io::Error::from(e)))?;
    Ok(())
}

/// What happened in a thread.
enum Event {
    /// Standard input has ended, and so has our half of the tunnel.
    Sent(Result<(), Fault>),
    /// The guest has ended its half, and standard output is closed.
    Received(Result<(), Fault>),
    /// After that: the socket is done with. The error, if that is why.
    Closed(Option<io::Error>),
}

/// At which end of a copy something failed.
enum Fault {
    Source(io::Error),
    Sink(io::Error),
}

/// Carries standard input and output until both directions have ended.
fn carry(fd: OwnedFd, to: &Destination) -> Result<(), Failure> {
    let cannot = |e: io::Error| Failure::io("cannot use standard input and output", &e);
    let input = File::from(io::stdin().as_fd().try_clone_to_owned().map_err(cannot)?);
    let output = take_stdout().map_err(cannot)?;
    let tunnel = Arc::new(Conn::from(fd));
    tunnel.reset_on_close(true);
    let ending = Arc::new(AtomicBool::new(false));
    let (events, happened) = channel();

    let (up, ended, note) = (tunnel.clone(), ending.clone(), events.clone());
    std::thread::spawn(move || {
        let mut sent = copy(&input, &*up);
        if sent.is_ok() {
            ended.store(true, Ordering::SeqCst);
            sent = up.shutdown_write().map_err(Fault::Sink);
        }
        // Main may have ended.
        let _ = note.send(Event::Sent(sent));
    });
    let down = tunnel.clone();
    std::thread::spawn(move || receive(&down, output, &ending, &events));

    let broken = |why: &str| {
        let message = format!("the tunnel to {to} was broken off: {why}");
        Err(Failure::new("broken-off", message))
    };
    // None: not over yet. False: the guest took no more.
    let (mut sent, mut received) = (None, false);
    for event in happened {
        match event {
            Event::Sent(Err(Fault::Source(e))) => {
                return Err(Failure::io("cannot read standard input", &e));
            }
            // Whoever takes no more may still say why.
            Event::Sent(done) => sent = Some(done.is_ok()),
            Event::Received(Err(Fault::Source(e))) => return broken(&e.to_string()),
            Event::Received(Err(Fault::Sink(e))) => return Err(PrintError::from(e).into()),
            Event::Received(Ok(())) => received = true,
            Event::Closed(Some(e)) if sent != Some(true) => return broken(&e.to_string()),
            Event::Closed(_) => break,
        }
        if received && sent.is_some() {
            break;
        }
    }
    if sent == Some(false) {
        return broken("not all was taken of what was sent");
    }
    tunnel.reset_on_close(false);
    Ok(())
}

/// Copies the tunnel to standard output, closes that, and waits for the end of the socket.
fn receive(tunnel: &Conn, output: File, ending: &AtomicBool, events: &Sender<Event>) {
    let mut received = copy(tunnel, &output);
    // A reset of a Unix socket looks so.
    if received.is_ok() && !ending.load(Ordering::SeqCst) && tunnel.is_broken_off() {
        received = Err(Fault::Source(io::ErrorKind::ConnectionReset.into()));
    }
    // Input and output may be one socket, of which closing one descriptor says nothing.
    let _ = rustix::net::shutdown(&output, Shutdown::Write);
    drop(output);
    // Main may have ended; so below.
    let _ = events.send(Event::Received(received));
    let mut fds = [PollFd::new(tunnel, PollFlags::empty())];
    while poll(&mut fds, None) == Err(rustix::io::Errno::INTR) {}
    let error = sockopt::socket_error(tunnel).ok().and_then(Result::err);
    let _ = events.send(Event::Closed(error.map(Into::into)));
}

/// Copies until the end.
fn copy(mut from: impl Read, mut to: impl Write) -> Result<(), Fault> {
    let mut bytes = vec![0; BUFFER];
    loop {
        let got = match from.read(&mut bytes) {
            Ok(0) => return Ok(()),
            Ok(got) => got,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(Fault::Source(e)),
        };
        to.write_all(&bytes[..got]).map_err(Fault::Sink)?;
    }
}

/// Standard output as the one descriptor of it that this process has, so that closing it tells whoever reads.
fn take_stdout() -> io::Result<File> {
    let output = io::stdout().as_fd().try_clone_to_owned()?;
    let nowhere = File::options().write(true).open("/dev/null")?;
    rustix::stdio::dup2_stdout(&nowhere)?;
    Ok(output.into())
}
