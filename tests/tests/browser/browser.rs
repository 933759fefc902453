//! A browser, driven over WebDriver.
//!
//! *Source*: W3C WebDriver (sections 8 to 13), ChromeDriver for what the console says.

use std::io::{BufRead as _, BufReader};
use std::net::SocketAddr;
use std::process::{Child, ChildStdout, Command, Stdio};

use serde_json::{Value, json};
use testkit::Client;

/// What an element is called in answers.
const ELEMENT: &str = "element-6066-11e4-a52e-4f735466cecf";

/// One window; its profile is gone with it.
pub(crate) struct Browser {
    driver: Child,
    /// Kept open: the driver goes on writing.
    _said: BufReader<ChildStdout>,
    address: SocketAddr,
    session: String,
    profile: tempfile::TempDir,
}

impl Browser {
    /// Chromium by the driver that `LATEEN_CHROMEDRIVER` names.
    pub(crate) fn open() -> Self {
        let program = std::env::var_os("LATEEN_CHROMEDRIVER").expect("LATEEN_CHROMEDRIVER names the program");
        let mut driver = Command::new(program).arg("--port=0").stdout(Stdio::piped()).spawn().unwrap();
        let mut said = BufReader::new(driver.stdout.take().unwrap());
        let mut line = String::new();
        let port = loop {
            line.clear();
            assert!(said.read_line(&mut line).unwrap() > 0, "the driver ends before it says its port");
            if let Some((_, port)) = line.trim_end().trim_end_matches('.').rsplit_once("successfully on port ")
                && let Ok(port) = port.parse::<u16>()
            {
                break port;
            }
        };
        let profile = tempfile::tempdir().unwrap();
        let mut browser =
            Self { driver, _said: said, address: ([127, 0, 0, 1], port).into(), session: String::new(), profile };
        let args = [
            "--headless".to_owned(),
            "--no-sandbox".to_owned(),
            "--disable-gpu".to_owned(),
            "--disable-dev-shm-usage".to_owned(),
            "--disable-quic".to_owned(),
            "--no-first-run".to_owned(),
            "--disable-background-networking".to_owned(),
            "--disable-component-update".to_owned(),
            "--disable-sync".to_owned(),
            // Nobody but this machine is asked, whatever the page names.
            "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE *.localhost".to_owned(),
            "--window-size=1200,900".to_owned(),
            format!("--user-data-dir={}", browser.profile.path().display()),
        ];
        let wanted = json!({ "capabilities": { "alwaysMatch": {
            "browserName": "chrome",
            "goog:chromeOptions": { "args": args },
            "goog:loggingPrefs": { "browser": "ALL" },
        }}});
        let session = browser.call("POST", "/session", &wanted);
        browser.session = format!("/session/{}", session["sessionId"].as_str().unwrap());
        browser
    }

    fn call(&self, method: &str, path: &str, body: &Value) -> Value {
        let body = if method == "POST" { body.to_string() } else { String::new() };
        let head = format!(
            "{method} {path} HTTP/1.1\r\nhost: {}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
            self.address,
            body.len()
        );
        let answer = Client::plain(self.address).unwrap().raw(format!("{head}{body}").as_bytes(), false).unwrap();
        assert_eq!(answer.status, 200, "{method} {path}: {}", answer.body);
        answer.json()["value"].clone()
    }

    fn post(&self, path: &str, body: &Value) -> Value {
        self.call("POST", &format!("{}{path}", self.session), body)
    }

    /// Opens a page and waits until it is loaded.
    pub(crate) fn go(&self, url: &str) {
        self.post("/url", &json!({ "url": url }));
    }

    /// What a function's body returns in the page.
    pub(crate) fn script(&self, body: &str) -> Value {
        self.post("/execute/sync", &json!({ "script": body, "args": [] }))
    }

    fn one(&self, selector: &str) -> String {
        let found = self.post("/element", &json!({ "using": "css selector", "value": selector }));
        format!("/element/{}", found[ELEMENT].as_str().unwrap())
    }

    fn each(&self, selector: &str) -> Vec<String> {
        let found = self.post("/elements", &json!({ "using": "css selector", "value": selector }));
        let element = |one: &Value| format!("/element/{}", one[ELEMENT].as_str().unwrap());
        found.as_array().unwrap().iter().map(element).collect()
    }

    fn of(&self, element: &str, what: &str) -> Value {
        self.call("GET", &format!("{}{element}/{what}", self.session), &Value::Null)
    }

    /// The text of every such element that a person sees.
    pub(crate) fn seen(&self, selector: &str) -> Vec<String> {
        let shown = self.each(selector).into_iter().filter(|element| self.of(element, "displayed") == true);
        shown.map(|element| self.of(&element, "text").as_str().unwrap().to_owned()).collect()
    }

    /// The computed value of a property.
    pub(crate) fn css(&self, selector: &str, property: &str) -> String {
        self.of(&self.one(selector), &format!("css/{property}")).as_str().unwrap().to_owned()
    }

    /// As a person clicks: refused where something covers it.
    pub(crate) fn click(&self, selector: &str) {
        self.post(&format!("{}/click", self.one(selector)), &json!({}));
    }

    pub(crate) fn write(&self, selector: &str, text: &str) {
        self.post(&format!("{}/value", self.one(selector)), &json!({ "text": text }));
    }

    /// Inner width and height of what is looked through, as on a telephone.
    pub(crate) fn resize(&self, width: u32, height: u32) {
        let size = json!({ "width": width, "height": height, "deviceScaleFactor": 1, "mobile": false });
        self.chrome("Emulation.setDeviceMetricsOverride", &size);
    }

    /// What a person prefers: `dark` or `light`.
    pub(crate) fn prefer(&self, scheme: &str) {
        let features = json!({ "features": [{ "name": "prefers-color-scheme", "value": scheme }] });
        self.chrome("Emulation.setEmulatedMedia", &features);
    }

    fn chrome(&self, command: &str, params: &Value) {
        self.post("/goog/cdp/execute", &json!({ "cmd": command, "params": params }));
    }

    /// What the console was told since the last look: errors of scripts, files that are missing.
    pub(crate) fn complaints(&self) -> Vec<String> {
        let told = self.post("/se/log", &json!({ "type": "browser" }));
        told.as_array().unwrap().iter().map(|entry| entry["message"].as_str().unwrap().to_owned()).collect()
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // Chromium goes by the driver's word only.
        if !self.session.is_empty()
            && let Ok(mut client) = Client::plain(self.address)
        {
            drop(client.send("DELETE", &self.address.to_string(), &self.session, &[]));
        }
        drop(self.driver.kill());
        drop(self.driver.wait());
    }
}
