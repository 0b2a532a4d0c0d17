//! The head of a request in a stream, checked, and made one that goes on as HTTP/1.1. Pure.
//!
//! h2 resets a stream whose head is malformed by RFC 9113 §8.2 and §8.3: fields of one connection, capital letters, pseudo-header
//! fields that are missing, twice or in the wrong place, a Content-Length that the body does not keep. What it lets through:
//!
//! | in the head | answer |
//! |---|---|
//! | more than [`FIELDS_MAX`] fields | 431; more than the connection allows in bytes: 431, by h2 |
//! | `Host` twice, or another one than `:authority` | 400 (RFC 9113 §8.3.1) |
//! | `Content-Length` twice, or with CONNECT | 400 |
//! | a field of one connection, should h2 let one through | 400 (RFC 9113 §8.2.2) |
//! | a value with a space at its beginning or end | 400 (RFC 9113 §8.2.1) |
//! | a scheme that is not carried | 400 |
//! | a `:path` that begins with no `/`, but `*` of OPTIONS | 400 |
//!
//! Pieces of a cookie are put together, as HTTP/1.1 has one (RFC 9113 §8.2.3).

use hyper::header::{CONTENT_LENGTH, COOKIE, HOST, HeaderMap, HeaderName, HeaderValue};
use hyper::http::request::Parts;
use hyper::{Method, StatusCode, Uri};

use super::OF_A_CONNECTION;
use crate::proxy::client::{FIELDS_MAX, may_name, shown};
use crate::proxy::problem::Problem;

/// Checks a head, and makes it what goes on. `over_tls`: its client speaks TLS with the proxy. Returns whether it asks for a
/// server as a whole.
///
/// # Errors
/// It is refused.
pub(super) fn check(head: &mut Parts, over_tls: bool) -> Result<bool, Problem> {
    let bad = |why: &str| Err(Problem::malformed(why));
    let fields = &head.headers;
    if fields.len() > FIELDS_MAX {
        let why = format!("a request has at most {FIELDS_MAX} header fields");
        let status = StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE;
        let problem = Problem::malformed(why).remedy("send fewer fields");
        return Err(Problem { status, ..problem });
    }
    if OF_A_CONNECTION
        .iter()
        .any(|name| fields.contains_key(*name))
    {
        return bad("a request of HTTP/2 has no fields of one connection");
    }
    let is_space = |byte: Option<&u8>| matches!(byte, Some(b' ' | b'\t'));
    let mut values = fields.values().map(HeaderValue::as_bytes);
    if values.any(|value| is_space(value.first()) || is_space(value.last())) {
        return bad("the value of a field has a space at its beginning or end");
    }
    if count(fields, &CONTENT_LENGTH) > 1 {
        return bad("Content-Length is there twice");
    }
    host(&head.uri, fields)?;
    if head.method == Method::CONNECT {
        if fields.contains_key(CONTENT_LENGTH) {
            return bad("CONNECT has no body");
        }
        return Ok(false);
    }
    scheme(head, over_tls)?;
    let path = head.uri.path_and_query().map_or("", |path| path.as_str());
    let whole = path == "*" && head.method == Method::OPTIONS;
    if !whole && !path.starts_with('/') {
        return bad("`:path` begins with no `/`");
    }
    one_cookie(&mut head.headers);
    Ok(whole)
}

/// Checks that one host is named.
fn host(uri: &Uri, fields: &HeaderMap) -> Result<(), Problem> {
    if count(fields, &HOST) > 1 {
        return Err(Problem::malformed("Host is there twice"));
    }
    let authority = uri.authority().map(|authority| authority.as_str());
    let host = fields.get(HOST).map(HeaderValue::as_bytes);
    if let (Some(authority), Some(host)) = (authority, host)
        && !authority.as_bytes().eq_ignore_ascii_case(host)
    {
        return Err(Problem::malformed("Host and `:authority` differ"));
    }
    for named in [authority.map(str::as_bytes), host].into_iter().flatten() {
        if let Some(byte) = named.iter().find(|&&b| !may_name(b) || b == b'/') {
            let why = format!("the host has {}, which no host has", shown(*byte));
            return Err(Problem::malformed(why));
        }
    }
    Ok(())
}

/// Whoever speaks TLS with the proxy as if it were the VM says `https` of that, and it ends here.
fn scheme(head: &mut Parts, over_tls: bool) -> Result<(), Problem> {
    let Some(scheme) = head.uri.scheme_str() else {
        return Ok(());
    };
    if !over_tls || scheme != "https" {
        return Ok(());
    }
    let mut parts = std::mem::take(&mut head.uri).into_parts();
    parts.scheme = Some(hyper::http::uri::Scheme::HTTP);
    head.uri = Uri::from_parts(parts).map_err(|e| Problem::malformed(e.to_string()))?;
    Ok(())
}

fn one_cookie(fields: &mut HeaderMap) {
    if count(fields, &COOKIE) < 2 {
        return;
    }
    let pieces: Vec<_> = fields
        .get_all(COOKIE)
        .iter()
        .map(HeaderValue::as_bytes)
        .collect();
    if let Ok(cookie) = HeaderValue::from_bytes(&pieces.join(&b"; "[..])) {
        fields.insert(COOKIE, cookie);
    }
}

fn count(fields: &HeaderMap, name: &HeaderName) -> usize {
    fields.get_all(name).iter().count()
}

#[cfg(test)]
mod tests {
    use hyper::Request;

    use super::*;

    fn parts(method: &str, uri: &str, fields: &[(&str, &str)]) -> Parts {
        let mut request = Request::builder().method(method).uri(uri);
        for (name, value) in fields {
            request = request.header(*name, *value);
        }
        request.body(()).unwrap().into_parts().0
    }

    fn status(method: &str, uri: &str, fields: &[(&str, &str)]) -> u16 {
        let checked = check(&mut parts(method, uri, fields), false);
        checked.map_or_else(|why| why.status.as_u16(), |_| 200)
    }

    #[test]
    fn r65_two_answers_to_one_question_are_refused() {
        for (uri, fields, expected) in [
            ("http://a/", &[][..], 200),
            ("http://a/", &[("host", "a")][..], 200),
            ("http://a/", &[("host", "A")][..], 200),
            ("http://a/", &[("host", "b")][..], 400),
            ("http://a/", &[("host", "a:80")][..], 400),
            ("http://a/", &[("host", "a"), ("host", "a")][..], 400),
            ("http://a/", &[("host", "")][..], 400),
            ("/", &[("host", "a/b")][..], 400),
            ("/", &[("host", "a")][..], 200),
            ("http://a/", &[("content-length", "1")][..], 200),
            (
                "http://a/",
                &[("content-length", "1"), ("content-length", "1")][..],
                400,
            ),
            ("http://a/", &[("connection", "close")][..], 400),
            ("http://a/", &[("transfer-encoding", "chunked")][..], 400),
            ("http://a/", &[("proxy-connection", "x")][..], 400),
            ("http://a/", &[("x", " a")][..], 400),
            ("http://a/", &[("x", "a\t")][..], 400),
            ("http://a/", &[("x", "")][..], 200),
            ("*", &[][..], 400),
        ] {
            assert_eq!(status("GET", uri, fields), expected, "{uri} {fields:?}");
        }
        assert_eq!(status("CONNECT", "a:1", &[]), 200);
        assert_eq!(status("CONNECT", "a:1", &[("content-length", "0")]), 400);
        let many: Vec<_> = (0..=FIELDS_MAX).map(|n| format!("x-{n}")).collect();
        let many: Vec<_> = many.iter().map(|name| (name.as_str(), "")).collect();
        assert_eq!(status("GET", "http://a/", &many), 431);
    }

    #[test]
    fn https_is_what_a_client_speaks_with_the_proxy_or_nothing() {
        for over_tls in [true, false] {
            let mut head = parts("GET", "https://a/b?c", &[]);
            check(&mut head, over_tls).unwrap();
            let scheme = if over_tls { "http" } else { "https" };
            assert_eq!(head.uri.to_string(), format!("{scheme}://a/b?c"));
        }
    }

    #[test]
    fn pieces_of_a_cookie_are_one() {
        let mut head = parts(
            "GET",
            "/",
            &[("cookie", "a=1"), ("x", "y"), ("cookie", "b=2")],
        );
        check(&mut head, false).unwrap();
        let cookies: Vec<_> = head.headers.get_all(COOKIE).iter().collect();
        assert_eq!(cookies, ["a=1; b=2"]);
    }

    #[test]
    fn options_may_be_about_a_whole_server() {
        let whole = |path| check(&mut parts("OPTIONS", path, &[]), false).unwrap();
        assert!(whole("*") && !whole("/") && !whole("http://a/"));
    }
}
