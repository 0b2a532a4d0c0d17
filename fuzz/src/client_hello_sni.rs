//! Target `client_hello_sni`: a TLS client's first bytes. Once they name a server, more of them change nothing; a shorter piece of
//! them is not whole, or says the same; and a name is one that DNS could have.
//!
//! Input: the client's bytes.

use adit_host_proxy::front::sni::{Hello, read};
use adit_host_proxy::reach::{Destination, Suffix};

pub fn run(data: &[u8]) {
    let whole = read(data);
    if let Hello::Named(name) = &whole {
        assert!(name.len() <= 253 && name.is_ascii() && !name.contains(char::is_control));
        // It is refused, or one VM's.
        if let Ok(to) = Destination::named(&Suffix::default(), name, Some(443)) {
            assert!(name.to_ascii_lowercase().contains(to.vm.as_str()));
        }
    }
    for len in [data.len() / 2, data.len().saturating_sub(1)] {
        let part = read(&data[..len]);
        assert!(part == Hello::More || part == whole, "{part:?} {whole:?}");
    }
}
