//! Stand-ins for the images of well-known sample applications.
//!
//! A pod of the local mesh runs programs of this machine. So that Istio's own sample YAML works
//! unmodified, [`stand_in`] says which of our programs plays which image, and [`run`] is that
//! program: bookinfo's four services with their versions, links and documented time-outs, a mail
//! catcher, httpbin, helloworld, tcp-echo, a gRPC echo, an echo of whatever comes, and a container
//! that only sleeps.
//!
//! **Invariants.** No stand-in knows of the mesh: it speaks plain HTTP, SMTP or TCP on its port and
//! finds others by name, as it would in its container. All memory that a peer can fill is bounded.

mod any_echo;
mod bookinfo;
mod catalogue;
mod grpc_echo;
mod http_app;
mod httpbin;
mod maildev;
mod plain;

pub use catalogue::stand_in;

use thiserror::Error;

/// Why a sample did not start or ended.
#[derive(Debug, Error)]
pub enum SampleError {
    /// No sample of that name.
    #[error("there is no sample {0:?}; known: {known}", known = NAMES.join(", "))]
    Unknown(String),
    /// An option without value, or an unknown one.
    #[error("sample {sample}: unusable option {option:?}")]
    Option {
        /// The sample.
        sample: String,
        /// The option at fault.
        option: String,
    },
    /// A port could not be opened.
    #[error("cannot listen on port {port}")]
    Listen {
        /// The port.
        port: u16,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The runtime could not be made.
    #[error("cannot start")]
    Start(#[source] std::io::Error),
}

/// The names [`run`] takes.
pub const NAMES: &[&str] = &[
    "productpage",
    "details",
    "reviews",
    "ratings",
    "maildev",
    "httpbin",
    "helloworld",
    "tcp-echo",
    "grpc-echo",
    "any-echo",
    "sleep",
];

/// A listener that cannot accept, usually for lack of descriptors, is asked again after this long.
pub(crate) const ACCEPT_AGAIN: std::time::Duration = std::time::Duration::from_millis(20);

/// Options of a sample, as its command line gives them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Options {
    /// `--version v1`
    pub version: String,
    /// `--port 9080`; 0 takes the sample's own.
    pub port: u16,
    /// Everything else, in order.
    pub rest: Vec<String>,
}

fn parse(sample: &str, args: &[String]) -> Result<Options, SampleError> {
    let mut options = Options { version: "v1".into(), port: 0, rest: Vec::new() };
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        let bad = || SampleError::Option { sample: sample.to_owned(), option: arg.clone() };
        match arg.as_str() {
            "--version" => options.version = args.next().ok_or_else(bad)?.clone(),
            "--port" => options.port = args.next().and_then(|port| port.parse().ok()).ok_or_else(bad)?,
            other if other.starts_with("--") => return Err(bad()),
            _ => options.rest.push(arg.clone()),
        }
    }
    if let Ok(version) = std::env::var("SERVICE_VERSION")
        && !version.is_empty()
    {
        options.version = version;
    }
    Ok(options)
}

/// A line of the container's log.
pub(crate) fn say(line: &str) {
    use std::io::Write as _;
    // A log that nobody takes is no reason to stop.
    _ = writeln!(std::io::stdout(), "{line}");
}

/// Runs the sample `name` until SIGTERM or SIGINT. Blocks.
pub fn run(name: &str, args: &[String]) -> Result<(), SampleError> {
    if !NAMES.contains(&name) {
        return Err(SampleError::Unknown(name.to_owned()));
    }
    let options = parse(name, args)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(SampleError::Start)?;
    runtime.block_on(async {
        match name {
            "productpage" => bookinfo::productpage::serve(&options).await,
            "details" => bookinfo::details::serve(&options).await,
            "reviews" => bookinfo::reviews::serve(&options).await,
            "ratings" => bookinfo::ratings::serve(&options).await,
            "maildev" => maildev::serve(&options).await,
            "httpbin" => httpbin::serve(&options).await,
            "helloworld" => plain::helloworld(&options).await,
            "tcp-echo" => plain::tcp_echo(&options).await,
            "any-echo" => any_echo::serve(&options).await,
            "grpc-echo" => grpc_echo::serve(&options).await,
            _ => {
                plain::until_told_to_stop().await;
                Ok(())
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options() {
        let args = |list: &[&str]| list.iter().map(|arg| (*arg).to_owned()).collect::<Vec<_>>();
        let parsed = parse("x", &args(&["--version", "v2", "9000", "--port", "81", "hello"])).unwrap();
        assert_eq!((parsed.version.as_str(), parsed.port), ("v2", 81));
        assert_eq!(parsed.rest, ["9000", "hello"]);
        assert!(parse("x", &args(&["--port", "x"])).is_err());
        assert!(parse("x", &args(&["--what"])).is_err());
        assert!(matches!(run("nope", &[]), Err(SampleError::Unknown(_))));
    }
}
