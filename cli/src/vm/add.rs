//! `adit vm add`.

use std::path::PathBuf;

use adit_api::{CarrierName, NewAutoAt, NewCarrier, NewHybrid, NewKernel, NewVm, NewVsock, Vm};
use clap::{ArgGroup, Args};

use super::show;
use crate::client::Client;
use crate::error::Failure;
use crate::text::Format;

const EXAMPLE: &str = "\
Examples:
  adit vm add web-3 --cid 5 --allow 80,22             # QEMU, or another VMM that speaks vhost-user
  adit vm add web-4 --hybrid /run/fc/web-4/v.sock     # Firecracker, Cloud Hypervisor
  adit vm add web-5 --vhost-vsock --cid 6             # the host's kernel: libvirt, or QEMU with vhost-vsock-pci
  adit vm add web-6 --auto --cid 7                    # whichever of these there is, looked at again when its VMM comes

`vhost-user` in the answer is the socket that its VMM connects to, and `costs` what that VMM cannot do with it. The VMs of aditd.toml need
not be added.";

/// Name of the group: of the ways to a guest, one is chosen. An option for another way joins by `group = WAY`.
const WAY: &str = "way";

/// Add a VM; it is kept over restarts of aditd
#[derive(Args)]
#[command(after_help = EXAMPLE)]
#[command(group = ArgGroup::new(WAY))]
pub struct Add {
    /// Name of the VM: a-z, 0-9 and inner '-'
    name: String,
    /// Its CID: 3 or more, and no other VM's. Without it aditd chooses one
    #[arg(long)]
    cid: Option<u32>,
    /// Its VMM has a socket for each stream, as Firecracker and Cloud Hypervisor do, at this path
    #[arg(long, value_name = "PATH", group = WAY)]
    hybrid: Option<PathBuf>,
    /// Whichever way there is: a ring, vhost-user, its CID in the host's kernel, or a VMM's socket: v.sock in the VM's directory, or
    /// --hybrid
    #[arg(long, conflicts_with_all = ["vhost_user", "ring", "vhost_vsock"])]
    auto: bool,
    /// That VMM passes half-closes on: Cloud Hypervisor from June 2026 on, not Firecracker
    #[arg(long, requires = "hybrid")]
    half_closes: bool,
    /// Its VMM connects by vhost-user, as QEMU does: the default, said
    #[arg(long, group = WAY)]
    vhost_user: bool,
    /// The same, and its VMM is to hand over a ring: without one the VM has a fault
    #[arg(long, group = WAY)]
    ring: bool,
    /// The host's kernel reaches it by its CID, as its VMM has given it: vhost-vsock, as QEMU and libvirt have it
    #[arg(long, group = WAY, requires = "cid")]
    vhost_vsock: bool,
    /// Guest TCP ports that may be reached
    #[arg(long, value_delimiter = ',', value_name = "PORT,…")]
    allow: Vec<u16>,
    /// Plain AF_VSOCK ports that may be reached, as host vsock-PORT.NAME
    #[arg(long, value_delimiter = ',', value_name = "PORT,…")]
    allow_vsock: Vec<u32>,
    /// Services that may be reached, by the names that the guest's own configuration has for them
    #[arg(long, value_delimiter = ',', value_name = "NAME,…")]
    allow_service: Vec<String>,
}

pub async fn run(add: &Add, client: &Client, format: Format) -> Result<(), Failure> {
    let new = NewVm {
        name: add.name.clone(),
        cid: add.cid.unwrap_or(0).into(),
        carrier: add.carrier()?,
        allow: add.allow.clone(),
        allow_vsock: add.allow_vsock.clone(),
        allow_services: add.allow_service.clone(),
    };
    show::show(&client.post::<Vm>("/v1/vms", &new).await?, format)
}

impl Add {
    /// None: an aditd of before need not know of any.
    fn carrier(&self) -> Result<Option<NewCarrier>, Failure> {
        if let Some(path) = &self.hybrid {
            let Some(hybrid) = path.to_str() else {
                let message = format!("--hybrid: {} is no text", path.display());
                return Err(Failure::new("usage", message).help("write it into aditd.toml"));
            };
            let hybrid = NewHybrid {
                hybrid: hybrid.to_owned(),
                half_closes: self.half_closes,
            };
            return Ok(Some(match self.auto {
                true => NewCarrier::AutoAt(NewAutoAt { auto: hybrid }),
                false => NewCarrier::Hybrid(hybrid),
            }));
        }
        if let (true, Some(cid)) = (self.vhost_vsock, self.cid) {
            let vsock = NewVsock { cid };
            return Ok(Some(NewCarrier::Kernel(NewKernel { vsock })));
        }
        let named = [
            (self.auto, CarrierName::Auto),
            (self.vhost_user, CarrierName::VhostUser),
            (self.ring, CarrierName::Ring),
        ];
        let named = named.into_iter().find(|(is_it, _)| *is_it);
        Ok(named.map(|(_, name)| NewCarrier::Named(name)))
    }
}
