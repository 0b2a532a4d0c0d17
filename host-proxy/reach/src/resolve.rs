//! Which of several hosts has a VM. Pure: a rule about claims, which gives the same answer whoever is asked first and in whichever
//! order they answer, so nothing flaps.
//!
//! | claims | the VM is |
//! |---|---|
//! | none | nowhere |
//! | some live, some not | one of the live: a session beats an entry that nobody uses |
//! | several that are alike | of the highest card generation; a claim without a card is below each |
//! | several of the same | of none of them: the name alone is ambiguous, and `VM.HOST` says which |

use adit_names::VmId;

/// What a host says of a VM that it has.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Claim<H> {
    /// Which host.
    pub host: H,
    /// The guest's driver runs.
    pub live: bool,
    /// Generation of the VM's card, where the host believes one.
    pub generation: Option<u64>,
}

/// Where a VM is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place<H> {
    /// On one host.
    At(H),
    /// On several, and nothing says which is meant: all of them, in order.
    Ambiguous(Vec<H>),
    /// Nowhere.
    Unknown,
}

/// Chooses among claims. Of two by one host the better one counts.
pub fn choose<H: Ord + Clone>(claims: &[Claim<H>]) -> Place<H> {
    let rank = |claim: &Claim<H>| (claim.live, claim.generation);
    let Some(best) = claims.iter().map(rank).max() else {
        return Place::Unknown;
    };
    let hosts = claims.iter().filter(|claim| rank(claim) == best);
    let mut hosts: Vec<H> = hosts.map(|claim| claim.host.clone()).collect();
    hosts.sort();
    hosts.dedup();
    match hosts.pop() {
        Some(only) if hosts.is_empty() => Place::At(only),
        Some(last) => {
            hosts.push(last);
            Place::Ambiguous(hosts)
        }
        None => Place::Unknown,
    }
}

/// Names of hosts as a sentence has them: `alpha` and `beta`.
pub fn listed(hosts: &[VmId]) -> String {
    let names: Vec<_> = hosts.iter().map(|host| format!("`{host}`")).collect();
    match names.split_last() {
        Some((last, [])) => last.clone(),
        Some((last, others)) => format!("{} and {last}", others.join(", ")),
        None => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn claim(host: u8, live: bool, generation: Option<u64>) -> Claim<u8> {
        Claim {
            host,
            live,
            generation,
        }
    }

    #[test]
    fn a_live_one_beats_a_dead_one_and_a_higher_card_a_lower_one_and_equals_are_ambiguous() {
        let (a, b) = (1, 2);
        for (claims, place) in [
            (vec![], Place::Unknown),
            (vec![claim(a, false, None)], Place::At(a)),
            (
                vec![claim(a, false, Some(9)), claim(b, true, None)],
                Place::At(b),
            ),
            (
                vec![claim(a, true, Some(2)), claim(b, true, Some(1))],
                Place::At(a),
            ),
            (
                vec![claim(a, true, None), claim(b, true, Some(0))],
                Place::At(b),
            ),
            (
                vec![claim(b, true, Some(1)), claim(a, true, Some(1))],
                Place::Ambiguous(vec![a, b]),
            ),
            (
                vec![claim(a, true, None), claim(b, true, None)],
                Place::Ambiguous(vec![a, b]),
            ),
            (
                vec![claim(a, false, None), claim(b, false, None)],
                Place::Ambiguous(vec![a, b]),
            ),
            (
                vec![claim(a, true, None), claim(a, false, None)],
                Place::At(a),
            ),
        ] {
            assert_eq!(choose(&claims), place, "{claims:?}");
        }
        let names = ["alpha", "beta", "gamma"].map(|name| name.parse().unwrap());
        assert_eq!(listed(&names[..1]), "`alpha`");
        assert_eq!(listed(&names), "`alpha`, `beta` and `gamma`");
    }

    proptest! {
        #[test]
        fn r126_whoever_answers_first_and_however_often_the_answer_is_the_same(
            claims in proptest::collection::vec(
                (0..4_u8, any::<bool>(), proptest::option::of(0..3_u64)).prop_map(|(h, l, g)| claim(h, l, g)),
                0..8,
            ),
            by in any::<u64>(),
        ) {
            let chosen = choose(&claims);
            let mut others = claims.clone();
            others.sort_by_key(|claim| {
                u64::from(claim.host).wrapping_mul(by) ^ claim.generation.unwrap_or(by) ^ u64::from(claim.live)
            });
            others.extend(claims.first().cloned());
            prop_assert_eq!(&choose(&others), &chosen);
            // A worse claim changes nothing.
            if let Place::At(host) = &chosen {
                let is = |c: &&Claim<u8>| c.host == *host;
                let best = claims.iter().filter(is).map(|c| (c.live, c.generation)).max().unwrap();
                prop_assert!(claims.iter().filter(|c| !is(c)).all(|c| (c.live, c.generation) < best));
            }
        }
    }
}
