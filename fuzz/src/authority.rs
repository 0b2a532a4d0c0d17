//! Target `authority`: a client's text for a VM and a port. One that is taken has one spelling, which means the same; and in every
//! case of its letters it is the same.
//!
//! Input: whether there is a default port; the text.

use adit_host_proxy::proxy::authority;
use adit_host_proxy::reach::Suffix;

pub fn run(data: &[u8]) {
    let Some((default, text)) = data.split_first() else {
        return;
    };
    let Ok(text) = std::str::from_utf8(text) else {
        return;
    };
    let suffix = Suffix::default();
    let parse = |text: &str, default| authority::parse(&suffix, text, default);
    let default = (default % 2 == 1).then_some(80);
    match parse(text, default) {
        Ok(to) => {
            assert!(!text.contains('@') && text.is_ascii());
            let again = to.authority();
            // Of a name that has its own port, a default changes nothing.
            assert_eq!(parse(&again, Some(1)), Ok(to.clone()));
            assert_eq!(parse(&text.to_ascii_uppercase(), default), Ok(to));
        }
        Err(e) => assert!(!e.to_string().contains(char::is_control), "{e:?}"),
    }
}
