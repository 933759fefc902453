//! Details of a book.

use http::StatusCode;
use serde_json::json;

use crate::http_app::{json as json_answer, serve as serve_http, text};
use crate::{Options, SampleError};

pub(crate) async fn serve(options: &Options) -> Result<(), SampleError> {
    serve_http(super::port(options), |call| {
        let path = call.uri().path();
        let answer = match path.strip_prefix("/details/") {
            Some(id) => match id.parse::<u64>() {
                Ok(id) => json_answer(
                    StatusCode::OK,
                    &json!({
                        "id": id, "author": "William Shakespeare", "year": 1595, "type": "paperback", "pages": 200,
                        "publisher": "PublisherA", "language": "English", "ISBN-10": "1234567890", "ISBN-13": "123-1234567890",
                    }),
                ),
                Err(_) => json_answer(StatusCode::BAD_REQUEST, &json!({ "error": "please provide numeric product id" })),
            },
            None if path == "/health" => json_answer(StatusCode::OK, &json!({ "status": "Details is healthy" })),
            None => text(StatusCode::NOT_FOUND, "not found\n"),
        };
        std::future::ready(answer)
    })
    .await
}
