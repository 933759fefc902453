//! A YAML tree into typed values, with every mistake at its place.
//!
//! An own serde deserializer, because it knows three things a general one does not: where each node
//! was written, that null means absent as in Go, and which fields a struct has, so that unknown ones
//! are collected with a suggestion while decoding goes on.

use std::cell::RefCell;
use std::fmt;

use serde::de::{self, DeserializeSeed, IntoDeserializer as _, MapAccess, SeqAccess, Visitor};

use crate::yaml::{Entry, Node, Tree, push_key};

/// A field that the type does not have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnknownField {
    /// Name of the Rust type that was decoded.
    pub owner: &'static str,
    /// Path, with the field.
    pub path: String,
    /// The field.
    pub key: String,
    /// Line of the key.
    pub line: u32,
    /// Column of the key.
    pub column: u32,
    /// The field that looks most alike.
    pub near: Option<&'static str>,
}

/// A value that does not fit its type.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InvalidValue {
    /// What is wrong.
    pub message: String,
    /// What to do; may be empty.
    pub hint: String,
    /// Path of the field.
    pub path: String,
    /// Line of the value, 0 when unknown.
    pub line: u32,
    /// Column of the value.
    pub column: u32,
    placed: bool,
}

impl InvalidValue {
    fn new(message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { message: message.into(), hint: hint.into(), path: String::new(), line: 0, column: 0, placed: false }
    }
}

impl fmt::Display for InvalidValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for InvalidValue {}

impl de::Error for InvalidValue {
    fn custom<T: fmt::Display>(message: T) -> Self {
        Self::new(message.to_string(), "")
    }

    fn unknown_variant(variant: &str, expected: &'static [&'static str]) -> Self {
        let hint = crate::suggest::nearest(variant, expected.iter().copied())
            .map_or_else(|| "use one of them".to_owned(), |near| format!("did you mean {near}?"));
        Self::new(format!("{variant:?} is not one of {}", expected.join(", ")), hint)
    }

    fn invalid_type(found: de::Unexpected<'_>, expected: &dyn de::Expected) -> Self {
        Self::new(format!("expected {expected}, found {found}"), format!("write {expected}"))
    }
}

/// What decoding noticed beside its result.
#[derive(Debug, Default)]
pub struct Notes {
    unknown: RefCell<Vec<UnknownField>>,
}

impl Notes {
    /// The unknown fields, in the order of the file.
    pub fn into_unknown(self) -> Vec<UnknownField> {
        self.unknown.into_inner()
    }
}

/// Decodes `node`, which stands at `path` (empty for the root). Keys in `skip` are left out at the
/// top.
pub fn decode<T: de::DeserializeOwned>(
    node: &Node,
    path: &str,
    skip: &'static [&'static str],
    notes: &Notes,
) -> Result<T, InvalidValue> {
    let root = Path::Root(path);
    T::deserialize(Decoder { node, path: &root, notes, skip }).map_err(|error| place(error, &root, node))
}

fn place(mut error: InvalidValue, path: &Path<'_>, node: &Node) -> InvalidValue {
    if !error.placed {
        error.placed = true;
        error.path = path.to_string();
        (error.line, error.column) = (node.line, node.column);
    }
    error
}

enum Path<'p> {
    Root(&'p str),
    Key(&'p Path<'p>, &'p str),
    Index(&'p Path<'p>, usize),
}

impl Path<'_> {
    fn write(&self, out: &mut String) {
        match self {
            Self::Root(root) => out.push_str(root),
            Self::Key(parent, key) => {
                parent.write(out);
                push_key(out, key);
            }
            Self::Index(parent, index) => {
                parent.write(out);
                out.push('[');
                out.push_str(&index.to_string());
                out.push(']');
            }
        }
    }
}

impl fmt::Display for Path<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = String::new();
        self.write(&mut text);
        f.write_str(&text)
    }
}

struct Decoder<'p> {
    node: &'p Node,
    path: &'p Path<'p>,
    notes: &'p Notes,
    skip: &'static [&'static str],
}

fn describe(tree: &Tree) -> String {
    match tree {
        Tree::Null => "nothing".to_owned(),
        Tree::Bool(_, text) => format!("the boolean {text}"),
        Tree::Number(_, text) => format!("the number {text}"),
        Tree::Text(text) if text.chars().count() <= 40 => format!("the text {text:?}"),
        Tree::Text(_) => "a text".to_owned(),
        Tree::List(_) => "a list".to_owned(),
        Tree::Map(_) => "an object".to_owned(),
    }
}

impl Decoder<'_> {
    fn mismatch(&self, expected: &str) -> InvalidValue {
        let hint = match (&self.node.tree, expected) {
            (Tree::Bool(_, text) | Tree::Number(_, text), "text") => format!("write it in quotes: \"{text}\""),
            (Tree::Text(text), "a number" | "a whole number" | "true or false") => {
                let resolved = crate::yaml::resolve(text);
                match resolved {
                    Ok(Tree::Number(..)) if expected != "true or false" => "remove the quotes".to_owned(),
                    Ok(Tree::Bool(..)) if expected == "true or false" => "remove the quotes".to_owned(),
                    _ => format!("write {expected}"),
                }
            }
            (_, "a list") => "write each entry on its own line after `- `".to_owned(),
            (_, "an object") => "write its fields as `name: value`, indented below it".to_owned(),
            _ => format!("write {expected}"),
        };
        InvalidValue::new(format!("expected {expected}, found {}", describe(&self.node.tree)), hint)
    }

    fn whole(&self, min: i128, max: i128, takes_text: bool) -> Result<i128, InvalidValue> {
        let text;
        let number = match &self.node.tree {
            Tree::Number(number, _) => number,
            Tree::Text(written) if takes_text => match crate::yaml::resolve(written) {
                Ok(Tree::Number(number, _)) => {
                    text = number;
                    &text
                }
                _ => return Err(self.mismatch("a whole number")),
            },
            _ => return Err(self.mismatch("a whole number")),
        };
        let value = number.as_i64().map(i128::from).or_else(|| number.as_u64().map(i128::from));
        match value {
            Some(value) if (min..=max).contains(&value) => Ok(value),
            Some(value) if value < 0 && min == 0 => {
                Err(InvalidValue::new(format!("{value} must not be negative"), "write 0 or more"))
            }
            Some(value) => {
                Err(InvalidValue::new(format!("{value} is not between {min} and {max}"), "write a number in between"))
            }
            None => Err(self.mismatch("a whole number")),
        }
    }
}

macro_rules! whole {
    ($( $method:ident $visit:ident $type:ty, $takes_text:literal; )*) => {$(
        fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, InvalidValue> {
            let value = self.whole(i128::from(<$type>::MIN), i128::from(<$type>::MAX), $takes_text)?;
            visitor.$visit(<$type>::try_from(value).map_err(|_| self.mismatch("a whole number"))?)
        }
    )*};
}

impl<'de> de::Deserializer<'de> for Decoder<'_> {
    type Error = InvalidValue;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, InvalidValue> {
        match &self.node.tree {
            Tree::Null => visitor.visit_unit(),
            Tree::Bool(value, _) => visitor.visit_bool(*value),
            Tree::Number(number, _) => {
                if let Some(value) = number.as_u64() {
                    visitor.visit_u64(value)
                } else if let Some(value) = number.as_i64() {
                    visitor.visit_i64(value)
                } else {
                    visitor.visit_f64(number.as_f64().unwrap_or_default())
                }
            }
            Tree::Text(text) => visitor.visit_str(text),
            Tree::List(items) => visitor.visit_seq(Items { list: items, index: 0, of: &self, null_is_empty: true }),
            Tree::Map(entries) => visitor.visit_map(Pairs { entries, index: 0, of: &self, fields: None }),
        }
    }

    whole! {
        deserialize_u8 visit_u8 u8, false;
        deserialize_u16 visit_u16 u16, false;
        deserialize_u32 visit_u32 u32, false;
        deserialize_u64 visit_u64 u64, true;
        deserialize_i8 visit_i8 i8, false;
        deserialize_i16 visit_i16 i16, false;
        deserialize_i32 visit_i32 i32, false;
        deserialize_i64 visit_i64 i64, true;
    }

    fn deserialize_f64<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, InvalidValue> {
        match &self.node.tree {
            Tree::Number(number, _) => visitor.visit_f64(number.as_f64().unwrap_or_default()),
            _ => Err(self.mismatch("a number")),
        }
    }

    fn deserialize_f32<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, InvalidValue> {
        self.deserialize_f64(visitor)
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, InvalidValue> {
        match &self.node.tree {
            Tree::Bool(value, _) => visitor.visit_bool(*value),
            _ => Err(self.mismatch("true or false")),
        }
    }

    fn deserialize_str<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, InvalidValue> {
        match &self.node.tree {
            Tree::Text(text) => visitor.visit_str(text),
            Tree::Null => visitor.visit_str(""),
            _ => Err(self.mismatch("text")),
        }
    }

    fn deserialize_string<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, InvalidValue> {
        self.deserialize_str(visitor)
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, InvalidValue> {
        match self.node.tree {
            Tree::Null => visitor.visit_none(),
            _ => visitor.visit_some(self),
        }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        visitor: V,
    ) -> Result<V::Value, InvalidValue> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, InvalidValue> {
        match &self.node.tree {
            Tree::List(items) => visitor.visit_seq(Items { list: items, index: 0, of: &self, null_is_empty: false }),
            Tree::Null => visitor.visit_seq(Items { list: &[], index: 0, of: &self, null_is_empty: false }),
            _ => Err(self.mismatch("a list")),
        }
    }

    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, InvalidValue> {
        match &self.node.tree {
            Tree::Map(entries) => visitor.visit_map(Pairs { entries, index: 0, of: &self, fields: None }),
            Tree::Null => visitor.visit_map(Pairs { entries: &[], index: 0, of: &self, fields: None }),
            _ => Err(self.mismatch("an object")),
        }
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        name: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, InvalidValue> {
        let fields = Some((name, fields));
        match &self.node.tree {
            Tree::Map(entries) => visitor.visit_map(Pairs { entries, index: 0, of: &self, fields }),
            Tree::Null => visitor.visit_map(Pairs { entries: &[], index: 0, of: &self, fields }),
            _ => Err(self.mismatch("an object")),
        }
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, InvalidValue> {
        match &self.node.tree {
            Tree::Text(text) => visitor.visit_enum(text.as_str().into_deserializer()),
            _ => Err(self.mismatch("text")),
        }
    }

    serde::forward_to_deserialize_any! {
        i128 u128 char bytes byte_buf unit unit_struct tuple tuple_struct identifier ignored_any
    }
}

struct Items<'a, 'p> {
    list: &'a [Node],
    index: usize,
    of: &'a Decoder<'p>,
    null_is_empty: bool,
}

impl<'de> SeqAccess<'de> for Items<'_, '_> {
    type Error = InvalidValue;

    fn next_element_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>, InvalidValue> {
        let Some(node) = self.list.get(self.index) else { return Ok(None) };
        let path = Path::Index(self.of.path, self.index);
        self.index += 1;
        if node.tree == Tree::Null && !self.null_is_empty {
            let error = InvalidValue::new("a list entry is empty", "write its content after the `-`, or remove it");
            return Err(place(error, &path, node));
        }
        seed.deserialize(Decoder { node, path: &path, notes: self.of.notes, skip: &[] })
            .map(Some)
            .map_err(|error| place(error, &path, node))
    }
}

struct Pairs<'a, 'p> {
    entries: &'a [Entry],
    index: usize,
    of: &'a Decoder<'p>,
    /// Of a struct: its name and fields; null is absent and strangers are noted.
    fields: Option<(&'static str, &'static [&'static str])>,
}

impl<'de> MapAccess<'de> for Pairs<'_, '_> {
    type Error = InvalidValue;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, InvalidValue> {
        while let Some(entry) = self.entries.get(self.index) {
            if let Some((owner, fields)) = self.fields {
                let known = fields.contains(&entry.key.as_str());
                if !known && !self.of.skip.contains(&entry.key.as_str()) {
                    self.of.notes.unknown.borrow_mut().push(UnknownField {
                        owner,
                        path: Path::Key(self.of.path, &entry.key).to_string(),
                        key: entry.key.clone(),
                        line: entry.line,
                        column: entry.column,
                        near: crate::suggest::nearest(&entry.key, fields.iter().copied()),
                    });
                }
                if !known || entry.value.tree == Tree::Null {
                    self.index += 1;
                    continue;
                }
            }
            let path = Path::Key(self.of.path, &entry.key);
            return seed
                .deserialize(KeyDecoder(&entry.key))
                .map(Some)
                .map_err(|error| place(error, &path, &entry.value));
        }
        Ok(None)
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, InvalidValue> {
        let Some(entry) = self.entries.get(self.index) else {
            return Err(de::Error::custom("a value was asked for without its key"));
        };
        self.index += 1;
        let path = Path::Key(self.of.path, &entry.key);
        seed.deserialize(Decoder { node: &entry.value, path: &path, notes: self.of.notes, skip: &[] })
            .map_err(|error| place(error, &path, &entry.value))
    }
}

struct KeyDecoder<'a>(&'a str);

impl<'de> de::Deserializer<'de> for KeyDecoder<'_> {
    type Error = InvalidValue;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, InvalidValue> {
        visitor.visit_str(self.0)
    }

    fn deserialize_u16<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, InvalidValue> {
        match self.0.parse() {
            Ok(port) => visitor.visit_u16(port),
            Err(_) => {
                Err(InvalidValue::new(format!("key {:?} is not a port", self.0), "write a number between 1 and 65535"))
            }
        }
    }

    serde::forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit
        unit_struct newtype_struct seq tuple tuple_struct map struct enum identifier ignored_any
    }
}
