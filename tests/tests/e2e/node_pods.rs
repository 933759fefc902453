//! What a pod is given and what becomes of it, as on a node of Kubernetes.

use std::io::{Read as _, Write as _};
use std::net::TcpListener;

use serde_json::Value;
use testkit::{Mesh, Setup, TlsServer, eventually};

use crate::apps::{NODE, namespace};

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

/// Answers requests over TLS with a certificate that nobody knows: `/well` with 204, others with 500.
fn serve_over_tls(listener: TcpListener) {
    let server = TlsServer::new("of-nobody.test", &[]);
    for client in listener.incoming() {
        // Who goes away in between asks again.
        let Ok(mut stream) = client.and_then(|client| server.accept(client)) else { continue };
        let mut head = [0; 1024];
        let Ok(length) = stream.read(&mut head) else { continue };
        let answer = if head[..length].starts_with(b"GET /well ") { "204 No Content" } else { "500 Ill" };
        _ = stream.write_all(format!("HTTP/1.1 {answer}\r\nconnection: close\r\n\r\n").as_bytes());
    }
}

#[test]
fn probes_ask_over_tls_and_ask_grpc_servers_for_their_health() {
    let mesh = NODE.turn();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || serve_over_tls(listener));
    let https = |path: &str| {
        format!(
            "httpGet: {{scheme: HTTPS, host: host.lateen.internal, port: {port}, path: {path}}}, timeoutSeconds: 30"
        )
    };
    let server = |name: &str, probes: &str| {
        format!(
            "
apiVersion: v1
kind: Pod
metadata: {{name: {name}, namespace: plain}}
spec:
  containers:
  - name: main
    image: lateen/grpc-echo
    startupProbe: {{tcpSocket: {{port: 7070}}, periodSeconds: 1, failureThreshold: 600}}
    {probes}
"
        )
    };
    let ready = |probe: &str| format!("readinessProbe: {{{probe}, periodSeconds: 1}}");
    // It ends what the probe finds ill, and nothing else.
    let alive = |probe: &str| {
        format!("livenessProbe: {{{probe}, periodSeconds: 1, failureThreshold: 1, terminationGracePeriodSeconds: 0}}")
    };
    let grpc = |service: &str| format!("grpc: {{port: 7070{service}}}, timeoutSeconds: 30");
    let pods = [
        server("https-well", &ready(&https("/well"))),
        server("grpc-well", &ready(&grpc(""))),
        server("https-ill", &alive(&https("/ill"))),
        server("grpc-ill", &alive(&grpc(", service: of-nobody"))),
    ];
    let _pods = mesh.with(&pods.join("---"));
    for name in ["https-well", "grpc-well"] {
        until_row(&mesh, name, &["1/1", "Running"]);
    }
    for name in ["https-ill", "grpc-ill"] {
        eventually("its probe ends it", || {
            let pod = get(&mesh, name);
            let restarts = pod["status"]["containerStatuses"][0]["restartCount"].as_u64().unwrap_or(0);
            if restarts >= 1 { Ok(()) } else { Err(pod["status"].to_string()) }
        });
    }
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
fn a_container_that_its_probe_ends_hears_of_it_as_at_the_end_of_its_pod() {
    let mesh = NODE.turn();
    let out = tempfile::tempdir().unwrap();
    std::fs::set_permissions(out.path(), std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
    // Well until it is told otherwise; well again once it has started anew.
    let script = "trap 'echo TERM >> /out/heard; rm -f /out/unwell; exit 4' TERM; echo start >> /out/heard; while :; do sleep 0.1; done";
    let more = format!(
        "    volumeMounts: [{{name: out, mountPath: /out}}]
    livenessProbe: {{exec: {{command: [sh, -c, '! test -e /out/unwell']}}, periodSeconds: 1, failureThreshold: 1, timeoutSeconds: 60}}
    lifecycle: {{preStop: {{exec: {{command: [sh, -c, 'echo preStop >> /out/heard']}}}}}}
  terminationGracePeriodSeconds: 9223372036854775807
  volumes: [{{name: out, hostPath: {{path: {}}}}}]",
        out.path().display()
    );
    let _unwell = mesh.with(&pod("unwell", script, &more));
    until_row(&mesh, "unwell", &["1/1", "Running"]);
    let heard = || std::fs::read_to_string(out.path().join("heard")).unwrap_or_default();
    eventually("its handler", || if heard() == "start\n" { Ok(()) } else { Err(heard()) });
    std::fs::write(out.path().join("unwell"), "").unwrap();
    eventually("it starts again", || match heard() {
        all if all.ends_with("start\n") && all.len() > "start\n".len() => Ok(()),
        other => Err(other),
    });
    assert_eq!(heard(), "start\npreStop\nTERM\nstart\n");
    eventually("its status tells it", || {
        let status = get(&mesh, "unwell")["status"]["containerStatuses"][0].clone();
        if status["lastState"]["terminated"]["exitCode"] == 4 { Ok(()) } else { Err(status.to_string()) }
    });
    std::fs::remove_file(out.path().join("heard")).unwrap();
    mesh.must(&["delete", "pod", "unwell", "-n", "plain"], "");
    eventually("it is gone, though its grace period is not over", || match row(&mesh, "unwell") {
        row if row.is_empty() => Ok(()),
        other => Err(other),
    });
    assert_eq!(heard(), "preStop\nTERM\n");
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
fn a_hook_before_the_end_may_ask_over_the_network() {
    let mesh = NODE.turn();
    let listeners = ["http", "tcp"].map(|_| TcpListener::bind("127.0.0.1:0").unwrap());
    let [http, tcp] = listeners.each_ref().map(|listener| listener.local_addr().unwrap().port());
    let hook = |what: &str| format!("    lifecycle: {{preStop: {{{what}}}}}\n  terminationGracePeriodSeconds: 600");
    let host = "host: host.lateen.internal";
    let until_told = "trap 'exit 0' TERM; while :; do sleep 0.1; done";
    mesh.must(
        &["apply", "-f", "-"],
        &[
            pod("asks", until_told, &hook(&format!("httpGet: {{{host}, port: {http}, path: /before-the-end}}"))),
            pod("knocks", until_told, &hook(&format!("tcpSocket: {{{host}, port: {tcp}}}"))),
        ]
        .join("---"),
    );
    for name in ["asks", "knocks"] {
        until_row(&mesh, name, &["1/1", "Running"]);
    }
    let (told, heard) = std::sync::mpsc::channel();
    for listener in listeners {
        let told = told.clone();
        std::thread::spawn(move || {
            let (mut client, _) = listener.accept().unwrap();
            let mut head = Vec::new();
            // Who only knocks says nothing.
            while !head.ends_with(b"\r\n\r\n") {
                let mut byte = [0];
                match client.read(&mut byte) {
                    Ok(1) => head.push(byte[0]),
                    _ => break,
                }
            }
            _ = client.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n");
            _ = told.send(String::from_utf8_lossy(&head).lines().next().unwrap_or_default().to_owned());
        });
    }
    mesh.must(&["delete", "pod", "asks", "knocks", "-n", "plain"], "");
    let mut seen = [0, 1].map(|_| heard.recv_timeout(std::time::Duration::from_mins(1)).expect("a hook that asks"));
    seen.sort_unstable();
    assert_eq!(seen, ["", "GET /before-the-end HTTP/1.1"]);
    for name in ["asks", "knocks"] {
        eventually("it is gone", || match row(&mesh, name) {
            row if row.is_empty() => Ok(()),
            other => Err(other),
        });
    }
}

#[test]
fn init_containers_run_in_their_order_and_hold_the_rest_until_they_succeed() {
    let mesh = NODE.turn();
    let out = tempfile::tempdir().unwrap();
    std::fs::set_permissions(out.path(), std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
    let container = |name: &str, script: &str| {
        format!(
            "{{name: {name}, image: local/shell, command: [sh, -c, {script:?}], volumeMounts: [{{name: out, mountPath: /out}}]}}"
        )
    };
    let steps = format!(
        "
apiVersion: v1
kind: Pod
metadata: {{name: steps, namespace: plain}}
spec:
  initContainers: [{}, {}]
  containers: [{}]
  volumes: [{{name: out, hostPath: {{path: {}}}}}]
",
        container("first", "echo first >> /out/order"),
        container("second", "echo second >> /out/order; test -e /out/go"),
        container("main", "echo main >> /out/order; exec sleep infinity"),
        out.path().display(),
    );
    let _steps = mesh.with(&steps);
    eventually("the second one fails", || {
        let pod = get(&mesh, "steps");
        let tries = pod["status"]["initContainerStatuses"][1]["restartCount"].as_u64().unwrap_or(0);
        if tries >= 2 { Ok(()) } else { Err(pod["status"].to_string()) }
    });
    until_row(&mesh, "steps", &["0/1", "Init:CrashLoopBackOff"]);
    let order = || std::fs::read_to_string(out.path().join("order")).unwrap();
    assert!(!order().contains("main"), "{}", order());
    std::fs::write(out.path().join("go"), "").unwrap();
    until_row(&mesh, "steps", &["1/1", "Running"]);
    let order = order();
    let mut seen: Vec<&str> = order.lines().collect();
    seen.dedup();
    assert_eq!(seen, ["first", "second", "main"], "each once, but for the one that failed");
}

#[test]
fn an_init_container_that_fails_for_good_fails_its_pod() {
    let mesh = NODE.turn();
    let failed = "
apiVersion: v1
kind: Pod
metadata: {name: early, namespace: plain}
spec:
  restartPolicy: Never
  initContainers: [{name: first, image: local/shell, command: [sh, -c, exit 3]}]
  containers: [{name: main, image: local/shell, command: [sleep, infinity]}]
";
    let _early = mesh.with(failed);
    until_row(&mesh, "early", &["0/1", "Init:Error", " 0 "]);
    let status = &get(&mesh, "early")["status"];
    assert_eq!(status["phase"], "Failed");
    assert_eq!(status["initContainerStatuses"][0]["state"]["terminated"]["exitCode"], 3);
    assert_eq!(status["containerStatuses"][0]["state"]["waiting"]["reason"], "PodInitializing");
}

/// *Source*: Kubernetes' sidecar containers: they start in the order of the list, what comes after them may use
/// them, they count as ready or not, start again whatever the pod's policy, and end after the others.
#[test]
fn an_init_container_that_restarts_always_serves_those_after_it_and_ends_after_them() {
    let mesh = NODE.turn();
    let out = tempfile::tempdir().unwrap();
    std::fs::set_permissions(out.path(), std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
    let container = |name: &str, script: &str, more: &str| {
        format!(
            "{{name: {name}, image: local/shell, command: [sh, -c, {script:?}], volumeMounts: [{{name: out, mountPath: /out}}]{more}}}"
        )
    };
    let aside = "trap 'echo aside ends >> /out/order; exit 0' TERM; echo aside >> /out/order; touch /out/serves; while :; do sleep 0.1; done";
    let beside = |name: &str, policy: &str, main: &str| {
        format!(
            "
apiVersion: v1
kind: Pod
metadata: {{name: {name}, namespace: plain}}
spec:
  restartPolicy: {policy}
  terminationGracePeriodSeconds: 600
  initContainers: [{}, {}]
  containers: [{}]
  volumes: [{{name: out, hostPath: {{path: {}}}}}]
",
            container(
                "aside",
                aside,
                ", restartPolicy: Always, startupProbe: {exec: {command: [test, -e, /out/serves]}, periodSeconds: 1, timeoutSeconds: 60, failureThreshold: 1000}"
            ),
            container("uses", "test -e /out/serves && echo uses >> /out/order", ""),
            container("main", main, ""),
            out.path().display(),
        )
    };
    let order = || std::fs::read_to_string(out.path().join("order")).unwrap_or_default();
    let lasts =
        "trap 'echo main ends >> /out/order; exit 0' TERM; echo main >> /out/order; while :; do sleep 0.1; done";
    mesh.must(&["apply", "-f", "-"], &beside("lasting", "Always", lasts));
    until_row(&mesh, "lasting", &["2/2", "Running"]);
    eventually("all of them", || if order() == "aside\nuses\nmain\n" { Ok(()) } else { Err(order()) });
    assert_eq!(get(&mesh, "lasting")["status"]["initContainerStatuses"].as_array().unwrap().len(), 2);
    mesh.must(&["delete", "pod", "lasting", "-n", "plain"], "");
    eventually("it is gone", || match row(&mesh, "lasting") {
        row if row.is_empty() => Ok(()),
        other => Err(other),
    });
    assert_eq!(order(), "aside\nuses\nmain\nmain ends\naside ends\n");
    // A pod that comes to its own end takes its sidecar along.
    for file in ["order", "serves"] {
        std::fs::remove_file(out.path().join(file)).unwrap();
    }
    let _ending = mesh.with(&beside("ending", "Never", "echo main >> /out/order"));
    until_row(&mesh, "ending", &["Completed"]);
    eventually("its sidecar ends", || match order() {
        all if all == "aside\nuses\nmain\naside ends\n" => Ok(()),
        other => Err(other),
    });
    assert_eq!(get(&mesh, "ending")["status"]["phase"], "Succeeded");
}

#[test]
fn a_container_has_its_folder_its_hosts_and_all_of_a_secret() {
    let mesh = NODE.turn();
    let more = "
    workingDir: /proc
    envFrom:
    - {secretRef: {name: keys}}
    - {prefix: MY_, secretRef: {name: keys}}
    - {secretRef: {name: of-nobody, optional: true}}
  hostAliases: [{ip: 192.0.2.7, hostnames: [alias.test, other.test]}]";
    let _settled = mesh.with(&(SETTINGS.to_owned() + &pod("settled", "pwd; exec sleep infinity", more)));
    until_row(&mesh, "settled", &["1/1", "Running"]);
    eventually("its folder", || match mesh.must(&["logs", "settled", "-n", "plain"], "").as_str() {
        "/proc\n" => Ok(()),
        other => Err(other.to_owned()),
    });
    assert_eq!(run(&mesh, "settled", "echo $password $MY_password"), "hidden hidden\n");
    for name in ["alias.test", "other.test"] {
        let said = run(&mesh, "settled", &format!("getent hosts {name}"));
        assert!(said.starts_with("192.0.2.7 "), "{name}: {said}");
    }
}

#[test]
fn each_container_of_a_pod_is_played_by_its_own_program() {
    let mesh = NODE.turn();
    let played = "
apiVersion: v1
kind: Pod
metadata:
  name: played
  namespace: plain
  annotations:
    lateen.dev/command: 'sh -c \"echo of the pod; exec sleep infinity\"'
    lateen.dev/command.one: 'sh -c \"echo one for $(WHO); exec sleep infinity\"'
    lateen.dev/command.two: 'sh -c \"echo two; exec sleep infinity\"'
spec:
  containers:
  - {name: one, image: local/none, env: [{name: WHO, value: all}]}
  - {name: two, image: local/none, command: [no-such-program]}
";
    let _played = mesh.with(played);
    until_row(&mesh, "played", &["2/2", "Running"]);
    for (container, expect) in [("one", "one for all\n"), ("two", "two\n")] {
        eventually("what it says", || match mesh.must(&["logs", "played", "-n", "plain", "-c", container], "") {
            said if said == expect => Ok(()),
            other => Err(other),
        });
    }
}

#[test]
fn annotation_image_stand_in_and_command_play_a_container_in_this_order() {
    let pod = |name: &str, annotation: &str, image: &str, command: &str| {
        let annotations = if annotation.is_empty() {
            String::new()
        } else {
            format!(", annotations: {{lateen.dev/command: {annotation:?}}}")
        };
        format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: plain{annotations}}}\nspec: {{containers: [{{name: main, image: {image}, command: [sh, -c, {command:?}]}}]}}\n"
        )
    };
    let say = |what: &str| format!("echo by {what}; exec sleep infinity");
    let mapped = "docker.io/kong/httpbin";
    let manifests = [
        namespace("plain", false),
        pod("annotated", "sh -c 'echo by annotation; exec sleep infinity'", mapped, &say("command")),
        pod("mapped", "", mapped, &say("command")),
        pod("known", "", "docker.io/istio/examples-helloworld-v1", &say("command")),
        pod("own", "", "local/none", &say("command")),
    ];
    let by_image = format!("{mapped}=sh -c 'echo by image; exec sleep infinity'");
    let mesh = Setup::up("played", &manifests.join("---\n")).args(&["--image", &by_image]).start();
    for (name, expect) in [("annotated", "by annotation\n"), ("mapped", "by image\n"), ("own", "by command\n")] {
        eventually("what it says", || match mesh.must(&["logs", name, "-n", "plain"], "") {
            said if said == expect => Ok(()),
            other => Err(format!("{name}: {other}")),
        });
    }
    eventually("the stand-in", || match run(&mesh, "known", "curl -s http://127.0.0.1:5000/hello") {
        said if said.contains("Hello version: v1") => Ok(()),
        other => Err(other),
    });
}

#[test]
fn endpoints_that_the_user_lists_are_called() {
    let mesh = NODE.turn();
    let ip = mesh.must(&["get", "pods", "-n", "plain", "-l", "app=httpbin", "-o", "json"], "");
    let ip: Value = serde_json::from_str(&ip).unwrap();
    let ip = ip["items"][0]["status"]["podIP"].as_str().unwrap().to_owned();
    let slice = |endpoints: &str| {
        format!(
            "
apiVersion: v1
kind: Service
metadata: {{name: listed, namespace: plain}}
spec: {{ports: [{{name: http, port: 8080}}]}}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{name: listed-1, namespace: plain, labels: {{kubernetes.io/service-name: listed}}}}
addressType: IPv4
ports: [{{name: http, port: 80}}]
endpoints: [{endpoints}]
"
        )
    };
    let _listed = mesh.with(&slice(&format!("{{addresses: [{ip}]}}")));
    let call = |whence: &str| {
        let url = "http://listed.plain:8080/status/201";
        let said = mesh.exec(whence, &["curl", "-s", "--max-time", "10", "-o", "/dev/null", "-w", "%{http_code}", url]);
        text(&said.stdout)
    };
    for whence in ["plain/curl", "shop/curl"] {
        eventually(whence, || match call(whence).as_str() {
            "201" => Ok(()),
            other => Err(other.to_owned()),
        });
    }
    mesh.must(&["apply", "-f", "-"], &slice(&format!("{{addresses: [{ip}], conditions: {{ready: false}}}}")));
    for (whence, without) in [("plain/curl", "000"), ("shop/curl", "503")] {
        eventually("nobody is there", || match call(whence) {
            code if code == without => Ok(()),
            other => Err(format!("{whence}: {other}")),
        });
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

#[test]
fn a_rollout_waits_until_new_pods_have_been_ready_for_long_enough() {
    let mesh = NODE.turn();
    let young = |seconds: u32, step: &str| {
        format!(
            "
apiVersion: apps/v1
kind: Deployment
metadata: {{name: young, namespace: plain}}
spec:
  minReadySeconds: {seconds}
  selector: {{matchLabels: {{app: young}}}}
  template:
    metadata: {{labels: {{app: young}}}}
    spec:
      containers: [{{name: main, image: curlimages/curl, env: [{{name: STEP, value: {step}}}]}}]
"
        )
    };
    let _young = mesh.with(&young(3600, "one"));
    let becomes = |ready: u64, available: u64| {
        eventually("the deployment's pods", || {
            let text = mesh.must(&["get", "deploy", "young", "-n", "plain", "-o", "json"], "");
            let status = serde_json::from_str::<Value>(&text).unwrap()["status"].clone();
            let now = ["readyReplicas", "availableReplicas"].map(|name| status[name].as_u64().unwrap_or(0));
            if now == [ready, available] && status["updatedReplicas"] == 1 { Ok(()) } else { Err(status.to_string()) }
        });
    };
    becomes(1, 0);
    mesh.must(&["apply", "-f", "-"], &young(3600, "two"));
    // The new one is ready, and the old one stays beside it.
    becomes(2, 0);
    mesh.must(&["apply", "-f", "-"], &young(0, "two"));
    mesh.must(&["rollout", "status", "deploy/young", "-n", "plain", "--timeout", "120"], "");
    becomes(1, 1);
}

/// *Source*: Kubernetes: cluster DNS answers for an `ExternalName` service with an alias.
#[test]
fn a_service_that_stands_for_another_name_is_found_by_dns() {
    let mesh = NODE.turn();
    let alias = |name: &str, target: &str| {
        format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: plain}}\nspec: {{type: ExternalName, externalName: {target}}}\n---\n"
        )
    };
    let _aliases = mesh.with(
        &[
            alias("near", "httpbin.plain.svc.cluster.local"),
            alias("nearer", "near.plain.svc.cluster.local"),
            alias("nobody", "no-such.plain.svc.cluster.local"),
        ]
        .concat(),
    );
    for name in ["near", "nearer"] {
        eventually("its name", || match mesh.curl("plain/curl", &[&format!("http://{name}:8000/get")]).status {
            200 => Ok(()),
            other => Err(other.to_string()),
        });
    }
    let said = mesh.exec("plain/curl", &["getent", "hosts", "nobody"]);
    assert!(!said.status.success(), "{}", text(&said.stdout));
}
