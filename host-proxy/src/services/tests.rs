//! Which service a hello gets, whatever it says.

use adit_channel::hello::TAIL_MAX;
use proptest::prelude::*;

use super::*;

/// A service whose names begin with a prefix.
struct Prefixed(&'static str);

impl Service for Prefixed {
    fn form(&self) -> &'static str {
        self.0
    }

    fn takes(&self, name: &ServiceName) -> bool {
        name.as_str().starts_with(self.0)
    }

    fn allow(&self, _: &Open, _: Class) -> Result<(), Refusal> {
        Ok(())
    }

    fn run(&self, _: Call, _: Socket) -> BoxFuture<'static, io::Result<()>> {
        Box::pin(async { Ok(()) })
    }
}

fn open(service: &str) -> Open {
    Open::new(service.parse().unwrap(), Common::default())
}

/// The form of the service that it gets, or the class of the refusal.
fn chosen(services: &[&dyn Service], open: &Open, class: Class) -> Result<&'static str, Code> {
    let chosen = choose(services, open, class);
    chosen.map(|s| s.form()).map_err(|refusal| refusal.code())
}

#[test]
fn only_a_privileged_port_gets_tasks() {
    for (port, got) in [
        (0, Ok("tasks")),
        (742, Ok("tasks")),
        (1023, Ok("tasks")),
        (1024, Err(Code::Denied)),
        (u32::MAX, Err(Code::Denied)),
    ] {
        let open = open("tasks");
        assert_eq!(chosen(&SERVICES, &open, Class::of(port)), got, "{port}");
    }
}

#[test]
fn an_unknown_service_is_refused_with_those_that_there_are() {
    let longest = "t".repeat(ServiceName::MAX);
    for name in ["task", "tasks:", "tasks:1", "tcp:80", "ping", &longest] {
        let refused = choose(&SERVICES, &open(name), Class::Agent);
        let refused = refused.map(|s| s.form()).unwrap_err();
        assert_eq!(refused.code(), Code::UnknownService, "{name}");
        assert_eq!(refused.text(), "the host serves `tasks` here");
    }
}

#[test]
fn a_version_that_nobody_speaks_is_said_before_the_service_is() {
    let open = Open {
        version_min: 7,
        version_max: 9,
        ..open("nobody")
    };
    assert_eq!(chosen(&SERVICES, &open, Class::Agent), Err(Code::Version));
}

/// What a hello carries besides is the service's to read: none of it changes which one it is.
#[test]
fn a_hello_with_as_many_extensions_as_fit_gets_the_same_service() {
    let bare = Hello::Open(open("tasks")).encode();
    for extension in [vec![], vec![7; 4]] {
        let mut bytes = bare.clone();
        let mut tail = usize::from(bytes[10]);
        while tail + 4 + extension.len() <= TAIL_MAX {
            bytes.extend_from_slice(&[0x33, 0x44, extension.len() as u8, 0]);
            bytes.extend_from_slice(&extension);
            tail += 4 + extension.len();
        }
        bytes[10..12].copy_from_slice(&(tail as u16).to_le_bytes());
        let Hello::Open(open) = hello::read(&mut &bytes[..]).unwrap() else {
            panic!("not an open")
        };
        assert_eq!(chosen(&SERVICES, &open, Class::Agent), Ok("tasks"));
    }
}

fn name() -> impl Strategy<Value = String> {
    prop_oneof![
        "[a-z0-9:._-]{1,64}",
        "(tasks|expose|pki|tcp)[a-z0-9:._-]{0,58}"
    ]
}

proptest! {
    #[test]
    fn no_name_belongs_to_two_services(name in name()) {
        let name: ServiceName = name.parse().unwrap();
        prop_assert!(SERVICES.iter().filter(|s| s.takes(&name)).count() <= 1);
    }

    #[test]
    fn the_order_of_the_services_means_nothing(name in name(), turn in 0..4_usize) {
        let all: [&dyn Service; 4] =
            [&tasks::Tasks, &Prefixed("expose:"), &Prefixed("pki:"), &Prefixed("tcp:")];
        let mut turned = all;
        turned.rotate_left(turn);
        let open = open(&name);
        prop_assert_eq!(
            chosen(&all, &open, Class::Agent),
            chosen(&turned, &open, Class::Agent)
        );
    }
}
