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
            "HTTP/1.1 on aditd's Unix socket. One request a connection.",
        ))
        .build();
    let components = api.components.get_or_insert_with(Components::new);
    let name = ErrorBody::name().into_owned();
    components.schemas.insert(name, ErrorBody::schema());
    for item in api.paths.paths.values_mut() {
        for operation in operations(item) {
            operation
                .responses
                .responses
                .insert("default".into(), refused());
        }
    }
    api
}

/// How any request may fail.
fn refused() -> RefOr<utoipa::openapi::Response> {
    let body = Ref::from_schema_name(ErrorBody::name());
    ResponseBuilder::new()
        .description("It was refused: what failed and why, and what to do")
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
