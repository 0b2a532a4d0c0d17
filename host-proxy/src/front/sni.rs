//! Which VM a TLS client means: the server name of its first message. The connection is passed on as it is, so that the VM's own
//! certificate is what the client checks.

use rustls::server::Acceptor;

/// Most bytes of that message, in its records.
pub const HELLO_MAX: usize = 16 << 10;

/// TLS's alert for a name that is not served (RFC 6066 §3), fatal.
pub const UNRECOGNIZED_NAME: [u8; 7] = [21, 3, 3, 0, 2, 2, 112];
/// TLS's alert for everything that is not the client's fault.
pub const INTERNAL_ERROR: [u8; 7] = [21, 3, 3, 0, 2, 2, 80];

/// What the bytes of a client say so far.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Hello {
    /// It has not said it yet.
    More,
    /// It wants this server.
    Named(String),
    /// It names none.
    Unnamed,
    /// It speaks no TLS.
    Foreign,
}

/// Reads all bytes that the client has sent since the beginning.
pub fn read(mut bytes: &[u8]) -> Hello {
    let mut acceptor = Acceptor::default();
    while !bytes.is_empty() {
        match acceptor.read_tls(&mut bytes) {
            Ok(0) => break,
            Ok(_) => {}
            Err(_) => return Hello::Foreign,
        }
        match acceptor.accept() {
            Ok(None) => {}
            Ok(Some(accepted)) => {
                return match accepted.client_hello().server_name() {
                    Some(name) => Hello::Named(name.to_owned()),
                    None => Hello::Unnamed,
                };
            }
            Err(_) => return Hello::Foreign,
        }
    }
    Hello::More
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use rustls::pki_types::ServerName;
    use rustls::{ClientConfig, ClientConnection, RootCertStore};

    use super::*;

    fn hello(name: &'static str) -> Vec<u8> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(RootCertStore::empty())
            .with_no_client_auth();
        let name = ServerName::try_from(name).unwrap();
        let mut client = ClientConnection::new(Arc::new(config), name).unwrap();
        let mut bytes = Vec::new();
        client.write_tls(&mut bytes).unwrap();
        bytes
    }

    #[test]
    fn the_name_is_read_once_the_message_is_whole() {
        let bytes = hello("web-1.adit");
        for len in 0..bytes.len() {
            assert_eq!(read(&bytes[..len]), Hello::More, "{len}");
        }
        assert_eq!(read(&bytes), Hello::Named("web-1.adit".into()));
        // An address is no server name.
        assert_eq!(read(&hello("127.0.0.1")), Hello::Unnamed);
    }

    #[test]
    fn a_message_in_several_records_is_one() {
        let bytes = hello("web-1");
        let (head, body) = bytes.split_at(5);
        let mut split = Vec::new();
        for piece in body.chunks(100) {
            split.extend_from_slice(&head[..3]);
            split.extend_from_slice(&u16::try_from(piece.len()).unwrap().to_be_bytes());
            split.extend_from_slice(piece);
        }
        assert_eq!(read(&split), Hello::Named("web-1".into()));
    }

    #[test]
    fn what_is_no_tls_is_foreign() {
        for bytes in [
            &b"GET / HTTP/1.1\r\n\r\n"[..],
            b"SSH-2.0-x\r\n",
            &[0x16, 3, 1, 0, 0],
            &[0x80, 0x2e, 1, 3, 1, 0],
        ] {
            assert!(
                matches!(read(bytes), Hello::Foreign | Hello::More),
                "{bytes:?}"
            );
        }
        assert_eq!(read(b"GET / HTTP/1.1\r\n\r\n"), Hello::Foreign);
    }
}
