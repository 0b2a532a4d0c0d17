//! TLS to another host: TLS 1.3, both ends show certificates, and the other one is the host that is meant, or there is no connection
//! (R70).
//!
//! | checked of its certificate | else |
//! |---|---|
//! | the digest of its key is the pin | it is another host |
//! | its time has begun, and is not over | it may have been given up since |
//! | it is for the host's name, or for the IP address it is reached at | several hosts share a key |
//!
//! Who has signed it says nothing: the pin does.

use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{WebPkiSupportedAlgorithms, ring, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error, SignatureScheme, version,
};
use webpki::EndEntityCert;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::access::Subject;
use crate::access::certificate;
use crate::config::HostConfig;

/// What is spoken within it.
pub(super) const HTTP: &[u8] = b"h2";

/// What a host is spoken to with. None: nothing can be spoken with these keys.
pub(super) fn client(host: &HostConfig, own: Arc<CertifiedKey>) -> Option<Arc<ClientConfig>> {
    let provider = Arc::new(ring::default_provider());
    let pinned = Pinned {
        pin: host.pin.subject().clone(),
        names: [host.name.to_string(), host.address.ip().to_string()],
        algorithms: provider.signature_verification_algorithms,
    };
    let config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&version::TLS13])
        .ok()?;
    let shown = SingleCertAndKey::from(own);
    let mut config = config
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(pinned))
        .with_client_cert_resolver(Arc::new(shown));
    config.alpn_protocols = vec![HTTP.to_vec()];
    // A session that is resumed shows no certificate.
    config.resumption = rustls::client::Resumption::disabled();
    Some(Arc::new(config))
}

/// The name that a host is asked for by.
pub(super) fn server_name(host: &HostConfig) -> Option<ServerName<'static>> {
    ServerName::try_from(host.name.to_string()).ok()
}

#[derive(Debug)]
struct Pinned {
    pin: Subject,
    /// The host's name; its IP address.
    names: [String; 2],
    algorithms: WebPkiSupportedAlgorithms,
}

impl Pinned {
    fn is_for(&self, certificate: &EndEntityCert<'_>) -> bool {
        self.names.iter().any(|name| {
            let name = ServerName::try_from(name.as_str());
            name.is_ok_and(|name| certificate.verify_is_valid_for_subject_name(&name).is_ok())
        })
    }
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        own: &CertificateDer<'_>,
        _between: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let certificate =
            EndEntityCert::try_from(own).map_err(|_| CertificateError::BadEncoding)?;
        if certificate::pin(&certificate) != self.pin {
            return Err(CertificateError::ApplicationVerificationFailure.into());
        }
        let (_, parsed) =
            X509Certificate::from_der(own).map_err(|_| CertificateError::BadEncoding)?;
        let now = i64::try_from(now.as_secs()).unwrap_or(i64::MAX);
        let time = parsed.validity();
        if now < time.not_before.timestamp() {
            return Err(CertificateError::NotValidYet.into());
        }
        if now > time.not_after.timestamp() {
            return Err(CertificateError::Expired.into());
        }
        match self.is_for(&certificate) {
            true => Ok(ServerCertVerified::assertion()),
            false => Err(CertificateError::NotValidForName.into()),
        }
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _own: &CertificateDer<'_>,
        _signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::General("TLS 1.2 is not spoken between hosts".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        own: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, own, signed, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// What a failed handshake means to whoever is to mend it.
pub(super) fn explained(e: &std::io::Error) -> String {
    let inner = e.get_ref().and_then(|e| e.downcast_ref::<Error>());
    match inner {
        Some(Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure)) => {
            "its key is another than the `pin` of its [[host]] says".into()
        }
        Some(Error::InvalidCertificate(CertificateError::NotValidForName)) => {
            "its certificate is for another name than that of its [[host]], and for another address"
                .into()
        }
        Some(Error::InvalidCertificate(CertificateError::Expired)) => {
            "its certificate has expired".into()
        }
        Some(Error::InvalidCertificate(CertificateError::NotValidYet)) => {
            "the time of its certificate has not begun".into()
        }
        _ => e.to_string(),
    }
}
