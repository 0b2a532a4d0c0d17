//! Structs that come as JSON objects only. serde's derived readers take an array of the fields in order as well: a second
//! spelling in which no key says what a value is, and in which "unknown" and "duplicate" mean nothing (R87).

use std::fmt;
use std::marker::PhantomData;

use serde::de::value::MapAccessDeserializer;
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer};

/// A `T` that was written as an object.
pub(crate) struct Object<T>(pub(crate) T);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Object<T> {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct Fields<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for Fields<T> {
            type Value = T;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<T, A::Error> {
                T::deserialize(MapAccessDeserializer::new(map))
            }
        }
        d.deserialize_map(Fields(PhantomData)).map(Self)
    }
}

/// For a field: `#[serde(deserialize_with = "object::one")]`.
pub(crate) fn one<'de, D: Deserializer<'de>, T: Deserialize<'de>>(d: D) -> Result<T, D::Error> {
    Object::deserialize(d).map(|Object(t)| t)
}

/// For a field that is left out where there is none; `null` is refused.
pub(crate) fn some<'de, D: Deserializer<'de>, T: Deserialize<'de>>(
    d: D,
) -> Result<Option<T>, D::Error> {
    one(d).map(Some)
}

/// For a list of them.
pub(crate) fn list<'de, D: Deserializer<'de>, T: Deserialize<'de>>(
    d: D,
) -> Result<Vec<T>, D::Error> {
    Ok(Vec::<Object<T>>::deserialize(d)?
        .into_iter()
        .map(|Object(t)| t)
        .collect())
}

/// [`shown`], in the words of whoever wrote the text that was parsed.
pub(crate) fn shown_plain(message: &impl fmt::Display) -> String {
    shown(&crate::plain(&message.to_string()))
}

/// A message that quotes what a peer sent: no control byte, at most 512 characters (R72).
pub(crate) fn shown(message: &impl fmt::Display) -> String {
    adit_names::escape(&message.to_string())
        .at_most(512)
        .to_string()
}
