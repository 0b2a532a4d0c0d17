//! Target `copy_frames`: bytes in place of a sender's frames to a receiver of files, of a receiver's to a sender, or of a hello's arguments. The
//! hostile one may be the guest or the client: both have the same code. Whatever is said, what a receiver takes stays within its tree and
//! in order, or is an error; and a frame that is read is written as the same bytes.
//!
//! Input: a byte that says which of them; the rest.

use adit_files::{
    Asked, DATA_MAX, End, Heard, Incoming, Kind, Message, Outgoing, Told, check_path,
};

fn frames(mut bytes: &[u8]) -> Vec<Message> {
    let mut all = Vec::new();
    while let Ok(Some(message)) = Message::read(&mut bytes) {
        let again = Message::read(&mut &message.encode()[..]);
        assert_eq!(again.ok().flatten().as_ref(), Some(&message));
        all.push(message);
    }
    all
}

pub fn run(data: &[u8]) {
    let Some((which, rest)) = data.split_first() else {
        return;
    };
    match which % 3 {
        0 => receiver(rest, which & 4 != 0),
        1 => sender(rest),
        _ => {
            if let Some(asked) = Asked::parse(rest) {
                assert_eq!(asked.encode().as_deref(), Some(rest));
                let root = asked.root().unwrap_or("/");
                assert!(asked.under == 0 || asked.path.starts_with(root));
            }
        }
    }
}

fn receiver(bytes: &[u8], resume: bool) {
    let mut incoming = Incoming::new(resume);
    let (mut entries, mut is_tree, mut at, mut len) = (0_u64, false, 0_u64, None);
    for message in frames(bytes) {
        assert!(!incoming.is_over() || incoming.handle(Message::All(entries)).is_err());
        let Ok(told) = incoming.handle(message) else {
            return;
        };
        match told {
            Told::Entry(entry) => {
                assert_eq!(check_path(&entry.path), Ok(()));
                assert_eq!(entries == 0, entry.path.is_empty());
                assert!(entries == 0 || is_tree);
                is_tree |= entries == 0 && entry.kind == Kind::Dir;
                entries += 1;
                at = 0;
                len = match entry.kind {
                    Kind::File(len) => len,
                    _ => None,
                };
            }
            Told::From(from) => at = from,
            Told::Data(data) => {
                assert!((1..=DATA_MAX).contains(&data.bytes().len()) && data.offset >= at);
                at = data.offset + data.bytes().len() as u64;
                assert!(len.is_none_or(|len| at <= len));
            }
            Told::End(End::Whole(end)) => assert!(end >= at && len.is_none_or(|len| len == end)),
            Told::End(End::Broken(..)) | Told::Skipped(_) => {}
            Told::All => assert!(incoming.is_over()),
        }
        if incoming.owes_answer() {
            incoming.answered(7);
        }
    }
}

fn sender(bytes: &[u8]) {
    let mut outgoing = Outgoing::default();
    let (mut asked, mut all) = (false, false);
    for (nth, message) in frames(bytes).into_iter().enumerate() {
        if nth % 3 == 1 {
            outgoing.ask();
            asked = true;
        }
        if nth % 7 == 6 {
            outgoing.all();
            all = true;
        }
        match outgoing.handle(message) {
            Err(_) => return,
            Ok(Heard::Have(_)) => assert!(std::mem::take(&mut asked)),
            Ok(Heard::Totals(_)) => assert!(all && outgoing.is_over()),
            Ok(Heard::Refused(_)) => assert!(outgoing.is_over()),
            Ok(Heard::Skipped(_)) => {}
        }
    }
}
