//! Which header fields concern one connection only, and what the next connection gets in their place (RFC 9110 §7.6.1).
//!
//! | field | on the way |
//! |---|---|
//! | `Connection` and what it names, `Keep-Alive`, `Proxy-Connection`, `Transfer-Encoding`, `Proxy-Auth…` | taken out |
//! | `TE` | taken out; `TE: trailers` is said again |
//! | `Upgrade` | taken out; said again where an upgrade is possible ([`Hop::upgrade`]) |
//! | `Trailer` | carried where the trailers are |
//! | `Via`, `Forwarded` | carried, with ours behind what is there |
//! | `traceparent` | ours, of the same trace; `tracestate` goes with it |
//! | everything else | carried, in its order and spelling |

use std::net::SocketAddr;

use hyper::Version;
use hyper::header::{
    AUTHORIZATION, CONNECTION, CONTENT_LENGTH, FORWARDED, HeaderMap, HeaderName, HeaderValue,
    PROXY_AUTHENTICATE, PROXY_AUTHORIZATION, TE, TRAILER, TRANSFER_ENCODING, UPGRADE, VIA,
    WWW_AUTHENTICATE,
};
use hyper::http::header::GetAll;

use crate::trace::Trace;

pub(crate) const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
const TRACESTATE: HeaderName = HeaderName::from_static("tracestate");

/// Authentication schemes that let a connection in, and not a request: such a connection is one client's.
const OF_A_CONNECTION: [&str; 2] = ["ntlm", "negotiate"];

/// What a message says about its connection that the next connection must be told, too.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Hop {
    /// The sender takes trailers.
    pub(super) trailers: bool,
    /// The protocols that may be spoken instead of HTTP/1.1.
    pub(super) upgrade: Option<HeaderValue>,
}

impl Hop {
    /// Takes out of a message what concerns its connection only.
    pub(super) fn take_from(headers: &mut HeaderMap) -> Self {
        let named: Vec<HeaderName> = words(headers.get_all(CONNECTION))
            .filter_map(|name| name.parse().ok())
            .collect();
        let trailers = words(headers.get_all(TE)).any(|w| w.eq_ignore_ascii_case("trailers"));
        let upgrade = named.contains(&UPGRADE).then(|| upgrade(headers));
        let own = ["proxy-connection", "keep-alive"].map(HeaderName::from_static);
        let ours = [
            CONNECTION,
            TE,
            TRANSFER_ENCODING,
            UPGRADE,
            PROXY_AUTHORIZATION,
            PROXY_AUTHENTICATE,
        ];
        retain(headers, |name| {
            !named.contains(name) && !own.contains(name) && !ours.contains(name)
        });
        Self {
            trailers,
            upgrade: upgrade.flatten(),
        }
    }

    /// Without what only a request says.
    pub(super) fn upgrade_only(self) -> Self {
        Self {
            trailers: false,
            ..self
        }
    }

    /// Says it on the next connection.
    pub(super) fn put_into(self, headers: &mut HeaderMap) {
        let mut named = Vec::new();
        if self.trailers {
            headers.insert(TE, HeaderValue::from_static("trailers"));
            named.push("TE");
        }
        if let Some(protocols) = self.upgrade {
            headers.insert(UPGRADE, protocols);
            named.push("Upgrade");
        }
        if let Ok(named) = HeaderValue::from_str(&named.join(", "))
            && !named.is_empty()
        {
            headers.insert(CONNECTION, named);
        }
    }
}

/// The protocols of an `Upgrade`. Not HTTP/2: its settings are a field of one connection, and without them nobody changes.
fn upgrade(headers: &HeaderMap) -> Option<HeaderValue> {
    let protocols: Vec<&str> = words(headers.get_all(UPGRADE)).collect();
    if protocols.is_empty() || protocols.iter().any(|p| p.eq_ignore_ascii_case("h2c")) {
        return None;
    }
    HeaderValue::from_str(&protocols.join(", ")).ok()
}

/// The elements of a list, without their parameters.
fn words(values: GetAll<'_, HeaderValue>) -> impl Iterator<Item = &str> {
    elements(values)
        .filter_map(|element| element.split(';').next())
        .map(str::trim)
        .filter(|word| !word.is_empty())
}

/// The elements of a list.
fn elements(values: GetAll<'_, HeaderValue>) -> impl Iterator<Item = &str> {
    values
        .into_iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(str::trim)
        .filter(|element| !element.is_empty())
}

/// Takes fields out and leaves the others in their order, which `HeaderMap::remove` does not.
fn retain(headers: &mut HeaderMap, keep: impl Fn(&HeaderName) -> bool) {
    if headers.keys().all(&keep) {
        return;
    }
    let mut kept = HeaderMap::with_capacity(headers.len());
    let mut current = None;
    for (name, value) in headers.drain() {
        current = name.or(current);
        if let Some(name) = current.as_ref().filter(|name| keep(name)) {
            kept.append(name, value);
        }
    }
    *headers = kept;
}

/// Leaves one way to tell where the body of an answer ends. False: there were two, so that what follows it is not to be trusted.
///
/// # Errors
/// Nobody can tell.
pub(super) fn plain_framing(headers: &mut HeaderMap) -> Result<bool, &'static str> {
    if headers.contains_key(TRANSFER_ENCODING) {
        let codings: Vec<_> = elements(headers.get_all(TRANSFER_ENCODING)).collect();
        if !matches!(codings[..], [one] if one.eq_ignore_ascii_case("chunked")) {
            return Err("its answer has another transfer coding than `chunked`");
        }
        let both = headers.contains_key(CONTENT_LENGTH);
        // The chunks count (RFC 9112 §6.3).
        retain(headers, |name| *name != CONTENT_LENGTH);
        return Ok(!both);
    }
    if headers.contains_key(CONTENT_LENGTH) {
        let mut lengths: Vec<_> = elements(headers.get_all(CONTENT_LENGTH)).collect();
        lengths.dedup();
        match lengths[..] {
            [one] if one.bytes().all(|b| b.is_ascii_digit()) => {
                let one = HeaderValue::from_str(one).ok();
                one.map(|one| headers.insert(CONTENT_LENGTH, one));
            }
            _ => return Err("the Content-Length of its answer is no number"),
        }
    }
    Ok(true)
}

/// Takes out the announcement of trailers that will not come.
pub(super) fn without_trailers(headers: &mut HeaderMap) {
    retain(headers, |name| *name != TRAILER);
}

/// Says that a message of this version came by way of us.
pub(super) fn add_via(headers: &mut HeaderMap, received: Version) {
    let via = match received {
        Version::HTTP_10 => "1.0 adit",
        Version::HTTP_2 => "2.0 adit",
        _ => "1.1 adit",
    };
    headers.append(VIA, HeaderValue::from_static(via));
}

/// Says for whom a request is forwarded (RFC 7239): after what a proxy before us has said, which it may have made up. A client
/// whose address says nothing, as of a Unix socket, is `unknown`; no name of a caller goes to a guest.
pub(super) fn add_forwarded(headers: &mut HeaderMap, from: &str, host: &HeaderValue) {
    let node = match from.parse::<SocketAddr>() {
        // The node is quoted for its colons, an IPv6 address for its brackets, too (§4, §6).
        Ok(at) => format!("\"{}\"", SocketAddr::new(at.ip().to_canonical(), at.port())),
        Err(_) => "unknown".into(),
    };
    // It has passed as an authority: no quote and no backslash is in it.
    let host = host.to_str().unwrap_or_default();
    let element = format!("for={node};host=\"{host}\";proto=http;by=_adit");
    if let Ok(element) = HeaderValue::from_str(&element) {
        headers.append(FORWARDED, element);
    }
}

/// Puts a request under its span. What the client said of a trace counts only where it was understood: without a `traceparent`
/// that is one, its `tracestate` says nothing (W3C Trace Context §3.3.1).
pub(super) fn set_trace(headers: &mut HeaderMap, trace: Trace) {
    if given_trace(headers).is_none() {
        retain(headers, |name| *name != TRACESTATE);
    }
    if let Ok(value) = HeaderValue::from_str(&trace.to_string()) {
        headers.insert(TRACEPARENT, value);
    }
}

/// The trace that a client gives; none: there is none, or more than one, or it is not understood.
pub(super) fn given_trace(headers: &HeaderMap) -> Option<Trace> {
    let mut all = headers.get_all(TRACEPARENT).iter();
    let (one, other) = (all.next()?, all.next());
    match other {
        None => Trace::parse(one.as_bytes()),
        Some(_) => None,
    }
}

/// Whether a message is part of an authentication that is a whole connection's.
pub(super) fn binds_connection(headers: &HeaderMap) -> bool {
    [AUTHORIZATION, WWW_AUTHENTICATE].iter().any(|name| {
        let schemes = words(headers.get_all(name)).filter_map(|word| word.split(' ').next());
        schemes.into_iter().any(|scheme| {
            OF_A_CONNECTION
                .iter()
                .any(|s| scheme.eq_ignore_ascii_case(s))
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(fields: &[(&'static str, &str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in fields {
            headers.append(*name, value.parse().unwrap());
        }
        headers
    }

    fn names(headers: &HeaderMap) -> Vec<&str> {
        headers.keys().map(HeaderName::as_str).collect()
    }

    #[test]
    fn hop_by_hop_fields_and_those_named_by_connection_are_taken_out() {
        let mut h = headers(&[
            ("connection", "close, X-Private"),
            ("x-private", "1"),
            ("proxy-authorization", "Basic x"),
            ("te", "deflate;q=0.5"),
            ("upgrade", "websocket"),
            ("proxy-connection", "keep-alive"),
            ("accept", "*/*"),
        ]);
        assert_eq!(Hop::take_from(&mut h), Hop::default());
        assert_eq!(names(&h), ["accept"]);
    }

    #[test]
    fn fields_keep_their_order_whatever_is_taken_out_between_them() {
        let mut h = headers(&[
            ("connection", "b"),
            ("a", "1"),
            ("b", "2"),
            ("c", "3"),
            ("a", "4"),
            ("te", "trailers"),
            ("d", "5"),
            ("e", "6"),
        ]);
        Hop::take_from(&mut h);
        assert_eq!(names(&h), ["a", "c", "d", "e"]);
        assert_eq!(h.get_all("a").iter().collect::<Vec<_>>(), ["1", "4"]);
    }

    #[test]
    fn trailers_and_upgrades_are_said_again_on_the_next_connection() {
        let mut h = headers(&[
            ("connection", "keep-alive, Upgrade"),
            ("upgrade", "websocket"),
            ("te", "gzip, trailers;q=1"),
        ]);
        let hop = Hop::take_from(&mut h);
        assert!(h.is_empty());
        hop.put_into(&mut h);
        let expected = headers(&[
            ("te", "trailers"),
            ("upgrade", "websocket"),
            ("connection", "TE, Upgrade"),
        ]);
        assert_eq!(h, expected);
    }

    #[test]
    fn an_upgrade_needs_connection_and_is_never_to_http_2() {
        for fields in [
            &[("upgrade", "websocket")][..],
            &[("connection", "upgrade"), ("upgrade", "h2c")],
            &[("connection", "upgrade")],
        ] {
            let mut h = headers(fields);
            assert_eq!(Hop::take_from(&mut h).upgrade, None, "{fields:?}");
            Hop::default().put_into(&mut h);
            assert!(h.is_empty(), "{fields:?}");
        }
    }

    #[test]
    fn a_request_says_for_whom_it_is_forwarded_behind_what_others_have_said() {
        let host = HeaderValue::from_static("web-1:8080");
        for (from, node) in [
            ("127.0.0.1:40312", "\"127.0.0.1:40312\""),
            ("[2001:db8::1]:9", "\"[2001:db8::1]:9\""),
            ("[::ffff:192.0.2.1]:9", "\"192.0.2.1:9\""),
            ("a Unix socket (uid 7)", "unknown"),
        ] {
            let mut h = headers(&[("forwarded", "for=198.51.100.1")]);
            add_forwarded(&mut h, from, &host);
            let all: Vec<_> = h.get_all(FORWARDED).iter().collect();
            let own = format!("for={node};host=\"web-1:8080\";proto=http;by=_adit");
            assert_eq!(all, ["for=198.51.100.1", &own], "{from}");
        }
    }

    #[test]
    fn r72_a_trace_that_is_not_understood_is_not_passed_on_and_nor_is_its_state() {
        let good = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        let on = Trace::new([7; crate::trace::RANDOM]);
        for (given, is_kept) in [
            (&[good][..], true),
            (&[good, good], false),
            (&["00-0-0-0"], false),
            (&[], false),
        ] {
            let mut h = headers(&[("tracestate", "a=b")]);
            for value in given {
                h.append("traceparent", value.parse().unwrap());
            }
            assert_eq!(given_trace(&h).is_some(), is_kept, "{given:?}");
            set_trace(&mut h, on);
            assert_eq!(h.contains_key("tracestate"), is_kept, "{given:?}");
            let all: Vec<_> = h.get_all("traceparent").iter().collect();
            assert_eq!(all, [&*on.to_string()]);
        }
    }

    #[test]
    fn schemes_that_let_a_connection_in_are_known() {
        for (name, value, binds) in [
            ("authorization", "NTLM TlRMTVNTUAAB", true),
            ("authorization", "Basic eA==", false),
            ("www-authenticate", "Basic realm=\"x\", Negotiate", true),
            ("www-authenticate", "Digest realm=\"ntlm\"", false),
            ("x-other", "NTLM", false),
        ] {
            assert_eq!(
                binds_connection(&headers(&[(name, value)])),
                binds,
                "{value}"
            );
        }
    }
}
