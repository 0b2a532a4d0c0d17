//! Prints figures: one line of a table for people, or one JSON object a line for programs.

use serde::Serialize;

/// Whether more or less is better.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Better {
    /// More is better.
    Higher,
    /// Less is better.
    Lower,
}

/// A measured figure, with a peer's figure of the same run if there is one.
#[derive(Clone, Debug, Serialize)]
pub struct Figure {
    /// What was measured.
    pub name: String,
    /// Unit of `ours` and `peer`.
    pub unit: &'static str,
    /// Median over the rounds.
    pub ours: f64,
    /// The peer's median over the same rounds.
    pub peer: Option<f64>,
    /// The peer's name.
    pub peer_name: Option<&'static str>,
    /// `ours / peer`.
    pub ratio: Option<f64>,
    /// Whether more or less is better.
    pub better: Better,
    /// Goal for the ratio, or for the figure itself without a peer.
    pub must: Option<f64>,
    /// The better value that we aim for.
    pub aim: Option<f64>,
    /// Whether the goal is met.
    pub met: Option<bool>,
    /// Whether the aim is met.
    pub aim_met: Option<bool>,
    /// Number of rounds.
    pub rounds: usize,
}

impl Figure {
    /// A figure without a peer.
    pub fn alone(
        name: impl Into<String>,
        unit: &'static str,
        better: Better,
        rounds: &[f64],
    ) -> Self {
        Self {
            name: name.into(),
            unit,
            ours: median(rounds),
            peer: None,
            peer_name: None,
            ratio: None,
            better,
            must: None,
            aim: None,
            met: None,
            aim_met: None,
            rounds: rounds.len(),
        }
    }

    /// Adds the peer's figure, with goals for the ratio.
    pub fn beside(mut self, peer: &'static str, rounds: &[f64], must: f64, aim: f64) -> Self {
        let theirs = median(rounds);
        // Also of nothing and nothing, which have no quotient.
        let ratio = if self.ours == theirs {
            1.0
        } else {
            self.ours / theirs
        };
        (self.peer, self.peer_name, self.ratio) = (Some(theirs), Some(peer), Some(ratio));
        self.aims(ratio, must, aim)
    }

    /// Sets goals for the figure itself.
    pub fn goal(self, must: f64, aim: f64) -> Self {
        let ours = self.ours;
        self.aims(ours, must, aim)
    }

    fn aims(mut self, value: f64, must: f64, aim: f64) -> Self {
        let reaches = |goal: f64| match self.better {
            Better::Higher => value >= goal,
            // Nothing is less than nothing, whatever the peer has.
            Better::Lower => value <= goal || self.ours == 0.0,
        };
        (self.met, self.aim_met) = (Some(reaches(must)), Some(reaches(aim)));
        (self.must, self.aim) = (Some(must), Some(aim));
        self
    }

    /// Prints it.
    pub fn print(&self, json: bool) {
        if json {
            // It cannot fail: a figure has only numbers and texts.
            println!("{}", serde_json::to_string(self).unwrap_or_default());
            return;
        }
        print!("{:<60} {:>10.1} {:<6}", self.name, self.ours, self.unit);
        if let (Some(peer), Some(name), Some(ratio)) = (self.peer, self.peer_name, self.ratio) {
            print!(" {name} {peer:.1}, ratio {ratio:.3}");
        }
        if let (Some(must), Some(aim)) = (self.must, self.aim) {
            let met = match (self.met, self.aim_met) {
                (_, Some(true)) => "aim met",
                (Some(true), _) => "met",
                _ => "MISSED",
            };
            print!(", must {must}, aim {aim}: {met}");
        }
        println!("  ({} rounds)", self.rounds);
    }
}

/// The median; 0 for no values.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(0.0)
}

/// Shows the progress of the rounds: a bar on a terminal, otherwise only a line at the start.
pub fn rounds(count: u64) -> indicatif::ProgressBar {
    let bar = indicatif::ProgressBar::new(count);
    if bar.is_hidden() {
        eprintln!("measuring, {count} rounds");
    }
    bar.with_message("rounds")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn beside(better: Better, ours: f64, theirs: f64) -> (Option<f64>, Option<bool>, Option<bool>) {
        let figure = Figure::alone("x", "us", better, &[ours]);
        let figure = figure.beside("peer", &[theirs], 1.0, 0.5);
        (figure.ratio, figure.met, figure.aim_met)
    }

    #[test]
    fn a_figure_of_nothing_beside_nothing_has_a_ratio_and_is_as_good_as_can_be() {
        let best = (Some(1.0), Some(true), Some(true));
        assert_eq!(beside(Better::Lower, 0.0, 0.0), best);
        assert_eq!(
            beside(Better::Lower, 3.0, 4.0),
            (Some(0.75), Some(true), Some(false))
        );
        assert_eq!(beside(Better::Lower, 4.0, 3.0).1, Some(false));
        assert_eq!(
            beside(Better::Higher, 0.0, 2.0),
            (Some(0.0), Some(false), Some(false))
        );
    }
}
