//! What is still open in a VM to which nothing new goes. Pure.

use std::fmt;

/// What is open.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StillOpen {
    /// Tunnels: streams that somebody has opened by way of this host.
    pub tunnels: u32,
    /// Requests that aditd works for.
    pub requests: usize,
    /// Tasks that the guest has.
    pub tasks: u32,
}

impl StillOpen {
    /// Whether nothing is.
    pub fn is_nothing(self) -> bool {
        self == Self::default()
    }
}

/// `2 tunnels and 1 task`.
impl fmt::Display for StillOpen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let many = |n: u64, one: &str| match n {
            0 => None,
            1 => Some(format!("1 {one}")),
            n => Some(format!("{n} {one}s")),
        };
        let parts = [
            many(self.tunnels.into(), "tunnel"),
            many(self.requests as u64, "request"),
            many(self.tasks.into(), "task"),
        ];
        let parts: Vec<_> = parts.into_iter().flatten().collect();
        match parts.split_last() {
            None => f.write_str("nothing"),
            Some((last, [])) => f.write_str(last),
            Some((last, others)) => write!(f, "{} and {last}", others.join(", ")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_open_is_said_in_words_and_what_is_not_is_left_out() {
        let open = |tunnels, requests, tasks| StillOpen {
            tunnels,
            requests,
            tasks,
        };
        for (open, said) in [
            (open(0, 0, 0), "nothing"),
            (open(1, 0, 0), "1 tunnel"),
            (open(2, 0, 1), "2 tunnels and 1 task"),
            (open(1, 3, 2), "1 tunnel, 3 requests and 2 tasks"),
        ] {
            assert_eq!(open.to_string(), said);
            assert_eq!(open.is_nothing(), said == "nothing");
        }
    }
}
