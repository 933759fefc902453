//! Matchers in words, for explanations.

use std::fmt;

use super::{HeaderMatcher, HeaderTest, MetadataMatcher, QueryMatcher, QueryTest, StringMatcher, Text, ValueMatcher};

impl fmt::Display for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", String::from_utf8_lossy(&self.bytes))?;
        if self.ignore_case { f.write_str(" in any case") } else { Ok(()) }
    }
}

impl fmt::Display for StringMatcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exact(text) => text.fmt(f),
            Self::Prefix(text) => write!(f, "prefix {text}"),
            Self::Suffix(text) => write!(f, "suffix {text}"),
            Self::Contains(text) => write!(f, "something with {text}"),
            Self::Regex(regex) => write!(f, "regex {:?}", regex.as_str()),
        }
    }
}

fn presence(present: bool) -> &'static str {
    if present { "anything" } else { "nothing" }
}

impl fmt::Display for HeaderMatcher {
    /// `not` and what the value must be, without the header's name.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.invert {
            f.write_str("not ")?;
        }
        match &self.test {
            HeaderTest::Present(present) => f.write_str(presence(*present)),
            HeaderTest::String(matcher) => matcher.fmt(f),
            HeaderTest::Range(from, to) => write!(f, "{from} to below {to}"),
        }
    }
}

impl QueryMatcher {
    /// The parameter's name.
    pub fn name(&self) -> String {
        String::from_utf8_lossy(&self.name).into_owned()
    }
}

impl fmt::Display for QueryMatcher {
    /// What the value must be, without the parameter's name.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.test {
            QueryTest::Present(present) => f.write_str(presence(*present)),
            QueryTest::String(matcher) => matcher.fmt(f),
        }
    }
}

impl fmt::Display for ValueMatcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Null => f.write_str("null"),
            Self::Range(from, to) => write!(f, "{from} to below {to}"),
            Self::Number(number) => number.fmt(f),
            Self::String(matcher) => matcher.fmt(f),
            Self::Bool(value) => value.fmt(f),
            Self::Present(present) => f.write_str(presence(*present)),
            Self::List(item) => write!(f, "a list with {item}"),
            Self::Or(any) => {
                for (at, value) in any.iter().enumerate() {
                    if at > 0 {
                        f.write_str(" or ")?;
                    }
                    value.fmt(f)?;
                }
                Ok(())
            }
        }
    }
}

impl fmt::Display for MetadataMatcher {
    /// `path: what its value must be`
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.path.join("."))?;
        f.write_str(if self.invert { ": not " } else { ": " })?;
        self.value.fmt(f)
    }
}
