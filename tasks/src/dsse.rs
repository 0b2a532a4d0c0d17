//! DSSE envelopes: exact bytes are signed, and none of them is parsed before the signature of a trusted key is verified.
//!
//! ```text
//! {"payload": BASE64(payload), "payloadType": "application/vnd.adit.goal.v1+json",
//!  "signatures": [{"keyid": HEX(16), "sig": BASE64(64)}]}
//! signed: "DSSEv1" SP len(type) SP type SP len(payload) SP payload
//! ```
//! The guest gets from an [`Envelope`] to a goal only through [`Verified`]. The host has no manager's key and plans from the
//! unverified payload: its plan decides what is queued, never what runs.
//!
//! Unknown and duplicate keys, other types, trailing bytes and non-canonical base64 are refused (R83, R87).

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use ed25519_dalek::{Signature, Signer, SigningKey};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::anchor::{Role, Roles, TrustStore};
use crate::key::{KeyId, PublicKey, key_id};
use crate::object::{self, Object};

/// The type of a goal's envelope.
pub const GOAL_TYPE: &str = "application/vnd.adit.goal.v1+json";
/// The type of a card's envelope.
pub const CARD_TYPE: &str = "application/vnd.adit.card.v1+json";
/// The type of a trust document's envelope.
pub const TRUST_TYPE: &str = "application/vnd.adit.trust.v1+json";
/// The type of an agent's package.
pub const AGENT_TYPE: &str = "application/vnd.adit.agent.v1+json";
/// The type of a ticket's envelope.
pub const TICKET_TYPE: &str = "application/vnd.adit.ticket.v1+json";
/// Most bytes of a goal's envelope.
pub const ENVELOPE_MAX: usize = 256 << 10;
/// Most bytes of a card's envelope: it has to fit into what a platform hands to its guest.
pub const CARD_MAX: usize = 1024;
/// Most bytes of a trust document's envelope.
pub const TRUST_MAX: usize = 16 << 10;
/// Most bytes of the envelope of an agent's package.
pub const AGENT_MAX: usize = 2048;
/// Most bytes of a ticket's envelope: it is one frame.
pub const TICKET_MAX: usize = 128 << 10;
/// Most signatures of an envelope.
pub const SIGNATURES_MAX: usize = 8;

/// What is signed. The signature covers it, so that no signed text is ever taken for one of another kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Type {
    /// What a guest is to do.
    Goal,
    /// Who a guest is.
    Card,
    /// Whom guests are to trust, and whom no longer.
    Trust,
    /// Which program a guest's agent is.
    Agent,
    /// What a guest is to do at once.
    Ticket,
}

impl Type {
    /// As the envelope says it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Goal => GOAL_TYPE,
            Self::Card => CARD_TYPE,
            Self::Trust => TRUST_TYPE,
            Self::Agent => AGENT_TYPE,
            Self::Ticket => TICKET_TYPE,
        }
    }

    /// The role that a key needs to sign it.
    pub fn role(self) -> Role {
        match self {
            Self::Goal => Role::Goal,
            Self::Card | Self::Trust => Role::Card,
            Self::Agent => Role::Agent,
            Self::Ticket => Role::Exec,
        }
    }

    /// Most bytes of its envelope.
    pub fn max(self) -> usize {
        match self {
            Self::Goal => ENVELOPE_MAX,
            Self::Card => CARD_MAX,
            Self::Trust => TRUST_MAX,
            Self::Agent => AGENT_MAX,
            Self::Ticket => TICKET_MAX,
        }
    }
}

/// Why bytes are no envelope: the fault of whoever sent them.
#[derive(Debug, thiserror::Error)]
pub enum EnvelopeError {
    /// More bytes than its type may have.
    #[error("envelope of {len} bytes, at most {max} are allowed")]
    TooLong {
        /// Bytes given.
        len: usize,
        /// Bytes allowed.
        max: usize,
    },
    /// Not the JSON that it should be; says line and column.
    #[error("envelope is malformed: {}", object::shown_plain(.0))]
    Json(#[source] serde_json::Error),
    /// Another type than the one that belongs here, or one that this build does not know.
    #[error("envelope has type `{found}`, and {wanted} belongs here")]
    Type {
        /// What it says.
        found: String,
        /// What it should be.
        wanted: &'static str,
    },
    /// A value is not (canonical) base64 or hex of the right length.
    #[error("envelope key `{field}` is not well encoded")]
    Encoding {
        /// Which.
        field: &'static str,
    },
    /// None, or more than [`SIGNATURES_MAX`].
    #[error("envelope has {count} signatures, 1 to {SIGNATURES_MAX} are allowed")]
    Signatures {
        /// How many.
        count: usize,
    },
}

/// Why an envelope is not trusted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum VerifyError {
    /// The guest trusts no key.
    #[error("no trust anchor is installed in this guest")]
    NoAnchor,
    /// None of the signers is trusted.
    #[error("signed by {found}, which is not trusted here")]
    UntrustedKey {
        /// The first signer.
        found: KeyId,
    },
    /// The signer was trusted, and its key was revoked since.
    #[error("signed by {key}, whose key was revoked here")]
    Revoked {
        /// The signer.
        key: KeyId,
    },
    /// The signer is trusted, and not for this.
    #[error(
        "signed by {key}, which is trusted here as `{has}` only, and not as `{needs}`: sign with a key of that role, or give \
         its anchor the role"
    )]
    WrongRole {
        /// The signer.
        key: KeyId,
        /// Its roles.
        has: Roles,
        /// The one that it needs.
        needs: Role,
    },
    /// A trusted key is named, and its signature is wrong.
    #[error(
        "the signature of key {key} is wrong: what it signs was changed after signing, or never signed"
    )]
    BadSignature {
        /// The key named.
        key: KeyId,
    },
}

#[derive(Serialize, Deserialize)]
#[serde(
    deny_unknown_fields,
    expecting = "an envelope: an object with the keys `payload`, `payloadType` and `signatures`"
)]
struct RawEnvelope {
    payload: String,
    #[serde(rename = "payloadType")]
    payload_type: String,
    #[serde(deserialize_with = "object::list")]
    signatures: Vec<RawSignature>,
}

#[derive(Serialize, Deserialize)]
#[serde(
    deny_unknown_fields,
    expecting = "a signature: an object with the keys `keyid` and `sig`"
)]
struct RawSignature {
    keyid: String,
    sig: String,
}

/// A well-formed envelope. Its payload is not verified yet.
#[derive(Clone, Debug)]
pub struct Envelope {
    of: Type,
    payload: Vec<u8>,
    signatures: Vec<(KeyId, Signature)>,
}

/// A payload that a trusted key has signed.
#[derive(Clone, Debug)]
pub struct Verified {
    of: Type,
    payload: Vec<u8>,
    key: KeyId,
    roles: Roles,
}

impl Envelope {
    /// Parses the envelope of a goal, and not its payload.
    ///
    /// # Errors
    /// It is too long, malformed, of another type, or has no signature.
    pub fn parse(bytes: &[u8]) -> Result<Self, EnvelopeError> {
        Self::parse_as(Type::Goal, bytes)
    }

    /// Parses an envelope of this type, and not its payload.
    ///
    /// # Errors
    /// It is too long, malformed, of another type, or has no signature.
    pub fn parse_as(of: Type, bytes: &[u8]) -> Result<Self, EnvelopeError> {
        let (len, max) = (bytes.len(), of.max());
        if len > max {
            return Err(EnvelopeError::TooLong { len, max });
        }
        let Object(raw): Object<RawEnvelope> =
            serde_json::from_slice(bytes).map_err(EnvelopeError::Json)?;
        if raw.payload_type != of.name() {
            let found = adit_names::escape(&raw.payload_type).at_most(64);
            let (found, wanted) = (found.to_string(), of.name());
            return Err(EnvelopeError::Type { found, wanted });
        }
        let count = raw.signatures.len();
        if count == 0 || count > SIGNATURES_MAX {
            return Err(EnvelopeError::Signatures { count });
        }
        let payload = BASE64
            .decode(&raw.payload)
            .map_err(|_| EnvelopeError::Encoding { field: "payload" })?;
        let signatures = raw
            .signatures
            .iter()
            .map(signature)
            .collect::<Result<_, _>>()?;
        Ok(Self {
            of,
            payload,
            signatures,
        })
    }

    /// The payload, not verified: to plan from on the host, never to act on.
    pub fn unverified_payload(&self) -> &[u8] {
        &self.payload
    }

    /// The first signer that the envelope names, not verified: to order a queue by, never to trust.
    pub fn unverified_signer(&self) -> Option<KeyId> {
        self.signatures.first().map(|(id, _)| *id)
    }

    /// sha256 of the payload.
    pub fn digest(&self) -> [u8; 32] {
        Sha256::digest(&self.payload).into()
    }

    /// Checks the signatures against the keys that are trusted for this, strictly (no malleable, no small-order signature).
    ///
    /// # Errors
    /// No such key has signed exactly this payload.
    pub fn verify(self, trust: &TrustStore) -> Result<Verified, VerifyError> {
        if trust.knows_nobody() {
            return Err(VerifyError::NoAnchor);
        }
        let (signed, needs) = (pae(self.of, &self.payload), self.of.role());
        let mut failed = None;
        for &(key, ref signature) in &self.signatures {
            if trust.is_revoked(&key) {
                failed = Some(VerifyError::Revoked { key });
                continue;
            }
            let Some(anchor) = trust.get(&key) else {
                continue;
            };
            let has = anchor.roles;
            if !has.has(needs) {
                failed = Some(VerifyError::WrongRole { key, has, needs });
                continue;
            }
            let verifying = anchor.key.verifying();
            if verifying.verify_strict(&signed, signature).is_ok() {
                return Ok(Verified {
                    of: self.of,
                    payload: self.payload,
                    key,
                    roles: has,
                });
            }
            failed = Some(VerifyError::BadSignature { key });
        }
        Err(match (failed, self.signatures.first()) {
            (Some(why), _) => why,
            (None, Some(&(found, _))) => VerifyError::UntrustedKey { found },
            (None, None) => VerifyError::NoAnchor,
        })
    }
}

impl Verified {
    /// The signed bytes.
    pub fn payload(&self) -> &[u8] {
        &self.payload
    }

    /// Of what type they are.
    pub fn of(&self) -> Type {
        self.of
    }

    /// Who signed them.
    pub fn key(&self) -> KeyId {
        self.key
    }

    /// All that the signer is trusted for.
    pub fn roles(&self) -> Roles {
        self.roles
    }

    /// sha256 of the payload.
    pub fn digest(&self) -> [u8; 32] {
        Sha256::digest(&self.payload).into()
    }
}

/// Signs a goal; returns the envelope's JSON text.
pub fn sign(payload: &[u8], key: &SigningKey) -> String {
    sign_as(Type::Goal, payload, key)
}

/// Signs a payload of this type; returns the envelope's JSON text.
pub fn sign_as(of: Type, payload: &[u8], key: &SigningKey) -> String {
    let raw = RawEnvelope {
        payload: BASE64.encode(payload),
        payload_type: of.name().into(),
        signatures: vec![RawSignature {
            keyid: PublicKey::of(key, "").id().to_string(),
            sig: BASE64.encode(key.sign(&pae(of, payload)).to_bytes()),
        }],
    };
    // Text and a list of texts always serialise.
    serde_json::to_string(&raw).unwrap_or_default()
}

fn signature(raw: &RawSignature) -> Result<(KeyId, Signature), EnvelopeError> {
    let keyid = EnvelopeError::Encoding { field: "keyid" };
    let sig = || EnvelopeError::Encoding { field: "sig" };
    let id = crate::unhex(&raw.keyid).ok_or(keyid)?;
    let bytes = BASE64.decode(&raw.sig).map_err(|_| sig())?;
    let bytes: [u8; 64] = bytes.try_into().map_err(|_| sig())?;
    Ok((KeyId(id), Signature::from_bytes(&bytes)))
}

/// Pre-authentication encoding: with the lengths, no bytes can move from the type to the payload or back.
fn pae(of: Type, payload: &[u8]) -> Vec<u8> {
    let name = of.name();
    let head = format!("DSSEv1 {} {name} {} ", name.len(), payload.len());
    [head.as_bytes(), payload].concat()
}

/// Id of the key that a private key belongs to.
pub fn id_of(key: &SigningKey) -> KeyId {
    key_id(&key.verifying_key())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key() -> SigningKey {
        SigningKey::from_bytes(&[7; 32])
    }

    fn trust() -> TrustStore {
        let mut t = TrustStore::default();
        t.add(PublicKey::of(&key(), "")).unwrap();
        t
    }

    #[test]
    fn signed_payload_comes_back_and_only_then() {
        let text = sign(b"{}", &key());
        let v = Envelope::parse(text.as_bytes()).unwrap().verify(&trust());
        assert_eq!(v.unwrap().payload(), b"{}");
        let stranger = sign(b"{}", &SigningKey::from_bytes(&[8; 32]));
        let e = Envelope::parse(stranger.as_bytes()).unwrap();
        assert!(matches!(
            e.clone().verify(&trust()),
            Err(VerifyError::UntrustedKey { .. })
        ));
        assert_eq!(
            e.verify(&TrustStore::default()).unwrap_err(),
            VerifyError::NoAnchor
        );
    }

    #[test]
    fn a_key_signs_only_what_it_has_the_role_for() {
        let anchor = |roles: &str| {
            let line = format!("roles={roles} {}", PublicKey::of(&key(), ""));
            let mut trust = TrustStore::default();
            trust.add_text(&line).unwrap();
            trust
        };
        for (of, roles, good) in [
            (Type::Goal, "goal", true),
            (Type::Goal, "card,exec,agent", false),
            (Type::Card, "card,goal", true),
            (Type::Card, "goal,exec,agent", false),
            (Type::Trust, "card", true),
            (Type::Trust, "goal,exec,agent", false),
            (Type::Ticket, "exec", true),
            (Type::Ticket, "card,goal,agent", false),
        ] {
            let text = sign_as(of, b"{}", &key());
            let envelope = Envelope::parse_as(of, text.as_bytes()).unwrap();
            let (trust, needs, key) = (anchor(roles), of.role(), id_of(&key()));
            match envelope.verify(&trust) {
                Ok(verified) => assert!(good && verified.of() == of),
                Err(e) => {
                    let has = roles.parse().unwrap();
                    assert_eq!(e, VerifyError::WrongRole { key, has, needs });
                    assert!(!good, "{roles}");
                }
            }
        }
    }

    #[test]
    fn r83_what_was_signed_as_one_type_is_nothing_as_another() {
        let card = sign_as(Type::Card, b"{}", &key());
        let e = Envelope::parse(card.as_bytes());
        assert!(matches!(e, Err(EnvelopeError::Type { .. })));
        let renamed = card.replace(CARD_TYPE, GOAL_TYPE);
        let e = Envelope::parse(renamed.as_bytes()).unwrap();
        let e = e.verify(&trust()).unwrap_err();
        assert!(matches!(e, VerifyError::BadSignature { .. }));
    }

    #[test]
    fn envelope_has_golden_bytes() {
        assert_eq!(
            pae(Type::Goal, b"hi"),
            b"DSSEv1 33 application/vnd.adit.goal.v1+json 2 hi"
        );
        assert_eq!(
            pae(Type::Card, b"hi"),
            b"DSSEv1 33 application/vnd.adit.card.v1+json 2 hi"
        );
        assert_eq!(
            pae(Type::Trust, b"hi"),
            b"DSSEv1 34 application/vnd.adit.trust.v1+json 2 hi"
        );
        assert!(sign(b"hi", &key()).starts_with(
            r#"{"payload":"aGk=","payloadType":"application/vnd.adit.goal.v1+json","signatures":[{"keyid":""#
        ));
    }

    #[test]
    fn r83_missing_or_mangled_signatures_are_refused_before_the_body_is_parsed() {
        let good = sign(b"not even json", &key());
        let v: serde_json::Value = serde_json::from_str(&good).unwrap();
        let with = |f: &dyn Fn(&mut serde_json::Value)| {
            let mut v = v.clone();
            f(&mut v);
            v.to_string()
        };
        let sig = v["signatures"][0]["sig"].as_str().unwrap().to_owned();
        let table = [
            with(&|v| drop(v.as_object_mut().unwrap().remove("signatures"))),
            with(&|v| v["signatures"] = serde_json::json!([])),
            with(&|v| v["signatures"] = serde_json::json!(null)),
            with(&|v| v["signatures"] = serde_json::json!("x")),
            with(&|v| v["signatures"][0]["sig"] = serde_json::json!("")),
            with(&|v| v["signatures"][0]["sig"] = serde_json::json!(null)),
            with(&|v| v["signatures"][0]["sig"] = serde_json::json!(7)),
            with(&|v| v["signatures"][0]["sig"] = serde_json::json!(sig[..40])),
            with(&|v| v["signatures"][0]["alg"] = serde_json::json!("none")),
            with(&|v| v["payloadType"] = serde_json::json!("application/json")),
            with(&|v| {
                let s = v["signatures"][0].clone();
                v["signatures"][0] = serde_json::json!([s["keyid"], s["sig"]]);
            }),
            with(&|v| *v = serde_json::json!([v["payload"], v["payloadType"], v["signatures"]])),
            good.clone() + " {}",
            good.replacen("{\"payload\"", "{\"payload\":\"\",\"payload\"", 1),
        ];
        for text in &table {
            assert!(Envelope::parse(text.as_bytes()).is_err(), "{text}");
        }
        let zeros = with(&|v| v["signatures"][0]["sig"] = BASE64.encode([0; 64]).into());
        let e = Envelope::parse(zeros.as_bytes()).unwrap().verify(&trust());
        assert!(matches!(e, Err(VerifyError::BadSignature { .. })));
    }

    #[test]
    fn r83_each_flipped_byte_is_refused() {
        let good = sign(b"{\"a\":1}", &key());
        for at in 0..good.len() {
            for bit in 0..8 {
                let mut bytes = good.clone().into_bytes();
                bytes[at] ^= 1 << bit;
                let accepted = Envelope::parse(&bytes).is_ok_and(|e| e.verify(&trust()).is_ok());
                assert!(!accepted, "byte {at} bit {bit}");
            }
        }
    }
}
