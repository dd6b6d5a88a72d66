//! The durable object store with Kubernetes semantics.
//!
//! One thread owns the SQLite file and runs all writes in order, in groups that share a commit; a write returns when it is on
//! disk. Readers never touch the file: the committed objects are in memory, and each list or watch sees one state of them.

mod allocate;
mod database;
mod definition;
mod delete;
mod list;
mod maintenance;
mod options;
mod replica;
mod selector;
mod state;
mod transaction;
mod watch;
mod write;
mod writer;

use std::{path::Path, sync::Arc};

use edgemesh_api::{ObjectKey, ResourceName};
use parking_lot::RwLock;
use serde_json::{Value, json};

pub(crate) use definition::definitions;
pub use options::{
    DeleteOptions, DeleteOutcome, EventKind, ListOptions, ListPage, Mode, OutboxEntry, Propagation, ReplicaChange,
    ReplicaVersion, StoreOptions, WatchEvent, WatchOptions, WriteOp,
};
pub use watch::WatchStream;
pub use write::{Part, Written};

use crate::{
    context::RequestContext,
    error::ApiError,
    fields,
    kinds::{KindInfo, Registry},
};
use database::Database;
use state::{State, Stored};
use writer::Writer;

/// Namespaces that every cluster has.
const INITIAL_NAMESPACES: [&str; 4] = ["default", "kube-node-lease", "kube-public", "kube-system"];

/// What all handles, the writer and the watches share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) mode: Mode,
    pub(crate) options: StoreOptions,
    pub(crate) registry: RwLock<Registry>,
    pub(crate) state: RwLock<State>,
    /// The sequence number of the latest outbox entry.
    pub(crate) outbox: tokio::sync::watch::Sender<u64>,
}

/// A handle to the store; clones are cheap and refer to the same store.
#[derive(Debug, Clone)]
pub struct Store {
    shared: Arc<Shared>,
    writer: Writer,
}

impl Store {
    /// Opens or creates the store at `path`. An authoritative store gets the namespaces that every cluster has.
    ///
    /// # Errors
    /// When the file can't be opened, is of another layout or is damaged.
    pub async fn open(path: &Path, mode: Mode, options: StoreOptions) -> Result<Self, ApiError> {
        let path = path.to_owned();
        let bootstrap = mode == Mode::Authoritative;
        let open = move || {
            let database = Database::open(&path, options.page_cache_kib).map_err(ApiError::internal)?;
            let mut state = State::new(database.resource_version().map_err(ApiError::internal)?, options.history);
            let mut registry = Registry::built_in();
            let mut definitions = Vec::new();
            database
                .load(|row| {
                    let object = Arc::new(row.object);
                    if definition::is_definition(&row.key.resource) {
                        definitions.push(object.clone());
                    }
                    let origin_version = row.origin_version.map(Into::into);
                    let stored = Stored { object, origin_version };
                    state.set(&row.key.resource, (row.key.namespace, row.key.name), Some(stored));
                })
                .map_err(ApiError::internal)?;
            for definition in definitions {
                registry = registry.with_crd(&definition);
            }
            let outbox = tokio::sync::watch::Sender::new(database.outbox_last().map_err(ApiError::internal)?);
            let shared =
                Arc::new(Shared { mode, options, registry: RwLock::new(registry), state: RwLock::new(state), outbox });
            let writer = Writer::start(shared.clone(), database).map_err(ApiError::internal)?;
            Ok::<_, ApiError>(Self { shared, writer })
        };
        let store = tokio::task::spawn_blocking(open).await.map_err(ApiError::internal)??;
        if bootstrap {
            store.create_initial_namespaces().await?;
        }
        Ok(store)
    }

    async fn create_initial_namespaces(&self) -> Result<(), ApiError> {
        let namespaces = ResourceName::new("", "v1", "namespaces");
        for name in INITIAL_NAMESPACES {
            let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}});
            match self.create(&namespaces, "", namespace, &RequestContext::system()).await {
                Err(error) if !error.is_already_exists() => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }

    /// Whose truth this is.
    pub fn mode(&self) -> &Mode {
        &self.shared.mode
    }

    /// The kinds that are served now.
    pub fn registry(&self) -> Registry {
        self.shared.registry.read().clone()
    }

    /// The kind that is served under this name.
    ///
    /// # Errors
    /// 404 when there is none.
    pub fn kind(&self, resource: &ResourceName) -> Result<Arc<KindInfo>, ApiError> {
        self.shared
            .registry
            .read()
            .lookup(&resource.group, &resource.version, &resource.plural)
            .ok_or_else(ApiError::no_such_path)
    }

    /// The store's present resource version.
    pub fn resource_version(&self) -> u64 {
        self.shared.state.read().rv
    }

    /// Reads one object.
    ///
    /// # Errors
    /// 404 when it or its kind isn't there.
    pub async fn get(&self, key: &ObjectKey) -> Result<Arc<Value>, ApiError> {
        self.read(key)
    }

    pub(crate) fn read(&self, key: &ObjectKey) -> Result<Arc<Value>, ApiError> {
        let info = self.kind(&key.resource)?;
        let state = self.shared.state.read();
        let stored = state.get(&write::storage_key(&info, key)).ok_or_else(|| ApiError::not_found(key))?;
        Ok(write::served(&info, &stored.object))
    }

    /// Lists objects.
    ///
    /// # Errors
    /// 400 for selectors that make no sense, 410 for a continue token that is too old, 504 for a version of the future.
    pub async fn list(&self, resource: &ResourceName, options: &ListOptions) -> Result<ListPage, ApiError> {
        self.read_list(resource, options)
    }

    pub(crate) fn read_list(&self, resource: &ResourceName, options: &ListOptions) -> Result<ListPage, ApiError> {
        list::list(&self.shared, &*self.kind(resource)?, options)
    }

    /// Watches objects.
    ///
    /// # Errors
    /// 400 for selectors that make no sense, 410 when `since` is older than what is remembered. The stream itself ends with
    /// 410 when its reader falls too far behind.
    pub fn watch(&self, resource: &ResourceName, options: &WatchOptions) -> Result<WatchStream, ApiError> {
        watch::watch(&self.shared, self.kind(resource)?, options)
    }

    /// Creates an object; `namespace` is empty for cluster-scoped kinds.
    ///
    /// # Errors
    /// 409 when the name is taken, 422 with the fields that are wrong, 404 or 403 for a missing or terminating namespace.
    pub async fn create(
        &self,
        resource: &ResourceName,
        namespace: &str,
        object: Value,
        context: &RequestContext,
    ) -> Result<Arc<Value>, ApiError> {
        Ok(self.create_written(resource, namespace, object, context).await?.object)
    }

    /// [`Store::create`] with the warnings that go with it.
    ///
    /// # Errors
    /// As [`Store::create`].
    pub async fn create_written(
        &self,
        resource: &ResourceName,
        namespace: &str,
        object: Value,
        context: &RequestContext,
    ) -> Result<Written, ApiError> {
        let (resource, namespace, context) = (resource.clone(), namespace.to_owned(), context.clone());
        self.writer
            .run(context.dry_run, move |transaction| {
                let info = transaction.kind(&resource)?;
                write::create(transaction, &info, &namespace, object, &context)
            })
            .await
    }

    /// Replaces an object, all but its status. A `metadata.resourceVersion` in it must be the present one.
    ///
    /// # Errors
    /// 404, 409 when the object changed since, 422 with the fields that are wrong.
    pub async fn update(
        &self,
        key: &ObjectKey,
        object: Value,
        context: &RequestContext,
    ) -> Result<Arc<Value>, ApiError> {
        Ok(self.modify(key, Part::Main, context, move |_, _| Ok(object)).await?.object)
    }

    /// Replaces an object's status.
    ///
    /// # Errors
    /// As [`Store::update`].
    pub async fn update_status(
        &self,
        key: &ObjectKey,
        object: Value,
        context: &RequestContext,
    ) -> Result<Arc<Value>, ApiError> {
        Ok(self.modify(key, Part::Status, context, move |_, _| Ok(object)).await?.object)
    }

    /// Changes a part of an object by a function of its present state, without a race.
    ///
    /// # Errors
    /// As [`Store::update`], and what the function returns.
    pub async fn modify<F>(
        &self,
        key: &ObjectKey,
        part: Part,
        context: &RequestContext,
        change: F,
    ) -> Result<Written, ApiError>
    where
        F: FnOnce(&KindInfo, &Arc<Value>) -> Result<Value, ApiError> + Send + 'static,
    {
        let (key, context) = (key.clone(), context.clone());
        self.writer
            .run(context.dry_run, move |transaction| {
                let info = transaction.kind(&key.resource)?;
                write::modify(transaction, &info, &key, part, change, &context)
            })
            .await
    }

    /// Binds a pod to a node, with annotations to add.
    ///
    /// # Errors
    /// 404, 409 when it is bound already or being deleted.
    pub async fn bind(
        &self,
        pod: &ObjectKey,
        node: &str,
        annotations: Option<Value>,
        context: &RequestContext,
    ) -> Result<(), ApiError> {
        let (key, node) = (pod.clone(), node.to_owned());
        self.writer
            .run(context.dry_run, move |transaction| {
                let info = transaction.kind(&key.resource)?;
                write::bind(transaction, &info, &key, &node, annotations.as_ref())
            })
            .await
    }

    /// Deletes an object, or starts to when it has a grace period or finalizers.
    ///
    /// # Errors
    /// 404, 409 when a precondition fails.
    pub async fn delete(
        &self,
        key: &ObjectKey,
        options: DeleteOptions,
        context: &RequestContext,
    ) -> Result<DeleteOutcome, ApiError> {
        let key = key.clone();
        self.writer
            .run(context.dry_run, move |transaction| {
                let info = transaction.kind(&key.resource)?;
                delete::delete(transaction, &info, &key, &options)
            })
            .await
    }

    /// Takes over changes from the cloud, all or none of them. Returns when they are on disk.
    ///
    /// # Errors
    /// When the store is not a replica, or the disk fails.
    pub async fn apply_replica(&self, changes: Vec<ReplicaChange>) -> Result<(), ApiError> {
        let Mode::Replica { node } = self.shared.mode.clone() else {
            return Err(ApiError::internal("only a replica takes changes from elsewhere"));
        };
        self.writer.run(false, move |transaction| replica::apply(transaction, &node, changes)).await
    }

    /// Every object that came from the cloud and is here.
    ///
    /// # Errors
    /// None at present; the signature leaves room for reading from disk.
    pub async fn replica_versions(&self) -> Result<Vec<ReplicaVersion>, ApiError> {
        let state = self.shared.state.read();
        let mut versions = Vec::new();
        for table in state.tables() {
            for ((namespace, name), stored) in &table.objects {
                if let Some(origin_version) = &stored.origin_version {
                    let mut resource = table.resource.clone();
                    if let Some(version) = fields::text(&stored.object, &["apiVersion"]).rsplit('/').next()
                        && !version.is_empty()
                    {
                        resource.version = version.to_owned();
                    }
                    versions.push(ReplicaVersion {
                        key: ObjectKey::new(resource, namespace.clone(), name.clone()),
                        uid: fields::meta(&stored.object, "uid").to_owned(),
                        origin_version: origin_version.to_string(),
                    });
                }
            }
        }
        Ok(versions)
    }

    /// Local writes that the hub doesn't know, after sequence number `after`, oldest first.
    ///
    /// # Errors
    /// When the disk fails.
    pub async fn outbox_pending(&self, after: u64, limit: usize) -> Result<Vec<OutboxEntry>, ApiError> {
        self.writer
            .run(false, move |transaction| {
                transaction.database.outbox_pending(after, limit).map_err(ApiError::internal)
            })
            .await
    }

    /// The hub took the entry, or will never take it.
    ///
    /// # Errors
    /// When the disk fails.
    pub async fn outbox_done(&self, seq: u64) -> Result<(), ApiError> {
        self.writer
            .run(false, move |transaction| transaction.database.outbox_done(seq).map_err(ApiError::internal))
            .await
    }

    /// The sequence number of the latest outbox entry; changes when one is appended.
    pub fn outbox_watch(&self) -> tokio::sync::watch::Receiver<u64> {
        self.shared.outbox.subscribe()
    }
}
