//! Target `exec_frames`: bytes in place of a client's frames to a session in the guest, of a guest's frames to `adit exec`, or of a hello's
//! arguments. In whatever pieces they come, they mean the same; what a session keeps of a client is bounded, and what a client is told
//! by a hostile guest is the output without a gap, or an error.
//!
//! Input: a byte that says which of them; a byte for the length of the pieces; the rest.

use adit_exec::{
    Asked, Client, Decoder, FRAME_MAX, Heard, Message, Next, Out, SPOOL_MAX, STDIN_WINDOW, Session,
    ToClient, ToGuest,
};

/// All frames, in pieces; false behind them: the rest is none of the protocol.
fn frames<M: Message>(bytes: &[u8], piece: usize) -> (Vec<M>, bool) {
    let (mut decoder, mut all) = (Decoder::default(), Vec::new());
    for piece in bytes.chunks(piece) {
        decoder.push(piece);
        loop {
            match decoder.poll_frame() {
                Ok(Some(message)) => all.push(message),
                Ok(None) => break,
                Err(e) => {
                    assert!(e.to_string().len() < 500);
                    return (all, false);
                }
            }
        }
        assert!(decoder.rest().len() <= FRAME_MAX as usize + 16);
    }
    (all, true)
}

pub fn run(data: &[u8]) {
    let Some(([which, piece], rest)) = data.split_first_chunk::<2>() else {
        return;
    };
    let piece = usize::from(*piece).max(1);
    match which % 3 {
        0 => session(rest, piece, which & 4 != 0, which & 8 != 0),
        1 => client(rest, piece),
        _ => {
            if let Some(asked) = Asked::parse(rest) {
                assert_eq!(asked.encode().as_deref(), Some(rest));
            }
        }
    }
}

fn session(bytes: &[u8], piece: usize, kept: bool, tty: bool) {
    let whole = frames::<ToGuest>(bytes, bytes.len().max(1));
    assert_eq!(whole, frames(bytes, piece));
    let mut session = Session::new("0".into(), kept, tty, true);
    for (nth, message) in whole.0.iter().enumerate() {
        if let ToGuest::Open(open) = message {
            let _ = open.check();
        }
        if let ToGuest::Attach(attach) = message {
            let _ = session.attach(attach);
        }
        let before = (session.written(), session.is_over());
        let refused = session.handle(message).is_err();
        if refused {
            assert_eq!(before, (session.written(), session.is_over()));
        }
        // A command that writes as much as it may, and reads half of what comes.
        let _ = session.output(Out::Stdout, &vec![7; session.room(Out::Stdout)]);
        if let Next::Write(input) = session.stdin() {
            assert!(input.len() <= STDIN_WINDOW);
            let half = input.len() / 2;
            session.stdin_wrote(half);
        }
        let mut sent = 0;
        while let Some(frame) = session.poll_send() {
            sent += frame.len();
        }
        assert!(sent <= 4 * SPOOL_MAX);
        if nth % 5 == 4 && session.client_gone() {
            let _ = session.attach(&Default::default());
        }
    }
}

fn client(bytes: &[u8], piece: usize) {
    let whole = frames::<ToClient>(bytes, bytes.len().max(1));
    assert_eq!(whole, frames(bytes, piece));
    let (mut client, mut had) = (Client::new(), None::<[u64; 2]>);
    for message in whole.0 {
        let Ok(heard) = client.handle(message) else {
            return;
        };
        match heard {
            Heard::Started(started) => had = Some([started.stdout, started.stderr]),
            Heard::Output(out, bytes) => {
                let had = had.as_mut().expect("it has started");
                had[usize::from(out == Out::Stderr)] += bytes.len() as u64;
                assert_eq!(*had, client.had());
            }
            Heard::Exit(exit) => assert_eq!(had, Some([exit.stdout, exit.stderr])),
            _ => {}
        }
        let room = client.stdin_room();
        assert!(room <= STDIN_WINDOW);
        if room > 0 {
            let _ = client.stdin(&vec![0; room]);
        }
        let _ = client.poll_ack();
    }
}
