//! `PROGRAM --man-pages DIR`: the program's manual pages, for whoever packages it. They are made from what `--help` prints, so
//! neither can say what the other does not.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use clap::Command;
use clap_mangen::Man;
use clap_mangen::roff::{Roff, roman};

/// The first argument that asks for them. It is in no help: `cargo xtask package` uses it.
const ASKS: &str = "--man-pages";

/// The directory to write them to, if that is all that the command line asks for.
pub fn asked() -> Option<PathBuf> {
    let mut args = std::env::args_os().skip(1);
    let (asks, dir, end) = (args.next()?, args.next()?, args.next());
    (asks == ASKS && end.is_none()).then(|| dir.into())
}

/// Writes a page for a program and one for each of its commands, `adit-vm-ls.1` for instance.
///
/// # Errors
/// A page cannot be written.
pub fn write(command: Command, dir: &Path) -> io::Result<()> {
    let mut command = command.disable_help_subcommand(true);
    // `adit` is for everybody; the others are run by whoever administers host or guest.
    let section = if command.get_name() == "adit" {
        "1"
    } else {
        "8"
    };
    command.build();
    let version = command.get_version().unwrap_or_default();
    let source = format!("{} {version}", command.get_name());
    pages(&command, section, &source, dir)
}

fn pages(command: &Command, section: &str, source: &str, dir: &Path) -> io::Result<()> {
    for below in command.get_subcommands().filter(|c| !c.is_hide_set()) {
        pages(below, section, source, dir)?;
    }
    let extra = command
        .get_after_long_help()
        .or_else(|| command.get_after_help());
    let extra = extra.map(ToString::to_string);
    let page = command.clone().after_help(None::<&str>);
    let page = Man::new(page.after_long_help(None::<&str>));
    let page = page.section(section).source(source).manual("adit");
    let mut file = fs::File::create(dir.join(page.get_filename()))?;
    page.render(&mut file)?;
    if let Some(extra) = extra {
        examples(&extra).to_writer(&mut file)?;
    }
    file.flush()
}

/// What follows the options in `--help`, line by line: it has examples and tables.
fn examples(text: &str) -> Roff {
    let mut roff = Roff::new();
    roff.control("SH", ["NOTES"]).control("nf", []);
    for line in text.lines() {
        roff.text([roman(line)]);
    }
    roff.control("fi", []);
    roff
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_command_has_a_page_with_its_options_and_examples_as_they_are_typed() {
        let dir = tempfile::tempdir().unwrap();
        let ls = Command::new("ls")
            .about("List them")
            .after_help("Examples:\n  tool ls  # 'all' of them\n.strange");
        let hidden = Command::new("worker").hide(true);
        let tool = Command::new("tool")
            .version("1.2")
            .subcommands([ls, hidden]);
        write(tool, dir.path()).unwrap();
        let mut names: Vec<_> = fs::read_dir(dir.path())
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        assert_eq!(names, ["tool-ls.8", "tool.8"]);
        let page = fs::read_to_string(dir.path().join("tool-ls.8")).unwrap();
        let notes = page.split_once(".SH NOTES").unwrap().1;
        assert!(page.contains("\"tool 1.2\""), "{page}");
        assert!(notes.contains(".nf\n"), "{notes}");
        assert!(notes.contains("  tool ls  # "), "{notes}");
        // A line that begins with a dot would be a command of the formatter.
        assert!(!notes.contains("\n.strange"), "{notes}");
    }
}
