//! The store's promises: what was acknowledged is there after any end, and what cannot be trusted is never replaced.

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use appliance::store::{KEPT_REVISIONS, RedbStore, Store, StoreError};
use lb::io::Drain;

/// Names the directory in which this test binary, started again, writes until it is killed.
const WRITER: &str = "EDGED_TEST_STORE_WRITER";

fn drain(number: usize) -> Drain {
    Drain {
        frontend: "api".into(),
        backend: format!("[fd00::{number:x}]:6443"),
    }
}

#[test]
fn what_was_confirmed_and_drained_is_there_after_reopening() {
    let dir = Scratch::new("reopen");
    let store = RedbStore::open(&dir.0).expect("a store");
    assert!(store.confirmed().expect("readable").is_none());
    let first = store
        .confirm_config("version = 1\n", "root", "first start")
        .expect("kept");
    assert_eq!((first.revision, first.running), (1, false));
    let second = store
        .confirm_config("version = 1 # two\n", "uid 7", "/etc/edged/edged.toml")
        .expect("kept");
    store.set_drain(&drain(1), true).expect("kept");
    store.set_drain(&drain(2), true).expect("kept");
    store.set_drain(&drain(2), true).expect("twice is no error");
    store.set_drain(&drain(1), false).expect("taken back");
    store.set_drain(&drain(1), false).expect("twice is no error");
    drop(store);
    let store = RedbStore::open(&dir.0).expect("a store");
    let confirmed = store.confirmed().expect("readable").expect("there");
    assert_eq!(
        (confirmed.revision, confirmed.text.as_str(), confirmed.author.as_str()),
        (2, "version = 1 # two\n", "uid 7")
    );
    assert_eq!(confirmed.at, second.at);
    assert!(
        confirmed.at.ends_with('Z') && confirmed.at.len() == 20,
        "{}",
        confirmed.at
    );
    assert_eq!(
        store
            .history()
            .expect("readable")
            .iter()
            .map(|revision| revision.revision)
            .collect::<Vec<_>>(),
        [2, 1]
    );
    assert_eq!(
        store.revision(1).expect("readable").expect("there").origin,
        "first start"
    );
    assert!(store.revision(3).expect("readable").is_none());
    assert_eq!(store.drains().expect("readable"), [drain(2)]);
}

#[test]
fn only_the_newest_hundred_configurations_are_kept_and_numbers_never_come_again() {
    let dir = Scratch::new("hundred");
    let store = RedbStore::open(&dir.0).expect("a store");
    for number in 1..=KEPT_REVISIONS + 5 {
        store.confirm_config(&number.to_string(), "a", "o").expect("kept");
    }
    let history = store.history().expect("readable");
    assert_eq!(history.len(), KEPT_REVISIONS);
    assert_eq!((history[0].revision, history[KEPT_REVISIONS - 1].revision), (105, 6));
}

#[test]
fn nobody_else_can_read_the_store() {
    let dir = Scratch::new("mode");
    let inner = dir.0.join("state");
    drop(RedbStore::open(&inner).expect("a store"));
    let mode = |path: &Path| fs::metadata(path).expect("there").permissions().mode() & 0o777;
    assert_eq!((mode(&inner), mode(&inner.join("store.redb"))), (0o700, 0o600));
    fs::set_permissions(&inner, fs::Permissions::from_mode(0o755)).expect("chmod");
    fs::set_permissions(inner.join("store.redb"), fs::Permissions::from_mode(0o644)).expect("chmod");
    drop(RedbStore::open(&inner).expect("a store"));
    assert_eq!((mode(&inner), mode(&inner.join("store.redb"))), (0o700, 0o600));
}

#[test]
fn a_damaged_file_is_named_kept_and_never_replaced() {
    let dir = Scratch::new("damaged");
    let path = dir.0.join("store.redb");
    let store = RedbStore::open(&dir.0).expect("a store");
    for number in 0..20 {
        store
            .confirm_config(&format!("version = 1 # {}", "x".repeat(number * 100)), "root", "test")
            .expect("kept");
    }
    drop(store);
    let good = fs::read(&path).expect("there");
    let mut refused = 0;
    let mut damage = |name: &str, bytes: Vec<u8>| {
        fs::write(&path, &bytes).expect("written");
        match RedbStore::open(&dir.0) {
            Err(error @ StoreError::Damaged { .. }) => {
                refused += 1;
                let text = error.to_string();
                assert!(text.contains(&format!("mv {0} {0}.damaged", path.display())), "{text}");
                assert_eq!(
                    fs::read(&path).expect("there").len(),
                    bytes.len(),
                    "{name}: left as it is"
                );
            }
            Err(error) => panic!("{name}: {error:?}"),
            // Damage in a page that holds nothing is none: then everything must be there.
            Ok(store) => assert_eq!(store.history().expect("readable").len(), 20, "{name}"),
        }
    };
    damage("text", b"this is no store\n".repeat(1000));
    damage("zeroes", vec![0; good.len()]);
    damage("cut in half", good[..good.len() / 2].to_vec());
    damage("cut to a page", good[..4096.min(good.len())].to_vec());
    // Every page in turn overwritten in its middle.
    for page in 0..(good.len() / 4096).min(300) {
        let mut bytes = good.clone();
        bytes[page * 4096 + 8..page * 4096 + 72].fill(0xa5);
        damage(&format!("page {page}"), bytes);
    }
    assert!(refused > 5, "{refused} refused");
    fs::write(&path, &good).expect("written");
    assert_eq!(
        RedbStore::open(&dir.0)
            .expect("good again")
            .history()
            .expect("readable")
            .len(),
        20
    );
}

#[test]
fn a_store_of_a_later_release_is_refused_and_left_alone() {
    let dir = Scratch::new("later");
    let store = RedbStore::open(&dir.0).expect("a store");
    store.confirm_config("version = 1", "root", "test").expect("kept");
    drop(store);
    let meta: redb::TableDefinition<'_, &str, u64> = redb::TableDefinition::new("meta");
    let database = redb::Database::open(dir.0.join("store.redb")).expect("a database");
    let transaction = database.begin_write().expect("a transaction");
    transaction
        .open_table(meta)
        .expect("the table")
        .insert("schema", 2)
        .expect("written");
    transaction.commit().expect("committed");
    drop(database);
    let error = RedbStore::open(&dir.0).expect_err("later");
    assert!(
        error
            .to_string()
            .contains("written by a later release (store version 2, this release reads up to 1)"),
        "{error}"
    );
    let database = redb::Database::open(dir.0.join("store.redb")).expect("a database");
    let transaction = database.begin_write().expect("a transaction");
    transaction
        .open_table(meta)
        .expect("the table")
        .insert("schema", 1)
        .expect("written");
    transaction.commit().expect("committed");
    drop(database);
    let store = RedbStore::open(&dir.0).expect("its own release opens it");
    assert_eq!(store.history().expect("readable").len(), 1);
}

#[test]
fn two_daemons_cannot_share_a_store() {
    let dir = Scratch::new("two");
    let _first = RedbStore::open(&dir.0).expect("a store");
    assert!(matches!(RedbStore::open(&dir.0), Err(StoreError::InUse { .. })));
}

#[test]
fn a_state_directory_that_cannot_be_used_says_so() {
    let dir = Scratch::new("access");
    fs::write(dir.0.join("file"), "").expect("written");
    let error = RedbStore::open(&dir.0.join("file/state")).expect_err("no directory");
    assert!(matches!(error, StoreError::Access { .. }));
    assert!(error.to_string().contains("ls -ld"), "{error}");
}

/// Not a test of its own: what the next test starts in a process that it then kills.
#[test]
fn writer() {
    let Ok(dir) = std::env::var(WRITER) else { return };
    let store = RedbStore::open(Path::new(&dir)).expect("a store");
    let mut stdout = std::io::stdout();
    for number in 0.. {
        let revision = store
            .confirm_config(&"x".repeat(number % 50_000), "writer", "test")
            .expect("kept")
            .revision;
        store.set_drain(&drain(number), true).expect("kept");
        writeln!(stdout, "ack {revision} {number}").expect("heard");
        stdout.flush().expect("heard");
    }
}

#[test]
fn every_acknowledged_change_survives_kill_9_in_the_middle_of_writing() {
    let dir = Scratch::new("kill");
    let mut next = 0;
    for round in 0..5_u64 {
        let mut child = Command::new(std::env::current_exe().expect("this test"))
            .args(["--exact", "writer", "--nocapture"])
            .env(WRITER, &dir.0)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("started");
        let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
        let (mut revision, mut drained) = (0_u64, None);
        let mut heard = |line: String| {
            // The test harness writes its own words before the first line.
            let Some((_, ack)) = line.split_once("ack ") else {
                return false;
            };
            let (number, at) = ack.split_once(' ').expect("two numbers");
            revision = number.parse().expect("a number");
            drained = Some(at.parse::<usize>().expect("a number"));
            true
        };
        let mut acks = 0;
        while acks < 10 {
            acks += u32::from(heard(lines.next().expect("still writing").expect("a line")));
        }
        std::thread::sleep(Duration::from_millis(round * 7));
        child.kill().expect("killed");
        // What it said before the end counts too.
        for line in lines.map_while(Result::ok) {
            heard(line);
        }
        child.wait().expect("reaped");
        let store = RedbStore::open(&dir.0).expect("it opens after a kill");
        let confirmed = store.confirmed().expect("readable").expect("there").revision;
        assert!(
            confirmed == revision || confirmed == revision + 1,
            "acknowledged {revision}, found {confirmed}"
        );
        assert!(revision > next, "it goes on where it was");
        next = confirmed;
        let drains = store.drains().expect("readable");
        (0..=drained.expect("acknowledged"))
            .for_each(|number| assert!(drains.contains(&drain(number)), "drain {number}"));
    }
}

struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let dir = std::env::temp_dir().join(format!("edged-store-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(&dir).expect("a directory");
        Self(dir)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}
