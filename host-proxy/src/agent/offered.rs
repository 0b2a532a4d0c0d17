//! Which trust documents were sent on an agent's stream. Each is sent once, and the guest answers them in their order.

use std::collections::{BTreeMap, VecDeque};

use adit_tasks::wire::TrustHeld;

use crate::desk::store::trust::Document;
use crate::vm::TrustOf;

/// Whose documents, and for whom: each has its own sequence.
type Line = ([u8; 16], bool);

/// What was sent on one stream.
#[derive(Default)]
pub struct Offered {
    /// What the guest has, or was sent.
    highest: BTreeMap<Line, u64>,
    /// Those that it has not answered.
    waiting: VecDeque<(Line, u64)>,
    /// What it did not take.
    refused: BTreeMap<Line, (u64, String)>,
}

impl Offered {
    /// The guest has said what it has, unasked or in answer to the first one that waits.
    pub fn heard(&mut self, held: &TrustHeld) -> TrustOf {
        for of in &held.documents {
            let highest = self.highest.entry((of.signer, of.own)).or_default();
            *highest = of.sequence.max(*highest);
        }
        if let Some((line, sequence)) = self.waiting.pop_front() {
            self.refused.remove(&line);
            if !held.refused.is_empty() {
                self.refused.insert(line, (sequence, held.refused.clone()));
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
        let highest = self.highest.entry(line).or_default();
        let is_news = sequence > *highest;
        if is_news {
            *highest = sequence;
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
