use std::net::IpAddr;

use hickory_proto::op::{Edns, Message, MessageType, Query, ResponseCode};
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};
use proptest::prelude::*;

use super::*;

const OWN: &str = "192.0.2.1";

fn zone() -> Zone {
    Zone::new(&Suffix::default(), vec![OWN.parse().unwrap()])
}

fn at(addresses: &[&str]) -> Found {
    let addresses = addresses.iter().map(|ip| ip.parse::<IpAddr>().unwrap());
    Found::At(addresses.collect())
}

fn ask(name: &str, of: RecordType) -> Message {
    let mut message = Message::query();
    message.metadata.recursion_desired = true;
    // Also what a name as people write it cannot have.
    let name = Name::from_labels(name.split('.').map(str::as_bytes)).unwrap();
    message.add_query(Query::query(name, of));
    message
}

fn asked(message: &Message) -> Box<Question> {
    match zone().read(&message.to_vec().unwrap(), Over::Udp) {
        Read::Question(question) => question,
        other => panic!("{message}: {other:?}"),
    }
}

/// The answer, read again, and what it comes to.
fn answer(message: &Message, found: &Found) -> (Message, Kind) {
    let reply = asked(message).answer(found);
    (Message::from_vec(&reply.bytes).unwrap(), reply.kind)
}

fn named(name: &str) -> Named {
    asked(&ask(name, RecordType::A)).name().clone()
}

fn refused(bytes: &[u8]) -> (ResponseCode, Kind, Vec<u8>) {
    match zone().read(bytes, Over::Udp) {
        Read::Reply(reply) => {
            let code = match reply.bytes.len() {
                HEADER => {
                    let header = Header::read(&mut BinDecoder::new(&reply.bytes)).unwrap();
                    assert_eq!(header.message_type, MessageType::Response);
                    header.response_code
                }
                _ => Message::from_vec(&reply.bytes).unwrap().response_code,
            };
            (code, reply.kind, reply.bytes)
        }
        other => panic!("{other:?}"),
    }
}

fn is_soa(record: &Record) -> bool {
    matches!(&record.data, RData::SOA(soa) if soa.minimum == TTL_S && record.ttl == TTL_S)
}

#[test]
fn a_name_that_is_there_has_its_addresses_and_no_other_type() {
    let both = at(&[OWN, "2001:db8::1"]);
    for (of, data) in [
        (RecordType::A, RData::A(OWN.parse().unwrap())),
        (
            RecordType::AAAA,
            RData::AAAA("2001:db8::1".parse().unwrap()),
        ),
    ] {
        let (answer, kind) = answer(&ask("web-1.adit", of), &both);
        assert_eq!(kind, Kind::Found);
        assert!(answer.authoritative && answer.recursion_desired && !answer.recursion_available);
        let [record] = &answer.answers[..] else {
            panic!("{answer}")
        };
        assert_eq!((record.ttl, &record.data), (TTL_S, &data));
        assert!(answer.authorities.is_empty());
    }
    // Nothing of another type: the name is there, or clients would give up on its address.
    let v4 = at(&["::ffff:192.0.2.7"]);
    for of in [
        RecordType::AAAA,
        RecordType::MX,
        RecordType::TXT,
        RecordType::HTTPS,
        RecordType::DS,
        RecordType::SOA,
        RecordType::NS,
        RecordType::Unknown(65_280),
    ] {
        let (answer, kind) = answer(&ask("web-1.adit", of), &v4);
        assert_eq!(
            (kind, answer.response_code),
            (Kind::NoData, ResponseCode::NoError)
        );
        assert!(answer.answers.is_empty(), "{answer}");
        assert!(answer.authorities.iter().all(is_soa) && answer.authorities.len() == 1);
    }
    let (answer, _) = answer(&ask("web-1.adit", RecordType::A), &v4);
    assert_eq!(
        answer.answers[0].data,
        RData::A("192.0.2.7".parse().unwrap())
    );
}

#[test]
fn what_is_not_there_is_cached_no_longer_than_what_is() {
    let (answer_, kind) = answer(&ask("nobody.adit", RecordType::A), &Found::Nowhere);
    assert_eq!(
        (kind, answer_.response_code),
        (Kind::NoName, ResponseCode::NXDomain)
    );
    assert!(answer_.authoritative && answer_.answers.is_empty());
    let [soa] = &answer_.authorities[..] else {
        panic!("{answer_}")
    };
    assert!(is_soa(soa) && soa.name == Name::from_ascii("adit.").unwrap());
    // What cannot be found out is no answer to keep.
    let (answer_, kind) = answer(&ask("web-9.adit", RecordType::A), &Found::Unknown);
    assert_eq!(
        (kind, answer_.response_code),
        (Kind::Failed, ResponseCode::ServFail)
    );
    assert!(!answer_.authoritative && answer_.authorities.is_empty());
}

#[test]
fn the_zone_has_a_beginning_and_a_server() {
    for (of, is) in [
        (RecordType::SOA, "adit."),
        (RecordType::NS, "adit."),
        (RecordType::A, OWN),
    ] {
        let question = ask("adit", of);
        assert_eq!(asked(&question).name(), &Named::Apex);
        let (answer, kind) = answer(&question, &at(&[OWN]));
        assert_eq!(kind, Kind::Found);
        let data = answer.answers[0].data.to_string();
        assert!(data.starts_with(is), "{data}");
    }
}

#[test]
fn any_is_one_small_record() {
    let both = at(&[OWN, "2001:db8::1"]);
    for name in ["adit", "web-1.adit"] {
        let (answer, _) = answer(&ask(name, RecordType::ANY), &both);
        assert_eq!(answer.answers.len(), 1);
        assert_eq!(answer.answers[0].record_type(), RecordType::HINFO);
    }
    let (_, kind) = answer(&ask("nobody.adit", RecordType::ANY), &Found::Nowhere);
    assert_eq!(kind, Kind::NoName);
}

#[test]
fn a_question_comes_back_in_its_own_letters() {
    let question = ask("wEb-1.BeTA.aDIt", RecordType::A);
    let sent = question.to_vec().unwrap();
    let reply = asked(&question).answer(&at(&[OWN]));
    // Header, name, type and class; then a pointer to the name.
    assert_eq!(reply.bytes[HEADER..sent.len()], sent[HEADER..]);
    assert_eq!(reply.bytes[sent.len()..][..2], [0xc0, HEADER as u8]);
    let Named::Vm(to) = named("wEb-1.BeTA.aDIt") else {
        panic!()
    };
    assert_eq!(to.name(), "web-1.beta");
}

#[test]
fn r62_a_name_means_what_it_means_to_every_other_client_and_nothing_is_folded_into_one() {
    let vm = |name: &str| match named(name) {
        Named::Vm(to) => Some(to.name()),
        Named::Above(to) => Some(format!("above {}", to.name())),
        Named::Nothing => None,
        other => Some(format!("{other:?}")),
    };
    for (name, is) in [
        ("web-1.adit", Some("web-1")),
        ("web-1.beta.adit", Some("web-1.beta")),
        ("vsock-5000.web-1.adit", Some("web-1")),
        ("docker.web-1.svc.adit", Some("web-1")),
        ("docker.web-1.beta.svc.adit", Some("web-1.beta")),
        // What has names below it is there, or a cache that knows RFC 8020 would not ask for those.
        ("svc.adit", Some("Empty")),
        ("web-1.svc.adit", Some("above web-1")),
        ("web-1.adit.adit", None),
        ("a.b.c.adit", None),
        ("_http._tcp.adit", None),
        ("*.adit", None),
        ("a.*.adit", None),
        ("-a.adit", None),
        ("vsock-0.a.adit", None),
        ("web_1.adit", None),
    ] {
        assert_eq!(vm(name).as_deref(), is, "{name}");
    }
    // A dot, a zero, and what is no ASCII, in a label.
    for label in [
        &b"web-1.beta"[..],
        b"web-1\0",
        "\u{212a}".as_bytes(),
        b"web-1 ",
    ] {
        let name = Name::from_labels([label, b"adit"]).unwrap();
        let mut message = Message::query();
        message.add_query(Query::query(name, RecordType::A));
        assert_eq!(asked(&message).name(), &Named::Nothing);
    }
    // Another suffix, of two labels.
    let zone = Zone::new(&".vm.example".parse().unwrap(), vec![]);
    for (name, is_in) in [
        ("web-1.vm.example", true),
        ("web-1.example", false),
        ("web-1.xvm.example", false),
        ("web-1.adit", false),
        ("vm.example", true),
    ] {
        let bytes = ask(name, RecordType::A).to_vec().unwrap();
        let read = zone.read(&bytes, Over::Udp);
        assert_eq!(matches!(read, Read::Question(_)), is_in, "{name}");
    }
}

#[test]
fn what_is_not_this_servers_is_refused() {
    let of = |message: &Message| refused(&message.to_vec().unwrap());
    let mut chaos = ask("version.bind", RecordType::TXT);
    chaos.queries[0].query_class = DNSClass::CH;
    let mut chaos_of_ours = ask("web-1.adit", RecordType::A);
    chaos_of_ours.queries[0].query_class = DNSClass::CH;
    for message in [
        ask("example.com", RecordType::A),
        ask("web-1", RecordType::A),
        ask("web-1.adit.example", RecordType::A),
        ask("xadit", RecordType::A),
        ask("1.2.0.192.in-addr.arpa", RecordType::PTR),
        ask("adit", RecordType::AXFR),
        ask("adit", RecordType::IXFR),
        chaos,
        chaos_of_ours,
    ] {
        let (code, kind, _) = of(&message);
        assert_eq!(
            (code, kind),
            (ResponseCode::Refused, Kind::Refused),
            "{message}"
        );
    }
    let mut root = Message::query();
    root.add_query(Query::query(Name::root(), RecordType::NS));
    assert_eq!(of(&root).0, ResponseCode::Refused);
}

#[test]
fn what_is_not_understood_is_said_in_a_header_alone() {
    let whole = ask("web-1.adit", RecordType::A).to_vec().unwrap();
    let with = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = whole.clone();
        change(&mut bytes);
        bytes
    };
    // Of the questions that the header has, that they are there is not believed.
    for (bytes, what) in [
        (with(&|b| b[5] = 0), "no question"),
        (with(&|b| b[4..6].fill(255)), "65535 questions"),
        (with(&|b| b[7] = 1), "an answer that is not there"),
        (with(&|b| b[10..12].fill(255)), "65535 more"),
        (with(&|b| b.truncate(20)), "the name is cut"),
        (
            with(&|b| b[HEADER..][..2].copy_from_slice(&[0xc0, 12])),
            "a pointer to itself",
        ),
        (with(&|b| b[HEADER] = 0x40), "a label of another kind"),
        (with(&|b| b.resize(MESSAGE_MAX + 1, 0)), "too long"),
    ] {
        let (code, kind, answer) = refused(&bytes);
        assert_eq!(
            (code, kind),
            (ResponseCode::FormErr, Kind::Malformed),
            "{what}"
        );
        assert_eq!(
            (answer.len(), &answer[..2]),
            (HEADER, &bytes[..2]),
            "{what}"
        );
    }
    // An opcode that is not known is said first, whatever follows.
    for opcode in [1, 2, 4, 5, 6, 15_u8] {
        for mut bytes in [whole.clone(), whole[..HEADER].to_vec(), with(&|b| b[5] = 0)] {
            bytes[2] = opcode << 3;
            let (code, kind, answer) = refused(&bytes);
            assert_eq!((code, kind), (ResponseCode::NotImp, Kind::NotImplemented));
            assert_eq!((answer.len(), answer[2]), (HEADER, 0x80 | opcode << 3));
        }
    }
}

#[test]
fn a_response_and_what_is_no_message_hear_nothing() {
    let mut response = ask("web-1.adit", RecordType::A).to_vec().unwrap();
    response[2] |= 0x80;
    let mut cut = response.clone();
    cut.truncate(HEADER);
    for bytes in [
        &response[..],
        &cut,
        &response[..HEADER - 1],
        b"",
        b"GET / HTTP/",
    ] {
        for over in [Over::Udp, Over::Tcp] {
            assert!(matches!(zone().read(bytes, over), Read::Silence));
        }
    }
    // What this server says is a response as well.
    let reply = asked(&ask("web-1.adit", RecordType::A)).answer(&Found::Nowhere);
    assert!(matches!(
        zone().read(&reply.bytes, Over::Udp),
        Read::Silence
    ));
}

fn with_edns(mut message: Message, max: u16, version: u8) -> Message {
    let mut edns = Edns::new();
    edns.set_max_payload(max).set_version(version);
    edns.set_dnssec_ok(true);
    message.set_edns(edns);
    message
}

#[test]
fn who_speaks_edns_is_answered_in_it_and_who_does_not_is_not() {
    let plain = ask("web-1.adit", RecordType::A);
    assert!(answer(&plain, &at(&[OWN])).0.edns.is_none());
    for found in [at(&[OWN]), Found::Nowhere, Found::Empty, Found::Unknown] {
        let (answer, _) = answer(&with_edns(plain.clone(), 4096, 0), &found);
        let edns = answer.edns.unwrap();
        assert_eq!(
            (edns.version(), edns.max_payload()),
            (0, MESSAGE_MAX as u16)
        );
        assert!(edns.flags().dnssec_ok);
    }
    let outside = with_edns(ask("example.com", RecordType::A), 4096, 0);
    let (_, _, bytes) = refused(&outside.to_vec().unwrap());
    assert!(Message::from_vec(&bytes).unwrap().edns.is_some());
    // Of a later version, only which one there is can be said.
    let later = with_edns(plain.clone(), 4096, 1).to_vec().unwrap();
    let (code, _, bytes) = refused(&later);
    // 16 has two names.
    assert_eq!(u16::from(code), u16::from(ResponseCode::BADVERS));
    assert_eq!(Message::from_vec(&bytes).unwrap().version(), 0);
    // Two of them are none (RFC 6891 §6.1.1).
    let mut twice = with_edns(plain, 4096, 0).to_vec().unwrap();
    let opt = twice[twice.len() - 11..].to_vec();
    twice.extend(opt);
    twice[11] = 2;
    assert_eq!(refused(&twice).0, ResponseCode::FormErr);
}

#[test]
fn an_answer_that_is_too_long_is_cut_to_its_question() {
    let message = with_edns(ask("web-1.adit", RecordType::A), 100, 0);
    let question = asked(&message);
    // None is so long; the rule is there for the next kind of record.
    assert_eq!(most(&question.request, Over::Udp), UDP_MIN);
    assert_eq!(most(&question.request, Over::Tcp), 65_535);
    let whole = question.answer(&at(&[OWN])).bytes;
    let cut = Reply::of(
        &Message::from_vec(&whole).unwrap(),
        whole.len() - 1,
        Kind::Found,
    );
    let cut = Message::from_vec(&cut.bytes).unwrap();
    assert!(cut.truncation && cut.answers.is_empty() && cut.queries == message.queries);
    assert!(cut.edns.is_some());
}

#[test]
fn who_is_told_to_come_over_tcp_is_told_so_in_no_more_bytes() {
    for message in [
        ask("web-1.adit", RecordType::A),
        with_edns(ask("web-1.adit", RecordType::AAAA), 1232, 0),
    ] {
        let reply = asked(&message).truncated();
        assert!(reply.bytes.len() <= message.to_vec().unwrap().len());
        let answer = Message::from_vec(&reply.bytes).unwrap();
        assert!(answer.truncation && answer.answers.is_empty() && answer.authorities.is_empty());
        assert_eq!((reply.kind, answer.id), (Kind::Truncated, message.id));
    }
}

fn founds() -> impl Strategy<Value = Found> {
    prop_oneof![
        Just(at(&[OWN, "2001:db8::1"])),
        Just(at(&["2001:db8::1"])),
        Just(Found::Empty),
        Just(Found::Nowhere),
        Just(Found::Unknown),
    ]
}

proptest! {
    #[test]
    fn an_answer_is_hardly_longer_than_its_question_whatever_is_asked(
        labels in proptest::collection::vec("[a-zA-Z0-9-]{1,63}", 0..4),
        of in any::<u16>(),
        edns in any::<bool>(),
        found in founds(),
    ) {
        let name = labels.join(".") + if labels.is_empty() { "adit" } else { ".aDiT" };
        prop_assume!(name.len() < 250);
        let mut message = ask(&name, RecordType::from(of));
        if edns {
            message = with_edns(message, 4096, 0);
        }
        let bytes = message.to_vec().unwrap();
        let (len, id) = match zone().read(&bytes, Over::Udp) {
            Read::Question(question) => {
                let reply = question.answer(&found);
                (reply.bytes.len(), Message::from_vec(&reply.bytes).unwrap().id)
            }
            Read::Reply(reply) => (reply.bytes.len(), u16::from_be_bytes([reply.bytes[0], reply.bytes[1]])),
            Read::Silence => return Err(TestCaseError::fail("silence")),
        };
        prop_assert!(len <= bytes.len() + MORE_MAX, "{} for {}", len, bytes.len());
        prop_assert_eq!(id, message.id);
    }
}
