//! Where each value of a draft is in its text. A mistake that only the checks find gets the value's own line and column,
//! and one that the parser finds at a line and column gets the value's key.

use std::collections::BTreeMap;
use std::fmt;

use serde::de::{Error, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_saphyr::Spanned;

/// A value's place and those of the values in it.
#[derive(Deserialize)]
#[serde(transparent)]
pub(super) struct Place(Spanned<Inner>);

/// What a value holds.
enum Inner {
    Map(BTreeMap<String, Place>),
    List(Vec<Place>),
    Scalar,
}

impl Place {
    /// Line and column of the value at a path such as `steps[2].file.path`; of the nearest one around it if it is not
    /// there.
    pub(super) fn find(&self, path: &str) -> (u64, u64) {
        let mut at = self;
        for part in path.split(['.', '[']) {
            let next = match &at.0.value {
                Inner::Map(map) => map.get(part),
                Inner::List(list) => part
                    .strip_suffix(']')
                    .and_then(|n| list.get(n.parse::<usize>().ok()?)),
                Inner::Scalar => None,
            };
            match next {
                Some(inner) => at = inner,
                None => break,
            }
        }
        (at.0.referenced.line(), at.0.referenced.column())
    }
}

impl Place {
    /// The path of the value that begins at a line and column; none if no value does.
    pub(super) fn at(&self, place: (u64, u64)) -> Option<String> {
        let inside = |inner: &Self, step: String| {
            let rest = inner.at(place)?;
            let dot = if rest.is_empty() || rest.starts_with('[') {
                ""
            } else {
                "."
            };
            Some(format!("{step}{dot}{rest}"))
        };
        let found = match &self.0.value {
            Inner::Map(map) => map.iter().find_map(|(key, v)| inside(v, key.clone())),
            Inner::List(list) => {
                let mut each = list.iter().enumerate();
                each.find_map(|(n, v)| inside(v, format!("[{n}]")))
            }
            Inner::Scalar => None,
        };
        let here = &self.0.referenced;
        found.or_else(|| ((here.line(), here.column()) == place).then(String::new))
    }
}

impl<'de> Deserialize<'de> for Inner {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        d.deserialize_any(InnerVisitor)
    }
}

struct InnerVisitor;

impl<'de> Visitor<'de> for InnerVisitor {
    type Value = Inner;
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any value")
    }
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Inner, A::Error> {
        let mut out = BTreeMap::new();
        while let Some((key, place)) = map.next_entry()? {
            out.insert(key, place);
        }
        Ok(Inner::Map(out))
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Inner, A::Error> {
        let mut out = Vec::new();
        while let Some(place) = list.next_element()? {
            out.push(place);
        }
        Ok(Inner::List(out))
    }
    fn visit_bool<E: Error>(self, _: bool) -> Result<Inner, E> {
        Ok(Inner::Scalar)
    }
    fn visit_i64<E: Error>(self, _: i64) -> Result<Inner, E> {
        Ok(Inner::Scalar)
    }
    fn visit_i128<E: Error>(self, _: i128) -> Result<Inner, E> {
        Ok(Inner::Scalar)
    }
    fn visit_u64<E: Error>(self, _: u64) -> Result<Inner, E> {
        Ok(Inner::Scalar)
    }
    fn visit_u128<E: Error>(self, _: u128) -> Result<Inner, E> {
        Ok(Inner::Scalar)
    }
    fn visit_f64<E: Error>(self, _: f64) -> Result<Inner, E> {
        Ok(Inner::Scalar)
    }
    fn visit_str<E: Error>(self, _: &str) -> Result<Inner, E> {
        Ok(Inner::Scalar)
    }
    fn visit_bytes<E: Error>(self, _: &[u8]) -> Result<Inner, E> {
        Ok(Inner::Scalar)
    }
    fn visit_unit<E: Error>(self) -> Result<Inner, E> {
        Ok(Inner::Scalar)
    }
    fn visit_none<E: Error>(self) -> Result<Inner, E> {
        Ok(Inner::Scalar)
    }
    fn visit_some<D: Deserializer<'de>>(self, d: D) -> Result<Inner, D::Error> {
        IgnoredAny::deserialize(d).map(|_| Inner::Scalar)
    }
}
