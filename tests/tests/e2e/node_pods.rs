//! What a pod is given and what becomes of it, as on a node of Kubernetes.

use std::io::{Read as _, Write as _};
use std::net::TcpListener;

use serde_json::Value;
use testkit::{Mesh, eventually};

use crate::apps::NODE;

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// A pod of namespace `plain` that runs a shell script; `more` goes into its container.
fn pod(name: &str, script: &str, more: &str) -> String {
    format!(
        "
apiVersion: v1
kind: Pod
metadata: {{name: {name}, namespace: plain, labels: {{app: {name}}}}}
spec:
  containers:
  - name: main
    image: local/shell
    command: [sh, -c, {script:?}]
{more}
"
    )
}

fn get(mesh: &Mesh, name: &str) -> Value {
    let output = mesh.command(&["get", "pod", name, "-n", "plain", "-o", "json"], "");
    serde_json::from_slice(&output.stdout).unwrap_or_default()
}

fn row(mesh: &Mesh, name: &str) -> String {
    let table = mesh.must(&["get", "pods", "-n", "plain"], "");
    table.lines().find(|line| line.starts_with(&format!("{name} "))).unwrap_or_default().to_owned()
}

#[track_caller]
fn until_row(mesh: &Mesh, name: &str, words: &[&str]) {
    eventually(&format!("{name} is {words:?}"), || {
        let row = row(mesh, name);
        if words.iter().all(|word| row.contains(word)) { Ok(()) } else { Err(row) }
    });
}

/// Runs a shell script in a pod of `plain`.
fn run(mesh: &Mesh, name: &str, script: &str) -> String {
    let output = mesh.command(&["exec", name, "-n", "plain", "--", "sh", "-c", script], "");
    text(&output.stdout) + &text(&output.stderr)
}

const SETTINGS: &str = "
apiVersion: v1
kind: ConfigMap
metadata: {name: settings, namespace: plain}
data: {colour: blue, 'a.txt': 'first'}
---
apiVersion: v1
kind: Secret
metadata: {name: keys, namespace: plain}
stringData: {password: hidden}
---
";

#[test]
fn variables_volumes_and_tokens() {
    let mesh = NODE.turn();
    let more = "
    env:
    - {name: POD, valueFrom: {fieldRef: {fieldPath: metadata.name}}}
    - {name: ADDRESS, valueFrom: {fieldRef: {fieldPath: status.podIP}}}
    - {name: ACCOUNT, valueFrom: {fieldRef: {fieldPath: spec.serviceAccountName}}}
    - {name: COLOUR, valueFrom: {configMapKeyRef: {name: settings, key: colour}}}
    - {name: PASSWORD, valueFrom: {secretKeyRef: {name: keys, key: password}}}
    - {name: BOTH, value: $(POD)-$(COLOUR)}
    envFrom: [{prefix: ALL_, configMapRef: {name: settings}}]
    volumeMounts:
    - {name: settings, mountPath: /settings}
    - {name: keys, mountPath: /keys, readOnly: true}
    - {name: scratch, mountPath: /scratch}
    - {name: mixed, mountPath: /mixed}
  volumes:
  - {name: settings, configMap: {name: settings}}
  - {name: keys, secret: {secretName: keys, defaultMode: 256}}
  - {name: scratch, emptyDir: {}}
  - name: mixed
    projected:
      sources:
      - serviceAccountToken: {audience: test, path: token}
      - configMap: {name: settings, items: [{key: colour, path: deep/colour}]}
      - downwardAPI: {items: [{path: labels, fieldRef: {fieldPath: metadata.labels}}]}";
    let _given = mesh.with(&(SETTINGS.to_owned() + &pod("given", "sleep infinity", more)));
    until_row(&mesh, "given", &["1/1", "Running"]);
    let address = get(&mesh, "given")["status"]["podIP"].as_str().unwrap().to_owned();
    let said = run(&mesh, "given", "echo $POD $ADDRESS $ACCOUNT $COLOUR $PASSWORD $BOTH $ALL_colour");
    assert_eq!(said, format!("given {address} default blue hidden given-blue blue\n"));
    let said = run(
        &mesh,
        "given",
        "cat /settings/a.txt /keys/password /mixed/deep/colour /mixed/labels; stat -Lc %a /keys/password",
    );
    assert_eq!(said, "firsthiddenblueapp=\"given\"\n400\n");
    assert_eq!(
        run(&mesh, "given", "echo x > /scratch/x && cat /scratch/x; echo x 2>&1 > /keys/x || echo refused")
            .lines()
            .next(),
        Some("x")
    );
    assert!(run(&mesh, "given", "touch /keys/x || echo refused").contains("refused"));
    let account = "/var/run/secrets/kubernetes.io/serviceaccount";
    let said = run(
        &mesh,
        "given",
        &format!(
            "cat {account}/namespace; echo; cut -d. -f2 {account}/token | wc -w; cut -d. -f2 /mixed/token | wc -w"
        ),
    );
    assert_eq!(said, "plain\n1\n1\n");

    // Files follow their objects; what was read at start stays.
    mesh.must(&["apply", "-f", "-"], &SETTINGS.replace("first", "second").replace("hidden", "changed"));
    eventually("the files follow", || match run(&mesh, "given", "cat /settings/a.txt /keys/password") {
        said if said == "secondchanged" => Ok(()),
        other => Err(other),
    });
    assert_eq!(run(&mesh, "given", "echo $PASSWORD"), "hidden\n");
}

#[test]
fn a_pod_waits_for_what_it_names_and_says_so() {
    let mesh = NODE.turn();
    let needs_secret = "
    volumeMounts: [{name: later, mountPath: /later}]
  volumes: [{name: later, secret: {secretName: later}}]";
    let _waits = mesh.with(&pod("waits", "sleep infinity", needs_secret));
    until_row(&mesh, "waits", &["0/1", "ContainerCreating"]);
    eventually("it is said once", || {
        let said = mesh.said();
        let lines: Vec<&str> = said.lines().filter(|line| line.contains("Secret plain/later is not there")).collect();
        match lines.as_slice() {
            [line] if line.contains("Pod plain/waits") && line.contains("spec.volumes[0]") => Ok(()),
            _ => Err(said.clone()),
        }
    });
    let _later =
        mesh.with("apiVersion: v1\nkind: Secret\nmetadata: {name: later, namespace: plain}\nstringData: {k: v}\n");
    until_row(&mesh, "waits", &["1/1", "Running"]);
}

/// Whether the pod is a ready endpoint of its service.
fn is_endpoint(mesh: &Mesh, service: &str) -> bool {
    let slices = mesh.must(
        &["get", "endpointslices", "-n", "plain", "-l", &format!("kubernetes.io/service-name={service}"), "-o", "json"],
        "",
    );
    let slices: Value = serde_json::from_str(&slices).unwrap();
    let mut endpoints =
        slices["items"].as_array().unwrap().iter().flat_map(|slice| slice["endpoints"].as_array().unwrap());
    endpoints.any(|endpoint| endpoint["conditions"]["ready"] == true)
}

#[test]
fn readiness_opens_and_closes_an_endpoint_by_every_kind_of_probe() {
    let mesh = NODE.turn();
    let server = "
apiVersion: v1
kind: Service
metadata: {name: NAME, namespace: plain}
spec: {selector: {app: NAME}, ports: [{port: 80}]}
---
apiVersion: v1
kind: Pod
metadata: {name: NAME, namespace: plain, labels: {app: NAME}}
spec:
  containers:
  - name: main
    image: docker.io/kong/httpbin
    readinessProbe: {PROBE, periodSeconds: 1, failureThreshold: 1}
";
    for (name, probe, is_well) in [
        ("http-well", "httpGet: {path: /status/204, port: 80}", true),
        ("http-ill", "httpGet: {path: /status/500, port: 80}", false),
        ("tcp-well", "tcpSocket: {port: 80}", true),
        ("tcp-ill", "tcpSocket: {port: 81}", false),
        ("exec-well", "exec: {command: ['true']}", true),
        ("exec-ill", "exec: {command: ['false']}", false),
    ] {
        let _server = mesh.with(&server.replace("NAME", name).replace("PROBE", probe));
        if is_well {
            until_row(&mesh, name, &["1/1", "Running"]);
        } else {
            until_row(&mesh, name, &["0/1", "Running"]);
        }
        eventually("the endpoint", || if is_endpoint(&mesh, name) == is_well { Ok(()) } else { Err(row(&mesh, name)) });
    }
    // It changes with the application, not only at start.
    let probe = "exec: {command: [test, '!', -e, /scratch/ill]}";
    let switch = server.replace("NAME", "switch").replace("PROBE", probe)
        + "    volumeMounts: [{name: scratch, mountPath: /scratch}]\n  volumes: [{name: scratch, emptyDir: {}}]\n";
    let _server = mesh.with(&switch);
    eventually("ready", || if is_endpoint(&mesh, "switch") { Ok(()) } else { Err(row(&mesh, "switch")) });
    run(&mesh, "switch", "touch /scratch/ill");
    eventually("not ready", || if is_endpoint(&mesh, "switch") { Err(row(&mesh, "switch")) } else { Ok(()) });
    run(&mesh, "switch", "rm /scratch/ill");
    eventually("ready again", || if is_endpoint(&mesh, "switch") { Ok(()) } else { Err(row(&mesh, "switch")) });
    assert!(row(&mesh, "switch").split_whitespace().nth(3) == Some("0"), "never restarted");
}

#[test]
fn a_container_that_fails_starts_again_and_backs_off() {
    let mesh = NODE.turn();
    let _pods = mesh.with(
        &[
            pod("crash", "echo tried; exit 3", ""),
            pod("dying", "sleep infinity", "    livenessProbe: {exec: {command: ['false']}, periodSeconds: 1, failureThreshold: 1, terminationGracePeriodSeconds: 0}"),
            pod("slow", "sleep infinity", "    startupProbe: {exec: {command: ['true']}, periodSeconds: 1}\n    livenessProbe: {exec: {command: ['true']}, periodSeconds: 1}"),
            pod("once", "exit 0", "  restartPolicy: Never"),
        ]
        .join("---"),
    );
    until_row(&mesh, "crash", &["CrashLoopBackOff", "0/1"]);
    let status = get(&mesh, "crash");
    let status = &status["status"]["containerStatuses"][0];
    assert_eq!(status["lastState"]["terminated"]["exitCode"], 3);
    assert!(status["restartCount"].as_u64().unwrap() >= 1);
    assert!(text(mesh.must(&["logs", "crash", "-n", "plain"], "").as_bytes()).starts_with("tried\n"));
    eventually("its liveness probe ends it", || {
        let status = get(&mesh, "dying");
        let count = status["status"]["containerStatuses"][0]["restartCount"].as_u64().unwrap_or(0);
        if count >= 1 { Ok(()) } else { Err(status.to_string()) }
    });
    until_row(&mesh, "slow", &["1/1", "Running", " 0 "]);
    until_row(&mesh, "once", &["Completed"]);
}

#[test]
fn an_application_hears_of_its_end_and_has_its_grace() {
    let mesh = NODE.turn();
    let out = tempfile::tempdir().unwrap();
    // A pod's programs may be another user's.
    std::fs::set_permissions(out.path(), std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
    let volume = |grace: u32| {
        format!(
            "    volumeMounts: [{{name: out, mountPath: /out}}]\n    lifecycle: {{preStop: {{exec: {{command: [sh, -c, 'echo preStop >> /out/$HOSTNAME']}}}}}}\n  terminationGracePeriodSeconds: {grace}\n  volumes: [{{name: out, hostPath: {{path: {}}}}}]",
            out.path().display()
        )
    };
    let polite = "trap 'echo TERM >> /out/polite; exit 0' TERM; echo up; while :; do sleep 0.1; done";
    let stubborn = "trap 'echo TERM >> /out/stubborn' TERM; echo up; while :; do sleep 0.1; done";
    mesh.must(
        &["apply", "-f", "-"],
        &(pod("polite", polite, &volume(600)) + "---" + &pod("stubborn", stubborn, &volume(2))),
    );
    for name in ["polite", "stubborn"] {
        until_row(&mesh, name, &["1/1", "Running"]);
        eventually("its handler", || match mesh.must(&["logs", name, "-n", "plain"], "").as_str() {
            "up\n" => Ok(()),
            other => Err(other.to_owned()),
        });
    }
    mesh.must(&["delete", "pod", "polite", "stubborn", "-n", "plain"], "");
    for name in ["polite", "stubborn"] {
        eventually("it is gone", || match row(&mesh, name) {
            row if row.is_empty() => Ok(()),
            other => Err(other),
        });
        // Long before the polite one's grace is over.
        assert_eq!(std::fs::read_to_string(out.path().join(name)).unwrap(), "preStop\nTERM\n");
    }
}

#[test]
fn an_application_that_waits_for_its_proxy_reaches_the_mesh_at_once() {
    let mesh = NODE.turn();
    let call = "curl -s --max-time 10 -o /dev/null -w 'first call: %{http_code}\\n' http://httpbin.plain:8000/get; sleep infinity";
    let held = pod("held", call, "").replace(
        "namespace: plain",
        "namespace: shop, annotations: {proxy.istio.io/config: 'holdApplicationUntilProxyStarts: true'}",
    );
    let _held = mesh.with(&held);
    eventually("its first call", || {
        let output = mesh.command(&["logs", "held", "-n", "shop", "-c", "main"], "");
        let said = text(&output.stdout);
        if said == "first call: 200\n" { Ok(()) } else { Err(said + &mesh.must(&["get", "pods", "-n", "shop"], "")) }
    });
    let pod = mesh.must(&["get", "pod", "held", "-n", "shop", "-o", "json"], "");
    let pod: Value = serde_json::from_str(&pod).unwrap();
    assert_eq!(pod["spec"]["containers"][0]["name"], "istio-proxy");
}

#[test]
fn a_post_start_hook_runs_before_the_next_container() {
    let mesh = NODE.turn();
    let more = "    lifecycle: {postStart: {exec: {command: [sh, -c, 'echo ready > /scratch/hook']}}}
    volumeMounts: [{name: scratch, mountPath: /scratch}]
  - name: second
    image: local/shell
    command: [sh, -c, 'cat /scratch/hook; sleep infinity']
    volumeMounts: [{name: scratch, mountPath: /scratch}]
  volumes: [{name: scratch, emptyDir: {}}]";
    let _hooked = mesh.with(&pod("hooked", "sleep infinity", more));
    until_row(&mesh, "hooked", &["2/2", "Running"]);
    eventually("what the second saw", || {
        match mesh.must(&["logs", "hooked", "-n", "plain", "-c", "second"], "").as_str() {
            "ready\n" => Ok(()),
            other => Err(other.to_owned()),
        }
    });
}

#[test]
fn every_namespace_has_its_default_account() {
    let mesh = NODE.turn();
    let _late = mesh.with("apiVersion: v1\nkind: Namespace\nmetadata: {name: late}\n");
    eventually("the account", || match mesh.must(&["get", "sa", "-n", "late", "-o", "name"], "").as_str() {
        "serviceaccount/default\n" => Ok(()),
        other => Err(other.to_owned()),
    });
}

#[test]
fn names_and_service_addresses_without_a_proxy() {
    let mesh = NODE.turn();
    let headless = "
apiVersion: v1
kind: Service
metadata: {name: direct, namespace: plain}
spec: {clusterIP: None, selector: {app: httpbin}, ports: [{port: 80}]}
";
    let _headless = mesh.with(headless);
    let look = |name: &str| {
        let said = text(&mesh.exec("plain/curl", &["getent", "ahostsv4", name]).stdout);
        said.split_whitespace().next().unwrap_or_default().to_owned()
    };
    let cluster_ip = mesh.must(&["get", "svc", "httpbin", "-n", "plain", "-o", "json"], "");
    let cluster_ip: Value = serde_json::from_str(&cluster_ip).unwrap();
    let cluster_ip = cluster_ip["spec"]["clusterIP"].as_str().unwrap().to_owned();
    for name in ["httpbin", "httpbin.plain", "httpbin.plain.svc", "httpbin.plain.svc.cluster.local"] {
        assert_eq!(look(name), cluster_ip, "{name}");
    }
    let pod_ip = mesh.must(&["get", "pods", "-n", "plain", "-l", "app=httpbin", "-o", "json"], "");
    let pod_ip: Value = serde_json::from_str(&pod_ip).unwrap();
    let pod_ip = pod_ip["items"][0]["status"]["podIP"].as_str().unwrap().to_owned();
    eventually("the headless service", || match look("direct") {
        ip if ip == pod_ip => Ok(()),
        other => Err(other),
    });
    assert_eq!(look("nothing.plain.svc.cluster.local"), "");
    assert_eq!(mesh.curl("plain/curl", &[&format!("http://{cluster_ip}:8000/get")]).status, 200);
    assert_eq!(mesh.curl("plain/curl", &["http://direct/get"]).status, 200);
    // A port that the service lacks is refused, not lost.
    let refused = mesh.exec("plain/curl", &["curl", "-s", "--max-time", "10", &format!("http://{cluster_ip}:8001/")]);
    assert_eq!(refused.status.code(), Some(7), "connection refused");
}

#[test]
fn pods_reach_what_listens_on_the_machines_loopback() {
    let mesh = NODE.turn();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let serving = std::thread::spawn(move || {
        for _ in 0..2 {
            let (mut client, _) = listener.accept().unwrap();
            let mut head = [0; 1024];
            let length = client.read(&mut head).unwrap();
            assert!(head[..length].starts_with(b"GET /from-a-pod "));
            client.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 11\r\nconnection: close\r\n\r\nthe machine").unwrap();
        }
    });
    // ALLOW_ANY lets the proxied one through as well.
    for whence in ["plain/curl", "shop/curl"] {
        let answer = mesh.curl(whence, &[&format!("http://host.lateen.internal:{port}/from-a-pod")]);
        assert_eq!((answer.status, answer.body.trim_end()), (200, "the machine"), "{whence}");
    }
    serving.join().unwrap();
    // Their own loopback is their own.
    let own = mesh.exec("plain/curl", &["curl", "-s", "--max-time", "10", &format!("http://127.0.0.1:{port}/")]);
    assert_eq!(own.status.code(), Some(7));
}
