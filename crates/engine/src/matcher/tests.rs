//! Known answers and properties of the matchers.

use envoy_types::pb::google::protobuf::UInt32Value;
use proptest::prelude::*;
use serde_json::json;

use super::*;

fn string(pattern: pb::string_matcher::MatchPattern, ignore_case: bool) -> StringMatcher {
    StringMatcher::lower(&pb::StringMatcher { ignore_case, match_pattern: Some(pattern) }).unwrap()
}

#[test]
fn strings() {
    use pb::string_matcher::MatchPattern as P;
    let check = |pattern: P, ignore_case: bool, value: &[u8], expect: bool| {
        assert_eq!(string(pattern.clone(), ignore_case).matches(value), expect, "{pattern:?} {value:?}");
    };
    check(P::Exact("a".into()), false, b"a", true);
    check(P::Exact("a".into()), false, b"A", false);
    check(P::Exact("a".into()), true, b"A", true);
    check(P::Exact(String::new()), false, b"", true);
    check(P::Prefix("/a".into()), false, b"/ab\xff", true);
    check(P::Prefix("/ab".into()), false, b"/a", false);
    check(P::Suffix(".png".into()), true, b"\xff.PNG", true);
    check(P::Suffix("abc".into()), false, b"bc", false);
    check(P::Contains("bc".into()), true, b"aBCd", true);
    check(P::Contains("bc".into()), false, b"b", false);
    for empty in [P::Prefix(String::new()), P::Suffix(String::new()), P::Contains(String::new())] {
        assert!(StringMatcher::lower(&pb::StringMatcher { ignore_case: false, match_pattern: Some(empty) }).is_err());
    }
    assert!(StringMatcher::lower(&pb::StringMatcher::default()).is_err());
}

fn header(invert: bool, missing_is_empty: bool, exact: Option<&str>) -> HeaderMatcher {
    use route::header_matcher::HeaderMatchSpecifier as S;
    HeaderMatcher::lower(&route::HeaderMatcher {
        name: "X-Tier".into(),
        invert_match: invert,
        treat_missing_header_as_empty: missing_is_empty,
        header_match_specifier: Some(match exact {
            None => S::PresentMatch(true),
            Some(text) => S::StringMatch(pb::StringMatcher {
                ignore_case: false,
                match_pattern: Some(pb::string_matcher::MatchPattern::Exact(text.into())),
            }),
        }),
    })
    .unwrap()
}

fn head(values: &[&str]) -> RequestHead {
    let mut head = RequestHead::new("GET", "h", "/p?q=1");
    for value in values {
        head.fields.push("x-tier", value.as_bytes());
    }
    head
}

#[test]
fn headers_as_envoy_reads_them() {
    let check = |matcher: &HeaderMatcher, values: &[&str], expect: bool| {
        assert_eq!(matcher.matches(&head(values)), expect, "{matcher:?} {values:?}");
    };
    let present = header(false, false, None);
    check(&present, &[], false);
    check(&present, &[""], true);
    let absent = header(true, false, None);
    check(&absent, &[], true);
    check(&absent, &["x"], false);
    let free = header(false, false, Some("free"));
    check(&free, &["free"], true);
    check(&free, &["paid", "free"], true);
    check(&free, &["paid", "gold"], false);
    check(&free, &[], false);
    let not_free = header(true, false, Some("free"));
    check(&not_free, &["paid"], true);
    check(&not_free, &["paid", "gold"], true);
    check(&not_free, &["paid", "free"], false);
    check(&not_free, &[], false);
    let without = header(true, true, Some("free"));
    check(&without, &[], true);
    check(&without, &["free"], false);
    check(&header(false, false, Some("a,b")), &["a", "b"], false);
    check(&header(false, false, Some("a,b")), &["a,b"], true);
}

#[test]
fn the_host_is_the_authority() {
    use route::header_matcher::HeaderMatchSpecifier as S;
    let matcher = |name: &str, invert| {
        let exact = pb::StringMatcher {
            ignore_case: false,
            match_pattern: Some(pb::string_matcher::MatchPattern::Exact("h".into())),
        };
        HeaderMatcher::lower(&route::HeaderMatcher {
            name: name.into(),
            invert_match: invert,
            header_match_specifier: Some(S::StringMatch(exact)),
            ..Default::default()
        })
        .unwrap()
    };
    for name in ["host", "Host", ":authority"] {
        assert!(matcher(name, false).matches(&head(&[])), "{name}");
        assert!(!matcher(name, true).matches(&head(&[])), "not {name}");
    }
    // What a client wants to go on with is no field of ours, and is matched all the same.
    let mut upgrade = head(&[]);
    upgrade.set_protocol(Some(b"h"));
    for reading in [Reading::Wide, Reading::Strict] {
        assert!(matcher("upgrade", false).matches_under(&upgrade, reading), "{reading:?}");
        assert!(!matcher("upgrade", false).matches_under(&head(&[]), reading), "{reading:?}");
    }
    assert!(matcher("upgrade", false).matches(&upgrade) && !matcher("upgrade", true).matches(&upgrade));
}

#[test]
fn every_occurrence_counts_in_policies() {
    let check = |matcher: &HeaderMatcher, reading, values: &[&str], expect: bool| {
        assert_eq!(matcher.matches_under(&head(values), reading), expect, "{matcher:?} {reading:?} {values:?}");
    };
    let free = header(false, false, Some("free"));
    check(&free, Reading::Wide, &["paid", "free"], true);
    check(&free, Reading::Wide, &["paid"], false);
    check(&free, Reading::Strict, &["paid", "free"], false);
    let not_free = header(true, false, Some("free"));
    check(&not_free, Reading::Strict, &["free", "paid"], false);
    check(&not_free, Reading::Strict, &["paid", "gold"], true);
    check(&not_free, Reading::Wide, &["free", "paid"], true);
}

#[test]
fn pseudo_headers_and_ranges() {
    use route::header_matcher::HeaderMatchSpecifier as S;
    let lower = |name: &str, specifier| {
        HeaderMatcher::lower(&route::HeaderMatcher {
            name: name.into(),
            header_match_specifier: Some(specifier),
            ..Default::default()
        })
        .unwrap()
    };
    assert!(lower(":method", S::ExactMatch("GET".into())).matches(&head(&[])));
    assert!(lower(":authority", S::ExactMatch("h".into())).matches(&head(&[])));
    let range = envoy_types::pb::envoy::r#type::v3::Int64Range { start: -1, end: 5 };
    let range = lower("x-tier", S::RangeMatch(range));
    for (value, expect) in [("-1", true), ("4", true), ("5", false), ("x", false), ("", false)] {
        assert_eq!(range.matches(&head(&[value])), expect, "{value}");
    }
    let status = lower(":status", S::ExactMatch("503".into()));
    assert!(status.matches_response(&ResponseHead::new(503)));
}

#[test]
fn query_parameters() {
    use route::query_parameter_matcher::QueryParameterMatchSpecifier as S;
    let check = |specifier: S, query: Option<&str>, expect: bool| {
        let matcher = QueryMatcher::lower(&route::QueryParameterMatcher {
            name: "a".into(),
            query_parameter_match_specifier: Some(specifier.clone()),
        })
        .unwrap();
        assert_eq!(matcher.matches(query.map(str::as_bytes)), expect, "{specifier:?} {query:?}");
    };
    let exact = |text: &str| {
        S::StringMatch(pb::StringMatcher {
            ignore_case: false,
            match_pattern: Some(pb::string_matcher::MatchPattern::Exact(text.into())),
        })
    };
    check(exact("1"), Some("a=1&a=2"), true);
    check(exact("2"), Some("a=1&a=2"), false);
    check(exact("%31"), Some("a=%31"), true);
    check(exact(""), Some("b=1&a"), true);
    check(exact("1"), None, false);
    check(S::PresentMatch(true), Some("ab=1&a="), true);
    check(S::PresentMatch(true), Some("ab=1"), false);
    check(S::PresentMatch(false), Some("ab=1"), true);
}

#[test]
fn claims_keep_their_type() {
    let exact = ValueMatcher::String(StringMatcher::exact("1"));
    assert!(exact.matches(Some(&json!("1"))));
    for other in [json!(1), json!(["1"]), json!(true), json!(null), json!({"1": "1"})] {
        assert!(!exact.matches(Some(&other)), "{other}");
    }
    let list = ValueMatcher::List(Box::new(exact.clone()));
    assert!(list.matches(Some(&json!(["0", "1"]))));
    assert!(!list.matches(Some(&json!("1"))));
    assert!(!list.matches(Some(&json!([["1"]]))));
    let or = ValueMatcher::Or(vec![list, exact]);
    assert!(or.matches(Some(&json!("1"))) && or.matches(Some(&json!(["1"]))) && !or.matches(None));
    assert!(ValueMatcher::Present(false).matches(None) && !ValueMatcher::Present(true).matches(None));
    assert!(ValueMatcher::Range(1.0, 2.0).matches(Some(&json!(1))));
    assert!(ValueMatcher::Number(1.5).matches(Some(&json!(1.5))));
    assert!(ValueMatcher::Null.matches(Some(&Value::Null)) && !ValueMatcher::Null.matches(None));
}

#[test]
fn metadata_paths_are_literal() {
    let mut metadata = Metadata::new();
    metadata.set("jwt", "payload", Arc::new(json!({"a": {"b": "x"}, "a.b": "y", "l": [{"b": 1}]})));
    assert_eq!(metadata.at("jwt", &["payload", "a", "b"]), Some(&json!("x")));
    assert_eq!(metadata.at("jwt", &["payload", "a.b"]), Some(&json!("y")));
    assert_eq!(metadata.at("jwt", &["payload", "l", "0"]), None);
    assert_eq!(metadata.at("other", &["payload"]), None);
    metadata.set("jwt", "payload", Arc::new(json!("z")));
    assert_eq!(metadata.iter().count(), 1);
}

#[test]
fn address_blocks() {
    let check = |block: (&str, u32), address: &str, expect: bool| {
        let cidr = Cidr::lower(&core::CidrRange {
            address_prefix: block.0.into(),
            prefix_len: Some(UInt32Value { value: block.1 }),
        })
        .unwrap();
        assert_eq!(cidr.contains(address.parse().unwrap()), expect, "{block:?} {address}");
    };
    check(("10.1.2.3", 8), "10.255.0.1", true);
    check(("10.0.0.0", 8), "11.0.0.1", false);
    check(("10.0.0.0", 8), "::ffff:10.1.1.1", true);
    check(("::ffff:10.0.0.0", 104), "10.1.1.1", true);
    check(("2001:db8::", 32), "2001:db8::1", true);
    check(("::", 0), "10.0.0.1", false);
    assert!(Cidr::lower(&core::CidrRange { address_prefix: "10.0.0.0/8".into(), prefix_len: None }).is_err());
    let long = core::CidrRange { address_prefix: "10.0.0.0".into(), prefix_len: Some(UInt32Value { value: 33 }) };
    assert!(Cidr::lower(&long).is_err());
}

#[test]
fn templates() {
    let check = |template: &str, yes: &[&str], no: &[&str]| {
        let parsed = UriTemplate::new(template).unwrap();
        for path in yes {
            assert!(parsed.matches(path.as_bytes()), "{template} should match {path}");
        }
        for path in no {
            assert!(!parsed.matches(path.as_bytes()), "{template} should not match {path}");
        }
    };
    check("/a/*/c/**", &["/a/b/c/", "/a/b/c/d/e"], &["/a/b/c", "/a/b/x/c", "/a//c/d"]);
    check("/allow/admin/**", &["/allow/admin/", "/allow/admin/a/b.txt"], &["/allow/admin"]);
    check("/store/**/cart", &["/store//cart", "/store/a/b/cart"], &["/store/cart", "/store/a/cart/x"]);
    check("/foo/*/bar/**", &["/foo/x/bar/"], &["/foo//bar/x"]);
    check("/static/*/x", &["/static/a|b{}%ff/x"], &["/static/a/b/x", "/static/x"]);
    check("/{name}/{rest=**}", &["/a/", "/a/b"], &["//b"]);
    check("/x", &["/x"], &["/x/", "/xy"]);
    let any = UriTemplate::new("/f/*").unwrap();
    assert!(any.matches(b"/f/\xff\xfe") && !any.matches(b"/f/"));
    for bad in ["x", "/a*", "/**/*", "/**/**", "/{a", "/{a=b}", ""] {
        assert!(UriTemplate::new(bad).is_err(), "{bad}");
    }
}

proptest! {
    /// A segment operator takes any segment, whatever bytes it holds.
    #[test]
    fn operators_take_every_byte(segment in proptest::collection::vec(any::<u8>(), 1..20)) {
        let mut path = b"/f/".to_vec();
        path.extend(segment.iter().filter(|b| **b != b'/'));
        let one = UriTemplate::new("/f/*").unwrap();
        prop_assert_eq!(one.matches(&path), path.len() > 3);
        prop_assert!(UriTemplate::new("/f/**").unwrap().matches(&path));
    }

    /// Strict is never more than wide.
    #[test]
    fn strict_implies_wide(values in proptest::collection::vec("[a-c,]{0,3}", 0..4), invert: bool, empty: bool, text in "[a-c]{0,2}") {
        let matcher = header(invert, empty, Some(&text));
        let values: Vec<&str> = values.iter().map(String::as_str).collect();
        let head = head(&values);
        prop_assert!(!matcher.matches_under(&head, Reading::Strict) || matcher.matches_under(&head, Reading::Wide));
    }
}
