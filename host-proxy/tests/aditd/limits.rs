//! No client and no VM uses more than its share of aditd (R108, R110, I7, I8).

use std::io::{Read, Write};
use std::net::TcpStream;

use crate::access::{UID, grant};
use crate::host::{Answer, HANG, Host};
use crate::proxy::{drained, head};
use crate::server::{Then, ok, serve};

const ONE: [u8; 4] = [127, 0, 0, 1];
const OTHER: [u8; 4] = [127, 0, 0, 2];

/// Sends a request, and returns the complete answer.
fn ask(mut client: TcpStream, request: &str) -> Answer {
    client.write_all(request.as_bytes()).unwrap();
    answer(&mut client)
}

fn answer(client: &mut impl Read) -> Answer {
    let mut said = Vec::new();
    client.read_to_end(&mut said).unwrap();
    Answer::parse(&said).unwrap()
}

fn get(path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
}

#[test]
fn r108_idle_connections_on_every_listener_leave_the_operators_socket_answering() {
    for descriptors in [128, 256] {
        let (mut host, ports) = Host::new(
            &[("a", 3)],
            "[metrics]\nlisten = \"127.0.0.1:0\"\n[limits]\nconnections_per_client = 4096",
        );
        host.start_with(descriptors);
        let control = ports[0].connected();
        let mut idle: Vec<Box<dyn Read>> = Vec::new();
        let mut started = Vec::new();
        for n in 0..400u16 {
            idle.push(Box::new(host.tcp("metrics.addr", ONE)));
            idle.push(Box::new(host.operator()));
            let from = [127, 1, (n >> 8) as u8, n as u8];
            let mut client = host.tcp("proxy.addr", from);
            if n % 2 == 0 {
                client.write_all(b"GET http://a/ HT").unwrap();
            }
            started.push(client);
        }
        assert_eq!(host.api("GET", "/healthz", "").status, 200);
        assert_eq!(host.get("/v1/vms/a")["name"], "a");
        let answer = ask(host.tcp("metrics.addr", OTHER), &get("/metrics"));
        assert_eq!(answer.status, 200);
        // The proxy still serves a client that sends its request.
        let mut client = host.tcp("proxy.addr", OTHER);
        client
            .write_all(b"CONNECT a:80 HTTP/1.1\r\nHost: a:80\r\n\r\n")
            .unwrap();
        control.dialed(control.dial().id);
        assert!(head(&mut client).starts_with("HTTP/1.1 200 "));
    }
}

#[test]
fn r108_a_silent_connection_is_closed_by_every_listener() {
    let (host, _ports) = Host::serving(&[], "[metrics]\nlisten = \"127.0.0.1:0\"");
    let mut rest = Vec::new();
    let (mut metrics, mut operator) = (host.tcp("metrics.addr", ONE), host.operator());
    let mut body = host.operator();
    body.write_all(b"POST /v1/goals HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n{")
        .unwrap();
    // The deadline of the server is far earlier than that of this read.
    metrics.read_to_end(&mut rest).unwrap();
    operator.read_to_end(&mut rest).unwrap();
    host.proxy().read_to_end(&mut rest).unwrap();
    assert_eq!(answer(&mut body).status, 408);
}

#[test]
fn r108_clients_that_wait_for_events_leave_room_for_others() {
    let (mut host, _ports) = Host::new(&[("a", 3)], "");
    host.start_with(128);
    let mut waiting = Vec::new();
    let mut busy = 0;
    for _ in 0..40 {
        let mut client = host.operator();
        client
            .write_all(get("/v1/vms/a/wait?for=agent&timeout_ms=3600000").as_bytes())
            .unwrap();
        waiting.push(client);
    }
    // Each is connected, or is refused with 503.
    assert_eq!(host.api("GET", "/healthz", "").status, 200);
    for client in &mut waiting {
        client.set_nonblocking(true).unwrap();
        let mut said = [0; 4096];
        if matches!(client.read(&mut said), Ok(n) if said[..n].starts_with(b"HTTP/1.1 503 ")) {
            busy += 1;
        }
    }
    assert!(busy >= 1);
    assert_eq!(host.api("GET", "/v1/vms", "").status, 200);
}

#[test]
fn r110_a_vm_that_answers_nothing_uses_only_its_share_of_the_proxy() {
    let (host, ports) = Host::serving(
        &[("a", 3), ("b", 4)],
        "[limits]\nconnections = 40\nconnections_per_client = 40",
    );
    let (a, b) = (ports[0].connected(), ports[1].connected());
    let mut clients: Vec<_> = (0..30).map(|_| host.proxy()).collect();
    // A quarter of the requests is dialled, and the port process does not answer.
    let mut dials = Vec::new();
    for (nth, client) in clients.iter_mut().enumerate() {
        client.write_all(get("http://a/").as_bytes()).unwrap();
        if nth < 10 {
            dials.push(a.dial().id);
        }
    }
    let mut client = host.proxy();
    client.write_all(get("http://b/").as_bytes()).unwrap();
    let (mut guest, _) = b.tunnel();
    head(&mut guest);
    guest
        .write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
        .unwrap();
    assert_eq!(answer(&mut client).body, "ok");
    let refused: Vec<_> = clients
        .drain(10..)
        .map(|mut client| answer(&mut client))
        .collect();
    for answer in &refused {
        assert_eq!(answer.status, 503, "{}", answer.body);
        assert!(answer.head.contains("connection_limit_reached"));
    }
    // A freed share can be used again.
    a.dialed(dials[0]);
    let (guest, _) = a.attached();
    drop(guest);
    assert_eq!(answer(&mut clients[0]).status, 502);
    let mut client = host.proxy();
    client.write_all(get("http://a/").as_bytes()).unwrap();
    a.dial();
}

#[test]
fn r110_a_client_uses_only_its_share_of_the_proxy() {
    let (host, ports) = Host::serving(&[("a", 3)], "[limits]\nconnections_per_client = 4");
    let control = ports[0].connected();
    let held: Vec<_> = (0..4).map(|_| host.tcp("proxy.addr", ONE)).collect();
    for _ in 0..3 {
        let answer = answer(&mut host.tcp("proxy.addr", ONE));
        assert_eq!(answer.status, 503, "{}", answer.body);
        assert!(answer.head.contains("connection_limit_reached"));
    }
    let mut client = silent(&proxy(&host), UID);
    client
        .write_all(b"CONNECT a:80 HTTP/1.1\r\nHost: a:80\r\n\r\n")
        .unwrap();
    control.dialed(control.dial().id);
    assert!(head(&mut client).starts_with("HTTP/1.1 200 "));
    drop(held);
    // The client is served again once aditd has seen that its connections are closed.
    host.until("the client is let in", |h| {
        let answer = ask(h.tcp("proxy.addr", ONE), &get("http://nobody/"));
        (answer.status == 404).then_some(())
    });
}

#[test]
fn r110_an_answer_that_does_not_begin_in_time_ends_in_504() {
    let (host, ports) = Host::serving(&[("a", 3)], "[limits]\nresponse_s = 1");
    let control = ports[0].connected();
    let mut client = host.proxy();
    client.write_all(get("http://a/never").as_bytes()).unwrap();
    let (mut guest, _) = control.tunnel();
    head(&mut guest);
    let answer = answer(&mut client);
    assert_eq!(answer.status, 504, "{}", answer.body);
    assert!(
        answer.head.contains("error=http_response_timeout"),
        "{}",
        answer.head
    );
    assert!(drained(&mut guest), "the guest's stream goes on");
    // An answer that has begun may take any time.
    let mut client = host.proxy();
    client.write_all(get("http://a/slow").as_bytes()).unwrap();
    let (mut guest, _) = control.tunnel();
    head(&mut guest);
    guest
        .write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n")
        .unwrap();
    assert!(head(&mut client).starts_with("HTTP/1.1 200 "));
    std::thread::sleep(std::time::Duration::from_millis(1500));
    guest.write_all(b"ok").unwrap();
    let mut two = [0; 2];
    client.read_exact(&mut two).unwrap();
    assert_eq!(&two, b"ok");
}

#[test]
fn r111_a_client_can_cause_one_log_line_a_second_with_a_count() {
    let (host, _ports) = Host::serving(&[("a", 3)], "");
    let begin = std::time::Instant::now();
    for _ in 0..300 {
        assert_eq!(ask(host.proxy(), &get("http://nobody/")).status, 404);
    }
    let lines = |h: &Host| h.log().matches("request refused").count();
    // On a slow machine there may be a line for each second.
    let seconds = usize::try_from(begin.elapsed().as_secs()).unwrap() + 1;
    assert!((1..=seconds).contains(&lines(&host)), "{}", host.log());
    host.until("the next line has the count", |h| {
        ask(h.proxy(), &get("http://nobody/"));
        h.log()
            .contains("lines like the next one left out")
            .then_some(())
    });
}

#[test]
fn r111_the_log_of_a_port_process_is_truncated_while_it_writes() {
    let (mut host, ports) = Host::new(&[("a", 3)], "");
    let (log, past) = (host.in_vm("a", "port.log"), host.in_vm("a", "port.log.1"));
    let options = || {
        let mut options = std::fs::OpenOptions::new();
        options.create(true).append(true).open(&log).unwrap()
    };
    let mut port = options();
    port.write_all(&vec![b'x'; 3 << 20]).unwrap();
    port.write_all(b"the end").unwrap();
    host.start();
    let _control = ports[0].connected();
    let len = |path: &std::path::Path| std::fs::metadata(path).map_or(0, |m| m.len());
    host.until("the log is cut", |_| (len(&log) == 0).then_some(()));
    assert_eq!(len(&past), 1 << 20);
    assert!(std::fs::read(&past).unwrap().ends_with(b"the end"));
    // The writer continues at the new end of the file.
    port.write_all(b"and on").unwrap();
    assert_eq!(std::fs::read(&log).unwrap(), b"and on");
}

/// A server closes nothing after its last answer: each connection waits for its end, and has a descriptor meanwhile.
#[test]
fn r110_a_vm_that_ends_no_connection_leaves_descriptors_to_others() {
    let (mut host, ports) = Host::new(&[("a", 3), ("b", 4)], "");
    host.start_with(128);
    serve(ports[0].connected(), |stream, _| {
        let last = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok";
        stream.write_all(last).unwrap();
        Then::Forget
    });
    serve(ports[1].connected(), ok);
    for _ in 0..200 {
        let _ = ask(host.proxy(), &get("http://a/"));
    }
    let answer = ask(host.proxy(), &get("http://b/"));
    assert_eq!(answer.status, 200, "{}", answer.body);
}

/// Does something as another user of this host: what a thread is for a file, it is for a socket that it makes.
pub fn as_user<T: Send>(uid: u32, does: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            nix::unistd::setfsuid(uid.into());
            does()
        });
        thread.join().unwrap()
    })
}

/// Address of the proxy, which other users may not read.
pub fn proxy(host: &Host) -> String {
    let run = host.state_dir().with_file_name("run");
    let address = std::fs::read_to_string(run.join("proxy.addr")).unwrap();
    address.trim().to_owned()
}

/// A client of this user that says nothing.
pub fn silent(proxy: &str, uid: u32) -> TcpStream {
    as_user(uid, || TcpStream::connect(proxy).unwrap())
}

/// What a client of this user is answered.
fn asks(proxy: &str, uid: u32) -> u16 {
    let mut client = silent(proxy, uid);
    client.set_read_timeout(Some(HANG)).unwrap();
    let request = b"GET http://nobody/ HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
    client.write_all(request).unwrap();
    answer(&mut client).status
}

#[test]
fn r110_two_users_of_the_host_take_nothing_from_each_other_and_root_is_one_of_them() {
    let (host, _ports) = Host::serving(&[("a", 3)], "[limits]\nconnections_per_client = 3");
    let at = proxy(&host);
    for (greedy, other) in [(UID, 0), (0, UID + 1)] {
        // The kernel may be asked in vain on a busy machine, and then it is nobody's share.
        let _held = host.until("it has its share", |_| {
            let held: Vec<_> = (0..3).map(|_| silent(&at, greedy)).collect();
            (asks(&at, greedy) == 503).then_some(held)
        });
        assert_eq!(asks(&at, other), 404);
    }
}

#[test]
fn r110_a_grants_weight_is_so_many_times_a_share_and_ends_with_the_grant() {
    let to_one = grant(&format!("\"user:{UID}\""), "\"a\"", "\"reach\"") + "weight = 3\n";
    let more = format!("[limits]\nconnections_per_client = 2\n{to_one}");
    let (host, _ports) = Host::serving(&[("a", 3)], &more);
    let at = proxy(&host);
    let mut held = vec![silent(&at, UID)];
    // Its weight counts once it is known, and then it has no less than this.
    host.until("it is known", |_| {
        let more: Vec<_> = (0..3).map(|_| silent(&at, UID)).collect();
        let is_let_in = asks(&at, UID) == 404;
        is_let_in.then(|| held.extend(more))
    });
    host.until("it has all", |_| {
        held.push(silent(&at, UID));
        (asks(&at, UID) == 503).then_some(())
    });
    // Whoever has none has one share.
    host.until("it has its share", |_| {
        let _held = [silent(&at, UID + 1), silent(&at, UID + 1)];
        (asks(&at, UID + 1) == 503).then_some(())
    });
    // Without the grant it is as all others.
    drop(held);
    host.reload(|text| text.replace("weight = 3\n", ""));
    host.until("it has no more than others", |_| {
        let _held = [silent(&at, UID), silent(&at, UID)];
        (asks(&at, UID) == 503).then_some(())
    });
}
