//! From a question to an answer. Pure: bytes in, bytes out; whether a name is there is asked of the caller in between.
//!
//! ```text
//!  bytes ─ read ─┬─ Silence            a response, or no message: nothing is ever said to that
//!                ├─ Reply(bytes)       refused, or not understood
//!                └─ Question ─ name ─► the caller finds it ─ answer(Found) ─► Reply(bytes)
//! ```
//! | asked | answer |
//! |---|---|
//! | A, AAAA of a VM | address of its host, or none of that kind with SOA |
//! | SOA, NS, A, AAAA of the zone's own name | they are there |
//! | ANY | HINFO alone (RFC 8482 §4.2) |
//! | another type of a name that is there | none, with SOA |
//! | a name that is not there | NXDOMAIN with SOA |
//! | a name outside the zone, another class, a zone transfer | REFUSED |
//! | another opcode | NOTIMP, whatever follows the header |
//! | no question or several, broken | FORMERR, as long as it has a header |
//!
//! An answer has the question as it came, in its own letters ("0x20"), and at most [`MORE_MAX`] bytes more. What is
//! not there is cached for [`TTL_S`] seconds, as what is there (RFC 2308).

use std::net::IpAddr;

use hickory_proto::op::{
    Edns, Header, Message, MessageType, Metadata, OpCode, Query, ResponseCode,
};
use hickory_proto::rr::rdata::{HINFO, NS, SOA};
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};
use hickory_proto::serialize::binary::{BinDecodable, BinDecoder};

use crate::reach::{Destination, Suffix};

/// Seconds that an answer may be cached.
pub const TTL_S: u32 = 5;
/// Most bytes of a question, and of an answer over UDP (DNS flag day 2020).
pub const MESSAGE_MAX: usize = 1232;
/// Most bytes that an answer has more than its question.
pub const MORE_MAX: usize = 64;
/// Bytes of a header (RFC 1035 §4.1.1).
pub const HEADER: usize = 12;
/// The version of EDNS that there is (RFC 6891).
const EDNS_VERSION: u8 = 0;
/// Bytes of an answer that everybody takes (RFC 1035 §4.2.1).
const UDP_MIN: usize = 512;
/// Of the zone; nobody copies it, so its number never changes.
const SERIAL: u32 = 1;
const REFRESH_S: i32 = 3600;
const RETRY_S: i32 = 600;
const EXPIRE_S: i32 = 86_400;
/// Mailbox of the zone, in the zone. It has none, and a name is needed.
const MAILBOX: &str = "hostmaster";
/// What has names of services below it, and no address.
const SVC: &str = "svc";
/// A port, where [`Destination`] wants one. Which one it is does not matter to a name.
const ANY_PORT: u16 = 1;

/// How a question came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Over {
    /// In a datagram.
    Udp,
    /// On a connection.
    Tcp,
}

/// The zone of a suffix, as one listener has it.
#[derive(Debug)]
pub struct Zone {
    suffix: Suffix,
    labels: Vec<Vec<u8>>,
    own: Vec<IpAddr>,
}

/// What becomes of bytes.
#[derive(Debug)]
pub enum Read {
    /// Nothing is said.
    Silence,
    /// This is said.
    Reply(Reply),
    /// It is to be found out what there is.
    Question(Box<Question>),
}

/// A question about a name in the zone.
#[derive(Debug)]
pub struct Question {
    request: Message,
    /// The only one in it.
    query: Query,
    over: Over,
    apex: Name,
    name: Named,
}

/// What a name in the zone names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Named {
    /// The zone itself.
    Apex,
    /// What has other names below it, and nothing else.
    Empty,
    /// Nothing that there could be.
    Nothing,
    /// A VM, what is in it, or a host.
    Vm(Destination),
    /// What has names below it if there is such a VM or host, and nothing else.
    Above(Destination),
}

/// What there is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// A name with these addresses.
    At(Vec<IpAddr>),
    /// A name without an address.
    Empty,
    /// None, or none that the client may see.
    Nowhere,
    /// It cannot be found out now.
    Unknown,
}

/// What is said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    /// The message.
    pub bytes: Vec<u8>,
    /// What it comes to.
    pub kind: Kind,
}

/// What an answer comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// What was asked for is there.
    Found,
    /// The name is there, and nothing of that type.
    NoData,
    /// No such name.
    NoName,
    /// It cannot be found out now.
    Failed,
    /// Not this server's to answer.
    Refused,
    /// Not understood.
    Malformed,
    /// Another opcode.
    NotImplemented,
    /// It is asked too often: over TCP there is an answer.
    Truncated,
    /// It is asked too often: nothing was said.
    Dropped,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 9] = [
        Self::Found,
        Self::NoData,
        Self::NoName,
        Self::Failed,
        Self::Refused,
        Self::Malformed,
        Self::NotImplemented,
        Self::Truncated,
        Self::Dropped,
    ];

    /// In a word, for programs.
    pub fn word(self) -> &'static str {
        match self {
            Self::Found => "found",
            Self::NoData => "no-data",
            Self::NoName => "no-name",
            Self::Failed => "failed",
            Self::Refused => "refused",
            Self::Malformed => "malformed",
            Self::NotImplemented => "not-implemented",
            Self::Truncated => "truncated",
            Self::Dropped => "dropped",
        }
    }
}

impl Zone {
    /// Of the suffix; `own`: addresses of this host, as clients of the listener reach it.
    pub fn new(suffix: &Suffix, own: Vec<IpAddr>) -> Self {
        let labels = suffix.labels().map(|label| label.as_bytes().to_vec());
        Self {
            suffix: suffix.clone(),
            labels: labels.collect(),
            own,
        }
    }

    /// Addresses of this host.
    pub fn own(&self) -> &[IpAddr] {
        &self.own
    }

    /// Reads what a client sent.
    pub fn read(&self, bytes: &[u8], over: Over) -> Read {
        let head = bytes.get(..HEADER).map(BinDecoder::new);
        let Some(Ok(header)) = head.map(|mut head| Header::read(&mut head)) else {
            return Read::Silence;
        };
        // Two servers that answer each other's answers never end.
        if header.message_type == MessageType::Response {
            return Read::Silence;
        }
        let bare = |code, kind| {
            let answer = empty(&header.metadata, code);
            Read::Reply(Reply::of(&answer, UDP_MIN, kind))
        };
        if header.op_code != OpCode::Query {
            return bare(ResponseCode::NotImp, Kind::NotImplemented);
        }
        // Before anything is reserved for as many questions as the header says.
        if bytes.len() > MESSAGE_MAX || header.counts.queries != 1 {
            return bare(ResponseCode::FormErr, Kind::Malformed);
        }
        match Message::from_vec(bytes) {
            Ok(request) => self.asked(request, over),
            Err(_) => bare(ResponseCode::FormErr, Kind::Malformed),
        }
    }

    fn asked(&self, request: Message, over: Over) -> Read {
        let not = |code, kind| {
            let answer = answer_to(&request, code);
            Read::Reply(Reply::of(&answer, most(&request, over), kind))
        };
        let Some(query) = request.queries.first() else {
            return not(ResponseCode::FormErr, Kind::Malformed);
        };
        if request.version() > EDNS_VERSION {
            return not(ResponseCode::BADVERS, Kind::NotImplemented);
        }
        match query.query_type {
            RecordType::OPT => return not(ResponseCode::FormErr, Kind::Malformed),
            RecordType::AXFR | RecordType::IXFR => {
                return not(ResponseCode::Refused, Kind::Refused);
            }
            _ => {}
        }
        let labels: Vec<&[u8]> = query.name.iter().collect();
        let below = labels.len().checked_sub(self.labels.len());
        let is = |(a, b): (&&[u8], &Vec<u8>)| a.eq_ignore_ascii_case(b);
        let below = below.filter(|n| labels[*n..].iter().zip(&self.labels).all(is));
        let (Some(below), DNSClass::IN) = (below, query.query_class) else {
            return not(ResponseCode::Refused, Kind::Refused);
        };
        // In the letters of the question, so that it is a pointer into it.
        let apex = query.name.trim_to(self.labels.len());
        let name = self.named(&labels[..below]);
        let query = query.clone();
        Read::Question(Box::new(Question {
            request,
            query,
            over,
            apex,
            name,
        }))
    }

    fn named(&self, labels: &[&[u8]]) -> Named {
        // A label may have any byte in it, also a dot, which does not end it.
        let is = |b: &u8| b.is_ascii_alphanumeric() || *b == b'-';
        if !labels.iter().all(|label| label.iter().all(is)) {
            return Named::Nothing;
        }
        let texts = labels.iter().map(|label| String::from_utf8_lossy(label));
        let texts: Vec<String> = texts.map(|text| text.to_ascii_lowercase()).collect();
        let named = |name: &str| {
            let name = format!("{name}{}", self.suffix);
            Destination::named(&self.suffix, &name, Some(ANY_PORT)).ok()
        };
        let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
        match texts[..] {
            [] => Named::Apex,
            [SVC] => Named::Empty,
            [vm, SVC] => named(vm).map_or(Named::Nothing, Named::Above),
            _ => named(&texts.join(".")).map_or(Named::Nothing, Named::Vm),
        }
    }
}

impl Question {
    /// What is asked about.
    pub fn name(&self) -> &Named {
        &self.name
    }

    /// What is asked for, in a word.
    pub fn record_type(&self) -> String {
        self.query.query_type.to_string()
    }

    /// Answers it.
    pub fn answer(&self, found: &Found) -> Reply {
        let code = match found {
            Found::Nowhere => ResponseCode::NXDomain,
            Found::Unknown => ResponseCode::ServFail,
            Found::At(_) | Found::Empty => ResponseCode::NoError,
        };
        let mut answer = answer_to(&self.request, code);
        answer.metadata.authoritative = *found != Found::Unknown;
        if code == ResponseCode::NoError {
            let data = self.data(found);
            answer.answers.extend(data.map(|data| self.record(data)));
        }
        let kind = match code {
            ResponseCode::ServFail => Kind::Failed,
            ResponseCode::NXDomain => Kind::NoName,
            _ if answer.answers.is_empty() => Kind::NoData,
            _ => Kind::Found,
        };
        if matches!(kind, Kind::NoName | Kind::NoData) {
            let soa = Record::from_rdata(self.apex.clone(), TTL_S, self.soa());
            answer.add_authority(soa);
        }
        Reply::of(&answer, most(&self.request, self.over), kind)
    }

    /// What a name that is there has of the type.
    fn data(&self, found: &Found) -> Option<RData> {
        let is_apex = self.name == Named::Apex;
        match self.query.query_type {
            RecordType::SOA if is_apex => Some(self.soa()),
            RecordType::NS if is_apex => Some(RData::NS(NS(self.apex.clone()))),
            RecordType::ANY => Some(RData::HINFO(HINFO::new("RFC8482".into(), String::new()))),
            of => {
                let Found::At(addresses) = found else {
                    return None;
                };
                let mut addresses = addresses.iter().map(|ip| match ip.to_canonical() {
                    IpAddr::V4(ip) => RData::A(ip.into()),
                    IpAddr::V6(ip) => RData::AAAA(ip.into()),
                });
                addresses.find(|data| data.record_type() == of)
            }
        }
    }

    fn record(&self, data: RData) -> Record {
        Record::from_rdata(self.query.name.clone(), TTL_S, data)
    }

    fn soa(&self) -> RData {
        let apex = self.apex.clone();
        // A suffix and a label more always fit into a name.
        let mailbox = apex.prepend_label(MAILBOX).unwrap_or_else(|_| apex.clone());
        let minimum = TTL_S;
        RData::SOA(SOA::new(
            apex, mailbox, SERIAL, REFRESH_S, RETRY_S, EXPIRE_S, minimum,
        ))
    }

    /// Says that there is an answer for whoever comes over TCP. That is no longer than the question.
    pub fn truncated(&self) -> Reply {
        let mut answer = answer_to(&self.request, ResponseCode::NoError);
        answer.metadata.truncation = true;
        Reply::of(&answer, most(&self.request, self.over), Kind::Truncated)
    }
}

impl Reply {
    fn of(message: &Message, most: usize, kind: Kind) -> Self {
        // So short a message is always written.
        let whole = message.to_vec().unwrap_or_default();
        let bytes = match whole.len() <= most {
            true => whole,
            false => message.truncate().to_vec().unwrap_or_default(),
        };
        Self { bytes, kind }
    }
}

/// An answer without a question.
fn empty(request: &Metadata, code: ResponseCode) -> Message {
    let mut answer = Message::response(request.id, request.op_code);
    answer.metadata.recursion_desired = request.recursion_desired;
    answer.metadata.response_code = code;
    answer
}

/// An answer that has its question, and EDNS if that has (RFC 6891 §6.1.1).
fn answer_to(request: &Message, code: ResponseCode) -> Message {
    let mut answer = empty(&request.metadata, code);
    answer.add_queries(request.queries.iter().cloned());
    if let Some(asked) = &request.edns {
        let mut edns = Edns::new();
        edns.set_max_payload(MESSAGE_MAX as u16);
        edns.set_dnssec_ok(asked.flags().dnssec_ok);
        answer.set_edns(edns);
    }
    answer
}

/// Most bytes of an answer.
fn most(request: &Message, over: Over) -> usize {
    match over {
        Over::Udp => usize::from(request.max_payload()).clamp(UDP_MIN, MESSAGE_MAX),
        Over::Tcp => usize::from(u16::MAX),
    }
}

#[cfg(test)]
mod tests;
