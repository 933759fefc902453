//! What a route does to the heads that pass it.
//!
//! *Source*: Envoy: header edits of weighted cluster, route, virtual host, table, in this order
//! (reversed by `most_specific_header_mutations_wins`), then the host, then the path.

use types::{RequestHead, ResponseHead};

use super::machine::Exchange;
use crate::facts::Now;
use crate::headers::Context;
use crate::route::{Edits, Forward, HostRewrite, PathRewrite, Route, RouteTable, VirtualHost, WeightedCluster};

/// The levels that edit, most specific first.
pub(super) fn levels<'a>(
    table: &'a RouteTable,
    host: &'a VirtualHost,
    route: Option<&'a Route>,
    weighted: Option<&'a WeightedCluster>,
) -> impl Iterator<Item = &'a Edits> {
    let all = [weighted.map(|w| &w.edits), route.map(|r| &r.edits), Some(&host.edits), Some(&table.edits)];
    let specific_last = table.most_specific_wins;
    (0..4).filter_map(move |at| all[if specific_last { 3 - at } else { at }])
}

impl Exchange {
    /// Edits the request on its way upstream; once, before the first attempt.
    pub(super) fn edit_request(&self, forward: &Forward, route: &Route, head: &mut RequestHead, now: Now) {
        let Some((table, host)) = self.table_and_host() else { return };
        let weighted = self.weighted();
        for edits in levels(table, host, Some(route), weighted) {
            edits.request.apply_request(head, &Context::new(&self.conn, &self.info, now));
        }
        rewrite_host(forward, weighted, head);
        rewrite_path(forward, route, head);
    }

    /// Edits a response, a local one too, by the levels of the route that was found.
    pub(super) fn edit_response(&self, request: &RequestHead, head: &mut ResponseHead, now: Now) {
        let Some((table, host)) = self.table_and_host() else { return };
        for edits in levels(table, host, self.route(), self.weighted()) {
            edits.response.apply_response(head, request, &Context::new(&self.conn, &self.info, now));
        }
    }
}

fn rewrite_host(forward: &Forward, weighted: Option<&WeightedCluster>, head: &mut RequestHead) {
    let new: Option<Vec<u8>> = match (weighted.and_then(|weighted| weighted.host.as_deref()), &forward.host) {
        (Some(literal), _) => Some(literal.as_bytes().to_vec()),
        (None, HostRewrite::Literal(literal)) => Some(literal.as_bytes().to_vec()),
        (None, HostRewrite::Header(name)) => head.fields.get(name).map(<[u8]>::to_vec),
        // The endpoint's name is known at each attempt only.
        (None, HostRewrite::Auto | HostRewrite::Keep) => None,
    };
    if let Some(new) = new.filter(|new| !new.is_empty()) {
        set_host(forward, head, &new);
    }
}

/// Replaces the host and keeps the old one in `x-envoy-original-host`.
pub(super) fn set_host(forward: &Forward, head: &mut RequestHead, new: &[u8]) {
    if head.authority() == new {
        return;
    }
    let old = head.authority().to_vec();
    if forward.append_x_forwarded_host {
        let mut value = head.fields.joined("x-forwarded-host").map(std::borrow::Cow::into_owned).unwrap_or_default();
        if !value.is_empty() {
            value.push(b',');
        }
        value.extend_from_slice(&old);
        head.fields.set("x-forwarded-host", &value);
    }
    if !head.fields.contains("x-envoy-original-host") {
        head.fields.set("x-envoy-original-host", &old);
    }
    head.set_authority(new);
}

fn rewrite_path(forward: &Forward, route: &Route, head: &mut RequestHead) {
    let path = head.path_only();
    let mut new = match &forward.path {
        PathRewrite::Keep => return,
        PathRewrite::Prefix(prefix) => {
            let rest = &path[route.matches.path.matched_len(path).min(path.len())..];
            [prefix.as_bytes(), rest].concat()
        }
        PathRewrite::Regex(rewrite) => rewrite.apply(path),
    };
    if new.first() != Some(&b'/') {
        new.insert(0, b'/');
    }
    if let Some(query) = head.query() {
        new.push(b'?');
        new.extend_from_slice(query);
    }
    let old = head.path().to_vec();
    head.fields.set("x-envoy-original-path", &old);
    head.set_path(&new);
}
