//! Which of our programs plays which image.

/// The arguments of `lateen` that play `image`, given the container's own `command` and `args`.
///
/// `None` when no stand-in is known. The registry, the organisation and the tag do not matter,
/// except that a bookinfo image says its version in its name and helloworld in its tag.
pub fn stand_in(image: &str, command: &[String], args: &[String]) -> Option<Vec<String>> {
    let image = image.split('@').next().unwrap_or_default();
    let last = image.rsplit('/').next().unwrap_or_default();
    let (name, tag) = last.split_once(':').unwrap_or((last, ""));
    let sample = |words: &[&str]| {
        Some(std::iter::once("sample").chain(words.iter().copied()).map(str::to_owned).collect::<Vec<_>>())
    };
    if let Some(service) = name.strip_prefix("examples-bookinfo-") {
        let (service, version) = match service.split_once("-v") {
            Some((service, version)) => (service, format!("v{version}")),
            None => (service, "v1".to_owned()),
        };
        return match service {
            "productpage" | "details" | "reviews" | "ratings" => sample(&[service, "--version", &version]),
            _ => None,
        };
    }
    match name {
        "examples-helloworld-v1" => sample(&["helloworld", "--version", "v1"]),
        "examples-helloworld-v2" => sample(&["helloworld", "--version", "v2"]),
        "helloworld" => sample(&["helloworld", "--version", if tag.is_empty() { "v1" } else { tag }]),
        "maildev" => sample(&["maildev"]),
        "go-httpbin" => sample(&["httpbin", "--port", "8080"]),
        "httpbin" => sample(&["httpbin", "--port", &httpbin_port(command, args)]),
        "curl" | "sleep" | "pause" | "busybox" | "alpine" => sample(&["sleep"]),
        "tcp-echo-server" | "tcp-echo" => {
            let mut words = vec!["tcp-echo"];
            words.extend(args.iter().map(String::as_str));
            sample(&words)
        }
        "grpc-echo" => sample(&["grpc-echo"]),
        "any-echo" => sample(&["any-echo"]),
        _ => None,
    }
}

/// `gunicorn -b 0.0.0.0:8080 …` says its port; else 80.
fn httpbin_port(command: &[String], args: &[String]) -> String {
    let words: Vec<&String> = command.iter().chain(args).collect();
    words
        .iter()
        .position(|word| *word == "-b")
        .and_then(|at| words.get(at + 1))
        .and_then(|bind| bind.rsplit_once(':'))
        .map_or_else(|| "80".to_owned(), |(_, port)| port.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(image: &str, args: &[&str], expect: Option<&str>) {
        let args: Vec<String> = args.iter().map(|arg| (*arg).to_owned()).collect();
        assert_eq!(stand_in(image, &[], &args).map(|words| words.join(" ")).as_deref(), expect, "{image}");
    }

    #[test]
    fn well_known_images() {
        check("docker.io/istio/examples-bookinfo-reviews-v2:1.20.3", &[], Some("sample reviews --version v2"));
        check("istio/examples-bookinfo-productpage-v1@sha256:00", &[], Some("sample productpage --version v1"));
        check("docker.io/istio/examples-helloworld-v2:1.0", &[], Some("sample helloworld --version v2"));
        check("maildev/maildev", &[], Some("sample maildev"));
        check("docker.io/mccutchen/go-httpbin:v2.15.0", &[], Some("sample httpbin --port 8080"));
        check("docker.io/kennethreitz/httpbin", &["-b", "0.0.0.0:8080"], Some("sample httpbin --port 8080"));
        check("docker.io/kong/httpbin", &[], Some("sample httpbin --port 80"));
        check("curlimages/curl", &[], Some("sample sleep"));
        check("docker.io/istio/tcp-echo-server:1.3", &["9000,9001", "one"], Some("sample tcp-echo 9000,9001 one"));
        check("nginx:latest", &[], None);
        check("examples-bookinfo-mongodb:1", &[], None);
    }
}
