//! Who may do what with which VM. One pure decision, from the settings of the VM alone: what is not allowed is denied, and a
//! denial is the same whether the VM runs or not.

use std::fmt;
use std::net::SocketAddr;

use adit_port::control::Target;

use crate::config::VmConfig;

/// Services of a guest that only an operator reaches: they are given files, and say themselves what they do with them.
const OPERATORS: [&str; 2] = ["blob", "agent"];

/// Who asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Caller {
    /// A client of the proxy's listener.
    Client(SocketAddr),
    /// Whoever may use the API's socket.
    Operator,
}

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    /// A stream to the target.
    Connect,
}

/// What is decided.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Access {
    /// It may be done.
    Allow,
    /// It may not.
    Deny {
        /// Why.
        reason: Reason,
    },
}

/// Why it may not be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reason {
    /// A list of the VM's settings does not have it.
    NotListed {
        /// The port.
        port: u32,
        /// Name of the list.
        list: &'static str,
    },
    /// No setting is about such a service.
    NoRule {
        /// Name of the service.
        service: String,
    },
}

/// Decides. What the VM's lists have, any caller may reach.
pub fn decide(caller: &Caller, verb: Verb, vm: &VmConfig, target: &Target) -> Access {
    let Verb::Connect = verb;
    let not_listed = |port, list| Reason::NotListed { port, list };
    let denied = match target {
        Target::Service(service) => match service.tcp_port() {
            Some(port) if vm.allow.contains(&port) => return Access::Allow,
            Some(port) => not_listed(port.into(), "allow"),
            None if *caller == Caller::Operator && OPERATORS.contains(&service.as_str()) => {
                return Access::Allow;
            }
            None => Reason::NoRule {
                service: service.to_string(),
            },
        },
        Target::VsockPort(port) if vm.allow_vsock.contains(port) => return Access::Allow,
        Target::VsockPort(port) => not_listed(*port, "allow_vsock"),
    };
    Access::Deny { reason: denied }
}

impl Reason {
    /// The same for people.
    pub fn text(&self, vm: impl fmt::Display) -> String {
        match self {
            Self::NotListed { port, list } => {
                format!("port {port} of VM `{vm}` is not in its `{list}` list")
            }
            Self::NoRule { service } => format!("nothing allows service `{service}` of VM `{vm}`"),
        }
    }
}

impl fmt::Display for Caller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Client(from) => write!(f, "client {from}"),
            Self::Operator => f.pad("operator"),
        }
    }
}

impl fmt::Display for Verb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Connect => f.pad("connect"),
        }
    }
}

#[cfg(test)]
mod tests {
    use adit_names::ServiceName;
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    fn vm(allow: Vec<u16>, allow_vsock: Vec<u32>) -> VmConfig {
        VmConfig {
            allow,
            allow_vsock,
            ..VmConfig::new("a".parse().unwrap(), 3)
        }
    }

    fn callers() -> [Caller; 3] {
        let client = |text: &str| Caller::Client(text.parse().unwrap());
        [
            client("127.0.0.1:1"),
            client("[2001:db8::1]:65535"),
            Caller::Operator,
        ]
    }

    fn target() -> impl Strategy<Value = Target> {
        prop_oneof![
            (0..20_u16).prop_map(|port| Target::Service(ServiceName::tcp(port))),
            (0..20_u32).prop_map(Target::VsockPort),
            "[a-z0-9:._-]{1,64}|blob|agent".prop_map(|name| Target::Service(name.parse().unwrap())),
        ]
    }

    proptest! {
        /// Few ports, so that lists often have the one that is asked for.
        #[test]
        fn only_what_the_list_has_is_allowed_and_all_of_it(
            allow in vec(0..20_u16, 0..8),
            allow_vsock in vec(0..20_u32, 0..8),
            target in target(),
        ) {
            let listed = match &target {
                Target::Service(name) => {
                    // Port 0 has no name, even if a list has it.
                    name.tcp_port().is_some_and(|port| allow.contains(&port))
                }
                Target::VsockPort(port) => allow_vsock.contains(port),
            };
            let sent = matches!(&target, Target::Service(name) if OPERATORS.contains(&name.as_str()));
            let vm = vm(allow, allow_vsock);
            for caller in callers() {
                let decided = decide(&caller, Verb::Connect, &vm, &target);
                let may = listed || sent && caller == Caller::Operator;
                prop_assert_eq!(decided == Access::Allow, may);
            }
        }
    }

    #[test]
    fn a_list_is_for_its_own_kind_of_port_and_the_denial_names_it() {
        let vm = vm(vec![80], vec![5000]);
        let decided = |target: &Target| decide(&Caller::Operator, Verb::Connect, &vm, target);
        for (target, says) in [
            (
                Target::Service(ServiceName::tcp(5000)),
                "port 5000 of VM `a` is not in its `allow` list",
            ),
            (
                Target::VsockPort(80),
                "port 80 of VM `a` is not in its `allow_vsock` list",
            ),
            (
                Target::VsockPort(u32::MAX),
                "port 4294967295 of VM `a` is not in its `allow_vsock` list",
            ),
            (
                Target::Service("ping".parse().unwrap()),
                "nothing allows service `ping` of VM `a`",
            ),
        ] {
            match decided(&target) {
                Access::Deny { reason } => assert_eq!(reason.text("a"), says),
                Access::Allow => panic!("{target:?}"),
            }
        }
    }
}
