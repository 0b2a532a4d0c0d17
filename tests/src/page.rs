//! Commands on the pages of the documentation: what a reader types is what a test runs.
//!
//! In a fenced block of `sh`, a line that begins with `$ ` is a command. It goes on over lines that end with `\`, and over a
//! here-document. `# exit status N` at its end says what it ends with where that is not 0. The lines after it are what it
//! prints: they must come in that order, other lines may come between them, and `…` in one stands for any text.
//! `<!-- not run: REASON -->` on the line before a block leaves the block out.

/// One command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Command {
    /// Line on the page, from 1.
    pub line: usize,
    /// What is typed.
    pub text: String,
    /// What it prints, as far as the page shows it.
    pub shown: Vec<String>,
    /// The exit status that the page names, or 0.
    pub exit: i32,
    /// Why no test runs it.
    pub not_run: Option<String>,
}

const NOT_RUN: &str = "<!-- not run: ";
const EXIT: &str = "# exit status ";

/// Finds all commands of a page, in their order.
pub fn commands(page: &str) -> Vec<Command> {
    let mut found: Vec<Command> = Vec::new();
    let mut lines = page.lines().zip(1..).peekable();
    let (mut in_block, mut not_run, mut before) = (false, None, "");
    while let Some((line, number)) = lines.next() {
        if line.starts_with("```") {
            in_block = !in_block && line == "```sh";
            let reason = before.strip_prefix(NOT_RUN);
            not_run = reason.map(|r| r.trim_end_matches("-->").trim().to_owned());
        } else if let Some(text) = line.strip_prefix("$ ").filter(|_| in_block) {
            let mut text = text.to_owned();
            let end = here_document(&text);
            loop {
                let last = text.lines().last().unwrap_or_default();
                let whole = match &end {
                    Some(end) => last == end,
                    None => !last.ends_with('\\'),
                };
                let next = if whole { None } else { lines.next() };
                let Some((next, _)) = next else { break };
                text = text + "\n" + next;
            }
            let exit = text.rsplit_once(EXIT).map_or("0", |(_, n)| n.trim());
            found.push(Command {
                line: number,
                exit: exit.parse().unwrap_or(0),
                text,
                shown: Vec::new(),
                not_run: not_run.clone(),
            });
        } else if let (true, Some(command)) = (in_block, found.last_mut()) {
            command.shown.push(line.to_owned());
        }
        before = line;
    }
    found
}

/// The word that ends a command's here-document, if it has one.
fn here_document(text: &str) -> Option<String> {
    let (_, word) = text.split_once("<<")?;
    let word = word.split_whitespace().next()?;
    Some(word.trim_matches('\'').to_owned())
}

/// Returns the first line of `shown` that does not come in `said` when it should.
pub fn missing<'a>(shown: &'a [String], said: &str) -> Option<&'a str> {
    let mut said = said.lines().map(words);
    let mut shown = shown.iter().filter(|l| !matches!(l.trim(), "" | "…"));
    shown
        .find(|wanted| !said.any(|line| fits(&words(wanted), &line)))
        .map(String::as_str)
}

/// Columns are padded to the longest: one space counts as many.
fn words(line: &str) -> String {
    line.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Whether a line is as shown, `…` being any text, or none.
fn fits(shown: &str, line: &str) -> bool {
    let Some((head, rest)) = shown.split_once('…') else {
        return shown == line;
    };
    let Some(line) = line.strip_prefix(head.trim_end()) else {
        return false;
    };
    let ends = line.char_indices().map(|(at, _)| at).chain([line.len()]);
    ends.into_iter()
        .any(|at| fits(rest.trim_start(), &line[at..]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_have_their_lines_outputs_and_reasons() {
        let page = "text\n\n```sh\n$ one \\\n      two\nsays …\n$ cat > f <<'END'\n[a]\nEND\n$ no  # exit status 4\n```\n\
                    ```toml\n$ not a command\n```\n<!-- not run: takes an hour -->\n```sh\n$ build\n```\n";
        let all = commands(page);
        let texts: Vec<&str> = all.iter().map(|c| c.text.as_str()).collect();
        let here = "cat > f <<'END'\n[a]\nEND";
        assert_eq!(
            texts,
            ["one \\\n      two", here, "no  # exit status 4", "build"]
        );
        assert_eq!(
            (all[0].line, all[0].shown.as_slice()),
            (4, &["says …".to_owned()][..])
        );
        assert_eq!((all[1].exit, all[2].exit), (0, 4));
        assert_eq!(all[3].not_run.as_deref(), Some("takes an hour"));
        assert!(all[..3].iter().all(|c| c.not_run.is_none()));
    }

    #[test]
    fn shown_lines_come_in_their_order_with_anything_between_them() {
        let shown = |lines: &[&str]| lines.iter().map(|l| (*l).to_owned()).collect::<Vec<_>>();
        let said = "VM     CID  STATE\nweb-1  3    ready\nweb-2  4    waiting\n";
        assert_eq!(missing(&shown(&["VM CID …", "web-2  4 …ing"]), said), None);
        assert_eq!(missing(&shown(&["…", ""]), said), None);
        assert_eq!(
            missing(&shown(&["web-2 …", "web-1 …"]), said),
            Some("web-1 …")
        );
        assert_eq!(missing(&shown(&["web-1 3 up"]), said), Some("web-1 3 up"));
        assert_eq!(missing(&shown(&["web-1 … ready"]), said), None);
        assert_eq!(missing(&shown(&["web-1 … ready"]), "web-1 ready"), None);
    }
}
