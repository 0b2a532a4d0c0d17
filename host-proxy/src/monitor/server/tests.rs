//! A worker that a stranger has taken over, at the other end of the monitor's socket.

use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use adit_passed::Closer;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, send, socketpair};

use super::super::store::Store;
use super::super::wire::{End, Gone, Hello, Reach, RemoveDir, Shorten, Slot, Start};
use super::*;
use crate::spawn::Spawner;

struct Scene {
    run: tempfile::TempDir,
    ours: Arc<Packets>,
    worker: Packets,
    privileged: Arc<Privileged>,
}

impl Scene {
    fn new() -> Self {
        let run = tempfile::tempdir().unwrap();
        std::fs::create_dir(run.path().join("vm")).unwrap();
        let flags = SockFlag::SOCK_CLOEXEC;
        let kind = SockType::SeqPacket;
        let (ours, theirs) = socketpair(AddressFamily::Unix, kind, None, flags).unwrap();
        let privileged = Privileged::new(
            run.path().to_owned(),
            Spawner::start("/bin/false".into()).unwrap(),
            None,
            None,
            Store::default(),
            true,
        );
        Self {
            run,
            ours: Arc::new(Packets::new(ours, Closer::default()).unwrap()),
            worker: Packets::new(theirs, Closer::default()).unwrap(),
            privileged,
        }
    }

    async fn serve(&self) -> Result<(), Fault> {
        serve(self.ours.clone(), self.privileged.clone(), |_| {}).await
    }

    /// Asks while the monitor serves.
    async fn ask(&self, message: Message, fds: &[&dyn AsFd]) -> Message {
        let fds: Vec<_> = fds.iter().map(|fd| fd.as_fd()).collect();
        self.worker.send(7, &message, &fds).await.unwrap();
        tokio::select! {
            done = self.serve() => panic!("given up: {done:?}"),
            answer = self.worker.receive() => {
                let (id, message, _) = answer.unwrap().unwrap();
                assert_eq!(id, 7);
                message
            }
        }
    }
}

fn vm(name: &str) -> adit_names::VmId {
    name.parse().unwrap()
}

fn start(ivshmem_mib: u32) -> Start {
    Start {
        cid: 3,
        busy_poll_us: 0,
        ivshmem_mib,
        allow_any_memory: false,
        hybrid: None,
        kernel: false,
        auto: false,
    }
}

#[tokio::test]
async fn a_worker_that_says_what_is_no_request_is_given_up() {
    let garbage: [&[u8]; 4] = [b"x", &[0xff; 64], &[0; 4096], b"GET / HTTP/1.1\r\n\r\n"];
    for bytes in garbage {
        let scene = Scene::new();
        let raw = scene.worker.as_fd().as_raw_fd();
        send(raw, bytes, MsgFlags::empty()).unwrap();
        let fault = scene.serve().await.unwrap_err();
        assert!(matches!(fault, Fault::Wire(_)), "{fault}");
    }
    // What only a monitor says; and descriptors where none belong.
    let scene = Scene::new();
    let hello = Message::Hello(Hello {});
    scene.worker.send(1, &hello, &[]).await.unwrap();
    let fault = scene.serve().await.unwrap_err();
    assert!(matches!(fault, Fault::Kind(Kind::Hello)), "{fault}");
    let scene = Scene::new();
    let file = std::fs::File::open("/dev/null").unwrap();
    let gone = Message::Gone(Gone { vm: vm("a") });
    let _ = wire::send(&scene.worker, 1, &gone, &[file.as_fd()]);
    let fault = scene.serve().await.unwrap_err();
    assert!(matches!(fault, Fault::Wire(_)), "{fault}");
}

#[tokio::test]
async fn a_worker_that_asks_without_end_is_given_up_and_one_that_reads_no_answer_too() {
    let scene = Scene::new();
    let ask = Message::Shorten(Shorten { vm: vm("a") });
    let flood = async {
        loop {
            if scene.worker.send(1, &ask, &[]).await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    };
    let reads = async { while scene.worker.receive().await.is_ok() {} };
    let fault = tokio::select! {
        done = scene.serve() => done.unwrap_err(),
        () = flood => unreachable!(),
        () = reads => unreachable!(),
    };
    assert!(matches!(fault, Fault::Flood), "{fault}");
    let scene = Scene::new();
    let flood = async {
        loop {
            if scene.worker.send(1, &ask, &[]).await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    };
    let fault = tokio::select! {
        done = scene.serve() => done.unwrap_err(),
        () = flood => unreachable!(),
    };
    assert!(matches!(fault, Fault::Flood), "{fault}");
}

#[test]
fn as_many_vms_as_there_may_be_can_start_at_once() {
    let now = Instant::now();
    let mut budget = Budget {
        left: BURST_MAX,
        since: now,
    };
    // A place, a connection, and what was found.
    for _ in 0..3 * VMS_MAX {
        budget.take(now).unwrap();
    }
    while budget.take(now).is_ok() {}
    budget.take(now + Duration::from_secs(1)).unwrap();
}

#[tokio::test]
async fn settings_that_no_configuration_may_have_start_nothing() {
    let scene = Scene::new();
    let mut wrong = vec![start(3), start(0), start(1 << 20)];
    wrong.push(Start { cid: 2, ..start(4) });
    wrong.push(Start {
        busy_poll_us: u32::MAX,
        ..start(4)
    });
    for start in wrong {
        let ask = Message::Reach(Reach { vm: vm("a"), start });
        let answer = scene.ask(ask, &[]).await;
        assert!(matches!(answer, Message::NotReached(_)), "{answer:?}");
    }
    assert!(!scene.run.path().join("vm/a").exists());
    // What a new port process would read is a socket of packets, or it is not started: another file could keep the thread that
    // starts them from closing it.
    let file = std::fs::File::open("/dev/null").unwrap();
    let ask = Message::Reach(Reach {
        vm: vm("a"),
        start: start(4),
    });
    let answer = scene.ask(ask, &[&file]).await;
    assert!(matches!(answer, Message::NotReached(_)), "{answer:?}");
    assert!(!scene.run.path().join("vm/a").exists());
}

#[tokio::test]
async fn no_process_is_ended_but_a_port_process_of_that_vm() {
    let scene = Scene::new();
    let mut other = std::process::Command::new("sleep")
        .arg("1000")
        .spawn()
        .unwrap();
    // Also where it is noted as the one that has the directory: its user is not the VM's.
    let dir = scene.run.path().join("vm/a");
    std::fs::create_dir(&dir).unwrap();
    let note = format!("{} 1\n", other.id());
    std::fs::write(dir.join(adit_port::born::NOTE), note).unwrap();
    for pid in [other.id(), std::process::id(), 0, 1, u32::MAX] {
        let ask = Message::End(End {
            vm: vm("a"),
            pid,
            within_ms: 0,
        });
        let answer = scene.ask(ask, &[]).await;
        assert!(matches!(answer, Message::Done(_)), "{answer:?}");
    }
    assert!(other.try_wait().unwrap().is_none(), "it was ended");
    other.kill().unwrap();
    other.wait().unwrap();
}

/// A request goes on when its worker is gone, and the next worker may ask as much again.
#[tokio::test(start_paused = true)]
async fn nobody_waits_long_for_a_process_that_does_not_end() {
    let scene = Scene::new();
    let dir = scene.run.path().join("vm/a");
    std::fs::create_dir(&dir).unwrap();
    let listener = control_listener(&dir);
    let reached = scene.privileged.clone().reach(vm("a"), start(4), None);
    assert!(!reached.await.unwrap().ours);
    let begin = tokio::time::Instant::now();
    let ask = Message::End(End {
        vm: vm("a"),
        pid: std::process::id(),
        within_ms: u32::MAX,
    });
    let answer = scene.ask(ask, &[]).await;
    assert!(matches!(answer, Message::Done(_)), "{answer:?}");
    assert!(begin.elapsed() < 2 * END_MAX);
    drop(listener);
}

/// Where a VMM of this user would listen.
fn control_listener(dir: &Path) -> OwnedFd {
    use nix::sys::socket::{Backlog, UnixAddr, bind, listen, socket};
    let listener = socket(
        AddressFamily::Unix,
        SockType::SeqPacket,
        SockFlag::SOCK_CLOEXEC,
        None,
    )
    .unwrap();
    let at = UnixAddr::new(&dir.join(adit_port::control::CONTROL_SOCKET)).unwrap();
    bind(listener.as_raw_fd(), &at).unwrap();
    listen(&listener, Backlog::new(4).unwrap()).unwrap();
    listener
}

#[tokio::test]
async fn nothing_outside_of_the_vms_directories_is_removed_or_read() {
    let scene = Scene::new();
    let outside = scene.run.path().join("outside");
    std::fs::create_dir(&outside).unwrap();
    std::fs::write(outside.join("port.log"), "x".repeat(3 << 20)).unwrap();
    std::os::unix::fs::symlink(&outside, scene.run.path().join("vm/a")).unwrap();
    let answer = scene
        .ask(Message::RemoveDir(RemoveDir { vm: vm("a") }), &[])
        .await;
    assert!(matches!(answer, Message::Refused(_)), "{answer:?}");
    let dir = scene.run.path().join("vm/b");
    std::fs::create_dir(&dir).unwrap();
    std::os::unix::fs::symlink(outside.join("port.log"), dir.join("port.log")).unwrap();
    scene
        .ask(Message::Shorten(Shorten { vm: vm("b") }), &[])
        .await;
    let len = |path: &Path| std::fs::metadata(path).unwrap().len();
    assert_eq!(len(&outside.join("port.log")), 3 << 20);
}

#[tokio::test]
async fn names_are_as_many_as_there_may_be_vms_and_no_more() {
    use super::super::privileged::NAMES_MAX;
    let scene = Scene::new();
    let mut refused = None;
    for n in 0..=NAMES_MAX {
        // Nothing of the answer is kept: descriptors are few.
        let name = vm(&format!("vm-{n}"));
        match scene.privileged.ended(&name).await {
            Ok(_) => {}
            Err(e) => refused = Some((n, e)),
        }
    }
    let (n, e) = refused.unwrap();
    assert!(n == NAMES_MAX && matches!(e, NotDone::TooMany), "{e}");
}

/// What waits in a VM's pair outlives the worker that put it there.
#[tokio::test]
async fn a_vms_place_is_the_same_for_the_next_worker_until_nobody_asks_for_it() {
    let scene = Scene::new();
    let ends = |scene: &Scene| scene.privileged.slot(&vm("a")).unwrap().unwrap();
    let [first, _] = ends(&scene);
    send(first.as_raw_fd(), b"kept", MsgFlags::empty()).unwrap();
    drop(first);
    let read = |end: OwnedFd| {
        let mut text = [0; 8];
        let n = std::fs::File::from(end).read(&mut text).unwrap_or(0);
        text[..n].to_vec()
    };
    scene.privileged.begin();
    let answer = scene.ask(Message::Slot(Slot { vm: vm("a") }), &[]).await;
    assert!(matches!(answer, Message::HasSlot(_)), "{answer:?}");
    scene.privileged.forget_others();
    let [_, second] = ends(&scene);
    assert_eq!(read(second), b"kept");
    let [first, _] = ends(&scene);
    send(first.as_raw_fd(), b"lost", MsgFlags::empty()).unwrap();
    // The next worker has no such VM.
    scene.privileged.begin();
    scene.privileged.forget_others();
    let [_, third] = ends(&scene);
    assert_eq!(read(third), b"");
}

/// A monitor that found its worker keeps what that passes, if it is what it should be.
#[tokio::test]
async fn only_socket_pairs_are_kept_for_a_worker_that_was_found() {
    let scene = Scene::new();
    let file = std::fs::File::open("/dev/null").unwrap();
    let two: [OwnedFd; 2] = [file.try_clone().unwrap().into(), file.into()];
    let passed = two.map(|fd| Passed::new(fd, scene.ours.closer()));
    scene.privileged.keep(&vm("a"), passed.into()).unwrap_err();
    let (a, b) = std::os::unix::net::UnixStream::pair().unwrap();
    let passed = [a, b].map(|fd| Passed::new(fd.into(), scene.ours.closer()));
    scene.privileged.keep(&vm("a"), passed.into()).unwrap_err();
}
