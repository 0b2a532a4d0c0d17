//! Whoever vouches for hosts and clients in these tests, and what it signs, as files that everybody may read.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use adit_api::token;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};

/// An authority.
pub struct Keys {
    dir: tempfile::TempDir,
    issuer: Issuer<'static, KeyPair>,
}

/// Paths of a certificate and its key, and the key's digest.
#[derive(Clone)]
pub struct Pair {
    pub cert: String,
    pub key: String,
    /// As a pin has it, without `sha256/`.
    pub digest: String,
}

impl Keys {
    pub fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params
            .distinguished_name
            .push(DnType::CommonName, "an authority");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let pem = params.self_signed(&key).unwrap().pem();
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        fs::write(dir.path().join("ca.crt"), pem).unwrap();
        Self {
            dir,
            issuer: Issuer::new(params, key),
        }
    }

    fn path(&self, file: &str) -> String {
        self.dir.path().join(file).display().to_string()
    }

    /// Path of the authority's certificate.
    pub fn ca(&self) -> String {
        self.path("ca.crt")
    }

    /// Makes a certificate for these names and addresses; the first is the name of the files.
    pub fn signs(&self, names: &[&str]) -> Pair {
        let key = KeyPair::generate().unwrap();
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let file = |kind: &str, text: String| {
            let path = self.path(&format!("{}.{kind}", names[0]));
            fs::write(&path, text).unwrap();
            path
        };
        let params = CertificateParams::new(names.clone()).unwrap();
        let cert = params.signed_by(&key, &self.issuer).unwrap().pem();
        let digest = token::sha256(&rcgen::PublicKeyData::subject_public_key_info(&key));
        Pair {
            cert: file("crt", cert),
            key: file("key", key.serialize_pem()),
            digest: STANDARD.encode(digest),
        }
    }
}
