//! Reviews: v1 without stars, v2 with black ones, v3 with red ones.

use std::rc::Rc;
use std::time::Duration;

use http::{HeaderMap, StatusCode};
use serde_json::{Value, json};

use crate::http_app::{self, forwarded, json as json_answer, setting, text};
use crate::{Options, SampleError};

struct Flavour {
    pod: String,
    /// `None` for v1: no stars are fetched.
    colour: Option<String>,
}

impl Flavour {
    /// Time ratings may take: ten seconds for black stars, two and a half for others.
    fn patience(&self) -> Duration {
        if self.colour.as_deref() == Some("black") { Duration::from_secs(10) } else { Duration::from_millis(2500) }
    }
}

pub(crate) async fn serve(options: &Options) -> Result<(), SampleError> {
    let by_version = match options.version.as_str() {
        "v2" => Some("black"),
        "v3" => Some("red"),
        _ => None,
    };
    let enabled = setting("ENABLE_RATINGS", if by_version.is_some() { "true" } else { "false" }) == "true";
    let colour = enabled.then(|| setting("STAR_COLOR", by_version.unwrap_or("black")));
    let flavour = Rc::new(Flavour { pod: crate::plain::hostname(), colour });
    http_app::serve(super::port(options), move |call| {
        let flavour = Rc::clone(&flavour);
        async move {
            let path = call.uri().path();
            match path.strip_prefix("/reviews/") {
                Some(id) => match id.parse() {
                    Ok(id) => json_answer(StatusCode::OK, &reviews(id, &flavour, call.headers()).await),
                    Err(_) => {
                        json_answer(StatusCode::BAD_REQUEST, &json!({ "error": "please provide numeric product id" }))
                    }
                },
                None if path == "/health" => json_answer(StatusCode::OK, &json!({ "status": "Reviews is healthy" })),
                None => text(StatusCode::NOT_FOUND, "not found\n"),
            }
        }
    })
    .await
}

async fn reviews(id: u64, flavour: &Flavour, headers: &HeaderMap) -> Value {
    let mut list = json!([
        { "reviewer": "Reviewer1", "text": "An extremely entertaining play by Shakespeare. The slapstick humour is refreshing!" },
        { "reviewer": "Reviewer2", "text": "Absolutely fun and entertaining. The play lacks thematic depth when compared to other plays by Shakespeare." },
    ]);
    if let Some(colour) = &flavour.colour {
        let stars = ratings(id, flavour.patience(), headers).await;
        for (index, name) in ["Reviewer1", "Reviewer2"].iter().enumerate() {
            list[index]["rating"] = match stars.as_ref().and_then(|stars| stars.get(*name)) {
                Some(stars) => json!({ "stars": stars, "color": colour }),
                None => json!({ "error": "Ratings service is currently unavailable" }),
            };
        }
    }
    json!({ "id": id.to_string(), "podname": flavour.pod, "clustername": "null", "reviews": list })
}

async fn ratings(id: u64, patience: Duration, headers: &HeaderMap) -> Option<Value> {
    let (host, port) = super::service("ratings");
    let reply = http_app::get(&host, port, &format!("/ratings/{id}"), forwarded(headers), patience).await.ok()?;
    let body: Value = serde_json::from_slice(&reply.body).ok()?;
    (reply.status == StatusCode::OK).then(|| body.get("ratings").cloned()).flatten()
}
