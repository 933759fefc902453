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
                Err(_) => tokio::task::yield_now().await,
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

fn page(mails: &VecDeque<Mail>) -> String {
    let rows: String = mails
        .iter()
        .rev()
        .map(|mail| {
            format!(
                "<details><summary><b>{}</b> <span>{} → {}</span></summary><pre>{}</pre></details>",
                escape(mail.header("subject")),
                escape(&mail.from),
                escape(&mail.to.join(", ")),
                escape(mail.body())
            )
        })
        .collect();
    let rows = if rows.is_empty() { "<p class=none>No mail yet. Send some to port 1025.</p>".to_owned() } else { rows };
    format!(
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'><title>MailDev</title>\
         <style>:root{{color-scheme:light dark}}body{{font:16px/1.5 system-ui,sans-serif;max-width:48rem;margin:2rem auto;padding:0 1rem}}\
         details{{border:1px solid #8885;border-radius:8px;margin:.6rem 0;padding:.7rem 1rem}}summary{{cursor:pointer}}span,.none{{opacity:.65}}\
         pre{{white-space:pre-wrap}}</style><h1>MailDev</h1>{rows}</html>"
    )
}

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

    #[tokio::test]
    async fn dots_are_unstuffed() {
        let mut bytes = &b"a\r\n..b\r\n.\r\nQUIT\r\n"[..];
        assert_eq!(data(&mut bytes).await.unwrap(), "a\r\n.b\r\n");
    }
}
