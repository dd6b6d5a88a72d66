//! The SQLite file: its schema and the statements on it.

use std::path::Path;

use edgemesh_api::{ObjectKey, ResourceName};
use rusqlite::{Connection, OptionalExtension, params};
use serde_json::Value;

use super::options::{OutboxEntry, WriteOp};

/// The layout that this build reads and writes.
const SCHEMA_VERSION: i64 = 1;

/// One object's row.
pub(crate) struct Row {
    pub(crate) key: ObjectKey,
    pub(crate) origin_version: Option<String>,
    pub(crate) object: Value,
}

/// The open database. It lives on the writer's thread.
#[derive(Debug)]
pub(crate) struct Database {
    connection: Connection,
}

/// What goes wrong with the file.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DatabaseError {
    #[error("store: {0}")]
    Sqlite(#[from] rusqlite::Error),
    #[error("store: object {key} is not JSON: {error}")]
    Corrupt { key: Box<ObjectKey>, error: serde_json::Error },
    #[error("store: an object can't be written as JSON: {0}")]
    Encode(serde_json::Error),
    #[error("store: the file has layout {0}, this build knows {SCHEMA_VERSION}")]
    Layout(i64),
}

impl Database {
    /// Opens or creates the file. Every commit is on disk before it returns.
    pub(crate) fn open(path: &Path, page_cache_kib: u32) -> Result<Self, DatabaseError> {
        let connection = Connection::open(path)?;
        connection.busy_timeout(std::time::Duration::from_secs(5))?;
        connection.pragma_update(None, "journal_mode", "WAL")?;
        connection.pragma_update(None, "synchronous", "FULL")?;
        connection.pragma_update(None, "cache_size", -i64::from(page_cache_kib))?;
        connection.pragma_update(None, "wal_autocheckpoint", 512)?;
        connection.pragma_update(None, "journal_size_limit", 4 << 20)?;
        let layout: i64 = connection.pragma_query_value(None, "user_version", |row| row.get(0))?;
        match layout {
            SCHEMA_VERSION => {}
            0 => connection.execute_batch(&format!(
                "BEGIN;
                 CREATE TABLE objects (
                     grp TEXT NOT NULL, plural TEXT NOT NULL, namespace TEXT NOT NULL, name TEXT NOT NULL,
                     version TEXT NOT NULL, uid TEXT NOT NULL, rv INTEGER NOT NULL, origin_version TEXT, object TEXT NOT NULL,
                     PRIMARY KEY (grp, plural, namespace, name));
                 CREATE TABLE counters (name TEXT PRIMARY KEY, value INTEGER NOT NULL);
                 INSERT INTO counters VALUES ('rv', 1);
                 CREATE TABLE outbox (
                     seq INTEGER PRIMARY KEY AUTOINCREMENT, op TEXT NOT NULL,
                     grp TEXT NOT NULL, version TEXT NOT NULL, plural TEXT NOT NULL, namespace TEXT NOT NULL, name TEXT NOT NULL,
                     uid TEXT NOT NULL, object TEXT NOT NULL);
                 CREATE INDEX outbox_object ON outbox (grp, plural, namespace, name);
                 PRAGMA user_version = {SCHEMA_VERSION};
                 COMMIT;"
            ))?,
            other => return Err(DatabaseError::Layout(other)),
        }
        Ok(Self { connection })
    }

    /// The last resource version that was given out.
    pub(crate) fn resource_version(&self) -> Result<u64, DatabaseError> {
        Ok(self.connection.query_row("SELECT value FROM counters WHERE name = 'rv'", [], |row| unsigned(row, 0))?)
    }

    /// Every object.
    pub(crate) fn load(&self, mut each: impl FnMut(Row)) -> Result<(), DatabaseError> {
        let mut statement = self
            .connection
            .prepare("SELECT grp, version, plural, namespace, name, origin_version, object FROM objects")?;
        let mut rows = statement.query([])?;
        while let Some(row) = rows.next()? {
            let key = key_at(row, 0)?;
            let text = row.get_ref(6)?.as_str().map_err(rusqlite::Error::from)?;
            match serde_json::from_str(text) {
                Ok(object) => each(Row { key, origin_version: row.get(5)?, object }),
                Err(error) => return Err(DatabaseError::Corrupt { key: Box::new(key), error }),
            }
        }
        Ok(())
    }

    pub(crate) fn begin(&self) -> Result<(), DatabaseError> {
        Ok(self.connection.execute_batch("BEGIN IMMEDIATE")?)
    }

    pub(crate) fn commit(&self, rv: u64) -> Result<(), DatabaseError> {
        self.connection.prepare_cached("UPDATE counters SET value = ?1 WHERE name = 'rv'")?.execute([signed(rv)])?;
        Ok(self.connection.execute_batch("COMMIT")?)
    }

    pub(crate) fn rollback(&self) -> Result<(), DatabaseError> {
        Ok(self.connection.execute_batch("ROLLBACK")?)
    }

    pub(crate) fn savepoint(&self) -> Result<(), DatabaseError> {
        self.connection.prepare_cached("SAVEPOINT op")?.execute([])?;
        Ok(())
    }

    pub(crate) fn release(&self) -> Result<(), DatabaseError> {
        self.connection.prepare_cached("RELEASE op")?.execute([])?;
        Ok(())
    }

    pub(crate) fn undo(&self) -> Result<(), DatabaseError> {
        self.connection.prepare_cached("ROLLBACK TO op")?.execute([])?;
        self.release()
    }

    pub(crate) fn put(
        &self,
        key: &ObjectKey,
        uid: &str,
        rv: u64,
        origin_version: Option<&str>,
        object: &Value,
    ) -> Result<(), DatabaseError> {
        self.connection
            .prepare_cached(
                "INSERT INTO objects (grp, plural, namespace, name, version, uid, rv, origin_version, object)
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9)
                 ON CONFLICT (grp, plural, namespace, name) DO UPDATE SET version = excluded.version, uid = excluded.uid,
                     rv = excluded.rv, origin_version = excluded.origin_version, object = excluded.object",
            )?
            .execute(params![
                key.resource.group,
                key.resource.plural,
                key.namespace,
                key.name,
                key.resource.version,
                uid,
                signed(rv),
                origin_version,
                encode(object)?,
            ])?;
        Ok(())
    }

    /// Notes the cloud's version of an object that is otherwise what it was.
    pub(crate) fn set_origin(&self, key: &ObjectKey, origin_version: &str) -> Result<(), DatabaseError> {
        self.connection
            .prepare_cached(
                "UPDATE objects SET origin_version = ?5 WHERE grp = ?1 AND plural = ?2 AND namespace = ?3 AND name = ?4",
            )?
            .execute(params![key.resource.group, key.resource.plural, key.namespace, key.name, origin_version])?;
        Ok(())
    }

    pub(crate) fn remove(&self, key: &ObjectKey) -> Result<(), DatabaseError> {
        self.connection
            .prepare_cached("DELETE FROM objects WHERE grp = ?1 AND plural = ?2 AND namespace = ?3 AND name = ?4")?
            .execute(params![key.resource.group, key.resource.plural, key.namespace, key.name])?;
        Ok(())
    }

    /// Appends a local write; returns its sequence number.
    pub(crate) fn outbox_append(
        &self,
        op: WriteOp,
        key: &ObjectKey,
        uid: &str,
        object: &Value,
    ) -> Result<u64, DatabaseError> {
        self.connection
            .prepare_cached(
                "INSERT INTO outbox (op, grp, version, plural, namespace, name, uid, object)
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)",
            )?
            .execute(params![
                op.as_str(),
                key.resource.group,
                key.resource.version,
                key.resource.plural,
                key.namespace,
                key.name,
                uid,
                encode(object)?,
            ])?;
        Ok(self.connection.last_insert_rowid().unsigned_abs())
    }

    /// Forgets the pending writes of one kind to an object: a newer one says it all.
    pub(crate) fn outbox_drop(&self, op: WriteOp, key: &ObjectKey) -> Result<(), DatabaseError> {
        self.connection
            .prepare_cached(
                "DELETE FROM outbox WHERE op = ?1 AND grp = ?2 AND plural = ?3 AND namespace = ?4 AND name = ?5",
            )?
            .execute(params![op.as_str(), key.resource.group, key.resource.plural, key.namespace, key.name])?;
        Ok(())
    }

    pub(crate) fn outbox_done(&self, seq: u64) -> Result<(), DatabaseError> {
        self.connection.prepare_cached("DELETE FROM outbox WHERE seq = ?1")?.execute([signed(seq)])?;
        Ok(())
    }

    pub(crate) fn outbox_pending(&self, after: u64, limit: usize) -> Result<Vec<OutboxEntry>, DatabaseError> {
        let mut statement = self.connection.prepare_cached(
            "SELECT grp, version, plural, namespace, name, seq, op, uid, object FROM outbox
             WHERE seq > ?1 ORDER BY seq LIMIT ?2",
        )?;
        let mut rows = statement.query(params![signed(after), i64::try_from(limit).unwrap_or(i64::MAX)])?;
        let mut entries = Vec::new();
        while let Some(row) = rows.next()? {
            let key = key_at(row, 0)?;
            let text = row.get_ref(8)?.as_str().map_err(rusqlite::Error::from)?;
            let object = serde_json::from_str(text)
                .map_err(|error| DatabaseError::Corrupt { key: Box::new(key.clone()), error })?;
            let op = WriteOp::parse(row.get_ref(6)?.as_str().map_err(rusqlite::Error::from)?);
            entries.push(OutboxEntry { seq: unsigned(row, 5)?, op, key, uid: row.get(7)?, object });
        }
        Ok(entries)
    }

    /// The kinds of pending writes to an object, with the uid that each was made to.
    pub(crate) fn outbox_of(&self, key: &ObjectKey) -> Result<Vec<(WriteOp, String)>, DatabaseError> {
        let mut statement = self.connection.prepare_cached(
            "SELECT op, uid FROM outbox WHERE grp = ?1 AND plural = ?2 AND namespace = ?3 AND name = ?4 ORDER BY seq",
        )?;
        let rows = statement
            .query_map(params![key.resource.group, key.resource.plural, key.namespace, key.name], |row| {
                Ok((WriteOp::parse(row.get_ref(0)?.as_str()?), row.get(1)?))
            })?;
        Ok(rows.collect::<Result<_, _>>()?)
    }

    /// The highest sequence number in the outbox; 0 when it is empty.
    pub(crate) fn outbox_last(&self) -> Result<u64, DatabaseError> {
        let last: Option<Option<i64>> =
            self.connection.query_row("SELECT max(seq) FROM outbox", [], |row| row.get(0)).optional()?;
        Ok(last.flatten().unwrap_or(0).unsigned_abs())
    }

    /// Keeps only the newest `keep` pending creations of a resource.
    pub(crate) fn outbox_trim(&self, resource: &ResourceName, keep: usize) -> Result<(), DatabaseError> {
        self.connection
            .prepare_cached(
                "DELETE FROM outbox WHERE seq IN (SELECT seq FROM outbox WHERE grp = ?1 AND plural = ?2
                 ORDER BY seq DESC LIMIT -1 OFFSET ?3)",
            )?
            .execute(params![resource.group, resource.plural, i64::try_from(keep).unwrap_or(i64::MAX)])?;
        Ok(())
    }
}

fn encode(object: &Value) -> Result<String, DatabaseError> {
    serde_json::to_string(object).map_err(DatabaseError::Encode)
}

fn key_at(row: &rusqlite::Row<'_>, first: usize) -> Result<ObjectKey, rusqlite::Error> {
    let text = |i: usize| row.get::<_, String>(first + i);
    Ok(ObjectKey::new(ResourceName::new(text(0)?, text(1)?, text(2)?), text(3)?, text(4)?))
}

fn unsigned(row: &rusqlite::Row<'_>, index: usize) -> Result<u64, rusqlite::Error> {
    Ok(row.get::<_, i64>(index)?.unsigned_abs())
}

/// SQLite's integers are signed; our counters never come near the limit.
fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

impl WriteOp {
    fn as_str(self) -> &'static str {
        match self {
            Self::Create => "create",
            Self::Update => "update",
            Self::UpdateStatus => "update-status",
            Self::Delete => "delete",
        }
    }

    fn parse(text: &str) -> Self {
        match text {
            "create" => Self::Create,
            "update" => Self::Update,
            "delete" => Self::Delete,
            _ => Self::UpdateStatus,
        }
    }
}
