//! Bytes, HTTP/2 and gRPC.

use testkit::Mesh;

use crate::apps::TRAFFIC;

/// Says `hi` to the echo of the address and reads a line.
fn echo(mesh: &Mesh, whence: &str, host: &str, port: u16) -> String {
    let script = format!("exec 3<>/dev/tcp/{host}/{port}; echo hi >&3; read -r -t 10 line <&3; echo \"$line\"");
    String::from_utf8_lossy(&mesh.exec(whence, &["bash", "-c", &script]).stdout).trim().to_owned()
}

#[test]
fn bytes_are_routed_by_weight() {
    let mesh = TRAFFIC.turn();
    let route = |v1: u32, v2: u32| {
        format!(
            "
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {{name: echo, namespace: shop}}
spec: {{host: echo, subsets: [{{name: v1, labels: {{version: v1}}}}, {{name: v2, labels: {{version: v2}}}}]}}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {{name: echo, namespace: shop}}
spec:
  hosts: [echo]
  tcp:
  - match: [{{port: 9000}}]
    route: [{{destination: {{host: echo, subset: v1}}, weight: {v1}}}, {{destination: {{host: echo, subset: v2}}, weight: {v2}}}]
"
        )
    };
    let _objects = mesh.with(&route(100, 0));
    for _ in 0..4 {
        assert_eq!(echo(&mesh, "shop/curl", "echo", 9000), "one hi");
    }
    mesh.apply(&route(0, 100));
    for _ in 0..4 {
        assert_eq!(echo(&mesh, "shop/curl", "echo", 9000), "two hi");
    }
    mesh.apply(&route(50, 50));
    let mut seen = std::collections::BTreeSet::new();
    for _ in 0..30 {
        seen.insert(echo(&mesh, "shop/curl", "echo", 9000));
    }
    assert_eq!(seen.into_iter().collect::<Vec<_>>(), ["one hi", "two hi"]);
}

/// One gRPC message with these bytes in it.
const GRPC: &str = r"printf '\0\0\0\0\5hello'";

fn grpc(mesh: &Mesh, method: &str) -> (String, String) {
    let script = format!(
        "{GRPC} | curl -sv --http2-prior-knowledge --max-time 10 -H 'content-type: application/grpc' -H 'te: trailers' --data-binary @- http://grpc:7070/echo.Echo/{method} 2>&1 | tr -d '\\0'"
    );
    let output = mesh.exec("shop/curl", &["bash", "-c", &script]);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let status = text.lines().find_map(|line| line.strip_prefix("< grpc-status: ")).unwrap_or("none").trim().to_owned();
    (status, text)
}

#[test]
fn grpc_passes_two_sidecars_with_its_trailers() {
    let mesh = TRAFFIC.turn();
    let (status, text) = grpc(&mesh, "Unary");
    assert!(status == "0" && text.contains("hello"), "{text}");
    let (status, text) = grpc(&mesh, "Fail");
    assert!(status == "7" && text.contains("told to fail"), "{text}");
}

#[test]
fn grpc_passes_the_gateway() {
    let mesh = TRAFFIC.turn();
    let _route = mesh
        .with(&crate::apps::virtual_service("grpc", "  - route: [{destination: {host: grpc, port: {number: 7070}}}]"));
    let script = format!(
        "{GRPC} | curl -sv --http2-prior-knowledge --max-time 10 -H 'content-type: application/grpc' -H 'te: trailers' -H 'host: grpc.shop.test' --data-binary @- http://{}/echo.Echo/Unary 2>&1 | tr -d '\\0'",
        mesh.http
    );
    let output = std::process::Command::new("bash").args(["-c", &script]).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains("< grpc-status: 0") && text.contains("hello"), "{text}");
    let absent = script.replace("grpc.shop.test", "nobody.example");
    let output = std::process::Command::new("bash").args(["-c", &absent]).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains("< grpc-status: 12"), "no route is UNIMPLEMENTED: {text}");
}
