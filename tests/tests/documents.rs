//! What the documents say of the configuration is so: every example loads, without a warning and with the code that the
//! daemon runs, and no key is left out.

use std::{
    collections::BTreeSet,
    fs,
    io::Write,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tests::{
    edge::{program, say},
    tls::Ca,
};

#[test]
fn every_key_is_documented() -> Result<()> {
    let schema = say(
        Command::new(program("edgectl")?).args(["config", "schema"]),
        Duration::from_secs(5),
    )?;
    let schema: Value = serde_json::from_str(&schema.out)?;
    let document = fs::read_to_string(top().join("docs/configuration.md"))?;
    let mut keys = BTreeSet::new();
    collect(&schema, &mut keys);
    ensure!(
        keys.contains("connect_timeout"),
        "the schema has other keys than expected: {keys:?}"
    );
    let missing: Vec<_> = keys
        .iter()
        .filter(|key| !document.contains(&format!("| `{key}` |")))
        .collect();
    let sections = [
        "control", "log", "lb", "frontend", "health", "active", "dns64", "nat64", "zone",
    ];
    let missing: Vec<_> = missing
        .into_iter()
        .filter(|key| !sections.contains(&key.as_str()))
        .collect();
    assert!(missing.is_empty(), "docs/configuration.md says nothing of {missing:?}");
    Ok(())
}

#[test]
fn every_example_configuration_loads() -> Result<()> {
    let files = Files::make()?;
    let mut count = 0;
    for document in documents()? {
        let text = fs::read_to_string(&document)?;
        for example in examples(&document, &text) {
            check(&files.put_in(&example)).with_context(|| format!("in {}:\n{example}", document.display()))?;
            count += 1;
        }
    }
    ensure!(
        count >= 5,
        "only {count} examples were found: is the reader of the documents broken?"
    );
    Ok(())
}

fn top() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The names of all properties in a JSON Schema.
fn collect(schema: &Value, keys: &mut BTreeSet<String>) {
    match schema {
        Value::Object(map) => {
            if let Some(Value::Object(properties)) = map.get("properties") {
                keys.extend(properties.keys().cloned());
            }
            map.values().for_each(|inner| collect(inner, keys));
        }
        Value::Array(list) => list.iter().for_each(|inner| collect(inner, keys)),
        _ => {}
    }
}

/// The shipped examples and every Markdown file that speaks of configuration.
fn documents() -> Result<Vec<PathBuf>> {
    let top = top();
    let mut documents = vec![top.join("packaging/edged.toml"), top.join("README.md")];
    let folders = ["appliance", "lb", "dns64", "docs", "docs/decisions"].map(|folder| (folder, "md"));
    for (folder, wanted) in folders.into_iter().chain([("packaging/examples", "toml")]) {
        for entry in fs::read_dir(top.join(folder))? {
            let path = entry?.path();
            documents.extend(
                path.extension()
                    .is_some_and(|extension| extension == wanted)
                    .then_some(path),
            );
        }
    }
    Ok(documents)
}

/// The whole of a TOML file; of a Markdown file the blocks marked as TOML. What has no `version` is a part, and gets
/// one.
fn examples(document: &Path, text: &str) -> Vec<String> {
    if document.extension().is_some_and(|extension| extension == "toml") {
        return vec![text.to_owned()];
    }
    let blocks = text
        .split("```toml\n")
        .skip(1)
        .filter_map(|rest| rest.split_once("```"));
    blocks
        .map(|(block, _)| {
            if block.contains("version = ") {
                block.to_owned()
            } else {
                format!("version = 1\n{block}")
            }
        })
        .collect()
}

/// What `edgectl config check` says about it.
fn check(config: &str) -> Result<()> {
    let mut child = Command::new(program("edgectl")?)
        .args(["config", "check", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    child.stdin.take().expect("piped above").write_all(config.as_bytes())?;
    let output = child.wait_with_output()?;
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    ensure!(output.status.success() && !said.contains("warning"), "{said}");
    Ok(())
}

/// The files that examples name, in a folder of their own.
struct Files(PathBuf);

impl Files {
    fn make() -> Result<Self> {
        let files = Self(std::env::temp_dir().join(format!("edge-documents-{}", std::process::id())));
        fs::create_dir_all(&files.0)?;
        Ca::new("an example")?.write(&files.0.join("cluster-ca.crt"))?;
        let token = files.0.join("metrics.token");
        fs::write(&token, "0123456789abcdef0123456789abcdef\n")?;
        fs::set_permissions(&token, fs::Permissions::from_mode(0o600))?;
        Ok(files)
    }

    /// Where a reader would have put them, they are not on this machine.
    fn put_in(&self, example: &str) -> String {
        example.replace("/etc/edged/", &format!("{}/", self.0.display()))
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}
