//! The table: every key, those of a section together.

use adit_tasks::anchor::ANCHORS_MAX;

use super::kind::{Kind, Texts};
use super::{Key, REQUIRED};
use crate::access::grant::LIST_MAX;
use crate::config::access::{self, ROLES, SPEAKS};
use crate::config::{
    ACCESS_LOGS, BUSY_POLL_US_MAX, BYTES_PER_S, CID_MAX, CID_MIN, IVSHMEM_MIB_MAX, RATE_MAX,
    SERVICES_MAX, WEIGHT_MAX,
};

const U32: u64 = u32::MAX as u64;

pub(super) const KEYS: &[Key] = &[
    Key {
        path: "run_dir",
        meaning: "Directory of the sockets: aditd.sock, and vm/NAME/ with the sockets of each VM. The addresses that were \
                  bound are written to proxy.addr and metrics.addr in it.",
        default: "\"/run/adit\"",
        example: "\"/run/adit\"",
        kind: Kind::Path,
    },
    Key {
        path: "state_dir",
        meaning: "Directory of the database: tasks, and the VMs that were added with `adit vm add`.",
        default: "\"/var/lib/adit\"",
        example: "\"/var/lib/adit\"",
        kind: Kind::Path,
    },
    Key {
        path: "proxy.listen",
        meaning: "Where the HTTP proxy listens. Port 0 takes any free port.",
        default: "\"127.0.0.1:7080\"",
        example: "\"127.0.0.1:7080\"",
        kind: Kind::Address,
    },
    Key {
        path: "proxy.open",
        meaning: "Lets `listen` be an address that other machines reach. What they send there, tokens too, is not encrypted.",
        default: "false",
        example: "false",
        kind: Kind::Flag,
    },
    Key {
        path: "names.host",
        meaning: "This host's own name. Hosts and VMs share their names: `VM.HOST` is the VM of that host, and no VM may be called as \
                  a host is.",
        default: "the machine's, if nothing else has it",
        example: "\"alpha\"",
        kind: Kind::VmName,
    },
    Key {
        path: "names.suffix",
        meaning: "What names may end with, for tools that want a dot in a host name. With another than the default, `Host` in \
                  `/etc/ssh/ssh_config.d/20-adit.conf` has to be changed too.",
        default: "\".adit\"",
        example: "\".adit\"",
        kind: Kind::Suffix,
    },
    Key {
        path: "metrics.listen",
        meaning: "Where metrics are served over TCP. Whoever reaches it sees the names of all VMs, whatever the grants are. Without the \
                  section [metrics] they are served on aditd.sock only.",
        default: REQUIRED,
        example: "\"127.0.0.1:7081\"",
        kind: Kind::Address,
    },
    Key {
        path: "metrics.open",
        meaning: "Lets `listen` be an address that other machines reach. They see the names of all VMs, and nobody asks them who they \
                  are.",
        default: "false",
        example: "true",
        kind: Kind::Flag,
    },
    Key {
        path: "limits.queued_per_vm",
        meaning: "Tasks that may wait for one VM. A goal that would add more is refused.",
        default: "1024",
        example: "1024",
        kind: Kind::Number { min: 0, max: U32 },
    },
    Key {
        path: "limits.connections",
        meaning: "Client connections of the proxy, and streams of HTTP/2 in them. Where the limit of open files is low, there are fewer. With a listener on a Unix socket, a third of them is for such, whose tunnels count until they end; one user has half of these.",
        default: "4096",
        example: "4096",
        kind: Kind::Number { min: 1, max: U32 },
    },
    Key {
        path: "limits.connections_per_client",
        meaning: "Client connections, and streams of HTTP/2 in them, of one client: an IP address, or a /64 of IPv6; on this host, a user. \
                  Another host has one share, and each of its clients half of that.",
        default: "half of all connections",
        example: "2048",
        kind: Kind::Number { min: 1, max: U32 },
    },
    Key {
        path: "limits.requests_per_vm",
        meaning: "Requests to one VM that the proxy handles at the same time. A tunnel counts until it is established.",
        default: "a quarter of all connections",
        example: "1024",
        kind: Kind::Number { min: 1, max: U32 },
    },
    Key {
        path: "limits.tunnels_outlive_grants",
        meaning: "Lets tunnels go on when the grant or the token under which they were opened ends, or is taken away. Without it they \
                  are broken off within a second.",
        default: "false",
        example: "false",
        kind: Kind::Flag,
    },
    Key {
        path: "limits.response_s",
        meaning: "Seconds that a VM may take to begin its response, counted from when it has the whole request. After that \
                  the client gets status 504. An upload may rest for as long after its response has ended.",
        default: "60",
        example: "60",
        kind: Kind::Number { min: 1, max: U32 },
    },
    Key {
        path: "limits.kept_days",
        meaning: "Days that a task is kept after it has ended.",
        default: "30",
        example: "30",
        kind: Kind::Number { min: 0, max: U32 },
    },
    Key {
        path: "limits.kept_per_vm",
        meaning: "Ended tasks that are kept for one VM. Of more, the oldest are forgotten.",
        default: "10000",
        example: "10000",
        kind: Kind::Number { min: 0, max: U32 },
    },
    Key {
        path: "limits.kept_mib_per_vm",
        meaning: "MiB of task output that are kept for one VM. Of more, the oldest tasks are forgotten.",
        default: "64",
        example: "64",
        kind: Kind::Number { min: 0, max: U32 },
    },
    Key {
        path: "ports.uids",
        meaning: "Users that the port processes run as, one for each VM. aditd must be root for this; without the key it uses \
                  the default if it can, and its own user if it cannot.",
        default: "\"70000-78191\"",
        example: "\"70000-78191\"",
        kind: Kind::Uids,
    },
    Key {
        path: "worker.user",
        meaning: "User that aditd's worker runs as: the part that serves the proxy, the API and the guests, without any \
                  privilege. The database becomes this user's. aditd must be root for this.",
        default: "the user `adit` if the host has it, or else the last free one of ports.uids",
        example: "\"adit\"",
        kind: Kind::User,
    },
    Key {
        path: "log.access",
        meaning: "The access log: a line of JSON for each request and tunnel of the proxy, when it is over. `file`: into \
                  aditd.access in state_dir, which is cut and rotated. `journal`: to standard error, with the log.",
        default: "\"off\"",
        example: "\"file\"",
        kind: Kind::Word(&ACCESS_LOGS),
    },
    Key {
        path: "audit.allows",
        meaning: "Writes also what is allowed into aditd.audit in state_dir: who reached what of which VM, by which grant, how many bytes \
                  both ways and for how long. What is denied is always written.",
        default: "false",
        example: "true",
        kind: Kind::Flag,
    },
    Key {
        path: "trust.card",
        meaning: "Public keys whose cards are believed: a VM has the labels of the card that its guest shows only if one of these \
                  keys has signed it for that VM. Without a key every card is shown as unproved.",
        default: "[]",
        example: "[\"roles=card adit-ed25519 hhyI/yN0+TrjTaqjAgXnRggxfrl4QedWWzLVnrKxF+c= fleet\"]",
        kind: Kind::Texts {
            of: Texts::CardKeys,
            max: ANCHORS_MAX,
        },
    },
    Key {
        path: "listen.address",
        meaning: "Where clients get in, besides [proxy]. A Unix socket may be used by every user of the host: grants say who may do what. \
                  The addresses that were bound are written to listen.addr in run_dir, a line for each.",
        default: REQUIRED,
        example: "\"unix:/run/adit/proxy.sock\"",
        kind: Kind::Listener,
    },
    Key {
        path: "listen.role",
        meaning: "Whom the listener is for. `proxy`: clients of VMs. `management`: it answers the API and nothing else, to callers that \
                  grants let do what they ask for; other machines need `cert` and `key` there. Also the metrics, to whoever may `see` all VMs.",
        default: "\"proxy\"",
        example: "\"proxy\"",
        kind: Kind::Word(&ROLES),
    },
    Key {
        path: "listen.device",
        meaning: "Network device by which clients come in: those who reach the address by another one are not served. It must be there when \
                  aditd starts.",
        default: "none: any",
        example: "\"mgmt0\"",
        kind: Kind::Device,
    },
    Key {
        path: "listen.speak",
        meaning: "What clients speak there. `http`: HTTP as on [proxy], and requests for a path alone, which go to the VM of \
                  their `Host`. `socks5`: SOCKS5, with the VM's name. `tls`: TLS for the VM of the server name (SNI), passed on as \
                  it is. `any`: anything, to one place. `dns`: DNS over UDP and TCP: `VM.adit` is the host that has the VM.",
        default: "\"http\"",
        example: "\"any\"",
        kind: Kind::Word(&SPEAKS),
    },
    Key {
        path: "listen.to",
        meaning: "Where every connection of this listener leads. It takes `speak = \"any\"`, which needs it.",
        default: "none",
        example: "\"web-1:22\"",
        kind: Kind::Destination,
    },
    Key {
        path: "listen.network",
        meaning: "Name of the network that asks a listener with `speak = \"dns\"`: grants have it as `network:NAME`, and say by `see` which \
                  VMs there are for it. Without it such clients are `anyone`, and nothing else.",
        default: "none",
        example: "\"lab\"",
        kind: Kind::TokenName,
    },
    Key {
        path: "listen.answer",
        meaning: "Addresses of this host that a listener with `speak = \"dns\"` answers for its VMs, at most one of IPv4 and one of IPv6.",
        default: "the address of the listener",
        example: "[\"192.0.2.1\", \"2001:db8::1\"]",
        kind: Kind::Texts {
            of: Texts::Addresses,
            max: access::ANSWERS_MAX,
        },
    },
    Key {
        path: "listen.port",
        meaning: "Port in the VM that clients of `speak = \"tls\"` reach.",
        default: "the port of the address; 443 for a Unix socket",
        example: "443",
        kind: Kind::Number {
            min: 1,
            max: u16::MAX as u64,
        },
    },
    Key {
        path: "listen.open",
        meaning: "Lets `address` be one that other machines reach. What they send there, tokens too, is encrypted only with `cert`.",
        default: "false",
        example: "false",
        kind: Kind::Flag,
    },
    Key {
        path: "listen.cert",
        meaning: "PEM file with the listener's certificate, and after it those that lead to a root: clients speak TLS 1.2 or 1.3, and what \
                  `speak` says within it. It takes `speak = \"http\"` or `\"socks5\"`, and `key`. The file is read at the start and at \
                  every reload; open tunnels go on with what they have.",
        default: "none: clients speak no TLS to aditd",
        example: "\"/etc/adit/proxy.crt\"",
        kind: Kind::Path,
    },
    Key {
        path: "listen.key",
        meaning: "PEM file with the private key of `cert`, not encrypted. It may be the same file.",
        default: "none",
        example: "\"/etc/adit/proxy.key\"",
        kind: Kind::Path,
    },
    Key {
        path: "listen.client_ca",
        meaning: "PEM file with the certificates of whoever vouches for clients: a client may show a certificate that leads to one of them, \
                  and has its names as `cert:NAME` in grants. It is refused with any other certificate, and needs none. Without this key \
                  any certificate may be shown, and says who a client is by its key only: `cert:sha256/…`.",
        default: "none",
        example: "\"/etc/adit/clients.crt\"",
        kind: Kind::Path,
    },
    Key {
        path: "grant.to",
        meaning: "Who is granted something: users and groups of this host, as the kernel knows them behind a Unix socket or a loopback \
                  connection; whoever shows a token; whoever shows a certificate over TLS, by a name in it or by its key; whoever asks a listener for DNS, by its `network`; or `anyone`. Without a grant nobody may anything but who uses aditd.sock.",
        default: REQUIRED,
        example: "[\"user:deploy\", \"group:ops\", \"token:prometheus\"]",
        kind: Kind::Texts {
            of: Texts::Subjects,
            max: LIST_MAX,
        },
    },
    Key {
        path: "grant.vms",
        meaning: "With which VMs: by name, or by a label of the configuration or of a card that [trust] believes.",
        default: REQUIRED,
        example: "[\"web-*\", \"label:env=prod\"]",
        kind: Kind::Texts {
            of: Texts::Vms,
            max: LIST_MAX,
        },
    },
    Key {
        path: "grant.may",
        meaning: "What they may do. `reach`: connect to what the VM's `allow`, `allow_vsock` and `allow_services` have, with ports (or `svc:NAME`) to these of them. \
                  `forward`: connect by a listener that leads to one place of it (`to`), and not by the proxy. `see`: \
                  know that the VM is there; without it, it looks as if it were not. `task`: see its tasks. `goal`: apply goals to it. \
                  `manage`: change its settings. `exec`: run commands in it as any user of it, `exec:USERS` as these. `files`: read and write its files as any user of it, `files:/PATH` at that path and below, `files:USER@/PATH` as that user. `reach` is by listeners, too; else none implies another.",
        default: REQUIRED,
        example: "[\"reach:80,443\", \"see\"]",
        kind: Kind::Texts {
            of: Texts::May,
            max: LIST_MAX,
        },
    },
    Key {
        path: "grant.until",
        meaning: "When the grant ends.",
        default: "never",
        example: "\"2027-01-31T00:00:00Z\"",
        kind: Kind::Time,
    },
    Key {
        path: "grant.connections_per_s",
        meaning: "Connections, and requests that are relayed, which each of those in `to` may open by this grant in a second. What is \
                  more is refused with status 429. Whoever has a second grant has that, too.",
        default: "none: any number",
        example: "20",
        kind: Kind::Number {
            min: 1,
            max: RATE_MAX as u64,
        },
    },
    Key {
        path: "grant.weight",
        meaning: "How many times `limits.connections_per_client` each of those in `to` may have. Whoever has several grants has the highest.",
        default: "1",
        example: "4",
        kind: Kind::Number {
            min: 1,
            max: WEIGHT_MAX as u64,
        },
    },
    Key {
        path: "grant.bytes_per_s",
        meaning: "Bytes a second that go to one VM, and as many back, on all that each of those in `to` has opened there by this grant. \
                  Whoever has a second grant has the one by which more go.",
        default: "none: any number",
        example: "1000000",
        kind: Kind::Number {
            min: BYTES_PER_S.0,
            max: BYTES_PER_S.1,
        },
    },
    Key {
        path: "token.name",
        meaning: "Name of a token, which grants have after `token:`. `adit access token NAME` makes one, and prints this section.",
        default: REQUIRED,
        example: "\"prometheus\"",
        kind: Kind::TokenName,
    },
    Key {
        path: "token.sha256",
        meaning: "SHA-256 of the token. The token itself is nowhere on this host.",
        default: REQUIRED,
        example: "\"9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08\"",
        kind: Kind::Sha256,
    },
    Key {
        path: "token.until",
        meaning: "When the token ends.",
        default: "never",
        example: "\"2027-01-31T00:00:00Z\"",
        kind: Kind::Time,
    },
    Key {
        path: "host.name",
        meaning: "Name of another host. No VM and no other host may have it.",
        default: REQUIRED,
        example: "\"beta\"",
        kind: Kind::VmName,
    },
    Key {
        path: "host.address",
        meaning: "Where that host is asked for its VMs, and where they are reached: a [[listen]] of it with `cert`, for HTTP.",
        default: REQUIRED,
        example: "\"192.0.2.2:7443\"",
        kind: Kind::Address,
    },
    Key {
        path: "host.pin",
        meaning: "Digest of that host's key: its listener has it, and its own [peers] too. With another key it is not that host.",
        default: REQUIRED,
        example: "\"sha256/47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=\"",
        kind: Kind::Pin,
    },
    Key {
        path: "host.names",
        meaning: "Names of VMs that this host may claim to have. What it says of others does not count.",
        default: "[\"*\"]",
        example: "[\"db-*\"]",
        kind: Kind::Texts {
            of: Texts::Claims,
            max: LIST_MAX,
        },
    },
    Key {
        path: "host.vouches",
        meaning: "Users and groups of that host that count here as those of the same names, where it says that they ask. All others \
                  who come by way of it are known by its certificate only, or by a token of their own.",
        default: "[]",
        example: "[\"user:deploy\", \"group:ops\"]",
        kind: Kind::Texts {
            of: Texts::Vouched,
            max: LIST_MAX,
        },
    },
    Key {
        path: "peers.cert",
        meaning: "PEM file with the certificate that this host shows to those of [[host]]. Without it no other host is asked. It is read \
                  at the start and at every reload.",
        default: "none",
        example: "\"/etc/adit/proxy.crt\"",
        kind: Kind::Path,
    },
    Key {
        path: "peers.key",
        meaning: "PEM file with the private key of that certificate, not encrypted.",
        default: "none",
        example: "\"/etc/adit/proxy.key\"",
        kind: Kind::Path,
    },
    Key {
        path: "peers.map",
        meaning: "File that says which host has a VM, in lines `VM HOST`; `#` begins a comment. For these VMs no host is asked. Each host is a \
                  [[host]] whose `names` have the VM, or this one, so that all hosts may have the same file. It is read at the start and at \
                  every reload.",
        default: "none: all hosts are asked",
        example: "\"/etc/adit/vms.map\"",
        kind: Kind::Path,
    },
    Key {
        path: "vm.name",
        meaning: "The VM's name: the host name that clients use, and the id that goals are signed for.",
        default: REQUIRED,
        example: "\"web-1\"",
        kind: Kind::VmName,
    },
    Key {
        path: "vm.cid",
        meaning: "The VM's vsock context id. No other VM of the host may have it. Not needed where `carrier` says it.",
        default: REQUIRED,
        example: "3",
        kind: Kind::Number {
            min: CID_MIN,
            max: CID_MAX,
        },
    },
    Key {
        path: "vm.allow",
        meaning: "Guest TCP ports that clients may reach, through the agent. Streams that are open go on when a port is removed.",
        default: "[]",
        example: "[80, 22]",
        kind: Kind::Numbers {
            min: 1,
            max: u16::MAX as u64,
        },
    },
    Key {
        path: "vm.allow_vsock",
        meaning: "Guest AF_VSOCK ports that clients may reach, without the agent: as host name vsock-PORT.NAME. Streams that are \
                  open go on when a port is removed.",
        default: "[]",
        example: "[5000]",
        kind: Kind::Numbers {
            min: 0,
            max: U32 - 1,
        },
    },
    Key {
        path: "vm.allow_services",
        meaning: "Services of the guest that clients may reach, through the agent, by the names that the guest's own configuration \
                  has for them: as host name SERVICE.NAME.svc. Streams that are open go on when a name is removed.",
        default: "[]",
        example: "[\"docker\"]",
        kind: Kind::Texts {
            of: Texts::Services,
            max: SERVICES_MAX,
        },
    },
    Key {
        path: "vm.busy_poll_us",
        meaning: "Microseconds that the port process polls for more work before it sleeps. Latency falls to a fraction, at the \
                  price of CPU time: for VMs whose vCPUs have cores of their own. With 0 it looks for at most 20 while \
                  packets follow each other quickly, and otherwise sleeps at once.",
        default: "0",
        example: "50",
        kind: Kind::Number {
            min: 0,
            max: BUSY_POLL_US_MAX as u64,
        },
    },
    Key {
        path: "vm.ivshmem_mib",
        meaning: "MiB of shared memory that a QEMU with an ivshmem device gets for the ring.",
        default: "4",
        example: "4",
        kind: Kind::PowerOfTwo {
            max: IVSHMEM_MIB_MAX as u64,
        },
    },
    Key {
        path: "vm.allow_any_memory",
        meaning: "Whether guest memory may be any file (`memory-backend-file,share=on`), and not only a sealed memfd. Whoever \
                  can truncate that file can end the VM's port process.",
        default: "false",
        example: "true",
        kind: Kind::Flag,
    },
    Key {
        path: "vm.carrier",
        meaning: "How the guest is reached. \"vhost-user\": the VMM connects to the VM's vhost.sock, and may offer a ring. \
                  \"ring\": the same, and it is a fault that there is no ring. { hybrid = PATH }: the vsock socket of a Firecracker or Cloud Hypervisor; what the guest dials arrives at \
                  PATH_741, which aditd makes. With half_closes = true the VMM is one that passes half-closes on, which \
                  Firecracker does not. { vsock = { cid = N } }: the host's kernel (vhost_vsock), as QEMU's vhost-vsock-pci and \
                  libvirt have it; such a VM can be migrated and saved. \"auto\": whichever there is, in the order ring, vhost-user, the \
                  host's kernel with the VM's `cid`, v.sock in the VM's directory; or at the PATH of { auto = { hybrid = PATH } }. Whoever \
                  may open /dev/vhost-vsock can then be the VM.",
        default: "\"vhost-user\"",
        example: "{ hybrid = \"/run/fc/web-1/v.sock\" }",
        kind: Kind::Carrier,
    },
    Key {
        path: "vm.labels",
        meaning: "What the VM is used for, for grants. They come before labels of a card with the same names.",
        default: "{}",
        example: "{ env = \"prod\" }",
        kind: Kind::Labels,
    },
    Key {
        path: "vm.weight",
        meaning: "How many times `limits.requests_per_vm` this VM may have.",
        default: "1",
        example: "4",
        kind: Kind::Number {
            min: 1,
            max: WEIGHT_MAX as u64,
        },
    },
    Key {
        path: "vm.connections_per_s",
        meaning: "Connections, and requests that are relayed, which all clients together may open to this VM in a second. What is more \
                  is refused with status 429.",
        default: "none: any number",
        example: "500",
        kind: Kind::Number {
            min: 1,
            max: RATE_MAX as u64,
        },
    },
    Key {
        path: "vm.bytes_per_s",
        meaning: "Bytes a second that go to this VM, and as many back, on all that clients have opened there together.",
        default: "none: any number",
        example: "10000000",
        kind: Kind::Number {
            min: BYTES_PER_S.0,
            max: BYTES_PER_S.1,
        },
    },
    Key {
        path: "discover.dir",
        meaning: "Directory in which VMMs put their vsock sockets, as Firecracker and Cloud Hypervisor do. Each socket that is found is a VM, \
                  until it and its directory are gone. Nobody but its owner may write there, and no link may lead there. A VM of the same \
                  name that is configured or was added comes first.",
        default: REQUIRED,
        example: "\"/run/fc\"",
        kind: Kind::Path,
    },
    Key {
        path: "discover.pattern",
        meaning: "Where the socket is below `dir`; `{name}` is the VM's name.",
        default: REQUIRED,
        example: "\"{name}/v.sock\"",
        kind: Kind::Pattern,
    },
    Key {
        path: "discover.half_closes",
        meaning: "Whether these VMMs pass half-closes on, as `half_closes` of `vm.carrier` says of one.",
        default: "false",
        example: "true",
        kind: Kind::Flag,
    },
    Key {
        path: "discover.allow",
        meaning: "As `vm.allow`, of each of them.",
        default: "[]",
        example: "[80, 22]",
        kind: Kind::Numbers {
            min: 1,
            max: u16::MAX as u64,
        },
    },
    Key {
        path: "discover.allow_vsock",
        meaning: "As `vm.allow_vsock`, of each of them.",
        default: "[]",
        example: "[5000]",
        kind: Kind::Numbers {
            min: 0,
            max: U32 - 1,
        },
    },
    Key {
        path: "discover.allow_services",
        meaning: "As `vm.allow_services`, of each of them.",
        default: "[]",
        example: "[\"docker\"]",
        kind: Kind::Texts {
            of: Texts::Services,
            max: SERVICES_MAX,
        },
    },
    Key {
        path: "discover.labels",
        meaning: "As `vm.labels`, of each of them.",
        default: "{}",
        example: "{ env = \"prod\" }",
        kind: Kind::Labels,
    },
];
