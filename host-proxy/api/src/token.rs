//! Tokens: secrets that callers show to the proxy. The host knows their SHA-256 only: they have 256 random bits, so that a plain
//! digest keeps them.

use adit_tasks::hex;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use sha2::{Digest, Sha256};

/// What every token begins with, so that it is recognised where it should not be.
pub const PREFIX: &str = "adit_";

/// A new token, and its SHA-256 as the configuration has it.
///
/// # Errors
/// There are no random numbers.
pub fn new() -> Result<(String, String), getrandom::Error> {
    let mut secret = [0; 32];
    getrandom::fill(&mut secret)?;
    let secret = format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode(secret));
    let sha256 = hex(&sha256(secret.as_bytes()));
    Ok((secret, sha256))
}

/// The digest that stands for a token.
pub fn sha256(token: &[u8]) -> [u8; 32] {
    Sha256::digest(token).into()
}
