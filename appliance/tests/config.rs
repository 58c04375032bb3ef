//! The configuration file's promises: what is good loads, what is not says where and what to write instead.

use std::{fs, os::unix::fs::PermissionsExt, path::PathBuf};

use appliance::config::{ChangeKind, SecretError, changes, load, render, schema, secret_file, unified};

const GOOD: &str = r#"version = 1

[control]
metrics = ["[::1]:9464"]

[lb]
health = ["[::1]:6080"]

[[lb.frontend]]
name = "api"
kind = "api"
listen = ["[::1]:16443", "127.0.0.1:16443"]
backends = ["[fd00::11]:6443", { address = "[fd00::12]:6443", weight = 5 }]
"#;

#[test]
fn the_smallest_file_is_a_version() {
    let loaded = load("version = 1\n", "edged.toml").expect("it loads");
    assert_eq!(loaded.config.control.socket.to_str(), Some("/run/edged/edged.sock"));
    assert_eq!(
        loaded.config.control.metrics[0].value,
        "[::1]:9464".parse().expect("an address")
    );
    assert_eq!(loaded.config.log.level.name(), "info");
    assert!(loaded.config.lb.frontend.is_empty());
    assert!(loaded.warnings.is_empty());
}

#[test]
fn a_good_file_loads_and_keeps_its_text() {
    let loaded = load(GOOD, "edged.toml").unwrap_or_else(|faulty| panic!("{faulty}"));
    assert_eq!(loaded.text, GOOD);
    assert_eq!(loaded.config.lb.frontend[0].backends.value[1].weight, 5);
    let listen = &loaded.config.lb.frontend[0].listen[1];
    assert_eq!(&GOOD[listen.span.clone()], "\"127.0.0.1:16443\"");
    let told = loaded.render(listen.span.clone(), "port 16443 is in use", "ss -tlnp");
    assert!(told.starts_with("edged.toml:12:26: port 16443 is in use\n"), "{told}");
}

/// What is wrong with `GOOD` after one replacement, as the operator sees it.
fn told(from: &str, to: &str) -> String {
    let text = GOOD.replacen(from, to, 1);
    assert_ne!(text, GOOD, "{from:?} is in the example");
    load(&text, "edged.toml").expect_err(to).to_string()
}

#[test]
fn an_unknown_key_is_shown_with_the_one_that_was_meant() {
    assert_eq!(
        told("listen =", "lisen ="),
        "edged.toml:12:1: unknown key \"lisen\"\n   |\n12 | lisen = [\"[::1]:16443\", \"127.0.0.1:16443\"]\n   | ^^^^^\n   = did you mean \"listen\"?"
    );
    assert_eq!(
        told("health = [\"[::1]:6080\"]", "helth = [\"[::1]:6080\"]"),
        "edged.toml:7:1: unknown key \"helth\"\n  |\n7 | helth = [\"[::1]:6080\"]\n  | ^^^^^\n  = did you mean \"health\"?"
    );
    assert_eq!(
        told("[lb]", "[firewall]\n\n[lb]"),
        "edged.toml:6:2: unknown key \"firewall\"\n  |\n6 | [firewall]\n  |  ^^^^^^^^\n  = a file has: version, control, log, lb, dns64, nat64"
    );
    assert_eq!(
        told("metrics = [\"[::1]:9464\"]", "zzz = 1"),
        "edged.toml:4:1: unknown key \"zzz\"\n  |\n4 | zzz = 1\n  | ^^^\n  = [control] has: socket, metrics, metrics_token_file"
    );
}

#[test]
fn an_unknown_choice_is_shown_with_the_choices() {
    assert_eq!(
        told("kind = \"api\"", "kind = \"api\"\nbalance = \"leastconn\""),
        "edged.toml:12:11: unknown balance \"leastconn\"\n   |\n12 | balance = \"leastconn\"\n   |           ^^^^^^^^^^^\n   \
         = did you mean \"least-connections\"? there are \"least-connections\", \"round-robin\", \"source\", \"random-two\""
    );
    assert_eq!(
        told("[lb]", "[log]\nformat = \"xml\"\n[lb]"),
        "edged.toml:7:10: unknown format \"xml\"\n  |\n7 | format = \"xml\"\n  |          ^^^^^\n  = write one of \"text\", \"json\""
    );
}

#[test]
fn every_fault_of_a_file_is_told_at_once_and_in_its_order() {
    let text = r#"version = 1
[control]
sockt = "/x"
metrics = ["nonsense"]
[[lb.frontend]]
name = "a"
lisen = ["[::1]:1"]
backends = [{ adress = "x:1" }, { address = "x:2", weight = "5" }]
[[lb.frontend]]
listen = "[::1]:5"
backends = []
connect_timeout = 5
idle_timeout = "soon"
threads = 70000
"#;
    let faulty = load(text, "f").expect_err("faulty");
    let heads: Vec<String> = faulty
        .faults
        .iter()
        .map(|fault| fault.to_string().lines().next().unwrap_or_default().to_owned())
        .collect();
    assert_eq!(
        heads,
        [
            "f:3:1: unknown key \"sockt\"",
            "f:4:12: \"nonsense\" is no address with a port",
            "f:7:1: unknown key \"lisen\"",
            "f:8:15: unknown key \"adress\"",
            "f:8:61: this is text, where a whole number is needed",
            "f:9:1: [lb.frontend] has no \"name\"",
            "f:10:10: this is text, where a list is needed",
            "f:12:19: this is a whole number, where text is needed",
            "f:13:16: \"soon\" is no timeout",
            "f:14:1: unknown key \"threads\"",
        ]
    );
}

#[test]
fn values_that_cannot_work_are_shown_with_their_remedy() {
    assert_eq!(
        told("weight = 5", "weight = 0"),
        "edged.toml:13:32: weight 0 is out of range\n   |\n13 | backends = [\"[fd00::11]:6443\", { address = \"[fd00::12]:6443\", weight = 0 }]\n   \
         |                                ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^\n   = write 1 to 256; to send a backend nothing, use edgectl lb drain"
    );
    let two = told("\"127.0.0.1:16443\"", "\"[::1]:16443\", \"[::1]:0\"");
    assert!(
        two.contains("edged.toml:12:26: [::1]:16443 is already the listener of frontend \"api\""),
        "{two}"
    );
    assert!(
        two.contains("edged.toml:12:41: port 0 would listen somewhere nobody knows"),
        "{two}"
    );
}

#[test]
fn a_metrics_address_that_is_a_listener_of_the_balancer_is_refused() {
    assert_eq!(
        told("[\"[::1]:9464\"]", "[\"[::1]:16443\"]"),
        "edged.toml:4:12: [::1]:16443 is already the listener of frontend \"api\"\n  |\n4 | metrics = [\"[::1]:16443\"]\n  \
         |            ^^^^^^^^^^^^^\n  = give each listener an address and port of its own"
    );
    // The default address is written nowhere: there is no line to show.
    let text = "version = 1\n[lb]\nhealth = [\"[::1]:9464\"]\n";
    assert_eq!(
        load(text, "edged.toml").expect_err("twice").to_string(),
        "edged.toml: [::1]:9464 is already the listener of the balancer's health endpoint\n   \
         = metrics listen there unless [control] metrics says otherwise: move one of the two"
    );
}

#[test]
fn metrics_beyond_loopback_are_a_warning() {
    let text = GOOD.replacen("[\"[::1]:9464\"]", "[\"0.0.0.0:9464\"]", 1);
    let loaded = load(&text, "edged.toml").expect("it loads");
    assert_eq!(
        loaded.warnings,
        [
            "edged.toml:4:12: warning: metrics on 0.0.0.0:9464: whoever reaches it can read every metric\n  |\n4 | metrics = [\"0.0.0.0:9464\"]\n  \
          |            ^^^^^^^^^^^^^^\n  = listen on [::1]:9464, or make sure that only the monitoring network reaches this address"
        ]
    );
    let text = GOOD.replacen("kind = \"api\"", "kind = \"api\"\nidle_timeout = \"5s\"", 1);
    let loaded = load(&text, "edged.toml").expect("it loads");
    assert!(
        loaded.warnings[0].starts_with("edged.toml:12:16: warning: 5s cuts quiet watches"),
        "{:?}",
        loaded.warnings
    );
}

#[test]
fn the_version_is_asked_for_first() {
    assert_eq!(
        load("[lb]\n", "edged.toml").expect_err("no version").to_string(),
        "edged.toml:1:1: the file does not say which format it has\n  |\n1 | [lb]\n  | ^^^^\n  = write this as the first line: version = 1"
    );
    assert_eq!(
        told("version = 1", "version = 2"),
        "edged.toml:1:11: version 2 is unknown to this release of edged, which reads version 1\n  |\n1 | version = 2\n  |           ^\n  \
         = write version = 1; for a file of a later release, install that release"
    );
    assert!(told("version = 1", "version = \"1\"").starts_with("edged.toml:1:11: version \"1\" is unknown"));
    assert!(
        load("", "edged.toml")
            .expect_err("empty")
            .to_string()
            .contains("write this as the first line: version = 1")
    );
}

#[test]
fn a_secret_in_the_file_is_refused_and_never_shown() {
    for (key, value) in [
        ("password", "\"hunter2hunter2\""),
        ("token", "'hunter2hunter2'"),
        ("private_key", "\"\"\"\nhunter2hunter2\n\"\"\""),
        ("secret", "[\"hunter2hunter2\"]"),
        ("metrics_token", "\"hunter2hunter2\""),
    ] {
        let text = told("metrics =", &format!("{key} = {value}\nmetrics ="));
        assert!(
            text.starts_with(&format!(
                "edged.toml:4:1: \"{key}\" would put a secret into the configuration"
            )),
            "{text}"
        );
        assert!(text.contains("by reference"), "{text}");
        assert!(text.contains("metrics_token_file = \"/etc/edged/"), "{text}");
        assert!(!text.contains("hunter2"), "{text}");
        assert_eq!(text.matches("edged.toml:").count(), 1, "{text}");
    }
    // Not even when the line is shown for another fault.
    let text = told("kind = \"api\"", "health = { tokn = 1, token = \"hunter2hunter2\" }");
    assert!(!text.contains("hunter2"), "{text}");
}

#[test]
fn syntax_errors_point_at_the_slip() {
    for (from, to, place, remedy) in [
        (
            "kind = \"api\"",
            "kind = api",
            "edged.toml:11:8: ",
            "in quotes: \"api\"",
        ),
        (
            "kind = \"api\"",
            "kind = \"api",
            "edged.toml:11:12: ",
            "opened and not closed",
        ),
        (
            "kind = \"api\"",
            "kind = \"api\"\nkind = \"tcp\"",
            "edged.toml:12:1: ",
            "once",
        ),
        ("kind = \"api\"", "kind: api", "edged.toml:11:7: ", "not YAML"),
        ("[lb]", "[lb", "edged.toml:6:4: ", "not closed"),
        (
            "[\"[::1]:16443\", \"127.0.0.1:16443\"]",
            "127.0.0.1:16443",
            "edged.toml:12:15: ",
            "in quotes: \"127.0.0.1:16443\"",
        ),
    ] {
        let text = told(from, to);
        assert!(text.starts_with(place), "{to}: {text}");
        assert!(text.contains(remedy), "{to}: {text}");
        assert!(text.contains(" | ") && text.contains('^'), "{to}: {text}");
    }
}

#[test]
fn columns_are_characters_and_tabs_and_long_lines_keep_the_caret_under_the_words() {
    // A tab is one character, and four columns wide on the screen.
    let text = "version = 1\n[[lb.frontend]]\n\tnaem = \"ü\"\n";
    let told = load(text, "f").expect_err("faulty").to_string();
    assert!(
        told.contains(
            "f:3:2: unknown key \"naem\"\n  |\n3 |     naem = \"ü\"\n  |     ^^^^\n  = did you mean \"name\"?"
        ),
        "{told}"
    );
    let text = "key = \"üüü\" # ß\nother = 5";
    let at = text.find('#').expect("it is there");
    assert_eq!(
        render(text, "f", at..at + 1, "m", ""),
        "f:1:13: m\n  |\n1 | key = \"üüü\" # ß\n  |             ^"
    );
    let long = format!("{} HERE {}", "a".repeat(300), "b".repeat(300));
    let told = render(&long, "f", 301..305, "m", "h");
    let lines: Vec<&str> = told.lines().collect();
    assert!(lines.iter().all(|line| line.chars().count() < 120), "{told}");
    let caret = lines[3].find('^').expect("a caret");
    assert_eq!(&lines[2][caret..caret + 4], "HERE");
    assert_eq!(lines[3].matches('^').count(), 4);
}

#[test]
fn no_span_and_no_character_of_the_file_can_harm_the_reader() {
    // Out of range, in the middle of a character, reversed: shown as well as can be.
    let reversed = std::ops::Range { start: 4, end: 2 };
    for span in [100..200, 3..4, reversed, 0..1000] {
        let _ = render("aäöb\n", "f", span, "m", "h");
    }
    let told = render("a\x1b[31mb\u{9b}\r\n", "f\x1b]0;x\x07", 0..1, "m\x1b[2J", "h\x07");
    assert!(!told.contains(['\x1b', '\x07', '\u{9b}', '\r']), "{told:?}");
    // Whatever the bytes, loading ends with an answer.
    for text in [
        "\u{feff}version = 1",
        "version = 1\r\n[lb]\r\nx = 1\r\n",
        "\0",
        "[[[[",
        "a = {b = {c = ",
        "version = 99999999999999999999",
        "version = 1\n[lb]\nfrontend = 3",
        "version = 1\nlb = []",
        "version = 1\n[lb]\nfrontend = [1, [2], {}]",
    ] {
        let _ = load(text, "f").map_err(|faulty| faulty.to_string());
    }
    assert!(load(&"[".repeat(100_000), "f").is_err());
    assert!(load(&format!("version = 1\nx = {}", "[".repeat(50_000)), "f").is_err());
}

#[test]
fn a_secret_file_that_others_can_read_is_refused_with_the_command_that_mends_it() {
    let dir = scratch("secret");
    let path = dir.join("token");
    let mode = |mode| fs::set_permissions(&path, fs::Permissions::from_mode(mode)).expect("chmod");
    fs::write(&path, "abc\n").expect("write");
    for wide in [0o644, 0o640, 0o604, 0o660] {
        mode(wide);
        let error = secret_file(&path).expect_err("readable");
        assert!(matches!(error, SecretError::Readable { .. }));
        assert_eq!(
            error.to_string(),
            format!(
                "{0} has mode {wide:04o}: others on this machine can read the secret, so it is not used; chmod 600 {0}",
                path.display()
            )
        );
    }
    for narrow in [0o600, 0o400] {
        mode(narrow);
        assert_eq!(secret_file(&path).expect("a secret"), b"abc");
    }
    fs::write(dir.join("empty"), "\n").expect("write");
    fs::set_permissions(dir.join("empty"), fs::Permissions::from_mode(0o600)).expect("chmod");
    assert!(matches!(
        secret_file(&dir.join("empty")),
        Err(SecretError::Empty { .. })
    ));
    assert!(matches!(secret_file(&dir), Err(SecretError::Empty { .. })));
    assert!(matches!(
        secret_file(&dir.join("none")),
        Err(SecretError::Unreadable { .. })
    ));

    let text = format!("version = 1\n[control]\nmetrics_token_file = \"{}\"\n", path.display());
    let loaded = load(&text, "edged.toml").expect("it loads");
    assert_eq!(
        loaded.secrets().expect("readable").metrics_token.as_deref(),
        Some(b"abc".as_slice())
    );
    assert!(
        !format!("{:?}", loaded.secrets()).contains("97"),
        "a secret is not printed, not even as bytes"
    );
    mode(0o644);
    for told in [
        loaded.secrets().expect_err("wide"),
        loaded.check_files().expect_err("wide"),
    ]
    .map(|faulty| faulty.to_string())
    {
        assert!(
            told.starts_with(&format!(
                "edged.toml:3:22: {} has mode 0644: others on this machine can read the secret",
                path.display()
            )),
            "{told}"
        );
        assert!(told.ends_with(&format!("= chmod 600 {}", path.display())), "{told}");
    }
    fs::remove_dir_all(dir).expect("cleaned");
}

#[test]
fn a_referred_file_that_is_missing_is_found_by_the_check() {
    let text = GOOD.to_owned() + "[lb.frontend.health.active]\nkind = \"https\"\nca_file = \"/nonexistent/ca.crt\"\n";
    let told = load(&text, "edged.toml")
        .expect("it loads")
        .check_files()
        .expect_err("missing")
        .to_string();
    assert!(
        told.starts_with("edged.toml:16:11: /nonexistent/ca.crt cannot be read: No such file"),
        "{told}"
    );
}

#[test]
fn a_difference_is_told_by_meaning() {
    let other = GOOD
        .replace("[lb]", "# a comment\n[log]\nlevel = \"debug\"\n[lb]")
        .replace("kind = \"api\"", "kind = \"api\"\nbalance = \"source\"")
        .replace(
            "\"[fd00::11]:6443\", ",
            "{ address = \"[fd00::13]:6443\", backup = true }, ",
        )
        .replace("weight = 5", "weight = 6")
        + "\n[[lb.frontend]]\nname = \"web\"\nlisten = [\"[::1]:443\"]\nbackends = [\"[fd00::11]:443\"]\n";
    let other = other.replace("[control]\n", "[control]\nsocket = \"/run/x.sock\"\n");
    let told: Vec<String> = changes(GOOD, &other)
        .iter()
        .map(|change| {
            let of = |value: &Option<String>| value.clone().unwrap_or_else(|| "-".into());
            format!(
                "{:?} {} {} {} {}",
                change.kind,
                change.what,
                of(&change.before),
                of(&change.after),
                change.live
            )
        })
        .collect();
    assert_eq!(
        told,
        [
            "Changed control.socket - \"/run/x.sock\" false",
            "Removed backend [fd00::11]:6443 of frontend api - - true",
            "Changed weight of backend [fd00::12]:6443 of frontend api 5 6 true",
            "Added backend [fd00::13]:6443 of frontend api - - true",
            "Changed balance of frontend api - \"source\" true",
            "Added frontend web - - true",
            "Changed log.level - \"debug\" true",
        ],
        "{told:#?}"
    );
    assert!(
        changes(
            GOOD,
            &GOOD.replace("\"[fd00::11]:6443\"", "{ address = \"[fd00::11]:6443\" }")
        )
        .is_empty()
    );
    assert!(changes(GOOD, &format!("# nothing\n{GOOD}")).is_empty());
    let removed = changes(&other, GOOD);
    assert!(
        removed
            .iter()
            .any(|change| change.kind == ChangeKind::Removed && change.what == "frontend web")
    );
    let lines = unified(GOOD, &other, "running", "file");
    assert!(lines.starts_with("--- running\n+++ file\n@@ "), "{lines}");
    assert!(lines.contains("\n+balance = \"source\"\n"), "{lines}");
}

#[test]
fn the_schema_names_every_key_with_its_default() {
    let schema = schema();
    assert_eq!(schema["$schema"], "https://json-schema.org/draft/2020-12/schema");
    assert_eq!(schema["title"], "edged.toml");
    let frontend = &schema["$defs"]["Frontend"]["properties"];
    for key in [
        "name",
        "kind",
        "listen",
        "balance",
        "connect_timeout",
        "idle_timeout",
        "backends",
        "health",
    ] {
        assert!(
            frontend[key]["description"].is_string() || frontend[key]["$ref"].is_string(),
            "{key}: {frontend:#}"
        );
        assert_eq!(frontend[key]["title"], key);
    }
    assert_eq!(frontend["connect_timeout"]["default"], "1s");
    assert_eq!(frontend["balance"]["default"], "least-connections");
    let control = &schema["$defs"]["Control"]["properties"];
    assert_eq!(control["socket"]["default"], "/run/edged/edged.sock");
    assert_eq!(control["metrics"]["default"][0], "[::1]:9464");
    assert_eq!(schema["additionalProperties"], false);
}

fn scratch(name: &str) -> PathBuf {
    let dir = std::env::temp_dir().join(format!("edged-{name}-{}", std::process::id()));
    fs::create_dir_all(&dir).expect("a directory");
    dir
}

#[test]
fn the_translator_has_one_of_the_prefixes_that_the_resolver_makes_addresses_under() {
    let text = |resolver: &str, prefix: &str| {
        format!(
            "version = 1\n[dns64]\nlisten = [\"[::1]:53\"]\nupstreams = [\"udp://192.0.2.53\"]\n{resolver}\n[nat64]\nmode = \"stateless\"\n{prefix}\n"
        )
    };
    let good = [
        ("", ""),
        ("", "prefix = \"64:ff9b::/96\""),
        ("prefixes = [\"2001:db8:64::/96\"]", "prefix = \"2001:db8:64::/96\""),
        ("prefixes = []", "prefix = \"none\"\naddress_v6 = \"2001:db8::1\""),
    ];
    for (resolver, prefix) in good {
        load(&text(resolver, prefix), "f").unwrap_or_else(|faulty| panic!("{resolver} {prefix}: {faulty}"));
    }
    let told = |resolver: &str, prefix: &str| load(&text(resolver, prefix), "f").expect_err(prefix).to_string();
    assert_eq!(
        told("", "prefix = \"2001:db8:64::/96\""),
        "f:8:10: the resolver makes no addresses under 2001:db8:64::/96, so nobody would come here\n  |\n8 | prefix = \"2001:db8:64::/96\"\n  |          ^^^^^^^^^^^^^^^^^^\n  = write prefix = \"64:ff9b::/96\", or add this one to dns64.prefixes"
    );
    let nothing = told("prefixes = []", "prefix = \"64:ff9b::/96\"");
    assert!(nothing.contains("or prefix = \"none\" here"), "{nothing}");
}

#[test]
fn a_stateful_translator_says_what_it_lacks() {
    let told = |lines: &str| {
        let text = format!("version = 1\n[nat64]\n{lines}\n");
        load(&text, "f")
            .err()
            .map_or_else(String::new, |faulty| faulty.to_string())
    };
    let bare = told("mode = \"stateful\"");
    for says in [
        "f:3:8: mode = \"stateful\" needs an IPv4 address",
        "without clients nobody may open a session",
    ] {
        assert!(bare.contains(says), "{bare}");
    }
    let pool = "pool = [{ address = \"203.0.113.7\" }]";
    assert!(
        told(pool).contains("without clients"),
        "also where the mode is not written"
    );
    assert_eq!(told(&format!("{pool}\nclients = [\"2001:db8:1::/48\"]")), "");
}
