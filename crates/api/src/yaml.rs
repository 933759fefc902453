//! YAML into a tree that knows where each node was written.
//!
//! The dialect is what `kubectl` reads, scalar by scalar ([`resolve`]): plain `yes`, `on`, `y` and
//! their opposites are booleans, `012` is octal, `1_000` a number, `2001-01-01` text. Duplicate keys
//! are errors; anchors, aliases and `<<` work within limits. One broken document does not hide the
//! next.

use std::collections::{HashMap, HashSet};

use granit_parser::{Event, Options, Parser, ScalarStyle, ScanError};
use serde_json::{Map, Number, Value};

/// What one text may cost.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Nested collections.
    pub depth_max: usize,
    /// Nodes of one document, each use of an alias counted in full.
    pub nodes_max: usize,
    /// Bytes of scalars of one document, aliases counted in full.
    pub bytes_max: usize,
    /// Documents that may fail before the rest of the text is given up.
    pub errors_max: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { depth_max: 100, nodes_max: 400_000, bytes_max: 16 << 20, errors_max: 50 }
    }
}

/// A node and where it begins; lines and columns count from one, 0 is unknown.
#[derive(Clone, PartialEq, Debug)]
pub struct Node {
    /// What it holds.
    pub tree: Tree,
    /// Line.
    pub line: u32,
    /// Column.
    pub column: u32,
}

/// What a node holds.
#[derive(Clone, PartialEq, Debug)]
pub enum Tree {
    /// `null`, `~`, nothing.
    Null,
    /// A boolean, and how it was written.
    Bool(bool, Box<str>),
    /// A number, and how it was written.
    Number(Number, Box<str>),
    /// Text.
    Text(String),
    /// A list.
    List(Vec<Node>),
    /// A map; keys are unique and in the order of the file.
    Map(Vec<Entry>),
}

/// One pair of a map.
#[derive(Clone, PartialEq, Debug)]
pub struct Entry {
    /// The key, as text.
    pub key: String,
    /// Line of the key.
    pub line: u32,
    /// Column of the key.
    pub column: u32,
    /// The value.
    pub value: Node,
}

/// Why a document could not be read.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{message}")]
pub struct InvalidYaml {
    /// What is wrong.
    pub message: String,
    /// What to do; may be empty.
    pub hint: String,
    /// Line, from 1.
    pub line: u32,
    /// Column, from 1.
    pub column: u32,
}

impl Node {
    /// The value under `key`, if the node is a map that has it.
    pub fn get(&self, key: &str) -> Option<&Self> {
        match &self.tree {
            Tree::Map(entries) => entries.iter().find(|entry| entry.key == key).map(|entry| &entry.value),
            _ => None,
        }
    }

    /// The text, if the node is text.
    pub fn as_text(&self) -> Option<&str> {
        match &self.tree {
            Tree::Text(text) => Some(text),
            _ => None,
        }
    }

    /// The same as JSON.
    pub fn to_json(&self) -> Value {
        match &self.tree {
            Tree::Null => Value::Null,
            Tree::Bool(value, _) => Value::Bool(*value),
            Tree::Number(number, _) => Value::Number(number.clone()),
            Tree::Text(text) => Value::String(text.clone()),
            Tree::List(items) => Value::Array(items.iter().map(Self::to_json).collect()),
            Tree::Map(entries) => Value::Object(
                entries.iter().map(|entry| (entry.key.clone(), entry.value.to_json())).collect::<Map<_, _>>(),
            ),
        }
    }

    /// A tree without positions. `None` beyond `depth_max` nested collections.
    pub fn from_json(value: &Value, depth_max: usize) -> Option<Self> {
        let below = depth_max.checked_sub(1);
        let tree = match value {
            Value::Null => Tree::Null,
            Value::Bool(value) => Tree::Bool(*value, value.to_string().into()),
            Value::Number(number) => Tree::Number(number.clone(), number.to_string().into()),
            Value::String(text) => Tree::Text(text.clone()),
            Value::Array(items) => {
                let below = below?;
                Tree::List(items.iter().map(|item| Self::from_json(item, below)).collect::<Option<_>>()?)
            }
            Value::Object(map) => {
                let below = below?;
                let entry = |(key, value): (&String, &Value)| {
                    Some(Entry { key: key.clone(), line: 0, column: 0, value: Self::from_json(value, below)? })
                };
                Tree::Map(map.iter().map(entry).collect::<Option<_>>()?)
            }
        };
        Some(Self { tree, line: 0, column: 0 })
    }

    /// Where the field at `path` (`spec.http[0].name`) was written: its key, or its list entry. What
    /// is not there is where its nearest parent is.
    pub fn locate(&self, path: &str) -> (u32, u32) {
        let mut node = self;
        let mut at = (self.line, self.column);
        for segment in segments(path) {
            match (&node.tree, segment) {
                (Tree::Map(entries), Segment::Key(key)) => match entries.iter().find(|entry| entry.key == key) {
                    Some(entry) => {
                        at = (entry.line, entry.column);
                        node = &entry.value;
                    }
                    None => return at,
                },
                (Tree::List(items), Segment::Index(index)) => match items.get(index) {
                    Some(item) => {
                        at = (item.line, item.column);
                        node = item;
                    }
                    None => return at,
                },
                _ => return at,
            }
        }
        at
    }
}

enum Segment<'a> {
    Key(&'a str),
    Index(usize),
}

/// Splits `spec.http[0].headers["x-y"]`.
fn segments(path: &str) -> Vec<Segment<'_>> {
    let mut out = Vec::new();
    let mut rest = path;
    while !rest.is_empty() {
        if let Some(quoted) = rest.strip_prefix("[\"") {
            let Some((key, after)) = quoted.split_once("\"]") else { break };
            out.push(Segment::Key(key));
            rest = after;
        } else if let Some(inner) = rest.strip_prefix('[') {
            let Some((index, after)) = inner.split_once(']') else { break };
            let Ok(index) = index.parse() else { break };
            out.push(Segment::Index(index));
            rest = after;
        } else {
            rest = rest.strip_prefix('.').unwrap_or(rest);
            let end = rest.find(['.', '[']).unwrap_or(rest.len());
            let (key, after) = rest.split_at(end);
            if key.is_empty() {
                break;
            }
            out.push(Segment::Key(key));
            rest = after;
        }
    }
    out
}

/// `.key`, or `["key"]` for a key that a path could not hold bare.
pub(crate) fn push_key(path: &mut String, key: &str) {
    let bare = !key.is_empty() && key.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-' | b'/'));
    if bare {
        if !path.is_empty() {
            path.push('.');
        }
        path.push_str(key);
    } else {
        path.push_str("[\"");
        path.push_str(key);
        path.push_str("\"]");
    }
}

/// What a plain scalar means.
///
/// *Source*: the rules of `kubectl`'s reader (YAML 1.1 in parts).
pub fn resolve(text: &str) -> Result<Tree, String> {
    let tree = match text {
        "" | "~" | "null" | "Null" | "NULL" => Tree::Null,
        "y" | "Y" | "yes" | "Yes" | "YES" | "true" | "True" | "TRUE" | "on" | "On" | "ON" => {
            Tree::Bool(true, text.into())
        }
        "n" | "N" | "no" | "No" | "NO" | "false" | "False" | "FALSE" | "off" | "Off" | "OFF" => {
            Tree::Bool(false, text.into())
        }
        _ => match number(text)? {
            Some(number) => Tree::Number(number, text.into()),
            None => Tree::Text(text.to_owned()),
        },
    };
    Ok(tree)
}

fn number(text: &str) -> Result<Option<Number>, String> {
    let first = text.bytes().next().unwrap_or_default();
    if !(first.is_ascii_digit() || matches!(first, b'+' | b'-' | b'.')) {
        return Ok(None);
    }
    let unsigned = text.strip_prefix(['+', '-']).unwrap_or(text);
    if matches!(unsigned, ".inf" | ".Inf" | ".INF") || matches!(text, ".nan" | ".NaN" | ".NAN") {
        return Err(format!("{text} cannot be a value here"));
    }
    let plain = text.replace('_', "");
    if let Some(whole) = integer(&plain) {
        return Ok(Some(whole));
    }
    if !is_float(&plain) {
        return Ok(None);
    }
    let Ok(value) = plain.parse::<f64>() else { return Ok(None) };
    if !value.is_finite() {
        return Err(format!("number {text} is out of range"));
    }
    // 1e3 travels as 1000, as Go's JSON writes it.
    #[expect(clippy::cast_possible_truncation, reason = "exact: an integer below 2^53")]
    let number = if value.fract() == 0.0 && value.abs() < 9_007_199_254_740_992.0 {
        Some(Number::from(value as i64))
    } else {
        Number::from_f64(value)
    };
    Ok(number)
}

/// Go's integers with base prefix: `0x`, `0o`, `0b`, and a leading zero for octal.
fn integer(text: &str) -> Option<Number> {
    let (negative, digits) = match text.as_bytes().first()? {
        b'-' => (true, &text[1..]),
        b'+' => (false, &text[1..]),
        _ => (false, text),
    };
    let lower = digits.to_ascii_lowercase();
    let (radix, digits) = if let Some(hex) = lower.strip_prefix("0x") {
        (16, hex)
    } else if let Some(octal) = lower.strip_prefix("0o") {
        (8, octal)
    } else if let Some(binary) = lower.strip_prefix("0b") {
        (2, binary)
    } else if lower.len() > 1 && lower.starts_with('0') {
        (8, &lower[1..])
    } else {
        (10, &*lower)
    };
    if digits.is_empty() || digits.starts_with(['+', '-']) {
        return None;
    }
    let value = u64::from_str_radix(digits, radix).ok()?;
    if negative {
        let value = i64::try_from(-i128::from(value)).ok()?;
        Some(Number::from(value))
    } else {
        Some(Number::from(value))
    }
}

fn is_float(text: &str) -> bool {
    let text = text.strip_prefix(['+', '-']).unwrap_or(text);
    let (mantissa, exponent) = match text.find(['e', 'E']) {
        Some(at) => (&text[..at], Some(&text[at + 1..])),
        None => (text, None),
    };
    let digits = |text: &str| text.bytes().all(|b| b.is_ascii_digit());
    let mantissa_fits = match mantissa.split_once('.') {
        Some(("", fraction)) => !fraction.is_empty() && digits(fraction),
        Some((whole, fraction)) => digits(whole) && digits(fraction),
        None => !mantissa.is_empty() && digits(mantissa),
    };
    let exponent_fits = exponent.is_none_or(|exponent| {
        let exponent = exponent.strip_prefix(['+', '-']).unwrap_or(exponent);
        !exponent.is_empty() && digits(exponent)
    });
    mantissa_fits && exponent_fits
}

/// Reads all documents of `text`, in order; empty ones are left out.
pub fn read(text: &str, limits: Limits) -> Vec<Result<Node, InvalidYaml>> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut options = Options::default();
    options.emit_comments = false;
    let mut parser = Parser::new_from_str_with_options(text, options);
    let mut documents = Vec::new();
    let mut errors = 0;
    let mut builder = Builder::new(limits);
    loop {
        let failure = match parser.next_event() {
            None => break,
            Some(Err(error)) => Some(syntax(&error)),
            Some(Ok((event, span))) => {
                let at = (place(span.start.line()), place(span.start.col() + 1));
                match builder.take(event, at) {
                    Ok(None) => None,
                    Ok(Some(node)) => {
                        if node.tree != Tree::Null {
                            documents.push(Ok(node));
                        }
                        None
                    }
                    Err(error) => Some(error),
                }
            }
        };
        if let Some(error) = failure {
            documents.push(Err(error));
            errors += 1;
            builder = Builder::new(limits);
            if errors >= limits.errors_max || !matches!(parser.proceed_next_document(), Ok(true)) {
                break;
            }
        }
    }
    documents
}

fn place(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

fn syntax(error: &ScanError) -> InvalidYaml {
    let marker = error.marker();
    InvalidYaml {
        message: format!("not valid YAML: {}", error.info()),
        hint: "check indentation, colons and quotes around this place".to_owned(),
        line: place(marker.line()),
        column: place(marker.col() + 1),
    }
}

enum Frame {
    List {
        items: Vec<Node>,
        at: (u32, u32),
        anchor: usize,
    },
    Map {
        entries: Vec<Entry>,
        seen: HashSet<String>,
        key: Option<Key>,
        merges: Vec<Node>,
        at: (u32, u32),
        anchor: usize,
    },
}

struct Key {
    text: String,
    at: (u32, u32),
    is_merge: bool,
}

struct Builder {
    limits: Limits,
    frames: Vec<Frame>,
    anchors: HashMap<usize, Node>,
    root: Option<Node>,
    nodes: usize,
    bytes: usize,
}

impl Builder {
    fn new(limits: Limits) -> Self {
        Self { limits, frames: Vec::new(), anchors: HashMap::new(), root: None, nodes: 0, bytes: 0 }
    }

    /// Takes an event; answers with a document when it ends.
    fn take(&mut self, event: Event<'_>, at: (u32, u32)) -> Result<Option<Node>, InvalidYaml> {
        match event {
            Event::DocumentStart(..) => *self = Self::new(self.limits),
            Event::DocumentEnd => return Ok(self.root.take()),
            Event::Scalar(text, style, anchor, tag) => {
                self.spend(1, text.len(), at)?;
                let tag = tag.map(|tag| tag.core_suffix().map_or_else(|| tag.original(), str::to_owned));
                let tree = scalar(&text, style, tag.as_deref()).map_err(|message| fail(message, at))?;
                let is_merge = style == ScalarStyle::Plain && text == "<<";
                self.value(Node { tree, line: at.0, column: at.1 }, anchor, is_merge)?;
            }
            Event::SequenceStart(_, anchor, _) => {
                self.open(at)?;
                self.frames.push(Frame::List { items: Vec::new(), at, anchor });
            }
            Event::MappingStart(_, anchor, _) => {
                self.open(at)?;
                let (entries, seen, merges) = (Vec::new(), HashSet::new(), Vec::new());
                self.frames.push(Frame::Map { entries, seen, key: None, merges, at, anchor });
            }
            Event::SequenceEnd | Event::MappingEnd => match self.frames.pop() {
                Some(Frame::List { items, at, anchor }) => {
                    self.value(Node { tree: Tree::List(items), line: at.0, column: at.1 }, anchor, false)?;
                }
                Some(Frame::Map { mut entries, mut seen, merges, at, anchor, .. }) => {
                    for entry in merges.into_iter().flat_map(merged) {
                        if seen.insert(entry.key.clone()) {
                            entries.push(entry);
                        }
                    }
                    self.value(Node { tree: Tree::Map(entries), line: at.0, column: at.1 }, anchor, false)?;
                }
                None => {}
            },
            Event::Alias(id) => {
                let Some(node) = self.anchors.get(&id) else {
                    return Err(fail("an alias cannot stand inside the node it names".to_owned(), at));
                };
                let (nodes, bytes, depth) = size(node);
                if self.frames.len() + depth > self.limits.depth_max {
                    return Err(fail(format!("nested deeper than {} levels", self.limits.depth_max), at));
                }
                // The copy below is paid for before it is made.
                let mut node = {
                    self.spend(nodes, bytes, at)?;
                    self.anchors.get(&id).cloned().unwrap_or(Node { tree: Tree::Null, line: 0, column: 0 })
                };
                (node.line, node.column) = at;
                self.value(node, 0, false)?;
            }
            _ => {}
        }
        Ok(None)
    }

    fn open(&mut self, at: (u32, u32)) -> Result<(), InvalidYaml> {
        self.spend(1, 0, at)?;
        if self.frames.len() >= self.limits.depth_max {
            return Err(fail(format!("nested deeper than {} levels", self.limits.depth_max), at));
        }
        Ok(())
    }

    fn spend(&mut self, nodes: usize, bytes: usize, at: (u32, u32)) -> Result<(), InvalidYaml> {
        self.nodes = self.nodes.saturating_add(nodes);
        self.bytes = self.bytes.saturating_add(bytes);
        if self.nodes > self.limits.nodes_max || self.bytes > self.limits.bytes_max {
            return Err(InvalidYaml {
                message: "the document is too large, each use of an alias counted in full".to_owned(),
                hint: "split it into several documents".to_owned(),
                line: at.0,
                column: at.1,
            });
        }
        Ok(())
    }

    /// A node is complete: it is a key, a value, an entry, or the document.
    fn value(&mut self, node: Node, anchor: usize, is_merge: bool) -> Result<(), InvalidYaml> {
        if anchor != 0 {
            let (nodes, bytes, _) = size(&node);
            self.spend(nodes, bytes, (node.line, node.column))?;
            self.anchors.insert(anchor, node.clone());
        }
        match self.frames.last_mut() {
            None => self.root = Some(node),
            Some(Frame::List { items, .. }) => items.push(node),
            Some(Frame::Map { entries, seen, key, merges, .. }) => match key.take() {
                None => *key = Some(as_key(node, is_merge)?),
                Some(Key { is_merge: true, at, .. }) => match &node.tree {
                    Tree::Map(_) | Tree::List(_) => merges.push(node),
                    _ => return Err(fail("`<<` takes a map or a list of maps".to_owned(), at)),
                },
                Some(Key { text, at, .. }) => {
                    if !seen.insert(text.clone()) {
                        return Err(InvalidYaml {
                            message: format!("key {text:?} is written twice in one map"),
                            hint: "remove or rename one of the two".to_owned(),
                            line: at.0,
                            column: at.1,
                        });
                    }
                    entries.push(Entry { key: text, line: at.0, column: at.1, value: node });
                }
            },
        }
        Ok(())
    }
}

fn fail(message: String, at: (u32, u32)) -> InvalidYaml {
    InvalidYaml { message, hint: "write it out in simpler YAML".to_owned(), line: at.0, column: at.1 }
}

fn as_key(node: Node, is_merge: bool) -> Result<Key, InvalidYaml> {
    let at = (node.line, node.column);
    let text = match node.tree {
        Tree::Text(text) => text,
        Tree::Number(number, _) => number.to_string(),
        Tree::Bool(value, _) => value.to_string(),
        Tree::Null => "null".to_owned(),
        Tree::List(_) | Tree::Map(_) => return Err(fail("a key must be text, not a list or map".to_owned(), at)),
    };
    Ok(Key { text, at, is_merge })
}

/// The entries that `<<` brings: of a map, or of each map of a list.
fn merged(node: Node) -> Vec<Entry> {
    match node.tree {
        Tree::Map(entries) => entries,
        Tree::List(items) => items
            .into_iter()
            .flat_map(|item| match item.tree {
                Tree::Map(entries) => entries,
                _ => Vec::new(),
            })
            .collect(),
        _ => Vec::new(),
    }
}

/// Nodes, bytes and nesting of a tree.
fn size(node: &Node) -> (usize, usize, usize) {
    let join =
        |sum: (usize, usize, usize), one: (usize, usize, usize)| (sum.0 + one.0, sum.1 + one.1, sum.2.max(one.2 + 1));
    match &node.tree {
        Tree::Null | Tree::Bool(..) | Tree::Number(..) => (1, 8, 0),
        Tree::Text(text) => (1, text.len(), 0),
        Tree::List(items) => items.iter().map(size).fold((1, 0, 1), join),
        Tree::Map(entries) => entries.iter().fold((1, 0, 1), |sum, entry| {
            let one = size(&entry.value);
            join(sum, (one.0, one.1 + entry.key.len(), one.2))
        }),
    }
}

fn scalar(text: &str, style: ScalarStyle, tag: Option<&str>) -> Result<Tree, String> {
    match (tag, style) {
        (Some("str" | "!"), _) => Ok(Tree::Text(text.to_owned())),
        (None, ScalarStyle::Plain) | (Some("bool" | "null" | "int" | "float"), _) => resolve(text),
        (None, _) => Ok(Tree::Text(text.to_owned())),
        (Some(other), _) => Err(format!("tag {other:?} is not supported")),
    }
}

/// Writes `value` as YAML.
pub fn to_yaml(value: &Value) -> String {
    serde_saphyr::to_string(value).unwrap_or_else(|_| value.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn json(text: &str) -> Value {
        let mut documents = read(text, Limits::default());
        assert_eq!(documents.len(), 1, "{documents:?}");
        documents.remove(0).unwrap().to_json()
    }

    fn error(text: &str) -> InvalidYaml {
        read(text, Limits::default()).into_iter().find_map(Result::err).unwrap()
    }

    #[test]
    fn scalars_are_what_kubectl_makes_of_them() {
        for (text, value) in [
            ("yes", "true"),
            ("on", "true"),
            ("Off", "false"),
            ("n", "false"),
            ("true", "true"),
            ("tRue", "\"tRue\""),
            ("012", "10"),
            ("0o12", "10"),
            ("0x1F", "31"),
            ("0b11", "3"),
            ("08", "8"),
            ("1_000", "1000"),
            ("1e3", "1000"),
            ("1.50", "1.5"),
            ("1.0", "1"),
            ("-5", "-5"),
            ("+5", "5"),
            (".5", "0.5"),
            ("5.", "5"),
            ("1.2.3", "\"1.2.3\""),
            ("1.1.1.1", "\"1.1.1.1\""),
            ("10.0.0.0/8", "\"10.0.0.0/8\""),
            ("5s", "\"5s\""),
            ("2001-01-01", "\"2001-01-01\""),
            ("18446744073709551615", "18446744073709551615"),
            ("\"yes\"", "\"yes\""),
            ("'012'", "\"012\""),
            ("!!str 012", "\"012\""),
            ("!!int \"12\"", "12"),
            ("a b", "\"a b\""),
        ] {
            assert_eq!(json(&format!("k: {text}")).to_string(), format!("{{\"k\":{value}}}"), "{text}");
        }
        for null in ["", "~", "null", "NULL"] {
            assert_eq!(json(&format!("k: {null}\nl: 1")).to_string(), "{\"k\":null,\"l\":1}", "{null}");
        }
        assert!(error("k: .inf").message.contains(".inf"));
        assert!(error("k: !custom x").message.contains("not supported"));
    }

    #[test]
    fn keys_are_text() {
        assert_eq!(json("8080: a\non: b\n? c\n: d").to_string(), r#"{"8080":"a","c":"d","true":"b"}"#);
    }

    #[test]
    fn positions_in_block_and_flow_style() {
        let text = "a:\n  b:\n  - c: 1\n    d: [x, {e: 2}]\n  \"x.y\": 3\n";
        let documents = read(text, Limits::default());
        let node = documents[0].as_ref().unwrap();
        for (path, at) in [
            ("a", (1, 1)),
            ("a.b", (2, 3)),
            ("a.b[0]", (3, 5)),
            ("a.b[0].c", (3, 5)),
            ("a.b[0].d", (4, 5)),
            ("a.b[0].d[0]", (4, 9)),
            ("a.b[0].d[1]", (4, 12)),
            ("a.b[0].d[1].e", (4, 13)),
            ("a[\"x.y\"]", (5, 3)),
            ("a.b[7].c", (2, 3)),
            ("a.missing.deep", (1, 1)),
        ] {
            assert_eq!(node.locate(path), at, "{path}");
        }
    }

    #[test]
    fn anchors_aliases_and_merges() {
        let value = json("base: &b {x: 1, z: 2}\none: {<<: *b, z: 3}\ntwo: *b\n");
        assert_eq!(value.to_string(), r#"{"base":{"x":1,"z":2},"one":{"x":1,"z":3},"two":{"x":1,"z":2}}"#);
    }

    #[test]
    fn a_key_twice_is_an_error_with_its_place() {
        let error = error("a: 1\nb:\n  c: 1\n  c: 2\n");
        assert_eq!((error.line, error.column), (4, 3));
        assert!(error.message.contains("\"c\""), "{error}");
    }

    #[test]
    fn one_broken_document_does_not_hide_the_next() {
        let documents = read("a: 1\n---\nb: [1\n---\nc: 3\n---\n# nothing\n---\nd: 4\n", Limits::default());
        let shape: Vec<bool> = documents.iter().map(Result::is_ok).collect();
        assert_eq!(shape, [true, false, true, true]);
    }

    #[test]
    fn hostile_text_is_bounded() {
        let laughs = "a: &a [x,x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b,*b]\n\
            d: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c,*c]\ne: &e [*d,*d,*d,*d,*d,*d,*d,*d,*d,*d]\nf: &f [*e,*e,*e,*e,*e,*e,*e,*e,*e,*e]\n";
        assert!(error(laughs).message.contains("too large"));
        assert!(read(&"[".repeat(5_000), Limits::default())[0].is_err());
        assert!(read(&"{a: ".repeat(5_000), Limits::default())[0].is_err());
        assert!(read(&"- ".repeat(5_000), Limits::default())[0].is_err());
        assert!(error("a: &a [*a]").message.contains("alias") || error("a: &a [*a]").message.contains("anchor"));
        assert!(error("a: *nobody").line == 1);
        for junk in [
            "\0",
            "\u{feff}",
            "%YAML 9.9\n---\n",
            "\t\t:\t-",
            "? ? ? ?",
            "!!binary x",
            "&",
            "*",
            "---\n---\n...",
            "a: |\n",
            "'",
            "\"\\x",
            "]}",
            "a:\n\tb",
        ] {
            // Whatever it is, it ends.
            assert!(read(junk, Limits::default()).len() < 4, "{junk:?}");
        }
    }

    #[test]
    fn yaml_out_can_be_read_back() {
        let value = serde_json::json!({"a": ["yes", "012", "1e3", "null", "~", "", "x: y", "multi\nline\n"], "b": {"c": 1.5, "d": null, "e": true}, "8080": "x"});
        let text = to_yaml(&value);
        assert_eq!(json(&text), value, "{text}");
    }
}
