//! Schemas that say more than the types do.

use utoipa::openapi::schema::{ArrayBuilder, ObjectBuilder, SchemaType, Type};
use utoipa::openapi::{RefOr, Schema};

/// Most ports of a list.
const PORTS_MAX: usize = 1024;

/// Most services of a list.
const SERVICES_MAX: usize = 64;

/// Ports between these.
fn numbers(min: u64, max: u64) -> RefOr<Schema> {
    let number = ObjectBuilder::new()
        .schema_type(Type::Integer)
        .minimum(Some(min))
        .maximum(Some(max));
    ArrayBuilder::new()
        .items(number)
        .max_items(Some(PORTS_MAX))
        .into()
}

/// The same or `null`, where nothing is changed.
fn or_null(schema: RefOr<Schema>) -> RefOr<Schema> {
    match schema {
        RefOr::T(Schema::Array(mut array)) => {
            array.schema_type = SchemaType::from_iter([Type::Array, Type::Null]);
            array.into()
        }
        other => other,
    }
}

/// [`ports`] of a change.
pub(crate) fn new_ports() -> RefOr<Schema> {
    or_null(ports())
}

/// [`vsock_ports`] of a change.
pub(crate) fn new_vsock_ports() -> RefOr<Schema> {
    or_null(vsock_ports())
}

/// TCP ports.
pub(crate) fn ports() -> RefOr<Schema> {
    numbers(1, u16::MAX.into())
}

/// AF_VSOCK ports. The last number means any port.
pub(crate) fn vsock_ports() -> RefOr<Schema> {
    numbers(0, u64::from(u32::MAX) - 1)
}

/// Names of services.
pub(crate) fn services() -> RefOr<Schema> {
    let name = ObjectBuilder::new()
        .schema_type(Type::String)
        .pattern(Some("^[a-z0-9]([a-z0-9-]{0,58}[a-z0-9])?$"));
    ArrayBuilder::new()
        .items(name)
        .max_items(Some(SERVICES_MAX))
        .into()
}

/// [`services`] of a change.
pub(crate) fn new_services() -> RefOr<Schema> {
    or_null(services())
}

/// One of these names.
pub(crate) fn names<const N: usize>(names: [&'static str; N]) -> RefOr<Schema> {
    ObjectBuilder::new()
        .schema_type(SchemaType::Type(Type::String))
        .enum_values(Some(names))
        .into()
}
