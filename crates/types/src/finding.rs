//! Diagnostics on users' objects.

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// Where something was written. Lines and columns count from one.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub struct Position {
    /// The file as the user named it; `-` for standard input, empty when it came over the wire.
    pub file: Arc<str>,
    /// Line, from 1; 0 where the whole file is meant.
    pub line: u32,
    /// Column, from 1.
    pub column: u32,
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.line == 0 {
            return f.write_str(&self.file);
        }
        write!(f, "{}:{}:{}", self.file, self.line, self.column)
    }
}

/// Which object.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub struct ObjectRef {
    /// `VirtualService`, `Deployment`, …
    pub kind: Box<str>,
    /// Empty for objects without a namespace.
    pub namespace: Box<str>,
    /// The object's name.
    pub name: Box<str>,
}

impl ObjectRef {
    /// The three parts, as given.
    pub fn new(kind: &str, namespace: &str, name: &str) -> Self {
        Self { kind: kind.into(), namespace: namespace.into(), name: name.into() }
    }
}

impl fmt::Display for ObjectRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.namespace.is_empty() {
            write!(f, "{} {}", self.kind, self.name)
        } else {
            write!(f, "{} {}/{}", self.kind, self.namespace, self.name)
        }
    }
}

/// How grave a finding is. Ordered from harmless to grave.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Worth knowing.
    Info,
    /// Probably not what was meant.
    Warning,
    /// The object, or a part of it, has no effect, or would not be admitted.
    Error,
}

/// One diagnostic: what is wrong, where, and what to do.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Finding {
    /// A stable code: Istio's (`IST0101`) where Istio has one, else ours (`LAT0001`).
    pub code: Box<str>,
    /// How grave it is.
    pub severity: Severity,
    /// The object at fault; `None` when a document could not be read far enough.
    pub object: Option<ObjectRef>,
    /// Path of the field, `spec.http[0].route[1].weight`; empty for the whole object.
    pub field: Box<str>,
    /// Where it was written, when known.
    pub position: Option<Position>,
    /// What is wrong: lower case, no full stop.
    pub message: Box<str>,
    /// What to do about it; empty when the message says it.
    pub hint: Box<str>,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(position) = &self.position {
            write!(f, "{position}: ")?;
        }
        if let Some(object) = &self.object {
            write!(f, "{object}: ")?;
        }
        if !self.field.is_empty() {
            write!(f, "{}: ", self.field)?;
        }
        write!(f, "{} [{}]", self.message, self.code)?;
        if !self.hint.is_empty() {
            write!(f, " ({})", self.hint)?;
        }
        Ok(())
    }
}

/// What becomes of an object.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Effect {
    /// Everything it says holds.
    Effective,
    /// Another object wins in a part.
    PartlyShadowed {
        /// The winner.
        by: ObjectRef,
    },
    /// It changes nothing.
    Ignored {
        /// Why.
        reason: Box<str>,
        /// Who wins instead, if somebody does.
        by: Option<ObjectRef>,
    },
    /// A security object that cannot be understood refuses traffic.
    FailsClosed {
        /// Why.
        reason: Box<str>,
    },
}
