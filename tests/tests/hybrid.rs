//! aditd with the real port process, and a VMM that has a socket for each stream (scripted), with the agent's real server behind it.
//!
//! These tests need the binaries that `cargo xtask test` builds. Without them they print that and pass.
#![allow(missing_docs)]

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::Duration;

use adit_channel::hello::{Common, Hello, HostKey, Open};
use adit_channel::refusal::Code;
use adit_channel::socket_end;
use adit_tests::host::Host;
use adit_tests::hybrid::{Kind, Vmm};
use adit_tests::process::wait_for;

const SOON: Duration = Duration::from_secs(20);

fn bins() -> Option<PathBuf> {
    let bins = std::env::var_os("ADIT_TEST_BINS").map(PathBuf::from);
    if bins.is_none() {
        println!(
            "skipped: ADIT_TEST_BINS is not set; `cargo xtask test` builds what is needed and sets it"
        );
    }
    bins
}

/// A server of the guest that sends back what it gets, and ends when its client has ended. Returns its port.
fn echo() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for client in listener.incoming().flatten() {
            std::thread::spawn(move || {
                let (mut from, mut to) = (&client, &client);
                let _ = std::io::copy(&mut from, &mut to);
                let _ = client.shutdown(Shutdown::Write);
            });
        }
    });
    port
}

struct World {
    host: Host,
    dir: tempfile::TempDir,
    port: u16,
}

impl World {
    fn new(bins: &std::path::Path, kind: Kind) -> Self {
        Self::serving(bins, kind, echo())
    }

    /// With a server of the guest on this port.
    fn serving(bins: &std::path::Path, kind: Kind, port: u16) -> Self {
        Self::said_to(bins, kind == Kind::Keeps, port)
    }

    /// `half_closes`: what the configuration says of the VMM.
    fn said_to(bins: &std::path::Path, half_closes: bool, port: u16) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let config = format!(
            "[proxy]\nlisten = \"127.0.0.1:0\"\n[[grant]]\nto = [\"anyone\"]\nvms = [\"*\"]\nmay = [\"reach\", \"see\"]\n\
             [[vm]]\nname = \"a\"\ncid = 3\nallow = [{port}]\nallow_vsock = [5]\n\
             carrier = {{ hybrid = \"{}\", half_closes = {half_closes} }}\n",
            dir.path().join("v.sock").display()
        );
        let host = Host::start_configured(bins, &config).unwrap();
        Self { host, dir, port }
    }

    fn vmm(&self, kind: Kind) -> Vmm {
        Vmm::start(&self.dir.path().join("v.sock"), kind, &[self.port]).unwrap()
    }

    fn agent(&self, vmm: &Vmm) -> std::os::unix::net::UnixStream {
        let stream = wait_for("the agent's stream", SOON, || Ok(vmm.agent_stream().ok()));
        stream.unwrap_or_else(|e| panic!("{e:#}\n{}\n{}", self.host.log(), self.host.port_log("a")))
    }

    fn tunnel(&self) -> TcpStream {
        let tunnel = wait_for("a tunnel", SOON, || {
            Ok(connect(self.host.proxy(), self.port).ok())
        });
        tunnel.unwrap_or_else(|e| {
            panic!(
                "{e:#} {:?}\n{}\n{}",
                connect(self.host.proxy(), self.port),
                self.host.log(),
                self.host.port_log("a")
            )
        })
    }

    fn show(&self) -> serde_json::Value {
        let run = self.host.vm_dir("a");
        let socket = run.ancestors().nth(2).unwrap().join("aditd.sock");
        let mut api = std::os::unix::net::UnixStream::connect(socket).unwrap();
        api.write_all(b"GET /v1/vms/a HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
            .unwrap();
        let mut answer = String::new();
        api.read_to_string(&mut answer).unwrap();
        let (_, body) = answer.split_once("\r\n\r\n").unwrap();
        serde_json::from_str(body).unwrap()
    }

    fn port_pid(&self) -> Option<u64> {
        self.show()["port_pid"].as_u64()
    }
}

/// A CONNECT through the proxy; what was answered, if it is refused.
fn connect(proxy: SocketAddr, port: u16) -> Result<TcpStream, String> {
    let ask = || -> std::io::Result<(TcpStream, Vec<u8>)> {
        let mut client = TcpStream::connect(proxy)?;
        client.set_read_timeout(Some(SOON))?;
        client.write_all(format!("CONNECT a:{port} HTTP/1.1\r\nHost: a\r\n\r\n").as_bytes())?;
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            client.read_exact(&mut byte)?;
            head.push(byte[0]);
        }
        Ok((client, head))
    };
    let (client, head) = ask().map_err(|e| e.to_string())?;
    match head.starts_with(b"HTTP/1.1 200 ") {
        true => Ok(client),
        false => Err(String::from_utf8_lossy(&head).into_owned()),
    }
}

fn goes_on(mut tunnel: &TcpStream) {
    tunnel.write_all(b"there and back").unwrap();
    let mut back = [0; 14];
    tunnel.read_exact(&mut back).unwrap();
    assert_eq!(&back, b"there and back");
}

#[test]
fn a_vm_with_a_socket_for_each_stream_is_served_as_it_is() {
    let Some(bins) = bins() else { return };
    for kind in [Kind::Closes, Kind::Keeps] {
        let world = World::new(&bins, kind);
        let shown = wait_for("the port process", SOON, || {
            let shown = world.show();
            let fault = shown["fault"].as_str().unwrap_or_default();
            Ok(fault.contains("has not made").then_some(shown))
        });
        let path = world.dir.path().join("v.sock").display().to_string();
        assert_eq!(shown.unwrap()["carrier"]["hybrid"], path.as_str());
        let vmm = world.vmm(kind);
        let _agent = world.agent(&vmm);
        let mut tunnel = world.tunnel();
        goes_on(&tunnel);
        let big: Vec<u8> = (0..1_000_000u32).map(|i| (i % 251) as u8).collect();
        let (mut sender, sent) = (tunnel.try_clone().unwrap(), big.clone());
        let sending = std::thread::spawn(move || sender.write_all(&sent).unwrap());
        let mut back = vec![0; big.len()];
        tunnel.read_exact(&mut back).unwrap();
        assert!(back == big);
        sending.join().unwrap();
        // The guest's server sees the client's end, by chunks where the VMM does not pass it on, and answers behind it.
        tunnel.write_all(b"last").unwrap();
        tunnel.shutdown(Shutdown::Write).unwrap();
        let mut rest = Vec::new();
        tunnel.read_to_end(&mut rest).unwrap();
        assert_eq!(rest, b"last");
        let why = world.show()["carrier"]["why"].to_string();
        assert_eq!(why.contains("chunks carry"), kind == Kind::Closes, "{why}");
    }
}

#[test]
fn what_is_said_of_the_vmms_half_closes_is_tried_when_the_agent_comes() {
    let Some(bins) = bins() else { return };
    for (kind, says) in [
        (Kind::Closes, "does not pass half-closes on"),
        (Kind::Keeps, "as was tried"),
    ] {
        let world = World::said_to(&bins, true, echo());
        let vmm = world.vmm(kind);
        let _agent = world.agent(&vmm);
        let shown = wait_for(says, SOON, || {
            let vm = world.show();
            let said = format!("{} {}", vm["carrier"]["why"], vm["fault"]);
            Ok(said.contains(says).then_some(said))
        });
        shown.unwrap_or_else(|e| panic!("{kind:?}: {e:#}\n{}\n{}", world.show(), world.host.log()));
        let is_fault = world.show()["faults"].to_string().contains("carrier");
        assert_eq!(is_fault, kind == Kind::Closes, "{}", world.show());
    }
}

/// A server of the guest that does this with each client.
fn server(serve: fn(TcpStream)) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for client in listener.incoming().flatten() {
            std::thread::spawn(move || serve(client));
        }
    });
    port
}

fn word(mut from: &TcpStream) -> [u8; 4] {
    let mut word = [0; 4];
    from.read_exact(&mut word).unwrap();
    word
}

#[test]
fn r117_each_end_arrives_while_the_other_direction_goes_on() {
    let Some(bins) = bins() else { return };
    for kind in [Kind::Closes, Kind::Keeps] {
        // The client ends first, and the answer is long.
        let port = server(|mut guest| {
            let mut asked = Vec::new();
            guest.read_to_end(&mut asked).unwrap();
            guest.write_all(&asked.repeat(200_000)).unwrap();
        });
        let world = World::serving(&bins, kind, port);
        let vmm = world.vmm(kind);
        let _agent = world.agent(&vmm);
        let mut tunnel = world.tunnel();
        tunnel.write_all(b"question").unwrap();
        tunnel.shutdown(Shutdown::Write).unwrap();
        let mut answer = Vec::new();
        tunnel.read_to_end(&mut answer).unwrap();
        assert!(answer == b"question".repeat(200_000), "{kind:?}");
        // The guest ends first, and hears all that comes after it: it says so on the next connection.
        static HEARD: Mutex<Vec<u8>> = Mutex::new(Vec::new());
        let port = server(|mut guest| {
            guest.write_all(b"done").unwrap();
            guest.shutdown(Shutdown::Write).unwrap();
            let mut heard = Vec::new();
            guest.read_to_end(&mut heard).unwrap();
            *HEARD.lock().unwrap() = heard;
        });
        HEARD.lock().unwrap().clear();
        let world = World::serving(&bins, kind, port);
        let vmm = world.vmm(kind);
        let _agent = world.agent(&vmm);
        let mut tunnel = world.tunnel();
        let mut said = Vec::new();
        tunnel.read_to_end(&mut said).unwrap();
        assert_eq!(said, b"done");
        let long = b"and more".repeat(100_000);
        tunnel.write_all(&long).unwrap();
        tunnel.shutdown(Shutdown::Write).unwrap();
        let heard = wait_for("what the client sent", SOON, || {
            let heard = HEARD.lock().unwrap().clone();
            Ok((!heard.is_empty()).then_some(heard))
        });
        assert!(heard.unwrap() == long, "{kind:?}");
    }
}

#[test]
fn r117_what_is_broken_off_on_one_side_is_reset_on_the_other() {
    let Some(bins) = bins() else { return };
    static ENDS: Mutex<Vec<Result<usize, ErrorKind>>> = Mutex::new(Vec::new());
    let port = server(|mut guest| {
        match &word(&guest) {
            b"stop" => {
                guest.write_all(b"half").unwrap();
                socket_end::reset_on_close(&guest, true);
            }
            _ => {
                guest.write_all(b"half").unwrap();
                let end = guest.read(&mut [0]).map_err(|e| e.kind());
                ENDS.lock().unwrap().push(end);
            }
        };
    });
    for kind in [Kind::Closes, Kind::Keeps] {
        let world = World::serving(&bins, kind, port);
        let vmm = world.vmm(kind);
        let _agent = world.agent(&vmm);
        // The guest's server breaks off.
        let mut tunnel = world.tunnel();
        tunnel.write_all(b"stop").unwrap();
        let mut said = Vec::new();
        let end = tunnel.read_to_end(&mut said).map_err(|e| e.kind());
        assert!(b"half".starts_with(&said[..]), "{said:?}");
        assert_eq!(end, Err(ErrorKind::ConnectionReset), "{kind:?}");
        // The client does.
        let mut tunnel = world.tunnel();
        tunnel.write_all(b"wait").unwrap();
        assert_eq!(&word(&tunnel), b"half");
        socket_end::reset_on_close(&tunnel, true);
        drop(tunnel);
        let end = wait_for("the end at the guest's server", SOON, || {
            Ok(ENDS.lock().unwrap().pop())
        });
        assert_eq!(end.unwrap(), Err(ErrorKind::ConnectionReset), "{kind:?}");
        // So does the port process that is killed in the middle: neither side sees an end.
        let mut tunnel = world.tunnel();
        tunnel.write_all(b"wait").unwrap();
        assert_eq!(&word(&tunnel), b"half");
        let pid = i32::try_from(world.port_pid().unwrap()).unwrap();
        let pid = nix::unistd::Pid::from_raw(pid);
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
        let end = tunnel.read(&mut [0]).map_err(|e| e.kind());
        assert_eq!(end, Err(ErrorKind::ConnectionReset), "{kind:?}");
        let end = wait_for("the end at the guest's server", SOON, || {
            Ok(ENDS.lock().unwrap().pop())
        });
        assert_eq!(end.unwrap(), Err(ErrorKind::ConnectionReset), "{kind:?}");
    }
}

#[test]
fn tunnels_outlive_aditd_and_a_killed_port_process_is_back() {
    let Some(bins) = bins() else { return };
    let mut world = World::new(&bins, Kind::Closes);
    let vmm = world.vmm(Kind::Closes);
    let agent = world.agent(&vmm);
    let tunnel = world.tunnel();
    world.host.kill();
    goes_on(&tunnel);
    drop(agent);
    vmm.identity.admission.ended();
    world.host.launch().unwrap();
    let _agent = world.agent(&vmm);
    goes_on(&world.tunnel());
    goes_on(&tunnel);
    let pid = world.port_pid().unwrap();
    let raw = nix::unistd::Pid::from_raw(i32::try_from(pid).unwrap());
    nix::sys::signal::kill(raw, nix::sys::signal::Signal::SIGKILL).unwrap();
    vmm.identity.admission.ended();
    wait_for("another port process", SOON, || {
        Ok(world.port_pid().filter(|new| *new != pid))
    })
    .unwrap();
    let _agent = world.agent(&vmm);
    goes_on(&world.tunnel());
}

#[test]
fn whoever_else_may_open_the_vmms_socket_is_refused_by_the_agent() {
    let Some(bins) = bins() else { return };
    let world = World::new(&bins, Kind::Closes);
    let vmm = world.vmm(Kind::Closes);
    vmm.identity.admission.require(true);
    let open = |service: &str, key: Option<[u8; 32]>| {
        let mut open = Open::new(service.parse().unwrap(), Common::default());
        open.mac = key.map(|key| HostKey::new(key).mac(&open, 1));
        open
    };
    let port = format!("tcp:{}", world.port);
    let refused = |key| match vmm.dial_as_stranger(open(&port, key)).unwrap() {
        // It learns nothing of the guest, either: by the nonce it could pass for the agent.
        Hello::Refuse(refuse) => {
            refuse.refusal.code() == Code::Denied && refuse.common.boot_nonce == [0; 16]
        }
        other => panic!("{other:?}"),
    };
    assert!(refused(None) && refused(Some([1; 32])));
    let _agent = world.agent(&vmm);
    goes_on(&world.tunnel());
    assert!(refused(None) && refused(Some([1; 32])));
    let ping = vmm.dial_as_stranger(open("ping", None)).unwrap();
    assert!(matches!(ping, Hello::Refuse(_)), "{ping:?}");
    goes_on(&world.tunnel());
}

#[test]
fn r59_a_process_of_the_guest_that_is_not_its_agent_gets_no_key() {
    let Some(bins) = bins() else { return };
    let world = World::new(&bins, Kind::Closes);
    let vmm = world.vmm(Kind::Closes);
    let agent = world.agent(&vmm);
    let said = vmm.claim_agent([7; 16]).map(drop).unwrap_err();
    assert!(format!("{said:#}").contains("Refuse"), "{said:#}");
    // The agent's own stream and key are what they were.
    goes_on(&world.tunnel());
    drop(agent);
}

/// `carrier = "auto"`: no VMM, one with a socket for each stream, none, and the same again.
#[test]
fn whichever_way_there_is_is_taken_and_shown_with_its_reason() {
    let Some(bins) = bins() else { return };
    if std::path::Path::new("/sys/class/misc/vhost-vsock").exists() {
        println!(
            "skipped: this kernel has vhost_vsock, and no test makes a socket of AF_VSOCK on the machine itself"
        );
        return;
    }
    let port = echo();
    let config = format!(
        "[proxy]\nlisten = \"127.0.0.1:0\"\n[[grant]]\nto = [\"anyone\"]\nvms = [\"*\"]\nmay = [\"reach\", \"see\"]\n\
         [[vm]]\nname = \"a\"\ncid = 3\nallow = [{port}]\ncarrier = \"auto\"\n"
    );
    let host = Host::start_configured(&bins, &config).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let mut world = World { host, dir, port };
    let shown = |world: &World, way: Option<&str>, why: &str| {
        let found = wait_for("the way", SOON, || {
            let carrier = world.show()["carrier"].clone();
            let reason = carrier["way_why"].as_str().unwrap_or_default().to_owned();
            let is_it = carrier["way"].as_str() == way && reason.contains(why);
            Ok(is_it.then_some(carrier))
        });
        found.unwrap_or_else(|e| panic!("{e:#}: {} {}", world.show(), world.host.port_log("a")))
    };
    let none = shown(
        &world,
        None,
        "`auto`: nothing yet; no VMM is connected to vhost.sock; ",
    );
    assert!(
        none["way_why"].as_str().unwrap().contains("vhost_vsock"),
        "{none}"
    );
    assert_eq!(none["costs"], serde_json::Value::Null);
    let text = world.host.adit(&["vm", "show", "a"]).unwrap();
    let text = String::from_utf8_lossy(&text.stdout).into_owned();
    assert!(
        text.contains("reached by     `auto`: nothing yet"),
        "{text}"
    );
    // The VMM makes its socket where the VM's own is.
    let path = world.host.vm_dir("a").join("v.sock");
    let vmm = Vmm::start(&path, Kind::Closes, &[port]).unwrap();
    let hybrid = shown(
        &world,
        Some("hybrid"),
        "`auto`: the VMM's socket is there; no VMM is connected",
    );
    assert_eq!(hybrid["hybrid"], path.display().to_string());
    assert_eq!(hybrid["forbids"], serde_json::Value::Null);
    let agent = world.agent(&vmm);
    let tunnel = world.tunnel();
    goes_on(&tunnel);
    let text = world.host.adit(&["vm", "show", "a"]).unwrap();
    let text = String::from_utf8_lossy(&text.stdout).into_owned();
    for part in [
        "reached by     hybrid; `auto`: ",
        "costs          each byte is copied",
    ] {
        assert!(text.contains(part), "{text}");
    }
    // The next aditd finds what was chosen, and the tunnel has gone on.
    world.host.kill();
    goes_on(&tunnel);
    drop(agent);
    vmm.identity.admission.ended();
    world.host.launch().unwrap();
    let _agent = world.agent(&vmm);
    shown(&world, Some("hybrid"), "`auto`: ");
    goes_on(&world.tunnel());
    goes_on(&tunnel);
    // What its socket leaves behind goes with the VM's directory, so it is in nobody's way.
    assert!(path.with_file_name("v.sock_741").exists());
}
