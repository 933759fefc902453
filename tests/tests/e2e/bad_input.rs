//! What is wrong is said with file, line, object, field and remedy, and harms nothing.

use std::fmt::Write as _;
use std::io::Write as _;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use testkit::mesh::{is_root, lateen, run_lateen};
use testkit::{Setup, eventually};

use crate::apps::{NODE, TRAFFIC, namespace, service, virtual_service, workload};

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// `validate` of these manifests must fail and say all of these words in one line, with the place of a field.
#[track_caller]
fn check(manifests: &str, line: u32, words: &[&str]) {
    let output = run_lateen(&["validate", "-f", "-"], manifests);
    let said = text(&output.stdout) + &text(&output.stderr);
    assert!(!output.status.success(), "{manifests}\nwas taken: {said}");
    let place = format!("-:{line}:");
    let has_all = |said: &str| said.contains(&place) && words.iter().all(|word| said.contains(word));
    assert!(said.lines().any(has_all), "{place} {words:?} is not in: {said}");
}

#[test]
fn every_mistake_names_object_line_field_and_remedy() {
    check("apiVersion: v1\nkind: [", 2, &["not valid YAML", "check indentation"]);
    let of = |name: &str, http: &str| virtual_service(name, http).trim_start().to_owned();
    check(
        &of("typo", "  - rout: [{destination: {host: httpbin}}]"),
        8,
        &["VirtualService shop/typo", "spec.http[0].rout", "unknown field", "did you mean \"route\"?"],
    );
    check(
        &of("type", "  - timeout: soon\n    route: [{destination: {host: a}}]"),
        8,
        &["VirtualService shop/type", "spec.http[0].timeout", "write a number and a unit"],
    );
    check(
        &of("regex", "  - match: [{uri: {regex: \"(\"}}]\n    route: [{destination: {host: a}}]"),
        8,
        &["VirtualService shop/regex", "spec.http[0].match[0].uri.regex", "write it in RE2's syntax"],
    );
    check(
        &of("weights", "  - route: [{destination: {host: a}, weight: -1}, {destination: {host: b}, weight: 5}]"),
        8,
        &["VirtualService shop/weights", "spec.http[0].route[0].weight", "write 0 to send nothing there"],
    );
    check(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: bad, namespace: foo}\nspec: {action: REFUSE}\n",
        4,
        &["AuthorizationPolicy foo/bad", "spec.action", "REFUSE", "ALLOW"],
    );
    check("apiVersion: v1\nkind: List\nitems: {}\n", 3, &["items", "it is not a list", "write a list of objects"]);
    check("apiVersion: v1\nkind: ConfigMpa\nmetadata: {name: a}\n", 2, &["kind", "did you mean \"ConfigMap\"?"]);
}

#[test]
fn text_that_is_not_yaml_is_named_with_file_line_and_remedy() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("wrong.yaml");
    std::fs::write(&file, "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: a}\ndata:\n  a: b\n c: d\n").unwrap();
    let output = run_lateen(&["validate", "-f", file.to_str().unwrap()], "");
    let said = text(&output.stdout) + &text(&output.stderr);
    assert_eq!(output.status.code(), Some(65), "{said}");
    let place = format!("{}:6:", file.display());
    for word in [place.as_str(), "not valid YAML", "check indentation"] {
        assert!(said.contains(word), "{word:?} is not in: {said}");
    }
}

#[test]
fn what_is_refused_leaves_the_running_mesh_unharmed() {
    let mesh = TRAFFIC.turn();
    let good = virtual_service("kept", "  - directResponse: {status: 200, body: {string: kept}}");
    let _route = mesh.with(&good);
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("kept.yaml");
    let name = file.display().to_string();
    let edits: [(&str, &str, &[&str]); 5] = [
        ("status: 200", "status: many", &["shop/kept", "spec.http[0].directResponse.status", "write a whole number"]),
        ("directResponse:", "directResponce:", &["shop/kept", "unknown field", "did you mean \"directResponse\"?"]),
        (
            "- direct",
            "- match: [{uri: {regex: \"(\"}}]\n    direct",
            &["match[0].uri.regex", "write it in RE2's syntax"],
        ),
        ("[gateway]", "[gateway", &["check indentation, colons and quotes"]),
        ("VirtualService", "VirtualServise", &["did you mean \"VirtualService\"?"]),
    ];
    for (from, to, words) in edits {
        std::fs::write(&file, good.replace(from, to)).unwrap();
        let refused = mesh.command(&["apply", "-f", file.to_str().unwrap()], "");
        let said = text(&refused.stdout) + &text(&refused.stderr);
        assert_eq!(refused.status.code(), Some(1), "{said}");
        for word in words.iter().chain([&name.as_str()]) {
            assert!(said.contains(word), "{word:?} is not in: {said}");
        }
        assert_eq!(mesh.get("kept.shop.test", "/", &[]).body, "kept", "{to}");
    }
}

#[test]
fn of_two_routes_for_one_host_the_older_one_holds_and_the_other_is_named() {
    let mesh = TRAFFIC.turn();
    let route = |name: &str, status: u16| {
        format!(
            "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {{name: {name}, namespace: shop}}\nspec:\n  http: [{{directResponse: {{status: {status}}}}}]\n  hosts:\n  - httpbin\n"
        )
    };
    let status = || mesh.curl("shop/curl", &["http://httpbin:8000/get"]).status;
    let older = mesh.with(&route("a-route", 201));
    assert_eq!(status(), 201);
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("second.yaml");
    std::fs::write(&file, route("b-route", 202)).unwrap();
    let applied = mesh.command(&["apply", "-f", file.to_str().unwrap()], "");
    let said = text(&applied.stderr);
    let first = status();
    drop(older);
    let second = status();
    mesh.must(&["delete", "-f", file.to_str().unwrap()], "");
    assert!(applied.status.success(), "{said}");
    let place = format!("{}:7:", file.display());
    let words =
        [place.as_str(), "VirtualService shop/b-route", "shop/a-route is older", "put all routes of a host into one"];
    assert!(said.lines().any(|line| words.iter().all(|word| line.contains(word))), "{said}");
    assert_eq!((first, second), (201, 202), "the younger one holds once it is alone");
}

#[test]
fn an_immutable_object_is_changed_by_nobody() {
    let mesh = NODE.turn();
    let map = |value: &str| {
        format!(
            "apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: fixed, namespace: plain}}\nimmutable: true\ndata: {{k: {value}}}\n"
        )
    };
    let _fixed = mesh.with(&map("first"));
    let refused = mesh.command(&["apply", "-f", "-"], &map("second"));
    let said = text(&refused.stderr);
    assert_eq!(refused.status.code(), Some(1), "{said}");
    for word in ["ConfigMap plain/fixed", "data cannot be changed", "immutable", "delete it first"] {
        assert!(said.contains(word), "{word:?} is not in: {said}");
    }
    assert!(mesh.must(&["get", "cm", "fixed", "-n", "plain", "-o", "yaml"], "").contains("first"));
}

#[test]
fn fields_without_effect_are_named_with_their_lines() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("pod.yaml");
    let pod = "apiVersion: v1
kind: Pod
metadata: {name: p}
spec:
  nodeSelector: {disk: fast}
  hostPID: true
  containers:
  - name: main
    image: local/main
    securityContext: {runAsUser: 1000, capabilities: {drop: [ALL]}}
";
    std::fs::write(&file, pod).unwrap();
    let output = run_lateen(&["validate", "-f", file.to_str().unwrap()], "");
    let said = text(&output.stderr);
    assert!(output.status.success(), "{said}");
    for (line, words) in [
        (5, ["info:", "spec.nodeSelector", "has no effect here"]),
        (6, ["warning:", "spec.hostPID", "is not yet effective"]),
        (10, ["warning:", "spec.containers[0].securityContext", "not yet effective: runAsUser ["]),
    ] {
        let place = format!("{}:{line}:", file.display());
        let has_all = |said: &str| said.contains(&place) && words.iter().all(|word| said.contains(word));
        assert!(said.lines().any(has_all), "{line} {words:?}: {said}");
    }
}

/// An object of each kind that is known by name only, and the line of each.
fn recognised() -> (String, Vec<(usize, &'static str)>) {
    let (mut all, mut lines) = (String::new(), Vec::new());
    for info in api::kind::KINDS.iter().filter(|info| info.support == api::kind::Support::Recognised) {
        all.push_str("---\n");
        lines.push((all.lines().count() + 1, info.name));
        let namespace = if info.namespaced { ", namespace: shop" } else { "" };
        let version = info.kind.api_version();
        writeln!(all, "apiVersion: {version}\nkind: {}\nmetadata: {{name: known-by-name{namespace}}}", info.name)
            .unwrap();
    }
    (all, lines)
}

/// Each kind is said to be without effect, with the line of its object.
#[track_caller]
fn said_of_each(said: &str, file: &str, lines: &[(usize, &str)]) {
    for (line, kind) in lines {
        let place = format!("{file}:{line}:");
        let words = [place.as_str(), kind, "known-by-name", "not yet effective"];
        assert!(said.lines().any(|line| words.iter().all(|word| line.contains(word))), "{words:?}: {said}");
    }
}

#[test]
fn a_kind_that_is_known_by_name_only_is_said_to_be_without_effect() {
    let mesh = NODE.turn();
    let (objects, lines) = recognised();
    assert!(lines.len() > 30, "{lines:?}");
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("kinds.yaml");
    std::fs::write(&file, objects).unwrap();
    let applied = mesh.command(&["apply", "-f", file.to_str().unwrap()], "");
    let said = text(&applied.stderr);
    mesh.must(&["delete", "-f", file.to_str().unwrap()], "");
    assert!(applied.status.success(), "{said}");
    said_of_each(&said, &file.display().to_string(), &lines);
}

#[test]
fn wrong_commands_have_istioctls_exit_code() {
    assert_eq!(run_lateen(&["frobnicate"], "").status.code(), Some(64));
    assert_eq!(run_lateen(&["up"], "").status.code(), Some(64), "nothing to run");
    assert_eq!(run_lateen(&["wait", "--for=tea"], "").status.code(), Some(64));
    assert_eq!(run_lateen(&["down", "--name", "../other"], "").status.code(), Some(64), "the name leaves its folder");
    assert_eq!(run_lateen(&["delete"], "").status.code(), Some(64));
    for image in ["nonsense", "=sh", "local/a=", "local/a=sh -c 'open"] {
        let refused = run_lateen(&["up", "-f", "-", "--image", image], SMALL);
        let said = text(&refused.stderr);
        assert_eq!(refused.status.code(), Some(64), "{image}: {said}");
        assert!(said.contains("--image") && said.contains(image), "{said}");
    }
}

#[test]
fn a_folder_that_others_use_is_left_as_it_is() {
    use std::os::unix::fs::PermissionsExt as _;
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("of-others"), "x").unwrap();
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    for detached in [false, true] {
        let more: Vec<&str> = ANY_PORTS.into_iter().chain(detached.then_some("--detach")).collect();
        refused(&up(dir.path(), &more), dir.path(), &["holds other things", "--state-dir"]);
    }
    assert_eq!(std::fs::metadata(dir.path()).unwrap().permissions().mode() & 0o777, 0o755);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn manifests_that_are_not_there_are_a_slip() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("s");
    let args = ["up", "-f", "no-such.yaml", "--state-dir", state.to_str().unwrap()];
    refused(&run_lateen(&[&args[..], &ANY_PORTS].concat(), ""), &state, &["cannot read no-such.yaml"]);
}

#[test]
fn what_a_manifest_says_cannot_write_elsewhere_on_the_terminal() {
    let said =
        run_lateen(&["validate", "-f", "-"], "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: \"a\\e[2Jb\"}\n");
    let said = text(&said.stderr);
    assert!(said.contains("a\\u{1b}[2Jb") && !said.contains('\u{1b}'), "{said:?}");
}

#[test]
fn output_that_is_lost_is_an_error() {
    let full = || Stdio::from(std::fs::File::options().write(true).open("/dev/full").unwrap());
    let output = Command::new(lateen()).arg("version").stdout(full()).stderr(Stdio::piped()).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("standard output: No space left"), "{}", text(&output.stderr));
}

#[test]
fn odd_names_are_not_found() {
    let mesh = TRAFFIC.turn();
    for (name, words) in [
        ("pod/a?b#c", "Pod default/a?b#c is not found"),
        ("pod/", "is not KIND/NAME"),
        ("pod/../../secret", "Pod default/../../secret is not found"),
    ] {
        let output = mesh.command(&["get", name], "");
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains(words), "{name}: {said}");
    }
}

#[test]
fn a_command_without_a_mesh_says_so() {
    let nowhere = std::env::temp_dir().join("lateen-no-such-mesh");
    let output = run_lateen(&["get", "pods", "--state-dir", nowhere.to_str().unwrap()], "");
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("lateen up"), "the remedy: {said}");
}

#[test]
fn a_second_mesh_of_the_same_folder_says_who_runs() {
    let mesh = TRAFFIC.turn();
    let pid = mesh.status()["pid"].to_string();
    for more in [&[][..], &["--detach"]] {
        let second = mesh.command(&[&["up", "-f", "-"][..], &ANY_PORTS, more].concat(), "");
        let said = text(&second.stdout) + &text(&second.stderr);
        assert_eq!(second.status.code(), Some(1), "{said}");
        assert!(said.contains("runs already") && said.contains(&pid) && said.contains("--name"), "{said}");
    }
    assert_eq!(mesh.get("maildev.localhost", "/email", &[]).status, 200);
}

const ANY_PORTS: [&str; 4] = ["--ingress-http", "127.0.0.1:0", "--ingress-https", "127.0.0.1:0"];

/// `lateen up` that must not start: says all of these words, ends with this code, leaves no mesh.
#[track_caller]
fn refused(output: &Output, state: &Path, words: &[&str]) {
    let said = text(&output.stdout) + &text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    for word in words {
        assert!(said.contains(word), "{word:?} is not in: {said}");
    }
    let status = run_lateen(&["status", "--state-dir", state.to_str().unwrap()], "");
    assert!(!status.status.success(), "no mesh runs");
}

fn up(state: &Path, more: &[&str]) -> Output {
    run_lateen(&[&["up", "-f", "-", "--state-dir", state.to_str().unwrap()][..], more].concat(), SMALL)
}

const SMALL: &str = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: small}\ndata: {k: v}\n";

#[test]
fn a_taken_port_is_named_with_the_way_out() {
    let dir = tempfile::tempdir().unwrap();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let output = up(dir.path(), &["--ingress-http", &address, "--ingress-https", "127.0.0.1:0"]);
    refused(&output, dir.path(), &[&address, "8080", "--ingress-http", "port 0 picks a free one"]);
    let bad = run_lateen(&["up", "-f", "-", "--ingress-http", "nonsense"], "");
    assert_eq!(bad.status.code(), Some(64));
}

#[test]
fn a_truncated_state_file_is_named_and_left_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("objects.json");
    std::fs::write(&file, "lateen-objects-1 900 0123456789abcdef0123456789abcdef\n{\"ver").unwrap();
    refused(&up(dir.path(), &ANY_PORTS), dir.path(), &["objects.json", "5 of 900 bytes", "remove it"]);
    assert!(std::fs::read_to_string(&file).unwrap().ends_with("{\"ver"));
}

#[test]
fn a_damaged_ca_is_named_and_left_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let ca = dir.path().join("istiod/ca");
    let detached = [&ANY_PORTS[..], &["--detach"]].concat();
    let began = up(dir.path(), &detached);
    assert!(began.status.success(), "{}", text(&began.stderr));
    let down = || run_lateen(&["down", "--state-dir", dir.path().to_str().unwrap()], "");
    assert!(down().status.success());
    let remedy = format!("remove {}", ca.display());
    for name in ["self-signed/ca-key.pem", "self-signed/ca-cert.pem"] {
        let file = ca.join(name);
        let whole = std::fs::read_to_string(&file).unwrap();
        let half = &whole[..whole.len() / 2];
        std::fs::write(&file, half).unwrap();
        let words = ["the mesh's CA cannot be used", &remedy, file.to_str().unwrap()];
        refused(&up(dir.path(), &ANY_PORTS), dir.path(), &words);
        assert_eq!(std::fs::read_to_string(&file).unwrap(), half);
        std::fs::write(&file, whole).unwrap();
    }
    std::fs::copy(ca.join("self-signed/ca-key.pem"), ca.join("ca-key.pem")).unwrap();
    refused(&up(dir.path(), &ANY_PORTS), dir.path(), &[ca.to_str().unwrap(), "root-cert.pem", "give all four or none"]);
    std::fs::remove_file(ca.join("ca-key.pem")).unwrap();
    let again = up(dir.path(), &detached);
    assert!(again.status.success(), "as it was, it serves: {}", text(&again.stderr));
    assert!(down().status.success());
}

/// Runs a script with `$0` a small file system of its own, and `lateen` as `$1`.
fn on_own_file_system(dir: &Path, options: &str, script: &str) -> Output {
    let mount = format!("mount -t tmpfs -o {options} lateen-test \"$0\" && {script}");
    let mut unshare = Command::new("unshare");
    if !is_root() {
        unshare.args(["--user", "--map-root-user"]);
    }
    let mut child = unshare
        .args(["--mount", "sh", "-c", &mount])
        .arg(dir)
        .arg(lateen())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(SMALL.as_bytes()).unwrap();
    child.wait_with_output().unwrap()
}

#[test]
fn a_read_only_state_folder_is_named_with_the_way_out() {
    let dir = tempfile::tempdir().unwrap();
    let script = format!("exec \"$1\" up -f - --state-dir \"$0/s\" {}", ANY_PORTS.join(" "));
    let output = on_own_file_system(dir.path(), "ro", &script);
    refused(&output, &dir.path().join("s"), &["state folder", "Read-only file system", "--state-dir"]);
}

#[test]
fn a_full_state_folder_refuses_changes_and_harms_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let map = tempfile::NamedTempFile::new().unwrap();
    let large = SMALL.replace("small", "large").replace("k: v", &format!("k: {}", "v".repeat(200_000)));
    std::fs::write(map.path(), large).unwrap();
    let script = format!(
        "\"$1\" up --detach -f - --state-dir \"$0/s\" {ports} >/dev/null || exit 99
         head -c 3000000 /dev/zero > \"$0/filler\" 2>/dev/null
         \"$1\" apply --state-dir \"$0/s\" -f {map}; echo \"apply ended with $?\"
         \"$1\" get configmap --state-dir \"$0/s\" -o name
         rm \"$0/filler\"
         \"$1\" apply --state-dir \"$0/s\" -f {map}; echo \"then with $?\"
         \"$1\" down --state-dir \"$0/s\"",
        ports = ANY_PORTS.join(" "),
        map = map.path().display(),
    );
    let output = on_own_file_system(dir.path(), "size=1200k", &script);
    let said = text(&output.stdout) + &text(&output.stderr);
    assert!(output.status.success(), "{said}");
    for word in
        ["No space left on device", "nothing was changed", "apply ended with 1", "configmap/small", "then with 0"]
    {
        assert!(said.contains(word), "{word:?} is not in: {said}");
    }
}

#[test]
fn a_missing_program_is_a_finding_about_the_container() {
    let mesh = NODE.turn();
    let pod = "
apiVersion: v1
kind: Pod
metadata: {name: no-program, namespace: plain}
spec: {containers: [{name: main, image: local/none, command: [no-such-program-anywhere]}]}
";
    let _pod = mesh.with(pod);
    eventually("the finding", || {
        let said = mesh.said();
        let words =
            ["Pod plain/no-program", "spec.containers[0].command", "no-such-program-anywhere", "install the program"];
        if words.iter().all(|word| said.contains(word)) { Ok(()) } else { Err(said) }
    });
    eventually("its state", || match mesh.must(&["get", "pods", "-n", "plain"], "") {
        pods if pods.contains("StartError") => Ok(()),
        pods => Err(pods),
    });
    eventually("the reason in place of a log", || {
        let said = text(&mesh.command(&["logs", "no-program", "-n", "plain"], "").stderr);
        let words = ["container main waits to start: StartError", "no-such-program"];
        if words.iter().all(|word| said.contains(word)) { Ok(()) } else { Err(said) }
    });
    assert_eq!(mesh.curl("plain/curl", &["http://httpbin:8000/get"]).status, 200, "the rest runs");
}

/// `apply` of objects that are admitted but wrong together: file, line, object, field and remedy are
/// said by `apply`, which succeeds.
#[test]
fn what_is_wrong_between_objects_is_said_with_its_place() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("routes.yaml");
    let routes = "# one
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: wrong, namespace: plain}
spec:
  hosts: [wrong.test]
  gateways:
  - no-such-gateway
  http:
  - route:
    - destination: {host: no-such-host}
---
apiVersion: networking.istio.io/v1
kind: Gateway
metadata: {name: tls, namespace: istio-system}
spec:
  selector: {istio: ingressgateway}
  servers:
  - port: {number: 443, name: https, protocol: HTTPS}
    hosts: [wrong.test]
    tls: {mode: SIMPLE, credentialName: no-such-secret}
";
    std::fs::write(&file, routes).unwrap();
    let mesh = NODE.turn();
    let applied = mesh.command(&["apply", "-f", file.to_str().unwrap()], "");
    let said = text(&applied.stderr);
    mesh.must(&["delete", "-f", file.to_str().unwrap()], "");
    assert!(applied.status.success(), "{said}");
    for (line, words) in [
        (
            8,
            [
                "VirtualService plain/wrong",
                "spec.gateways[0]",
                "no-such-gateway",
                "(create it, or write namespace/name",
            ],
        ),
        (
            11,
            [
                "VirtualService plain/wrong",
                "spec.http[0].route[0].destination.host",
                "no-such-host",
                "(correct the host, or declare it with a ServiceEntry)",
            ],
        ),
        (
            21,
            [
                "Gateway istio-system/tls",
                "spec.servers[0].tls",
                "no-such-secret",
                "(create the Secret in namespace istio-system",
            ],
        ),
    ] {
        let place = format!("{}:{line}:", file.display());
        let has_all = |said: &str| said.contains(&place) && words.iter().all(|word| said.contains(word));
        assert!(said.lines().any(has_all), "{line} {words:?}: {said}");
    }
}

#[test]
fn a_file_with_mistakes_runs_all_but_these() {
    let manifests = [
        namespace("shop", true),
        workload("shop", "httpbin", "v1", "docker.io/kong/httpbin", Some(80), ""),
        service("shop", "httpbin", "{name: http, port: 8000, targetPort: 80}"),
        service("shop", "httpbin", "{name: http, port: 8001, targetPort: 80}"),
        virtual_service("weights", "  - route: [{destination: {host: a}, weight: -1}]"),
    ]
    .join("\n---\n");
    let (kinds, lines) = recognised();
    let before = manifests.lines().count();
    let lines: Vec<(usize, &str)> = lines.into_iter().map(|(line, kind)| (line + before, kind)).collect();
    let manifests = manifests + &kinds;
    let mesh = Setup::up("mistakes", &manifests).start();
    let said = eventually("the announcement", || match mesh.said() {
        said if said.contains("Ctrl-C") => Ok(said),
        other => Err(other),
    });
    let file = mesh.file().display().to_string();
    for words in [
        [file.as_str(), "Service shop/httpbin", "written twice", "the first one holds"],
        [file.as_str(), "VirtualService shop/weights", "spec.http[0].route[0].weight", "weight"],
    ] {
        assert!(said.lines().any(|line| words.iter().all(|word| line.contains(word))), "{words:?}: {said}");
    }
    said_of_each(&said, &file, &lines);
    assert!(mesh.must(&["get", "svc", "httpbin", "-n", "shop"], "").contains("8000/TCP"));
    assert!(!mesh.must(&["get", "vs", "-A", "-o", "name"], "").contains("weights"));
}
