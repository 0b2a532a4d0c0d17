//! Which client: whose share of the connections one takes, and who shows wrong tokens.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use adit_names::VmId;

use super::caller::Caller;
use crate::listen::Shares;

/// A client, as far as others cannot be taken for it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Whose {
    /// An address; of IPv6 its network, for a client has all of that.
    Address(IpAddr),
    /// A user of this host.
    Uid(u32),
    /// Another host, with all who come by way of it.
    Host(VmId),
    /// One of them, as that host tells them apart.
    Through(VmId, String),
}

impl Whose {
    /// Somebody at an address.
    pub fn at(ip: IpAddr) -> Self {
        Self::Address(match ip.to_canonical() {
            IpAddr::V6(ip) => Ipv6Addr::from_bits(ip.to_bits() & !u128::from(u64::MAX)).into(),
            ip => ip,
        })
    }

    /// The user of this host, if it is one that the kernel knows, or else whoever has the address: all users of this host share one.
    pub fn of(caller: &Caller) -> Self {
        match (caller.uid(), caller.from().parse::<SocketAddr>()) {
            (Some(uid), _) => Self::Uid(uid),
            (None, Ok(from)) => Self::at(from.ip()),
            (None, Err(_)) => Self::Address(Ipv4Addr::UNSPECIFIED.into()),
        }
    }
}

/// Where a client's weight counts.
#[derive(Clone, Debug)]
pub struct Standing {
    whose: Whose,
    of: Vec<Arc<Shares<Whose>>>,
}

impl Standing {
    /// A client that has a share of each of these.
    pub fn new(whose: Whose, of: Vec<Arc<Shares<Whose>>>) -> Self {
        Self { whose, of }
    }

    /// It has shown that it has this weight.
    pub fn weighs(&self, weight: usize) {
        for shares in &self.of {
            shares.weigh(&self.whose, weight);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::access::caller::Person;

    #[test]
    fn a_user_is_one_client_wherever_from_and_a_network_of_ipv6_is_one() {
        let from = |from: &str| Caller::anonymous(from);
        assert_eq!(
            Whose::of(&from("127.0.0.2:5")),
            Whose::at([127, 0, 0, 2].into())
        );
        let person = Person {
            uid: 1000,
            ..Person::default()
        };
        for place in ["127.0.0.2:5", "127.0.0.3:6", "a Unix socket (uid 1000)"] {
            assert_eq!(
                Whose::of(&from(place).with_person(&person)),
                Whose::Uid(1000)
            );
        }
        assert_eq!(
            Whose::of(&from("[2001:db8::1]:5")),
            Whose::of(&from("[2001:db8::ffff:2]:6"))
        );
        assert_eq!(
            Whose::of(&from("[::ffff:10.0.0.1]:5")),
            Whose::of(&from("10.0.0.1:6"))
        );
    }
}
