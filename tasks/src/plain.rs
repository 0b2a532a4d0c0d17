//! What a parser says, in the words of whoever wrote the file: keys, text, lists, whole numbers. A parser speaks of Rust
//! types (`invalid type: string "x", expected u16`), and those are not what a person wrote.
//!
//! The messages of serde are fixed texts (`serde_core::de::Error`); the parsers of JSON, YAML and TOML add a few of their
//! own. A message that is not known here stays as it is.

/// Says a parser's message again in plain words, on one line. A place at its end (`at line 3 column 4`) stays.
pub fn plain(message: &str) -> String {
    let message = message.trim().replace('\n', " ");
    let (what, place) = match message.rfind(" at line ") {
        Some(at) => message.split_at(at),
        None => (&message[..], ""),
    };
    let text = mismatch(what)
        .or_else(|| keys(what))
        .or_else(|| of_yaml(what));
    text.map_or_else(|| message.clone(), |text| text + place)
}

/// A value of the wrong type, or of the right one and out of range.
fn mismatch(what: &str) -> Option<String> {
    if let Some(rest) = what.strip_prefix("invalid length ") {
        let (len, must) = rest.split_once(", expected ")?;
        return Some(format!("has {len} entries and must be {}", expected(must)));
    }
    if let Some(rest) = what.strip_prefix("unknown variant `") {
        let (is, known) = rest.split_once('`')?;
        return Some(format!("must be {}, not `{is}`", choice(known)?));
    }
    let rest = what.strip_prefix("invalid type: ");
    let rest = rest.or(what.strip_prefix("invalid value: "))?;
    let (is, must) = rest.rsplit_once(", expected ")?;
    Some(format!("must be {}, not {}", expected(must), found(is)))
}

/// A key that is unknown, missing or given twice.
fn keys(what: &str) -> Option<String> {
    if let Some(rest) = what.strip_prefix("unknown field `") {
        let (key, known) = rest.split_once('`')?;
        return Some(match choice(known) {
            Some(known) => format!("unknown key `{key}`; it could be {known}"),
            None => format!("unknown key `{key}`"),
        });
    }
    if let Some(key) = what.strip_prefix("missing field ") {
        return Some(format!("{key} is missing"));
    }
    if let Some(key) = what.strip_prefix("duplicate field ") {
        return Some(format!("{key} is given twice"));
    }
    let rest = what.strip_prefix("duplicate mapping key")?;
    let key = rest.split(", set DuplicateKeyPolicy").next()?;
    Some(match key.strip_prefix(": ") {
        Some(key) => format!("`{key}` is given twice"),
        None => "a key is given twice".into(),
    })
}

/// What only the parser of YAML says.
fn of_yaml(what: &str) -> Option<String> {
    Some(match what {
        "expected mapping start" => "must be a mapping of keys to values".into(),
        "expected sequence start" => "must be a list".into(),
        "unexpected end of input" => "the text ends where a value should be".into(),
        "expected string scalar" => "must be text".into(),
        "cannot deserialize tagged scalar into string" => {
            "must be text, and its tag (`!`) makes it something else".into()
        }
        what if what.starts_with("multiple YAML documents detected") => {
            "there is more than one document (`---`)".into()
        }
        "cannot deserialize null into string; use Option<String>" => {
            "must be text, and there is nothing; write \"\" for empty text".into()
        }
        _ => {
            let of = what.strip_prefix("invalid ")?;
            let known = expected(of);
            (known != of).then(|| format!("must be {known}"))?
        }
    })
}

/// The names after `, expected …`: `one of a, b`, `a or b`, or one.
fn choice(known: &str) -> Option<String> {
    let known = known.strip_prefix(", expected ")?;
    let names = known.strip_prefix("one of ").unwrap_or(known);
    // YAML's parser leaves the quotes out.
    let quoted = |name: &str| format!("`{}`", name.trim().trim_matches('`'));
    let names: Vec<String> = names
        .split(" or ")
        .flat_map(|part| part.split(','))
        .map(quoted)
        .collect();
    let (last, first) = names.split_last()?;
    Some(match first {
        [] => last.clone(),
        first => format!("{} or {last}", first.join(", ")),
    })
}

fn expected(must: &str) -> String {
    let whole = |low: i128, high: i128| format!("a whole number from {low} to {high}");
    match must {
        "u8" => whole(0, u8::MAX.into()),
        "u16" => whole(0, u16::MAX.into()),
        "u32" => whole(0, u32::MAX.into()),
        "u64" | "usize" => whole(0, u64::MAX.into()),
        "i32" => whole(i32::MIN.into(), i32::MAX.into()),
        "i64" => whole(i64::MIN.into(), i64::MAX.into()),
        "f64" => "a number".into(),
        "bool" | "boolean" | "a boolean" => "true or false".into(),
        "a string" | "string" => "text".into(),
        "path string" => "a path".into(),
        "a formatted UUID string" => "a UUID".into(),
        "a sequence" => "a list".into(),
        "a map" => "a mapping of keys to values".into(),
        other if other.starts_with("struct ") => "a mapping of keys to values".into(),
        other => other.into(),
    }
}

fn found(is: &str) -> String {
    // A number that only the widest types hold.
    let wide = [" as i128", " as u128"].iter();
    let is = wide.fold(is, |is, wide| is.strip_suffix(wide).unwrap_or(is));
    let inside = |prefix: &str| Some(is.strip_prefix(prefix)?.strip_suffix('`')?.to_owned());
    match is {
        "unit value" | "null" | "Option value" => "nothing".into(),
        "sequence" => "a list".into(),
        "map" => "a mapping".into(),
        _ => inside("integer `")
            .or_else(|| inside("floating point `"))
            .or_else(|| inside("boolean `"))
            .or_else(|| inside("character `"))
            .or_else(|| Some(format!("the text {}", is.strip_prefix("string ")?)))
            .unwrap_or_else(|| is.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::plain;

    #[test]
    fn a_parsers_words_become_those_of_whoever_wrote_the_file() {
        for (said, want) in [
            (
                "invalid type: string \"a, expected u8\", expected u16",
                "must be a whole number from 0 to 65535, not the text \"a, expected u8\"",
            ),
            (
                "invalid value: integer `70000`, expected u16 at line 3 column 7",
                "must be a whole number from 0 to 65535, not 70000 at line 3 column 7",
            ),
            (
                "invalid type: integer `99999999999999999999` as i128, expected a string",
                "must be text, not 99999999999999999999",
            ),
            (
                "invalid type: map, expected a sequence",
                "must be a list, not a mapping",
            ),
            (
                "invalid type: null, expected struct Audience",
                "must be a mapping of keys to values, not nothing",
            ),
            (
                "unknown field `x`, expected one of `a`, `b`, `c`",
                "unknown key `x`; it could be `a`, `b` or `c`",
            ),
            (
                "unknown field `x`, expected one of a, b",
                "unknown key `x`; it could be `a` or `b`",
            ),
            (
                "unknown field `x`, expected `a` or `b`",
                "unknown key `x`; it could be `a` or `b`",
            ),
            ("unknown field `x`, there are no fields", "unknown key `x`"),
            (
                "unknown variant `ntp`, expected `own` or `host`",
                "must be `own` or `host`, not `ntp`",
            ),
            ("missing field `vm_id`\n", "`vm_id` is missing"),
            ("duplicate field `id`", "`id` is given twice"),
            (
                "duplicate mapping key: id, set DuplicateKeyPolicy in Options if acceptable",
                "`id` is given twice",
            ),
            ("invalid u32", "must be a whole number from 0 to 4294967295"),
            ("invalid escape", "invalid escape"),
            (
                "EOF while parsing at line 1 column 2",
                "EOF while parsing at line 1 column 2",
            ),
        ] {
            assert_eq!(plain(said), want);
        }
    }
}
