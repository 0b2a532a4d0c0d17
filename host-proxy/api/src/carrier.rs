//! How a guest is to be reached, as `carrier` of `[[vm]]` in aditd.toml says it.

use serde::{Deserialize, Serialize};

/// How a new VM's guest is to be reached.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum NewCarrier {
    /// By what needs no more than its name.
    Named(CarrierName),
    /// By the sockets of a VMM that has one for each stream.
    Hybrid(NewHybrid),
    /// By AF_VSOCK of the host's kernel.
    Kernel(NewKernel),
    /// By whichever way there is, as [`CarrierName::Auto`], with the VMM's socket elsewhere than in the VM's directory.
    AutoAt(NewAutoAt),
}

/// Carriers without parameters.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", try_from = "String")]
pub enum CarrierName {
    /// By whichever way there is, in this order: a ring, a VMM that connects by vhost-user, a VM with its CID in the host's kernel, the
    /// socket `v.sock` of a VMM in the VM's directory. Whoever may open the kernel's `/dev/vhost-vsock` can be this VM.
    Auto,
    /// What the VMM brings: vhost-user, and a ring where it offers one.
    VhostUser,
    /// The same, and that there is no ring is a fault.
    Ring,
}

/// As text alone: serde's own also takes an object with a name and nothing.
impl TryFrom<String> for CarrierName {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        match &*text {
            "auto" => Ok(Self::Auto),
            "vhost-user" => Ok(Self::VhostUser),
            "ring" => Ok(Self::Ring),
            _ => Err(format!("{text:?} is no carrier")),
        }
    }
}

/// The sockets of Firecracker and Cloud Hypervisor.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NewHybrid {
    /// The VMM's socket: an absolute path.
    pub hybrid: String,
    /// The VMM passes a half-close on.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub half_closes: bool,
}

/// Whichever way there is.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NewAutoAt {
    /// The VMM's socket, if it turns out to have one for each stream.
    pub auto: NewHybrid,
}

/// A VM whose streams the host's kernel carries, as QEMU and libvirt have it.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NewKernel {
    /// What the kernel knows it by.
    pub vsock: NewVsock,
}

/// What the kernel knows a VM by.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NewVsock {
    /// The CID that the VMM has given it.
    pub cid: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_carrier_is_written_as_in_the_configuration() {
        let hybrid = |half_closes| {
            NewCarrier::Hybrid(NewHybrid {
                hybrid: "/a/v.sock".into(),
                half_closes,
            })
        };
        let auto_at = NewCarrier::AutoAt(NewAutoAt {
            auto: NewHybrid {
                hybrid: "/a/v.sock".into(),
                half_closes: false,
            },
        });
        for (text, carrier) in [
            (r#""auto""#, NewCarrier::Named(CarrierName::Auto)),
            (r#"{"auto":{"hybrid":"/a/v.sock"}}"#, auto_at),
            (r#""vhost-user""#, NewCarrier::Named(CarrierName::VhostUser)),
            (r#""ring""#, NewCarrier::Named(CarrierName::Ring)),
            (r#"{"hybrid":"/a/v.sock"}"#, hybrid(false)),
            (r#"{"hybrid":"/a/v.sock","half_closes":true}"#, hybrid(true)),
            (
                r#"{"vsock":{"cid":42}}"#,
                NewCarrier::Kernel(NewKernel {
                    vsock: NewVsock { cid: 42 },
                }),
            ),
        ] {
            assert_eq!(serde_json::to_string(&carrier).unwrap(), text);
            assert_eq!(serde_json::from_str::<NewCarrier>(text).unwrap(), carrier);
        }
        for none in [
            r#""hybrid""#,
            r#"{"hybrid":"/a","cid":3}"#,
            r#"{"auto":null}"#,
            "3",
        ] {
            serde_json::from_str::<NewCarrier>(none).unwrap_err();
        }
    }
}
