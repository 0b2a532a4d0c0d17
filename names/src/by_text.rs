//! Serde for a type whose form on the wire, in JSON and in TOML is its text.

/// Has a type serialized as its `Display` and deserialized by its `FromStr`, so that no value comes in unchecked.
#[macro_export]
macro_rules! serde_by_text {
    ($type:ty) => {
        impl $crate::__serde::Serialize for $type {
            fn serialize<S: $crate::__serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
                to.collect_str(self)
            }
        }

        impl<'de> $crate::__serde::Deserialize<'de> for $type {
            fn deserialize<D: $crate::__serde::Deserializer<'de>>(
                from: D,
            ) -> Result<Self, D::Error> {
                let text = <String as $crate::__serde::Deserialize>::deserialize(from)?;
                text.parse()
                    .map_err(<D::Error as $crate::__serde::de::Error>::custom)
            }
        }
    };
}

#[cfg(test)]
mod tests {
    use crate::{ServiceName, VmId};

    #[test]
    fn a_name_is_its_text_on_the_wire_and_nothing_else_becomes_one() {
        let vm: VmId = "web-1".parse().unwrap();
        let bytes = postcard::to_stdvec(&vm).unwrap();
        assert_eq!(bytes, [&[5][..], b"web-1"].concat());
        assert_eq!(postcard::from_bytes::<VmId>(&bytes).unwrap(), vm);
        assert_eq!(serde_json::to_string(&vm).unwrap(), "\"web-1\"");
        assert_eq!(serde_json::from_str::<VmId>("\"web-1\"").unwrap(), vm);
        assert_eq!(
            postcard::to_stdvec(&ServiceName::tcp(80)).unwrap(),
            [&[6][..], b"tcp:80"].concat()
        );
        for bad in ["\"\"", "\"Web\"", "\"../a\"", "3", "null", "[\"a\"]"] {
            assert!(serde_json::from_str::<VmId>(bad).is_err(), "{bad}");
            assert!(
                serde_json::from_str::<ServiceName>(&bad.replace("..", " ")).is_err(),
                "{bad}"
            );
        }
    }
}
