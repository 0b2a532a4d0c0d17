//! Names of VMs over DNS: real clients, and clients that do what they should not.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::process::{Command, Stdio};

use hickory_proto::op::{Message, Query, ResponseCode};
use hickory_proto::rr::{Name, RecordType};

use crate::access::{asked, audit, curl, grant, listen, other, serve};
use crate::host::{HANG, Host, Port};

const V4: &str = "192.0.2.1";
const V6: &str = "2001:db8::1";
const LAB: &str = "network = \"lab\"\nanswer = [\"192.0.2.1\", \"2001:db8::1\"]";

/// A host with the VMs `a` and `b`, of which the network sees `a`.
fn started() -> (Host, Vec<Port>) {
    let more = listen("127.0.0.1:0", "dns", LAB) + &grant("\"network:lab\"", "\"a*\"", "\"see\"");
    Host::serving(
        &[("a", 3), ("b", 4)],
        &format!("[names]\nhost = \"alpha\"\n{more}"),
    )
}

fn address(host: &Host) -> SocketAddr {
    other(host).parse().unwrap()
}

pub fn question(name: &str, of: RecordType) -> Message {
    let mut message = Message::query();
    // Servers between a client and aditd ask for nobody else.
    message.metadata.recursion_desired = true;
    let name = Name::from_ascii(format!("{name}.")).unwrap();
    message.add_query(Query::query(name, of));
    message
}

fn client(to: SocketAddr, from: [u8; 4]) -> UdpSocket {
    let socket = UdpSocket::bind(SocketAddr::from((from, 0))).unwrap();
    socket.connect(to).unwrap();
    socket.set_read_timeout(Some(HANG)).unwrap();
    socket
}

fn heard(socket: &UdpSocket) -> Message {
    let mut bytes = [0; 2048];
    let n = socket.recv(&mut bytes).unwrap();
    Message::from_vec(&bytes[..n]).unwrap()
}

/// Asks over UDP.
pub fn ask(to: SocketAddr, name: &str, of: RecordType) -> Message {
    let (socket, question) = (client(to, [127, 0, 0, 1]), question(name, of));
    socket.send(&question.to_vec().unwrap()).unwrap();
    let answer = heard(&socket);
    assert_eq!(
        (answer.id, &answer.queries),
        (question.id, &question.queries)
    );
    answer
}

/// The same where nobody may listen yet, or the answer be lost.
pub fn asked_once(to: SocketAddr, name: &str, of: RecordType) -> Option<Message> {
    let socket = client(to, [127, 0, 0, 1]);
    socket.send(&question(name, of).to_vec().unwrap()).ok()?;
    let mut bytes = [0; 2048];
    let n = socket.recv(&mut bytes).ok()?;
    Message::from_vec(&bytes[..n]).ok()
}

/// The addresses that a name has.
pub fn addresses(to: SocketAddr, name: &str, of: RecordType) -> Vec<IpAddr> {
    let answer = ask(to, name, of);
    let addresses = answer
        .answers
        .iter()
        .filter_map(|record| record.data.ip_addr());
    addresses.collect()
}

fn framed(question: &Message) -> Vec<u8> {
    let bytes = question.to_vec().unwrap();
    let len = u16::try_from(bytes.len()).unwrap();
    [&len.to_be_bytes()[..], &bytes].concat()
}

fn answer(client: &mut TcpStream) -> Message {
    let mut len = [0; 2];
    client.read_exact(&mut len).unwrap();
    let mut bytes = vec![0; u16::from_be_bytes(len).into()];
    client.read_exact(&mut bytes).unwrap();
    Message::from_vec(&bytes).unwrap()
}

fn tcp(to: SocketAddr) -> TcpStream {
    let client = TcpStream::connect(to).unwrap();
    client.set_read_timeout(Some(HANG)).unwrap();
    client
}

/// What dig says. None: there is no dig.
fn dig(at: SocketAddr, args: &[&str]) -> Option<String> {
    let mut command = Command::new("dig");
    command
        .args(["-r", &format!("@{}", at.ip()), "-p", &at.port().to_string()])
        .args(["+tries=1", "+time=30"])
        .args(args);
    match command.output() {
        Ok(out) => {
            let text = String::from_utf8_lossy(&out.stdout).into_owned();
            assert!(out.status.success(), "{text}");
            Some(text)
        }
        Err(e) => {
            eprintln!("skipped: no dig ({e})");
            None
        }
    }
}

#[test]
fn dig_hears_the_hosts_address_of_a_vm_that_its_network_may_see_and_of_no_other() {
    let (host, _ports) = started();
    let at = address(&host);
    let short = |args: &[&str]| {
        let text = dig(at, &[&["+short"], args].concat())?;
        Some(text.trim().to_owned())
    };
    let Some(a) = short(&["a.adit", "A"]) else {
        return;
    };
    assert_eq!(a, V4);
    for (args, is) in [
        (&["a.adit", "AAAA"][..], V6),
        (&["+tcp", "a.adit", "A"], V4),
        (
            &["+tcp", "+keepopen", "a.adit", "A", "a.adit", "AAAA"],
            "192.0.2.1\n2001:db8::1",
        ),
        (&["+noedns", "a.adit"], V4),
        (
            &["+edns=0", "+bufsize=512", "+dnssec", "+cookie", "a.adit"],
            V4,
        ),
        (
            &[
                "+edns=0",
                "+bufsize=4096",
                "+nsid",
                "+subnet=192.0.2.0/24",
                "a.adit",
            ],
            V4,
        ),
        (&["+ednsopt=65001:00ff", "a.adit"], V4),
        (&["A.aLPHa.ADIT"], V4),
        (&["alpha.adit"], V4),
        (&["vsock-5000.a.adit"], V4),
        (&["a.adit", "TYPE65280"], ""),
        (&["a.adit", "ANY"], "\"RFC8482\" \"\""),
        (&["adit", "NS"], "adit."),
    ] {
        assert_eq!(short(args).unwrap(), is, "{args:?}");
    }
    // What is not there, and what the network may not see: alike but for the name, and the number.
    let whole = |name: &str| {
        let text = dig(at, &["+qr", name]).unwrap();
        assert!(
            text.contains("status: NXDOMAIN") && text.contains("hostmaster.adit."),
            "{text}"
        );
        let (_, answer) = text.split_once(";; Got answer:").unwrap();
        let lines = answer.lines().filter(|line| {
            let changes = [";; ->>HEADER", ";; Query time", ";; WHEN", "; COOKIE"];
            !changes.iter().any(|begin| line.starts_with(begin))
        });
        lines
            .map(|line| line.replace(name, "NAME") + "\n")
            .collect::<String>()
    };
    for (forbidden, unknown) in [
        ("b.adit", "x.adit"),
        ("b.alpha.adit", "x.alpha.adit"),
        ("c.b.svc.adit", "c.x.svc.adit"),
        ("b.svc.adit", "x.svc.adit"),
        ("vsock-1.b.adit", "vsock-1.x.adit"),
    ] {
        assert_eq!(whole(forbidden), whole(unknown), "{forbidden}");
    }
    let line = &audit(&host, 1)[0];
    assert_eq!(
        (&line["caller"], &line["verb"], &line["vm"]),
        (&"network:lab".into(), &"see".into(), &"b".into())
    );
    for (args, status) in [
        (&["example.com"][..], "REFUSED"),
        (&["a.beta.adit"], "NXDOMAIN"),
        (&["adit", "AXFR"], "Transfer failed"),
        (&["-c", "CH", "version.bind", "TXT"], "REFUSED"),
        (&["+opcode=5", "a.adit"], "NOTIMP"),
        (&["+opcode=15", "a.adit"], "NOTIMP"),
        (&["+edns=1", "+noednsnegotiation", "a.adit"], "BADVERS"),
        (&["+header-only"], "FORMERR"),
        (&["a.adit", "MX"], "NOERROR"),
        (&["svc.adit"], "NOERROR"),
    ] {
        let text = dig(at, args).unwrap();
        assert!(text.contains(status), "{args:?}: {text}");
        assert!(!text.contains(V4), "{args:?}: {text}");
    }
}

#[test]
fn dig_and_then_curl_reach_a_vm_by_a_mapped_port() {
    let mapped = "to = \"a:80\"";
    let more = listen("127.0.0.1:0", "dns", "network = \"lab\"")
        + &listen("127.0.0.1:0", "any", mapped)
        + &grant("\"network:lab\"", "\"a\"", "\"see\"")
        + &grant("\"anyone\"", "\"a\"", "\"reach\"");
    let (host, ports) = Host::serving(&[("a", 3)], &more);
    let control = ports[0].connected();
    let listeners = other(&host);
    let (dns, any) = listeners.split_once('\n').unwrap();
    // The listener's own address, where nothing else is said.
    let Some(found) = dig(dns.parse().unwrap(), &["+short", "a.adit"]) else {
        return;
    };
    let served = serve(&control);
    let (_, port) = any.rsplit_once(':').unwrap();
    let resolve = format!("a.adit:{port}:{}", found.trim());
    let url = format!("http://a.adit:{port}/");
    let answer = curl(0, &["--resolve", &resolve, &url]);
    assert_eq!(answer, Some((200, "ok".into())));
    served.join().unwrap();
}

#[test]
fn what_a_network_sees_changes_with_a_reload_and_a_listener_without_a_network_is_anyones() {
    let sections = listen("127.0.0.1:0", "dns", "network = \"lab\"")
        + &listen("127.0.0.1:0", "dns", "")
        + &grant("\"network:lab\"", "\"a\"", "\"see\", \"reach\"")
        + &grant("\"anyone\"", "\"b\"", "\"see\"");
    let (host, _ports) = Host::serving(&[("a", 3), ("b", 4)], &sections);
    let listeners = other(&host);
    let (lab, open) = listeners.split_once('\n').unwrap();
    let (lab, open) = (lab.parse().unwrap(), open.parse().unwrap());
    let sees = |at: SocketAddr| {
        let names = ["a", "b"].into_iter();
        let there =
            names.filter(|vm| !addresses(at, &format!("{vm}.adit"), RecordType::A).is_empty());
        there.collect::<String>()
    };
    assert_eq!((sees(lab), sees(open)), ("ab".into(), "b".into()));
    // To be of a network is no name over another protocol.
    let request = "GET http://a/ HTTP/1.1\r\nHost: a\r\n\r\n";
    assert_eq!(asked(host.proxy(), request).status, 404);
    host.reload(|text| text.replace("network:lab", "network:other"));
    assert_eq!((sees(lab), sees(open)), ("b".into(), "b".into()));
    host.reload(|text| text.replace("\"b\"]\nmay = [\"see\"]", "\"*\"]\nmay = [\"reach\"]"));
    assert_eq!((sees(lab), sees(open)), (String::new(), String::new()));
    // Of the zone itself everybody hears, and who sees no VM sees no host.
    let apex = ask(open, "adit", RecordType::SOA);
    assert_eq!(apex.answers.len(), 1);
}

#[test]
fn many_questions_on_one_connection_are_answered_in_order_and_half_of_one_is_waited_for() {
    let (host, _ports) = started();
    let mut client = tcp(address(&host));
    let names = ["a.adit", "b.adit", "a.alpha.adit", "adit", "example.com"];
    let questions: Vec<_> = (0..200)
        .map(|n| question(names[n % names.len()], RecordType::A))
        .collect();
    let bytes: Vec<u8> = questions.iter().flat_map(framed).collect();
    // In pieces that are no questions.
    let mut writer = client.try_clone().unwrap();
    let writer = std::thread::spawn(move || {
        for piece in bytes.chunks(7) {
            writer.write_all(piece).unwrap();
        }
    });
    for question in &questions {
        let answer = answer(&mut client);
        assert_eq!(
            (answer.id, &answer.queries),
            (question.id, &question.queries)
        );
    }
    writer.join().unwrap();
    // One that sends answers, or what no question is long enough for, is closed; one that ends its half is answered first.
    let mut response = question("a.adit", RecordType::A);
    response = response.into_response();
    for said in [
        framed(&response),
        vec![0xff, 0xff, 0, 0],
        b"GET / HTTP/1.1\r\n\r\n".to_vec(),
    ] {
        let mut client = tcp(address(&host));
        client.write_all(&said).unwrap();
        // What was not read resets the connection.
        match client.read(&mut [0; 64]) {
            Ok(n) => assert_eq!(n, 0),
            Err(e) => assert_eq!(e.kind(), ErrorKind::ConnectionReset),
        }
    }
    let mut client = tcp(address(&host));
    client
        .write_all(&framed(&question("a.adit", RecordType::A)))
        .unwrap();
    client.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(answer(&mut client).answers.len(), 1);
    assert_eq!(client.read(&mut [0]).unwrap(), 0);
}

#[test]
fn r110_an_address_that_asks_too_often_is_told_to_come_over_tcp_and_others_are_answered() {
    let (host, _ports) = started();
    let at = address(&host);
    let flood = client(at, [127, 0, 0, 1]);
    let question = question("a.adit", RecordType::A);
    let bytes = question.to_vec().unwrap();
    // Answers are counted by the second: so many at once are too many in any.
    let truncated = host.until("it is told so", |_| {
        for _ in 0..300 {
            flood.send(&bytes).unwrap();
        }
        flood.set_nonblocking(true).unwrap();
        let mut answer = [0; 512];
        let mut truncated = None;
        while let Ok(n) = flood.recv(&mut answer) {
            assert!(n <= bytes.len() + 64);
            if answer[2] & 2 != 0 {
                truncated = Some(answer[..n].to_vec());
            }
        }
        flood.set_nonblocking(false).unwrap();
        truncated
    });
    assert!(truncated.len() <= bytes.len());
    let mut client_ = tcp(at);
    client_.write_all(&framed(&question)).unwrap();
    assert_eq!(answer(&mut client_).answers.len(), 1);
    let other = client(at, [127, 0, 0, 2]);
    other.send(&bytes).unwrap();
    assert_eq!(heard(&other).answers.len(), 1);
    let metrics = host.api("GET", "/metrics", "").body;
    let of = |answer: &str| {
        let begin = format!("adit_dns_answers_total{{listener=\"{at}\",answer=\"{answer}\"}} ");
        let count = metrics.lines().find_map(|line| line.strip_prefix(&begin));
        count.unwrap().parse::<u64>().unwrap()
    };
    assert!(of("found") >= 2 && of("truncated") >= 1, "{metrics}");
    assert_eq!(of("refused"), 0);
}

#[test]
fn r108_idle_connections_of_dns_lock_out_neither_datagrams_nor_other_listeners_nor_the_owner() {
    let more = listen("127.0.0.1:0", "dns", LAB) + &grant("\"network:lab\"", "\"a\"", "\"see\"");
    let (mut host, _ports) = Host::new(&[("a", 3)], &more);
    host.start_with(256);
    let at = address(&host);
    let mut idle = Vec::new();
    for n in 0..600u16 {
        // From many addresses, so that no client's share is the limit.
        let from = [127, 1, (n >> 8) as u8, n as u8];
        let mut client = host.tcp("listen.addr", from);
        if n % 2 == 0 {
            client.write_all(&[0, 40, 1]).unwrap();
        }
        idle.push(client);
    }
    assert_eq!(host.api("GET", "/healthz", "").status, 200);
    assert_eq!(addresses(at, "a.adit", RecordType::A).len(), 1);
    let mut client = host.tcp("listen.addr", [127, 0, 0, 2]);
    client
        .write_all(&framed(&question("a.adit", RecordType::AAAA)))
        .unwrap();
    assert_eq!(answer(&mut client).answers.len(), 1);
    let request = "GET http://nobody/ HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";
    assert_eq!(
        asked(host.tcp("proxy.addr", [127, 0, 0, 3]), request).status,
        404
    );
}

#[test]
fn r108_a_connection_that_does_not_end_its_question_is_closed() {
    let (host, _ports) = started();
    let mut silent = tcp(address(&host));
    let mut slow = tcp(address(&host));
    slow.write_all(&[0]).unwrap();
    // One that was answered has no more time than others.
    let mut answered = tcp(address(&host));
    answered
        .write_all(&framed(&question("a.adit", RecordType::A)))
        .unwrap();
    answer(&mut answered);
    // Longer than the deadline.
    for client in [&mut silent, &mut slow, &mut answered] {
        assert_eq!(client.read(&mut [0]).unwrap(), 0);
    }
}

#[test]
fn a_monitor_and_a_worker_that_are_killed_leave_both_sockets_to_the_next() {
    let (mut host, _ports) = started();
    let at = address(&host);
    let both = |host: &Host| {
        host.until("it answers", |_| {
            // What comes while there is no worker may be lost.
            let socket = client(at, [127, 0, 0, 1]);
            let limit = std::time::Duration::from_millis(500);
            socket.set_read_timeout(Some(limit)).unwrap();
            let bytes = question("a.adit", RecordType::A).to_vec().unwrap();
            socket.send(&bytes).ok()?;
            let n = socket.recv(&mut [0; 512]).ok()?;
            (n > bytes.len()).then_some(())
        });
        let mut client = tcp(at);
        client
            .write_all(&framed(&question("a.adit", RecordType::A)))
            .unwrap();
        assert_eq!(answer(&mut client).answers.len(), 1);
    };
    both(&host);
    host.kill_monitor();
    both(&host);
    host.start();
    assert_eq!(address(&host), at, "the listener is the same");
    both(&host);
    host.kill_worker();
    both(&host);
    assert_eq!(address(&host), at);
}

#[test]
fn the_access_log_has_a_line_for_each_question_and_no_name_beside_a_vms() {
    let sections = listen("127.0.0.1:0", "dns", LAB)
        + &grant("\"network:lab\"", "\"a\"", "\"see\"")
        + "[log]\naccess = \"file\"\n";
    let (host, _ports) = Host::serving(&[("a", 3)], &sections);
    let at = address(&host);
    ask(at, "a.adit", RecordType::AAAA);
    ask(at, "x.adit", RecordType::A);
    let refused = ask(at, "secret.example.com", RecordType::A);
    assert_eq!(refused.response_code, ResponseCode::Refused);
    let path = host.state_dir().join("aditd.access");
    let text = host.until("the log is written", |_| {
        let text = fs::read_to_string(&path).unwrap_or_default();
        (text.lines().count() >= 3).then_some(text)
    });
    assert!(!text.contains("secret"), "{text}");
    let lines = text.lines().map(|line| serde_json::from_str(line).unwrap());
    let lines: Vec<serde_json::Value> = lines.collect();
    for (line, (method, vm, status, error)) in lines.iter().zip([
        ("AAAA", "a", 200, ""),
        ("A", "x", 404, "no-name"),
        ("", "", 403, "refused"),
    ]) {
        let text = |field: &str| line[field].as_str().unwrap_or_default();
        assert_eq!(
            (text("proto"), text("caller")),
            ("dns", "network:lab"),
            "{line}"
        );
        assert_eq!(
            (text("method"), text("vm"), text("error")),
            (method, vm, error),
            "{line}"
        );
        assert_eq!(
            (&line["status"], text("listener")),
            (&status.into(), &*at.to_string())
        );
        assert_eq!(line["broken_off"], serde_json::Value::Null);
    }
}

/// aditd in a network of its own, in which it is the only server of DNS: whatever resolves names finds its VMs.
#[test]
fn getent_and_curl_find_a_vm_by_the_resolver_of_their_system() {
    let sections = listen("127.0.0.1:53", "dns", "network = \"lab\"")
        + &listen("127.0.0.1:8080", "any", "to = \"a:80\"")
        + &grant("\"network:lab\"", "\"a\"", "\"see\"")
        + &grant("\"anyone\"", "\"a\"", "\"reach\"");
    let (mut host, ports) = Host::new(&[("a", 3)], &sections);
    let resolv = host.state_dir().with_file_name("resolv.conf");
    fs::write(&resolv, "nameserver 127.0.0.1\n").unwrap();
    let prepare = format!(
        "ip link set lo up && mount --bind {} /etc/resolv.conf",
        resolv.display()
    );
    let tried = Command::new("unshare")
        .args(["--net", "--mount", "sh", "-c", &prepare])
        .stderr(Stdio::null())
        .status();
    if !tried.is_ok_and(|status| status.success()) {
        return eprintln!("skipped: namespaces, and names in them, need root and iproute2");
    }
    host.start_within(&["unshare", "--net", "--mount", "sh", "-c"], &prepare);
    let control = ports[0].connected();
    let inside = |args: &[&str]| {
        let mut command = Command::new("nsenter");
        command.args([
            "--target",
            &host.pid().to_string(),
            "--net",
            "--mount",
            "--",
        ]);
        command.args(args).output().unwrap()
    };
    let out = inside(&["getent", "ahosts", "a.adit"]);
    let said = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(
        out.status.success() && said.starts_with("127.0.0.1 "),
        "{out:?}"
    );
    let out = inside(&["getent", "ahosts", "x.adit"]);
    assert_eq!(out.status.code(), Some(2), "{out:?}");
    let served = serve(&control);
    let out = inside(&["curl", "-sS", "--max-time", "30", "http://a.adit:8080/"]);
    assert_eq!(String::from_utf8_lossy(&out.stdout), "ok", "{out:?}");
    served.join().unwrap();
}
