//! Management listeners under hostile clients: wrong tokens, idle and waiting connections, floods.

use std::io::{Read, Write};

use crate::access::{UID, audit, curl, grant, other};
use crate::host::{Answer, Host};
use crate::limits::silent;
use crate::management::{Manager, management, started, token};

#[test]
fn r69_wrong_tokens_are_refused_are_written_down_and_make_their_client_wait() {
    let (host, _ports, token) = started("\"see\"");
    let ops = Manager { host: &host, token };
    let guess = |token: &str| Manager {
        host: &host,
        token: token.into(),
    };
    assert_eq!(guess("").status("GET", "/healthz", ""), 200);
    assert_eq!(ops.status("GET", "/v1/vms/a", ""), 200);
    let mut wrong = Vec::new();
    for n in 0..20 {
        wrong.push(guess(&format!("adit_{n}")).asks("GET", "/v1/vms", ""));
    }
    assert!(wrong[..8].iter().all(|answer| answer.status == 401));
    let later = wrong.last().unwrap();
    assert_eq!(later.status, 429, "{}", later.body);
    assert!(later.head.contains("retry-after: "), "{}", later.head);
    // Nothing is learnt meanwhile, of a right one neither; and what needs no token goes on.
    assert_eq!(ops.status("GET", "/v1/vms/a", ""), 429);
    assert_eq!(guess("").status("GET", "/healthz", ""), 200);
    let lines = audit(&host, 5);
    assert!(
        lines.iter().any(|line| line["reason"] == "bad-token"),
        "{lines:?}"
    );
    if nix::unistd::geteuid().is_root() {
        // Another user of the host is another client.
        let url = format!("http://{}/v1/vms/a", other(&host));
        let shown = format!("Authorization: Bearer {}", ops.token);
        if let Some((status, said)) = curl(UID, &["-H", &shown, &url]) {
            assert_eq!(status, 200, "{said}");
        }
        // And as curl has it with a password.
        let pair = format!("x:{}", ops.token);
        if let Some((status, said)) = curl(UID, &["-u", &pair, &url]) {
            assert_eq!(status, 200, "{said}");
        }
    }
    host.until("the wait is over", |_| {
        (ops.status("GET", "/v1/vms/a", "") == 200).then_some(())
    });
}

#[test]
fn r69_the_proxy_makes_whoever_shows_wrong_tokens_wait_too() {
    let (token, section) = token("ci");
    let more = section + &grant("\"token:ci\"", "\"a\"", "\"reach\", \"see\"");
    let (host, _ports) = Host::serving(&[("a", 3)], &more);
    let status = |token: &str| {
        let ask = format!(
            "GET http://a:81/ HTTP/1.1\r\nHost: a:81\r\nProxy-Authorization: Bearer {token}\r\nConnection: close\r\n\r\n"
        );
        crate::access::asked(host.proxy(), &ask)
    };
    assert_eq!(status(&token).status, 403);
    let answers: Vec<_> = (0..12).map(|n| status(&format!("adit_{n}"))).collect();
    assert!(answers[..8].iter().all(|answer| answer.status == 407));
    let later = answers.last().unwrap();
    assert_eq!(later.status, 429, "{}", later.body);
    assert!(later.head.contains("retry-after: "), "{}", later.head);
    assert_eq!(status(&token).status, 429);
}

#[test]
fn r108_idle_and_waiting_clients_of_a_management_listener_lock_out_neither_managers_nor_the_owner()
{
    for descriptors in [128, 256] {
        let (token, section) = token("ops");
        let more = management("") + &section + &grant("\"token:ops\"", "\"a\"", "\"see\"");
        let (mut host, _ports) = Host::new(&[("a", 3)], &more);
        host.start_with(descriptors);
        let ops = Manager { host: &host, token };
        let mut idle = Vec::new();
        let at = other(&host);
        for n in 0..300 {
            // Of many users, so that no client's share is the limit.
            let mut client = silent(&at, UID + n);
            if n % 2 == 0 {
                client.write_all(b"GET /v1/vms HT").unwrap();
            }
            idle.push(client);
            idle.push(host.proxy());
        }
        assert_eq!(host.api("GET", "/healthz", "").status, 200);
        assert_eq!(ops.status("GET", "/v1/vms/a", ""), 200);
        drop(idle);
        // Those that wait leave room for others, and take nothing from the owner.
        let waiting: Vec<_> = (0..40)
            .map(|n| {
                let mut client = silent(&at, UID + n);
                let ask = format!(
                    "GET /v1/vms/a/wait?for=agent&timeout_ms=3600000 HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {}\r\n\r\n",
                    ops.token
                );
                client.write_all(ask.as_bytes()).unwrap();
                client
            })
            .collect();
        host.until("a manager is served", |_| {
            let answer = ops.try_asks("GET", "/v1/vms/a", "").ok()?;
            (answer.status == 200).then_some(())
        });
        let late = host.api("GET", "/v1/vms/a/wait?for=agent&timeout_ms=1", "");
        assert_eq!(late.status, 408, "{}", late.body);
        drop(waiting);
    }
}

#[test]
fn r110_one_client_has_its_share_of_a_management_listener_and_no_more() {
    let (host, _ports, token) = started("\"see\"");
    let ops = Manager { host: &host, token };
    let at = other(&host);
    let held: Vec<_> = (0..16).map(|_| silent(&at, UID)).collect();
    let refused = Answer::parse(&{
        let mut said = Vec::new();
        silent(&at, UID).read_to_end(&mut said).unwrap();
        said
    });
    assert_eq!(refused.unwrap().status, 503);
    assert_eq!(ops.status("GET", "/v1/vms/a", ""), 200);
    drop(held);
}

#[test]
fn r111_a_flood_of_denials_is_ten_lines_a_second_and_a_count() {
    let (host, _ports, token) = started("\"see\"");
    let ops = Manager { host: &host, token };
    for _ in 0..60 {
        assert_eq!(ops.status("POST", "/v1/shutdown", ""), 403);
    }
    let lines = host.until("it is counted", |h| {
        let lines = audit(h, 1);
        lines
            .iter()
            .any(|line| line["suppressed"].is_u64())
            .then_some(lines)
    });
    let written = lines
        .iter()
        .filter(|line| line["reason"] == "not-owner")
        .count();
    assert!(written < 60, "{written}");
}

#[test]
fn what_comes_before_the_body_decides_and_a_body_of_nobody_is_not_read() {
    let (host, _ports, token) = started("\"see\"");
    let ops = Manager { host: &host, token };
    let mut client = ops.connect();
    // Far more than it sends: nobody waits for the rest.
    client
        .write_all(b"POST /v1/goals HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer x\r\nContent-Length: 1000000\r\n\r\nx")
        .unwrap();
    let mut said = [0; 12];
    client.read_exact(&mut said).unwrap();
    assert_eq!(&said, b"HTTP/1.1 401");
    // One that is two is none.
    let two = format!(
        "GET /v1/vms HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {0}\r\nAuthorization: Bearer {0}\r\n\r\n",
        ops.token
    );
    assert_eq!(crate::access::asked(ops.connect(), &two).status, 401);
}
