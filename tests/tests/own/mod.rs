//! Certificates that sign themselves.

use std::fs;
use std::path::{Path, PathBuf};

use adit_api::token::sha256;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use rcgen::{CertificateParams, KeyPair};

/// A certificate in files, and the pin of its key.
pub struct Own {
    pub cert: PathBuf,
    pub key: PathBuf,
    pub pin: String,
}

/// One that signs itself.
pub fn own(dir: &Path, name: &str) -> Own {
    let key = KeyPair::generate().unwrap();
    let params = CertificateParams::new(vec![name.to_owned()]).unwrap();
    let cert = params.self_signed(&key).unwrap().pem();
    let digest = sha256(&rcgen::PublicKeyData::subject_public_key_info(&key));
    let file = |end: &str, text: &str| {
        let path = dir.join(format!("{name}.{end}"));
        fs::write(&path, text).unwrap();
        path
    };
    Own {
        cert: file("crt", &cert),
        key: file("key", &key.serialize_pem()),
        pin: format!("sha256/{}", STANDARD.encode(digest)),
    }
}

/// A `[[listen]]` that shows it.
pub fn listen(own: &Own, more: &str) -> String {
    format!(
        "[[listen]]\naddress = \"127.0.0.1:0\"\ncert = \"{}\"\nkey = \"{}\"\n{more}",
        own.cert.display(),
        own.key.display()
    )
}
