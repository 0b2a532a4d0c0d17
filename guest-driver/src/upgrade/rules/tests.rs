//! The rules, and a model of everything that can happen to an agent in any order.

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

const LIMIT_MS: u64 = 60_000;

fn v(text: &str) -> Version {
    Version::parse(text).unwrap()
}

fn package(minor: u64, floor: u64) -> Package {
    Package {
        version: Version::new(0, minor, 0),
        architecture: "x86_64".into(),
        size: 1,
        digest: [minor as u8; 32],
        oldest_fallback: Version::new(0, floor, 0),
        not_after: "2027-11-21T22:00:00Z".parse().unwrap(),
    }
}

fn now(at_ms: u64) -> Now {
    Now {
        boot: "b".into(),
        at_ms,
    }
}

/// The digest of the image's program.
const IMAGE: Digest = Digest([0xff; 32]);

fn taken(kept: &Kept, minor: u64, floor: u64) -> Kept {
    let running = kept.current.as_ref().map_or(IMAGE, |c| c.installed.digest);
    let image = v("0.1.0");
    kept.accept(&package(minor, floor), running, &image)
        .unwrap()
}

fn runs(kept: &Kept) -> Option<u64> {
    kept.current.as_ref().map(|c| c.installed.version.minor)
}

/// Starts it after so many ms. Returns what runs.
fn start(kept: &mut Kept, at_ms: u64) -> Option<u64> {
    let (next, run) = kept.start(&v("0.1.0"), &now(at_ms), LIMIT_MS);
    *kept = next;
    assert_eq!(run.as_ref().map(|i| i.version.minor), runs(kept));
    runs(kept)
}

#[test]
fn a_program_that_has_its_hello_is_the_agent_whatever_it_does_then() {
    let mut kept = taken(&Kept::default(), 2, 1);
    assert_eq!(start(&mut kept, 0), Some(2));
    kept = kept.confirmed();
    for n in 0..10 {
        assert_eq!(start(&mut kept, n * LIMIT_MS), Some(2));
    }
    assert_eq!(kept.failed, None);
}

#[test]
fn one_that_ends_thrice_before_its_hello_is_taken_back() {
    let mut kept = taken(&taken(&Kept::default(), 2, 1).confirmed(), 3, 1);
    for at in 0..3 {
        assert_eq!(start(&mut kept, at), Some(3));
    }
    assert_eq!(start(&mut kept, 3), Some(2));
    assert!(!kept.is_on_trial());
    let failed = kept.failed.clone().unwrap();
    assert_eq!(
        (failed.what, failed.installed.version),
        (What::TakenBack, v("0.3.0"))
    );
    // Not tried again by itself: only an order does that, and it may be of the same package.
    assert_eq!(start(&mut kept, 4), Some(2));
    let again = taken(&kept, 3, 1);
    assert_eq!((runs(&again), again.failed), (Some(3), None));
}

#[test]
fn one_whose_time_is_over_is_taken_back_at_its_next_start() {
    let first = taken(&Kept::default(), 2, 1);
    let mut kept = first.clone();
    assert_eq!(start(&mut kept, 1000), Some(2));
    assert_eq!(start(&mut kept.clone(), 1000 + LIMIT_MS - 1), Some(2));
    assert_eq!(start(&mut kept, 1000 + LIMIT_MS), None);
    assert_eq!(kept.failed.unwrap().what, What::TakenBack);
    // A machine that was off in between has another boot: its time says nothing.
    let mut kept = first;
    start(&mut kept, 1000);
    let other = Now {
        boot: "c".into(),
        at_ms: 1000 + LIMIT_MS,
    };
    let (kept, _) = kept.start(&v("0.1.0"), &other, LIMIT_MS);
    assert_eq!(runs(&kept), Some(2));
}

#[test]
fn no_host_that_withholds_the_hello_gets_below_the_floor() {
    // What may be gone back to is 0.3.0, and there is none.
    let mut kept = taken(&Kept::default(), 3, 3);
    for at in 0..20 {
        assert_eq!(start(&mut kept, at * LIMIT_MS), Some(3));
    }
    assert_eq!(kept.failed.as_ref().unwrap().what, What::NoWayBack);
    assert_eq!(kept.confirmed().failed, None);
    // With the one before above the floor, and the image's below it.
    let before = taken(&Kept::default(), 3, 2).confirmed();
    let mut kept = taken(&before, 4, 3);
    for at in 0..4 {
        start(&mut kept, at);
    }
    assert_eq!(runs(&kept), Some(3));
}

#[test]
fn the_floor_never_goes_back_and_what_is_below_it_is_refused() {
    let kept = taken(&Kept::default(), 5, 4).confirmed();
    let running = kept.current.as_ref().unwrap().installed.digest;
    let accept = |p: &Package| kept.accept(p, running, &v("0.1.0"));
    assert_eq!(
        accept(&package(3, 1)),
        Err(NotTaken::BelowFloor(v("0.4.0")))
    );
    // The one that runs becomes nothing else, and what its package says counts.
    assert_eq!(accept(&package(5, 1)).as_ref(), Ok(&kept));
    let floor = Some(v("0.5.0"));
    assert_eq!(
        accept(&package(5, 5)).map(|next| next
            == Kept {
                floor,
                ..kept.clone()
            }),
        Ok(true)
    );
    let older = accept(&package(4, 1)).unwrap();
    assert_eq!((runs(&older), &older.floor), (Some(4), &Some(v("0.4.0"))));
    let on_trial = older.accept(&package(6, 1), running, &v("0.1.0"));
    assert!(matches!(on_trial, Err(NotTaken::OnTrial(_))));
}

#[test]
fn an_agent_that_could_not_be_begun_is_not_gone_back_to_below_the_floor_and_may_come_again() {
    let kept = taken(&taken(&Kept::default(), 2, 1).confirmed(), 3, 1).confirmed();
    let again = kept.accept(&package(3, 1), IMAGE, &v("0.1.0")).unwrap();
    assert_eq!((runs(&again), &again.previous), (Some(3), &kept.previous));
    let mut own = package(4, 4);
    own.digest = IMAGE.0;
    let kept = kept.accept(&own, IMAGE, &v("0.1.0")).unwrap();
    assert_eq!((runs(&kept), kept.floor), (None, Some(v("0.4.0"))));
}

#[test]
fn an_image_that_became_newer_is_the_agent_and_one_that_was_so_already_is_not() {
    let kept = taken(&Kept::default(), 2, 1).confirmed();
    for (image, run) in [
        ("0.1.0", Some(2)),
        ("0.1.1", Some(2)),
        ("0.2.0", Some(2)),
        ("0.2.1", None),
    ] {
        let (next, _) = kept.start(&v(image), &now(0), LIMIT_MS);
        assert_eq!(runs(&next), run, "{image}");
        assert_eq!(next.floor, kept.floor);
    }
    // An order for one that is older than the image's was meant so.
    let image = v("0.9.0");
    let older = Kept::default().accept(&package(2, 1), IMAGE, &image);
    let (kept, run) = older.unwrap().start(&image, &now(0), LIMIT_MS);
    assert_eq!(run.map(|i| i.version), Some(v("0.2.0")));
    assert_eq!(
        kept.confirmed().start(&v("0.9.1"), &now(0), LIMIT_MS).1,
        None
    );
}

#[test]
fn what_is_damaged_is_replaced_by_what_there_is() {
    let kept = taken(&taken(&Kept::default(), 2, 1).confirmed(), 3, 1);
    let once = kept.damaged("cut");
    assert_eq!(
        (runs(&once), once.failed.as_ref().unwrap().what),
        (Some(2), What::Damaged)
    );
    assert_eq!(runs(&once.damaged("cut")), None);
    // Also where only the image's is left, and that is below the floor: somebody has to serve.
    let high = taken(&Kept::default(), 3, 3).damaged("cut");
    assert_eq!((runs(&high), high.floor), (None, Some(v("0.3.0"))));
}

#[test]
fn what_is_kept_has_golden_bytes_and_skips_what_a_newer_agent_wrote() {
    let mut kept = taken(&Kept::default(), 2, 1);
    start(&mut kept, 5);
    let digest = "02".repeat(32);
    let text = format!(
        "{{\"floor\":\"0.1.0\",\"current\":{{\"installed\":{{\"version\":\"0.2.0\",\"digest\":\"{digest}\"}},\
         \"beside\":\"0.1.0\",\"trial\":{{\"starts\":1,\"began\":{{\"boot\":\"b\",\"at_ms\":5}}}}}},\
         \"previous\":null,\"failed\":null}}"
    );
    assert_eq!(serde_json::to_string(&kept).unwrap(), text);
    let newer = text.replacen('{', "{\"more\":[1],", 1);
    assert_eq!(serde_json::from_str::<Kept>(&newer).unwrap(), kept);
    assert_eq!(serde_json::from_str::<Kept>("{}").unwrap(), Kept::default());
}

#[derive(Clone, Debug)]
enum Event {
    Order(u64, u64),
    Start(u64),
    Hello,
    Damage,
    NextBoot,
    Image(u64),
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        (1..9_u64, 0..9_u64).prop_map(|(v, f)| Event::Order(v, f.min(v))),
        (0..2 * LIMIT_MS).prop_map(Event::Start),
        Just(Event::Hello),
        Just(Event::Damage),
        Just(Event::NextBoot),
        (1..9_u64).prop_map(Event::Image),
    ]
}

proptest! {
    /// Whatever happens: the floor never falls, nothing below it is begun or gone back to unless something was damaged or the
    /// image itself is so, and one on trial is begun at most `STARTS_MAX` times where there is a way back.
    #[test]
    fn r132_no_order_of_events_leads_below_the_floor(events in vec(event(), 0..40)) {
        let (mut kept, mut image, mut at, mut boot) = (Kept::default(), Version::new(0, 1, 0), 0, 0);
        for event in events {
            let before = kept.clone();
            let running = kept.current.as_ref().map_or(IMAGE, |c| c.installed.digest);
            match event {
                Event::Order(version, floor) => {
                    let package = package(version, floor);
                    match kept.accept(&package, running, &image) {
                        Ok(next) => {
                            prop_assert!(before.may_run(&package.version));
                            kept = next;
                        }
                        Err(NotTaken::BelowFloor(_)) => prop_assert!(!before.may_run(&package.version)),
                        Err(_) => {}
                    }
                }
                Event::Start(after) => {
                    at += after;
                    let time = Now { boot: boot.to_string(), at_ms: at };
                    let (next, run) = kept.start(&image, &time, LIMIT_MS);
                    kept = next;
                    if let Some(run) = &run {
                        prop_assert!(kept.may_run(&run.version));
                    } else if before.is_on_trial() && kept.failed != before.failed {
                        prop_assert!(kept.may_run(&image), "taken back below the floor");
                    }
                    let starts = kept.current.as_ref().and_then(|c| c.trial.as_ref()).map_or(0, |t| t.starts);
                    prop_assert!(starts <= STARTS_MAX);
                }
                Event::Hello => kept = kept.confirmed(),
                Event::Damage => kept = kept.damaged("x"),
                Event::NextBoot => (boot, at) = (boot + 1, 0),
                Event::Image(minor) => image = Version::new(0, minor, 0),
            }
            prop_assert!(kept.floor >= before.floor);
        }
    }
}
