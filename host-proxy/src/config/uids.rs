//! A range of user ids, as `uids` of `[ports]` has it.

/// User ids, and group ids of the same numbers, that nothing else on the host uses: `FIRST-LAST`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UidRange {
    first: u32,
    last: u32,
}

/// `nobody`, on every system.
const UID_NOBODY: u32 = 65_534;

impl UidRange {
    /// The lowest.
    pub fn first(self) -> u32 {
        self.first
    }

    /// The highest.
    pub fn last(self) -> u32 {
        self.last
    }

    /// Whether it is one of them.
    pub fn contains(self, uid: u32) -> bool {
        (self.first..=self.last).contains(&uid)
    }

    /// All of them.
    pub fn iter(self) -> impl DoubleEndedIterator<Item = u32> {
        self.first..=self.last
    }
}

impl Default for UidRange {
    /// Above what distributions give to users, services and dynamic users (65,535 at most), below what they give to users'
    /// containers (100,000 and more): two for each VM that there may be.
    fn default() -> Self {
        Self {
            first: 70_000,
            last: 78_191,
        }
    }
}

impl std::str::FromStr for UidRange {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let ends = text.split_once('-');
        let ends = ends.and_then(|(a, b)| Some((a.trim().parse().ok()?, b.trim().parse().ok()?)));
        let (first, last) = ends.ok_or("use FIRST-LAST, such as \"70000-78191\"")?;
        let range = Self { first, last };
        if first == 0 || last == u32::MAX || first > last {
            let max = u32::MAX - 1;
            return Err(format!(
                "{range} is not a range of user ids from 1 to {max}"
            ));
        }
        if range.contains(UID_NOBODY) {
            return Err(format!("{range} contains {UID_NOBODY}, the user `nobody`"));
        }
        Ok(range)
    }
}

impl std::fmt::Display for UidRange {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}-{}", self.first, self.last)
    }
}

adit_names::serde_by_text!(UidRange);
