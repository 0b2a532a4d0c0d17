//! Tunnels through aditd's proxy: CONNECT, and a socket whose next byte is the guest's first.
//!
//! | file | what it is |
//! |---|---|
//! | `address` | where the proxy is: `http://HOST:PORT` or `unix:PATH` |
//! | `destination`, `uri` | what is asked for: a VM and its port; `adit://HOST/VM/SERVICE` |
//! | `head` | the head of the answer, taken from the socket to its last byte and no further |
//! | `socket` | the connection, TCP or Unix |
//! | `token` | what the proxy may want to see |
//! | `error` | why there is no tunnel |
//!
//! Whoever answers at the address may be anybody: what it says is bounded in bytes and in time, and shown escaped.

mod address;
mod destination;
mod error;
mod head;
mod socket;
mod token;
mod uri;

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use tokio::time::{Instant, timeout_at};
use zeroize::Zeroizing;

use crate::output::duration;

pub use address::Address;
pub use destination::{Destination, port};
pub use error::TunnelError;
pub use token::Token;

use socket::Socket;

/// Where the proxy is, and how long it may take. `connect` and `forward` have these.
#[derive(Args)]
pub struct Options {
    /// Proxy of aditd: http://HOST:PORT, or unix:PATH for a Unix socket [env: ADIT_PROXY] [default: http://127.0.0.1:7080]
    // Not by clap's `env` and `default_value`, as with --socket.
    #[arg(long, value_name = "URL")]
    proxy: Option<Address>,
    /// File with the token that the proxy wants [env: ADIT_TOKEN, with the token itself]
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// How long it may take to reach the proxy and to open a tunnel
    #[arg(long, value_parser = duration, default_value = "30s", value_name = "DURATION")]
    timeout: Duration,
}

impl Options {
    /// The proxy: as given, else as the environment has it, else the default.
    pub fn proxy(&self) -> Result<Proxy, crate::error::Failure> {
        let address = match &self.proxy {
            Some(address) => address.clone(),
            None => Address::by_environment()?,
        };
        Ok(Proxy {
            address,
            token: Token::find(self.token_file.as_deref())?,
            limit: self.timeout,
        })
    }
}

/// A proxy that opens tunnels.
pub struct Proxy {
    address: Address,
    token: Option<Token>,
    limit: Duration,
}

impl Proxy {
    /// Opens a tunnel. No byte of it has been read; the socket does not block.
    pub async fn open(&self, to: &Destination) -> Result<Socket, TunnelError> {
        let until = Instant::now() + self.limit;
        let late = |doing| TunnelError::Late {
            proxy: self.address.to_string(),
            doing,
            limit: self.limit,
        };
        let socket = timeout_at(until, Socket::connect(&self.address))
            .await
            .map_err(|_| late("cannot be reached"))?
            .map_err(|source| TunnelError::Unreachable {
                proxy: self.address.clone(),
                source,
            })?;
        let opened = timeout_at(until, self.ask(&socket, to)).await;
        opened.map_err(|_| late("takes connections, but has not opened the tunnel"))??;
        Ok(socket)
    }

    async fn ask(&self, socket: &Socket, to: &Destination) -> Result<(), TunnelError> {
        let token = self.token.as_ref().map(Token::field);
        let authority = to.authority();
        let request = Zeroizing::new(format!(
            "CONNECT {authority} HTTP/1.1\r\nHost: {authority}\r\nUser-Agent: adit/{}\r\n{}\r\n",
            env!("CARGO_PKG_VERSION"),
            token.as_ref().map_or("", |field| field.as_str()),
        ));
        let ended = |why| TunnelError::Ended {
            proxy: self.address.to_string(),
            why,
        };
        // One that refuses at once, for example because it has too many clients, may read nothing: its answer says more.
        let asked = socket.write_all(request.as_bytes()).await;
        let status = match head::read(socket).await {
            Ok(head) => head,
            Err(head::HeadError::Io(why)) => return Err(ended(asked.err().unwrap_or(why))),
            Err(head::HeadError::Bad(what)) => {
                return Err(TunnelError::NotAProxy {
                    proxy: self.address.to_string(),
                    what,
                });
            }
        };
        match status.is_success() {
            true => Ok(()),
            false => Err(TunnelError::Refused {
                to: to.to_string(),
                said: status.reason(socket).await,
                status: status.code,
            }),
        }
    }
}
