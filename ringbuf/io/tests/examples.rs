//! The examples for VMM authors and for guests run together.

use std::process::Command;

#[test]
fn the_two_examples_exchange_records() {
    let mut path = std::env::current_exe().unwrap();
    path.pop();
    path.pop();
    let mut command = Command::new(path.join("examples/link_the_ring"));
    let out = command.output().expect("cargo test builds examples");
    let said = String::from_utf8_lossy(&out.stdout);
    let errors = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{said}{errors}");
    assert!(said.contains("10000 records echoed"), "{said}{errors}");
    assert!(said.contains("lost: Closed"), "{said}{errors}");
}
