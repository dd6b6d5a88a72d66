//! What was acknowledged is on disk, whenever the process is killed.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout)]

use std::{
    collections::HashMap,
    io::{BufRead, BufReader},
    path::Path,
    process::{Command, Stdio},
};

use edgemesh_api::{ObjectKey, ResourceName};
use edgemesh_apiserver::{ListOptions, Mode, RequestContext, Store, StoreOptions};
use serde_json::json;

/// Set in the child: where its store is.
const CHILD: &str = "EDGEMESH_TEST_DURABILITY_STORE";
/// How often the child is killed.
const KILLS: usize = 8;

fn config_maps() -> ResourceName {
    ResourceName::new("", "v1", "configmaps")
}

async fn open(path: &Path) -> Store {
    Store::open(path, Mode::Authoritative, StoreOptions::default()).await.unwrap()
}

/// The child's work: many tasks write and say so once they were told that it is done.
async fn write_for_ever(path: &Path, round: u32) {
    let store = open(path).await;
    let tasks: Vec<_> = (0..16)
        .map(|task| {
            let store = store.clone();
            tokio::spawn(async move {
                for n in 0_u32.. {
                    let name = format!("r{round}-t{task}-n{n}");
                    let object = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": {"n": "0"}});
                    let made = store.create(&config_maps(), "default", object, &RequestContext::system()).await.unwrap();
                    println!("{name} {}", made["metadata"]["resourceVersion"].as_str().unwrap());
                    let key = ObjectKey::new(config_maps(), "default", &name);
                    let mut new = (*made).clone();
                    new["data"]["n"] = json!("1");
                    let made = store.update(&key, new, &RequestContext::system()).await.unwrap();
                    println!("{name} {}", made["metadata"]["resourceVersion"].as_str().unwrap());
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
}

#[test]
fn nothing_acknowledged_is_lost_when_the_process_is_killed() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    if let Some(path) = std::env::var_os(CHILD) {
        let round = std::env::var("EDGEMESH_TEST_ROUND").unwrap().parse().unwrap();
        runtime.block_on(write_for_ever(Path::new(&path), round));
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state.db");
    let mut acknowledged: HashMap<String, u64> = HashMap::new();
    for round in 0..KILLS {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "nothing_acknowledged_is_lost_when_the_process_is_killed", "--nocapture"])
            .env(CHILD, &path)
            .env("EDGEMESH_TEST_ROUND", round.to_string())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut seen = 0;
        // Killed after another number of answers each time, in the middle of whatever it does then.
        while seen < 100 + round * 67 {
            let line = lines.next().expect("the child ended by itself").unwrap();
            if let Some((name, version)) = line.trim().split_once(' ')
                && name.starts_with('r')
                && let Ok(version) = version.parse()
            {
                acknowledged.insert(name.to_owned(), version);
                seen += 1;
            }
        }
        child.kill().unwrap();
        child.wait().unwrap();
        // What it said before it was gone counts as well.
        for line in lines.map_while(Result::ok) {
            if let Some((name, version)) = line.trim().split_once(' ')
                && let Ok(version) = version.parse()
            {
                acknowledged.insert(name.to_owned(), version);
            }
        }
    }
    runtime.block_on(async {
        let store = open(&path).await;
        let present: HashMap<String, u64> = store
            .list(&config_maps(), &ListOptions::default())
            .await
            .unwrap()
            .items
            .iter()
            .map(|o| {
                let version = o["metadata"]["resourceVersion"].as_str().unwrap().parse().unwrap();
                (o["metadata"]["name"].as_str().unwrap().to_owned(), version)
            })
            .collect();
        for (name, version) in &acknowledged {
            let kept = present.get(name).unwrap_or_else(|| panic!("{name} was acknowledged and is gone"));
            assert!(kept >= version, "{name} went back from {version} to {kept}");
        }
        assert!(acknowledged.len() > 100);
        assert!(present.values().all(|v| *v <= store.resource_version()));
    });
}
