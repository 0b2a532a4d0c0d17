//! Management listeners: the API for others than the owner.
//!
//! A request is looked at before its body is read. Who asks is known by the connection, or by a token in `Authorization`; what they
//! may do is decided in [`api`](crate::api). A local user is known without a password, and a page in that user's browser could have
//! the browser connect: what a browser says of a page's requests is refused, and so is a name that another's DNS may lead here.

use std::net::IpAddr;
use std::sync::Arc;

use axum::Router;
use axum::response::Response;
use hyper::HeaderMap;
use hyper::header::{AUTHORIZATION, HOST, HeaderName, ORIGIN};
use hyper::http::request::Parts;
use hyper_util::service::TowerToHyperService;

use super::Accepted;
use super::stream::Stream;
use crate::access::callers::Asking;
use crate::access::log_in::log_in;
use crate::access::tokens::shown;
use crate::api::{self, Asks};
use crate::listen::{self, Admits, Place};
use crate::state::State;

/// What browsers say of where a page comes from (Fetch Metadata).
const FETCH_SITE: HeaderName = HeaderName::from_static("sec-fetch-site");

/// What is served.
pub(super) struct Api(TowerToHyperService<Router>);

/// How a client has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum By {
    Tls,
    Tcp,
    Unix,
}

impl By {
    pub(super) fn of(accepted: &Accepted, is_tls: bool) -> Self {
        match accepted {
            Accepted::Tcp(..) if is_tls => Self::Tls,
            Accepted::Tcp(..) => Self::Tcp,
            Accepted::Unix(_) => Self::Unix,
        }
    }
}

impl Api {
    pub(super) fn new(state: &Arc<State>) -> Self {
        Self(TowerToHyperService::new(api::router(state.clone())))
    }

    /// Serves a client's request.
    pub(super) async fn serve(
        &self,
        state: Arc<State>,
        client: Stream,
        (asking, by): (Asking, By),
        place: Place,
    ) {
        let (app, stop) = (self.0.clone(), state.stop.clone());
        let door = Door { state, asking, by };
        listen::connection(client, place, app, api::BODY_MAX, stop, door).await;
    }
}

struct Door {
    state: Arc<State>,
    asking: Asking,
    by: By,
}

impl Admits for Door {
    async fn admit(&self, request: &mut Parts) -> Result<(), Response> {
        if request.uri.authority().is_some() {
            return Err(api::no_proxy());
        }
        if is_of_a_page(&request.headers)
            || (self.by == By::Tcp && !is_for_an_address(&request.headers))
        {
            return Err(api::no_browser());
        }
        let caller = self.asking.caller().await;
        let mut fields = request.headers.get_all(AUTHORIZATION).iter();
        let token = match (fields.next(), fields.next()) {
            (None, _) => None,
            (field, another) => {
                let token = field.filter(|_| another.is_none());
                let token = token.and_then(|field| shown(field.as_bytes()));
                let named = log_in(&self.state, &caller, token.as_deref());
                let named = named.map_err(|why| api::not_logged_in(&why))?;
                field.map(|field| (named, field.clone()))
            }
        };
        request.headers.remove(AUTHORIZATION);
        if let Some((token, _)) = &token {
            self.asking.is(&self.state, &caller.with_token(token));
        }
        let asks = Asks::of(&self.state, self.asking.clone(), token).await;
        request.extensions.insert(asks);
        Ok(())
    }
}

/// Whether it is a browser that asks for a page.
fn is_of_a_page(head: &HeaderMap) -> bool {
    let by_hand = head.get(&FETCH_SITE).is_none_or(|site| site == "none");
    head.contains_key(ORIGIN) || !by_hand
}

/// Whether `Host` is an address, or this very host: a name could be of somebody else's DNS. With TLS the certificate says who is meant.
fn is_for_an_address(head: &HeaderMap) -> bool {
    let host = head.get(HOST).and_then(|host| host.to_str().ok());
    let host = host.and_then(|host| host.parse::<hyper::http::uri::Authority>().ok());
    host.is_some_and(|host| {
        let name = host.host();
        let bare = name.strip_prefix('[').and_then(|ip| ip.strip_suffix(']'));
        name == "localhost" || bare.unwrap_or(name).parse::<IpAddr>().is_ok()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(name: &'static str, value: &'static str) -> HeaderMap {
        [(HeaderName::from_static(name), value.parse().unwrap())]
            .into_iter()
            .collect()
    }

    #[test]
    fn r69_a_page_in_a_users_browser_is_not_that_user() {
        assert!(is_of_a_page(&head("origin", "null")));
        assert!(is_of_a_page(&head("sec-fetch-site", "cross-site")));
        assert!(is_of_a_page(&head("sec-fetch-site", "same-origin")));
        assert!(!is_of_a_page(&head("sec-fetch-site", "none")));
        assert!(!is_of_a_page(&head("accept", "*/*")));
        for host in [
            "127.0.0.1",
            "127.0.0.1:7443",
            "[::1]:7443",
            "localhost:7443",
        ] {
            assert!(is_for_an_address(&head("host", host)), "{host}");
        }
        for host in [
            "",
            "evil.example:7443",
            "127.0.0.1.evil.example",
            "localhost.evil",
            "a b",
        ] {
            assert!(!is_for_an_address(&head("host", host)), "{host}");
        }
        assert!(!is_for_an_address(&head("accept", "*/*")));
    }
}
