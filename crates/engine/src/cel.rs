//! The part of CEL that access-log filters use: comparisons of request, response and connection
//! attributes, joined by `&&`, `||`, `!`.
//!
//! *Source*: Envoy's attributes, CEL's grammar. An expression outside this part is refused when the
//! log is lowered; one that meets a missing attribute while evaluated is false.

use std::cmp::Ordering;

use crate::access_log::LogRecord;
use crate::unsupported::Unsupported;

/// A compiled expression.
#[derive(Debug, Clone, PartialEq)]
pub struct Expression(Node);

#[derive(Debug, Clone, PartialEq)]
enum Node {
    Or(Box<Node>, Box<Node>),
    And(Box<Node>, Box<Node>),
    Not(Box<Node>),
    Compare(Box<Node>, Compare, Box<Node>),
    Has(Attribute),
    Call(Box<Node>, Method, Box<Node>),
    Attribute(Attribute),
    Literal(Literal),
    List(Vec<Literal>),
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Compare {
    Equal,
    NotEqual,
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
    In,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Method {
    StartsWith,
    EndsWith,
    Contains,
}

#[derive(Debug, Clone, PartialEq)]
enum Literal {
    Text(String),
    Number(i64),
    Bool(bool),
}

#[derive(Debug, Clone, PartialEq)]
enum Attribute {
    RequestHeader(Box<str>),
    ResponseHeader(Box<str>),
    Named(&'static str),
}

/// Attributes that can be read.
const NAMED: &[&str] = &[
    "request.method",
    "request.path",
    "request.url_path",
    "request.host",
    "request.scheme",
    "request.useragent",
    "request.referer",
    "request.id",
    "request.protocol",
    "request.size",
    "request.duration",
    "response.code",
    "response.code_details",
    "response.flags",
    "response.grpc_status",
    "response.size",
    "source.address",
    "source.port",
    "destination.address",
    "destination.port",
    "connection.mtls",
    "connection.requested_server_name",
    "connection.tls_version",
    "connection.uri_san_peer_certificate",
    "connection.termination_details",
    "upstream.address",
    "upstream.cluster",
    "xds.cluster_name",
    "xds.route_name",
];

enum Value<'a> {
    Missing,
    Text(std::borrow::Cow<'a, str>),
    Number(i64),
    Bool(bool),
}

impl Expression {
    /// Compiles an expression.
    pub fn compile(source: &str) -> Result<Self, Unsupported> {
        let tokens = tokens(source)?;
        let mut parser = Parser { tokens: &tokens, at: 0, depth: 0 };
        let node = parser.or()?;
        if parser.at == tokens.len() { Ok(Self(node)) } else { Err(parser.bad()) }
    }

    /// Whether it is true.
    pub fn holds(&self, record: &LogRecord<'_>) -> bool {
        self.0.truth(record)
    }
}

#[derive(Debug, Clone, PartialEq)]
enum Token {
    Word(String),
    Text(String),
    Number(i64),
    Sign(&'static str),
}

const SIGNS: &[&str] = &["&&", "||", "==", "!=", "<=", ">=", "<", ">", "!", "(", ")", "[", "]", ",", "."];

fn tokens(source: &str) -> Result<Vec<Token>, Unsupported> {
    let bad = |why: &str| Unsupported::new("expression", format!("{source:?} {why}"));
    if source.len() > 4096 {
        return Err(bad("is too long"));
    }
    let mut tokens = Vec::new();
    let mut rest = source.trim_start();
    while let Some(first) = rest.chars().next() {
        if first == '"' || first == '\'' {
            let end = rest[1..].find(first).ok_or_else(|| bad("has an open string"))?;
            let text = &rest[1..=end];
            if text.contains('\\') {
                return Err(bad("has an escape, which is not supported"));
            }
            tokens.push(Token::Text(text.to_owned()));
            rest = &rest[end + 2..];
        } else if first.is_ascii_digit() || (first == '-' && rest[1..].starts_with(|c: char| c.is_ascii_digit())) {
            let end = rest[1..].find(|c: char| !c.is_ascii_digit()).map_or(rest.len(), |at| at + 1);
            tokens.push(Token::Number(rest[..end].parse().map_err(|_| bad("has a number that is too large"))?));
            rest = &rest[end..];
            if rest.starts_with(['.', 'u', 'e', 'x']) {
                return Err(bad("has a number that is not whole"));
            }
        } else if first.is_ascii_alphabetic() || first == '_' {
            let end = rest.find(|c: char| !(c.is_ascii_alphanumeric() || c == '_')).unwrap_or(rest.len());
            tokens.push(Token::Word(rest[..end].to_owned()));
            rest = &rest[end..];
        } else {
            let sign = SIGNS.iter().find(|sign| rest.starts_with(**sign)).ok_or_else(|| bad("is not understood"))?;
            tokens.push(Token::Sign(sign));
            rest = &rest[sign.len()..];
        }
        rest = rest.trim_start();
    }
    Ok(tokens)
}

struct Parser<'a> {
    tokens: &'a [Token],
    at: usize,
    depth: u32,
}

impl Parser<'_> {
    fn bad(&self) -> Unsupported {
        Unsupported::new("expression", format!("is not supported from token {} on", self.at + 1))
    }

    fn sign(&mut self, sign: &str) -> bool {
        let found = matches!(self.tokens.get(self.at), Some(Token::Sign(found)) if *found == sign);
        self.at += usize::from(found);
        found
    }

    fn need(&mut self, sign: &str) -> Result<(), Unsupported> {
        if self.sign(sign) { Ok(()) } else { Err(self.bad()) }
    }

    fn or(&mut self) -> Result<Node, Unsupported> {
        self.depth += 1;
        if self.depth > 64 {
            return Err(Unsupported::new("expression", "is nested too deeply"));
        }
        let mut left = self.and()?;
        while self.sign("||") {
            left = Node::Or(Box::new(left), Box::new(self.and()?));
        }
        self.depth -= 1;
        Ok(left)
    }

    fn and(&mut self) -> Result<Node, Unsupported> {
        let mut left = self.relation()?;
        while self.sign("&&") {
            left = Node::And(Box::new(left), Box::new(self.relation()?));
        }
        Ok(left)
    }

    fn relation(&mut self) -> Result<Node, Unsupported> {
        let left = self.unary()?;
        let by_sign = [
            ("==", Compare::Equal),
            ("!=", Compare::NotEqual),
            ("<=", Compare::LessOrEqual),
            (">=", Compare::GreaterOrEqual),
            ("<", Compare::Less),
            (">", Compare::Greater),
        ];
        let mut compare = by_sign.into_iter().find(|(sign, _)| self.sign(sign)).map(|(_, compare)| compare);
        if compare.is_none() && self.tokens.get(self.at) == Some(&Token::Word("in".to_owned())) {
            self.at += 1;
            compare = Some(Compare::In);
        }
        match compare {
            None => Ok(left),
            Some(compare) => Ok(Node::Compare(Box::new(left), compare, Box::new(self.unary()?))),
        }
    }

    fn unary(&mut self) -> Result<Node, Unsupported> {
        if self.sign("!") {
            self.depth += 1;
            if self.depth > 64 {
                return Err(Unsupported::new("expression", "is nested too deeply"));
            }
            let inner = self.unary()?;
            self.depth -= 1;
            return Ok(Node::Not(Box::new(inner)));
        }
        if self.sign("(") {
            let inner = self.or()?;
            self.need(")")?;
            return Ok(inner);
        }
        if self.sign("[") {
            let mut list = Vec::new();
            while !self.sign("]") {
                if !list.is_empty() {
                    self.need(",")?;
                }
                list.push(self.literal()?);
            }
            return Ok(Node::List(list));
        }
        match self.tokens.get(self.at) {
            Some(Token::Word(word)) if word == "has" => {
                self.at += 1;
                self.need("(")?;
                let (attribute, method) = self.attribute()?;
                self.need(")")?;
                if method.is_some() { Err(self.bad()) } else { Ok(Node::Has(attribute)) }
            }
            Some(Token::Word(word)) if word != "true" && word != "false" => {
                let (attribute, method) = self.attribute()?;
                let attribute = Node::Attribute(attribute);
                match method {
                    None => Ok(attribute),
                    Some(method) => {
                        self.need("(")?;
                        let argument = Node::Literal(self.literal()?);
                        self.need(")")?;
                        Ok(Node::Call(Box::new(attribute), method, Box::new(argument)))
                    }
                }
            }
            _ => self.literal().map(Node::Literal),
        }
    }

    fn literal(&mut self) -> Result<Literal, Unsupported> {
        let literal = match self.tokens.get(self.at) {
            Some(Token::Text(text)) => Literal::Text(text.clone()),
            Some(Token::Number(number)) => Literal::Number(*number),
            Some(Token::Word(word)) if word == "true" => Literal::Bool(true),
            Some(Token::Word(word)) if word == "false" => Literal::Bool(false),
            _ => return Err(self.bad()),
        };
        self.at += 1;
        Ok(literal)
    }

    fn attribute(&mut self) -> Result<(Attribute, Option<Method>), Unsupported> {
        let mut path = Vec::new();
        loop {
            match self.tokens.get(self.at) {
                Some(Token::Word(word)) => path.push(word.clone()),
                _ => return Err(self.bad()),
            }
            self.at += 1;
            if self.sign("[") {
                let Literal::Text(key) = self.literal()? else { return Err(self.bad()) };
                self.need("]")?;
                path.push(key);
            }
            if !self.sign(".") {
                break;
            }
        }
        let method = match path.last().map(String::as_str) {
            Some("startsWith") => Some(Method::StartsWith),
            Some("endsWith") => Some(Method::EndsWith),
            Some("contains") => Some(Method::Contains),
            _ => None,
        };
        if method.is_some() {
            path.pop();
        }
        let parts: Vec<&str> = path.iter().map(String::as_str).collect();
        let attribute = match parts[..] {
            ["request", "headers", name] => Attribute::RequestHeader(name.to_ascii_lowercase().into()),
            ["response", "headers", name] => Attribute::ResponseHeader(name.to_ascii_lowercase().into()),
            _ => {
                let whole = parts.join(".");
                let named = NAMED.iter().find(|named| **named == whole);
                Attribute::Named(named.ok_or_else(|| {
                    Unsupported::new("expression", format!("reads {whole:?}, which is not supported"))
                })?)
            }
        };
        Ok((attribute, method))
    }
}

impl Node {
    fn truth(&self, record: &LogRecord<'_>) -> bool {
        match self {
            Self::Or(a, b) => a.truth(record) || b.truth(record),
            Self::And(a, b) => a.truth(record) && b.truth(record),
            Self::Not(inner) => !inner.truth(record),
            Self::Has(attribute) => !matches!(attribute.read(record), Value::Missing),
            Self::Compare(a, compare, b) => match (&**b, compare) {
                (Self::List(list), Compare::In) => {
                    let value = a.value(record);
                    list.iter().any(|literal| value.compare(&literal.value()) == Some(Ordering::Equal))
                }
                _ => a.value(record).compare(&b.value(record)).is_some_and(|order| match compare {
                    Compare::Equal => order == Ordering::Equal,
                    Compare::NotEqual => order != Ordering::Equal,
                    Compare::Less => order == Ordering::Less,
                    Compare::LessOrEqual => order != Ordering::Greater,
                    Compare::Greater => order == Ordering::Greater,
                    Compare::GreaterOrEqual => order != Ordering::Less,
                    Compare::In => false,
                }),
            },
            Self::Call(value, method, argument) => match (value.value(record), argument.value(record)) {
                (Value::Text(text), Value::Text(part)) => match method {
                    Method::StartsWith => text.starts_with(&*part),
                    Method::EndsWith => text.ends_with(&*part),
                    Method::Contains => text.contains(&*part),
                },
                _ => false,
            },
            Self::Attribute(_) | Self::Literal(_) => matches!(self.value(record), Value::Bool(true)),
            Self::List(_) => false,
        }
    }

    fn value<'a>(&'a self, record: &LogRecord<'a>) -> Value<'a> {
        match self {
            Self::Attribute(attribute) => attribute.read(record),
            Self::Literal(literal) => literal.value(),
            other => Value::Bool(other.truth(record)),
        }
    }
}

impl Literal {
    fn value(&self) -> Value<'_> {
        match self {
            Self::Text(text) => Value::Text(text.as_str().into()),
            Self::Number(number) => Value::Number(*number),
            Self::Bool(truth) => Value::Bool(*truth),
        }
    }
}

impl Value<'_> {
    fn compare(&self, other: &Value<'_>) -> Option<Ordering> {
        match (self, other) {
            (Value::Text(a), Value::Text(b)) => Some(a.cmp(b)),
            (Value::Number(a), Value::Number(b)) => Some(a.cmp(b)),
            (Value::Bool(a), Value::Bool(b)) => Some(a.cmp(b)),
            _ => None,
        }
    }
}

fn bytes(value: Option<std::borrow::Cow<'_, [u8]>>) -> Value<'_> {
    match value {
        None => Value::Missing,
        Some(value) => Value::Text(String::from_utf8_lossy(&value).into_owned().into()),
    }
}

fn number(value: u64) -> Value<'static> {
    Value::Number(i64::try_from(value).unwrap_or(i64::MAX))
}

impl Attribute {
    fn read<'a>(&self, record: &LogRecord<'a>) -> Value<'a> {
        let text = |text: &'a str| if text.is_empty() { Value::Missing } else { Value::Text(text.into()) };
        let owned = |text: String| Value::Text(text.into());
        let LogRecord { conn, info, request, response, .. } = *record;
        let header = |name: &str| bytes(request.and_then(|head| head.header(name)));
        match self {
            Self::RequestHeader(name) => header(name),
            Self::ResponseHeader(name) => bytes(response.and_then(|head| head.fields.joined(name))),
            Self::Named(name) => match *name {
                "request.method" => header(":method"),
                "request.path" => header(":path"),
                "request.url_path" => bytes(request.map(|head| head.path_only().into())),
                "request.host" => header(":authority"),
                "request.scheme" => header(":scheme"),
                "request.useragent" => header("user-agent"),
                "request.referer" => header("referer"),
                "request.id" => header("x-request-id"),
                "request.protocol" => request.map_or(Value::Missing, |head| text(head.version.as_str())),
                "request.size" => number(record.bytes_received),
                "request.duration" => number(u64::try_from(record.duration.as_nanos()).unwrap_or(u64::MAX)),
                "response.code" => response.map_or(Value::Missing, |head| Value::Number(head.status.into())),
                "response.code_details" => owned(info.details.as_str().to_owned()),
                "response.flags" => crate::access_log::flags(info).map_or(Value::Missing, owned),
                "response.grpc_status" => {
                    let status = record.trailers.and_then(|trailers| trailers.get_str("grpc-status"));
                    let status = status.or_else(|| response.and_then(|head| head.fields.get_str("grpc-status")));
                    status.and_then(|status| status.parse().ok()).map_or(Value::Missing, Value::Number)
                }
                "response.size" => number(record.bytes_sent),
                "source.address" => owned(info.client_address.unwrap_or(conn.peer).to_string()),
                "source.port" => Value::Number(conn.peer.port().into()),
                "destination.address" => owned(conn.local.to_string()),
                "destination.port" => Value::Number(conn.local.port().into()),
                "connection.mtls" => Value::Bool(conn.peer_certificate().is_some()),
                "connection.requested_server_name" => text(conn.server_name.as_deref().unwrap_or_default()),
                "connection.tls_version" => text(conn.tls.as_ref().map_or("", |tls| tls.version)),
                "connection.uri_san_peer_certificate" => {
                    text(conn.peer_certificate().and_then(|peer| peer.uri_sans.first()).map_or("", |uri| uri))
                }
                "connection.termination_details" => text(info.termination.as_str()),
                "upstream.address" => {
                    info.picked.as_ref().map_or(Value::Missing, |picked| owned(picked.host.address.to_string()))
                }
                "upstream.cluster" | "xds.cluster_name" => {
                    info.cluster.as_ref().map_or(Value::Missing, |cluster| text(&cluster.name))
                }
                "xds.route_name" => info.route_name.as_deref().map_or(Value::Missing, text),
                _ => Value::Missing,
            },
        }
    }
}
