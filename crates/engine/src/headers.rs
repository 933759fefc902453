//! Header edits. (First form: literal values only, until its owner replaces it.)

use envoy_types::pb::envoy::config::core::v3 as core;
use types::{Fields, RequestHead, ResponseHead};

use crate::exchange::StreamInfo;
use crate::facts::{ConnFacts, Now};
use crate::unsupported::Unsupported;

/// What formatters may read.
#[derive(Clone, Copy)]
pub struct Context<'a> {
    /// The connection.
    pub conn: &'a ConnFacts,
    /// The request so far.
    pub info: &'a StreamInfo,
    /// The moment.
    pub now: Now,
}

impl<'a> Context<'a> {
    /// From its parts.
    pub fn new(conn: &'a ConnFacts, info: &'a StreamInfo, now: Now) -> Self {
        Self { conn, info, now }
    }
}

/// Edits of one level.
#[derive(Debug, Default)]
pub struct HeaderEdits {
    add: Vec<(Box<str>, Box<[u8]>, bool)>,
    remove: Vec<Box<str>>,
}

impl HeaderEdits {
    /// Lowers additions and removals.
    pub fn lower(add: &[core::HeaderValueOption], remove: &[String]) -> Result<Self, Unsupported> {
        let mut edits = Self::default();
        for option in add {
            let header = option.header.as_ref().ok_or_else(|| Unsupported::missing("header"))?;
            if header.value.contains('%') {
                return Err(Unsupported::not_built("header.value with a formatter"));
            }
            let append = option.append_action == 0;
            edits.add.push((header.key.to_ascii_lowercase().into(), header.value.as_bytes().into(), append));
        }
        edits.remove = remove.iter().map(|name| name.to_ascii_lowercase().into()).collect();
        Ok(edits)
    }

    fn apply(&self, fields: &mut Fields) {
        for (name, value, append) in &self.add {
            if name.starts_with(':') || &**name == "host" {
                continue;
            }
            if *append { fields.push(name, value) } else { fields.set(name, value) }
        }
        for name in &self.remove {
            fields.remove(name);
        }
    }

    /// Edits a request.
    pub fn apply_request(&self, head: &mut RequestHead, _: &Context<'_>) {
        self.apply(&mut head.fields);
    }

    /// Edits a response.
    pub fn apply_response(&self, head: &mut ResponseHead, _: &RequestHead, _: &Context<'_>) {
        self.apply(&mut head.fields);
    }
}
