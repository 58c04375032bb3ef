//! What must outlive the daemon: confirmed configurations and drains. Counters and health never come here.
//!
//! Every change is on the disk before its method returns, so that what was acknowledged survives a power cut.
//! A file that cannot be trusted is never replaced in silence: the error says how to move it aside.

use std::{
    fs::{DirBuilder, OpenOptions},
    io,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt},
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    time::SystemTime,
};

use dns64::zone::{Change, Durable, Key, Memory, Owner};
use lb::io::Drain;
use redb::{Database, DatabaseError, Durability, ReadableDatabase, ReadableTable, StorageError, TableDefinition};
use serde::{Deserialize, Serialize};

use crate::api::Revision;

/// Confirmed configurations that are kept; older ones go when a newer one comes.
pub const KEPT_REVISIONS: usize = 100;
/// The tables' version. A store of a later one is refused: a downgrade must not misread it.
const SCHEMA: u64 = 1;
const FILE: &str = "store.redb";

const META: TableDefinition<&str, u64> = TableDefinition::new("meta");
const CONFIGS: TableDefinition<u64, &[u8]> = TableDefinition::new("configs");
const DRAINS: TableDefinition<(&str, &str), ()> = TableDefinition::new("drains");
/// By zone and node, the node's records.
const NODES: TableDefinition<(&str, &str), &[u8]> = TableDefinition::new("dns-nodes");
/// By zone and origin of the zone or of one of its reverse zones.
const SERIALS: TableDefinition<(&str, &str), u32> = TableDefinition::new("dns-serials");
/// By zone and key, when its last change was signed.
const SIGNED: TableDefinition<(&str, &str), u64> = TableDefinition::new("dns-signed");
/// By name, the keys of nodes.
const KEYS: TableDefinition<&str, &[u8]> = TableDefinition::new("dns-keys");

/// What the supervisor keeps across restarts. All methods block until the disk has it.
pub trait Store: Send {
    /// Keeps `text` as the newest confirmed configuration and returns it with its number.
    ///
    /// # Errors
    ///
    /// [`StoreError`]; nothing was kept then.
    fn confirm_config(&self, text: &str, author: &str, origin: &str) -> Result<Revision, StoreError>;

    /// The newest confirmed configuration; `None` before the first.
    ///
    /// # Errors
    ///
    /// [`StoreError`]
    fn confirmed(&self) -> Result<Option<Revision>, StoreError>;

    /// Every kept configuration, newest first. `running` is false in all of them: only the supervisor knows.
    ///
    /// # Errors
    ///
    /// [`StoreError`]
    fn history(&self) -> Result<Vec<Revision>, StoreError>;

    /// The configuration with this number, if it is still kept.
    ///
    /// # Errors
    ///
    /// [`StoreError`]
    fn revision(&self, revision: u64) -> Result<Option<Revision>, StoreError>;

    /// Every drain that was set and not taken back.
    ///
    /// # Errors
    ///
    /// [`StoreError`]
    fn drains(&self) -> Result<Vec<Drain>, StoreError>;

    /// Sets a drain or takes it back; doing so twice is no error.
    ///
    /// # Errors
    ///
    /// [`StoreError`]; nothing was changed then.
    fn set_drain(&self, drain: &Drain, set: bool) -> Result<(), StoreError>;

    /// What nodes registered, and their keys.
    ///
    /// # Errors
    ///
    /// [`StoreError`]
    fn dns64(&self) -> Result<Memory, StoreError>;

    /// Keeps a node's records or key, or forgets them.
    ///
    /// # Errors
    ///
    /// [`StoreError`]; nothing was changed then.
    fn keep_dns64(&self, durable: &Durable) -> Result<(), StoreError>;
}

/// What can be wrong with the store, by what can be done about it.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The directory or the file cannot be used.
    #[error(
        "the state directory {dir} cannot be used, so nothing could be kept across a restart; check its owner, mode and free space: ls -ld {dir}; df {dir}"
    )]
    Access {
        /// The state directory.
        dir: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Another process has it.
    #[error("{path} is in use by another process; only one edged can run on a state directory: systemctl status edged")]
    InUse {
        /// The store's file.
        path: PathBuf,
    },
    /// Its content cannot be trusted.
    #[error(
        "{path} is damaged ({detail}); confirmed configurations and drains in it are not read, and the file is left as it is\n\
         to start without them, move it aside: mv {path} {path}.damaged"
    )]
    Damaged {
        /// The store's file.
        path: PathBuf,
        /// What the check found.
        detail: String,
    },
    /// A later release wrote it.
    #[error(
        "{path} was written by a later release (store version {found}, this release reads up to {known}); \
         install that release again, or move the file aside to start without its content: mv {path} {path}.later"
    )]
    Later {
        /// The store's file.
        path: PathBuf,
        /// Its version.
        found: u64,
        /// The latest version this release reads.
        known: u64,
    },
    /// The disk refused.
    #[error("{path} cannot be read or written; the change was not made; check the disk: df {path}; dmesg | tail")]
    Disk {
        /// The store's file.
        path: PathBuf,
        /// Why.
        #[source]
        source: redb::Error,
    },
}

/// The [`Store`] in one file of the state directory.
#[derive(Debug)]
pub struct RedbStore {
    database: Database,
    path: PathBuf,
}

/// A [`Revision`] as it lies on the disk.
#[derive(Serialize, Deserialize)]
struct Row {
    at: String,
    author: String,
    origin: String,
    text: String,
}

impl RedbStore {
    /// Opens `dir`/store.redb, making the directory (mode 0700) and the file (0600) if they are missing.
    ///
    /// The whole file is verified first: it is small, and a damaged one has to be found now and not in the middle of
    /// a change.
    ///
    /// # Errors
    ///
    /// [`StoreError`]; an existing file is never replaced.
    pub fn open(dir: &Path) -> Result<Self, StoreError> {
        let access = |source| StoreError::Access {
            dir: dir.to_owned(),
            source,
        };
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .map_err(access)?;
        narrow(dir, 0o700).map_err(access)?;
        let path = dir.join(FILE);
        // Made before redb opens it, so that it never exists with a wider mode.
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(access)?;
        narrow(&path, 0o600).map_err(access)?;
        drop(file);
        let damaged = |detail: String| StoreError::Damaged {
            path: path.clone(),
            detail,
        };
        // redb promises an error for a file altered by others; should it panic all the same, that is the same finding.
        let opened = catch_unwind(AssertUnwindSafe(|| {
            Database::builder()
                .set_cache_size(4 << 20)
                .set_check_integrity_on_open(true)
                .create(&path)
        }));
        let database = match opened {
            Ok(Ok(database)) => database,
            Ok(Err(DatabaseError::DatabaseAlreadyOpen)) => return Err(StoreError::InUse { path }),
            Ok(Err(DatabaseError::Storage(StorageError::Corrupted(detail)))) => return Err(damaged(detail)),
            Ok(Err(DatabaseError::Storage(StorageError::Io(error)))) if error.kind() == io::ErrorKind::InvalidData => {
                return Err(damaged(error.to_string()));
            }
            Ok(Err(DatabaseError::UpgradeRequired(format))) => return Err(damaged(format!("file format {format}"))),
            Ok(Err(error)) => {
                return Err(StoreError::Disk {
                    path,
                    source: error.into(),
                });
            }
            Err(_) => return Err(damaged("its structure makes no sense".into())),
        };
        let store = Self { database, path };
        store.prepare()?;
        Ok(store)
    }

    /// The store's file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Checks the version, and makes the tables of a new file.
    fn prepare(&self) -> Result<(), StoreError> {
        let found = self.read(|transaction| match transaction.open_table(META) {
            Ok(meta) => Ok(meta.get("schema")?.map(|value| value.value())),
            Err(redb::TableError::TableDoesNotExist(_)) => Ok(None),
            Err(error) => Err(error.into()),
        })?;
        match found {
            Some(found) if found > SCHEMA => Err(StoreError::Later {
                path: self.path.clone(),
                found,
                known: SCHEMA,
            }),
            // Tables that a release before this one did not know are made now.
            _ => self.write(|transaction| {
                transaction.open_table(META)?.insert("schema", SCHEMA)?;
                transaction.open_table(CONFIGS)?;
                transaction.open_table(DRAINS)?;
                transaction.open_table(NODES)?;
                transaction.open_table(SERIALS)?;
                transaction.open_table(SIGNED)?;
                transaction.open_table(KEYS)?;
                Ok(())
            }),
        }
    }

    fn write<T>(
        &self,
        change: impl FnOnce(&redb::WriteTransaction) -> Result<T, redb::Error>,
    ) -> Result<T, StoreError> {
        let run = || {
            let mut transaction = self.database.begin_write()?;
            transaction.set_durability(Durability::Immediate)?;
            let value = change(&transaction)?;
            transaction.commit()?;
            Ok(value)
        };
        run().map_err(|error| self.error(error))
    }

    fn read<T>(&self, query: impl FnOnce(&redb::ReadTransaction) -> Result<T, redb::Error>) -> Result<T, StoreError> {
        let run = || query(&self.database.begin_read()?);
        run().map_err(|error| self.error(error))
    }

    fn error(&self, error: redb::Error) -> StoreError {
        let path = self.path.clone();
        match error {
            redb::Error::Corrupted(detail) => StoreError::Damaged { path, detail },
            source => StoreError::Disk { path, source },
        }
    }
}

impl Store for RedbStore {
    fn confirm_config(&self, text: &str, author: &str, origin: &str) -> Result<Revision, StoreError> {
        let at = humantime::format_rfc3339_seconds(SystemTime::now()).to_string();
        let row = Row {
            at,
            author: author.to_owned(),
            origin: origin.to_owned(),
            text: text.to_owned(),
        };
        let bytes = serde_json::to_vec(&row).map_err(|error| StoreError::Damaged {
            path: self.path.clone(),
            detail: error.to_string(),
        })?;
        let number = self.write(|transaction| {
            let mut configs = transaction.open_table(CONFIGS)?;
            let number = configs.last()?.map_or(0, |(key, _)| key.value()) + 1;
            configs.insert(number, bytes.as_slice())?;
            let oldest = number.saturating_sub(KEPT_REVISIONS as u64);
            configs.retain_in(..=oldest, |_, _| false)?;
            Ok(number)
        })?;
        Ok(row.revision(number))
    }

    fn confirmed(&self) -> Result<Option<Revision>, StoreError> {
        self.read(|transaction| {
            transaction
                .open_table(CONFIGS)?
                .last()?
                .map(|(key, value)| decode(key.value(), value.value()))
                .transpose()
        })
    }

    fn history(&self) -> Result<Vec<Revision>, StoreError> {
        self.read(|transaction| {
            let configs = transaction.open_table(CONFIGS)?;
            configs
                .iter()?
                .rev()
                .map(|entry| {
                    let (key, value) = entry?;
                    decode(key.value(), value.value())
                })
                .collect()
        })
    }

    fn revision(&self, revision: u64) -> Result<Option<Revision>, StoreError> {
        self.read(|transaction| {
            transaction
                .open_table(CONFIGS)?
                .get(revision)?
                .map(|value| decode(revision, value.value()))
                .transpose()
        })
    }

    fn drains(&self) -> Result<Vec<Drain>, StoreError> {
        self.read(|transaction| {
            let drains = transaction.open_table(DRAINS)?;
            drains
                .iter()?
                .map(|entry| {
                    let (key, _) = entry?;
                    let (frontend, backend) = key.value();
                    Ok(Drain {
                        frontend: frontend.to_owned(),
                        backend: backend.to_owned(),
                    })
                })
                .collect()
        })
    }

    fn set_drain(&self, drain: &Drain, set: bool) -> Result<(), StoreError> {
        self.write(|transaction| {
            let mut drains = transaction.open_table(DRAINS)?;
            let key = (drain.frontend.as_str(), drain.backend.as_str());
            if set {
                drains.insert(key, ())?;
            } else {
                drains.remove(key)?;
            }
            Ok(())
        })
    }

    fn dns64(&self) -> Result<Memory, StoreError> {
        self.read(|transaction| {
            let mut memory = Memory::default();
            for entry in transaction.open_table(NODES)?.iter()? {
                let (key, value) = entry?;
                let (zone, node) = key.value();
                let state = memory.zones.entry(owner(zone)?).or_default();
                state.nodes.insert(owner(node)?, json(node, value.value())?);
            }
            for entry in transaction.open_table(SERIALS)?.iter()? {
                let (key, value) = entry?;
                let (zone, origin) = key.value();
                let state = memory.zones.entry(owner(zone)?).or_default();
                state.serials.insert(owner(origin)?, value.value());
            }
            for entry in transaction.open_table(SIGNED)?.iter()? {
                let (key, value) = entry?;
                let (zone, name) = key.value();
                let state = memory.zones.entry(owner(zone)?).or_default();
                state.signed.insert(owner(name)?, value.value());
            }
            for entry in transaction.open_table(KEYS)?.iter()? {
                let (name, value) = entry?;
                let key = json(name.value(), value.value())?;
                let refused = |error| redb::Error::Corrupted(format!("key {}: {error}", name.value()));
                memory.keys.add(key).map_err(refused)?;
            }
            Ok(memory)
        })
    }

    fn keep_dns64(&self, durable: &Durable) -> Result<(), StoreError> {
        self.write(|transaction| match durable {
            Durable::Zone(change) => keep_change(transaction, change),
            Durable::Key(key) => {
                let value = bytes(key)?;
                let mut keys = transaction.open_table(KEYS)?;
                keys.insert(key.name.to_string().as_str(), value.as_slice())?;
                Ok(())
            }
            Durable::KeyRemoved { name, change } => {
                if let Some(change) = change {
                    keep_change(transaction, change)?;
                }
                let name = name.to_string();
                let mut keys = transaction.open_table(KEYS)?;
                let removed = keys.remove(name.as_str())?;
                let removed: Option<Key> = removed.map(|value| json(&name, value.value())).transpose()?;
                transaction.open_table(SIGNED)?.retain(|(_, key), _| key != name)?;
                let Some(Key { node, .. }) = removed else { return Ok(()) };
                for entry in keys.iter()? {
                    let (name, value) = entry?;
                    let other: Key = json(name.value(), value.value())?;
                    if other.node == node {
                        return Ok(());
                    }
                }
                // It was the node's last: nobody could remove its records later, also in zones that are not configured now.
                let node = node.to_string();
                transaction.open_table(NODES)?.retain(|(_, owner), _| owner != node)?;
                Ok(())
            }
        })
    }
}

fn keep_change(transaction: &redb::WriteTransaction, change: &Change) -> Result<(), redb::Error> {
    let (zone, node) = (change.zone.to_string(), change.node.to_string());
    let mut nodes = transaction.open_table(NODES)?;
    if change.records.is_empty() {
        nodes.remove((zone.as_str(), node.as_str()))?;
    } else {
        nodes.insert((zone.as_str(), node.as_str()), bytes(&change.records)?.as_slice())?;
    }
    let mut serials = transaction.open_table(SERIALS)?;
    for (origin, serial) in &change.serials {
        serials.insert((zone.as_str(), origin.to_string().as_str()), serial)?;
    }
    if let Some((key, time)) = &change.signed {
        let mut signed = transaction.open_table(SIGNED)?;
        signed.insert((zone.as_str(), key.to_string().as_str()), time)?;
    }
    Ok(())
}

fn bytes<T: Serialize>(value: &T) -> Result<Vec<u8>, redb::Error> {
    serde_json::to_vec(value).map_err(|error| redb::Error::Corrupted(error.to_string()))
}

fn json<T: for<'de> Deserialize<'de>>(name: &str, value: &[u8]) -> Result<T, redb::Error> {
    serde_json::from_slice(value).map_err(|error| redb::Error::Corrupted(format!("{name}: {error}")))
}

fn owner(text: &str) -> Result<Owner, redb::Error> {
    Owner::try_from(text.to_owned()).map_err(|error| redb::Error::Corrupted(format!("{text}: {error}")))
}

impl Row {
    fn revision(self, revision: u64) -> Revision {
        Revision {
            revision,
            at: self.at,
            author: self.author,
            origin: self.origin,
            running: false,
            text: self.text,
        }
    }
}

fn decode(number: u64, bytes: &[u8]) -> Result<Revision, redb::Error> {
    let row: Row = serde_json::from_slice(bytes)
        .map_err(|error| redb::Error::Corrupted(format!("configuration {number}: {error}")))?;
    Ok(row.revision(number))
}

/// Takes rights away from an existing file or directory; never adds any.
fn narrow(path: &Path, mode: u32) -> io::Result<()> {
    let mut permissions = std::fs::metadata(path)?.permissions();
    if permissions.mode() & 0o777 & !mode != 0 {
        permissions.set_mode(permissions.mode() & mode);
        std::fs::set_permissions(path, permissions)?;
    }
    Ok(())
}
