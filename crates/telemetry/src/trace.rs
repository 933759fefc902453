//! Trace contexts as they travel in headers: B3 (several headers or one) and W3C.
//!
//! Pure: reads and writes headers. Whether a request is traced is the engine's decision.
//!
//! *Source*: B3 propagation; W3C Trace Context level 1; Envoy's Zipkin tracer.

use types::Fields;

/// What a request says of its trace.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TraceContext {
    /// Never zero.
    pub trace_id: u128,
    /// The caller's span; never zero.
    pub span_id: u64,
    /// The caller's parent, when it says so.
    pub parent_id: Option<u64>,
    /// The caller's decision, when it made one.
    pub sampled: Option<bool>,
    /// B3's debug flag.
    pub debug: bool,
}

fn hex_u128(text: &[u8]) -> Option<u128> {
    let fits = (text.len() == 16 || text.len() == 32) && text.iter().all(u8::is_ascii_hexdigit);
    let value = fits.then(|| std::str::from_utf8(text).ok()).flatten()?;
    u128::from_str_radix(value, 16).ok().filter(|value| *value != 0)
}

fn hex_u64(text: &[u8]) -> Option<u64> {
    let fits = text.len() == 16 && text.iter().all(u8::is_ascii_hexdigit);
    let value = fits.then(|| std::str::from_utf8(text).ok()).flatten()?;
    u64::from_str_radix(value, 16).ok().filter(|value| *value != 0)
}

fn b3_sampled(text: &[u8]) -> Option<bool> {
    match text {
        b"1" | b"true" | b"d" => Some(true),
        b"0" | b"false" => Some(false),
        _ => None,
    }
}

/// What was found in the headers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Extracted {
    /// Nothing: start a trace.
    None,
    /// A decision without a trace (`b3: 0`, `x-b3-sampled` alone).
    Decision(bool),
    /// A trace to continue.
    Context(TraceContext),
}

/// Reads B3 (multi, then single), then W3C.
///
/// *Shape*: a malformed header counts as absent.
pub fn extract(fields: &Fields) -> Extracted {
    let debug = fields.get("x-b3-flags") == Some(b"1");
    let sampled = fields.get("x-b3-sampled").and_then(b3_sampled).or(debug.then_some(true));
    let multi = fields.get("x-b3-traceid").and_then(hex_u128).zip(fields.get("x-b3-spanid").and_then(hex_u64));
    if let Some((trace_id, span_id)) = multi {
        let parent_id = fields.get("x-b3-parentspanid").and_then(hex_u64);
        return Extracted::Context(TraceContext { trace_id, span_id, parent_id, sampled, debug });
    }
    if let Some(single) = fields.get("b3") {
        match b3_single(single) {
            Extracted::None => {}
            found => return found,
        }
    }
    if let Some(context) = fields.get("traceparent").and_then(traceparent) {
        return Extracted::Context(context);
    }
    sampled.map_or(Extracted::None, Extracted::Decision)
}

fn b3_single(value: &[u8]) -> Extracted {
    let mut parts = value.split(|byte| *byte == b'-');
    let first = parts.next().unwrap_or_default();
    let Some(trace_id) = hex_u128(first) else {
        return b3_sampled(first).map_or(Extracted::None, Extracted::Decision);
    };
    let Some(span_id) = parts.next().and_then(hex_u64) else { return Extracted::None };
    let flag = parts.next();
    let parent_id = parts.next().and_then(hex_u64);
    Extracted::Context(TraceContext {
        trace_id,
        span_id,
        parent_id,
        sampled: flag.and_then(b3_sampled),
        debug: flag == Some(b"d"),
    })
}

fn traceparent(value: &[u8]) -> Option<TraceContext> {
    // version "-" trace-id "-" parent-id "-" trace-flags; later versions may append more
    if value.len() < 55 || value[2] != b'-' || value[35] != b'-' || value[52] != b'-' || value[..2] == *b"ff" {
        return None;
    }
    if value.len() > 55 && (value[..2] == *b"00" || value[55] != b'-') {
        return None;
    }
    let lower = |text: &[u8]| !text.iter().any(u8::is_ascii_uppercase);
    if !lower(&value[..55]) || !value[..2].iter().all(u8::is_ascii_hexdigit) {
        return None;
    }
    let trace_id = hex_u128(&value[3..35])?;
    let span_id = hex_u64(&value[36..52])?;
    let flags = u8::from_str_radix(std::str::from_utf8(&value[53..55]).ok()?, 16).ok()?;
    Some(TraceContext { trace_id, span_id, parent_id: None, sampled: Some(flags & 1 == 1), debug: false })
}

/// Which headers a tracer writes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Propagation {
    /// B3 in several headers.
    #[default]
    B3,
    /// B3 in several headers, and W3C.
    B3AndW3c,
    /// W3C alone.
    W3c,
}

/// Writes the context of the span `span_id`, child of `parent_id`, over whatever was there.
///
/// `x-b3-*` always goes out with B3; a `traceparent` or `b3` that arrived is rewritten too, so that
/// no stale context survives beside the new one.
pub fn inject(fields: &mut Fields, propagation: Propagation, context: &TraceContext, parent_id: Option<u64>) {
    let sampled = context.sampled.unwrap_or(false);
    let span = format!("{:016x}", context.span_id);
    let trace = format!("{:032x}", context.trace_id);
    if propagation != Propagation::W3c {
        fields.set("x-b3-traceid", trace.as_bytes());
        fields.set("x-b3-spanid", span.as_bytes());
        match parent_id {
            Some(parent) => fields.set("x-b3-parentspanid", format!("{parent:016x}").as_bytes()),
            None => _ = fields.remove("x-b3-parentspanid"),
        }
        fields.set("x-b3-sampled", if sampled { b"1" } else { b"0" });
        if fields.contains("b3") {
            let parent = parent_id.map(|parent| format!("-{parent:016x}")).unwrap_or_default();
            let single = format!("{trace}-{span}-{}{parent}", u8::from(sampled));
            fields.set("b3", single.as_bytes());
        }
    }
    if propagation != Propagation::B3 || fields.contains("traceparent") {
        fields.set("traceparent", format!("00-{trace}-{span}-{:02x}", u8::from(sampled)).as_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(pairs: &[(&str, &str)]) -> Fields {
        pairs.iter().map(|(name, value)| (*name, value.as_bytes())).collect()
    }

    #[test]
    fn every_form_is_read() {
        let expect = |sampled, parent_id| {
            Extracted::Context(TraceContext {
                trace_id: 0x4bf9_2f35_77b3_4da6_a3ce_929d_0e0e_4736,
                span_id: 0x00f0_67aa_0ba9_02b7,
                parent_id,
                sampled,
                debug: false,
            })
        };
        let trace = "4bf92f3577b34da6a3ce929d0e0e4736";
        let cases: &[(&[(&str, &str)], Extracted)] = &[
            (&[("x-b3-traceid", trace), ("x-b3-spanid", "00f067aa0ba902b7")], expect(None, None)),
            (
                &[
                    ("x-b3-traceid", trace),
                    ("x-b3-spanid", "00f067aa0ba902b7"),
                    ("x-b3-sampled", "1"),
                    ("x-b3-parentspanid", "0000000000000005"),
                ],
                expect(Some(true), Some(5)),
            ),
            (&[("b3", "4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-0")], expect(Some(false), None)),
            (&[("traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01")], expect(Some(true), None)),
            (&[("traceparent", "cc-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-x")], expect(Some(true), None)),
            (&[("traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-x")], Extracted::None),
            (&[("traceparent", "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01")], Extracted::None),
            (&[("traceparent", "00-00000000000000000000000000000000-00f067aa0ba902b7-01")], Extracted::None),
            (&[("b3", "0")], Extracted::Decision(false)),
            (&[("x-b3-sampled", "1")], Extracted::Decision(true)),
            (&[("b3", "x")], Extracted::None),
            (&[], Extracted::None),
        ];
        for (headers, expected) in cases {
            assert_eq!(extract(&fields(headers)), *expected, "{headers:?}");
        }
    }

    #[test]
    fn what_is_written_is_read_back() {
        let context = TraceContext { trace_id: 7, span_id: 9, parent_id: Some(3), sampled: Some(true), debug: false };
        for propagation in [Propagation::B3, Propagation::B3AndW3c] {
            let mut headers = fields(&[("b3", "0"), ("traceparent", "junk")]);
            inject(&mut headers, propagation, &context, Some(3));
            assert_eq!(extract(&headers), Extracted::Context(context));
            assert_eq!(headers.get_str("traceparent"), Some("00-00000000000000000000000000000007-0000000000000009-01"));
        }
    }
}
