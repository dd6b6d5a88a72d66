//! The last known objects on disk, as a Kubernetes `List` in JSON, so that a daemon starts with no API.

use std::{
    collections::BTreeMap,
    fmt,
    fs::File,
    io::{self, BufReader, BufWriter, Read, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use serde::{
    Deserializer,
    de::{DeserializeSeed, IgnoredAny, MapAccess, SeqAccess, Visitor},
};
use serde_json::Value;

/// The largest copy that is read or written, in bytes: far above 10,000 Services with 100,000 endpoints.
pub const MAX_COPY_BYTES: u64 = 256 << 20;

/// Kind, namespace (empty for cluster-scoped kinds) and name of a kept object.
pub type Key = (&'static str, Arc<str>, Arc<str>);

/// Objects as JSON text, and the file that they are copied to.
#[derive(Debug)]
pub struct DiskCopy {
    path: PathBuf,
    objects: BTreeMap<Key, Arc<str>>,
}

impl DiskCopy {
    /// An empty copy that will be written to a file.
    pub fn new(path: PathBuf) -> Self {
        Self { path, objects: BTreeMap::new() }
    }

    /// Reads the file, one object at a time. A file that isn't there has no objects.
    ///
    /// # Errors
    /// A file that can't be read, is too large or is no JSON list; objects read before the fault were passed on.
    pub fn read(path: &Path, mut each: impl FnMut(Value)) -> io::Result<()> {
        let file = match File::open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error),
        };
        let size = file.metadata()?.len();
        if size > MAX_COPY_BYTES {
            return Err(io::Error::other(format!("{size} bytes, the limit is {MAX_COPY_BYTES}")));
        }
        let mut reader = serde_json::Deserializer::from_reader(BufReader::new(file.take(MAX_COPY_BYTES)));
        reader.deserialize_map(List(&mut each)).and_then(|()| reader.end()).map_err(io::Error::other)
    }

    /// Keeps an object's text. Returns whether it is new or differs.
    pub fn put(&mut self, key: Key, text: String) -> bool {
        if self.objects.get(&key).is_some_and(|known| **known == *text) {
            return false;
        }
        self.objects.insert(key, text.into());
        true
    }

    /// Forgets an object. Returns whether it was there.
    pub fn remove(&mut self, key: &Key) -> bool {
        self.objects.remove(key).is_some()
    }

    /// The kept keys.
    pub fn keys(&self) -> impl Iterator<Item = &Key> {
        self.objects.keys()
    }

    /// The work of writing the present state: to a new file that replaces the old one whole. To be run where blocking is allowed.
    pub fn writing(&self) -> impl FnOnce() -> io::Result<()> + Send + 'static {
        let objects: Vec<Arc<str>> = self.objects.values().cloned().collect();
        let path = self.path.clone();
        move || write(&path, &objects)
    }
}

fn write(path: &Path, objects: &[Arc<str>]) -> io::Result<()> {
    let size: u64 = objects.iter().map(|text| text.len() as u64 + 2).sum();
    if size > MAX_COPY_BYTES - 1024 {
        return Err(io::Error::other(format!("{size} bytes, the limit is {MAX_COPY_BYTES}")));
    }
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    std::fs::create_dir_all(folder)?;
    let new = path.with_extension("new");
    let file = File::options().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
    let mut out = BufWriter::new(file);
    out.write_all(b"{\"apiVersion\":\"v1\",\"kind\":\"List\",\"items\":[")?;
    for (i, text) in objects.iter().enumerate() {
        out.write_all(if i == 0 { b"\n" } else { b",\n" })?;
        out.write_all(text.as_bytes())?;
    }
    out.write_all(b"\n]}\n")?;
    out.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()?;
    std::fs::rename(&new, path)?;
    File::open(folder)?.sync_all()
}

/// Reads the `items` of a list one by one, so that the whole is never in memory twice.
struct List<'a>(&'a mut dyn FnMut(Value));

impl<'de> Visitor<'de> for List<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of objects")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(key) = map.next_key::<String>()? {
            if key == "items" {
                map.next_value_seed(Items(self.0))?;
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        Ok(())
    }
}

struct Items<'a>(&'a mut dyn FnMut(Value));

impl<'de> DeserializeSeed<'de> for Items<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for Items<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("objects")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<(), A::Error> {
        while let Some(object) = items.next_element()? {
            (self.0)(object);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn key(name: &str) -> Key {
        ("Service", "default".into(), name.into())
    }

    #[test]
    fn what_was_written_is_read_back_and_equal_objects_are_no_change() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sub/catalog.json");
        let mut copy = DiskCopy::new(path.clone());
        assert!(copy.put(key("a"), json!({"kind": "Service", "n": 1}).to_string()));
        assert!(!copy.put(key("a"), json!({"kind": "Service", "n": 1}).to_string()));
        assert!(copy.put(key("b"), json!({"kind": "Service", "n": 2}).to_string()));
        copy.writing()().unwrap();
        assert!(copy.remove(&key("a")));
        copy.writing()().unwrap();
        let mut read = Vec::new();
        DiskCopy::read(&path, |object| read.push(object)).unwrap();
        assert_eq!(read, [json!({"kind": "Service", "n": 2})]);
    }

    #[test]
    fn a_missing_file_is_empty_and_a_damaged_one_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("catalog.json");
        DiskCopy::read(&path, |_| panic!("nothing to read")).unwrap();
        for damaged in ["", "{\"items\":[{\"a\":1},", "[]", "\0\0\0", "{\"items\":5}", "{}x"] {
            std::fs::write(&path, damaged).unwrap();
            assert!(DiskCopy::read(&path, drop).is_err(), "{damaged:?}");
        }
    }
}
