//! Label selectors as kubectl takes them.

use serde_json::Value;

use crate::cli::{ExitWith, exit};

/// What labels must be like.
///
/// *Source*: Kubernetes, labels and selectors: `key=value`, `key!=value`, `key in (a,b)`,
/// `key notin (a,b)`, `key`, `!key`; all terms must fit. The negative ones fit a missing key.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Selector(Vec<Term>);

#[derive(Clone, PartialEq, Eq, Debug)]
enum Term {
    In(String, Vec<String>),
    NotIn(String, Vec<String>),
    Has(String),
    HasNot(String),
}

impl std::str::FromStr for Selector {
    type Err = ExitWith;

    fn from_str(text: &str) -> Result<Self, ExitWith> {
        let terms = split(text).into_iter().map(str::trim).filter(|term| !term.is_empty());
        let terms = terms.map(|term| {
            Term::parse(term).ok_or_else(|| ExitWith {
                code: exit::USAGE,
                message: format!(
                    "{term:?} is not a selector: give key=value, key!=value, 'key in (a,b)', 'key notin (a,b)', key or !key"
                ),
            })
        });
        terms.collect::<Result<_, _>>().map(Self)
    }
}

impl Selector {
    /// Whether the labels of this object fit.
    pub(crate) fn fits(&self, object: &Value) -> bool {
        let label = |key: &String| object["metadata"]["labels"][key.as_str()].as_str();
        let is_one_of = |key, values: &[String]| label(key).is_some_and(|has| values.iter().any(|value| value == has));
        self.0.iter().all(|term| match term {
            Term::In(key, values) => is_one_of(key, values),
            Term::NotIn(key, values) => !is_one_of(key, values),
            Term::Has(key) => label(key).is_some(),
            Term::HasNot(key) => label(key).is_none(),
        })
    }
}

impl Term {
    fn parse(term: &str) -> Option<Self> {
        let key = |key: &str| {
            let key = key.trim();
            let is_key = !key.is_empty() && key.chars().all(|c| c.is_ascii_alphanumeric() || "-_./".contains(c));
            is_key.then(|| key.to_owned())
        };
        if let Some(absent) = term.strip_prefix('!') {
            return key(absent).map(Self::HasNot);
        }
        if let Some((head, values)) = term.split_once('(') {
            let values = values.strip_suffix(')')?.split(',').map(|value| value.trim().to_owned()).collect();
            let mut words = head.split_whitespace();
            return match (words.next(), words.next(), words.next()) {
                (Some(name), Some("in"), None) => Some(Self::In(key(name)?, values)),
                (Some(name), Some("notin"), None) => Some(Self::NotIn(key(name)?, values)),
                _ => None,
            };
        }
        let value = |value: &str| vec![value.trim().to_owned()];
        if let Some((name, other)) = term.split_once("!=") {
            return Some(Self::NotIn(key(name)?, value(other)));
        }
        if let Some((name, same)) = term.split_once("==").or_else(|| term.split_once('=')) {
            return Some(Self::In(key(name)?, value(same)));
        }
        key(term).map(Self::Has)
    }
}

/// Terms between commas outside of parentheses.
fn split(text: &str) -> Vec<&str> {
    let mut depth = 0_usize;
    let at_comma = |letter: char| {
        match letter {
            '(' => depth += 1,
            ')' => depth = depth.saturating_sub(1),
            _ => {}
        }
        letter == ',' && depth == 0
    };
    text.split(at_comma).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn selectors() {
        let object = json!({ "metadata": { "labels": { "app": "a", "version": "v1" } } });
        for (selector, fits) in [
            ("", true),
            ("app=a", true),
            ("app==a,version=v1", true),
            ("app!=a", false),
            ("version", true),
            ("x", false),
            ("x!=1", true),
            ("!x", true),
            ("!app", false),
            ("app in (a, b),version", true),
            ("app in (b,c)", false),
            ("app notin (b, c), version in (v1)", true),
            ("app notin (a)", false),
            ("x notin (a)", true),
        ] {
            assert_eq!(selector.parse::<Selector>().unwrap().fits(&object), fits, "{selector}");
        }
        for bad in ["app in a", "app within (a)", "app in (a", "a b", "=a", "!"] {
            assert_eq!(bad.parse::<Selector>().unwrap_err().code, exit::USAGE, "{bad}");
        }
    }
}
