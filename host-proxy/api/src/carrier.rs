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

/// What carries bytes between host and guest.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CarrierKind {
    /// The guest's own AF_VSOCK.
    #[default]
    Vsock,
    /// A ring in memory that both sides have.
    Ring,
}

/// Which carrier new dials of the agent's services take. What is reached as a vsock port takes vsock whatever this says.
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Carrier {
    /// Which.
    pub kind: CarrierKind,
    /// Why.
    pub why: String,
    /// The way to the guest: `vhost-user`, `device` (the VMM's own), `vhost-vsock` (the host's kernel), `hybrid`; a later aditd may have
    /// others. None: of a VM that takes whichever there is (`auto`), there is none yet.
    #[serde(default)]
    pub way: Option<String>,
    /// Who has chosen that way, and as what. With `auto`: why it is this one, and what of those before it is missing.
    #[serde(default)]
    pub way_why: Option<String>,
    /// What the VMM cannot do with the VM because of it: `migration`, `savevm`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub forbids: Vec<String>,
    /// What that way costs.
    #[serde(default)]
    pub costs: Option<String>,
    /// The VMM's socket, where the VMM has one for each stream; none: it has a device, by vhost-user or in its own process.
    #[serde(default)]
    pub hybrid: Option<String>,
    /// The CID of a VM whose streams the host's kernel carries (vhost_vsock).
    #[serde(default)]
    pub kernel_cid: Option<u32>,
    /// What the ring's memory is and how it came; none: there is no ring.
    pub memory: Option<String>,
    /// Bytes of the ring's region.
    pub bytes: u64,
    /// What a read of a line of it takes on the host, ns, as measured when it came.
    pub line_ns: u32,
    /// How the guest is rung, as its agent says.
    #[serde(default)]
    pub doorbell: Option<String>,
    /// What 64 bytes take to the agent and back on an open stream over the ring, ns, as measured when the session began.
    #[serde(default)]
    pub rtt_ns: Option<u64>,
    /// The same over vsock, measured at the same time.
    #[serde(default)]
    pub vsock_rtt_ns: Option<u64>,
    /// Streams open over the ring now.
    pub streams: u32,
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
