//! How many bytes a second there may be: what aditd tells a port process of a tunnel, and of those that there are already.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;

use adit_port::control::{ConnectLimited, Dialed, Limit, SetLimits, Tunnels};
use adit_port::control_io::Message;

use crate::access::grant;
use crate::host::{Control, HANG, Host};

const CONNECT: &[u8] = b"CONNECT a:80 HTTP/1.1\r\nHost: a:80\r\n\r\n";
const OK: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";

/// The next dial of a limited stream, with the guest's end of it. Questions for tunnels have no answer.
fn limited(control: &Control) -> (UnixStream, ConnectLimited) {
    loop {
        match control.hear().unwrap() {
            (Message::ConnectLimited(limited), Some(fd)) => {
                let boot_nonce = [1; 16];
                let id = limited.connect.id;
                control.say(&Message::Dialed(Dialed { id, boot_nonce }), None);
                let mut client = UnixStream::from(fd);
                client.write_all(&limited.connect.greeting).unwrap();
                return (client, limited);
            }
            (Message::ListTunnels(_), _) => {}
            other => panic!("{other:?}"),
        }
    }
}

/// A client of the proxy that says this.
fn says(host: &Host, text: &[u8]) -> TcpStream {
    let mut client = host.proxy();
    client.set_read_timeout(Some(HANG)).unwrap();
    client.write_all(text).unwrap();
    client
}

/// Has a guest's server answer a request on this connection.
fn answers(mut guest: &UnixStream, mut client: TcpStream) {
    let mut said = Vec::new();
    while !said.ends_with(b"\r\n\r\n") {
        let mut piece = [0; 4096];
        let n = guest.read(&mut piece).unwrap();
        assert!(n > 0);
        said.extend_from_slice(&piece[..n]);
    }
    guest.write_all(OK).unwrap();
    let mut heard = Vec::new();
    while !heard.ends_with(b"ok") {
        let mut piece = [0; 4096];
        let n = client.read(&mut piece).unwrap();
        assert!(n > 0, "{}", String::from_utf8_lossy(&heard));
        heard.extend_from_slice(&piece[..n]);
    }
}

fn rates(limits: &[Limit]) -> Vec<u64> {
    limits.iter().map(|limit| limit.bytes_per_s).collect()
}

fn with_rates() -> String {
    grant("\"anyone\"", "\"a\"", "\"reach\", \"see\"") + "bytes_per_s = 50000\n"
}

#[test]
fn r110_every_kind_of_stream_has_the_rate_of_its_caller_and_of_its_vm() {
    let (host, ports) = Host::serving(&[("a", 3)], &with_rates());
    host.reload(|text| text.replace("cid = 3\n", "cid = 3\nbytes_per_s = 200000\n"));
    let control = ports[0].connected_and_limits();
    let mut first = says(&host, CONNECT);
    let (_guest, tunnel) = limited(&control);
    assert_eq!(rates(&tunnel.limits), [50_000, 200_000]);
    let mut heard = [0; 12];
    first.read_exact(&mut heard).unwrap();
    assert_eq!(&heard, b"HTTP/1.1 200");
    // Requests that are relayed share it with tunnels, and a connection to the guest is used again as before.
    let get = b"GET http://a/ HTTP/1.1\r\nHost: a\r\n\r\n";
    let client = says(&host, get);
    let (guest, relayed) = limited(&control);
    assert_eq!(relayed.limits, tunnel.limits);
    answers(&guest, client);
    answers(&guest, says(&host, get));
    // A grant by which more go is used before the other, and another VM's rate is not this one's.
    host.reload(|text| text + &grant("\"anyone\"", "\"*\"", "\"reach\""));
    let _second = says(&host, CONNECT);
    let (_guest, tunnel) = limited(&control);
    assert_eq!(rates(&tunnel.limits), [200_000]);
}

#[test]
fn a_reload_changes_the_rate_of_tunnels_that_there_are() {
    let (host, ports) = Host::serving(&[("a", 3)], &with_rates());
    let control = ports[0].connected_and_limits();
    let _client = says(&host, CONNECT);
    let (_guest, tunnel) = limited(&control);
    let tag = tunnel.tag.unwrap();
    // What each answer to a question for tunnels has set, until it is this.
    let until = |rate: &[u64]| loop {
        match control.hear().unwrap().0 {
            Message::ListTunnels(ask) => {
                let page = Tunnels {
                    after: ask.after,
                    tunnels: vec![(7, tag.clone())],
                    last: true,
                };
                control.say(&Message::Tunnels(page), None);
            }
            Message::SetLimits(SetLimits { tunnels }) => {
                assert_eq!(tunnels.len(), 1);
                assert_eq!(tunnels[0].0, 7);
                if rates(&tunnels[0].1) == rate {
                    return tunnels[0].1.clone();
                }
            }
            other => panic!("{other:?}"),
        }
    };
    host.reload(|text| text.replace("bytes_per_s = 50000", "bytes_per_s = 70000"));
    let set = until(&[70_000]);
    // It is the same tunnels' rate as before.
    assert_eq!(set[0].key, tunnel.limits[0].key);
    host.reload(|text| text.replace("cid = 3\n", "cid = 3\nbytes_per_s = 9000\n"));
    until(&[70_000, 9000]);
    host.reload(|text| text.replace("bytes_per_s = 70000\n", ""));
    until(&[9000]);
}

#[test]
fn a_port_process_of_an_older_build_lets_any_number_through_and_the_log_says_so() {
    let (host, ports) = Host::serving(&[("a", 3)], &with_rates());
    let control = ports[0].connected();
    let _client = says(&host, CONNECT);
    let _tunnel = control.tunnel();
    assert!(host.log().contains("limits no bytes"), "{}", host.log());
}
