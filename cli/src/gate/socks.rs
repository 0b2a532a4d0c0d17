//! A client that speaks SOCKS5: the protocol is aditd's own code. A password is a token, which goes along to the host that has the VM.

use std::io;
use std::sync::Arc;

use adit_channel::refusal::Code;
use adit_reach::Destination;
use adit_reach::socks5::{self, Socks5, Step};
use hyper::header::HeaderValue;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::timeout;

use super::ahead::Ahead;
use super::{Ends, Lead, SAY_LIMIT, Shared, http};

/// Bytes that are read at once.
const PIECE: usize = 2048;

pub async fn serve(
    mut client: impl AsyncRead + AsyncWrite + Send + Unpin,
    ends: Ends,
    shared: Arc<Shared<impl Lead>>,
) -> io::Result<()> {
    let said = timeout(SAY_LIMIT, asked(&mut client)).await;
    let said = said.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
    let (to, ahead, shown) = match said {
        Said::Asks {
            name,
            port,
            ahead,
            shown,
        } => (
            Destination::named(&shared.suffix, &name, Some(port)),
            ahead,
            shown,
        ),
        Said::Refused(words) => return client.write_all(&words).await,
    };
    let opened = match to {
        Ok(to) => http::tunnel(&shared, &to, shown.as_ref())
            .await
            .map_err(|problem| problem.code()),
        Err(_) => Err(Code::UnknownVm),
    };
    match opened {
        Ok(tunnel) => {
            client.write_all(&socks5::answer(0)).await?;
            ends.carry(Ahead::new(&ahead, client), TokioIo::new(tunnel))
                .await
        }
        Err(code) => client.write_all(&socks5::answer(socks5::reply(code))).await,
    }
}

enum Said {
    Asks {
        name: String,
        port: u16,
        /// What it has said of its tunnel already.
        ahead: Vec<u8>,
        shown: Option<HeaderValue>,
    },
    Refused(Vec<u8>),
}

async fn asked(client: &mut (impl AsyncRead + AsyncWrite + Unpin)) -> io::Result<Said> {
    let (mut bytes, mut socks, mut shown) = (Vec::new(), Socks5::default(), None);
    let mut step = socks.step(&bytes);
    loop {
        step = match step {
            Step::More if bytes.len() < socks5::BYTES_MAX => {
                let mut piece = [0; PIECE];
                let got = client.read(&mut piece).await?;
                if got == 0 {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                bytes.extend_from_slice(&piece[..got]);
                socks.step(&bytes)
            }
            Step::Say(words) => {
                client.write_all(&words).await?;
                socks.step(&bytes)
            }
            Step::Token(token) => {
                // The host that has the VM knows whether it is one.
                let field = String::from_utf8(token).ok();
                let field =
                    field.and_then(|token| HeaderValue::try_from(format!("Bearer {token}")).ok());
                let is_one = field.is_some();
                shown = field;
                socks.logged_in(is_one)
            }
            Step::Connect { name, port, len } => {
                let ahead = bytes.split_off(len);
                return Ok(Said::Asks {
                    name,
                    port,
                    ahead,
                    shown,
                });
            }
            Step::Refuse(words, _) => return Ok(Said::Refused(words)),
            Step::More => return Err(io::ErrorKind::InvalidData.into()),
        };
    }
}
