//! HTTP/2 by hand (RFC 9113 §4.1): frames as a hostile client makes them, which no library would.

use std::io::{BufReader, ErrorKind, Read, Write};
use std::net::TcpStream;

pub const DATA: u8 = 0;
pub const HEADERS: u8 = 1;
pub const PRIORITY: u8 = 2;
pub const RST_STREAM: u8 = 3;
pub const SETTINGS: u8 = 4;
pub const PUSH_PROMISE: u8 = 5;
pub const PING: u8 = 6;
pub const GOAWAY: u8 = 7;
pub const WINDOW_UPDATE: u8 = 8;
pub const CONTINUATION: u8 = 9;

pub const END_STREAM: u8 = 1;
pub const ACK: u8 = 1;
pub const END_HEADERS: u8 = 4;
pub const PADDED: u8 = 8;

pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Why a connection or a stream is ended (RFC 9113 §7).
pub const PROTOCOL_ERROR: u32 = 1;
pub const FLOW_CONTROL_ERROR: u32 = 3;
pub const STREAM_CLOSED: u32 = 5;
pub const FRAME_SIZE_ERROR: u32 = 6;
pub const ENHANCE_YOUR_CALM: u32 = 11;

/// A frame.
#[derive(Clone, Debug)]
pub struct Frame {
    pub kind: u8,
    pub flags: u8,
    pub stream: u32,
    pub payload: Vec<u8>,
}

/// Bytes of a frame.
pub fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let len = u32::try_from(payload.len()).unwrap().to_be_bytes();
    let mut bytes = vec![len[1], len[2], len[3], kind, flags];
    bytes.extend(stream.to_be_bytes());
    bytes.extend_from_slice(payload);
    bytes
}

/// A number of HPACK (RFC 7541 §5.1), behind `bits` that say what it is.
fn number(first: u8, bits: u32, n: usize) -> Vec<u8> {
    let max = (1 << bits) - 1;
    if n < max {
        return vec![first | u8::try_from(n).unwrap()];
    }
    let (mut bytes, mut rest) = (vec![first | u8::try_from(max).unwrap()], n - max);
    while rest >= 128 {
        bytes.push(u8::try_from(rest % 128).unwrap() | 128);
        rest /= 128;
    }
    bytes.push(u8::try_from(rest).unwrap());
    bytes
}

fn text(bytes: &[u8]) -> Vec<u8> {
    [number(0, 7, bytes.len()), bytes.to_vec()].concat()
}

/// A field as it is, which nobody remembers (RFC 7541 §6.2.2).
pub fn field(name: &[u8], value: &[u8]) -> Vec<u8> {
    [vec![0], text(name), text(value)].concat()
}

/// One that is remembered, and is the first of the table then (RFC 7541 §6.2.1).
pub fn remembered(name: &[u8], value: &[u8]) -> Vec<u8> {
    [vec![0x40], text(name), text(value)].concat()
}

/// The nth field of the table again (RFC 7541 §6.1).
pub fn indexed(n: usize) -> Vec<u8> {
    number(0x80, 7, n)
}

/// Where the first remembered field is in the table.
pub const FIRST: usize = 62;

pub fn fields(fields: &[(&str, &str)]) -> Vec<u8> {
    let each = fields
        .iter()
        .map(|(name, value)| field(name.as_bytes(), value.as_bytes()));
    each.collect::<Vec<_>>().concat()
}

/// The fields of a GET for this path of a VM.
pub fn get(vm: &str, path: &str) -> Vec<u8> {
    fields(&[
        (":method", "GET"),
        (":scheme", "http"),
        (":authority", vm),
        (":path", path),
    ])
}

/// The fields of a CONNECT.
pub fn connect(to: &str) -> Vec<u8> {
    fields(&[(":method", "CONNECT"), (":authority", to)])
}

/// A request whose fields are whole.
pub fn headers(stream: u32, flags: u8, fields: &[u8]) -> Vec<u8> {
    frame(HEADERS, END_HEADERS | flags, stream, fields)
}

/// A connection.
pub struct Raw {
    pub tcp: TcpStream,
    read: BufReader<TcpStream>,
}

/// How a connection ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ended {
    /// With GOAWAY.
    Told(u32),
    /// Without a word.
    Silently,
}

impl Raw {
    /// With nothing said.
    pub fn silent(tcp: TcpStream) -> Self {
        tcp.set_nodelay(true).unwrap();
        let read = BufReader::new(tcp.try_clone().unwrap());
        Self { tcp, read }
    }

    /// With the preface, and settings that say nothing.
    pub fn new(tcp: TcpStream) -> Self {
        let mut raw = Self::silent(tcp);
        raw.say(PREFACE);
        raw.say(&frame(SETTINGS, 0, 0, &[]));
        raw
    }

    /// Sends. The other end may be gone by now.
    pub fn say(&mut self, bytes: &[u8]) -> bool {
        self.tcp.write_all(bytes).is_ok()
    }

    /// The next frame; none: the connection is over.
    pub fn hear(&mut self) -> Option<Frame> {
        let mut head = [0; 9];
        self.read(&mut head)?;
        let len = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
        let mut payload = vec![0; len];
        self.read(&mut payload)?;
        Some(Frame {
            kind: head[3],
            flags: head[4],
            stream: u32::from_be_bytes([head[5], head[6], head[7], head[8]]),
            payload,
        })
    }

    fn read(&mut self, bytes: &mut [u8]) -> Option<()> {
        match self.read.read_exact(bytes) {
            Ok(()) => Some(()),
            Err(e) if e.kind() == ErrorKind::UnexpectedEof => None,
            Err(e) if e.kind() == ErrorKind::ConnectionReset => None,
            Err(e) => panic!("{e}"),
        }
    }

    /// Another one that says something on the same connection.
    pub fn sender(&self) -> Self {
        Self::silent(self.tcp.try_clone().unwrap())
    }

    /// The next frame that is one of these.
    pub fn until(&mut self, is: impl Fn(&Frame) -> bool) -> Frame {
        loop {
            let frame = self.hear().expect("the connection goes on");
            assert_ne!(frame.kind, GOAWAY, "{frame:?}");
            if is(&frame) {
                return frame;
            }
        }
    }

    /// Why a stream was reset.
    pub fn reset(&mut self, stream: u32) -> u32 {
        let frame = self.until(|frame| frame.kind == RST_STREAM && frame.stream == stream);
        code(&frame.payload)
    }

    /// Whether the other end serves, once it has heard all that was said.
    pub fn answers(&mut self) -> bool {
        let ping = *b"are you?";
        self.say(&frame(PING, 0, 0, &ping))
            && loop {
                match self.hear() {
                    Some(frame) if frame.kind == PING && frame.flags == ACK => {
                        break frame.payload == ping;
                    }
                    Some(frame) if frame.kind == GOAWAY => break false,
                    Some(_) => {}
                    None => break false,
                }
            }
    }

    /// Hears all to the end.
    pub fn ended(&mut self) -> Ended {
        let mut told = None;
        while let Some(frame) = self.hear() {
            if frame.kind == GOAWAY {
                told = Some(code(&frame.payload[4..]));
            }
        }
        told.map_or(Ended::Silently, Ended::Told)
    }
}

fn code(bytes: &[u8]) -> u32 {
    u32::from_be_bytes(bytes[..4].try_into().unwrap())
}
