//! Changes one byte of a signed goal, as an attacker between manager and guest would.

use anyhow::{Context, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;

/// Changes the last digit of the goal's id. The result is a valid goal with another id: only the signature is wrong.
///
/// # Errors
/// The text is not the envelope of a goal.
pub fn tamper(envelope: &str) -> anyhow::Result<String> {
    let mut value: serde_json::Value = serde_json::from_str(envelope)?;
    let mut payload = BASE64.decode(value["payload"].as_str().context("no payload")?)?;
    let begin = br#"{"goal_id":""#;
    ensure!(
        payload.starts_with(begin),
        "the payload does not begin with its id"
    );
    let last = payload
        .get_mut(begin.len() + 35)
        .context("the payload is cut off")?;
    *last = if *last == b'0' { b'1' } else { b'0' };
    value["payload"] = BASE64.encode(payload).into();
    Ok(value.to_string())
}
