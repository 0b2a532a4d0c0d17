//! R109: descriptors that arrive while the descriptor table is full. This test fills the table of its process, so it
//! is the only test in this file.

#[path = "../../host-proxy/port/tests/kinds/mod.rs"]
mod kinds;

use std::io::IoSlice;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use adit_passed::{Closer, receive};
use nix::sys::socket::{ControlMessage, MsgFlags, UnixAddr, sendmsg};
use rustix::net::RecvFlags;

#[test]
fn r109_a_full_table_leaks_none_of_the_installed_descriptors() {
    let (from, to) = UnixStream::pair().unwrap();
    let closer = Closer::default();
    let pid = std::process::id();
    let before = kinds::open_in(pid).len();
    for sent in [1, 4, 200, 253] {
        let raw = vec![from.as_raw_fd(); sent];
        let rights = [ControlMessage::ScmRights(&raw)];
        sendmsg::<UnixAddr>(
            from.as_raw_fd(),
            &[IoSlice::new(&[1, 2])],
            &rights,
            MsgFlags::empty(),
            None,
        )
        .unwrap();
        let limits = rustix::process::getrlimit(rustix::process::Resource::Nofile);
        let room = sent - 1;
        let most = kinds::with_room_for(&kinds::open_in(pid), room);
        let full = rustix::process::Rlimit {
            current: Some(most as u64),
            ..limits
        };
        rustix::process::setrlimit(rustix::process::Resource::Nofile, full).unwrap();
        let got = receive(&to, &mut [0; 8], RecvFlags::empty(), &closer);
        rustix::process::setrlimit(rustix::process::Resource::Nofile, limits).unwrap();
        let got = got.unwrap();
        assert!(got.table_full && !got.cut);
        assert_eq!(got.bytes, 2);
        assert_eq!(got.fds.len(), room);
        drop(got);
        while closer.pending() > 0 {
            std::thread::yield_now();
        }
        assert_eq!(kinds::open_in(pid).len(), before);
    }
}
