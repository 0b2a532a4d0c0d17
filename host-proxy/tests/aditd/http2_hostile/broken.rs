//! Faults of the protocol, each with the code that says so.

use super::*;

#[test]
fn r74_what_breaks_the_protocol_ends_its_connection_with_the_code_that_says_so() {
    let (host, ports) = started();
    let control = ports[0].connected();
    let get = get("x", "/");
    let settings = |id: u16, value: u32| {
        let payload = [&id.to_be_bytes()[..], &value.to_be_bytes()].concat();
        frame(SETTINGS, 0, 0, &payload)
    };
    let update = |stream, by: u32| frame(WINDOW_UPDATE, 0, stream, &by.to_be_bytes());
    for (what, bytes, expected) in [
        (
            "DATA before HEADERS",
            frame(DATA, 0, 1, b"x"),
            PROTOCOL_ERROR,
        ),
        ("DATA of no stream", frame(DATA, 0, 0, b"x"), PROTOCOL_ERROR),
        (
            "a request on no stream",
            headers(0, END_STREAM, &get),
            PROTOCOL_ERROR,
        ),
        (
            "a stream of the server's",
            headers(2, END_STREAM, &get),
            PROTOCOL_ERROR,
        ),
        (
            "a stream from before",
            [headers(5, END_STREAM, &get), headers(3, END_STREAM, &get)].concat(),
            PROTOCOL_ERROR,
        ),
        (
            "a push",
            frame(PUSH_PROMISE, END_HEADERS, 1, &[0, 0, 0, 2, 0x82]),
            PROTOCOL_ERROR,
        ),
        (
            "RST_STREAM of an idle stream",
            frame(RST_STREAM, 0, 1, &[0, 0, 0, 8]),
            PROTOCOL_ERROR,
        ),
        (
            "RST_STREAM that is too short",
            frame(RST_STREAM, 0, 1, &[0]),
            PROTOCOL_ERROR,
        ),
        (
            "PING that is too short",
            frame(PING, 0, 0, b"x"),
            PROTOCOL_ERROR,
        ),
        (
            "PING in a stream",
            frame(PING, 0, 1, b"12345678"),
            PROTOCOL_ERROR,
        ),
        (
            "SETTINGS in a stream",
            frame(SETTINGS, 0, 1, &[]),
            PROTOCOL_ERROR,
        ),
        (
            "half a setting",
            frame(SETTINGS, 0, 0, &[0, 4, 0]),
            PROTOCOL_ERROR,
        ),
        (
            "a window that is too large",
            settings(4, 1 << 31),
            PROTOCOL_ERROR,
        ),
        ("frames that are too small", settings(5, 16), PROTOCOL_ERROR),
        ("a push that may be or not", settings(2, 7), PROTOCOL_ERROR),
        (
            "no more window of the connection",
            update(0, 0),
            PROTOCOL_ERROR,
        ),
        (
            "too much window of the connection",
            update(0, i32::MAX.cast_unsigned()),
            FLOW_CONTROL_ERROR,
        ),
        (
            "CONTINUATION of nothing",
            frame(CONTINUATION, END_HEADERS, 1, &get),
            PROTOCOL_ERROR,
        ),
        (
            "another frame within a header",
            [
                frame(HEADERS, END_STREAM, 1, &get),
                frame(PING, 0, 0, b"12345678"),
            ]
            .concat(),
            PROTOCOL_ERROR,
        ),
        (
            "CONTINUATION of another stream",
            [
                frame(HEADERS, END_STREAM, 1, &get),
                frame(CONTINUATION, END_HEADERS, 3, &[]),
            ]
            .concat(),
            PROTOCOL_ERROR,
        ),
        (
            "a field that nobody remembers",
            headers(1, END_STREAM, &indexed(FIRST + 9)),
            PROTOCOL_ERROR,
        ),
        (
            "a table that is too large",
            headers(1, END_STREAM, &[0x3f, 0xff, 0xff, 0xff, 0x7f]),
            PROTOCOL_ERROR,
        ),
        (
            "a number without an end",
            headers(1, END_STREAM, &[0xff; 40]),
            PROTOCOL_ERROR,
        ),
        (
            "a text that is longer than its frame",
            headers(1, END_STREAM, &[0, 0x7f, 0xff, 0x7f]),
            PROTOCOL_ERROR,
        ),
        (
            "more padding than there is",
            frame(HEADERS, END_HEADERS | PADDED, 1, &[200, 0x82]),
            PROTOCOL_ERROR,
        ),
        (
            "a frame that is too long",
            [&[0, 0x40, 1, DATA, 0, 0, 0, 0, 1][..], &[0; 1 << 14]].concat(),
            FRAME_SIZE_ERROR,
        ),
    ] {
        let mut raw = Raw::new(host.proxy());
        raw.say(&bytes);
        assert_eq!(raw.ended(), Ended::Told(expected), "{what}");
    }
    others_are_served(&host, &control);
}
