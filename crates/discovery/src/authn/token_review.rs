//! Tokens checked by the local node: `POST /tokenreview` over its Unix socket.

use std::path::PathBuf;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper_util::rt::TokioIo;
use serde::{Deserialize, Serialize};
use tokio::net::UnixStream;
use types::wellknown::TOKEN_AUDIENCE;

use super::{ServiceAccount, TokenAuthenticator, Unauthenticated};

/// One review takes no longer.
const TIMEOUT: Duration = Duration::from_secs(5);
const ANSWER_BYTES_MAX: usize = 64 * 1024;

/// Asks the node that minted the tokens.
#[derive(Clone, Debug)]
pub struct TokenReview {
    socket: PathBuf,
}

#[derive(Serialize)]
struct Question<'a> {
    token: &'a str,
    audience: &'a str,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Answer {
    authenticated: bool,
    #[serde(default)]
    namespace: String,
    #[serde(default)]
    service_account: String,
    #[serde(default)]
    pod: Option<String>,
    #[serde(default)]
    error: Option<String>,
}

impl TokenReview {
    /// Asks over `socket`.
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self { socket: socket.into() }
    }

    async fn ask(&self, token: &str) -> Result<Answer, Box<dyn std::error::Error + Send + Sync>> {
        let stream = UnixStream::connect(&self.socket).await?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        let body = serde_json::to_vec(&Question { token, audience: TOKEN_AUDIENCE })?;
        let request = http::Request::post("/tokenreview")
            .header(http::header::HOST, "node")
            .header(http::header::CONTENT_TYPE, "application/json")
            .body(Full::new(Bytes::from(body)))?;
        let exchange = async {
            let response = sender.send_request(request).await?;
            let status = response.status();
            let body = Limited::new(response.into_body(), ANSWER_BYTES_MAX).collect().await?.to_bytes();
            if !status.is_success() {
                return Err(format!("the node answered {status}").into());
            }
            Ok(serde_json::from_slice(&body)?)
        };
        // The connection is driven only as long as the exchange takes.
        tokio::select! {
            answer = exchange => answer,
            ended = connection => Err(match ended {
                Ok(()) => "the node closed the connection".into(),
                Err(error) => error.into(),
            }),
        }
    }
}

impl TokenAuthenticator for TokenReview {
    fn name(&self) -> &'static str {
        "token review"
    }

    fn authenticate<'a>(&'a self, token: &'a str) -> BoxFuture<'a, Result<ServiceAccount, Unauthenticated>> {
        Box::pin(async move {
            let answer = tokio::time::timeout(TIMEOUT, self.ask(token))
                .await
                .map_err(|_| Unauthenticated::Unavailable("the node does not answer".to_owned()))?
                .map_err(|error| Unauthenticated::Unavailable(error.to_string()))?;
            if !answer.authenticated {
                return Err(Unauthenticated::Token(answer.error.unwrap_or_else(|| "not authenticated".to_owned())));
            }
            Ok(ServiceAccount {
                namespace: answer.namespace.into(),
                name: answer.service_account.into(),
                pod: answer.pod.filter(|pod| !pod.is_empty()).map(Into::into),
            })
        })
    }
}
