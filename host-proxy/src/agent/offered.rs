//! Which trust documents were sent on an agent's stream. Each is sent once, and the guest answers them in their order.

use std::collections::{BTreeMap, VecDeque};

use adit_tasks::trust::DOCUMENTS_MAX;
use adit_tasks::wire::TrustHeld;

use crate::desk::store::trust::Document;
use crate::vm::TrustOf;

/// Whose documents, and for whom: each has its own sequence.
type Line = ([u8; 16], bool);

/// Characters of a refusal that are kept, and shown.
const REFUSED_MAX: usize = 300;

/// What was sent on one stream.
#[derive(Default)]
pub struct Offered {
    /// What the guest says that it has, as it said it last.
    has: BTreeMap<Line, u64>,
    /// What it was sent.
    sent: BTreeMap<Line, u64>,
    /// Those that it has not answered.
    waiting: VecDeque<(Line, u64)>,
    /// What it did not take.
    refused: BTreeMap<Line, (u64, String)>,
}

impl Offered {
    /// The guest has said what it has, unasked or in answer to the first one that waits.
    pub fn heard(&mut self, held: &TrustHeld) -> TrustOf {
        let documents = held.documents.iter().take(DOCUMENTS_MAX);
        let has = documents.map(|of| ((of.signer, of.own), of.sequence));
        self.has = has.collect();
        if let Some((line, sequence)) = self.waiting.pop_front() {
            self.refused.remove(&line);
            if !held.refused.is_empty() {
                let why = adit_names::escape(&held.refused).at_most(REFUSED_MAX);
                let why = why.to_string();
                self.refused.insert(line, (sequence, why));
            }
        }
        let refused = self.refused.iter();
        TrustOf {
            held: held.clone(),
            refused: refused
                .map(|((signer, _), (sequence, why))| (*signer, *sequence, why.clone()))
                .collect(),
        }
    }

    /// Whether a document is still to be sent. If so, it counts as sent.
    pub fn is_news(&mut self, document: &Document) -> bool {
        let (line, sequence) = ((document.signer, document.own), document.sequence);
        let known = [&self.has, &self.sent].map(|of| of.get(&line).copied());
        let is_news = known.into_iter().flatten().all(|known| sequence > known);
        if is_news {
            self.sent.insert(line, sequence);
            self.waiting.push_back((line, sequence));
        }
        is_news
    }
}

#[cfg(test)]
mod tests {
    use adit_tasks::wire::HeldDocument;

    use super::*;

    fn document(signer: u8, sequence: u64) -> Document {
        Document {
            signer: [signer; 16],
            own: false,
            sequence,
            envelope: Vec::new(),
        }
    }

    fn held(sequence: u64, refused: &str) -> TrustHeld {
        TrustHeld {
            documents: vec![HeldDocument {
                signer: [1; 16],
                own: false,
                sequence,
            }],
            revoked: 0,
            refused: refused.into(),
        }
    }

    /// A guest may say whatever it likes, as often as it likes.
    #[test]
    fn r110_what_a_guest_says_of_documents_costs_a_bounded_place() {
        let mut offered = Offered::default();
        for n in 0..1000_u64 {
            let mut said = held(n, &"x".repeat(100_000));
            said.documents = vec![said.documents[0]; 1000];
            for (i, of) in said.documents.iter_mut().enumerate() {
                of.signer[..8].copy_from_slice(&(n * 1000 + i as u64).to_be_bytes());
            }
            assert!(offered.is_news(&document(1, n + 1)));
            offered.heard(&said);
        }
        assert_eq!(offered.has.len(), DOCUMENTS_MAX);
        let (refused, sent) = (&offered.refused, &offered.sent);
        assert_eq!((refused.len(), sent.len()), (1, 1));
        let is_cut = |why: &str| why.chars().count() <= REFUSED_MAX + 1;
        assert!(refused.values().all(|(_, why)| is_cut(why)));
    }

    #[test]
    fn each_document_is_sent_once_and_a_refusal_stays_until_the_next_of_its_signer() {
        let mut offered = Offered::default();
        offered.heard(&held(5, ""));
        assert!(!offered.is_news(&document(1, 5)) && !offered.is_news(&document(1, 4)));
        assert!(offered.is_news(&document(1, 6)) && offered.is_news(&document(2, 1)));
        assert!(!offered.is_news(&document(1, 6)));
        assert!(offered.heard(&held(6, "")).refused.is_empty());
        let said = offered.heard(&held(6, "trust-untrusted: x"));
        assert_eq!(said.refused, [([2; 16], 1, "trust-untrusted: x".into())]);
        // Said again by itself it answers nothing.
        assert_eq!(offered.heard(&held(6, "")).refused.len(), 1);
        assert!(!offered.is_news(&document(2, 1)));
        assert!(offered.is_news(&document(2, 2)));
        assert!(offered.heard(&held(6, "")).refused.is_empty());
    }
}
