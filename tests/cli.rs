//! The command line from outside: help, exit codes, the man page.
//!
//! `UPDATE_MAN=1 cargo test --test cli` writes the man page anew after the command line has changed.

// A test fails by panicking.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::{Command, Output};

use clap::CommandFactory;
use vhost_user_net::cli::Cli;

fn run(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_vhost-user-net")).args(args).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// All that can be typed, from the declaration.
fn options() -> Vec<String> {
    let mut command = Cli::command();
    command.build();
    let longs: Vec<_> =
        command.get_arguments().filter_map(|arg| arg.get_long()).map(|long| format!("--{long}")).collect();
    assert!(longs.len() > 10, "{longs:?}");
    longs
}

#[test]
fn capabilities_are_the_json_that_management_software_expects() {
    let output = run(&["--print-capabilities"]);

    assert_eq!(output.status.code(), Some(0));
    assert_eq!(text(&output.stdout), "{\"type\": \"net\", \"features\": []}\n");
    assert_eq!(text(&output.stderr), "");
}

/// QEMU's convention: asked for capabilities, nothing else is done.
#[test]
fn capabilities_are_printed_whatever_else_is_asked_for() {
    for more in [
        &["--queue-pairs", "2"][..],
        &["--mtu", "9000", "--no-config"],
        &["--socket-path", "s", "--tap", "t"],
        &["--fd", "50", "--tap-fd", "51"],
        // Which without it would be refused.
        &["--socket-path", "s", "--fd", "50"],
        &["--tap", "t", "--tap", "u", "--queue-size", "many"],
        &["--frobnicate", "surplus"],
        &["--help"],
    ] {
        for args in [[&["--print-capabilities"], more].concat(), [more, &["--print-capabilities"]].concat()] {
            let output = run(&args);
            assert_eq!(output.status.code(), Some(0), "{args:?}: {}", text(&output.stderr));
            assert!(text(&output.stdout).starts_with('{'));
            assert!(!Path::new("s").exists());
        }
    }
}

/// What a help says of each option, from its name on, as one line.
fn help_of_options(printed: &str) -> BTreeMap<String, String> {
    let mut all: BTreeMap<String, String> = BTreeMap::new();
    let mut last = None;
    for line in printed.lines() {
        let words: Vec<_> = line.split_whitespace().collect();
        // `--tap <NAME>`, or `-h, --help`; what is said of it stands further to the right.
        let names_one = line.trim_start().starts_with('-') && line.find('-') < Some(8);
        if let Some(option) = words.iter().take(2).find(|word| names_one && word.starts_with("--")) {
            last = Some((*option).to_owned());
        }
        if let Some(option) = &last {
            *all.entry(option.clone()).or_default() += &format!(" {}", words.join(" "));
        }
    }
    all
}

#[test]
fn help_mentions_every_option_and_value() {
    let mut command = Cli::command();
    command.build();
    for help in ["--help", "-h"] {
        let output = run(&[help]);
        assert_eq!(output.status.code(), Some(0));
        let all = help_of_options(&text(&output.stdout));
        let mut values = 0;
        for arg in command.get_arguments() {
            let Some(long) = arg.get_long() else { continue };
            let said = all.get(&format!("--{long}")).unwrap_or_else(|| panic!("{help} does not mention --{long}"));
            let (_, listed) = said.split_once("ossible values:").unwrap_or_default();
            let words: Vec<_> = listed.split([' ', ',', ':', ']']).collect();
            for value in arg.get_possible_values() {
                assert!(words.contains(&value.get_name()), "{help}, --{long} does not mention {value:?}: {said}");
                values += 1;
            }
            for default in arg.get_default_values().iter().filter(|_| arg.get_action().takes_values()) {
                let default = default.to_str().unwrap();
                assert!(said.contains(&format!("[default: {default}]")), "{help}, --{long}: {default}: {said}");
            }
        }
        assert!(values > 20, "{values}");
    }
}

#[test]
fn version_is_the_packages() {
    let output = run(&["--version"]);
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(text(&output.stdout), format!("vhost-user-net {}\n", env!("CARGO_PKG_VERSION")));
}

/// A command line that is wrong, by itself or on this host, is 2, as is usual; what cannot be done is 1. Neither leaves anything on standard output.
#[test]
fn exit_code_tells_bad_usage_from_failure() {
    for (args, code, wanted) in [
        (&[][..], 2, "--socket-path"),
        (&["--socket-path", "s"], 2, "--tap"),
        (&["--tap", "t"], 2, "--socket-path"),
        (&["--socket-path", "s", "--fd", "3", "--tap", "t"], 2, "cannot be used with"),
        (&["--socket-path", "s", "--macvtap", "m", "--tap-fd", "4"], 2, "cannot be used with"),
        (&["--socket-path", "s", "--tap", "t", "--tap-fd", "4", "--persist"], 2, "cannot be used with"),
        (&["--socket-path", "s", "--tap", "t", "--frobnicate"], 2, "--frobnicate"),
        (&["--socket-path", "s", "--tap", "t", "surplus"], 2, "surplus"),
        (&["--socket-path", "s", "--tap", "t", "--queue-pairs", "0"], 2, "1..=127"),
        (&["--socket-path", "s", "--tap", "t", "--mtu", "67"], 2, "68..=65535"),
        (&["--socket-path", "s", "--tap", "t", "--mac", "01:00:5e:00:00:01"], 2, "multicast"),
        (&["--socket-path", "s", "--tap", "t", "--front-end", "qemu"], 2, "standard"),
        (&["--socket-path", "s", "--tap", "t", "--log-level", "loud"], 2, "trace"),
        (&["--fd", "2", "--tap", "t"], 2, "2"),
        (&["--fd", "50", "--tap", "t", "--socket-mode", "0660"], 2, "cannot be used with"),
        (&["--fd", "50", "--tap", "t", "--socket-group", "0"], 2, "cannot be used with"),
        (&["--socket-path", "s", "--tap-fd", "50", "--shared"], 2, "cannot be used with"),
        (&["--socket-path", "s", "--tap", "t", "--queue-size", "1000"], 2, "1000 is not a power of two"),
        (&["--socket-path", "s", "--tap-fd", "50,51", "--queue-pairs", "3"], 2, "has 2 descriptor(s)"),
        (&["--fd", "50", "--tap-fd", "50"], 2, "named twice"),
        (&["--socket-path", "s", "--tap-fd", "50,50"], 2, "named twice"),
        (&["--socket-path", "s", "--tap", "t", "--owner", "no-such-user-here"], 2, "no such user"),
        (&["--socket-path", "s", "--tap", "t", "--group", "no-such-group-here"], 2, "no such group"),
        (&["--socket-path", "s", "--tap", "t", "--sandbox", "full", "--on-device-loss", "wait"], 2, "--sandbox auto"),
        (&["--socket-path", "s", "--tap-fd", "50"], 1, "Descriptor 50 of --tap-fd is not open"),
        (&["--fd", "50", "--tap", "t"], 1, "Descriptor 50 of --fd is no connected Unix stream socket"),
        (&["--socket-path", "s", "--tap", "t", "--socket-group", "no-such-group-here"], 2, "no such group"),
        (&["--socket-path", "s", "--tap", "t", "--socket-group", "4294967295"], 2, "no group"),
        (&["--socket-path", "s/", "--tap", "t"], 2, "ends with '/', which a socket's path does not"),
        (&["--socket-path", &"s".repeat(108), "--tap", "t"], 2, "has 108 bytes"),
    ] {
        let output = run(args);
        let printed = text(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{args:?}: {printed}");
        assert!(printed.contains(wanted), "{args:?}: {printed}");
        assert_eq!(text(&output.stdout), "", "{args:?}");
        let is_ours = printed.starts_with("vhost-user-net: ");
        assert!(printed.starts_with("error: ") || is_ours && printed.lines().count() == 1, "One message: {printed}");
        assert!(!Path::new("s").exists(), "{args:?}");
    }
}

/// Whoever waits for the end learns how it ended, also where nobody can be told why.
#[test]
fn status_is_right_where_no_message_can_be_written() {
    let full = fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_vhost-user-net"));
    let status = command.args(["--socket-path", "s", "--tap-fd", "50,50"]).stderr(full).status().unwrap();
    assert_eq!(status.code(), Some(2));
    // A pipe that nobody reads, and that has no room left.
    let (_reader, writer) = std::io::pipe().unwrap();
    rustix::io::ioctl_fionbio(&writer, true).unwrap();
    while rustix::io::write(&writer, &[0; 4096]).is_ok() {}
    rustix::io::ioctl_fionbio(&writer, false).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_vhost-user-net"));
    let mut child = command.args(["--socket-path", "s", "--tap-fd", "50,50"]).stderr(writer).spawn().unwrap();
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(5);
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if std::time::Instant::now() > deadline {
            child.kill().unwrap();
            child.wait().unwrap();
            panic!("It waits for a reader");
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
    };
    assert_eq!(status.code(), Some(2));
}

/// D-05
#[test]
fn odd_words_on_the_command_line_are_refused_with_one_message() {
    let not_utf8 = OsStr::from_bytes(b"tap\xff\xfe");
    let long = "x".repeat(100 << 10);
    let socket = OsStr::new("--socket-path");
    for (args, code, wanted) in [
        (vec![socket, OsStr::new("s"), OsStr::new("--tap"), not_utf8], 2, "UTF-8"),
        (vec![socket, OsStr::new("s"), not_utf8], 2, "unexpected argument"),
        (vec![socket, OsStr::new("s"), OsStr::new("--tap"), OsStr::new(&long)], 2, "--tap"),
        (
            vec![socket, OsStr::new("s"), OsStr::new("--tap"), OsStr::new("t"), OsStr::new("--tap=u")],
            2,
            "cannot be used multiple times",
        ),
        (vec![socket, OsStr::new("s"), OsStr::new("--tap"), OsStr::new("t\nu")], 2, "--tap"),
        (vec![OsStr::new(&long)], 2, "unexpected argument"),
    ] {
        let output = Command::new(env!("CARGO_BIN_EXE_vhost-user-net")).args(&args).output().unwrap();
        let printed = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{printed}");
        assert!(printed.contains(wanted), "{wanted}: {printed}");
        assert_eq!(printed.matches("error:").count(), 1, "{printed}");
        assert!(!Path::new("s").exists());
    }
}

/// What is to be pasted comes out of --help in one piece, on any terminal.
#[test]
fn examples_in_the_help_are_not_broken() {
    let printed = text(&run(&["--help"]).stdout);
    let (_, sections) = printed.split_once("Exit status:").expect(&printed);
    for line in sections.lines() {
        assert!(line.chars().count() < 80, "{line}");
    }
    let command = sections.lines().skip_while(|line| !line.contains("qemu-system")).take_while(|line| !line.is_empty());
    let (last, others) =
        command.collect::<Vec<_>>().split_last().map(|(last, others)| (*last, others.to_vec())).unwrap();
    assert!(others.len() > 3 && others.iter().all(|line| line.ends_with(" \\")) && !last.ends_with('\\'), "{sections}");
}

fn roff(text: &str) -> String {
    text.replace('\\', "\\e").replace('-', "\\-").replace('\'', "\\*(Aq")
}

/// An option with the name of its value, which are not to be parted at the end of a line.
fn option_and_value(arg: &clap::Arg) -> String {
    let option = format!("\\fB{}\\fR", roff(&format!("--{}", arg.get_long().unwrap())));
    match arg.get_value_names() {
        Some([value]) if arg.get_action().takes_values() => format!("{option}\\ \\fI{}\\fR", roff(value)),
        _ => option,
    }
}

/// As clap_mangen has it, but with the options' values.
fn synopsis() -> String {
    let mut command = Cli::command();
    command.build();
    let named = |id: &clap::Id| command.get_arguments().find(|arg| arg.get_id() == id).map(option_and_value).unwrap();
    let required: Vec<_> = command.get_groups().filter(|group| group.is_required_set()).collect();
    let mut text = ".SH SYNOPSIS\n.nh\n.ad l\n\\fBvhost\\-user\\-net\\fR".to_owned();
    for group in &required {
        text += &format!(" {{{}}}", group.get_args().map(named).collect::<Vec<_>>().join(" | "));
    }
    let is_other = |arg: &&clap::Arg| !required.iter().any(|group| group.get_args().any(|id| id == arg.get_id()));
    for arg in command.get_arguments().filter(is_other).filter(|arg| arg.get_short().is_none()) {
        text += &format!(" [{}]", option_and_value(arg));
    }
    text + "\n.ad b\n.hy\n"
}

/// What stands below the options in the help: titles, what is indented as it stands, and text.
fn sections() -> String {
    let text = Cli::command().get_after_long_help().unwrap().to_string();
    let mut page = String::new();
    let mut is_literal = false;
    for line in text.lines() {
        let indented = line.strip_prefix("  ");
        // An empty line between two commands is of them.
        if !line.is_empty() && indented.is_some() != is_literal {
            is_literal = !is_literal;
            page += if is_literal { ".nf\n" } else { ".fi\n" };
        }
        match (indented, line.strip_suffix(':')) {
            (None, Some(title)) => page += &format!(".SH {}\n", roff(&title.to_uppercase())),
            (None, None) if !is_literal && line.is_empty() => page += ".PP\n",
            (indented, _) => page += &(roff(indented.unwrap_or(line)) + "\n"),
        }
    }
    page + if is_literal { ".fi\n" } else { "" }
}

fn man_page() -> Vec<u8> {
    // Without a date: the page changes with the command line alone.
    let man = clap_mangen::Man::new(Cli::command());
    let mut page = Vec::new();
    man.render_title(&mut page).unwrap();
    man.render_name_section(&mut page).unwrap();
    page.extend(synopsis().bytes());
    man.render_description_section(&mut page).unwrap();
    man.render_options_section(&mut page).unwrap();
    page.extend(sections().bytes());
    man.render_version_section(&mut page).unwrap();
    page
}

#[test]
fn man_page_says_what_the_command_line_takes() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("resources/vhost-user-net.1");
    let page = man_page();
    if std::env::var_os("UPDATE_MAN").is_some_and(|update| update == "1") {
        fs::write(&path, &page).unwrap();
    }

    let committed = fs::read(&path).unwrap_or_default();

    assert!(committed == page, "{} is not up to date: UPDATE_MAN=1 cargo test --test cli", path.display());
    for option in options() {
        let escaped = option.replace('-', "\\-");
        assert!(text(&page).contains(&escaped), "The man page does not mention {option}");
    }
    let page = text(&page);
    for wanted in [".SH EXIT STATUS\n", ".SH SIGNALS\n", ".SH EXAMPLES\n.nf\n", "\\fB\\-\\-tap\\fR\\ \\fINAME\\fR"] {
        assert!(page.contains(wanted), "{wanted}");
    }
}
