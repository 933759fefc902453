//! Star ratings.

use http::{Method, StatusCode};
use serde_json::{Value, json};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use crate::http_app::{json as json_answer, serve as serve_http, text};
use crate::{Options, SampleError};

/// Products whose ratings may be posted.
const PRODUCTS_MAX: usize = 1000;

pub(crate) async fn serve(options: &Options) -> Result<(), SampleError> {
    let posted: Rc<RefCell<BTreeMap<u64, Value>>> = Rc::default();
    let unhealthy = options.version == "v-unhealthy";
    let unavailable = options.version == "v-unavailable";
    serve_http(super::port(options), move |call| {
        let path = call.uri().path();
        let id = path.strip_prefix("/ratings/").map(str::parse::<u64>);
        let answer = match id {
            Some(_) if unavailable => {
                json_answer(StatusCode::SERVICE_UNAVAILABLE, &json!({ "error": "Service unavailable" }))
            }
            Some(Err(_)) => {
                json_answer(StatusCode::BAD_REQUEST, &json!({ "error": "please provide numeric product ID" }))
            }
            Some(Ok(id)) if call.method() == Method::POST => match serde_json::from_slice::<Value>(call.body()) {
                Ok(ratings) if posted.borrow().len() < PRODUCTS_MAX => {
                    posted.borrow_mut().insert(id, ratings.clone());
                    json_answer(StatusCode::OK, &json!({ "id": id, "ratings": ratings }))
                }
                _ => json_answer(StatusCode::BAD_REQUEST, &json!({ "error": "please provide valid ratings JSON" })),
            },
            Some(Ok(id)) => {
                let ratings =
                    posted.borrow().get(&id).cloned().unwrap_or_else(|| json!({ "Reviewer1": 5, "Reviewer2": 4 }));
                json_answer(StatusCode::OK, &json!({ "id": id, "ratings": ratings }))
            }
            None if path == "/health" && unhealthy => {
                json_answer(StatusCode::INTERNAL_SERVER_ERROR, &json!({ "status": "Ratings is not healthy" }))
            }
            None if path == "/health" => json_answer(StatusCode::OK, &json!({ "status": "Ratings is healthy" })),
            None => text(StatusCode::NOT_FOUND, "not found\n"),
        };
        std::future::ready(answer)
    })
    .await
}
