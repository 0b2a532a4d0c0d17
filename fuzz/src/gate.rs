//! Target `gate`: what a client says to `adit proxy`. It always ends; a host gets nothing but one request a connection that a second
//! reader finds in it too, with one framing; and the same bytes in other pieces ask hosts for the same, as far as they are asked: a connection
//! may end behind a request whose answer came before the end of its body was looked at.
//!
//! Input: the length of the pieces; the client's bytes.

use adit_cli::faked::{Heard, serve};

/// What a host was asked, as a second reader finds it: the method, what for, and how long the body is.
fn asked(bytes: &[u8]) -> Option<(String, String, String)> {
    let mut fields = [httparse::EMPTY_HEADER; 128];
    let mut request = httparse::Request::new(&mut fields);
    match request.parse(bytes).expect("a request") {
        httparse::Status::Complete(_) => {}
        // The client has left before.
        httparse::Status::Partial => return None,
    }
    let all = |name: &str| {
        let is = |field: &&httparse::Header<'_>| field.name.eq_ignore_ascii_case(name);
        let values = request.headers.iter().filter(is);
        let values = values.map(|field| String::from_utf8_lossy(field.value).into_owned());
        values.collect::<Vec<_>>()
    };
    let framing = [all("content-length"), all("transfer-encoding")].concat();
    assert!(framing.len() <= 1, "{framing:?}");
    assert!(!all("host").is_empty());
    assert_eq!(request.version, Some(1));
    let [method, path] = [request.method, request.path].map(|word| word.expect("whole").to_owned());
    let is_absolute = path.contains("://");
    assert!(is_absolute != (method == "CONNECT"), "{method} {path}");
    assert!(framing.is_empty() || method != "CONNECT");
    Some((method, path, framing.concat()))
}

fn all_asked(heard: &Heard) -> Vec<(String, String, String)> {
    heard.hosts.iter().filter_map(|host| asked(host)).collect()
}

pub fn run(data: &[u8]) {
    let Some((piece, bytes)) = data.split_first() else {
        return;
    };
    let whole = serve(bytes, bytes.len());
    let said = &whole.client;
    let answers = [&b"HTTP/1."[..], &[5, 0], &[5, 2], &[5, 0xff]];
    assert!(
        said.is_empty() || answers.iter().any(|begin| said.starts_with(begin)),
        "{said:02x?}"
    );
    let pieces = serve(bytes, usize::from(*piece));
    let (whole, pieces) = (all_asked(&whole), all_asked(&pieces));
    let both = whole.len().min(pieces.len());
    assert_eq!(whole[..both], pieces[..both]);
}
