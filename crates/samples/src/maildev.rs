//! A mail catcher: takes mail on port 1025, shows it on port 1080.
//!
//! *Source*: RFC 5321 for the subset a client needs; MailDev's ports and `/email` API.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;
use std::time::Duration;

use http::StatusCode;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;

use crate::http_app::{Answer, Call, escape, html, json as json_answer, listen, serve as serve_http, setting, text};
use crate::{Options, SampleError};

/// Mails kept.
const MAILS_MAX: usize = 200;
/// Largest mail.
const MAIL_BYTES_MAX: usize = 256 * 1024;
/// Longest command line.
const LINE_MAX: u64 = 2048;
/// A client that says nothing for so long is let go.
const PATIENCE: Duration = Duration::from_mins(1);

#[derive(Clone, Debug, Default, PartialEq)]
struct Mail {
    id: u64,
    from: String,
    to: Vec<String>,
    data: String,
}

impl Mail {
    fn header(&self, name: &str) -> &str {
        let head = self.data.split("\r\n\r\n").next().unwrap_or_default();
        head.lines()
            .find_map(|line| line.split_once(':').filter(|(key, _)| key.eq_ignore_ascii_case(name)))
            .map_or("", |(_, value)| value.trim())
    }

    fn body(&self) -> &str {
        self.data.split_once("\r\n\r\n").map_or(&self.data, |(_, body)| body)
    }

    fn json(&self) -> Value {
        json!({ "id": self.id.to_string(), "from": self.from, "to": self.to, "subject": self.header("subject"), "text": self.body() })
    }
}

#[derive(Default)]
struct Mailbox {
    mails: VecDeque<Mail>,
    next: u64,
}

type Shared = Rc<RefCell<Mailbox>>;

pub(crate) async fn serve(options: &Options) -> Result<(), SampleError> {
    let smtp = setting("MAILDEV_SMTP_PORT", "1025").parse().unwrap_or(1025);
    let web = setting("MAILDEV_WEB_PORT", "1080").parse().unwrap_or(1080);
    let web = if options.port == 0 { web } else { options.port };
    let mailbox = Shared::default();
    let listener = listen(smtp).await?;
    let local = tokio::task::LocalSet::new();
    let incoming = Rc::clone(&mailbox);
    local.spawn_local(async move {
        loop {
            match listener.accept().await {
                Ok((stream, _)) => {
                    let mailbox = Rc::clone(&incoming);
                    tokio::task::spawn_local(async move { session(stream, &mailbox).await });
                }
                // Out of descriptors: let some go.
                Err(_) => tokio::time::sleep(crate::ACCEPT_AGAIN).await,
            }
        }
    });
    local.run_until(serve_http(web, move |call| std::future::ready(app(&call, &mailbox)))).await
}

fn app(call: &Call, mailbox: &Shared) -> Answer {
    let path = call.uri().path();
    match path {
        "/" => html(page(&mailbox.borrow().mails)),
        "/healthz" => json_answer(StatusCode::OK, &json!(true)),
        "/email" if call.method() == http::Method::GET => {
            json_answer(StatusCode::OK, &mailbox.borrow().mails.iter().map(Mail::json).collect())
        }
        "/email/all" if call.method() == http::Method::DELETE => {
            mailbox.borrow_mut().mails.clear();
            json_answer(StatusCode::OK, &json!(true))
        }
        _ => {
            let id = path.strip_prefix("/email/").and_then(|id| id.parse::<u64>().ok());
            let mailbox = mailbox.borrow();
            match id.and_then(|id| mailbox.mails.iter().find(|mail| mail.id == id)) {
                Some(mail) => json_answer(StatusCode::OK, &mail.json()),
                None => text(StatusCode::NOT_FOUND, "not found\n"),
            }
        }
    }
}

/// The newest mail comes first, and open.
fn page(mails: &VecDeque<Mail>) -> String {
    let card = |(index, mail): (usize, &Mail)| {
        let subject = mail.header("subject");
        format!(
            "<details{open}><summary><b>{subject}</b><span>{from} → {to}</span></summary><pre>{body}</pre></details>\n",
            open = if index == 0 { " open" } else { "" },
            subject = if subject.is_empty() { "(no subject)".to_owned() } else { escape(subject) },
            from = escape(&mail.from),
            to = escape(&mail.to.join(", ")),
            body = escape(mail.body().trim_end())
        )
    };
    let cards: String = mails.iter().rev().enumerate().map(card).collect();
    let cards = if cards.is_empty() { NO_MAIL.to_owned() } else { cards };
    let count = match mails.len() {
        0 => "empty".to_owned(),
        1 => "1 mail".to_owned(),
        count => format!("{count} mails"),
    };
    PAGE.replace("{count}", &count).replace("{cards}", &cards)
}

const NO_MAIL: &str = "<p class=none>Nothing has arrived yet. Whatever a pod sends to <code>maildev.mail:1025</code> \
    by SMTP is caught here and goes no further.</p>";

const PAGE: &str = "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width,initial-scale=1'>
<title>MailDev</title><link rel=icon href='data:,'><style>
:root{color-scheme:light dark;--paper:#faf7f2;--ink:#24211d;--soft:#6f675c;--line:#e2dacd;--card:#fff;--sea:#0b6e75}
@media(prefers-color-scheme:dark){:root{--paper:#171512;--ink:#ece6db;--soft:#a59b8c;--line:#37322b;--card:#201d19;--sea:#5cc2c7}}
*{box-sizing:border-box}body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 system-ui,sans-serif}
header,main{max-width:50rem;margin:auto;padding:1.1rem 1.5rem}header{display:flex;align-items:baseline;justify-content:space-between;border-bottom:1px solid var(--line)}
h1{margin:0;font:600 1rem/1.4 system-ui,sans-serif;color:var(--sea)}header a{color:var(--soft);text-decoration:none}.count,.none{color:var(--soft)}header a:hover{color:var(--sea)}
details{background:var(--card);border:1px solid var(--line);border-radius:10px;margin:1rem 0}summary{cursor:pointer;padding:.9rem 1.2rem;display:flex;flex-wrap:wrap;gap:.2rem 1rem;justify-content:space-between;overflow-wrap:anywhere}
summary span{color:var(--soft);font-size:.92rem}pre{margin:0;padding:1rem 1.2rem;border-top:1px solid var(--line);font:15px/1.5 ui-monospace,monospace;white-space:pre-wrap;overflow-wrap:anywhere}
</style><header><h1>MailDev</h1><span class=count>{count} · <a href=/>look again</a></span></header><main>
{cards}</main></html>";

async fn session(stream: TcpStream, mailbox: &Shared) -> Option<()> {
    let (read, mut write) = stream.into_split();
    let mut read = BufReader::new(read);
    write.write_all(b"220 maildev ESMTP\r\n").await.ok()?;
    let mut mail = Mail::default();
    loop {
        let line = line(&mut read).await?;
        let upper = line.to_ascii_uppercase();
        let reply: &[u8] = if upper.starts_with("EHLO") || upper.starts_with("HELO") {
            b"250 maildev\r\n"
        } else if upper.starts_with("MAIL FROM:") {
            mail = Mail { from: address(&line[10..]), ..Mail::default() };
            b"250 OK\r\n"
        } else if upper.starts_with("RCPT TO:") && mail.to.len() < 100 {
            mail.to.push(address(&line[8..]));
            b"250 OK\r\n"
        } else if upper == "DATA" && !mail.to.is_empty() {
            write.write_all(b"354 end with a dot\r\n").await.ok()?;
            mail.data = data(&mut read).await?;
            keep(mailbox, std::mem::take(&mut mail));
            b"250 OK: queued\r\n"
        } else if upper == "RSET" {
            mail = Mail::default();
            b"250 OK\r\n"
        } else if upper == "NOOP" {
            b"250 OK\r\n"
        } else if upper == "QUIT" {
            write.write_all(b"221 bye\r\n").await.ok()?;
            return Some(());
        } else {
            b"503 bad sequence or unknown command\r\n"
        };
        write.write_all(reply).await.ok()?;
    }
}

fn keep(mailbox: &Shared, mut mail: Mail) {
    let mut mailbox = mailbox.borrow_mut();
    mailbox.next += 1;
    mail.id = mailbox.next;
    if mailbox.mails.len() == MAILS_MAX {
        mailbox.mails.pop_front();
    }
    mailbox.mails.push_back(mail);
}

fn address(text: &str) -> String {
    let text = text.trim().split(' ').next().unwrap_or_default();
    text.trim_start_matches('<').trim_end_matches('>').to_owned()
}

async fn line(read: &mut (impl AsyncBufReadExt + Unpin)) -> Option<String> {
    let mut line = String::new();
    let mut limited = read.take(LINE_MAX);
    let count = tokio::time::timeout(PATIENCE, limited.read_line(&mut line)).await.ok()?.ok()?;
    (count > 0 && line.ends_with('\n')).then(|| line.trim_end().to_owned())
}

/// The lines up to a lone dot, dots unstuffed.
async fn data(read: &mut (impl AsyncBufReadExt + Unpin)) -> Option<String> {
    let mut out = String::new();
    loop {
        let line = line(read).await?;
        if line == "." {
            return Some(out);
        }
        if out.len() + line.len() > MAIL_BYTES_MAX {
            return None;
        }
        out.push_str(line.strip_prefix('.').unwrap_or(&line));
        out.push_str("\r\n");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mail_is_taken_apart() {
        let mail = Mail { data: "Subject: Hello\r\nX: y\r\n\r\nbody\r\n".into(), ..Mail::default() };
        assert_eq!((mail.header("subject"), mail.body()), ("Hello", "body\r\n"));
        assert_eq!(address(" <a@b> SIZE=3"), "a@b");
    }

    #[test]
    fn the_newest_mail_is_open_and_none_writes_html() {
        assert!(page(&VecDeque::new()).contains("maildev.mail:1025"));
        let mail = |subject: &str| Mail { data: format!("Subject: {subject}\r\n\r\n<i>"), ..Mail::default() };
        let out = page(&VecDeque::from([mail("first"), mail("<b>last")]));
        assert!(out.contains("2 mails") && out.contains("&lt;i&gt;") && !out.contains("<i>"), "{out}");
        let (open, closed) =
            (out.find("<details open><summary><b>&lt;b&gt;last"), out.find("<details><summary><b>first"));
        assert!(open.is_some() && open < closed, "{out}");
    }

    #[tokio::test]
    async fn dots_are_unstuffed() {
        let mut bytes = &b"a\r\n..b\r\n.\r\nQUIT\r\n"[..];
        assert_eq!(data(&mut bytes).await.unwrap(), "a\r\n.b\r\n");
    }
}
