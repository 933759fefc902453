//! What an explanation says, and how it reads.

use std::fmt::{self, Write as _};

use serde::Serialize;
use types::{Cause, Finding, ObjectRef, Position, RequestHead};

/// The answer to one [`crate::Call`].
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Explanation {
    /// The call, in one line.
    pub call: String,
    /// What was assumed or left out.
    pub notes: Vec<String>,
    /// Every way the call can go, the most frequent first; shares add up to 100.
    pub paths: Vec<Path>,
    /// What is wrong with the configuration of the proxies on the way.
    pub findings: Vec<Finding>,
}

/// One way a call can go.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Path {
    /// In how many of a hundred calls.
    pub percent: f64,
    /// The share follows from weights; else it was counted over many draws.
    pub is_exact: bool,
    /// Proxies on the way, in order.
    pub hops: Vec<Hop>,
    /// How it ends.
    pub end: End,
}

/// Which part of the way a hop is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Side {
    /// The caller's sidecar.
    Outbound,
    /// The called workload's sidecar.
    Inbound,
    /// A gateway.
    Gateway,
    /// No proxy there: the application itself.
    Unproxied,
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Outbound => "outbound",
            Self::Inbound => "inbound",
            Self::Gateway => "gateway",
            Self::Unproxied => "no proxy",
        })
    }
}

/// One proxy's part.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Hop {
    /// `namespace/pod`
    pub proxy: String,
    /// Which part of the way.
    pub side: Side,
    /// What it decides, in order.
    pub decisions: Vec<Decision>,
    /// The request as it leaves the proxy; none where it ends here, or travels as bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub request: Option<Request>,
}

/// A request on the wire, as far as the mesh makes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Request {
    /// `GET`, …
    pub method: String,
    /// `host` or `:authority`.
    pub authority: String,
    /// Path and query.
    pub path: String,
    /// Names in lower case, in order.
    pub headers: Vec<(String, String)>,
}

impl Request {
    pub(crate) fn of(head: &RequestHead) -> Self {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Self {
            method: head.method().to_owned(),
            authority: text(head.authority()),
            path: text(head.path()),
            headers: head.fields.iter().map(|(name, value)| (name.to_owned(), text(value))).collect(),
        }
    }
}

/// One decision.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Decision {
    /// `state`, `mtls`, `listener`, `chain`, `routes`, `host`, `route`, `policy`, `token`, `fault`,
    /// `authorize`, `filter`, `cluster`, `limits`, `endpoint`, `transport`, `mirror`, `retry`.
    pub stage: &'static str,
    /// A name, an address, a verdict.
    pub outcome: String,
    /// More about it; empty for none.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub detail: String,
    /// The objects that made it so.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub because: Vec<Because>,
    /// What was there too and did not win.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub lost: Vec<Lost>,
}

/// An object, or a field of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Because {
    /// The object.
    pub object: ObjectRef,
    /// `spec.http[0]`; empty for the whole object.
    #[serde(skip_serializing_if = "str::is_empty")]
    pub field: Box<str>,
    /// Where it was written, if known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub position: Option<Position>,
}

impl fmt::Display for Because {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.object.fmt(f)?;
        if !self.field.is_empty() {
            write!(f, " {}", self.field)?;
        }
        match &self.position {
            Some(position) => write!(f, " ({}:{})", position.file, position.line),
            None => Ok(()),
        }
    }
}

/// What did not win.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Lost {
    /// Its name.
    pub what: String,
    /// Why not.
    pub why: String,
    /// Where it comes from.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub because: Vec<Because>,
}

/// How a path ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum EndKind {
    /// An application gets the call.
    Delivered,
    /// A proxy answers by itself.
    Answered,
    /// A connection is closed, or not made.
    Closed,
    /// It goes somewhere the mesh knows nothing about.
    Left,
}

/// The end of a path.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct End {
    /// Which.
    pub kind: EndKind,
    /// In words.
    pub text: String,
    /// What the caller gets, where the mesh decides it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub status: Option<u16>,
    /// Why, if the mesh ends it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cause: Option<Cause>,
    /// The response flag in the access log.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub flag: Option<String>,
    /// The response code details in the access log.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub details: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "str::is_empty")]
    pub remedy: &'static str,
    /// Headers of an answer that a proxy makes.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub headers: Vec<(String, String)>,
}

impl End {
    /// An end that is no failure.
    pub(crate) fn good(kind: EndKind, text: String) -> Self {
        Self {
            kind,
            text,
            status: None,
            cause: None,
            flag: None,
            details: String::new(),
            remedy: "",
            headers: Vec::new(),
        }
    }

    /// An end that the mesh makes.
    pub(crate) fn cause(kind: EndKind, cause: Cause, text: String) -> Self {
        let surface = cause.surface();
        let status = (surface.status != 0).then_some(surface.status);
        Self {
            kind,
            text,
            status,
            cause: Some(cause),
            flag: (surface.flag != "-").then(|| surface.flag.to_owned()),
            details: surface.details.to_owned(),
            remedy: surface.remedy,
            headers: Vec::new(),
        }
    }
}

impl Explanation {
    /// Says where each object was written; `find` knows object and field.
    pub fn locate(&mut self, find: &dyn Fn(&ObjectRef, &str) -> Option<Position>) {
        let locate = |because: &mut Vec<Because>| {
            for one in because {
                if one.position.is_none() {
                    one.position = find(&one.object, &one.field);
                }
            }
        };
        for decision in self.paths.iter_mut().flat_map(|path| &mut path.hops).flat_map(|hop| &mut hop.decisions) {
            locate(&mut decision.because);
            decision.lost.iter_mut().for_each(|lost| locate(&mut lost.because));
        }
        for finding in &mut self.findings {
            if let (None, Some(object)) = (&finding.position, &finding.object) {
                finding.position = find(object, &finding.field);
            }
        }
    }
}

/// How many losers of one decision the text shows.
const LOST_SHOWN: usize = 6;

fn decision_lines(decision: &Decision, lines: &mut Vec<String>) {
    let mut line = format!("   {:<10} {}", decision.stage, decision.outcome);
    if !decision.detail.is_empty() {
        _ = write!(line, "  ({})", decision.detail);
    }
    lines.push(line);
    for because in &decision.because {
        lines.push(format!("              because {because}"));
    }
    for lost in decision.lost.iter().take(LOST_SHOWN) {
        let from = lost.because.first().map(|because| format!(" [{because}]")).unwrap_or_default();
        lines.push(format!("              not {}: {}{from}", lost.what, lost.why));
    }
    if decision.lost.len() > LOST_SHOWN {
        lines.push(format!("              and {} more", decision.lost.len() - LOST_SHOWN));
    }
}

fn path_lines(path: &Path) -> Vec<String> {
    let mut lines = Vec::new();
    for (at, hop) in path.hops.iter().enumerate() {
        lines.push(format!("{}. {} {}", at + 1, hop.proxy, hop.side));
        hop.decisions.iter().for_each(|decision| decision_lines(decision, &mut lines));
    }
    let end = &path.end;
    let mut line = format!("=> {}", end.text);
    if let Some(flag) = &end.flag {
        _ = write!(line, " [{flag}]");
    }
    if !end.details.is_empty() {
        _ = write!(line, " {}", end.details);
    }
    lines.push(line);
    if !end.remedy.is_empty() {
        lines.push(format!("   remedy: {}", end.remedy));
    }
    lines
}

fn share(path: &Path) -> String {
    let number = if path.percent < 1.0 { format!("{:.1}", path.percent) } else { format!("{:.0}", path.percent) };
    if path.is_exact { format!("{number}%") } else { format!("about {number}%") }
}

impl fmt::Display for Explanation {
    /// What all paths share once, then each path with its share.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.call)?;
        for note in &self.notes {
            writeln!(f, "note: {note}")?;
        }
        for finding in &self.findings {
            writeln!(f, "finding: {finding}")?;
        }
        let all: Vec<Vec<String>> = self.paths.iter().map(path_lines).collect();
        let Some((first, others)) = all.split_first() else { return Ok(()) };
        if others.is_empty() {
            return first.iter().try_for_each(|line| writeln!(f, "{line}"));
        }
        let shared = |other: &Vec<String>| first.iter().zip(other).take_while(|(a, b)| a == b).count();
        let common = others.iter().map(shared).min().unwrap_or(0);
        first[..common].iter().try_for_each(|line| writeln!(f, "{line}"))?;
        for (path, lines) in self.paths.iter().zip(&all) {
            writeln!(f, "{}:", share(path))?;
            lines[common..].iter().try_for_each(|line| writeln!(f, "  {line}"))?;
        }
        Ok(())
    }
}
