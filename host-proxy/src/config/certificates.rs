//! Certificates of listeners: the texts of their files, and what TLS makes of them. Other files that a configuration names are read
//! in the same way.
//!
//! The files are read with the configuration, by whoever may read it, and travel with its texts; the worker has no files. They
//! are checked with it too: one that is missing, broken or of another key is a mistake of the configuration, and changes nothing.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{RootCertStore, ServerConfig, version};
use serde::{Deserialize, Serialize};
use webpki::EndEntityCert;

use super::access::{Address, ListenConfig, Role, Speak};
use crate::access::Subject;
use crate::access::certificate::{self, AnyCertificate};

/// Most bytes of such a file.
pub const FILE_MAX: u64 = 1 << 20;
/// Most bytes of a map of VMs: more than a hundred thousand rows need.
pub const MAP_MAX: u64 = 16 << 20;
/// Certificates of a file at most.
const CERTIFICATES_MAX: usize = 1024;
/// What clients of `speak = "http"` and this proxy speak in TLS.
const HTTP: [&[u8]; 3] = [b"h2", b"http/1.1", b"http/1.0"];

/// Texts of the files that a configuration names, by path, or why one cannot be read.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Files(BTreeMap<PathBuf, Result<String, String>>);

/// Without what is in them.
impl fmt::Debug for Files {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.0.keys()).finish()
    }
}

impl Files {
    /// Reads the files that a text of a configuration names, as far as it is one; `left` is how many bytes they may have.
    pub(super) fn read(&mut self, text: &str, left: &mut u64) {
        // A large one is a list of VMs, and is parsed when it is checked.
        if !text.contains("listen") && !text.contains("peers") {
            return;
        }
        let Ok(table) = text.parse::<toml::Table>() else {
            return;
        };
        let listens = table.get("listen").and_then(toml::Value::as_array);
        let listens = listens.into_iter().flatten().take(super::LISTENS_MAX);
        for section in listens.chain(table.get("peers")) {
            for (key, max) in [
                ("cert", FILE_MAX),
                ("key", FILE_MAX),
                ("client_ca", FILE_MAX),
                ("map", MAP_MAX),
            ] {
                let Some(path) = section.get(key).and_then(toml::Value::as_str) else {
                    continue;
                };
                let path = Path::new(path);
                if path.is_absolute() && !self.0.contains_key(path) {
                    let text = text_of(path, max.min(*left)).map_err(|e| e.to_string());
                    *left -= text.as_ref().map_or(0, |text| text.len() as u64);
                    self.0.insert(path.to_owned(), text);
                }
            }
        }
    }

    pub(super) fn text(&self, path: &Path) -> Result<String, String> {
        let text = self.0.get(path).cloned();
        let text = text.unwrap_or_else(|| Err("it was not read".into()));
        text.map_err(|why| format!("cannot read {}: {why}", path.display()))
    }
}

fn text_of(path: &Path, max: u64) -> io::Result<String> {
    // Nobody waits for a writer of a pipe.
    let file = File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("it is not a regular file"));
    }
    let mut bytes = Vec::new();
    let read = file.take(max + 1).read_to_end(&mut bytes)?;
    if read as u64 > max {
        return Err(io::Error::other(format!("it has more than {max} bytes")));
    }
    // Text before and between certificates is in whatever encoding it was written in.
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// The texts of one section's files.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Pem {
    cert: String,
    key: String,
    client_ca: Option<String>,
}

/// Without the key.
impl fmt::Debug for Pem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pem").finish_non_exhaustive()
    }
}

/// What a listener does with TLS.
#[derive(Clone, Debug)]
pub struct Terms {
    /// For each connection.
    pub server: Arc<ServerConfig>,
    /// Digest of its key: `sha256/` and base64.
    pub pin: String,
    /// Who vouches for clients' certificates.
    pub authority: Option<Arc<dyn ClientCertVerifier>>,
}

impl Pem {
    /// # Errors
    /// The key at fault, and why: one cannot be read.
    pub(super) fn of(
        files: &Files,
        cert: Option<&Path>,
        key: Option<&Path>,
        client_ca: Option<&Path>,
    ) -> Result<Self, Wrong> {
        let text = |key, path: Option<&Path>| match path {
            Some(path) => files.text(path).map(Some).map_err(|why| (key, why)),
            None => Ok(None),
        };
        Ok(Self {
            cert: text("cert", cert)?.unwrap_or_default(),
            key: text("key", key)?.unwrap_or_default(),
            client_ca: text("client_ca", client_ca)?,
        })
    }
}

/// A key, and what is wrong with it.
pub(super) type Wrong = (&'static str, String);

impl ListenConfig {
    /// Takes the texts of its files.
    ///
    /// # Errors
    /// The key at fault, and why: one cannot be read.
    pub(super) fn take(&mut self, files: &Files) -> Result<(), Wrong> {
        let (cert, key) = (self.cert.as_deref(), self.key.as_deref());
        self.pem = Pem::of(files, cert, key, self.client_ca.as_deref())?;
        Ok(())
    }

    /// Says nothing of TLS any more.
    pub(super) fn forget_tls(&mut self) {
        (self.cert, self.key, self.client_ca) = (None, None, None);
        self.pem = Pem::default();
    }

    /// Takes what another one says of TLS.
    pub(super) fn take_tls_of(&mut self, other: &Self) {
        self.cert.clone_from(&other.cert);
        self.key.clone_from(&other.key);
        self.client_ca.clone_from(&other.client_ca);
        self.pem.clone_from(&other.pem);
    }

    /// Checks which keys stand together.
    pub(super) fn check_tls(&self) -> Result<(), Wrong> {
        let alone = match (&self.cert, &self.key) {
            (None, None) => {
                let ca = self.client_ca.as_ref();
                ca.map(|_| ("client_ca", "it takes `cert` and `key`"))
            }
            (Some(_), None) => Some(("cert", "it takes `key`, the certificate's private key")),
            (None, Some(_)) => Some(("key", "it takes `cert`, the key's certificate")),
            (Some(_), Some(_)) if !matches!(self.speak, Speak::Http | Speak::Socks5) => Some((
                "cert",
                "it takes `speak = \"http\"` or `\"socks5\"`: others speak no TLS to aditd",
            )),
            (Some(_), Some(_)) if matches!(self.address, Address::Unix(_)) => Some((
                "cert",
                "it takes an IP address: what is on a Unix socket leaves the host for nobody to read",
            )),
            (Some(_), Some(_)) => None,
        };
        alone.map_or(Ok(()), |(key, why)| Err((key, why.to_owned())))
    }

    /// What it does with TLS; none: it speaks none.
    ///
    /// # Errors
    /// The key at fault, and why.
    pub fn terms(&self) -> Result<Option<Terms>, Wrong> {
        let (Some(cert), Some(key)) = (&self.cert, &self.key) else {
            return Ok(None);
        };
        let certified = certified(cert, key, &self.pem)?;
        let pin = certified.end_entity_cert().ok().and_then(pin_of);
        let pin = pin.ok_or_else(|| {
            (
                "cert",
                of(cert, "its first certificate is none of X.509 v3"),
            )
        })?;
        let provider = Arc::new(ring::default_provider());
        let algorithms = provider.signature_verification_algorithms;
        let authority = match (&self.client_ca, &self.pem.client_ca) {
            (Some(path), Some(text)) => {
                let wrong = |why: String| ("client_ca", of(path, why));
                let mut roots = RootCertStore::empty();
                for root in certificates(text).map_err(wrong)? {
                    let added = roots.add(root);
                    added
                        .map_err(|_| wrong("one of its certificates is none of X.509 v3".into()))?;
                }
                let authority =
                    WebPkiClientVerifier::builder_with_provider(roots.into(), provider.clone())
                        .allow_unauthenticated()
                        .build();
                Some(authority.map_err(|e| wrong(e.to_string()))?)
            }
            _ => None,
        };
        let clients = authority
            .clone()
            .unwrap_or_else(|| Arc::new(AnyCertificate(algorithms)));
        let server = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&version::TLS13, &version::TLS12])
            .map_err(|e| ("cert", e.to_string()))?
            .with_client_cert_verifier(clients);
        let mut server = server.with_cert_resolver(Arc::new(SingleCertAndKey::from(certified)));
        // A session that is resumed brings its certificate along, whoever vouches for it now; and each would be kept in memory.
        server.session_storage = Arc::new(NoServerSessionStorage {});
        server.send_tls13_tickets = 0;
        if self.speak == Speak::Http {
            let spoken = match self.role {
                Role::Proxy => &HTTP[..],
                // The API speaks HTTP/1.1 alone.
                Role::Management => &HTTP[1..],
            };
            server.alpn_protocols = spoken.iter().map(|name| name.to_vec()).collect();
        }
        Ok(Some(Terms {
            server: Arc::new(server),
            pin,
            authority,
        }))
    }
}

/// The digest of a certificate's key.
fn pin_of(certificate: &CertificateDer<'_>) -> Option<String> {
    let certificate = EndEntityCert::try_from(certificate).ok()?;
    match certificate::pin(&certificate) {
        Subject::Cert(pin) => Some(pin),
        _ => None,
    }
}

/// A certificate with its key.
///
/// # Errors
/// The key at fault, and why.
pub(super) fn certified(cert: &Path, key: &Path, pem: &Pem) -> Result<CertifiedKey, Wrong> {
    let chain = certificates(&pem.cert).map_err(|why| ("cert", of(cert, why)))?;
    let private = private_key(&pem.key).map_err(|why| ("key", of(key, why)))?;
    let certified = CertifiedKey::from_der(chain, private, &ring::default_provider());
    certified.map_err(|e| match e {
        rustls::Error::InvalidCertificate(_) => (
            "cert",
            of(cert, "its first certificate is none of X.509 v3"),
        ),
        rustls::Error::InconsistentKeys(_) => (
            "key",
            of(
                key,
                format!(
                    "it is not the key of the first certificate of {}",
                    cert.display()
                ),
            ),
        ),
        _ => (
            "key",
            of(key, "it is no RSA, ECDSA or Ed25519 key that TLS can use"),
        ),
    })
}

fn of(path: &Path, why: impl fmt::Display) -> String {
    format!("{}: {why}", path.display())
}

fn certificates(text: &str) -> Result<Vec<CertificateDer<'static>>, String> {
    let mut all = Vec::new();
    for one in CertificateDer::pem_slice_iter(text.as_bytes()) {
        all.push(one.map_err(|_| "it is broken PEM")?);
        if all.len() > CERTIFICATES_MAX {
            return Err(format!("it has more than {CERTIFICATES_MAX} certificates"));
        }
    }
    match all.is_empty() {
        true => Err("there is no certificate in it (PEM, `BEGIN CERTIFICATE`)".into()),
        false => Ok(all),
    }
}

/// Nothing of the text is in what it says is wrong with it.
fn private_key(text: &str) -> Result<PrivateKeyDer<'static>, &'static str> {
    let mut all = PrivateKeyDer::pem_slice_iter(text.as_bytes());
    match (all.next(), all.next()) {
        (Some(Ok(key)), None) => Ok(key),
        (Some(Ok(_)), Some(_)) => Err("there is more than one private key in it"),
        (None, _) if text.contains("ENCRYPTED PRIVATE KEY") => Err(
            "the key is encrypted, and nobody is there to say the password: \
                 `openssl pkey -in FILE -out NEW` decrypts it",
        ),
        (None, _) => Err("there is no private key in it (PEM, `BEGIN PRIVATE KEY`)"),
        (Some(Err(_)), _) => Err("it is broken PEM"),
    }
}

impl super::Config {
    /// Gives each listener the certificate that `newer` has for the same one.
    pub(super) fn take_certificates_of(&mut self, newer: &Self) {
        let new = self.certificates_of(newer);
        for (listen, newer) in self.listen.iter_mut().zip(new) {
            if let Some(newer) = newer {
                listen.take_tls_of(&newer);
            }
        }
    }

    /// For each listener, the same one in `newer`: of those with its address, the one with as many before it.
    pub fn certificates_of(&self, newer: &Self) -> Vec<Option<ListenConfig>> {
        let mut seen = BTreeMap::<String, usize>::new();
        let mut same = |listen: &ListenConfig| {
            let before = seen.entry(listen.address.to_string()).or_default();
            let others = newer.listen.iter();
            let mut others = others.filter(|other| other.address == listen.address);
            let found = others.nth(*before).cloned();
            *before += 1;
            found
        };
        self.listen.iter().map(&mut same).collect()
    }
}
