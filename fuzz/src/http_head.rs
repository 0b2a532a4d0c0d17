//! Target `http_head`: a client's head of a request. One that is taken is written anew so that another reader, the one that hyper
//! has, finds one request in it, and written anew once more it stays as it is.
//!
//! Input: the head.

use adit_host_proxy::proxy::checked_head;

pub fn run(data: &[u8]) {
    let Some(written) = checked_head(data) else {
        return;
    };
    let mut fields = [httparse::EMPTY_HEADER; 128];
    let mut request = httparse::Request::new(&mut fields);
    let parsed = request.parse(&written).expect("no fault");
    // All of it is one head.
    assert_eq!(parsed, httparse::Status::Complete(written.len()));
    let count = |name: &str| {
        let is = |field: &&httparse::Header<'_>| field.name.eq_ignore_ascii_case(name);
        request.headers.iter().filter(is).count()
    };
    assert!(count("host") <= 1);
    assert!(count("host") == 1 || request.version == Some(0));
    assert!(count("content-length") + count("transfer-encoding") <= 1);
    assert_eq!(checked_head(&written).as_deref(), Some(&written[..]));
}
