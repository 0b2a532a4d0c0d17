//! What a client hears of every refusal, from where it begins.

use std::io;

use adit_channel::hello::{self, Common, Hello, Refuse};
use adit_names::ServiceName;
use adit_port::control::{DialFailed, Target};
use adit_port::control_io::Message;
use http_body_util::BodyExt as _;

use super::*;
use crate::reach::{Destination, dial};

/// Status, error type, `Retry-After` and the line of why of an answer.
type Heard = (u16, &'static str, Option<u32>, &'static str);

const LATER: Option<u32> = Some(1);

fn to(target: Target) -> Destination {
    let vm = "a".parse().unwrap();
    Destination::of(vm, target)
}

fn tcp() -> Destination {
    to(Target::Service(ServiceName::tcp(80)))
}

/// From a port process to the client, in the frame that is really sent.
fn of_dial(to: &Destination, failed: DialFailed) -> Problem {
    let frame = Message::DialFailed(failed).encode().unwrap();
    let Ok(Some(Message::DialFailed(failed))) = Message::decode(&frame) else {
        panic!("not the frame that was encoded")
    };
    dial::refusal(to, &failed).into()
}

/// What a dial of a port process's own ended with; `adit_channel::dial` has the codes and texts of its errors.
fn of_channel(to: &Destination, code: Code, text: &str) -> Problem {
    of_dial(to, DialFailed::new(7, &Refusal::new(code, text)))
}

/// From a guest to the client, in the hello that is really sent.
fn of_guest(refusal: Refusal) -> Problem {
    let common = Common::default();
    let bytes = Hello::Refuse(Refuse { common, refusal }).encode();
    let Ok(Hello::Refuse(refuse)) = hello::read(&mut &bytes[..]) else {
        panic!("not the hello that was encoded")
    };
    of_dial(&tcp(), DialFailed::new(7, &refuse.refusal))
}

fn of_guests_dial(errno: i32) -> Problem {
    let e = io::Error::from_raw_os_error(errno);
    of_guest(Refusal::of_io("127.0.0.1:80", &e))
}

/// The answer as the client has it.
fn check(problem: &Problem, (status, error, retry_after, text): Heard) {
    let response = problem.response();
    assert_eq!(response.status(), status, "{problem:?}");
    let field = |name| response.headers().get(name).map(|v| v.to_str().unwrap());
    assert_eq!(
        field("proxy-status"),
        Some(&*format!("adit; error={error}; details=\"{text}\""))
    );
    let seconds = retry_after.map(|s| s.to_string());
    assert_eq!(field("retry-after"), seconds.as_deref());
    let body = response.into_body().collect();
    let body = futures_util::FutureExt::now_or_never(body).unwrap();
    let remedy = problem.remedy;
    assert_eq!(
        body.unwrap().to_bytes(),
        format!("{text}\n{remedy}\n"),
        "{problem:?}"
    );
    let is_line = !remedy.is_empty() && !remedy.contains(char::is_control);
    assert!(is_line && !text.contains(remedy), "{problem:?}");
    // The same for a client that is not served.
    let bytes = problem.text();
    assert!(bytes.starts_with(&format!("HTTP/1.1 {status} ")), "{bytes}");
    assert!(bytes.contains(&format!("error={error};")), "{bytes}");
    assert_eq!(
        bytes.contains("\r\nRetry-After: 1\r\n"),
        retry_after.is_some()
    );
}

/// What begins with a code here, and what its client hears. No case is left out: the match is over all codes.
fn walk(code: Code) -> (Problem, Heard) {
    let of_listener = |text: &str| of_guest(Refusal::new(code, text));
    let of_host = |text: &str| Problem::from(Refusal::new(code, text));
    match code {
        Code::UnknownVm => (of_host("x"), (404, "destination_not_found", None, "x")),
        Code::Ambiguous => (of_host("x"), (409, "destination_not_found", None, "x")),
        Code::SilentHost => (of_host("x"), (503, "destination_unavailable", LATER, "x")),
        Code::NotAllowed => (of_host("x"), (403, "http_request_denied", None, "x")),
        Code::TooOften => (of_host("x"), (429, "connection_limit_reached", LATER, "x")),
        Code::Locked => (of_host("x"), (503, "destination_unavailable", None, "x")),
        Code::NoPortProcess => (of_host("x"), (503, "destination_unavailable", LATER, "x")),
        Code::Internal => (of_host("x"), (500, "proxy_internal_error", None, "x")),
        Code::NoSession => (
            of_channel(&tcp(), code, "guest has no running vsock driver"),
            (
                503,
                "destination_unavailable",
                LATER,
                "VM `a`: its guest is not up (no driver, or no VMM)",
            ),
        ),
        Code::NoAgent => (
            of_channel(&tcp(), code, "nothing listens on that port of the guest"),
            (
                503,
                "destination_unavailable",
                LATER,
                "VM `a`: no agent listens in the guest: is adit-guest running?",
            ),
        ),
        Code::NoListener => (
            of_channel(
                &to(Target::VsockPort(5000)),
                code,
                "nothing listens on that port of the guest",
            ),
            (
                502,
                "connection_refused",
                None,
                "VM `a` port 5000: nobody listens there",
            ),
        ),
        Code::NoAnswer => (
            of_channel(&tcp(), code, "guest did not answer in time"),
            (
                504,
                "connection_timeout",
                None,
                "VM `a` port 80: guest did not answer in time",
            ),
        ),
        Code::Reset => (
            of_channel(&tcp(), code, "guest ended the stream before it answered"),
            (
                502,
                "connection_terminated",
                None,
                "VM `a` port 80: guest ended the stream before it answered",
            ),
        ),
        Code::Foreign => (
            of_channel(&tcp(), code, "the guest's answer is not a hello"),
            (
                502,
                "http_protocol_error",
                None,
                "VM `a` port 80: the guest's answer is not a hello",
            ),
        ),
        Code::Version => (
            of_listener("only version 1 is spoken"),
            (
                502,
                "connection_refused",
                None,
                "VM `a` port 80: only version 1 is spoken",
            ),
        ),
        Code::UnknownService => (
            of_listener("no"),
            (403, "http_request_denied", None, "VM `a` port 80: no"),
        ),
        Code::Denied => (
            of_listener("no"),
            (403, "http_request_denied", None, "VM `a` port 80: no"),
        ),
        Code::WrongVm | Code::TooLarge | Code::NoSpace | Code::Mismatch | Code::Other(_) => (
            of_listener("no"),
            (502, "connection_refused", None, "VM `a` port 80: no"),
        ),
        Code::DialFailed => (
            of_guests_dial(libc::ECONNREFUSED),
            (
                502,
                "connection_refused",
                None,
                "VM `a` port 80: 127.0.0.1:80: Connection refused (os error 111)",
            ),
        ),
        Code::DialTimedOut => (
            of_guests_dial(libc::ETIMEDOUT),
            (
                504,
                "connection_timeout",
                None,
                "VM `a` port 80: 127.0.0.1:80: Connection timed out (os error 110)",
            ),
        ),
        Code::Busy => (
            of_guests_dial(libc::EMFILE),
            (
                503,
                "connection_limit_reached",
                LATER,
                "VM `a` port 80: 127.0.0.1:80: Too many open files (os error 24)",
            ),
        ),
    }
}

#[test]
fn every_code_reaches_the_client_as_one_answer() {
    for code in Code::ALL {
        let (problem, heard) = walk(code);
        check(&problem, heard);
        assert_eq!(problem.remedy, remedy::of(code), "{code}");
        // It is of everybody, so it names nobody; a word of a command line or of a file is whole.
        assert!(!problem.remedy.contains(['{', '}']), "{code}");
        assert_eq!(problem.remedy.matches('`').count() % 2, 0, "{code}");
    }
}

/// What is no VM of any host is refused before anybody looks for it: the answer is no other.
#[test]
fn a_name_that_no_vm_can_have_and_a_request_that_is_none_have_a_remedy_too() {
    let suffix = crate::reach::Suffix::default();
    for (named, status) in [("a_b:80", 404), ("a:99999", 400), ("a:", 400), ("", 400)] {
        let e = crate::proxy::authority::parse(&suffix, named, None).unwrap_err();
        let problem = Problem::from(e);
        assert_eq!(problem.status.as_u16(), status, "{named}: {problem:?}");
        assert_eq!(problem.remedy, WRITE_A_NAME, "{named}");
    }
    assert_eq!(Problem::malformed("x").remedy, WRITE_A_REQUEST);
}

/// A guest that is busy, and a port process that is, are the same to a client.
#[test]
fn a_port_process_that_is_busy_is_an_answer_too() {
    let problem = of_channel(&tcp(), Code::Busy, "too many streams are open");
    let text = "VM `a` port 80: too many streams are open";
    check(&problem, (503, "connection_limit_reached", LATER, text));
}

#[test]
fn an_errno_that_does_not_exist_is_a_dial_that_failed() {
    for errno in [0, 134, 4095, 65_535, 65_536, -1, i32::MIN, i32::MAX] {
        let problem = of_guests_dial(errno);
        assert_eq!(
            (problem.status.as_u16(), problem.error),
            (502, "connection_refused")
        );
    }
}

/// Numbers that only a newer guest, or a hostile port process, has.
#[test]
fn every_number_of_a_listener_is_an_answer() {
    for status in 0..=u16::MAX {
        let failed = DialFailed {
            id: 1,
            error: adit_port::control::DialError::HelloRefused,
            status,
            errno: status,
            text: String::new(),
        };
        let problem = Problem::from(dial::refusal(&tcp(), &failed));
        let known = match status {
            2 | 3 => 403,
            5 => 503,
            _ => 502,
        };
        assert_eq!(problem.status.as_u16(), known, "{status}");
        let text = "VM `a` port 80: dial failed";
        assert_eq!(problem.detail, text, "{status}");
    }
}

#[test]
fn a_guests_text_is_bounded_and_stays_text() {
    let hostile = "\x1b[2J\r\nX: y\"\\".repeat(8 << 10);
    let from_guest = of_guest(Refusal::new(Code::Denied, hostile.clone()));
    let from_port = Problem::from(dial::refusal(
        &tcp(),
        &DialFailed {
            id: 1,
            error: adit_port::control::DialError::Timeout,
            status: 3,
            errno: 0,
            text: hostile,
        },
    ));
    for problem in [from_guest, from_port] {
        assert!(problem.detail.len() <= adit_channel::refusal::TEXT_MAX);
        let lines = problem.lines();
        assert_eq!(
            lines.chars().filter(|c| c.is_control()).collect::<String>(),
            "\n\n"
        );
        let response = problem.response();
        let value = response.headers()["proxy-status"].to_str().unwrap();
        assert!(!value.contains(char::is_control), "{value}");
    }
}

#[test]
fn details_stay_inside_their_quotes() {
    let p = Problem::new(
        StatusCode::NOT_FOUND,
        "destination_not_found",
        "a\"b\\c\r\nX: y\u{e9}",
        "x",
    );
    let value = p.response().headers()["proxy-status"]
        .to_str()
        .unwrap()
        .to_owned();
    assert_eq!(
        value,
        r#"adit; error=destination_not_found; details="a\"b\\c??X: y?""#
    );
}
