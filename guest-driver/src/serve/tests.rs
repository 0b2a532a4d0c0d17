//! Hello and relay end to end: a real listener, real local TCP servers, the host's end played by the test.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener};
use std::os::unix::net::UnixStream;
use std::path::Path;

use adit_channel::hello::Open;
use adit_channel::refusal::Code;

use super::*;
use crate::config::NamedService;
use crate::transport::{Transport, UnixDir};

fn start(ports: Vec<u16>) -> (tempfile::TempDir, Arc<Server>) {
    let dir = tempfile::tempdir().unwrap();
    let identity = Arc::new(Identity {
        boot_nonce: [5; 16],
        epoch: AtomicU64::new(0),
        admission: Default::default(),
    });
    let server = Server::new(ports, blob::store(dir.path()), None, identity);
    let transport = UnixDir(dir.path().into());
    let listener = transport.listen().unwrap();
    let run = server.clone();
    thread::spawn(move || run.run(&*listener));
    (dir, server)
}

fn open(dir: &Path, service: &str) -> (Hello, UnixStream) {
    open_with(dir, service, 0)
}

fn open_with(dir: &Path, service: &str, features: u64) -> (Hello, UnixStream) {
    let mut s = UnixStream::connect(dir.join("guest.sock")).unwrap();
    let common = Common {
        features,
        epoch: 9,
        boot_nonce: [1; 16],
    };
    s.write_all(&Hello::Open(Open::new(service.parse().unwrap(), common)).encode())
        .unwrap();
    (hello::read(&mut s).unwrap(), s)
}

fn echo_server() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        for tcp in listener.incoming() {
            let tcp = tcp.unwrap();
            let _ = io::copy(&mut &tcp, &mut &tcp);
            let _ = tcp.shutdown(Shutdown::Write);
        }
    });
    port
}

#[test]
fn an_allowed_port_is_relayed_and_the_epoch_is_echoed() {
    let port = echo_server();
    let (dir, _) = start(vec![port]);
    let (answer, mut s) = open(dir.path(), &format!("tcp:{port}"));
    let Hello::Accept(accept) = answer else {
        panic!("{answer:?}")
    };
    assert_eq!(
        (
            accept.common.epoch,
            accept.common.boot_nonce,
            accept.version
        ),
        (9, [5; 16], hello::VERSION)
    );
    s.write_all(b"over the channel").unwrap();
    s.shutdown(Shutdown::Write).unwrap();
    let mut got = String::new();
    s.read_to_string(&mut got).unwrap();
    assert_eq!(got, "over the channel");
}

#[test]
fn refusals_name_their_class() {
    let closed = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let (dir, _) = start(vec![closed]);
    let refusal = |service: &str| match open(dir.path(), service).0 {
        Hello::Refuse(r) => (r.refusal.code(), i32::from(r.refusal.errno())),
        other => panic!("{other:?}"),
    };
    assert_eq!(
        refusal(&format!("tcp:{closed}")),
        (Code::DialFailed, libc::ECONNREFUSED)
    );
    assert_eq!(refusal("tcp:1"), (Code::Denied, 0));
    for unknown in [
        "ssh",
        "tcp:",
        "tcp:0",
        "tcp:080",
        "tcp:65536",
        "tcp:-1",
        "udp:53",
    ] {
        assert_eq!(refusal(unknown), (Code::UnknownService, 0), "{unknown}");
    }
}

#[test]
fn a_service_with_a_name_is_what_the_configuration_says_and_no_other() {
    let (dir, server) = start(vec![]);
    let socket = dir.path().join("docker.sock");
    let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    thread::spawn(move || {
        for client in listener.incoming() {
            let client = client.unwrap();
            let _ = io::copy(&mut &client, &mut &client);
            let _ = client.shutdown(Shutdown::Write);
        }
    });
    let (port, closed) = (echo_server(), dir.path().join("closed.sock"));
    drop(std::os::unix::net::UnixListener::bind(&closed).unwrap());
    let service = |name: &str, to: &str| NamedService {
        name: name.parse().unwrap(),
        to: to.parse().unwrap(),
    };
    let unix = |path: &Path| format!("unix:{}", path.display());
    let nobody = dir.path().join("nobody.sock");
    let services = vec![
        service("docker", &unix(&socket)),
        service("web", &format!("tcp:{port}")),
        service("closed", &unix(&closed)),
        service("gone", &unix(&nobody)),
    ];
    let refused = |service: &str| match open(dir.path(), service).0 {
        Hello::Refuse(r) => (r.refusal.code(), r.refusal.text().to_owned()),
        other => panic!("{other:?}"),
    };
    assert_eq!(refused("svc:docker").0, Code::Denied);
    server.offer(services);
    for name in ["svc:docker", "svc:web"] {
        let (answer, mut s) = open(dir.path(), name);
        assert!(matches!(answer, Hello::Accept(_)), "{answer:?}");
        s.write_all(b"to a name").unwrap();
        s.shutdown(Shutdown::Write).unwrap();
        let mut got = String::new();
        s.read_to_string(&mut got).unwrap();
        assert_eq!(got, "to a name");
    }
    assert_eq!(refused("svc:closed").0, Code::DialFailed);
    assert_eq!(refused("svc:gone").0, Code::DialFailed);
    let (code, text) = refused("svc:other");
    assert_eq!(code, Code::Denied);
    assert!(
        text.contains("[[service]]") && text.contains("`other`"),
        "{text}"
    );
    // A port of one is no port of all.
    assert_eq!(refused(&format!("tcp:{port}")).0, Code::Denied);
    let (_, mut open_one) = open(dir.path(), "svc:docker");
    server.offer(vec![]);
    assert_eq!(refused("svc:docker").0, Code::Denied);
    open_one.write_all(b"goes on").unwrap();
    open_one.shutdown(Shutdown::Write).unwrap();
    let mut got = String::new();
    open_one.read_to_string(&mut got).unwrap();
    assert_eq!(got, "goes on");
}

/// A listener whose backlog is full would hold the stream's thread for as long as nobody accepts.
#[test]
fn a_socket_that_nobody_accepts_on_is_given_up_in_time() {
    use nix::sys::socket::{
        AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket,
    };
    use std::os::fd::AsRawFd;
    let (dir, server) = start(vec![]);
    let path = dir.path().join("full.sock");
    let full = socket(
        AddressFamily::Unix,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC,
        None,
    )
    .unwrap();
    bind(full.as_raw_fd(), &UnixAddr::new(&path).unwrap()).unwrap();
    listen(&full, Backlog::new(0).unwrap()).unwrap();
    let _first = UnixStream::connect(&path).unwrap();
    let name = "full".parse().unwrap();
    let to = format!("unix:{}", path.display()).parse().unwrap();
    server.offer(vec![NamedService { name, to }]);
    let mut s = UnixStream::connect(dir.path().join("guest.sock")).unwrap();
    let open = Open {
        deadline_ms: 50,
        ..Open::new("svc:full".parse().unwrap(), Common::default())
    };
    s.write_all(&Hello::Open(open).encode()).unwrap();
    let answer = hello::read(&mut s).unwrap();
    assert!(
        matches!(&answer, Hello::Refuse(r) if r.refusal.code() == Code::DialTimedOut),
        "{answer:?}"
    );
}

#[test]
fn a_version_nobody_speaks_is_refused() {
    let (dir, _) = start(vec![80]);
    let mut s = UnixStream::connect(dir.path().join("guest.sock")).unwrap();
    let open = Open {
        version_min: 7,
        version_max: 9,
        ..Open::new("tcp:80".parse().unwrap(), Common::default())
    };
    s.write_all(&Hello::Open(open).encode()).unwrap();
    assert!(matches!(
        hello::read(&mut s).unwrap(),
        Hello::Refuse(r) if r.refusal.code() == Code::Version
    ));
}

/// What a hello carries besides is for the service that it names, and for no other.
#[test]
fn a_hello_full_of_extensions_is_served_as_one_without() {
    let (dir, _) = start(vec![]);
    let bare = Hello::Open(Open::new("ping".parse().unwrap(), Common::default())).encode();
    let mut full = bare.clone();
    let mut tail = bare.len() - hello::PREFIX_LEN;
    while tail + 4 <= hello::TAIL_MAX {
        full.extend_from_slice(&[0x33, 0x44, 0, 0]);
        tail += 4;
    }
    full[10..12].copy_from_slice(&(tail as u16).to_le_bytes());
    for hello in [bare, full] {
        let mut s = UnixStream::connect(dir.path().join("guest.sock")).unwrap();
        s.write_all(&hello).unwrap();
        assert!(matches!(hello::read(&mut s).unwrap(), Hello::Accept(_)));
        s.write_all(b"there?").unwrap();
        s.shutdown(Shutdown::Write).unwrap();
        let mut got = String::new();
        s.read_to_string(&mut got).unwrap();
        assert_eq!(got, "there?");
    }
}

#[test]
fn foreign_bytes_end_the_stream_and_nothing_else() {
    let port = echo_server();
    let (dir, _) = start(vec![port]);
    for hostile in [
        &b"GET / HTTP/1.1\r\n\r\n"[..],
        b"",
        &[0xff; 4096],
        b"ADIT\r\n\x1a\n\x01",
    ] {
        let mut s = UnixStream::connect(dir.path().join("guest.sock")).unwrap();
        let _ = s.write_all(hostile);
        let _ = s.shutdown(Shutdown::Write);
        let mut got = Vec::new();
        let _ = s.read_to_end(&mut got);
        assert!(got.is_empty());
    }
    assert!(matches!(
        open(dir.path(), &format!("tcp:{port}")).0,
        Hello::Accept(_)
    ));
}

#[test]
fn two_thousand_connections_in_succession_leave_no_slot_behind() {
    let port = echo_server();
    let (dir, server) = start(vec![port]);
    for i in 0..2000u32 {
        let (answer, mut s) = open(dir.path(), &format!("tcp:{port}"));
        assert!(matches!(answer, Hello::Accept(_)), "{i}: {answer:?}");
        s.write_all(&i.to_le_bytes()).unwrap();
        s.shutdown(Shutdown::Write).unwrap();
        let mut got = Vec::new();
        s.read_to_end(&mut got).unwrap();
        assert_eq!(got, i.to_le_bytes());
    }
    while server.active.load(Ordering::Relaxed) != 0 {
        thread::yield_now();
    }
}

#[test]
fn streams_over_the_limit_are_refused_as_busy_until_one_ends() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let service = format!("tcp:{}", listener.local_addr().unwrap().port());
    thread::spawn(move || listener.incoming().map(Result::unwrap).collect::<Vec<_>>());
    let (dir, server) = start(vec![service[4..].parse().unwrap()]);
    let held: Vec<_> = (0..CONNS_MAX)
        .map(|_| match open(dir.path(), &service) {
            (Hello::Accept(_), s) => s,
            (other, _) => panic!("{other:?}"),
        })
        .collect();
    let mut s = UnixStream::connect(dir.path().join("guest.sock")).unwrap();
    assert!(matches!(
        hello::read(&mut s).unwrap(),
        Hello::Refuse(r) if r.refusal.code() == Code::Busy
    ));
    drop(held);
    // The servers behind keep their ends open: the host's hang-up alone frees the slots.
    while server.active.load(Ordering::Relaxed) != 0 {
        thread::yield_now();
    }
    assert!(matches!(open(dir.path(), &service).0, Hello::Accept(_)));
}

#[test]
fn r72_a_trace_is_shown_only_if_it_is_one() {
    let with = |trace: &[u8]| {
        let mut open = Open::new("ping".parse().unwrap(), Common::default());
        open.extensions.trace = trace.to_vec().try_into().unwrap();
        super::trace(&open).to_owned()
    };
    let good = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    assert_eq!(with(good.as_bytes()), good);
    let mut hostile = good.as_bytes().to_vec();
    hostile[9] = 0x1b;
    for none in [&b""[..], &hostile, &good.as_bytes()[1..], &[0xff; 55]] {
        assert_eq!(with(none), "-");
    }
}

#[test]
fn chunks_are_spoken_where_the_hello_offers_them_and_no_other_feature_is_taken() {
    let port = echo_server();
    let (dir, _) = start(vec![port]);
    let said = [1, 2, 0, 0, b'h', b'i', 2, 0, 0, 0];
    for service in [format!("tcp:{port}"), "ping".into()] {
        for (offered, taken) in [(0, 0), (6, 0), (1, 1), (7, 1)] {
            let (answer, mut s) = open_with(dir.path(), &service, offered);
            let Hello::Accept(accept) = answer else {
                panic!("{answer:?}");
            };
            assert_eq!(accept.common.features, taken);
            s.write_all(&said).unwrap();
            let mut back = Vec::new();
            if taken == 0 {
                s.shutdown(Shutdown::Write).unwrap();
            }
            s.read_to_end(&mut back).unwrap();
            // As they are, they come back as they are.
            assert_eq!(back, said, "{service} {offered}");
        }
    }
}
