//! The document that describes the API, `GET /v1/openapi.json`: OpenAPI 3.1, made from the handlers that are served and their types,
//! so it has no endpoint that is not there, and lacks none.

use adit_api::ErrorBody;
use axum::http::header::CONTENT_TYPE;
use axum::response::IntoResponse;
use bytes::Bytes;
use utoipa::PartialSchema;
use utoipa::ToSchema;
use utoipa::openapi::{
    Components, ContentBuilder, InfoBuilder, OpenApi, PathItem, Ref, RefOr, ResponseBuilder,
    path::Operation,
    security::{HttpAuthScheme, HttpBuilder, SecurityRequirement, SecurityScheme},
};

/// The document as it is served.
#[derive(Clone)]
pub(super) struct Document(Bytes);

impl IntoResponse for Document {
    fn into_response(self) -> axum::response::Response {
        ([(CONTENT_TYPE, "application/json")], self.0).into_response()
    }
}

/// Puts it together, of the endpoints of the API's socket and those that are also elsewhere.
pub(super) fn document(api: OpenApi, observed: OpenApi) -> Document {
    let api = finish(api.merge_from(observed));
    // Of maps with texts for keys: it always serialises.
    Document(serde_json::to_vec(&api).unwrap_or_default().into())
}

fn finish(mut api: OpenApi) -> OpenApi {
    api.info = InfoBuilder::new()
        .title("aditd")
        .version(env!("CARGO_PKG_VERSION"))
        .description(Some(
            "HTTP/1.1 on aditd's Unix socket, whose user may do everything, and on management listeners, where grants say who may do \
             what. One request a connection.",
        ))
        .build();
    let components = api.components.get_or_insert_with(Components::new);
    let name = ErrorBody::name().into_owned();
    components.schemas.insert(name, ErrorBody::schema());
    let token = HttpBuilder::new()
        .scheme(HttpAuthScheme::Bearer)
        .description(Some("A token of [[token]], on a management listener"))
        .build();
    let certificate = "A client's certificate, on a management listener with TLS";
    components.add_security_scheme(TOKEN, SecurityScheme::Http(token));
    components.add_security_scheme(
        CERTIFICATE,
        SecurityScheme::MutualTls {
            description: Some(certificate.into()),
            deprecated: None,
            extensions: None,
        },
    );
    let none: [&str; 0] = [];
    // The operator's socket, and users of this host, need neither.
    api.security = Some(vec![
        SecurityRequirement::default(),
        SecurityRequirement::new(TOKEN, none),
        SecurityRequirement::new(CERTIFICATE, none),
    ]);
    for item in api.paths.paths.values_mut() {
        for operation in operations(item) {
            let responses = &mut operation.responses.responses;
            for (status, why) in REFUSED {
                let refused = || refused(why);
                responses.entry(status.into()).or_insert_with(refused);
            }
        }
    }
    api
}

/// Names of what says who asks.
const TOKEN: &str = "token";
const CERTIFICATE: &str = "certificate";

/// How any request may fail.
const REFUSED: [(&str, &str); 4] = [
    (
        "401",
        "On a management listener: who asks is not known, and would have to be",
    ),
    (
        "403",
        "No grant lets whoever asks do this; or, of a VM, its own lists do not",
    ),
    (
        "429",
        "It would be too much; or too many wrong tokens came from there, and `retry-after` says when to try again",
    ),
    (
        "default",
        "It was refused: what failed and why, and what to do",
    ),
];

fn refused(why: &str) -> RefOr<utoipa::openapi::Response> {
    let body = Ref::from_schema_name(ErrorBody::name());
    ResponseBuilder::new()
        .description(why)
        .content(
            "application/json",
            ContentBuilder::new().schema(Some(body)).build(),
        )
        .build()
        .into()
}

fn operations(item: &mut PathItem) -> impl Iterator<Item = &mut Operation> {
    let all = [
        &mut item.get,
        &mut item.put,
        &mut item.post,
        &mut item.patch,
        &mut item.delete,
    ];
    all.into_iter().flatten()
}
