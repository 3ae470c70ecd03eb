//! QEMU's machine protocol (QMP): a command and its answer, on a connection of its own.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

/// What answers is QEMU's main thread, which starts, stops and moves a guest between two answers.
const PATIENCE: Duration = Duration::from_secs(20);

/// Has QEMU execute a command; returns its answer, panics with QEMU's words if it refuses.
pub fn execute(socket: &Path, command: &str, arguments: Value) -> Value {
    let stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut reader = BufReader::new(&stream);
    ask(&mut reader, "qmp_capabilities", json!({}));
    ask(&mut reader, command, arguments)
}

fn ask(reader: &mut BufReader<&UnixStream>, command: &str, arguments: Value) -> Value {
    let order = json!({ "execute": command, "arguments": arguments });
    writeln!(reader.get_mut(), "{order}").unwrap();
    let mut line = String::new();
    loop {
        line.clear();
        let len = reader.read_line(&mut line).unwrap_or_else(|error| panic!("No answer to {order}: {error}"));
        assert!(len > 0, "QEMU ended instead of an answer to {order}");
        let mut said: Value = serde_json::from_str(&line).unwrap();
        // Events and the greeting come on the same way.
        if let Some(answer) = said.get_mut("return") {
            return answer.take();
        }
        assert!(said.get("error").is_none(), "{order}: {}", said["error"]["desc"]);
    }
}
