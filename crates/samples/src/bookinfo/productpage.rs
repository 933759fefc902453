//! The page people look at.

use std::time::Duration;

use http::header::{LOCATION, SET_COOKIE};
use http::{HeaderMap, HeaderValue, Method, StatusCode};
use serde_json::{Value, json};

use crate::http_app::{self, Answer, Call, escape, forwarded, html, json as json_answer, query_value, text};
use crate::{Options, SampleError};

/// Time one call to details or reviews may take.
const PATIENCE: Duration = Duration::from_secs(3);
/// Tries for reviews: with a delay of seven seconds below, both fail after six.
const REVIEWS_TRIES: usize = 2;

pub(crate) async fn serve(options: &Options) -> Result<(), SampleError> {
    http_app::serve(super::port(options), app).await
}

async fn app(call: Call) -> Answer {
    let path = call.uri().path();
    match (call.method(), path) {
        (&Method::GET | &Method::HEAD, "/") => html(FRONT.replace("{style}", STYLE)),
        (&Method::GET | &Method::HEAD, "/health") => text(StatusCode::OK, "Product page is healthy"),
        (&Method::GET | &Method::HEAD, "/productpage") => page(&call).await,
        (&Method::POST, "/login") => login(&call),
        (_, "/logout") => redirect("session=; Path=/; Max-Age=0"),
        (&Method::GET | &Method::HEAD, "/api/v1/products") => json_answer(StatusCode::OK, &json!([product()])),
        (&Method::GET | &Method::HEAD, _) => match path.strip_prefix("/api/v1/products/") {
            Some(rest) => api(rest, &call).await,
            None => text(StatusCode::NOT_FOUND, "not found\n"),
        },
        _ => text(StatusCode::METHOD_NOT_ALLOWED, "method not allowed\n"),
    }
}

fn product() -> Value {
    json!({
        "id": 0, "title": "The Comedy of Errors",
        "descriptionHtml": "The Comedy of Errors is one of William Shakespeare's early plays: two pairs of identical twins, separated at birth, and one day of mistaken identity in Ephesus.",
    })
}

async fn api(rest: &str, call: &Call) -> Answer {
    let headers = call_headers(call);
    let (id, what) = rest.split_once('/').unwrap_or((rest, ""));
    let Ok(id) = id.parse::<u64>() else {
        return json_answer(StatusCode::BAD_REQUEST, &json!({ "error": "please provide numeric product id" }));
    };
    let (status, body) = match what {
        "" => fetch("details", &format!("/details/{id}"), &headers, 1).await,
        "reviews" => fetch("reviews", &format!("/reviews/{id}"), &headers, REVIEWS_TRIES).await,
        "ratings" => fetch("ratings", &format!("/ratings/{id}"), &headers, 1).await,
        _ => (StatusCode::NOT_FOUND, json!({ "error": "not found" })),
    };
    json_answer(status, &body)
}

/// Trace headers, and the signed-in user as `end-user`.
fn call_headers(call: &Call) -> HeaderMap {
    let mut headers = forwarded(call.headers());
    if let Some(user) = user(call).and_then(|user| HeaderValue::from_str(&user).ok()) {
        headers.insert("end-user", user);
    }
    headers
}

fn user(call: &Call) -> Option<String> {
    let cookies = call.headers().get("cookie")?.to_str().ok()?;
    let user = cookies.split(';').find_map(|pair| pair.trim().strip_prefix("session="))?;
    (!user.is_empty()).then(|| http_app::decode(user))
}

fn login(call: &Call) -> Answer {
    let form = String::from_utf8_lossy(call.body());
    let name: String = query_value(&form, "username").unwrap_or_default();
    let name: String =
        name.chars().filter(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_' | '@')).take(64).collect();
    redirect(&format!("session={name}; Path=/; HttpOnly; SameSite=Lax"))
}

fn redirect(cookie: &str) -> Answer {
    let mut answer = text(StatusCode::FOUND, "");
    answer.headers_mut().insert(LOCATION, HeaderValue::from_static("/productpage"));
    if let Ok(cookie) = HeaderValue::from_str(cookie) {
        answer.headers_mut().insert(SET_COOKIE, cookie);
    }
    answer
}

/// JSON of another service. A failure gives the status and words bookinfo shows.
async fn fetch(name: &str, path: &str, headers: &HeaderMap, tries: usize) -> (StatusCode, Value) {
    let (host, port) = super::service(name);
    for _ in 0..tries {
        if let Ok(reply) = http_app::get(&host, port, path, headers.clone(), PATIENCE).await
            && reply.status == StatusCode::OK
            && let Ok(body) = serde_json::from_slice(&reply.body)
        {
            return (StatusCode::OK, body);
        }
    }
    let sorry = format!("Sorry, product {name} are currently unavailable for this book.");
    (StatusCode::SERVICE_UNAVAILABLE, json!({ "error": sorry }))
}

async fn page(call: &Call) -> Answer {
    let headers = call_headers(call);
    // One after the other, as bookinfo does: the trace shows it.
    let (details_status, details) = fetch("details", "/details/0", &headers, 1).await;
    let (reviews_status, reviews) = fetch("reviews", "/reviews/0", &headers, REVIEWS_TRIES).await;
    let who = match user(call) {
        Some(user) => format!(
            "<form action=/logout><span class=who>Signed in as <b>{}</b></span><button class=button>Sign out</button></form>",
            escape(&user)
        ),
        None => "<form method=post action=/login><input name=username placeholder='jason' aria-label='User name'>\
                 <button class=button>Sign in</button></form>"
            .to_owned(),
    };
    html(
        PAGE.replace("{style}", STYLE)
            .replace("{who}", &who)
            .replace("{details}", &render_details(details_status, &details))
            .replace("{reviews}", &render_reviews(reviews_status, &reviews)),
    )
}

fn render_details(status: StatusCode, details: &Value) -> String {
    if status != StatusCode::OK {
        return failure("Error fetching product details!", details);
    }
    let rows = [
        ("Author", "author"),
        ("Year", "year"),
        ("Type", "type"),
        ("Pages", "pages"),
        ("Publisher", "publisher"),
        ("Language", "language"),
        ("ISBN-10", "ISBN-10"),
        ("ISBN-13", "ISBN-13"),
    ];
    let rows: String = rows
        .iter()
        .map(|(title, key)| {
            let value = match &details[*key] {
                Value::String(text) => escape(text),
                other => escape(&other.to_string()),
            };
            format!("<tr><th>{title}<td>{value}")
        })
        .collect();
    format!("<h2>Book details</h2><table>{rows}</table>")
}

fn render_reviews(status: StatusCode, reviews: &Value) -> String {
    if status != StatusCode::OK {
        return failure("Error fetching product reviews!", reviews);
    }
    let cards: String = reviews["reviews"].as_array().into_iter().flatten().map(render_review).collect();
    let pod = reviews["podname"].as_str().unwrap_or_default();
    format!("<h2>Book reviews</h2>{cards}\n<p class=served>Reviews served by: <code>{}</code></p>", escape(pod))
}

fn render_review(review: &Value) -> String {
    let rating = &review["rating"];
    let stars = if let Some(count) = rating["stars"].as_u64() {
        let colour = if rating["color"] == "red" { "red" } else { "black" };
        let full = usize::try_from(count.min(5)).unwrap_or(5);
        format!(
            "<p class='stars {colour}' title='{count} of 5'>{}<span>{}</span></p>",
            "★".repeat(full),
            "★".repeat(5 - full)
        )
    } else if let Some(error) = rating["error"].as_str() {
        format!("<p class=sorry>{}</p>", escape(error))
    } else {
        String::new()
    };
    format!(
        "<blockquote><p>“{}”</p><footer>{}</footer>{stars}</blockquote>",
        escape(review["text"].as_str().unwrap_or_default()),
        escape(review["reviewer"].as_str().unwrap_or_default())
    )
}

fn failure(title: &str, body: &Value) -> String {
    format!("<div class=failure><h2>{title}</h2><p>{}</p></div>", escape(body["error"].as_str().unwrap_or_default()))
}

const STYLE: &str = "<style>
:root{color-scheme:light dark;--paper:#faf7f2;--ink:#24211d;--soft:#6f675c;--line:#e2dacd;--card:#fff;--sea:#0b6e75;--red:#c8321f}
@media(prefers-color-scheme:dark){:root{--paper:#171512;--ink:#ece6db;--soft:#a59b8c;--line:#37322b;--card:#201d19;--sea:#5cc2c7;--red:#ff7b66}}
*{box-sizing:border-box}body{margin:0;background:var(--paper);color:var(--ink);font:17px/1.55 Georgia,'Times New Roman',serif}
header,main{max-width:62rem;margin:auto;padding:1.1rem 1.5rem}header{display:flex;flex-wrap:wrap;gap:1rem;align-items:center;justify-content:space-between;border-bottom:1px solid var(--line)}
header>a{font:600 1rem/1 system-ui,sans-serif;color:var(--sea);text-decoration:none;letter-spacing:.02em}
.hero{display:flex;gap:2rem;align-items:flex-start;padding:2.2rem 0 1.4rem}.hero svg{flex:none;width:7.5rem}h1{font-size:2.5rem;line-height:1.1;margin:.1rem 0 .7rem}
.hero p{margin:0;color:var(--soft);max-width:40rem}.columns{display:grid;grid-template-columns:minmax(16rem,1fr) minmax(0,1.7fr);gap:2.5rem;padding:1rem 0 3rem}
@media(max-width:46rem){.columns{grid-template-columns:1fr}.hero svg{display:none}}
h2{font:600 .82rem/1.2 system-ui,sans-serif;letter-spacing:.09em;text-transform:uppercase;color:var(--soft);margin:.4rem 0 1rem}
table{width:100%;border-collapse:collapse;font-size:.96rem}th,td{text-align:left;padding:.45rem 0;border-bottom:1px solid var(--line)}th{font-weight:400;color:var(--soft);width:7.5rem}
blockquote{margin:0 0 1.1rem;padding:1.1rem 1.3rem;background:var(--card);border:1px solid var(--line);border-radius:10px}blockquote p{margin:0}blockquote footer{margin-top:.5rem;color:var(--soft);font-size:.92rem}
blockquote footer::before{content:'— '}.stars{margin-top:.5rem!important;font-size:1.3rem;letter-spacing:.12em}.stars.red{color:var(--red)}.stars span{opacity:.2}
.served,.sorry{color:var(--soft);font-size:.9rem}.failure{padding:1.1rem 1.3rem;border:1px solid var(--red);border-radius:10px}.failure h2{color:var(--red)}.failure p{margin:0}
form{display:flex;gap:.8rem;align-items:center}input,.button{font:500 .95rem/1 system-ui,sans-serif;padding:.55rem .8rem;border-radius:8px;border:1px solid var(--line);background:var(--card);color:var(--ink)}
.button{background:var(--sea);border-color:var(--sea);color:var(--paper);cursor:pointer;text-decoration:none}.who{font-size:.95rem}code{font-size:.9em}
</style>";

const PAGE: &str = "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width,initial-scale=1'>
<title>Simple Bookstore App</title><link rel=icon href='data:,'>{style}
<header><a href=/>BookInfo Sample</a>{who}</header>
<main><section class=hero>
<svg viewBox='0 0 120 150' role=img aria-label='Cover of a book'><rect x='6' y='4' width='108' height='142' rx='6' fill='#0b6e75'/><rect x='6' y='4' width='14' height='142' rx='6' fill='#084f54'/><circle cx='50' cy='62' r='21' fill='#faf7f2'/><circle cx='86' cy='62' r='21' fill='#cfe4e2'/><g fill='#0b6e75'><circle cx='43' cy='57' r='2.6'/><circle cx='57' cy='57' r='2.6'/><circle cx='79' cy='57' r='2.6'/><circle cx='93' cy='57' r='2.6'/></g><path d='M41 67q9 9 18 0M77 71q9-9 18 0' stroke='#0b6e75' stroke-width='3' fill='none' stroke-linecap='round'/><path d='M36 108h64M46 121h44' stroke='#faf7f2' stroke-width='3' stroke-linecap='round'/></svg>
<div><h1>The Comedy of Errors</h1><p>Two pairs of identical twins, separated at birth, and one day of mistaken identity in Ephesus: one of William Shakespeare’s earliest plays, his shortest, and his most farcical.</p></div></section>
<div class=columns><section>{details}</section><section>{reviews}</section></div></main></html>";

const FRONT: &str = "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width,initial-scale=1'>
<title>Simple Bookstore App</title><link rel=icon href='data:,'>{style}<header><a href=/>BookInfo Sample</a></header>
<main><section class=hero><div><h1>Hello! This is a simple bookstore application.</h1>
<p>It consists of four services: productpage, details, reviews in three versions, and ratings.</p><p style='margin-top:1.4rem'><a class=button href=/productpage>To the product page</a></p></div></section></main></html>";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stars_show_their_colour() {
        let review = json!({ "reviewer": "R", "text": "<b>", "rating": { "stars": 4, "color": "red" } });
        let out = render_review(&review);
        assert!(out.contains("stars red") && out.contains("★★★★<span>★</span>") && out.contains("&lt;b&gt;"), "{out}");
        let out = render_review(&json!({ "rating": { "error": "Ratings service is currently unavailable" } }));
        assert!(out.contains("currently unavailable"));
        assert!(!render_review(&json!({ "text": "x" })).contains("stars"));
    }

    #[test]
    fn a_session_becomes_end_user() {
        let call = http::Request::get("/productpage")
            .header("cookie", "a=b; session=jason")
            .body(bytes::Bytes::new())
            .unwrap();
        assert_eq!(call_headers(&call)["end-user"], "jason");
    }
}
