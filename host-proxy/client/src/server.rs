//! An aditd on another host: HTTPS to a management listener of it.
//!
//! | whom we believe | by |
//! |---|---|
//! | a certificate that leads to one of [`Options::ca`], in its time, for the host's name or address | WebPKI |
//! | the key of [`Options::pin`], whatever else its certificate says | its SHA-256 |
//!
//! Where both are given, both must hold. Nothing is sent before that, and there is no way without TLS: a request that cannot be made
//! so is not made.

use std::fmt;
use std::sync::Arc;

use adit_api::token::sha256;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hyper::header::HeaderValue;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{
    WebPkiSupportedAlgorithms, ring, verify_tls12_signature, verify_tls13_signature,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{
    AlertDescription, CertificateError, ClientConfig, DigitallySignedStruct, Error, OtherError,
    RootCertStore, SignatureScheme, version,
};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use webpki::EndEntityCert;

use crate::ClientError;

/// What a pin begins with.
const PIN: &str = "sha256/";

/// Which aditd, and what it and we prove.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options<'a> {
    /// `https://HOST:PORT`.
    pub address: &'a str,
    /// PEM of the certificates of whoever vouches for it.
    pub ca: Option<&'a [u8]>,
    /// `sha256/` and the base64 of the SHA-256 of its key (SubjectPublicKeyInfo).
    pub pin: Option<&'a str>,
    /// PEM of our certificate and of its key.
    pub identity: Option<(&'a [u8], &'a [u8])>,
    /// Our token.
    pub token: Option<&'a str>,
}

/// An aditd on another host. A copy is cheap.
#[derive(Clone)]
pub struct Server(Arc<Inner>);

struct Inner {
    host: String,
    port: u16,
    name: ServerName<'static>,
    tls: Arc<ClientConfig>,
    token: Option<HeaderValue>,
}

/// Without the token.
impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Server({self})")
    }
}

impl fmt::Display for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "https://{}", self.authority())
    }
}

/// Why there can be no such server. The fault of whoever gave the options.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// No address.
    #[error("it is no address of an aditd: write https://HOST:PORT")]
    Address,
    /// Without TLS.
    #[error(
        "only https:// is spoken: without TLS whoever is on the way reads the token and answers in aditd's place"
    )]
    Plain,
    /// Whoever answers would be believed.
    #[error("nothing says which server to believe")]
    NoTrust,
    /// Not certificates.
    #[error("the file of certificates to believe: {0}")]
    Ca(String),
    /// Not a pin.
    #[error("a pin is `sha256/` and the base64 of the SHA-256 of a key, 44 characters")]
    Pin,
    /// Not a certificate and its key.
    #[error("our certificate: {0}")]
    Identity(String),
    /// Not a token.
    #[error("the token cannot be part of a request")]
    Token,
}

impl Server {
    /// Takes the options.
    ///
    /// # Errors
    /// They make no sense.
    pub fn new(options: Options<'_>) -> Result<Self, ServerError> {
        let (host, port) = address(options.address)?;
        let bare = host.trim_start_matches('[').trim_end_matches(']');
        let name = ServerName::try_from(bare.to_owned()).map_err(|_| ServerError::Address)?;
        let provider = Arc::new(ring::default_provider());
        let algorithms = provider.signature_verification_algorithms;
        let by_ca = match options.ca {
            Some(pem) => Some(verifier(pem, provider.clone())?),
            None => None,
        };
        let pin = options.pin.map(pin).transpose()?;
        if by_ca.is_none() && pin.is_none() {
            return Err(ServerError::NoTrust);
        }
        let believed = Believed {
            by_ca,
            pin,
            algorithms,
        };
        let config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&version::TLS13, &version::TLS12])
            .map_err(|e| ServerError::Identity(e.to_string()))?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(believed));
        let mut config = match options.identity {
            Some((cert, key)) => {
                let wrong = |e: &dyn fmt::Display| ServerError::Identity(e.to_string());
                let chain = certificates(cert).map_err(|e| wrong(&e))?;
                let key = PrivateKeyDer::from_pem_slice(key);
                let key = key.map_err(|_| {
                    wrong(&"there is no private key in it, or it is encrypted (PEM, `BEGIN PRIVATE KEY`)")
                })?;
                config
                    .with_client_auth_cert(chain, key)
                    .map_err(|e| wrong(&e))?
            }
            None => config.with_no_client_auth(),
        };
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        let token = options.token.map(|token| {
            let mut field = HeaderValue::try_from(format!("Bearer {token}"))?;
            field.set_sensitive(true);
            Ok::<_, hyper::header::InvalidHeaderValue>(field)
        });
        Ok(Self(Arc::new(Inner {
            host: bare.to_owned(),
            port,
            name,
            tls: Arc::new(config),
            token: token.transpose().map_err(|_| ServerError::Token)?,
        })))
    }

    pub(crate) fn authority(&self) -> String {
        let Inner { host, port, .. } = &*self.0;
        match host.contains(':') {
            true => format!("[{host}]:{port}"),
            false => format!("{host}:{port}"),
        }
    }

    /// Another one, to which the same is shown. It is believed by its key alone.
    ///
    /// # Errors
    /// The address or the pin is none.
    pub fn with_key(&self, at: &str, of_key: &str) -> Result<Self, ServerError> {
        let (host, port) = address(at)?;
        let bare = host.trim_start_matches('[').trim_end_matches(']');
        let name = ServerName::try_from(bare.to_owned()).map_err(|_| ServerError::Address)?;
        let believed = Believed {
            by_ca: None,
            pin: Some(pin(of_key)?),
            algorithms: ring::default_provider().signature_verification_algorithms,
        };
        let mut tls = ClientConfig::clone(&self.0.tls);
        tls.dangerous().set_certificate_verifier(Arc::new(believed));
        // A session that is resumed shows no certificate, and what is kept of sessions is by the name only.
        tls.resumption = rustls::client::Resumption::disabled();
        Ok(Self(Arc::new(Inner {
            host: bare.to_owned(),
            port,
            name,
            tls: Arc::new(tls),
            token: self.0.token.clone(),
        })))
    }

    /// How an IP address and a port are reached that this server has named: an unspecified one is its own.
    pub fn address_of(&self, named: &str) -> Option<String> {
        let named: std::net::SocketAddr = named.parse().ok()?;
        let (host, port) = (&self.0.host, named.port());
        Some(match (named.ip().is_unspecified(), host.contains(':')) {
            (false, _) => format!("https://{named}"),
            (true, true) => format!("https://[{host}]:{port}"),
            (true, false) => format!("https://{host}:{port}"),
        })
    }

    /// The field that shows our token.
    pub fn token(&self) -> Option<&HeaderValue> {
        self.0.token.as_ref()
    }

    /// Connects to it. Nothing is sent before it is known to be the one that is meant.
    ///
    /// # Errors
    /// It is not reached, or another one answers.
    pub async fn connect(&self) -> Result<TlsStream<TcpStream>, ClientError> {
        let Inner { host, port, .. } = &*self.0;
        let tcp = TcpStream::connect((host.as_str(), *port)).await;
        let tcp = tcp.map_err(|source| ClientError::NoServer {
            server: self.to_string(),
            source,
        })?;
        let connector = TlsConnector::from(self.0.tls.clone());
        let connected = connector.connect(self.0.name.clone(), tcp).await;
        connected.map_err(|e| {
            let (why, help) = why(&e);
            let server = self.to_string();
            ClientError::Untrusted { server, why, help }
        })
    }
}

fn address(text: &str) -> Result<(String, u16), ServerError> {
    let rest = match text.split_once("://") {
        Some(("https", rest)) => rest,
        Some(("http", _)) => return Err(ServerError::Plain),
        _ => return Err(ServerError::Address),
    };
    let rest = rest.strip_suffix('/').unwrap_or(rest);
    let (host, port) = rest.rsplit_once(':').ok_or(ServerError::Address)?;
    let number: u16 = port.parse().map_err(|_| ServerError::Address)?;
    let is_host = match host
        .strip_prefix('[')
        .and_then(|host| host.strip_suffix(']'))
    {
        Some(v6) => v6.parse::<std::net::Ipv6Addr>().is_ok(),
        None => {
            let is = |b: u8| b.is_ascii_alphanumeric() || b"-_.".contains(&b);
            !host.is_empty() && host.bytes().all(is)
        }
    };
    if !is_host || number == 0 || number.to_string() != port {
        return Err(ServerError::Address);
    }
    Ok((host.to_owned(), number))
}

fn certificates(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, &'static str> {
    let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    match all {
        Ok(all) if all.is_empty() => {
            Err("there is no certificate in it (PEM, `BEGIN CERTIFICATE`)")
        }
        Ok(all) => Ok(all),
        Err(_) => Err("it is broken PEM"),
    }
}

fn verifier(
    pem: &[u8],
    provider: Arc<rustls::crypto::CryptoProvider>,
) -> Result<Arc<WebPkiServerVerifier>, ServerError> {
    let mut roots = RootCertStore::empty();
    for root in certificates(pem).map_err(|e| ServerError::Ca(e.into()))? {
        let added = roots.add(root);
        added.map_err(|_| ServerError::Ca("one of its certificates is none of X.509 v3".into()))?;
    }
    WebPkiServerVerifier::builder_with_provider(roots.into(), provider)
        .build()
        .map_err(|e| ServerError::Ca(e.to_string()))
}

fn pin(text: &str) -> Result<[u8; 32], ServerError> {
    let digest = text
        .strip_prefix(PIN)
        .and_then(|text| STANDARD.decode(text).ok());
    digest
        .and_then(|digest| digest.try_into().ok())
        .ok_or(ServerError::Pin)
}

/// Whom we believe.
#[derive(Debug)]
struct Believed {
    by_ca: Option<Arc<WebPkiServerVerifier>>,
    pin: Option<[u8; 32]>,
    algorithms: WebPkiSupportedAlgorithms,
}

/// It has another key.
#[derive(Debug, thiserror::Error)]
#[error("its key is not the pinned one: it is {PIN}{}", STANDARD.encode(.0))]
struct AnotherKey([u8; 32]);

/// It shows the certificate of an authority as its own, as one that somebody has signed themselves in a hurry often is.
#[derive(Debug, thiserror::Error)]
#[error("its certificate is an authority's (CA:TRUE), and shows no server; its key is {PIN}{}", STANDARD.encode(.0))]
struct Authority([u8; 32]);

/// Digest of its key.
fn digest(own: &CertificateDer<'_>) -> Result<[u8; 32], Error> {
    let bad = |_| Error::InvalidCertificate(CertificateError::BadEncoding);
    let certificate = EndEntityCert::try_from(own).map_err(bad)?;
    Ok(sha256(&certificate.subject_public_key_info()))
}

fn other(why: impl std::error::Error + Send + Sync + 'static) -> Error {
    CertificateError::Other(OtherError(Arc::new(why))).into()
}

/// What rustls says of a certificate.
fn of_library<T: std::error::Error + 'static>(why: &OtherError) -> Option<&T> {
    why.0.downcast_ref()
}

impl ServerCertVerifier for Believed {
    fn verify_server_cert(
        &self,
        own: &CertificateDer<'_>,
        between: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        if let Some(by_ca) = &self.by_ca {
            let verified = by_ca.verify_server_cert(own, between, name, ocsp, now);
            verified.map_err(|e| match &e {
                Error::InvalidCertificate(CertificateError::Other(why))
                    if of_library(why) == Some(&webpki::Error::CaUsedAsEndEntity) =>
                {
                    digest(own).map_or(e, |digest| other(Authority(digest)))
                }
                _ => e,
            })?;
        }
        if let Some(pin) = &self.pin {
            let digest = digest(own)?;
            if digest != *pin {
                return Err(other(AnotherKey(digest)));
            }
        }
        match (&self.by_ca, &self.pin) {
            (None, None) => Err(CertificateError::UnknownIssuer.into()),
            _ => Ok(ServerCertVerified::assertion()),
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, cert, dss, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// What to do where nothing more is known.
const CHECK: &str = "nothing was asked of it: check --server, --ca and --pin; if the key has changed, ask whoever runs it";
/// Where it has not the kind of port that is meant.
const NOT_THE_PORT: &str = "nothing was asked of it: --server takes the port of a [[listen]] with `role = \"management\"` in its aditd.toml";
/// Where it shows an authority.
const AUTHORITY: &str = "have it show a certificate that this authority signs for its name; or, if that is its key, believe it by the key alone: \
     --pin, without --ca";

/// Why a handshake failed, and what to do about it, for people.
fn why(e: &std::io::Error) -> (String, &'static str) {
    use CertificateError as C;
    let tls = e.get_ref().and_then(|e| e.downcast_ref::<Error>());
    let of_certificate = |why: &C| match why {
        C::NotValidForName | C::NotValidForNameContext { .. } => {
            "its certificate is for another name".to_owned()
        }
        C::Expired | C::ExpiredContext { .. } => "its certificate has expired".into(),
        C::NotValidYet | C::NotValidYetContext { .. } => "its certificate is not valid yet".into(),
        C::UnknownIssuer | C::BadSignature => {
            "its certificate is of nobody that --ca vouches for".into()
        }
        C::Other(OtherError(why)) => why.to_string(),
        why => format!("its certificate is refused: {why}"),
    };
    match tls {
        Some(Error::InvalidCertificate(why)) => {
            let is_authority =
                matches!(why, C::Other(why) if of_library::<Authority>(why).is_some());
            let help = if is_authority { AUTHORITY } else { CHECK };
            (of_certificate(why), help)
        }
        Some(Error::InvalidMessage(_)) => ("it speaks no TLS".into(), NOT_THE_PORT),
        // As a listener does that passes TLS on, to the VM that is named.
        Some(Error::AlertReceived(AlertDescription::UnrecognisedName)) => {
            ("it serves nothing of that name".into(), NOT_THE_PORT)
        }
        Some(why) => (why.to_string(), CHECK),
        None => (format!("the handshake ended: {e}"), NOT_THE_PORT),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A_PIN: &str = "sha256/AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=";

    fn server(address: &str) -> Result<Server, ServerError> {
        Server::new(Options {
            address,
            pin: Some(A_PIN),
            ..Options::default()
        })
    }

    #[test]
    fn r70_there_is_no_way_without_tls_and_none_that_believes_anybody() {
        assert!(matches!(server("http://h:1"), Err(ServerError::Plain)));
        for address in [
            "",
            "h:1",
            "https://h",
            "https://h:0",
            "https://h:01",
            "https://:1",
            "https://u@h:1",
            "https://h:1/x",
            "https://[h]:1",
            "https://::1:1",
            "ftp://h:1",
            "HTTPS://h:1",
        ] {
            assert!(
                matches!(server(address), Err(ServerError::Address)),
                "{address}"
            );
        }
        let none = Server::new(Options {
            address: "https://h:1",
            ..Options::default()
        });
        assert!(matches!(none, Err(ServerError::NoTrust)));
        assert_eq!(
            server("https://h.example:7443/").unwrap().to_string(),
            "https://h.example:7443"
        );
        assert_eq!(
            server("https://[::1]:1").unwrap().to_string(),
            "https://[::1]:1"
        );
        for bad in ["", "sha256/", "sha256/AAAA", &A_PIN[7..], "sha1/AAAA"] {
            let with = Options {
                address: "https://h:1",
                pin: Some(bad),
                ..Options::default()
            };
            assert!(matches!(Server::new(with), Err(ServerError::Pin)), "{bad}");
        }
    }

    #[test]
    fn r70_another_one_is_believed_by_its_key_only_and_is_where_the_first_says() {
        let one = server("https://h.example:7443").unwrap();
        for (named, at) in [
            ("192.0.2.1:7", "https://192.0.2.1:7"),
            ("[2001:db8::1]:7", "https://[2001:db8::1]:7"),
            ("0.0.0.0:7", "https://h.example:7"),
            ("[::]:7", "https://h.example:7"),
        ] {
            assert_eq!(one.address_of(named).as_deref(), Some(at));
            let other = one.with_key(at, A_PIN).unwrap();
            assert_eq!(other.to_string(), at);
        }
        let v6 = server("https://[::1]:1").unwrap();
        assert_eq!(
            v6.address_of("0.0.0.0:7").as_deref(),
            Some("https://[::1]:7")
        );
        for bad in ["", "h:1", "192.0.2.1", "https://192.0.2.1:7"] {
            assert_eq!(one.address_of(bad), None, "{bad}");
        }
        let none = one.with_key("https://192.0.2.1:7", "");
        assert!(matches!(none, Err(ServerError::Pin)));
    }

    #[test]
    fn a_token_is_not_shown() {
        let server = Server::new(Options {
            address: "https://h:1",
            pin: Some(A_PIN),
            token: Some("secret"),
            ..Options::default()
        });
        assert!(!format!("{:?}", server.unwrap()).contains("secret"));
    }
}
