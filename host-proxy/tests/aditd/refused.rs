//! Every refusal arrives, whatever the client is still sending, and says what is wrong.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::{Command, Stdio};

use crate::host::{Answer, Host};
use crate::proxy::head;

const MANY: usize = 8 << 20;

/// Sends all of a request, as clients do that read no answer before, and hears the answer.
fn ask(mut client: TcpStream, request: &[u8]) -> Answer {
    client.write_all(request).unwrap();
    let mut said = Vec::new();
    client.read_to_end(&mut said).unwrap();
    Answer::parse(&said).unwrap()
}

fn upload(target: &str, fields: &str) -> Vec<u8> {
    let mut request =
        format!("POST {target} HTTP/1.1\r\nHost: a\r\n{fields}Content-Length: {MANY}\r\n\r\n")
            .into_bytes();
    request.resize(request.len() + MANY, b'x');
    request
}

#[test]
fn a_refused_upload_hears_why() {
    let (host, ports) = Host::serving(&[("a", 3)], "");
    let _control = ports[0].connected();
    for (target, fields, status) in [
        ("http://nobody/", "", 404),
        ("http://a:81/", "", 403),
        ("ftp://a/", "", 400),
        ("https://a/", "", 400),
        ("http://a:x/", "", 400),
        // Refused before hyper has any of it.
        ("http://a/", "Host: b\r\n", 400),
        ("http://a/", "Content-Length: 1\r\n", 400),
        ("http://a/", &"X: y\r\n".repeat(200), 431),
    ] {
        let answer = ask(host.proxy(), &upload(target, fields));
        assert_eq!(answer.status, status, "{target}");
        assert!(answer.head.contains("connection: close"), "{}", answer.head);
        assert!(!answer.body.is_empty(), "{target}");
    }
}

#[test]
fn a_refused_upload_hears_why_where_its_client_has_all_that_it_may() {
    let (host, _ports) = Host::serving(&[("a", 3)], "[limits]\nconnections_per_client = 1");
    let _held = host.proxy();
    let answer = ask(host.proxy(), &upload("http://nobody/", ""));
    assert_eq!(answer.status, 503);
    assert!(answer.head.contains("retry-after: 1"), "{}", answer.head);
}

#[test]
fn a_refused_chunked_upload_hears_why_and_so_does_one_that_breaks_its_chunks() {
    let (host, ports) = Host::serving(&[("a", 3)], "");
    let control = ports[0].connected();
    let chunks = format!("10000\r\n{}\r\n", "x".repeat(0x10000)).repeat(MANY >> 16);
    let head = "HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n";
    let request = format!("POST http://nobody/ {head}{chunks}0\r\n\r\n");
    assert_eq!(ask(host.proxy(), request.as_bytes()).status, 404);
    let request = format!("POST http://a/ {head}zz\r\n{chunks}0\r\n\r\n");
    let client = host.proxy();
    let asked = std::thread::spawn(move || ask(client, request.as_bytes()));
    let (mut guest, _) = control.tunnel();
    let _ = guest.read_to_end(&mut Vec::new());
    let answer = asked.join().unwrap();
    assert_eq!(answer.status, 400);
    assert!(answer.body.contains("chunk"), "{}", answer.body);
}

#[test]
fn a_client_that_never_ends_its_upload_is_not_listened_to_for_ever() {
    let (host, _ports) = Host::serving(&[], "[limits]\nconnections_per_client = 1");
    let mut client = host.proxy();
    client
        .write_all(b"POST http://nobody/ HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nx")
        .unwrap();
    assert!(head(&mut client).starts_with("HTTP/1.1 404 "));
    // It stays, and says no more. Its place is another's in the end.
    host.until("the connection is closed", |h| {
        let request = b"GET http://nobody/ HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";
        (ask(h.proxy(), request).status == 404).then_some(())
    });
}

fn curl(host: &Host, args: &[&str], input: &[u8]) -> Option<(bool, String)> {
    let proxy = host.proxy().peer_addr().unwrap().to_string();
    let mut command = Command::new("curl");
    command
        .args(["-sS", "--max-time", "30", "-x", &proxy])
        .args(args);
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut curl = match command.spawn() {
        Ok(curl) => curl,
        Err(e) => {
            eprintln!("skipped: no curl ({e})");
            return None;
        }
    };
    // It may end before it has read all.
    let _ = curl.stdin.take().unwrap().write_all(input);
    let out = curl.wait_with_output().unwrap();
    let text = [out.stdout, out.stderr].concat();
    Some((
        out.status.success(),
        String::from_utf8_lossy(&text).into_owned(),
    ))
}

#[test]
fn curl_prints_why_its_upload_is_refused() {
    let (host, _ports) = Host::serving(&[("a", 3)], "");
    let body = vec![b'x'; MANY];
    for more in [
        &["--data-binary", "@-"][..],
        &["--data-binary", "@-", "-H", "Expect: 100-continue"],
        &["--data-binary", "@-", "-H", "Expect:"],
        &["--data-binary", "@-", "--http1.0"],
        &["-T", "-"],
        &["-T", "-", "-H", "Expect:"],
    ] {
        for _ in 0..3 {
            let args = [more, &["http://nobody/x"]].concat();
            let Some((ok, said)) = curl(&host, &args, &body) else {
                return;
            };
            assert!(
                ok && said.contains("no VM is named `nobody`"),
                "{more:?}: {said}"
            );
        }
    }
}

#[test]
fn a_target_that_clients_send_and_uris_do_not_have_is_carried_as_browsers_spell_it() {
    let (host, ports) = Host::serving(&[("a", 3)], "");
    let control = ports[0].connected();
    for (target, carried) in [
        (&b"http://a/?q=\"x\""[..], "/?q=%22x%22"),
        (b"http://a/<b>`c`", "/%3Cb%3E%60c%60"),
        (b"http://a/{x}|y^z\\?[1]|{2}^", "/{x}|y^z\\?[1]|{2}^"),
        (b"http://a/a%22b", "/a%22b"),
        ("http://a/é".as_bytes(), "/é"),
        (b"http://a/\xe9\xff?\xe9", "/%E9%FF?%E9"),
    ] {
        let mut client = host.proxy();
        client
            .write_all(&[b"GET ", target, b" HTTP/1.1\r\nHost: a\r\n\r\n"].concat())
            .unwrap();
        let (mut guest, _) = control.tunnel();
        let got = head(&mut guest);
        assert!(
            got.starts_with(&format!("GET {carried} HTTP/1.1\r\n")),
            "{got}"
        );
    }
}

#[test]
fn a_target_that_names_no_host_hears_which_byte_is_wrong() {
    let (host, _ports) = Host::serving(&[("a", 3)], "");
    for (target, why) in [
        ("http://a\"b/", "`\"`"),
        ("http://a|b/", "`|`"),
        ("http://a^/", "`^`"),
        ("http://é/", "0xc3"),
        ("http:///x", "`http:///x`"),
        ("http://a:b:c/", "`http://a:b:c/`"),
        ("http://[a/", "`http://[a/`"),
    ] {
        let request = format!("GET {target} HTTP/1.1\r\nHost: a\r\n\r\n");
        let answer = ask(host.proxy(), request.as_bytes());
        assert_eq!(answer.status, 400, "{target}");
        assert!(answer.body.contains(why), "{target}: {}", answer.body);
        assert!(
            answer.head.contains("error=http_request_error"),
            "{}",
            answer.head
        );
    }
}

#[test]
fn options_for_a_whole_server_is_the_servers_and_for_the_proxy_its_own() {
    let (host, ports) = Host::serving(&[("a", 3)], "");
    let control = ports[0].connected();
    for (target, carried) in [
        ("http://a", "*"),
        ("http://a/", "/"),
        ("http://a?x", "/?x"),
        ("http://a/*", "/*"),
    ] {
        let mut client = host.proxy();
        write!(client, "OPTIONS {target} HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
        let (mut guest, _) = control.tunnel();
        let got = head(&mut guest);
        assert!(
            got.starts_with(&format!("OPTIONS {carried} HTTP/1.1\r\n")),
            "{got}"
        );
    }
    let request = b"OPTIONS * HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";
    let answer = ask(host.proxy(), request);
    assert_eq!(answer.status, 200);
    assert!(
        answer.head.contains("allow: ") && answer.head.contains("connect"),
        "{}",
        answer.head
    );
}

#[test]
fn a_host_name_knows_no_case() {
    let (host, ports) = Host::serving(&[("web-1", 3)], "");
    let control = ports[0].connected();
    for request in [
        "GET http://WEB-1/ HTTP/1.1\r\nHost: WEB-1\r\n\r\n",
        "GET HTTP://web-1./ HTTP/1.1\r\nHost: web-1.\r\n\r\n",
        "CONNECT Web-1.Adit:80 HTTP/1.1\r\nHost: Web-1:80\r\n\r\n",
        "CONNECT web-1.:80 HTTP/1.1\r\nHost: web-1.:80\r\n\r\n",
    ] {
        let mut client = host.proxy();
        client.write_all(request.as_bytes()).unwrap();
        control.dialed(control.dial().id);
        control.attached();
    }
}

#[test]
fn an_answer_may_have_many_header_fields() {
    let (host, ports) = Host::serving(&[("a", 3)], "");
    let control = ports[0].connected();
    for (fields, status) in [(500, 200), (2000, 502)] {
        let mut client = host.proxy();
        client
            .write_all(b"GET http://a/ HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
            .unwrap();
        let (mut guest, _) = control.tunnel();
        head(&mut guest);
        let cookies = "Set-Cookie: a=b\r\n".repeat(fields);
        write!(
            guest,
            "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n{cookies}\r\nok"
        )
        .unwrap();
        let mut said = Vec::new();
        client.read_to_end(&mut said).unwrap();
        let answer = Answer::parse(&said).unwrap();
        assert_eq!(answer.status, status);
        if status == 200 {
            assert_eq!(answer.head.matches("set-cookie").count(), fields);
        }
    }
}

/// A library that sends all before it reads.
#[test]
fn pythons_client_hears_why_its_upload_is_refused() {
    let (host, _ports) = Host::serving(&[("a", 3)], "");
    let to = host.proxy().peer_addr().unwrap();
    const SCRIPT: &str = "import http.client, sys\n\
        for path in ['http://nobody/', 'http://a:81/', 'ftp://a/']:\n\
        \x20   c = http.client.HTTPConnection(sys.argv[1], int(sys.argv[2]))\n\
        \x20   c.request('POST', path, body=b'x' * (8 << 20))\n\
        \x20   r = c.getresponse()\n\
        \x20   print(r.status, len(r.read()) > 0)\n";
    let mut python = Command::new("python3");
    python.args(["-c", SCRIPT, &to.ip().to_string(), &to.port().to_string()]);
    match python.output() {
        Ok(out) => assert_eq!(
            String::from_utf8_lossy(&out.stdout),
            "404 True\n403 True\n400 True\n",
            "{}",
            String::from_utf8_lossy(&out.stderr)
        ),
        Err(e) => eprintln!("skipped: no python3 ({e})"),
    }
}

#[test]
fn the_operators_upload_that_is_too_large_hears_why() {
    let (host, _ports) = Host::serving(&[], "[metrics]\nlisten = \"127.0.0.1:0\"");
    let request = upload("/v1/goals", "");
    let mut operator = host.operator();
    operator.write_all(&request).unwrap();
    let mut said = Vec::new();
    operator.read_to_end(&mut said).unwrap();
    assert_eq!(Answer::parse(&said).unwrap().status, 413);
    let metrics = || host.tcp("metrics.addr", [127, 0, 0, 1]);
    assert_eq!(ask(metrics(), &request).status, 413);
    // A path that is not there is called so there too.
    let unknown = ask(
        metrics(),
        b"GET /v1/vms HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    );
    assert!(
        unknown.status == 404 && unknown.body.contains("unknown-path"),
        "{}",
        unknown.body
    );
}
