//! Envoy's `header_mutation` filter: edits of heads, of the query and of trailers, in written order.
//!
//! Unlike the edits of routes ([`crate::headers`]), each mutation sees what the ones before it did.
//! The filter's own come first, then those of the route's levels, from the most specific to the
//! least, or the other way round (`most_specific_header_mutations_wins`).
//!
//! *Source*: Envoy `envoy.extensions.filters.http.header_mutation.v3`. Deliberately narrower:
//! pseudo-headers and `host` cannot be edited, so that what policy judged is what is forwarded
//! (property 9).

use envoy_types::pb::envoy::config::common::mutation_rules::v3 as rules;
use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::extensions::filters::http::header_mutation::v3 as pb;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode, utf8_percent_encode};
use types::{Fields, RequestHead, ResponseHead};

use crate::headers::{Action, Addition, Context, Heads, Operator, Template, field_name};
use crate::matcher::StringMatcher;
use crate::unsupported::{Unsupported, Within as _, each};

/// The filter's settings.
#[derive(Debug, Default)]
pub struct HeaderMutation {
    /// What it does on every route.
    pub own: Mutations,
    /// The route's most specific level comes last, and wins.
    pub most_specific_wins: bool,
}

/// Mutations of one level.
#[derive(Debug, Default)]
pub struct Mutations {
    request: Vec<Mutation>,
    query: Vec<QueryMutation>,
    response: Vec<Mutation>,
    request_trailers: Vec<Mutation>,
    response_trailers: Vec<Mutation>,
}

#[derive(Debug)]
enum Mutation {
    Remove(Box<str>),
    RemoveOnMatch(StringMatcher),
    Add(Addition),
}

#[derive(Debug)]
enum QueryMutation {
    Remove(Box<str>),
    Add { key: Box<str>, value: Template<Operator>, action: Action },
}

impl HeaderMutation {
    /// Lowers Envoy's message.
    pub fn lower(proto: &pb::HeaderMutation) -> Result<Self, Unsupported> {
        let own = proto.mutations.as_ref().map(Mutations::lower).transpose().within("mutations")?.unwrap_or_default();
        Ok(Self { own, most_specific_wins: proto.most_specific_header_mutations_wins })
    }
}

impl Mutations {
    /// Lowers Envoy's message.
    pub fn lower(proto: &pb::Mutations) -> Result<Self, Unsupported> {
        Ok(Self {
            request: each(&proto.request_mutations, "request_mutations", mutation)?,
            query: each(&proto.query_parameter_mutations, "query_parameter_mutations", query_mutation)?,
            response: each(&proto.response_mutations, "response_mutations", mutation)?,
            request_trailers: each(&proto.request_trailers_mutations, "request_trailers_mutations", mutation)?,
            response_trailers: each(&proto.response_trailers_mutations, "response_trailers_mutations", mutation)?,
        })
    }

    /// Lowers the message of a route.
    pub fn lower_per_route(proto: &pb::HeaderMutationPerRoute) -> Result<Self, Unsupported> {
        Ok(proto.mutations.as_ref().map(Self::lower).transpose().within("mutations")?.unwrap_or_default())
    }

    /// Edits a request: head, then query.
    pub fn edit_request(&self, head: &mut RequestHead, context: &Context<'_>) {
        for mutation in &self.request {
            let value = mutation.value(Heads { request: head, response: None }, context);
            mutation.apply(value.as_deref(), &mut head.fields);
        }
        if !self.query.is_empty() {
            let path = self.edited_query(head, context);
            head.set_path(&path);
        }
    }

    /// Edits a response.
    pub fn edit_response(&self, head: &mut ResponseHead, request: &RequestHead, context: &Context<'_>) {
        for mutation in &self.response {
            let value = mutation.value(Heads { request, response: Some(head) }, context);
            mutation.apply(value.as_deref(), &mut head.fields);
        }
    }

    /// Edits the request's trailers, which exist.
    pub fn edit_request_trailers(&self, trailers: &mut Fields, request: &RequestHead, context: &Context<'_>) {
        edit_trailers(&self.request_trailers, trailers, Heads { request, response: None }, context);
    }

    /// Edits the response's trailers, which exist.
    pub fn edit_response_trailers(
        &self,
        trailers: &mut Fields,
        (request, response): (&RequestHead, &ResponseHead),
        context: &Context<'_>,
    ) {
        edit_trailers(&self.response_trailers, trailers, Heads { request, response: Some(response) }, context);
    }

    /// The path with its query edited. Parameters that nobody names keep their spelling.
    fn edited_query(&self, head: &RequestHead, context: &Context<'_>) -> Vec<u8> {
        let query = head.query().unwrap_or_default();
        let mut parameters: Vec<Vec<u8>> =
            query.split(|b| *b == b'&').filter(|part| !part.is_empty()).map(<[u8]>::to_vec).collect();
        for mutation in &self.query {
            match mutation {
                QueryMutation::Remove(key) => parameters.retain(|part| !is_named(part, key)),
                QueryMutation::Add { key, value, action } => {
                    let mut text = Vec::new();
                    let heads = Heads { request: head, response: None };
                    value.render(&mut text, b"-", |operator, out| operator.write(heads, context, out));
                    let encode = |text: &str| utf8_percent_encode(text, ESCAPED).to_string();
                    let part = format!("{}={}", encode(key), encode(&String::from_utf8_lossy(&text))).into_bytes();
                    let exists = parameters.iter().any(|part| is_named(part, key));
                    match (action, exists) {
                        (Action::AddIfAbsent, true) | (Action::OverwriteIfExists, false) => {}
                        (Action::Append | Action::AddIfAbsent, _) | (Action::Overwrite, false) => parameters.push(part),
                        (Action::Overwrite | Action::OverwriteIfExists, true) => {
                            let at = parameters.iter().position(|part| is_named(part, key)).unwrap_or_default();
                            parameters[at] = part;
                            let mut seen = 0;
                            parameters.retain(|part| {
                                seen += usize::from(is_named(part, key));
                                !is_named(part, key) || seen == 1
                            });
                        }
                    }
                }
            }
        }
        let mut path = head.path_only().to_vec();
        if !parameters.is_empty() {
            path.push(b'?');
            path.extend_from_slice(&parameters.join(&b'&'));
        }
        path
    }
}

/// What stands for itself in a query.
const ESCAPED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

/// Whether a parameter, as written, has this name.
fn is_named(part: &[u8], key: &str) -> bool {
    let name = part.split(|b| *b == b'=').next().unwrap_or_default();
    percent_decode(name).eq(key.bytes())
}

fn edit_trailers(mutations: &[Mutation], trailers: &mut Fields, heads: Heads<'_>, context: &Context<'_>) {
    for mutation in mutations {
        let value = mutation.value(heads, context);
        mutation.apply(value.as_deref(), trailers);
    }
}

impl Mutation {
    /// The value to add; `None` for removals and literals.
    fn value(&self, heads: Heads<'_>, context: &Context<'_>) -> Option<Vec<u8>> {
        match self {
            Self::Add(addition) => addition.rendered(heads, context),
            Self::Remove(_) | Self::RemoveOnMatch(_) => None,
        }
    }

    fn apply(&self, value: Option<&[u8]>, fields: &mut Fields) {
        match self {
            Self::Add(addition) => addition.put(value, fields),
            Self::Remove(name) => {
                fields.remove(name);
            }
            Self::RemoveOnMatch(matcher) => fields.retain(|name, _| !matcher.matches(name.as_bytes())),
        }
    }
}

fn mutation(proto: &rules::HeaderMutation) -> Result<Mutation, Unsupported> {
    use rules::header_mutation::Action as Proto;
    match &proto.action {
        Some(Proto::Remove(name)) => field_name(name).within("remove").map(Mutation::Remove),
        Some(Proto::Append(option)) => Addition::lower(option).within("append").map(Mutation::Add),
        Some(Proto::RemoveOnMatch(matching)) => {
            let path = "remove_on_match.key_matcher";
            let matcher = matching.key_matcher.as_ref().ok_or_else(|| Unsupported::missing(path))?;
            StringMatcher::lower(matcher).within(path).map(Mutation::RemoveOnMatch)
        }
        None => Err(Unsupported::missing("action")),
    }
}

fn query_mutation(proto: &core::KeyValueMutation) -> Result<QueryMutation, Unsupported> {
    use core::key_value_append::KeyValueAppendAction as Proto;
    use envoy_types::pb::google::protobuf::value::Kind;
    let Some(append) = &proto.append else {
        if proto.remove.is_empty() {
            return Err(Unsupported::missing("remove"));
        }
        return Ok(QueryMutation::Remove(proto.remove.as_str().into()));
    };
    if !proto.remove.is_empty() {
        return Err(Unsupported::new("remove", "excludes append"));
    }
    #[expect(deprecated, reason = "the older field says the same")]
    let (key, value) = match (&append.record, &append.entry) {
        (Some(record), _) => match record.value.as_ref().and_then(|value| value.kind.as_ref()) {
            Some(Kind::StringValue(text)) => (record.key.as_str(), text.as_str()),
            _ => return Err(Unsupported::new("append.record.value", "must be a string")),
        },
        (None, Some(entry)) => {
            let text = std::str::from_utf8(&entry.value);
            (entry.key.as_str(), text.map_err(|_| Unsupported::new("append.entry.value", "is not UTF-8"))?)
        }
        (None, None) => return Err(Unsupported::missing("append.record")),
    };
    if key.is_empty() {
        return Err(Unsupported::missing("append.record.key"));
    }
    let action = match Proto::try_from(append.action) {
        Ok(Proto::AppendIfExistsOrAdd) => Action::Append,
        Ok(Proto::AddIfAbsent) => Action::AddIfAbsent,
        Ok(Proto::OverwriteIfExistsOrAdd) => Action::Overwrite,
        Ok(Proto::OverwriteIfExists) => Action::OverwriteIfExists,
        Err(_) => return Err(Unsupported::new("append.action", "is unknown")),
    };
    let value = Template::parse(value, Operator::parse).within("append.record.value")?;
    Ok(QueryMutation::Add { key: key.into(), value, action })
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use envoy_types::pb::envoy::r#type::matcher::v3 as matcher;
    use envoy_types::pb::google::protobuf::{Value, value::Kind};

    use super::*;
    use crate::exchange::{Details, StreamInfo};
    use crate::facts::{ConnFacts, Now};

    fn remove(name: &str) -> rules::HeaderMutation {
        rules::HeaderMutation { action: Some(rules::header_mutation::Action::Remove(name.into())) }
    }

    fn append(name: &str, value: &str, action: i32) -> rules::HeaderMutation {
        let option = core::HeaderValueOption {
            header: Some(core::HeaderValue { key: name.into(), value: value.into(), ..Default::default() }),
            append_action: action,
            ..Default::default()
        };
        rules::HeaderMutation { action: Some(rules::header_mutation::Action::Append(option)) }
    }

    fn remove_prefix(prefix: &str) -> rules::HeaderMutation {
        let pattern = matcher::string_matcher::MatchPattern::Prefix(prefix.into());
        let key_matcher = Some(matcher::StringMatcher { match_pattern: Some(pattern), ..Default::default() });
        let action =
            rules::header_mutation::Action::RemoveOnMatch(rules::header_mutation::RemoveOnMatch { key_matcher });
        rules::HeaderMutation { action: Some(action) }
    }

    fn query(key: &str, value: &str, action: i32) -> core::KeyValueMutation {
        let value = Some(Value { kind: Some(Kind::StringValue(value.into())) });
        core::KeyValueMutation {
            append: Some(core::KeyValueAppend {
                record: Some(core::KeyValuePair { key: key.into(), value }),
                action,
                ..Default::default()
            }),
            remove: String::new(),
        }
    }

    fn with_context<T>(run: impl FnOnce(&Context<'_>) -> T) -> T {
        let conn = ConnFacts::plaintext("l", "10.0.0.9:80".parse().unwrap(), "10.1.2.3:5555".parse().unwrap());
        let info = StreamInfo { details: Details::Static("via_upstream"), ..StreamInfo::default() };
        run(&Context::new(&conn, &info, Now { mono: Instant::now(), wall_nanos: 0 }))
    }

    fn edited(proto: pb::Mutations, path: &str, before: &[(&str, &str)]) -> RequestHead {
        let mutations = Mutations::lower(&proto).unwrap();
        let mut head = RequestHead::new("GET", "h", path);
        for (name, value) in before {
            head.fields.push(name, value.as_bytes());
        }
        with_context(|context| mutations.edit_request(&mut head, context));
        head
    }

    fn text(fields: &Fields) -> String {
        let list: Vec<_> =
            fields.iter().map(|(name, value)| format!("{name}: {}", String::from_utf8_lossy(value))).collect();
        list.join("; ")
    }

    #[test]
    fn each_sees_what_the_ones_before_it_did() {
        let check = |mutations: Vec<rules::HeaderMutation>, expect: &str| {
            let proto = pb::Mutations { request_mutations: mutations, ..Default::default() };
            let head = edited(proto, "/p", &[("a", "1"), ("x-one", "1"), ("x-two", "2")]);
            assert_eq!(text(&head.fields), expect);
        };
        check(vec![append("A", "2", 0), remove("a")], "x-one: 1; x-two: 2");
        check(vec![remove("a"), append("A", "2", 0)], "x-one: 1; x-two: 2; a: 2");
        check(vec![append("b", "%REQ(a)%", 0), append("c", "%REQ(b)%", 1)], "a: 1; x-one: 1; x-two: 2; b: 1; c: 1");
        check(vec![append("a", "2", 1)], "a: 1; x-one: 1; x-two: 2");
        check(vec![append("a", "2", 3), append("z", "2", 3)], "a: 2; x-one: 1; x-two: 2");
        check(vec![remove_prefix("x-")], "a: 1");
    }

    #[test]
    fn queries() {
        let check = |mutations: Vec<core::KeyValueMutation>, path: &str, expect: &str| {
            let proto = pb::Mutations { query_parameter_mutations: mutations, ..Default::default() };
            assert_eq!(std::str::from_utf8(edited(proto, path, &[("who", "a b&c")]).path()).unwrap(), expect);
        };
        let gone = core::KeyValueMutation { append: None, remove: "k".into() };
        check(vec![gone.clone()], "/p?k=1&x=%2f&%6B=2", "/p?x=%2f");
        check(vec![gone], "/p?k=1", "/p");
        check(vec![query("n", "%REQ(who)%", 0)], "/p", "/p?n=a%20b%26c");
        check(vec![query("k", "2", 0)], "/p?k=1", "/p?k=1&k=2");
        check(vec![query("k", "2", 1)], "/p?k=1", "/p?k=1");
        check(vec![query("k", "2", 2)], "/p?k=1&a&k=3", "/p?k=2&a");
        check(vec![query("k", "2", 3)], "/p?a=1", "/p?a=1");
    }

    #[test]
    fn responses_and_trailers() {
        let mutations = Mutations::lower(&pb::Mutations {
            response_mutations: vec![append("m", "%REQ(:method)% %RESP(s)%", 2)],
            request_trailers_mutations: vec![remove("secret")],
            response_trailers_mutations: vec![append("t", "%RESPONSE_CODE%", 0)],
            ..Default::default()
        })
        .unwrap();
        let request = RequestHead::new("PUT", "h", "/");
        let mut response = ResponseHead::new(418);
        response.fields.push("s", b"1");
        with_context(|context| {
            mutations.edit_response(&mut response, &request, context);
            assert_eq!(text(&response.fields), "s: 1; m: PUT 1");
            let mut trailers = Fields::new();
            trailers.push("secret", b"x");
            mutations.edit_request_trailers(&mut trailers, &request, context);
            mutations.edit_response_trailers(&mut trailers, (&request, &response), context);
            assert_eq!(text(&trailers), "t: 418");
        });
    }

    #[test]
    fn what_steers_the_request_cannot_be_edited() {
        let check = |mutation: rules::HeaderMutation, words: &str| {
            let proto = pb::Mutations { request_mutations: vec![mutation], ..Default::default() };
            let bad = Mutations::lower(&proto).unwrap_err().to_string();
            assert!(bad.contains(words), "{bad}");
        };
        check(append(":path", "/x", 0), "request_mutations[0].append.header.key \":path\" cannot be edited");
        check(append("Host", "x", 0), "cannot be edited");
        check(remove("host"), "request_mutations[0].remove");
        check(append("a", "%NOPE%", 0), "%NOPE%");
        check(rules::HeaderMutation::default(), "action must be set");
    }
}
