//! How many bytes a second a tunnel may carry: by the grant that lets its caller in, and by its VM. Pure.
//!
//! The port process counts them, so that a tunnel has its rate also while there is no `aditd`. Whoever has the same key shares one rate
//! there: all tunnels of one caller by one grant to one VM, and all tunnels of a VM.

use std::cmp::Reverse;

use adit_api::token::sha256;
use adit_port::control::{Limit, LimitKey};

use super::audit::counted_as;
use super::{Caller, Grant};

/// Key of what all tunnels of a VM have together.
const OF_VM: LimitKey = [0; 16];

/// The grants that let somebody do something, in the order in which they are used: those by which most bytes go first.
pub fn most_bytes_first<'a>(grants: impl Iterator<Item = &'a Grant>) -> Vec<&'a Grant> {
    let mut grants: Vec<_> = grants.collect();
    grants.sort_by_key(|grant| Reverse(grant.bytes_per_s.unwrap_or(u64::MAX)));
    grants
}

/// What limits the tunnels of a caller who is let in by this grant.
pub fn limits(caller: &Caller, grant: &Grant, of_vm: Option<u64>) -> Vec<Limit> {
    let of_grant = grant.bytes_per_s.map(|bytes_per_s| Limit {
        key: key(caller, grant),
        bytes_per_s,
    });
    let of_vm = of_vm.map(|bytes_per_s| Limit {
        key: OF_VM,
        bytes_per_s,
    });
    of_grant.into_iter().chain(of_vm).collect()
}

/// A digest, so that nobody can choose a name by which another one's rate is used up.
fn key(caller: &Caller, grant: &Grant) -> LimitKey {
    let of = counted_as(&caller.to_string(), caller.from());
    let digest = sha256(format!("{}\n{of}", grant.place).as_bytes());
    let mut key = OF_VM;
    key.copy_from_slice(&digest[..OF_VM.len()]);
    key
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grant(place: &str, bytes_per_s: Option<u64>) -> Grant {
        Grant {
            to: vec![],
            vms: vec![],
            may: vec![],
            until_ms: None,
            connections_per_s: None,
            bytes_per_s,
            weight: 1,
            place: place.into(),
        }
    }

    #[test]
    fn the_grant_by_which_most_bytes_go_is_used_first() {
        let grants = [
            grant("a:1", Some(5000)),
            grant("a:2", None),
            grant("a:3", Some(9000)),
            grant("a:4", None),
        ];
        let places = most_bytes_first(grants.iter());
        let places: Vec<_> = places.iter().map(|grant| &*grant.place).collect();
        assert_eq!(places, ["a:2", "a:4", "a:3", "a:1"]);
    }

    #[test]
    fn a_caller_shares_a_rate_with_itself_and_with_all_of_the_vm() {
        let (one, other) = (grant("a:1", Some(5000)), grant("a:2", Some(5000)));
        let from = |from: &str| Caller::anonymous(from);
        let deploy = from("127.0.0.1:1").with_token("deploy");
        let here = limits(&deploy, &one, Some(9000));
        assert_eq!(here.len(), 2);
        assert_eq!((here[0].bytes_per_s, here[1].bytes_per_s), (5000, 9000));
        assert_eq!(here[1].key, OF_VM);
        let again = from("127.0.0.9:2").with_token("deploy");
        assert_eq!(limits(&again, &one, Some(9000)), here);
        assert_ne!(limits(&deploy, &other, None)[0], here[0]);
        assert_ne!(limits(&from("127.0.0.1:1"), &one, None)[0], here[0]);
        // Of nobody known, an address is one.
        let nobody = limits(&from("192.0.2.1:1"), &one, None);
        assert_eq!(nobody, limits(&from("192.0.2.1:2"), &one, None));
        assert_ne!(nobody, limits(&from("192.0.2.2:2"), &one, None));
        assert_eq!(limits(&deploy, &grant("a:1", None), None), []);
    }
}
