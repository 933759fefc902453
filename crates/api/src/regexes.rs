//! Regular expressions in RE2's syntax, checked with the engine that runs them.

/// Compiled size allowed for one pattern.
const SIZE_MAX_BYTES: usize = 1 << 20;

/// Whether `pattern` is one that the proxy will accept; the message says why not.
///
/// *Source*: RE2's syntax beside the `regex` crate's: what RE2 has and the engine lacks is
/// refused here, and repetitions of repetitions, which RE2 refuses, too.
pub fn check(pattern: &str) -> Result<(), String> {
    for (feature, why) in [("\\C", "\\C is not supported"), ("\\Q", "\\Q…\\E is not supported: escape the characters")]
    {
        if has_escape(pattern, feature) {
            return Err(why.to_owned());
        }
    }
    let doubled = ["**", "*+", "++", "+*", "?*", "?+", "*{", "+{"];
    if let Some(pair) = doubled.iter().find(|pair| has_bare(pattern, pair)) {
        return Err(format!("bad repetition operator {pair:?}"));
    }
    regex::RegexBuilder::new(&format!("\\A(?:{pattern})\\z")).size_limit(SIZE_MAX_BYTES).build().map(|_| ()).map_err(
        |error| match error {
            regex::Error::CompiledTooBig(_) => "it is too large once compiled".to_owned(),
            other => last_line(&other.to_string()),
        },
    )
}

/// The regex crate's messages draw the pattern; the reason is their last line.
fn last_line(text: &str) -> String {
    let line = text.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or(text);
    line.trim().trim_start_matches("error: ").to_owned()
}

fn has_escape(pattern: &str, escape: &str) -> bool {
    let mut rest = pattern;
    while let Some(at) = rest.find('\\') {
        if rest[at..].starts_with(escape) {
            return true;
        }
        let skip = rest[at + 1..].chars().next().map_or(0, char::len_utf8);
        rest = &rest[at + 1 + skip..];
    }
    false
}

/// Whether `pair` stands outside classes and escapes.
fn has_bare(pattern: &str, pair: &str) -> bool {
    let (mut in_class, mut escaped) = (false, false);
    for (at, c) in pattern.char_indices() {
        if escaped {
            escaped = false;
            continue;
        }
        match c {
            '\\' => escaped = true,
            '[' if !in_class => in_class = true,
            ']' => in_class = false,
            _ if !in_class && pattern[at..].starts_with(pair) => return true,
            _ => {}
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::check;

    #[test]
    fn what_re2_takes() {
        for good in
            ["/a.*", "^/(v\\d)/(.*)$", "GET|PUT", "[*+]+", "a\\*\\*", "\\\\Q", "(?i)abc", "a{1,3}", "a+?", "[^/]+"]
        {
            assert_eq!(check(good), Ok(()), "{good}");
        }
        for bad in ["(", "a**", "*a", "[", "\\C", "\\Qa\\E", "a{3,1}", "(?=x)", "\\1", "(a{1000}){1000}"] {
            assert!(check(bad).is_err(), "{bad}");
        }
    }
}
