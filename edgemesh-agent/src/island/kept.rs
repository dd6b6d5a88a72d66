//! What is held of endpoints while the cloud is away, kept in a file: an agent that starts meanwhile would give connections to
//! dead ones until its own checks had found them again.

use std::{
    collections::BTreeMap,
    fs,
    io::{self, Write as _},
    net::{IpAddr, SocketAddr},
    path::PathBuf,
};

use edgemesh_mesh::Observed;
use serde::{Deserialize, Serialize};

/// The largest file that is read, in bytes: twice what as many endpoints take as are looked at.
const MAX_FILE_BYTES: u64 = 512 << 10;

/// The file.
#[derive(Debug, Clone)]
pub(super) struct Kept(PathBuf);

/// What is in it.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Content {
    endpoints: BTreeMap<SocketAddr, bool>,
    addresses: BTreeMap<IpAddr, bool>,
}

impl Kept {
    pub(super) fn at(path: PathBuf) -> Self {
        Self(path)
    }

    /// What an earlier run held when it ended; nothing if it was no island, or the file can't be used. Blocks on the disk.
    pub(super) fn read(&self) -> Observed {
        match self.content() {
            Ok(Content { endpoints, addresses }) => {
                Observed { endpoints: endpoints.into_iter().collect(), addresses: addresses.into_iter().collect() }
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Observed::default(),
            Err(error) => {
                tracing::warn!(path = %self.0.display(), %error, "what was held of endpoints is forgotten");
                Observed::default()
            }
        }
    }

    fn content(&self) -> io::Result<Content> {
        let bytes = fs::metadata(&self.0)?.len();
        if bytes > MAX_FILE_BYTES {
            return Err(io::Error::other(format!("{bytes} bytes, the limit is {MAX_FILE_BYTES}")));
        }
        Ok(serde_json::from_slice(&fs::read(&self.0)?)?)
    }

    /// Keeps this, or removes the file where nothing is held. Blocks on the disk.
    ///
    /// # Errors
    /// When it can't be written or removed.
    pub(super) fn write(&self, held: &Observed) -> io::Result<()> {
        if *held == Observed::default() {
            return match fs::remove_file(&self.0) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
                _ => Ok(()),
            };
        }
        let content = Content {
            endpoints: held.endpoints.iter().map(|(endpoint, answers)| (*endpoint, *answers)).collect(),
            addresses: held.addresses.iter().map(|(address, answers)| (*address, *answers)).collect(),
        };
        let part = self.0.with_extension("json.part");
        let mut file = fs::File::create(&part)?;
        file.write_all(&serde_json::to_vec(&content)?)?;
        file.sync_all()?;
        fs::rename(&part, &self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_held_comes_back_and_what_is_no_such_file_is_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("island.json");
        let kept = Kept::at(path.clone());
        let nothing = Observed::default();
        kept.write(&nothing).unwrap();
        assert_eq!(kept.read(), nothing);
        let held = Observed {
            endpoints: [("10.244.1.5:80", false), ("[fd00::5]:80", true)]
                .map(|(endpoint, answers)| (endpoint.parse().unwrap(), answers))
                .into(),
            addresses: [("10.244.1.5".parse().unwrap(), false)].into(),
        };
        kept.write(&held).unwrap();
        assert_eq!(kept.read(), held);
        for garbage in ["", "[]", "{\"endpoints\": {\"x\": 1}}", &" ".repeat(600 << 10)] {
            fs::write(&path, garbage).unwrap();
            assert_eq!(kept.read(), nothing);
        }
        kept.write(&nothing).unwrap();
        assert!(!path.exists());
    }
}
