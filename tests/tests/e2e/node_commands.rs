//! The command line against a running mesh, as users of kubectl expect it.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::process::{Command, Stdio};

use serde_json::Value;
use testkit::eventually;
use testkit::mesh::{is_root, lateen, run_lateen};

use crate::apps::{NODE, namespace, workload};

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// The words of a table's head.
fn head(table: &str) -> String {
    cells(table.lines().next().unwrap_or_default()).join("|")
}

/// The cells of a table's row.
fn cells(row: &str) -> Vec<String> {
    row.split("   ").map(str::trim).filter(|cell| !cell.is_empty()).map(str::to_owned).collect()
}

const MAP: &str = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: NAME, labels: {of: test}}\ndata: {k: v}\n";

fn map(name: &str) -> String {
    MAP.replace("NAME", name)
}

#[test]
fn status_tells_every_listening_address_by_role_and_pod() {
    let mesh = NODE.turn();
    let status = mesh.status();
    assert_eq!((&status["ready"], status["version"].as_str().unwrap().is_empty()), (&true.into(), false));
    let listening = status["listening"].as_array().unwrap();
    let has = |role: &str, pod: &str, address: &str| {
        listening.iter().any(|one| {
            one["role"] == role
                && one["pod"].as_str().unwrap().starts_with(pod)
                && one["address"].as_str().unwrap().contains(address)
        })
    };
    let http = status["addresses"]["ingress-http"].as_str().unwrap();
    assert!(has("ingress-http", "istio-ingressgateway-", http), "{listening:#?}");
    assert!(has("ingress-https", "istio-ingressgateway-", status["addresses"]["ingress-https"].as_str().unwrap()));
    for (role, pod, address) in [
        ("xds", "istiod-", "10.77.0.1:15012"),
        ("cluster-dns", "istiod-", "10.96.0.10:53"),
        ("outbound", "curl-", ":15001"),
        ("inbound", "curl-", ":15006"),
        ("proxy-admin", "curl-", "127.0.0.1:15000"),
        ("readiness", "curl-", ":15021"),
        ("application", "httpbin-", ":80"),
    ] {
        assert!(has(role, pod, address), "{role} {pod} {address}: {listening:#?}");
    }
    let table = mesh.must(&["status"], "");
    assert_eq!(head(&table), "NAMESPACE|NAME|READY|STATUS|ADDRESS|VERSION");
}

#[test]
fn objects_come_and_go_by_file_folder_and_standard_input() {
    let mesh = NODE.turn();
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("below")).unwrap();
    std::fs::write(dir.path().join("a.yaml"), map("a")).unwrap();
    std::fs::write(dir.path().join("below/b.yml"), map("b")).unwrap();
    std::fs::write(dir.path().join("notes.txt"), "no: [manifest").unwrap();
    let folder = dir.path().to_str().unwrap();
    let both = mesh.must(&["apply", "-n", "plain", "-f", folder, "-f", "-"], &map("c"));
    assert_eq!(both, "configmap/a created\nconfigmap/b created\nconfigmap/c created\n");
    assert_eq!(mesh.must(&["apply", "-n", "plain", "-f", "-"], &map("c")), "configmap/c unchanged\n");
    let changed = map("c").replace("k: v", "k: w");
    assert_eq!(mesh.must(&["apply", "-n", "plain", "--dry-run", "-f", "-"], &changed), "configmap/c configured\n");
    assert_eq!(mesh.must(&["apply", "-n", "plain", "-f", "-"], &changed), "configmap/c configured\n");
    let names = mesh.must(&["get", "cm", "-n", "plain", "-l", "of=test", "-o", "name"], "");
    assert_eq!(names, "configmap/a\nconfigmap/b\nconfigmap/c\n");
    let deleted = mesh.must(&["delete", "-n", "plain", "-f", folder], "");
    assert!(deleted.contains("configmap \"a\" deleted") && deleted.contains("configmap \"b\" deleted"), "{deleted}");
    assert_eq!(mesh.must(&["delete", "configmap/c", "-n", "plain"], ""), "configmap \"c\" deleted\n");
    let again = mesh.command(&["delete", "configmap", "c", "-n", "plain"], "");
    assert_eq!(again.status.code(), Some(1));
    assert!(text(&again.stderr).contains("ConfigMap plain/c is not found"), "{}", text(&again.stderr));
    mesh.must(&["delete", "--ignore-not-found", "configmap", "c", "-n", "plain"], "");
}

/// A deployment is deleted by its name, whatever else its file says; what names nothing is told.
#[test]
fn what_is_not_admitted_any_more_is_deleted_by_its_name() {
    let mesh = NODE.turn();
    let keep = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: kept, namespace: plain}\ndata: {k: v}\n";
    let _kept = mesh.with(keep);
    mesh.apply(&map("edited").replace("{name: edited,", "{name: edited, namespace: plain,"));
    let edited = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: edited, namespace: plain}\ndata: {k: [v]}\n";
    assert_eq!(mesh.must(&["delete", "-f", "-"], edited), "configmap \"edited\" deleted\n");
    for misnamed in [keep.replace("ConfigMap", "ConfigMpa"), keep.replace("namespace", "namespce")] {
        let said = mesh.command(&["delete", "-f", "-"], &misnamed);
        assert_eq!(said.status.code(), Some(1), "{}", text(&said.stderr));
        assert!(text(&said.stderr).contains("did you mean"), "{}", text(&said.stderr));
    }
    assert_eq!(mesh.must(&["get", "cm", "kept", "-n", "plain", "-o", "name"], ""), "configmap/kept\n");
}

/// `deploy/NAME` means a pod of that deployment, however it selects its pods.
#[test]
fn a_deployment_that_selects_by_expressions_is_entered_by_its_own_pods() {
    let mesh = NODE.turn();
    let picked = "
apiVersion: apps/v1
kind: Deployment
metadata: {name: picked, namespace: plain}
spec:
  selector: {matchExpressions: [{key: app, operator: In, values: [picked]}]}
  template:
    metadata: {labels: {app: picked}}
    spec: {containers: [{name: main, image: local/shell, command: [sleep, infinity]}]}
";
    let _picked = mesh.with(picked);
    mesh.must(&["rollout", "status", "deploy/picked", "-n", "plain"], "");
    for name in ["picked", "curl", "httpbin"] {
        let host = mesh.must(&["exec", &format!("deploy/{name}"), "-n", "plain", "--", "uname", "-n"], "");
        assert!(host.starts_with(&format!("{name}-")), "{name}: {host}");
    }
}

/// *Source*: `istioctl`'s columns.
#[test]
fn what_a_proxy_runs_is_shown_in_istioctls_columns() {
    let mesh = NODE.turn();
    mesh.synced();
    let version = |output: &str| mesh.must(&["version", "-o", output], "");
    // Proxies of pods that other tests had may still be leaving.
    let said = eventually("one version of all proxies", || {
        let versions: Value = serde_json::from_str(&version("json")).unwrap();
        let proxies = versions["dataPlaneVersion"].as_array().unwrap();
        assert!(proxies.iter().all(|proxy| proxy["IstioVersion"].is_string()), "{versions}");
        let said = version("table");
        let data_plane = said.lines().find_map(|line| line.strip_prefix("data plane version: ")).unwrap_or_default();
        let is_all = data_plane.ends_with(&format!(" ({} proxies)", proxies.len()));
        if is_all && !data_plane.contains(", ") { Ok(said) } else { Err(said) }
    });
    for kind in ["client version: ", "control plane version: "] {
        assert!(said.lines().any(|line| line.starts_with(kind) && line.len() > kind.len()), "{said}");
    }

    let lasting = |namespace: &str, app: &str| {
        let pods = mesh.must(&["get", "pods", "-n", namespace, "-l", &format!("app={app}"), "-o", "json"], "");
        let pods: Value = serde_json::from_str(&pods).unwrap();
        let lasting =
            pods["items"].as_array().unwrap().iter().find(|pod| pod["metadata"]["deletionTimestamp"].is_null());
        lasting.expect("a pod that stays").clone()
    };
    let pod = lasting("shop", "curl")["metadata"]["name"].as_str().unwrap().to_owned();
    let status = mesh.must(&["proxy-status"], "");
    assert_eq!(head(&status), "NAME|CLUSTER|ISTIOD|VERSION|SUBSCRIBED TYPES");
    let row = cells(status.lines().find(|line| line.starts_with(&pod)).expect("a row of the pod"));
    assert_eq!((row[0].as_str(), row[1].as_str()), (&*format!("{pod}.shop"), "Kubernetes"));
    assert!(row[4].contains("CDS") && row[4].contains("LDS") && row[4].starts_with(char::is_numeric), "{row:?}");

    let shown =
        |section: &str, more: &[&str]| mesh.must(&[&["proxy-config", section, &pod, "-n", "shop"], more].concat(), "");
    let host = "httpbin.plain.svc.cluster.local";
    let cluster = format!("outbound|8000||{host}");
    let backend = format!("{}:80", lasting("plain", "httpbin")["status"]["podIP"].as_str().unwrap());
    let expected: [(&str, &str, Vec<&str>, Vec<&str>); 4] = [
        (
            "cluster",
            "SERVICE FQDN|PORT|SUBSET|DIRECTION|TYPE|DESTINATION RULE",
            vec![host, "8000", "-", "outbound", "EDS"],
            vec!["--fqdn", host],
        ),
        (
            "listener",
            "ADDRESSES|PORT|MATCH|DESTINATION",
            vec!["0.0.0.0", "8000", "Trans: raw_buffer; App: http/1.1,h2c", "Route: 8000"],
            vec!["--port", "8000"],
        ),
        ("route", "NAME|VHOST NAME|DOMAINS|MATCH|VIRTUAL SERVICE", vec!["8000"], vec!["--table", "8000"]),
        (
            "endpoint",
            "ENDPOINT|STATUS|OUTLIER CHECK|CLUSTER",
            vec![&backend, "HEALTHY", "OK", &cluster],
            vec!["--cluster", &cluster],
        ),
    ];
    let all = shown("all", &[]);
    for (section, columns, wanted, filter) in expected {
        let table = shown(section, &filter);
        assert_eq!(head(&table), columns, "{section}");
        assert!(all.contains(table.lines().next().unwrap().split("   ").next().unwrap()), "{section}: {all}");
        let rows: Vec<Vec<String>> = table.lines().skip(1).map(cells).collect();
        assert!(
            rows.iter().any(|row| row.starts_with(&wanted.iter().map(ToString::to_string).collect::<Vec<_>>())),
            "{table}"
        );
        // The messages are those of the rows.
        let (few, most) = (shown(section, &[&filter[..], &["-o", "json"]].concat()), shown(section, &["-o", "json"]));
        let count = |text: &str| serde_json::from_str::<Value>(text).unwrap().as_array().unwrap().len();
        assert!(count(&few) >= 1 && count(&few) < count(&most), "{section}: {few}");
    }
    let route = shown("route", &["--table", "8000"]);
    let row = route.lines().map(cells).find(|row| row.get(1).is_some_and(|name| *name == format!("{host}:8000")));
    let row = row.unwrap_or_else(|| panic!("no row of httpbin: {route}"));
    assert!(row[2].contains("httpbin.plain") && row[3] == "/*", "{row:?}");
}

#[test]
fn get_has_kubectls_names_and_columns() {
    let mesh = NODE.turn();
    let _istio = mesh.with(ISTIO_OBJECTS);
    for (words, columns) in [
        ("po", "NAME|READY|STATUS|RESTARTS|AGE"),
        ("deploy", "NAME|READY|UP-TO-DATE|AVAILABLE|AGE"),
        ("svc", "NAME|TYPE|CLUSTER-IP|EXTERNAL-IP|PORT(S)|AGE"),
        ("sa", "NAME|SECRETS|AGE"),
        ("cm", "NAME|DATA|AGE"),
        ("secret", "NAME|TYPE|DATA|AGE"),
        ("endpointslices", "NAME|ADDRESSTYPE|PORTS|ENDPOINTS|AGE"),
        ("vs", "NAME|GATEWAYS|HOSTS|AGE"),
        ("gw", "NAME|AGE"),
        ("dr", "NAME|HOST|AGE"),
        ("se", "NAME|HOSTS|LOCATION|RESOLUTION|AGE"),
        ("pa", "NAME|MODE|AGE"),
        ("ra", "NAME|AGE"),
        ("ap", "NAME|ACTION|AGE"),
    ] {
        assert_eq!(head(&mesh.must(&["get", words, "-n", "plain"], "")), columns, "{words}");
        let everywhere = head(&mesh.must(&["get", words, "-A"], ""));
        assert_eq!(everywhere, format!("NAMESPACE|{columns}"), "{words} -A");
    }
    assert_eq!(head(&mesh.must(&["get", "ns"], "")), "NAME|STATUS|AGE");
    let wide = |kind: &str| head(&mesh.must(&["get", kind, "-n", "plain", "-o", "wide"], ""));
    assert!(wide("pods").ends_with("|AGE|IP|NODE|NOMINATED NODE|READINESS GATES"), "{}", wide("pods"));
    assert!(wide("deployments").ends_with("|CONTAINERS|IMAGES|SELECTOR"));
    assert!(wide("services").ends_with("|SELECTOR"));
    let route = mesh.must(&["get", "virtualservice", "columns", "-n", "plain"], "");
    assert!(route.contains("[\"a\",\"b\"]") && route.contains("[\"columns.test\"]"), "{route}");

    let json: Value =
        serde_json::from_str(&mesh.must(&["get", "deploy/curl", "-n", "plain", "-o", "json"], "")).unwrap();
    assert_eq!((&json["kind"], &json["metadata"]["name"]), (&"Deployment".into(), &"curl".into()));
    let list: Value = serde_json::from_str(&mesh.must(&["get", "deploy", "-A", "-o", "json"], "")).unwrap();
    assert_eq!(list["kind"], "List");
    assert!(mesh.must(&["get", "svc", "httpbin", "-n", "plain", "-o", "yaml"], "").contains("kind: Service\n"));
    assert_eq!(mesh.must(&["get", "deploy", "curl", "-n", "plain", "-o", "name"], ""), "deployment.apps/curl\n");
    let several = mesh.must(&["get", "deploy,svc", "-n", "plain", "-l", "app=httpbin", "-o", "name"], "");
    assert_eq!(several, "service/httpbin\n", "the deployment itself has no label");
    assert!(
        mesh.must(&["get", "pods", "-n", "plain", "-l", "app!=httpbin,version=v1", "-o", "name"], "")
            .starts_with("pod/curl-")
    );
    let set_based =
        ["get", "pods", "-n", "plain", "-l", "app in (curl, httpbin),version notin (v2),!tier", "-o", "name"];
    assert_eq!(mesh.must(&set_based, "").lines().count(), 2);
    let nonsense = mesh.command(&["get", "pods", "-n", "plain", "-l", "app in curl"], "");
    assert_eq!(nonsense.status.code(), Some(64), "{}", text(&nonsense.stderr));
    let all = mesh.must(&["get", "all", "-n", "plain"], "");
    for name in ["pod/curl-", "service/httpbin ", "deployment.apps/curl "] {
        assert!(all.lines().any(|line| line.starts_with(name)), "{name}: {all}");
    }
    let labels = mesh.must(&["get", "ns", "plain", "shop", "-L", "istio-injection", "--show-labels"], "");
    assert_eq!(head(&labels), "NAME|STATUS|AGE|ISTIO-INJECTION|LABELS");
    assert!(labels.contains("enabled") && labels.contains("istio-injection=disabled"), "{labels}");
    let some = mesh.command(&["get", "deploy", "curl", "none", "-n", "plain"], "");
    assert_eq!(some.status.code(), Some(1));
    assert!(text(&some.stdout).contains("curl") && text(&some.stderr).contains("plain/none is not found"));
    let on_node = mesh.must(&["get", "pods", "-n", "plain", "-l", "app=curl", "-o", "wide"], "");
    assert!(on_node.lines().nth(1).is_some_and(|row| row.contains("lateen")), "{on_node}");
    let nothing = mesh.command(&["get", "pods", "-n", "nowhere"], "");
    assert!(nothing.status.success() && text(&nothing.stderr).contains("No resources found in nowhere namespace."));
    let unknown = mesh.command(&["get", "gizmos"], "");
    assert_eq!(unknown.status.code(), Some(1));
    assert!(text(&unknown.stderr).contains("gizmos"));
}

const ISTIO_OBJECTS: &str = "
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: columns, namespace: plain}
spec: {hosts: [columns.test], gateways: [a, b], http: [{directResponse: {status: 200}}]}
---
apiVersion: networking.istio.io/v1
kind: Gateway
metadata: {name: columns, namespace: plain}
spec: {selector: {istio: none}, servers: [{port: {number: 80, name: http, protocol: HTTP}, hosts: ['*']}]}
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: columns, namespace: plain}
spec: {host: columns.test}
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: columns, namespace: plain}
spec: {hosts: [columns.test], location: MESH_EXTERNAL, resolution: STATIC, ports: [{number: 80, name: http, protocol: HTTP}], endpoints: [{address: 192.0.2.1}]}
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: columns, namespace: plain}
spec: {selector: {matchLabels: {app: none}}, mtls: {mode: PERMISSIVE}}
---
apiVersion: security.istio.io/v1
kind: RequestAuthentication
metadata: {name: columns, namespace: plain}
spec: {selector: {matchLabels: {app: none}}}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: columns, namespace: plain}
spec: {selector: {matchLabels: {app: none}}, action: DENY, rules: [{}]}
---
apiVersion: v1
kind: ConfigMap
metadata: {name: columns, namespace: plain}
data: {k: v}
---
apiVersion: v1
kind: Secret
metadata: {name: columns, namespace: plain}
stringData: {k: v}
";

#[test]
fn logs_and_exec_take_a_container() {
    let mesh = NODE.turn();
    let says = |args: &[&str], expect: &str| {
        eventually("the log", || match mesh.must(&[&["logs", "deploy/two", "-n", "plain"][..], args].concat(), "") {
            log if log == expect => Ok(()),
            other => Err(other),
        });
    };
    says(&["-c", "right"], "right starts\n");
    // Without a name, the first one.
    says(&["--tail", "1"], "left starts\n");

    let mut follow = mesh.prepared(&["logs", "-f", "-c", "left", "deploy/two", "-n", "plain"]);
    let mut follow = follow.stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(follow.stdout.take().unwrap()).lines();
    assert_eq!(lines.next().unwrap().unwrap(), "left starts");
    let run = |container: &str, script: &str| {
        let args = ["exec", "deploy/two", "-n", "plain", "-c", container, "--", "sh", "-c", script];
        mesh.command(&args, "typed\n")
    };
    assert!(run("left", "touch /tmp/go-$HOSTNAME").status.success());
    assert_eq!(lines.next().unwrap().unwrap(), "left goes on", "as it is written");
    assert!(run("left", "rm /tmp/go-$HOSTNAME").status.success());
    follow.kill().unwrap();
    follow.wait().unwrap();

    for side in ["left", "right"] {
        let output = run(side, "echo $SIDE; read line; echo $line; exit 7");
        assert_eq!((text(&output.stdout), output.status.code()), (format!("{side}\ntyped\n"), Some(7)));
    }
    let pod = mesh.must(&["get", "pods", "-n", "plain", "-l", "app=two", "-o", "name"], "");
    let pod = pod.trim().trim_start_matches("pod/");
    let by_name = mesh.command(&["exec", pod, "-n", "plain", "--", "uname", "-n"], "");
    assert_eq!(text(&by_name.stdout), format!("{pod}\n"), "its own host name");
    let none = mesh.command(&["exec", pod, "-n", "plain", "-c", "middle", "--", "true"], "");
    assert!(!none.status.success() && text(&none.stderr).contains("middle"), "{}", text(&none.stderr));
    let none = mesh.command(&["logs", pod, "-n", "plain", "-c", "middle"], "");
    assert!(!none.status.success() && text(&none.stderr).contains("middle"), "{}", text(&none.stderr));
}

#[test]
fn deployments_are_scaled_restarted_and_labelled() {
    let mesh = NODE.turn();
    let pods = || mesh.must(&["get", "pods", "-n", "plain", "-l", "app=httpbin", "-o", "name"], "");
    let first = pods();
    assert_eq!(
        mesh.must(&["scale", "deploy/httpbin", "--replicas", "2", "-n", "plain"], ""),
        "deployment.apps/httpbin scaled\n"
    );
    let rolled = mesh.must(&["rollout", "status", "deployment/httpbin", "-n", "plain"], "");
    assert_eq!(rolled, "deployment \"httpbin\" successfully rolled out\n");
    assert_eq!(pods().lines().count(), 2);
    mesh.must(&["scale", "deployment", "httpbin", "--replicas", "1", "-n", "plain"], "");
    assert_eq!(
        mesh.must(&["rollout", "restart", "deployment", "httpbin", "-n", "plain"], ""),
        "deployment.apps/httpbin restarted\n"
    );
    mesh.must(&["rollout", "status", "deploy/httpbin", "-n", "plain"], "");
    eventually("one new pod", || {
        let now = pods();
        if now.lines().count() == 1 && now != first { Ok(()) } else { Err(now) }
    });
    let nowhere = mesh.command(&["rollout", "status", "deploy/none", "-n", "plain"], "");
    assert!(!nowhere.status.success() && text(&nowhere.stderr).contains("none"));
    for words in [&["scale", "pod/httpbin", "--replicas", "2"][..], &["rollout", "restart", "svc", "httpbin"]] {
        let refused = mesh.command(&[words, &["-n", "plain"]].concat(), "");
        assert_eq!(refused.status.code(), Some(64), "{words:?}: {}", text(&refused.stderr));
    }

    assert_eq!(
        mesh.must(&["label", "deploy/httpbin", "tier=back", "-n", "plain"], ""),
        "deployment.apps/httpbin labeled\n"
    );
    let refused = mesh.command(&["label", "deploy", "httpbin", "tier=front", "-n", "plain"], "");
    assert!(!refused.status.success() && text(&refused.stderr).contains("--overwrite"), "{}", text(&refused.stderr));
    mesh.must(&["label", "--overwrite", "deploy", "httpbin", "tier=front", "-n", "plain"], "");
    assert!(mesh.must(&["get", "deploy", "-n", "plain", "-l", "tier=front", "-o", "name"], "").contains("httpbin"));
    assert_eq!(
        mesh.must(&["label", "deploy", "-l", "tier=front", "tier=front", "-n", "plain"], ""),
        "deployment.apps/httpbin not labeled\n"
    );
    assert_eq!(
        mesh.must(&["label", "deploy/httpbin", "tier-", "-n", "plain"], ""),
        "deployment.apps/httpbin unlabeled\n"
    );
    assert_eq!(mesh.must(&["get", "deploy", "-n", "plain", "-l", "tier", "-o", "name"], ""), "");
}

#[test]
fn wait_returns_when_every_proxy_runs_what_was_deleted_too() {
    let mesh = NODE.turn();
    mesh.must(&["apply", "-n", "plain", "-f", "-"], &map("short"));
    mesh.must(&["delete", "configmap", "short", "-n", "plain"], "");
    assert_eq!(mesh.must(&["wait", "--for=synced", "--timeout", "20"], ""), "every proxy runs what was applied\n");
}

#[test]
fn the_socket_is_its_owners_only() {
    let mesh = NODE.turn();
    let socket = mesh.state_dir().join("api.sock");
    assert_eq!(std::fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(std::fs::metadata(mesh.state_dir()).unwrap().permissions().mode() & 0o777, 0o700);
    if !is_root() {
        // Only root can become somebody else.
        return;
    }
    // Also where the file system would let them in.
    let state = mesh.state_dir();
    let folders = [state.parent().unwrap(), &state];
    let before = folders.map(|folder| std::fs::metadata(folder).unwrap().permissions());
    for folder in folders {
        std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o755)).unwrap();
    }
    std::fs::set_permissions(&socket, std::fs::Permissions::from_mode(0o666)).unwrap();
    let ask = |uid: &str| {
        let mut curl = Command::new("setpriv");
        curl.args([
            "--reuid",
            uid,
            "--regid",
            uid,
            "--clear-groups",
            "curl",
            "-s",
            "--max-time",
            "10",
            "--unix-socket",
        ]);
        curl.arg(&socket).arg("http://lateen/status").output().unwrap()
    };
    let stranger = ask("65534");
    assert!(!stranger.status.success() && stranger.stdout.is_empty(), "{}", text(&stranger.stdout));
    assert!(ask("0").status.success(), "its owner");
    std::fs::set_permissions(&socket, std::fs::Permissions::from_mode(0o600)).unwrap();
    for (folder, permissions) in folders.iter().zip(before) {
        std::fs::set_permissions(folder, permissions).unwrap();
    }
}

#[test]
fn up_takes_files_folders_and_standard_input_and_says_once_what_nothing_plays() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("more");
    std::fs::create_dir(&folder).unwrap();
    std::fs::write(folder.join("a.yaml"), workload("plain", "mapped", "v1", "example.org/web:2", None, "\"infinity\""))
        .unwrap();
    let file = dir.path().join("b.yaml");
    let nobody = workload("plain", "nobody", "v1", "example.org/unknown:1", None, "").replace(
        "metadata: {name: nobody, namespace: plain}\nspec:\n",
        "metadata: {name: nobody, namespace: plain}\nspec:\n  replicas: 2\n",
    );
    std::fs::write(&file, nobody).unwrap();
    let state = dir.path().join("s");
    let mut up = Command::new(lateen())
        .args(["up", "--detach", "--name", "mixed", "--timeout", "120", "--image", "example.org/web=sleep"])
        .args(["--ingress-http", "127.0.0.1:0", "--ingress-https", "127.0.0.1:0", "-f", "-", "-f"])
        .arg(&folder)
        .arg("-f")
        .arg(&file)
        .arg("--state-dir")
        .arg(&state)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    up.stdin.take().unwrap().write_all(namespace("plain", false).as_bytes()).unwrap();
    let output = up.wait_with_output().unwrap();
    let said = text(&output.stdout) + &text(&output.stderr);
    let at = ["--state-dir", state.to_str().unwrap()];
    let pods = text(&run_lateen(&[&["get", "pods", "-n", "plain"][..], &at].concat(), "").stdout);
    let down = run_lateen(&[&["down", "--name", "mixed"][..], &at].concat(), "");
    assert!(down.status.success(), "{}", text(&down.stderr));
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert_eq!(said.matches("--image example.org/unknown:1=PROGRAM").count(), 1, "{said}");
    let place = format!("{}:", file.display());
    for word in
        [place.as_str(), "Deployment plain/nobody", "spec.template.spec.containers[0].image", "example.org/unknown:1"]
    {
        assert!(said.contains(word), "{word:?} is not in {said}");
    }
    let row = |name: &str| pods.lines().find(|line| line.starts_with(name)).unwrap_or_default().to_owned();
    assert!(row("mapped-").contains("1/1"), "the rest runs: {pods}");
    assert!(row("nobody-").contains("ErrImageNeverPull"), "{pods}");
}
