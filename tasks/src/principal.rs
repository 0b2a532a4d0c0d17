//! Users and groups as a goal writes them: a name, or a number in digits only.

/// A user or a group, as a step names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Principal<'a> {
    /// By number. Never 2^32 - 1, which means "do not change" to the kernel.
    Number(u32),
    /// By name, to be looked up in the guest.
    Name(&'a str),
}

impl<'a> Principal<'a> {
    /// Reads digits as a number and anything else as a name; `None` if it is neither.
    pub fn parse(text: &'a str) -> Option<Self> {
        let first = text.bytes().next()?;
        if text.bytes().all(|b| b.is_ascii_digit()) {
            let number = text.parse().ok().filter(|&n: &u32| n != u32::MAX);
            return number.map(Self::Number);
        }
        // `+5` and `-1` are meant as numbers, and no system has such a name.
        let odd = |c: char| c.is_control() || c.is_whitespace() || matches!(c, ':' | '/' | ',');
        (!matches!(first, b'+' | b'-') && !text.contains(odd)).then_some(Self::Name(text))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Goal;
    use crate::goal::GoalError;

    #[test]
    fn r113_an_owner_is_a_name_or_a_number_that_means_somebody() {
        for good in [
            "root",
            "0",
            "005",
            "4294967294",
            "www-data",
            "dom.user",
            "a+b",
        ] {
            assert!(Principal::parse(good).is_some(), "{good}");
        }
        let bad = [
            "",
            "+5",
            "-1",
            "+",
            "4294967295",
            "4294967296",
            "99999999999999999999",
        ];
        for bad in bad.into_iter().chain(["a b", "a:b", "a/b", "a\n", " 5"]) {
            assert_eq!(Principal::parse(bad), None, "{bad}");
            for key in ["owner", "group"] {
                let mut goal: serde_json::Value =
                    serde_json::from_str(crate::goal::tests::GOOD).unwrap();
                goal["steps"][1]["file"][key] = bad.into();
                let parsed = Goal::parse_unverified(goal.to_string().as_bytes());
                let Err(GoalError::Value { key: at, .. }) = parsed else {
                    panic!("{key} {bad:?} is taken")
                };
                assert_eq!(at, format!("steps[1].file.{key}"));
            }
        }
    }
}
