//! The samples' pages, as a browser shows them: a demo, and Chromium before it.
//!
//! With the feature `browser`; the variable `LATEEN_CHROMEDRIVER` names the program that drives Chromium.

#![allow(clippy::unwrap_used, reason = "a test ends where something is not as it should be")]

mod browser;

use browser::Browser;
use testkit::{Mesh, Setup};

/// Where the ingress gateway of a demo listens.
fn demo(name: &str) -> (Mesh, String) {
    let mesh = Setup::demo(name).start();
    let port = mesh.status()["addresses"]["ingress-http"].as_str().unwrap().rsplit_once(':').unwrap().1.to_owned();
    (mesh, port)
}

/// Reviews by version: `jason` to one, the rest to another.
fn reviews(jason: &str, rest: &str) -> String {
    let to = |version: &str| format!("route: [{{destination: {{host: reviews, subset: {version}}}}}]");
    let subset = |version: &str| format!("{{name: {version}, labels: {{version: {version}}}}}");
    let subsets = ["v1", "v2", "v3"].map(subset).join(", ");
    format!(
        "apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {{name: reviews, namespace: bookinfo}}
spec: {{host: reviews, subsets: [{subsets}]}}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {{name: reviews, namespace: bookinfo}}
spec:
  hosts: [reviews]
  http:
  - {{match: [{{headers: {{end-user: {{exact: jason}}}}}}], {}}}
  - {{{}}}
",
        to(jason),
        to(rest)
    )
}

fn has_no_sideways_scrolling(browser: &Browser) -> bool {
    browser.script("return document.documentElement.scrollWidth <= window.innerWidth") == true
}

#[test]
fn the_bookshop_is_a_page_a_person_can_use() {
    let (mesh, port) = demo("shop");
    let browser = Browser::open();
    let page = format!("http://127.0.0.1:{port}/productpage");

    browser.go(&format!("http://127.0.0.1:{port}/"));
    browser.click("main a.button");
    assert_eq!(browser.script("return location.pathname"), "/productpage");
    assert_eq!(browser.script("return document.title"), "Simple Bookstore App");
    assert_eq!(browser.seen("h1"), ["The Comedy of Errors"]);
    assert_eq!(browser.seen("tr").len(), 8, "what is known of the book");
    assert!(browser.seen("tr").iter().any(|row| row.contains("William Shakespeare")));
    assert_eq!(browser.seen(".hero svg").len(), 1, "the cover");

    // Red stars for strangers; none for jason, who signs in by hand.
    let applied = mesh.with(&reviews("v1", "v3"));
    browser.go(&page);
    assert_eq!(browser.seen("blockquote").len(), 2);
    assert_eq!(browser.seen(".stars"), ["★★★★★", "★★★★★"]);
    assert_eq!(browser.css(".stars", "color"), "rgba(200, 50, 31, 1)");
    assert_eq!(browser.css(".stars span", "opacity"), "0.2", "stars that were not given are pale");
    browser.write("input[name=username]", "jason");
    browser.click("header button");
    assert_eq!(browser.seen(".who"), ["Signed in as jason"]);
    assert_eq!(browser.seen("blockquote").len(), 2);
    assert!(browser.seen(".stars").is_empty(), "{:?}", browser.seen(".stars"));
    assert!(browser.seen(".served")[0].contains("reviews-v1-"));
    browser.click("header button");
    assert!(browser.seen(".who").is_empty());
    assert_eq!(browser.seen(".stars").len(), 2);

    // A telephone, and a dark room.
    browser.resize(360, 720);
    assert!(has_no_sideways_scrolling(&browser));
    browser.resize(1200, 900);
    assert_eq!(browser.css("body", "background-color"), "rgba(250, 247, 242, 1)");
    browser.prefer("dark");
    assert_eq!(browser.css("body", "background-color"), "rgba(23, 21, 18, 1)");
    browser.prefer("light");

    // What fails is said in its place; the rest stays.
    let fault = "apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: details, namespace: bookinfo}
spec:
  hosts: [details]
  http: [{fault: {abort: {percentage: {value: 100}, httpStatus: 500}}, route: [{destination: {host: details}}]}]
";
    let broken = mesh.with(fault);
    browser.go(&page);
    assert_eq!(browser.seen(".failure h2"), ["ERROR FETCHING PRODUCT DETAILS!"]);
    assert_eq!(browser.seen("blockquote").len(), 2);
    drop(broken);
    browser.go(&page);
    assert!(browser.seen(".failure").is_empty());
    drop(applied);
    assert_eq!(browser.complaints(), [""; 0]);
}

#[test]
fn the_mail_catcher_shows_what_arrives() {
    let (mesh, port) = demo("mail");
    let browser = Browser::open();
    let page = format!("http://maildev.localhost:{port}/");
    browser.go(&page);
    assert_eq!(browser.script("return document.title"), "MailDev");
    assert!(browser.seen(".none")[0].starts_with("Nothing has arrived yet."));
    for (subject, body) in [("Your order", "It is on its way."), ("<b>Late</b>", "<script>alert(1)</script>")] {
        let mail = format!(
            "printf 'Subject: {subject}\\r\\n\\r\\n{body}\\r\\n' | curl -sS --max-time 20 smtp://maildev.mail:1025 \
             --mail-from shop@example.com --mail-rcpt reader@example.com -T -"
        );
        let sent = mesh.exec("bookinfo/productpage-v1", &["sh", "-c", &mail]);
        assert!(sent.status.success(), "{sent:?}");
    }
    browser.click("header a");
    // The newest first, and open; what a mail says is text.
    assert_eq!(browser.seen("summary b"), ["<b>Late</b>", "Your order"]);
    assert_eq!(browser.seen("pre"), ["<script>alert(1)</script>"]);
    assert_eq!(browser.seen("summary span")[0], "shop@example.com → reader@example.com");
    assert!(browser.seen(".count")[0].starts_with("2 mails"));
    browser.click("details:not([open]) summary");
    assert_eq!(browser.seen("pre"), ["<script>alert(1)</script>", "It is on its way."]);
    browser.resize(360, 720);
    assert!(has_no_sideways_scrolling(&browser));
    assert_eq!(browser.complaints(), [""; 0]);
}
