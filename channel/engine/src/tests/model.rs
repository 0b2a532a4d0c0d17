//! Credit arithmetic against a model in 64 bits that never wraps (R36, R41).

use alloc::vec::Vec;

use proptest::prelude::*;

use crate::Violation;
use crate::credit::{REORDER_MAX, RxWindow, TxCredit};

#[derive(Clone, Debug)]
enum Step {
    /// Send as many of these bytes as there is credit for.
    Send(u32),
    /// The peer takes this many of the bytes in flight, and announces a window.
    Take(u32, u32),
    /// The peer sends an arbitrary fwd_cnt.
    Lie(u32, u32),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let edge = prop_oneof![
        0u32..10,
        any::<u32>(),
        Just(u32::MAX),
        Just(1 << 31),
        Just(1 << 30)
    ];
    let step = prop_oneof![
        4 => edge.clone().prop_map(Step::Send),
        4 => (edge.clone(), edge.clone()).prop_map(|(n, w)| Step::Take(n, w)),
        1 => (edge.clone(), edge).prop_map(|(f, w)| Step::Lie(f, w)),
    ];
    proptest::collection::vec(step, 1..100)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn r36_r41_tx_credit_agrees_with_a_model_that_never_wraps(steps in steps()) {
        let mut tx = TxCredit::new();
        let (mut sent, mut taken, mut window) = (0u64, 0u64, 0u64);
        for step in steps {
            match step {
                Step::Send(n) => {
                    let n = n.min(tx.bytes());
                    tx.send(n, 0);
                    sent += u64::from(n);
                }
                Step::Take(n, w) => {
                    taken += u64::from(n).min(sent - taken);
                    window = u64::from(w);
                    prop_assert!(tx.update(w, taken as u32).is_ok());
                }
                Step::Lie(fwd_cnt, w) => {
                    let before = (tx.bytes(), tx.in_flight());
                    // Which total counts could the peer mean?
                    let ahead = u64::from(fwd_cnt.wrapping_sub(taken as u32));
                    let behind = u64::from((taken as u32).wrapping_sub(fwd_cnt));
                    let got = tx.update(w, fwd_cnt);
                    if ahead <= sent - taken {
                        prop_assert!(got.is_ok());
                        (taken, window) = (taken + ahead, u64::from(w));
                    } else if behind <= u64::from(REORDER_MAX) && behind <= taken {
                        prop_assert_eq!(got, Ok(false));
                        prop_assert_eq!((tx.bytes(), tx.in_flight()), before);
                    } else {
                        let v = Violation::FwdCntAhead { fwd_cnt, tx_cnt: sent as u32 };
                        prop_assert_eq!(got, Err(v));
                        prop_assert_eq!((tx.bytes(), tx.in_flight()), before);
                    }
                }
            }
            prop_assert_eq!(tx.in_flight(), sent - taken);
            prop_assert_eq!(u64::from(tx.bytes()), window.min(1 << 30).saturating_sub(sent - taken));
        }
    }

    #[test]
    fn rx_window_never_holds_more_than_announced_and_never_stalls_the_peer(
        initial in 1u32..10_000,
        max in 1u32..100_000,
        // Of a longer window the peer uses only this much.
        usable in prop_oneof![Just(u32::MAX), 1u32..100_000],
        steps in proptest::collection::vec((any::<bool>(), 0u32..20_000), 1..300),
    ) {
        let max = max.max(initial);
        let mut rx = RxWindow::new(initial);
        let (mut told, mut fwd) = rx.announce();
        let (mut sent, mut taken) = (0u64, 0u64);
        for (send, n) in steps {
            if send {
                let room = u64::from(told.min(usable)) - (sent - u64::from(fwd));
                let n = u64::from(n).min(room) as u32;
                prop_assert!(rx.receive(n).is_ok(), "within the announced window");
                sent += u64::from(n);
                let over = rx.window() - rx.held() + 1;
                prop_assert!(rx.clone().receive(over).is_err());
            } else {
                rx.take(n);
                taken += u64::from(n).min(sent - taken);
                if let Some(by) = rx.growth(max) {
                    rx.grow(by);
                }
            }
            prop_assert_eq!(u64::from(rx.held()), sent - taken);
            prop_assert!(rx.held() <= rx.window() && rx.window() <= max);
            if rx.update_due(usable) {
                (told, fwd) = rx.announce();
            }
            let stalled = sent - u64::from(fwd) == u64::from(told.min(usable));
            prop_assert!(!stalled || rx.held() > 0, "nothing held, nothing told, nothing free");
        }
    }
}
