//! Which answers of the mesh itself a route edits, and what their logs name.

use envoy_types::pb::envoy::config::core::v3 as core;

use super::*;

/// Aborts with 418 wherever the route has it.
fn abort() -> fault_pb::HttpFault {
    fault_pb::HttpFault {
        abort: Some(fault_pb::FaultAbort {
            percentage: Some(FractionalPercent { numerator: 100, denominator: 0 }),
            error_type: Some(fault_pb::fault_abort::ErrorType::HttpStatus(418)),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn direct(prefix: &str, body: &str) -> route::Route {
    let mut direct = to(prefix, "x");
    direct.action = Some(route::route::Action::DirectResponse(route::DirectResponseAction {
        status: 200,
        body: Some(core::DataSource {
            specifier: Some(core::data_source::Specifier::InlineString(body.to_owned())),
            ..Default::default()
        }),
        ..Default::default()
    }));
    direct
}

fn redirect(prefix: &str) -> route::Route {
    let mut redirect = to(prefix, "x");
    redirect.action = Some(route::route::Action::Redirect(route::RedirectAction {
        path_rewrite_specifier: Some(route::redirect_action::PathRewriteSpecifier::PathRedirect("/new".to_owned())),
        ..Default::default()
    }));
    redirect
}

#[test]
fn a_route_edits_its_own_answers_and_those_on_the_way_to_its_cluster() {
    let edited = |mut route: route::Route| {
        route.response_headers_to_add = vec![header("x-route", "1", false), header("content-type", "text/x", true)];
        route
    };
    let aborted = |mut route: route::Route| {
        route.typed_per_filter_config.insert("fault".to_owned(), pack(&abort()));
        edited(route)
    };
    let routes = vec![
        edited(to("/gone", "gone")),
        edited(to("/empty", "empty")),
        aborted(to("/fault/forward", "a")),
        aborted(direct("/fault/direct", "x")),
        aborted(redirect("/fault/redirect")),
        edited(direct("/direct", "x")),
        edited(direct("/bodiless", "")),
        edited(redirect("/redirect")),
    ];
    let mut all = host(&["*"], routes);
    all.response_headers_to_add = vec![header("x-host", "1", false)];
    let http = Http::new(vec![all], vec![cluster("a", &[80]), cluster("empty", &[])]);
    let world = http.filter("fault", pack(&fault_pb::HttpFault::default())).build();
    // Status, type, whether route and virtual host edit it, the cluster in the log.
    let check = |path: &str, expect: (u16, Option<&str>, bool, Option<&str>)| {
        let mut call = world.start(get("a", path));
        let reply = call.reply();
        let fields = &reply.head.fields;
        let is_edited = fields.contains("x-route");
        assert_eq!(fields.contains("x-host"), is_edited, "{path}");
        let types = fields.iter().filter(|(name, _)| *name == "content-type").count();
        assert!(types < 2, "{path}: {types} types");
        let named = call.exchange.info().cluster.as_ref().map(|cluster| &*cluster.name);
        assert_eq!((reply.head.status, fields.get_str("content-type"), is_edited, named), expect, "{path}");
    };
    check("/gone", (503, None, true, None));
    check("/empty", (503, Some("text/x"), true, Some("empty")));
    check("/fault/forward", (418, Some("text/x"), true, Some("a")));
    check("/fault/direct", (418, Some("text/plain"), false, None));
    check("/fault/redirect", (418, Some("text/plain"), false, None));
    check("/direct", (200, Some("text/x"), true, None));
    check("/bodiless", (200, None, true, None));
    check("/redirect", (301, None, true, None));
    check("/nobody", (404, None, false, None));
}

#[test]
fn a_route_edits_its_redirect_after_the_location_is_set() {
    use core::header_value_option::HeaderAppendAction as Append;
    let location = |append_action: i32| {
        let mut route = redirect("/");
        route.response_headers_to_add = vec![header("location", "/by-route", false)];
        route.response_headers_to_add[0].append_action = append_action;
        let world = Http::new(vec![host(&["*"], vec![route])], vec![]).build();
        let reply = world.start(get("a", "/")).reply();
        reply.head.fields.get_str("location").map(str::to_owned)
    };
    assert_eq!(location(Append::OverwriteIfExistsOrAdd.into()).as_deref(), Some("/by-route"));
    assert_eq!(location(Append::AddIfAbsent.into()).as_deref(), Some("http://a/new"));
}

#[test]
fn a_grpc_client_is_told_of_a_redirect_in_its_own_form() {
    let world = Http::new(vec![host(&["*"], vec![redirect("/")])], vec![]).build();
    let mut head = get("a", "/");
    head.fields.push("content-type", b"application/grpc");
    let reply = world.start(head).reply();
    assert_eq!((reply.head.status, reply.head.fields.get_str("grpc-status")), (200, Some("2")));
    assert_eq!(reply.head.fields.get_str("location"), Some("http://a/new"));
}

#[test]
fn a_400_ends_its_connection() {
    let bad = fault_pb::HttpFault {
        abort: Some(fault_pb::FaultAbort {
            percentage: Some(FractionalPercent { numerator: 100, denominator: 0 }),
            error_type: Some(fault_pb::fault_abort::ErrorType::HttpStatus(400)),
            ..Default::default()
        }),
        ..Default::default()
    };
    let world = Http::simple().filter("fault", pack(&bad)).build();
    assert!(world.start(get("a", "/")).reply().close);
    let world = Http::simple().filter("fault", pack(&abort())).build();
    assert!(!world.start(get("a", "/")).reply().close);
}
