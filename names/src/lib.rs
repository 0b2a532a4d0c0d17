//! Names that host, guest and port process spell alike, and texts of others made fit to show. A name has exactly one spelling: a text with upper case, Unicode, a
//! prefix, a trailing dot or NUL is refused, not folded, so that no two texts mean one thing and no text means two.
//!
//! | module | what |
//! |---|---|
//! | `vm_id` | a VM |
//! | `service` | a service on the well-known port of a guest or a host |
//! | `name` | the check that both have, and why a name is refused |
//! | `hex` | bytes as hex |
//! | `by_text` | serde for a type that is written as its text |
//! | `escape` | text that somebody else wrote, for terminals and logs |
#![forbid(unsafe_code)]

mod by_text;
mod escape;
mod hex;
mod name;
mod service;
mod vm_id;

pub use escape::{Escaped, escape, is_unsafe};
pub use hex::{hex, unhex};
pub use name::NameError;
pub use service::ServiceName;
pub use vm_id::VmId;

#[doc(hidden)]
pub use serde as __serde;

#[cfg(test)]
mod tests {
    use super::*;

    /// Whatever is made of a name (a path, an argument, a line of a log, a shell's word), it has nothing to expand (R73).
    #[test]
    fn r73_of_all_characters_only_the_listed_ones_are_in_a_name() {
        let vm = "abcdefghijklmnopqrstuvwxyz0123456789-";
        let service = vm.to_owned() + ":._";
        let others = [
            '\u{a0}', '\u{131}', '\u{212a}', '\u{200b}', '\u{202e}', '\u{ff41}', '\u{ff0e}',
        ];
        for c in (0..=0xff).map(char::from).chain(others) {
            for text in [
                format!("a{c}b"),
                format!("{c}ab"),
                format!("ab{c}"),
                c.to_string(),
            ] {
                let is_inner = text.starts_with('a') && text.ends_with('b');
                let may = vm.contains(c) && (c != '-' || is_inner);
                assert_eq!(text.parse::<VmId>().is_ok(), may, "{text:?}");
                assert_eq!(
                    text.parse::<ServiceName>().is_ok(),
                    service.contains(c),
                    "{text:?}"
                );
                assert_eq!(ServiceName::named(&text).is_some(), may, "{text:?}");
            }
        }
    }
}
