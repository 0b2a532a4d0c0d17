//! Certificates that clients show over TLS, and by which names their holders are known.
//!
//! | proved by | name |
//! |---|---|
//! | the handshake: the client has the certificate's key | `cert:sha256/…`, the SHA-256 of the certificate's SubjectPublicKeyInfo |
//! | and by a chain to the listener's `client_ca`, in its time, for clients | `cert:NAME` for each DNS name and each URI among its subject alternative names |
//!
//! The subject and its common name say nothing, and a wildcard is nobody's name. Where `client_ca` is replaced while a connection
//! is open, what the new one does not vouch for is nobody's name any more; and an open connection outlives no certificate.

use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use adit_api::token::sha256;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use rustls::client::danger::HandshakeSignatureValid;
use rustls::crypto::{WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{CertificateError, DigitallySignedStruct, DistinguishedName, Error, SignatureScheme};
use webpki::EndEntityCert;

use super::subject::{self, Subject};

/// How long a chain that was verified is believed without another look.
const KNOWN_FOR: Duration = Duration::from_secs(60);
/// Names of one certificate that count.
const NAMES_MAX: usize = 64;

/// Whoever vouches for certificates of a listener's clients, as the configuration has it now; none: nobody does.
#[derive(Debug, Default)]
pub struct Authority(RwLock<Option<Arc<dyn ClientCertVerifier>>>);

impl Authority {
    /// Replaces it.
    pub fn set(&self, now: Option<Arc<dyn ClientCertVerifier>>) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = now;
    }

    fn now(&self) -> Option<Arc<dyn ClientCertVerifier>> {
        self.0
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

/// A certificate whose key a client has shown to have.
#[derive(Debug)]
pub struct Certificate {
    /// The client's own first.
    chain: Vec<CertificateDer<'static>>,
    authority: Arc<Authority>,
    known: Mutex<Option<Known>>,
}

#[derive(Debug)]
struct Known {
    since: Instant,
    by: Option<Arc<dyn ClientCertVerifier>>,
    names: Vec<Subject>,
}

impl Certificate {
    /// What a client has shown, its own certificate first; none: nothing.
    pub fn new(chain: Vec<CertificateDer<'static>>, authority: Arc<Authority>) -> Option<Self> {
        (!chain.is_empty()).then(|| Self {
            chain,
            authority,
            known: Mutex::new(None),
        })
    }

    /// Names of its holder, as they are proved now.
    pub fn names(&self) -> Vec<Subject> {
        let by = self.authority.now();
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let is_same = |known: &&Known| match (&known.by, &by) {
            (Some(then), Some(now)) => Arc::ptr_eq(then, now),
            (then, now) => then.is_none() && now.is_none(),
        };
        let fresh = known
            .as_ref()
            .filter(is_same)
            .filter(|known| known.since.elapsed() < KNOWN_FOR);
        if let Some(fresh) = fresh {
            return fresh.names.clone();
        }
        let names = self.look(by.as_deref());
        *known = Some(Known {
            since: Instant::now(),
            by,
            names: names.clone(),
        });
        names
    }

    fn look(&self, by: Option<&dyn ClientCertVerifier>) -> Vec<Subject> {
        let Some((own, between)) = self.chain.split_first() else {
            return vec![];
        };
        let Ok(certificate) = EndEntityCert::try_from(own) else {
            return vec![];
        };
        let vouched = by.is_some_and(|by| {
            let verified = by.verify_client_cert(own, between, UnixTime::now());
            verified.is_ok()
        });
        let mut names = match vouched {
            true => names(&certificate),
            false => vec![],
        };
        names.push(pin(&certificate));
        names
    }
}

fn names(certificate: &EndEntityCert<'_>) -> Vec<Subject> {
    let hosts = certificate
        .valid_dns_names()
        .map(str::to_ascii_lowercase)
        .filter(|name| subject::is_host(name));
    let uris = certificate
        .valid_uri_names()
        .filter(|uri| subject::is_uri(uri))
        .map(str::to_owned);
    uris.chain(hosts)
        .take(NAMES_MAX)
        .map(Subject::Cert)
        .collect()
}

/// The name of whoever has the key of a certificate.
pub fn pin(certificate: &EndEntityCert<'_>) -> Subject {
    let key = certificate.subject_public_key_info();
    let digest = STANDARD.encode(sha256(&key));
    Subject::Cert(format!("{}{digest}", subject::PIN))
}

/// Takes every certificate whose key the client has, and none as well. Where nobody vouches for it, only its pin is a name.
#[derive(Debug)]
pub struct AnyCertificate(pub WebPkiSupportedAlgorithms);

impl ClientCertVerifier for AnyCertificate {
    fn client_auth_mandatory(&self) -> bool {
        false
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        own: &CertificateDer<'_>,
        _between: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        match EndEntityCert::try_from(own) {
            Ok(_) => Ok(ClientCertVerified::assertion()),
            Err(_) => Err(CertificateError::BadEncoding.into()),
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        own: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, own, signed, &self.0)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        own: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, own, signed, &self.0)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, KeyPair, SanType};
    use rustls::RootCertStore;
    use rustls::crypto::ring;
    use rustls::server::WebPkiClientVerifier;

    use super::*;

    fn authority(ca: &rcgen::Certificate) -> Arc<dyn ClientCertVerifier> {
        let mut roots = RootCertStore::empty();
        roots.add(ca.der().clone()).unwrap();
        let provider = Arc::new(ring::default_provider());
        WebPkiClientVerifier::builder_with_provider(roots.into(), provider)
            .allow_unauthenticated()
            .build()
            .unwrap()
    }

    fn ca() -> (rcgen::Certificate, rcgen::Issuer<'static, KeyPair>) {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let certificate = params.self_signed(&key).unwrap();
        (certificate, rcgen::Issuer::new(params, key))
    }

    fn texts(certificate: &Certificate) -> Vec<String> {
        certificate
            .names()
            .iter()
            .map(ToString::to_string)
            .collect()
    }

    #[test]
    fn r125_only_names_that_the_authority_of_now_vouches_for_count_and_the_pin_always() {
        let ((ca, issuer), (other, _)) = (self::ca(), self::ca());
        let key = KeyPair::generate().unwrap();
        let mut params =
            CertificateParams::new(["CI.Example".to_owned(), "*.ops".to_owned()]).unwrap();
        params
            .distinguished_name
            .push(rcgen::DnType::CommonName, "root.example");
        for uri in [
            "spiffe://adit/ci",
            "deploy",
            "sha256/x",
            "urn:a b",
            "urn:x,cert:root",
        ] {
            let uri = SanType::URI(uri.try_into().unwrap());
            params.subject_alt_names.push(uri);
        }
        params
            .subject_alt_names
            .push(SanType::Rfc822Name("a@b.example".try_into().unwrap()));
        let own = params.signed_by(&key, &issuer).unwrap();
        let authority = Arc::new(Authority::default());
        authority.set(Some(self::authority(&ca)));
        let shown = Certificate::new(vec![own.der().clone()], authority.clone()).unwrap();
        let names = texts(&shown);
        let pin = names.last().unwrap().clone();
        assert!(pin.starts_with("cert:sha256/") && pin.parse::<Subject>().is_ok());
        assert_eq!(names, ["cert:spiffe://adit/ci", "cert:ci.example", &*pin]);
        authority.set(Some(self::authority(&other)));
        assert_eq!(texts(&shown), [&*pin]);
        authority.set(None);
        assert_eq!(texts(&shown), [&*pin]);
        authority.set(Some(self::authority(&ca)));
        assert_eq!(texts(&shown).len(), 3);
    }

    #[test]
    fn what_is_no_certificate_names_nobody() {
        let authority = Arc::new(Authority::default());
        assert!(Certificate::new(vec![], authority.clone()).is_none());
        let broken = Certificate::new(vec![vec![0x30, 0].into()], authority).unwrap();
        assert!(broken.names().is_empty());
    }
}
