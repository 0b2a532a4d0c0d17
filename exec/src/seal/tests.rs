use super::*;

const OWN: [u8; 32] = [7; 32];

fn public(own: &[u8; 32]) -> [u8; 32] {
    use curve25519_dalek::MontgomeryPoint;
    MontgomeryPoint::mul_base_clamped(*own).to_bytes()
}

/// Both ends of a stream.
fn pair() -> (Sealed, Sealed) {
    let (asking, first) = Asking::new(&public(&OWN)).unwrap();
    let (second, guest, channel) = answer(&OWN, &first).unwrap();
    let (client, same) = asking.finish(&second).unwrap();
    assert_eq!(channel, same);
    (Sealed::new(client), Sealed::new(guest))
}

fn sealed(by: &mut Sealed, bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    by.seal(bytes, &mut out).unwrap();
    out
}

fn opened(by: &mut Sealed, bytes: &[u8]) -> Result<Vec<u8>, SealError> {
    let mut out = Vec::new();
    by.push(bytes);
    by.open(&mut out).map(|()| out)
}

#[test]
fn bytes_come_through_in_both_directions_in_whatever_pieces() {
    let (mut client, mut guest) = pair();
    let long: Vec<u8> = (0..3 * RECORD_MAX + 5).map(|n| n as u8).collect();
    for bytes in [&b"x"[..], &long, b""] {
        let records = sealed(&mut client, bytes);
        let mut got = Vec::new();
        for piece in records.chunks(1000) {
            got.extend(opened(&mut guest, piece).unwrap());
        }
        assert!(got == bytes);
        let records = sealed(&mut guest, bytes);
        assert!(opened(&mut client, &records).unwrap() == bytes);
    }
    assert_eq!(guest.finish(), Err(SealError::Cut));
    let mut end = Vec::new();
    client.seal_end(&mut end).unwrap();
    assert_eq!(opened(&mut guest, &end), Ok(vec![]));
    assert!(guest.has_ended());
    assert_eq!(guest.finish(), Ok(()));
    assert_eq!(opened(&mut guest, b"x"), Err(SealError::AfterEnd));
}

#[test]
fn a_record_has_golden_bytes() {
    let keys = Keys {
        send: [1; 32],
        receive: [2; 32],
        sent: 0,
        received: 0,
    };
    let mut by = Sealed::new(keys);
    let out = sealed(&mut by, b"hi");
    assert_eq!(out.len(), 2 + 1 + 2 + 16);
    // As a transport message of Noise: nonce 0, no associated data.
    let aead = ChaCha20Poly1305::new(&[1; 32].into());
    let plain = chacha20poly1305::aead::Aead::decrypt(&aead, &nonce(0), &out[2..]).unwrap();
    assert_eq!(plain, b"\0hi");
    assert_eq!(out[..2], [19, 0]);
}

#[test]
fn a_record_that_is_changed_left_out_put_in_or_said_twice_ends_the_stream() {
    let records = |client: &mut Sealed| -> Vec<Vec<u8>> {
        [&b"one"[..], b"two", b"three"]
            .map(|text| sealed(client, text))
            .to_vec()
    };
    let of = |order: &[usize]| {
        let (mut client, mut guest) = pair();
        let all = records(&mut client);
        let mut got = Vec::new();
        for nth in order {
            match opened(&mut guest, &all[*nth]) {
                Ok(bytes) => got.push(bytes),
                Err(e) => {
                    // For good, also for what would have been right.
                    assert_eq!(opened(&mut guest, &all[got.len()]), Err(e));
                    return (got.len(), Some(e));
                }
            }
        }
        (got.len(), None)
    };
    assert_eq!(of(&[0, 1, 2]), (3, None));
    for (order, before) in [
        (&[1][..], 0),
        (&[0, 2], 1),
        (&[0, 0], 1),
        (&[1, 0], 0),
        (&[0, 1, 1], 2),
    ] {
        assert_eq!(of(order), (before, Some(SealError::Forged)), "{order:?}");
    }
    // Each bit of a record.
    for bit in 16..8 * (2 + 1 + 3 + 16) {
        let (mut client, mut guest) = pair();
        let mut record = sealed(&mut client, b"one");
        record[bit / 8] ^= 1 << (bit % 8);
        assert_eq!(opened(&mut guest, &record), Err(SealError::Forged), "{bit}");
    }
    // What one side has said is nothing to that side, and nothing to another stream.
    let (mut client, _) = pair();
    let (_, mut other) = pair();
    let record = sealed(&mut client, b"one");
    assert_eq!(opened(&mut client, &record), Err(SealError::Forged));
    assert_eq!(opened(&mut other, &record), Err(SealError::Forged));
}

#[test]
fn lengths_that_no_record_has_end_the_stream_before_anything_is_kept() {
    for len in [0_u16, 1, 16, u16::MAX, (RECORD_MAX + 18) as u16] {
        let (_, mut guest) = pair();
        let got = opened(&mut guest, &len.to_le_bytes());
        assert_eq!(got, Err(SealError::Length(len.into())));
    }
}

#[test]
fn a_handshake_is_good_for_the_key_that_was_meant_alone() {
    let (_, first) = Asking::new(&public(&OWN)).unwrap();
    assert_eq!(answer(&[8; 32], &first).unwrap_err(), SealError::Handshake);
    // One in the middle, with a key of its own.
    let (asking, _) = Asking::new(&public(&OWN)).unwrap();
    let (_, theirs) = Asking::new(&public(&[8; 32])).unwrap();
    let (second, ..) = answer(&[8; 32], &theirs).unwrap();
    assert_eq!(asking.finish(&second).unwrap_err(), SealError::Handshake);
    for bad in [&b""[..], &[0; 48], &[9; 47], &[9; 49], &[9; 200]] {
        assert!(answer(&OWN, bad).is_err());
    }
    // Said again, it makes another stream.
    let (_, first) = Asking::new(&public(&OWN)).unwrap();
    let (one, two) = (answer(&OWN, &first).unwrap(), answer(&OWN, &first).unwrap());
    assert_ne!(one.2, two.2);
}

#[test]
fn a_stream_goes_on_with_somebody_else_where_it_was() {
    let (mut client, mut guest) = pair();
    let record = sealed(&mut client, b"one");
    assert_eq!(opened(&mut guest, &record).unwrap(), b"one");
    let keys = guest.into_keys().unwrap();
    let bytes = postcard::to_stdvec(&keys).unwrap();
    let mut guest = Sealed::new(postcard::from_bytes(&bytes).unwrap());
    assert_eq!(opened(&mut guest, &record), Err(SealError::Forged));
    let mut guest = Sealed::new(keys);
    let record = sealed(&mut client, b"two");
    assert_eq!(opened(&mut guest, &record).unwrap(), b"two");
}

/// GHSA-g9mp-8g3h-3c5c (flynn/noise), snow#150: the last number is never used, and none comes again.
#[test]
fn noise_the_numbers_of_records_do_not_begin_anew() {
    let keys = |sent, received| Keys {
        send: [1; 32],
        receive: [1; 32],
        sent,
        received,
    };
    let mut by = Sealed::new(keys(u64::MAX - 1, u64::MAX - 1));
    let last = sealed(&mut by, b"x");
    assert_eq!(opened(&mut by, &last).unwrap(), b"x");
    assert_eq!(by.seal(b"x", &mut Vec::new()), Err(SealError::Numbers));
    assert_eq!(opened(&mut by, &last), Err(SealError::Numbers));
}

/// RUSTSEC-2024-0011 (snow): a record that cannot be opened takes no number from one that can. Here it ends the stream, and what was
/// opened before it counts.
#[test]
fn snow_a_forged_record_takes_no_number() {
    let (mut client, mut guest) = pair();
    let one = sealed(&mut client, b"one");
    let mut both = one.clone();
    both.extend([17, 0]);
    both.extend([0; 17]);
    let mut out = Vec::new();
    guest.push(&both);
    assert_eq!(guest.open(&mut out), Err(SealError::Forged));
    assert_eq!((out.as_slice(), guest.keys.received), (&b"one"[..], 1));
}
