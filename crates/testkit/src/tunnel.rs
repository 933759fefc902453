//! Connections that begin inside a pod.

use std::io::{self, Read, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

/// Connects and copies both ways; when either side ends, so does everything in the process group, which is that
/// of `timeout`. `$1` is the host, `$2` the port.
const RELAY: &str = r#"exec 3<>"/dev/tcp/$1/$2" || exit 1
{ cat <&3; kill 0; } &
cat >&3; kill 0"#;

/// Seconds after which a connection is cut, so that a test that waits for ever fails instead.
const LIFE_MAX: &str = "300";

/// A TCP connection that a program in a pod opened, its bytes carried over that program's standard
/// streams. Dropping it closes the connection.
#[derive(Debug)]
pub struct Tunnel {
    child: Child,
    input: Option<ChildStdin>,
    output: Option<ChildStdout>,
}

impl Tunnel {
    /// `command` runs the arguments that are added to it inside the pod.
    pub(crate) fn open(mut command: Command, host: &str, port: u16) -> Self {
        command.args(["timeout", LIFE_MAX, "bash", "-c", RELAY, "relay", host, &port.to_string()]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.spawn().expect("lateen starts");
        let (input, output) = (child.stdin.take(), child.stdout.take());
        Self { child, input, output }
    }

    /// Both directions by themselves: what is read from the connection, what is written to it.
    pub(crate) fn split(&mut self) -> Option<(ChildStdout, ChildStdin)> {
        Some((self.output.take()?, self.input.take()?))
    }
}

impl Read for Tunnel {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.output.as_mut().map_or(Ok(0), |output| output.read(buf))
    }
}

impl Write for Tunnel {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.input.as_mut().map_or(Err(io::ErrorKind::BrokenPipe.into()), |input| input.write(buf))
    }

    fn flush(&mut self) -> io::Result<()> {
        self.input.as_mut().map_or(Ok(()), Write::flush)
    }
}

impl Drop for Tunnel {
    fn drop(&mut self) {
        drop((self.input.take(), self.output.take()));
        // The relay ends by itself once its input has; what outlives that is cut by `timeout`.
        _ = self.child.wait();
    }
}
