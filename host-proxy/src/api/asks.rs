//! Who makes a request, and whether they may: on the operator's socket the owner; on a management listener whoever has proved it, as
//! far as grants go.
//!
//! A VM that a caller may not `see` is answered for as one that is not there, byte for byte. What is denied is written down once, and
//! so is what is allowed, where the audit has that; what a list shows or leaves out is not.

use axum::extract::{FromRequestParts, Request};
use axum::http::request::Parts;
use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};

use super::ApiError;
use crate::access::callers::Asking;
use crate::access::log_in::NotLoggedIn;
use crate::access::{Access, Caller, Subject, Verb, VmView};
use crate::desk::DeskError;
use crate::desk::store::page::Names;
use crate::listen::Admits;
use crate::state::State;

/// Characters of whoever did something that are kept with it.
const WHO_MAX: usize = 80;

/// Who makes a request. Without one in it a request is not served.
#[derive(Clone)]
pub struct Asks {
    caller: Caller,
    /// To know later whether it still is the same one.
    by: By,
}

/// How somebody is known.
#[derive(Clone)]
enum By {
    /// They may use the operator's socket: this user of the host does.
    Owner(Option<u32>),
    /// By their connection, and maybe by a token: its name, and the field that shows it.
    Listener(Asking, Option<(String, HeaderValue)>),
    /// By the word of another host, as far as it counts.
    Host,
}

impl Asks {
    /// Whoever may use the operator's socket.
    pub fn owner(uid: Option<u32>) -> Self {
        Self {
            caller: Caller::owner(),
            by: By::Owner(uid),
        }
    }

    /// Somebody on a management listener, maybe with a token: its name, and the field that shows it.
    pub async fn of(state: &State, asking: Asking, token: Option<(String, HeaderValue)>) -> Self {
        let caller = caller_of(state, &asking, token.as_ref()).await;
        Self {
            caller,
            by: By::Listener(asking, token),
        }
    }

    /// Somebody who asks by way of another host.
    pub fn by_way_of_host(caller: Caller) -> Self {
        Self {
            caller,
            by: By::Host,
        }
    }

    /// Whether they ask by way of another host: then no further one is asked (R126).
    pub(super) fn is_by_way_of_host(&self) -> bool {
        self.caller.via().is_some()
    }

    /// Who is said to ask where another host decides: the owner is a user of this host there, as everybody else is.
    pub(super) async fn as_claimed(&self, state: &State) -> Caller {
        match self.by {
            By::Owner(Some(uid)) => state.callers.of_user(uid).caller().await,
            _ => self.caller.clone(),
        }
    }

    /// Who it is, for people: the user who may use the operator's socket by name, where that is known.
    pub(super) async fn who(&self, state: &State) -> String {
        let shown = match self.by {
            By::Owner(Some(_)) => self.as_claimed(state).await.to_string(),
            _ => self.caller.to_string(),
        };
        adit_names::escape(&shown).at_most(WHO_MAX).to_string()
    }

    /// Writes down what was done with a VM, where the audit has what is allowed. What others than the owner do is written when it is
    /// decided that they may.
    pub(super) fn did(&self, state: &State, name: &str, what: &'static str) {
        if self.is_owner() {
            state.allowed(&self.caller, what, name, "owner");
        }
    }

    /// The same one as of now: a token or certificate may have ended meanwhile.
    pub(super) async fn again(&self, state: &State) -> Self {
        let caller = match &self.by {
            By::Listener(asking, token) => caller_of(state, asking, token.as_ref()).await,
            By::Owner(_) => self.caller.clone(),
            By::Host => still_vouched(state, &self.caller),
        };
        Self {
            caller,
            by: self.by.clone(),
        }
    }

    /// Whether the same names still count as when they came.
    pub(super) async fn is_same(&self, state: &State) -> bool {
        self.is_owner() || self.again(state).await.caller.subjects() == self.caller.subjects()
    }

    /// Whether everything is theirs.
    pub(super) fn is_owner(&self) -> bool {
        self.caller.is_owner()
    }

    /// Whether the VM of that name, which need not be there, is shown in a list.
    pub(super) fn sees(&self, state: &State, verb: Verb<'_>, name: &str) -> bool {
        self.is_owner() || matches!(self.decided(state, verb, name), Decided::Allowed(_))
    }

    /// Names of all VMs with tasks that a list may show; none: it is not limited.
    pub(super) async fn of_tasks(&self, state: &State) -> Result<Option<Names>, DeskError> {
        if self.is_owner() {
            return Ok(None);
        }
        let mut names = state.desk.vms_with_tasks().await?;
        names.retain(|name| self.sees(state, Verb::Task, name));
        Ok(Some(Names::new(&names)))
    }

    /// Whether they may do something with the VM of that name. One that is not there is not refused to whoever might: that is for
    /// whoever looks it up.
    ///
    /// # Errors
    /// They may not.
    pub(super) fn may(&self, state: &State, verb: Verb<'_>, name: &str) -> Result<(), ApiError> {
        if self.is_owner() {
            return Ok(());
        }
        let denied = match self.decided(state, verb, name) {
            Decided::Allowed(by) => {
                if let Some(by) = by {
                    state.allowed(&self.caller, verb.words().0, name, &by);
                }
                return Ok(());
            }
            Decided::Denied(denied) => denied,
        };
        let (word, target) = verb.words();
        state.denied(&self.caller, word, name, &target, denied.reason);
        Err(match denied.text {
            _ if self.caller.is_anonymous() => log_in(),
            Some(text) => forbidden(text),
            None => ApiError::unknown_vm(name),
        })
    }

    /// Whether they may do this in the VM of that name: as [`may`](Self::may), with a line that says what, also of the owner.
    ///
    /// # Errors
    /// They may not.
    pub(super) fn may_do(
        &self,
        state: &State,
        verb: Verb<'_>,
        (name, target): (&str, &str),
    ) -> Result<(), ApiError> {
        let by = match self.is_owner() {
            true => Some("owner".to_owned()),
            false => match self.decided(state, verb, name) {
                Decided::Allowed(by) => by,
                // It says why, and writes it down.
                Decided::Denied(_) => return self.may(state, verb, name),
            },
        };
        if let Some(by) = by {
            state.allowed_to(&self.caller, verb.words().0, (name, target), &by);
        }
        Ok(())
    }

    /// Who asks, for what is decided elsewhere.
    pub(super) fn caller(&self) -> &Caller {
        &self.caller
    }

    /// Whether they may do what concerns the whole host.
    ///
    /// # Errors
    /// They may not: no grant for `*` has it.
    pub(super) fn may_of_host(&self, state: &State, verb: Verb<'_>) -> Result<(), ApiError> {
        let grants = state.grants();
        let (word, _) = verb.words();
        let reason = match grants.of_host(&self.caller, verb, state.now_ms()) {
            Ok(by) => {
                if let Some(by) = by {
                    state.allowed(&self.caller, word, "*", &by.place);
                }
                return Ok(());
            }
            Err(reason) => reason,
        };
        state.denied(&self.caller, word, "*", "", reason.word());
        let caller = &self.caller;
        let text = format!(
            "no grant lets {caller} {word} this host: it takes one with `vms = [\"*\"]` and `may = [\"{word}\"]`"
        );
        Err(self.forbidden(text))
    }

    /// Whether they may do what concerns the whole host, without a line for it.
    pub(super) fn has_of_host(&self, state: &State, verb: Verb<'_>) -> bool {
        let grants = state.grants();
        grants.of_host(&self.caller, verb, state.now_ms()).is_ok()
    }

    /// Whether they may do what only the owner may.
    ///
    /// # Errors
    /// They are not.
    pub(super) fn must_be_owner(&self, state: &State, path: &str) -> Result<(), ApiError> {
        if self.is_owner() {
            return Ok(());
        }
        state.denied(&self.caller, "own", "*", path, "not-owner");
        Err(self.forbidden("only who uses aditd's own socket may do this".into()))
    }

    /// Whether there may be anything for them at all.
    ///
    /// # Errors
    /// Nothing is known of them, and nothing is granted to everybody.
    pub(super) fn must_be_somebody(&self, state: &State) -> Result<(), ApiError> {
        let is_nobody = self.caller.is_anonymous()
            && !state.grants().any_to(|to| matches!(to, Subject::Anyone));
        if !is_nobody {
            return Ok(());
        }
        state.denied(&self.caller, "log-in", "", "", "anonymous");
        Err(log_in())
    }

    fn forbidden(&self, text: String) -> ApiError {
        match self.caller.is_anonymous() {
            true => log_in(),
            false => forbidden(text),
        }
    }

    fn decided(&self, state: &State, verb: Verb<'_>, name: &str) -> Decided {
        let (grants, now_ms) = (state.grants(), state.now_ms());
        let decide = |view: VmView<'_>, is_there: bool| {
            let denial = match grants.decide(&self.caller, verb, view, now_ms) {
                Access::Allow(by) => {
                    let by = by.filter(|_| is_there);
                    return Decided::Allowed(by.map(|grant| grant.place.clone()));
                }
                Access::Deny(denial) => denial,
            };
            let shown = is_there && !denial.is_hidden;
            Decided::Denied(Denied {
                reason: match is_there {
                    true => denial.reason.word(),
                    false => "unknown-vm",
                },
                text: shown.then(|| denial.reason.text(verb, view.name, &self.caller)),
            })
        };
        let vm = name.parse().ok().and_then(|id| state.registry.get(&id));
        match vm {
            Some(vm) => vm.viewed(|view| decide(view, true)),
            None => decide(VmView::of_name(name), false),
        }
    }
}

enum Decided {
    /// By the grant that is written there; none: there is no such VM.
    Allowed(Option<String>),
    Denied(Denied),
}

struct Denied {
    reason: &'static str,
    /// For whoever may see the VM.
    text: Option<String>,
}

async fn caller_of(
    state: &State,
    asking: &Asking,
    token: Option<&(String, HeaderValue)>,
) -> Caller {
    let caller = asking.caller().await;
    let tokens = state.callers.tokens();
    match token.filter(|(name, _)| tokens.has(name, state.now_ms())) {
        // The host that has a VM may know it too.
        Some((name, field)) => caller.with_token(name).with_shown(field.as_bytes(), false),
        None => caller,
    }
}

/// Somebody who came by way of another host, with those of their names that still count.
fn still_vouched(state: &State, caller: &Caller) -> Caller {
    let Some(host) = caller.via() else {
        return caller.clone();
    };
    let tokens = state.callers.tokens();
    let counts = caller.subjects().iter().filter(|subject| match subject {
        Subject::User(_) | Subject::Group(_) => state.peers.still_vouches(host, subject),
        Subject::Token(name) => tokens.has(name, state.now_ms()),
        Subject::Cert(_) | Subject::Network(_) | Subject::Anyone => false,
    });
    caller.by_way_of(host, counts.cloned().collect())
}

/// Whoever may use the operator's socket: this user, if the kernel has said so.
#[derive(Clone, Copy, Debug)]
pub struct Owner(pub Option<u32>);

impl Admits for Owner {
    async fn admit(&self, request: &mut Parts) -> Result<(), Response> {
        request.extensions.insert(Asks::owner(self.0));
        Ok(())
    }
}

impl<S: Sync> FromRequestParts<S> for Asks {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        let asks = parts.extensions.get::<Self>().cloned();
        asks.ok_or_else(|| {
            ApiError::new(
                StatusCode::INTERNAL_SERVER_ERROR,
                "internal",
                "nobody has said who asks",
            )
        })
    }
}

/// Who makes this request.
///
/// # Errors
/// Nobody has said so.
pub(super) fn of_request(request: &Request) -> Result<Asks, ApiError> {
    let asks = request.extensions().get::<Asks>().cloned();
    asks.ok_or_else(|| {
        ApiError::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "internal",
            "nobody has said who asks",
        )
    })
}

fn forbidden(text: String) -> ApiError {
    ApiError::new(StatusCode::FORBIDDEN, "denied", text)
        .help("`adit access ls` on the host shows the grants; its aditd.audit has what was denied")
}

fn log_in() -> ApiError {
    let text = "whoever you are may not do this";
    ApiError::new(StatusCode::UNAUTHORIZED, "log-in", text)
        .help("show a token (`Authorization: Bearer`), or a certificate that grants name")
}

/// Answers whoever shows what is no token.
pub fn not_logged_in(why: &NotLoggedIn) -> Response {
    match why {
        NotLoggedIn::Wrong => {
            let text =
                "what Authorization shows is not one token of this host, or its time is over";
            ApiError::new(StatusCode::UNAUTHORIZED, "bad-token", text).into_response()
        }
        NotLoggedIn::Later(seconds) => {
            let text =
                format!("too many wrong tokens came from there: none is looked at for {seconds} s");
            let refused = ApiError::new(StatusCode::TOO_MANY_REQUESTS, "too-many-tokens", text);
            ([(header::RETRY_AFTER, seconds.to_string())], refused).into_response()
        }
    }
}

/// Answers a browser.
pub fn no_browser() -> Response {
    let text = "this is no server for web pages: a request that a page made, or that names the host otherwise than by its address, \
                is refused";
    ApiError::new(StatusCode::FORBIDDEN, "no-browser", text).into_response()
}

/// Answers whoever takes it for a proxy.
pub fn no_proxy() -> Response {
    let text = "this listener is for management: it answers the API, and leads to no VM";
    ApiError::new(StatusCode::BAD_REQUEST, "no-proxy", text).into_response()
}

/// How one logs in, for who has not.
pub(super) const CHALLENGE: (HeaderName, HeaderValue) = (
    header::WWW_AUTHENTICATE,
    HeaderValue::from_static("Bearer realm=\"adit\""),
);
