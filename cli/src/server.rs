//! Which aditd is asked: the one of this host, by its socket, or one of another host, by its management listener.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

use adit_client::server::{Options, Server, ServerError};
use clap::Args;
use zeroize::Zeroizing;

use crate::client::Client;
use crate::error::Failure;
use crate::proxy::Token;

/// Where aditd listens if nobody says otherwise.
const SOCKET: &str = "/run/adit/aditd.sock";
/// Most bytes of a file of certificates.
const FILE_MAX: u64 = 4 << 20;
/// Heading of the options.
const ELSEWHERE: &str = "An aditd on another host";

/// Which aditd. Its words are not clap's `env` and `default_value`, whose messages would name an option as one that was given.
#[derive(Args, Clone, Default)]
pub struct Which {
    /// Socket of aditd [env: ADIT_SOCKET] [default: /run/adit/aditd.sock]
    #[arg(long, global = true, value_name = "PATH", help_heading = super::EVERYWHERE)]
    socket: Option<PathBuf>,
    /// Address of a management listener (`role = "management"`), https://HOST:PORT [env: ADIT_SERVER]
    #[arg(long, global = true, value_name = "URL", help_heading = ELSEWHERE)]
    server: Option<String>,
    /// PEM file with the certificates of whoever vouches for it; for public ones /etc/ssl/certs/ca-certificates.crt [env: ADIT_CA]
    #[arg(long, global = true, value_name = "FILE", help_heading = ELSEWHERE)]
    ca: Option<PathBuf>,
    /// The key that it must have, sha256/BASE64: alone, or besides --ca [env: ADIT_PIN]
    #[arg(long, global = true, value_name = "PIN", help_heading = ELSEWHERE)]
    pin: Option<String>,
    /// PEM file with our certificate, and its key if --key is not given [env: ADIT_CERT]
    #[arg(long = "cert", id = "server_cert", global = true, value_name = "FILE", help_heading = ELSEWHERE)]
    cert: Option<PathBuf>,
    /// PEM file with the certificate's key [env: ADIT_CERT_KEY]
    #[arg(long = "key", id = "server_key", global = true, value_name = "FILE", help_heading = ELSEWHERE)]
    key: Option<PathBuf>,
    /// File with a token [env: ADIT_TOKEN, with the token itself]
    // The same id as that of the proxy's, which stands in its place with `connect` and `forward`.
    #[arg(long, global = true, value_name = "FILE", help_heading = ELSEWHERE)]
    token_file: Option<PathBuf>,
}

impl Which {
    /// The client, with what the environment has in place of what is not given.
    pub fn client(&self, limit: Duration) -> Result<Client, Failure> {
        let (socket, server) = match (&self.socket, &self.server) {
            (Some(_), Some(_)) => return Err(both("--socket", "--server")),
            (None, None) => match (word("ADIT_SOCKET"), word("ADIT_SERVER")) {
                (Some(_), Some(_)) => return Err(both("ADIT_SOCKET", "ADIT_SERVER")),
                (socket, server) => (socket.map(PathBuf::from), server),
            },
            (socket, server) => (socket.clone(), server.clone().map(OsString::from)),
        };
        let Some(server) = server else {
            if let Some(option) = self.only_elsewhere() {
                let message = format!("{option} is for an aditd on another host");
                return Err(Failure::new("usage", message)
                    .help("say which with --server https://HOST:PORT, or leave it out"));
            }
            let socket = socket.unwrap_or_else(|| SOCKET.into());
            return Ok(Client::new(&socket, limit));
        };
        Ok(Client::of_server(self.server(&text(&server)?)?, limit))
    }

    /// An aditd on another host, for what asks no other: the client of its API, and how it is spoken to.
    pub fn elsewhere(&self, command: &str, limit: Duration) -> Result<(Client, Server), Failure> {
        if self.socket.is_some() {
            let message = format!(
                "`adit {command}` asks an aditd on another host, and --socket is of this one"
            );
            return Err(Failure::new("usage", message).help(
                "say which with --server https://HOST:PORT, and how it is known with --pin or --ca",
            ));
        }
        let server = self
            .server
            .clone()
            .map(OsString::from)
            .or_else(|| word("ADIT_SERVER"));
        let server = server.ok_or_else(|| {
            let message = format!("`adit {command}` needs to know which server to ask");
            Failure::new("usage", message).help(
                "say which with --server https://HOST:PORT, and how it is known with --pin or --ca",
            )
        })?;
        let server = self.server(&text(&server)?)?;
        Ok((Client::of_server(server.clone(), limit), server))
    }

    /// Refuses a server for what goes by the proxy.
    pub fn is_not_asked(&self, command: &str) -> Result<(), Failure> {
        let given = self.server.as_ref().map(|_| "--server");
        // A token is shown to the proxy, too.
        let option = given.or_else(|| self.only_elsewhere());
        let Some(option) = option.filter(|option| *option != "--token-file") else {
            return Ok(());
        };
        let message = format!("`adit {command}` goes by the proxy, and {option} is for the API");
        Err(Failure::new("usage", message).help("say where the proxy is with --proxy"))
    }

    fn only_elsewhere(&self) -> Option<&'static str> {
        [
            (self.ca.is_some(), "--ca"),
            (self.pin.is_some(), "--pin"),
            (self.cert.is_some(), "--cert"),
            (self.key.is_some(), "--key"),
            (self.token_file.is_some(), "--token-file"),
        ]
        .into_iter()
        .find_map(|(is_given, option)| is_given.then_some(option))
    }

    fn server(&self, address: &str) -> Result<Server, Failure> {
        let file = |given: &Option<PathBuf>, variable| {
            let given = given.clone().or_else(|| word(variable).map(PathBuf::from));
            given.map(|path| read(&path)).transpose()
        };
        let ca = file(&self.ca, "ADIT_CA")?;
        let pin = match (&self.pin, word("ADIT_PIN")) {
            (Some(pin), _) => Some(pin.clone()),
            (None, Some(pin)) => Some(text(&pin)?),
            (None, None) => None,
        };
        let cert = file(&self.cert, "ADIT_CERT")?;
        let key = file(&self.key, "ADIT_CERT_KEY")?;
        let identity = match (&cert, &key) {
            (Some(cert), key) => Some((&cert[..], key.as_ref().map_or(&cert[..], |key| &key[..]))),
            (None, None) => None,
            (None, Some(_)) => {
                return Err(
                    Failure::new("usage", "there is a key, and no certificate of it")
                        .help("give it with --cert, or ADIT_CERT"),
                );
            }
        };
        let token = Token::find(self.token_file.as_deref())?;
        let made = Server::new(Options {
            address,
            ca: ca.as_ref().map(|pem| &pem[..]),
            pin: pin.as_deref(),
            identity,
            token: token.as_ref().map(Token::text),
        });
        made.map_err(|e| {
            let help = match e {
                ServerError::NoTrust => {
                    "give the certificates of whoever vouches for it with --ca, or its key with --pin; on its host: \
                     `openssl x509 -in CERT -noout -pubkey | openssl pkey -pubin -outform DER | openssl dgst -sha256 -binary | base64`"
                }
                ServerError::Plain | ServerError::Address => {
                    "its aditd.toml has a [[listen]] with `role = \"management\"`, `cert` and `key`"
                }
                ServerError::Pin => "`openssl dgst -sha256 -binary | base64` of the key as DER, after `sha256/`",
                _ => "",
            };
            let address = match address.contains('@') {
                // It may have a password in it.
                true => "what was given",
                false => address,
            };
            Failure::new("usage", format!("cannot ask the aditd at {address}: {e}")).help(help)
        })
    }

    /// What of it a command line has that is being typed: what is not understood yet is none.
    pub fn of_words(words: &[OsString]) -> Self {
        let given = |option: &str| {
            let mut words = words.iter();
            while let Some(word) = words.next() {
                if word == option {
                    return words.next().cloned();
                }
                let whole = word.to_str().and_then(|word| word.strip_prefix(option));
                if let Some(value) = whole.and_then(|rest| rest.strip_prefix('=')) {
                    return Some(value.into());
                }
            }
            None
        };
        let path = |option| given(option).map(PathBuf::from);
        let word = |option| given(option).and_then(|word| word.into_string().ok());
        Self {
            socket: path("--socket"),
            server: word("--server"),
            ca: path("--ca"),
            pin: word("--pin"),
            cert: path("--cert"),
            key: path("--key"),
            token_file: path("--token-file"),
        }
    }
}

fn both(one: &str, other: &str) -> Failure {
    let message = format!("{one} and {other} name two different aditds");
    Failure::new("usage", message).help("say which is meant: --socket PATH, or --server URL")
}

/// What the environment says; empty is nothing.
fn word(variable: &str) -> Option<OsString> {
    std::env::var_os(variable).filter(|word| !word.is_empty())
}

fn text(word: &OsStr) -> Result<String, Failure> {
    let text = word.to_str().map(str::to_owned);
    text.ok_or_else(|| Failure::new("usage", "an address or a pin is not UTF-8"))
}

/// A file of certificates or of a key.
fn read(path: &Path) -> Result<Zeroizing<Vec<u8>>, Failure> {
    let mut bytes = Zeroizing::new(Vec::new());
    let read = File::open(path).and_then(|file| file.take(FILE_MAX).read_to_end(&mut bytes));
    read.map_err(|e| Failure::io(&format!("cannot read {}", path.display()), &e))?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_that_is_being_typed_says_which_aditd_as_far_as_it_goes() {
        let words = |line: &str| -> Vec<OsString> { line.split(' ').map(OsString::from).collect() };
        let which = Which::of_words(&words("adit vm show --server=https://h:1 --pin x --ca"));
        assert_eq!(which.server.as_deref(), Some("https://h:1"));
        assert_eq!((which.pin.as_deref(), which.ca), (Some("x"), None));
        let which = Which::of_words(&words("adit --socket /a vm show"));
        assert_eq!(which.socket.as_deref(), Some(Path::new("/a")));
    }

    #[test]
    fn two_aditds_or_options_of_the_one_for_the_other_are_a_mistake() {
        let (socket, server) = (Some("/a".into()), Some("https://h:1".to_owned()));
        let limit = Duration::from_secs(1);
        let code = |which: Which| which.client(limit).unwrap_err().code;
        let both = Which {
            socket: socket.clone(),
            server: server.clone(),
            ..Which::default()
        };
        assert_eq!(code(both), "usage");
        let pin = Which {
            socket,
            pin: Some("sha256/x".into()),
            ..Which::default()
        };
        assert_eq!(code(pin), "usage");
        let unbelieved = Which {
            server,
            ..Which::default()
        };
        let said = unbelieved.client(limit).unwrap_err();
        assert!(said.help.contains("--ca"), "{}", said.help);
    }
}
