//! A connection is ended so that the client hears what was said.
//!
//! A TCP socket that closes with bytes unread sends a reset, and a reset takes away what the client has not read yet: whoever is
//! refused in the middle of an upload would see a broken pipe instead of the answer (RFC 9112 §9.6). So sending is ended first,
//! and what the client still sends is read and thrown away, for a bounded time and amount.

use std::io;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::timeout;

use super::problem::Problem;

/// How long a client is listened to after its last answer.
const LIMIT: Duration = Duration::from_secs(30);
/// How long it may be silent meanwhile.
const SILENCE: Duration = Duration::from_secs(5);
/// Bytes that are thrown away at most.
const BYTES_MAX: usize = 256 << 20;

/// Says why the connection ends, if that is to be said, and ends it; `rest`: the client may be sending still.
pub(crate) async fn end(
    client: &mut (impl AsyncRead + AsyncWrite + Unpin),
    why: Option<&Problem>,
    rest: bool,
) -> io::Result<()> {
    let said = async {
        if let Some(why) = why {
            client.write_all(why.text().as_bytes()).await?;
        }
        client.shutdown().await?;
        let mut thrown = vec![0; 16 << 10];
        let mut bytes = 0;
        while rest && bytes < BYTES_MAX {
            match timeout(SILENCE, client.read(&mut thrown)).await {
                Ok(Ok(n)) if n > 0 => bytes += n,
                Ok(Err(e)) => return Err(e),
                Ok(Ok(_)) | Err(_) => break,
            }
        }
        Ok(())
    };
    timeout(LIMIT, said).await.unwrap_or(Ok(()))
}
