//! `exportTo`.
//!
//! *Source*: `docs/parity.md`, Traffic 1.8.

use std::collections::BTreeSet;

/// Who may see an object.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Visibility {
    /// `*`
    Public,
    /// The named namespaces only (`.` is already replaced by the object's own). Empty: `~`, nobody.
    Namespaces(BTreeSet<Box<str>>),
}

impl Visibility {
    /// Reads an `exportTo` list of an object of `namespace`; an empty list means `default`.
    pub fn parse<'a>(list: impl IntoIterator<Item = &'a str>, namespace: &str, default: &Self) -> Self {
        let mut names = BTreeSet::new();
        let mut any = false;
        for entry in list {
            let entry = entry.trim();
            if entry.is_empty() {
                continue;
            }
            any = true;
            match entry {
                "*" => return Self::Public,
                "~" => {}
                "." => {
                    names.insert(Box::from(namespace));
                }
                name => {
                    names.insert(Box::from(name));
                }
            }
        }
        if any { Self::Namespaces(names) } else { default.clone() }
    }

    /// The default of the mesh: its list, with `.` meaning the object's namespace.
    pub fn of_mesh(list: &[String], namespace: &str) -> Self {
        Self::parse(list.iter().map(String::as_str), namespace, &Self::Public)
    }

    /// Whether a proxy of `namespace` sees the object.
    pub fn is_visible_to(&self, namespace: &str) -> bool {
        match self {
            Self::Public => true,
            Self::Namespaces(names) => names.contains(namespace),
        }
    }

    /// Whether it is seen by its own namespace only.
    pub fn is_private_to(&self, namespace: &str) -> bool {
        matches!(self, Self::Namespaces(names) if names.len() == 1 && names.contains(namespace))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forms() {
        for (list, viewer, expect) in [
            (&[][..], "x", true),
            (&["*"], "x", true),
            (&["."], "x", false),
            (&["."], "own", true),
            (&["~"], "own", false),
            (&["a", "b"], "b", true),
            (&["a", "*"], "q", true),
            (&["a"], "own", false),
        ] {
            let seen = Visibility::parse(list.iter().copied(), "own", &Visibility::Public);
            assert_eq!(seen.is_visible_to(viewer), expect, "{list:?} {viewer}");
        }
    }
}
