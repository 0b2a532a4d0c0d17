//! Makes the messages of one packet socket from a table: their kinds, how many descriptors each has, and what happens to each
//! in a process of another build that does not know it.

/// Makes two enums, kinds and messages, from a table. A line is `Name = number, descriptors, flags;`, and a type `Name`, the
/// body, must be in scope. Every kind has the version that is given first.
#[macro_export]
macro_rules! message_table {
    (
        version $version:expr;
        $(#[$kinds_doc:meta])* kinds $Kind:ident;
        $(#[$messages_doc:meta])* messages $Message:ident;
        $($(#[$doc:meta])* $kind:ident = $number:literal, $fds:expr, $flags:expr;)*
    ) => {
        $(#[$kinds_doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u16)]
        pub enum $Kind {
            $($(#[$doc])* $kind = $number,)*
        }

        $(#[$messages_doc])*
        #[derive(Clone, Debug, PartialEq, Eq)]
        pub enum $Message {
            $($(#[$doc])* $kind($kind),)*
        }

        impl $Message {
            /// Its kind.
            pub fn kind(&self) -> $Kind {
                match self {
                    $(Self::$kind(_) => $Kind::$kind,)*
                }
            }

            /// How many descriptors it has.
            pub(crate) fn descriptors(&self) -> ::std::ops::RangeInclusive<usize> {
                match self {
                    $(Self::$kind(_) => $fds,)*
                }
            }

            fn encode_body(&self, id: u32) -> Result<Vec<u8>, $crate::frame::FrameError> {
                let kind = self.kind() as u16;
                match self {
                    $(Self::$kind(m) => $crate::frame::encode(kind, $version, id, $flags, m),)*
                }
            }

            /// Returns `None` for an unknown kind.
            fn decode_body(
                header: &$crate::frame::Header,
                body: &[u8],
            ) -> Result<Option<Self>, $crate::frame::FrameError> {
                $(if header.kind == $Kind::$kind as u16 {
                    return header.decode(body).map(Self::$kind).map(Some);
                })*
                Ok(None)
            }
        }
    };
}
