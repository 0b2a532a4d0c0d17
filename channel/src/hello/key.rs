//! A key between a host and an agent, where others can dial the guest, too: any process that may open the VMM's socket. With it the
//! host's hellos carry a MAC, and the agent refuses those that do not.
//!
//! ```text
//! MAC = HMAC-SHA256(key, "adit hello mac 1" ‖ service ‖ 0 ‖ serial, features, epoch, boot nonce, lane, deadline
//!                        ‖ for arguments, caller, trace: length u16 ‖ value)          all numbers little-endian
//! ```
//! The serial number is another one in each hello, and the agent serves each once: a hello that was seen is of no use to whoever
//! has seen it.
//!
//! It covers what this version knows of an `open`, whatever else a hello says, so a hello with extensions that the agent does not know
//! has the same MAC. It keeps out whoever does not have the key. It does not keep out whoever can read the streams of others: that is
//! the VMM and root, and no MAC would.
//!
//! The agent gets a new key on every stream that it has dialled, and forgets it when that stream ends.

use hmac::{Hmac, Mac};
use sha2::Sha256;

use super::{Mac as HelloMac, Open};

/// Bytes of a key.
pub const KEY_LEN: usize = 32;

/// A key with zeroes behind it is the same key (RFC 2104).
const BLOCK_LEN: usize = 64;
const WHAT: &[u8] = b"adit hello mac 1";

/// A key. It is never shown.
#[derive(Clone, PartialEq, Eq)]
pub struct HostKey([u8; KEY_LEN]);

impl std::fmt::Debug for HostKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("HostKey")
    }
}

impl HostKey {
    /// A key of random bytes.
    pub fn new(bytes: [u8; KEY_LEN]) -> Self {
        Self(bytes)
    }

    /// For the other end.
    pub fn as_bytes(&self) -> &[u8; KEY_LEN] {
        &self.0
    }

    /// The MAC of a hello, with a number that no other hello with this key has.
    pub fn mac(&self, open: &Open, serial: u64) -> HelloMac {
        let mac = hmac(&self.0, &covered(open, serial));
        HelloMac {
            serial,
            bytes: mac.finalize().into_bytes().into(),
        }
    }

    /// Whether a hello has the MAC of this key. It takes as long for a wrong one.
    pub fn made(&self, open: &Open) -> bool {
        open.mac.is_some_and(|mac| {
            let own = hmac(&self.0, &covered(open, mac.serial));
            own.verify_slice(&mac.bytes).is_ok()
        })
    }
}

/// What the MAC covers.
fn covered(open: &Open, serial: u64) -> Vec<u8> {
    let mut all = WHAT.to_vec();
    all.extend(open.service.as_str().as_bytes());
    all.push(0);
    all.extend(serial.to_le_bytes());
    all.extend(open.common.features.to_le_bytes());
    all.extend(open.common.epoch.to_le_bytes());
    all.extend(open.common.boot_nonce);
    all.push(open.lane);
    all.extend(open.deadline_ms.to_le_bytes());
    let extensions = &open.extensions;
    for value in [
        extensions.arguments.as_bytes(),
        extensions.caller.as_bytes(),
        extensions.trace.as_bytes(),
    ] {
        // Their limits are far below 64 KiB.
        all.extend((value.len() as u16).to_le_bytes());
        all.extend(value);
    }
    all
}

/// HMAC-SHA256 with a key that is no longer than a block.
fn hmac(key: &[u8], text: &[u8]) -> Hmac<Sha256> {
    let mut block = [0; BLOCK_LEN];
    block[..key.len()].copy_from_slice(key);
    Hmac::new((&block).into()).chain_update(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hello::{Common, Hello, MAC_LEN, PREFIX_LEN, Prefix};

    fn hex(text: &str) -> Vec<u8> {
        let digits = text.as_bytes().chunks(2);
        digits
            .map(|two| u8::from_str_radix(std::str::from_utf8(two).unwrap(), 16).unwrap())
            .collect()
    }

    #[test]
    fn the_mac_is_hmac_sha256() {
        // RFC 4231, cases 1 to 3.
        for (key, text, mac) in [
            (
                vec![0x0b; 20],
                b"Hi There".to_vec(),
                "b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7",
            ),
            (
                b"Jefe".to_vec(),
                b"what do ya want for nothing?".to_vec(),
                "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843",
            ),
            (
                vec![0xaa; 20],
                vec![0xdd; 50],
                "773ea91e36800e46854db8ebd09181a72959098b3ef8c122d9635514ced565fe",
            ),
        ] {
            assert_eq!(hmac(&key, &text).finalize().into_bytes().to_vec(), hex(mac));
        }
    }

    fn open() -> Open {
        let common = Common {
            epoch: 7,
            ..Common::default()
        };
        Open::new("tcp:80".parse().unwrap(), common)
    }

    fn sent(open: &Open) -> Open {
        let bytes = Hello::Open(open.clone()).encode();
        let (head, tail) = bytes.split_first_chunk::<PREFIX_LEN>().unwrap();
        match Prefix::parse(head).unwrap().finish(tail) {
            Ok(Hello::Open(open)) => open,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn only_the_key_makes_the_mac_and_it_survives_the_wire() {
        let key = HostKey::new([1; KEY_LEN]);
        let mut with = open();
        with.mac = Some(key.mac(&with, 5));
        let with = sent(&with);
        assert!(key.made(&with));
        assert!(!HostKey::new([2; KEY_LEN]).made(&with));
        assert!(!key.made(&open()), "a hello without a MAC");
        let zero = Open {
            mac: Some(HelloMac {
                serial: 0,
                bytes: [0; MAC_LEN],
            }),
            ..open()
        };
        assert!(!key.made(&zero));
        assert!(!format!("{key:?}").contains('1'));
    }

    #[test]
    fn everything_that_the_agent_acts_on_is_covered() {
        let key = HostKey::new([1; KEY_LEN]);
        let mut with = open();
        with.mac = Some(key.mac(&with, 5));
        let changes: [fn(&mut Open); 9] = [
            |o| o.mac.iter_mut().for_each(|mac| mac.serial += 1),
            |o| o.service = "tcp:81".parse().unwrap(),
            |o| o.common.features = 1,
            |o| o.common.epoch = 8,
            |o| o.common.boot_nonce = [1; 16],
            |o| o.deadline_ms = 1,
            |o| o.extensions.arguments = b"x".to_vec().try_into().unwrap(),
            |o| o.extensions.caller = b"x".to_vec().try_into().unwrap(),
            |o| o.extensions.trace = b"x".to_vec().try_into().unwrap(),
        ];
        for change in changes {
            let mut changed = with.clone();
            change(&mut changed);
            assert!(!key.made(&changed), "{changed:?}");
        }
    }
}
