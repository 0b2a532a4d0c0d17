//! What the proxy answers by itself: questions about the proxy, and not about a VM.

use bytes::Bytes;
use http_body_util::{BodyExt, Empty};
use hyper::header::{ALLOW, HeaderValue, MAX_FORWARDS};
use hyper::{Method, Request, Response};

use super::problem::Body;

/// Any method is carried; these are the ones that people ask for.
const METHODS: HeaderValue =
    HeaderValue::from_static("CONNECT, DELETE, GET, HEAD, OPTIONS, PATCH, POST, PUT, TRACE");

/// The answer to `OPTIONS *`, and to an OPTIONS that may not go further (RFC 9110 §7.6.2); none: the request is a VM's, and has
/// one hop less to go.
pub(super) fn answer<B>(request: &mut Request<B>) -> Option<Response<Body>> {
    let options = request.method() == Method::OPTIONS;
    if !options && request.method() != Method::TRACE {
        return None;
    }
    let hops = request.headers().get(MAX_FORWARDS);
    let hops: Option<u32> = hops.and_then(|hops| hops.to_str().ok()?.parse().ok());
    if options && (request.uri() == "*" || hops == Some(0)) {
        let mut answer = Response::new(
            Empty::<Bytes>::new()
                .map_err(|never| match never {})
                .boxed(),
        );
        answer.headers_mut().insert(ALLOW, METHODS);
        return Some(answer);
    }
    if let Some(hops) = hops {
        let left = hops.saturating_sub(1).into();
        request.headers_mut().insert(MAX_FORWARDS, left);
    }
    None
}

/// What an answer's `Date` says; none: HTTP has no form for the year.
pub(super) fn date() -> Option<String> {
    let now = jiff::Timestamp::now();
    let printer = jiff::fmt::rfc2822::DateTimePrinter::new();
    printer.timestamp_to_rfc9110_string(&now).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(method: &str, target: &str, hops: Option<&str>) -> (bool, Option<String>) {
        let mut request = Request::builder().method(method).uri(target);
        if let Some(hops) = hops {
            request = request.header(MAX_FORWARDS, hops);
        }
        let mut request = request.body(()).unwrap();
        let own = answer(&mut request).is_some();
        let hops = request.headers().get(MAX_FORWARDS);
        (own, hops.map(|h| h.to_str().unwrap().to_owned()))
    }

    #[test]
    fn options_is_the_proxys_own_where_it_names_no_vm_or_may_not_go_further() {
        assert_eq!(asked("OPTIONS", "*", None), (true, None));
        assert!(asked("OPTIONS", "http://a/", Some("0")).0);
        assert_eq!(
            asked("OPTIONS", "http://a/", Some("5")),
            (false, Some("4".into()))
        );
        assert_eq!(asked("OPTIONS", "http://a", None), (false, None));
        // Of other methods it says nothing (RFC 9110 §7.6.2).
        assert_eq!(
            asked("GET", "http://a/", Some("0")),
            (false, Some("0".into()))
        );
    }
}
