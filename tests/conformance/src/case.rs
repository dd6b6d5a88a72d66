//! The building blocks of rows: apply, wait for a condition, call and see who answers.

use std::{
    collections::BTreeSet,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, bail, ensure};
use edgemesh_lab::{command, daemons::Daemon, topology::Datapath};
use serde_json::{Value, json};

use crate::{
    callers::{self, From, Outcome, Stream},
    field::Field,
    manifests,
};

/// How long a change may take to be seen by callers.
const SEEN: Duration = Duration::from_secs(15);
/// Calls of one round, whoever is expected: with four endpoints to choose from, one is missed by chance once in 250 rounds, and a
/// round can be repeated; with two of which one must not answer, all calls reach the other by chance once in 2^24 rounds.
const ROUND: usize = 24;
/// errno(3): what eBPF says of a Service without endpoints.
const EHOSTUNREACH: i32 = 113;
/// errno(3): what it says of a port that a Service doesn't have.
const ECONNREFUSED: i32 = 111;
/// An address without endpoints must say so within this.
const AT_ONCE: Duration = Duration::from_secs(2);

/// One test.
#[derive(Debug, Clone, Copy)]
pub struct Row {
    /// Name of the upstream test.
    pub name: &'static str,
    /// Whether it disturbs others.
    pub alone: bool,
    /// Plays it.
    pub run: fn(&Case<'_>) -> Result<()>,
}

impl Row {
    pub(crate) const fn new(name: &'static str, run: fn(&Case<'_>) -> Result<()>) -> Self {
        Self { name, run, alone: false }
    }

    pub(crate) const fn alone(name: &'static str, run: fn(&Case<'_>) -> Result<()>) -> Self {
        Self { name, run, alone: true }
    }

    /// Plays it.
    ///
    /// # Errors
    /// When it doesn't hold.
    pub fn play(&self, field: &Field, number: usize) -> Result<()> {
        let case = Case { field, id: format!("r{number}") };
        if self.alone {
            let _others_wait = field.undisturbed.write();
            (self.run)(&case)
        } else {
            let _undisturbed = field.undisturbed.read();
            (self.run)(&case)
        }
    }
}

/// Which of a Service's addresses is called, and which of a node's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// The cluster's own: IPv4.
    Primary,
    /// The other one, which only dual-stack Services have.
    Secondary,
}

impl Family {
    /// The fields of a Service that has addresses of this family.
    pub fn spec(self) -> Value {
        match self {
            Self::Primary => json!({}),
            Self::Secondary => json!({"ipFamilyPolicy": "RequireDualStack"}),
        }
    }
}

/// A row that is being played.
#[derive(Debug)]
pub struct Case<'a> {
    /// Where.
    pub field: &'a Field,
    /// Begins the names of its objects.
    pub id: String,
}

/// A Service as the API has it.
#[derive(Debug, Clone)]
pub struct Service {
    /// Name.
    pub name: String,
    /// The object.
    pub object: Value,
}

impl Service {
    /// Its cluster address.
    pub fn ip(&self) -> &str {
        self.object["spec"]["clusterIP"].as_str().unwrap_or_default()
    }

    /// Its cluster address of a family; empty if it has none.
    pub fn ip_of(&self, family: Family) -> &str {
        self.object["spec"]["clusterIPs"][family as usize].as_str().unwrap_or_default()
    }

    /// `SCHEME://CLUSTER-ADDRESS:PORT` of a port by its name (`http`, `tcp` or `udp`).
    pub fn url(&self, port: &str) -> String {
        self.url_at(self.ip(), port)
    }

    /// The same at another address.
    pub fn url_at(&self, address: &str, port: &str) -> String {
        url(address, port, &self.port(port)["port"])
    }

    /// The URL of a port's NodePort at a node's address.
    pub fn node_url(&self, address: &str, port: &str) -> String {
        url(address, port, &self.port(port)["nodePort"])
    }

    fn port(&self, name: &str) -> &Value {
        let ports = self.object["spec"]["ports"].as_array();
        ports.into_iter().flatten().find(|port| port["name"] == name).unwrap_or(&Value::Null)
    }
}

fn url(address: &str, scheme: &str, port: &Value) -> String {
    let end = if scheme == "http" { "/" } else { "" };
    let address = if address.contains(':') { format!("[{address}]") } else { address.to_owned() };
    format!("{scheme}://{address}:{port}{end}")
}

impl Case<'_> {
    /// The name of one of its objects.
    pub fn name(&self, of: &str) -> String {
        format!("{}-{of}", self.id)
    }

    /// Applies a Service over the shared servers, all of them unless `spec` says otherwise. It is spread over near and far
    /// endpoints alike, as upstream tests expect.
    ///
    /// # Errors
    /// When it is refused.
    pub fn service(&self, of: &str, spec: Value) -> Result<Service> {
        self.service_with(of, json!({}), spec)
    }

    /// [`Case::service`] with further metadata.
    ///
    /// # Errors
    /// When it is refused.
    pub fn service_with(&self, of: &str, metadata: Value, spec: Value) -> Result<Service> {
        let name = self.name(of);
        let mut object = json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {"name": name, "annotations": {"edgemesh.dev/endpoint-choice": "kubernetes"}},
            "spec": {"selector": {"app": "server"}, "ports": manifests::ports()},
        });
        merge(&mut object["metadata"], &metadata);
        merge(&mut object["spec"], &spec);
        let object = self.field.apply(&[object])?.pop().context("the Service that was applied")?;
        Ok(Service { name, object })
    }

    /// The Service as it is now.
    ///
    /// # Errors
    /// When there is none.
    pub fn now(&self, service: &Service) -> Result<Service> {
        let object = self.field.get(&format!("service {}", service.name))?;
        Ok(Service { object, ..service.clone() })
    }

    /// Patches an object's fields (JSON merge patch).
    ///
    /// # Errors
    /// When it is refused.
    pub fn patch(&self, object: &str, patch: &Value) -> Result<Value> {
        // Given on the command line, where words are split at spaces.
        ensure!(!patch.to_string().contains(' '), "a patch with spaces");
        let words = format!("patch {object} --type=merge -o json -p {patch}");
        Ok(serde_json::from_str(&self.field.kubectl(&words, "")?)?)
    }

    /// Deletes objects and doesn't wait.
    ///
    /// # Errors
    /// When there are none.
    pub fn delete(&self, words: &str) -> Result<()> {
        self.field.kubectl(&format!("delete {words} --wait=false"), "").map(drop)
    }

    /// Applies a pod and waits until it runs; gives its address.
    ///
    /// # Errors
    /// When it doesn't run in time.
    pub fn pod(&self, pod: Value) -> Result<String> {
        let name = pod["metadata"]["name"].as_str().unwrap_or_default().to_owned();
        self.field.apply(&[pod])?;
        self.running(&name)
    }

    /// Waits until a pod runs; gives its address.
    ///
    /// # Errors
    /// When it doesn't run in time.
    pub fn running(&self, pod: &str) -> Result<String> {
        self.until(&format!("{pod} runs"), Duration::from_secs(30), || {
            let status = &self.field.get(&format!("pod {pod}"))?["status"];
            let started = status["containerStatuses"][0]["state"]["running"].is_object();
            ensure!(status["phase"] == "Running" && started, "{status}");
            status["podIP"].as_str().map(str::to_owned).context("a running pod has an address")
        })
    }

    /// Waits until a pod is gone.
    ///
    /// # Errors
    /// When it stays.
    pub fn gone_pod(&self, pod: &str) -> Result<()> {
        self.until(&format!("{pod} is gone"), Duration::from_secs(40), || {
            let left = self.field.kubectl(&format!("get pod {pod} --ignore-not-found -o name"), "")?;
            ensure!(left.trim().is_empty(), "it is there");
            Ok(())
        })
    }

    /// Tries until it succeeds.
    ///
    /// # Errors
    /// The last failure, when the deadline passed.
    pub fn until<T>(&self, what: &str, deadline: Duration, mut attempt: impl FnMut() -> Result<T>) -> Result<T> {
        let begin = Instant::now();
        loop {
            match attempt() {
                Ok(value) => return Ok(value),
                Err(error) if begin.elapsed() > deadline => {
                    return Err(error.context(format!("not within {} s: {what}", deadline.as_secs())));
                }
                Err(_) => thread::sleep(Duration::from_millis(100)),
            }
        }
    }

    /// Calls a URL some times.
    ///
    /// # Errors
    /// When nobody can call.
    pub fn calls(&self, from: From<'_>, url: &str, count: usize) -> Result<Vec<Outcome>> {
        callers::calls(self.field, from, &["--timeout", "3000"], url, count)
    }

    /// Calls that go on until they are dropped.
    ///
    /// # Errors
    /// When nobody can call.
    pub fn stream(&self, from: From<'_>, options: &[&str], url: &str) -> Result<Stream> {
        Stream::start(self.field, from, options, url)
    }

    /// Waits until calls to a URL are answered by exactly these pods, all of them, and none fails.
    ///
    /// # Errors
    /// When that doesn't happen in time.
    pub fn reaches(&self, from: From<'_>, url: &str, pods: &[&str]) -> Result<()> {
        let wanted: BTreeSet<_> = pods.iter().map(|pod| (*pod).to_owned()).collect();
        self.until(&format!("{from:?} calls {url} and reaches {pods:?}"), SEEN, || {
            let answered = self.calls(from, url, ROUND)?.into_iter().collect::<Result<Vec<_>, _>>();
            let answered: BTreeSet<_> = match answered {
                Ok(answers) => answers.into_iter().map(|answer| answer.pod).collect(),
                Err(reason) => bail!("a call failed: {reason}"),
            };
            ensure!(answered == wanted, "{answered:?} answered");
            Ok(())
        })
    }

    /// Waits until a call of a Service without endpoints is refused at once, so that no caller waits for a deadline.
    ///
    /// # Errors
    /// When that doesn't happen in time.
    pub fn refused(&self, from: From<'_>, url: &str) -> Result<()> {
        self.refused_with(EHOSTUNREACH, from, url)
    }

    /// As [`Case::refused`], of a port that the Service doesn't have.
    ///
    /// # Errors
    /// When that doesn't happen in time.
    pub fn no_such_port(&self, from: From<'_>, url: &str) -> Result<()> {
        self.refused_with(ECONNREFUSED, from, url)
    }

    /// The rules of nftables say either.
    fn refused_with(&self, ebpf: i32, from: From<'_>, url: &str) -> Result<()> {
        let expected: &[_] = match self.field.mode.datapath {
            Datapath::Ebpf => &[ebpf],
            _ => &[EHOSTUNREACH, ECONNREFUSED],
        };
        self.until(&format!("{from:?} is refused at {url}"), SEEN, || {
            let begin = Instant::now();
            let outcome = self.calls(from, url, 1)?.pop().context("an outcome")?;
            let took = begin.elapsed();
            let Err(reason) = outcome else { bail!("{outcome:?}") };
            ensure!(took < AT_ONCE, "after {took:?}: {reason}");
            ensure!(expected.iter().any(|number| reason.contains(&format!("(os error {number})"))), "{reason}");
            Ok(())
        })
    }

    /// Waits until calls get no answer, for whatever reason.
    ///
    /// # Errors
    /// When they are answered.
    pub fn silent(&self, from: From<'_>, url: &str) -> Result<()> {
        self.until(&format!("nobody answers {from:?} at {url}"), SEEN, || {
            let outcomes = callers::calls(self.field, from, &["--timeout", "1000"], url, 1)?;
            ensure!(outcomes.iter().all(Result::is_err), "{outcomes:?}");
            Ok(())
        })
    }

    /// Waits until a Service's slices have these addresses ready.
    ///
    /// # Errors
    /// When they don't in time.
    pub fn has_endpoints(&self, service: &Service, addresses: &[&str]) -> Result<()> {
        let wanted: BTreeSet<_> = addresses.iter().map(|address| (*address).to_owned()).collect();
        self.until(&format!("{} has the endpoints {addresses:?}", service.name), SEEN, || {
            let words = format!("endpointslices -l kubernetes.io/service-name={}", service.name);
            let found = ready_addresses(&self.field.get(&words)?);
            ensure!(found == wanted, "{found:?}");
            Ok(())
        })
    }

    /// Waits until one of a Service's endpoints is terminating, and serves on or doesn't.
    ///
    /// # Errors
    /// When none is in time.
    pub fn terminating(&self, service: &Service, serving: bool) -> Result<()> {
        self.until(&format!("an endpoint of {} is terminating", service.name), SEEN, || {
            let slices = self.field.get(&format!("endpointslices -l kubernetes.io/service-name={}", service.name))?;
            let mut conditions = endpoints(&slices).map(|endpoint| &endpoint["conditions"]);
            ensure!(conditions.any(|now| now["terminating"] == true && now["serving"] == serving), "{slices}");
            Ok(())
        })
    }

    /// Waits until the server sees a call come from this address.
    ///
    /// # Errors
    /// When it sees another.
    pub fn sees(&self, from: From<'_>, url: &str, client: &str) -> Result<()> {
        self.until(&format!("{from:?} calls {url} and is seen as {client}"), SEEN, || {
            let outcome = self.calls(from, url, 1)?.pop().context("an outcome")?;
            let answer = outcome.map_err(|reason| anyhow!("{reason}"))?;
            ensure!(answer.client_ip() == client, "{} was seen", answer.client_ip());
            Ok(())
        })
    }

    /// Kills a daemon, does something, and starts it again.
    ///
    /// # Errors
    /// When it doesn't come back, or what is done fails.
    pub fn daemon(&self, host: &str, daemon: &str, meanwhile: impl FnOnce(&Self) -> Result<()>) -> Result<()> {
        command::finish(&mut self.field.lab_command(&["kill", host, daemon]))?;
        let done = meanwhile(self);
        command::finish(&mut self.field.lab_command(&["start", host, daemon]))?;
        let found = Daemon::named(&self.field.lab.host(host)?, daemon)?;
        found.wait_ready(&self.field.lab.namespace(host))?;
        done
    }

    /// Runs a shell line in a pod; gives what it said, if it succeeded.
    ///
    /// # Errors
    /// When it fails.
    pub fn shell(&self, pod: &str, line: &str) -> Result<String> {
        let (code, text) = callers::run(self.field, From::Pod(pod), &["/bin/sh", "-c", line])?;
        ensure!(code == Some(0), "{line}: {}", text.trim());
        Ok(text)
    }
}

fn endpoints(slices: &Value) -> impl Iterator<Item = &Value> {
    let slices = slices["items"].as_array().into_iter().flatten();
    slices.flat_map(|slice| slice["endpoints"].as_array().into_iter().flatten())
}

/// The addresses in a list of slices that are ready.
pub fn ready_addresses(slices: &Value) -> BTreeSet<String> {
    let ready = endpoints(slices).filter(|endpoint| endpoint["conditions"]["ready"] == true);
    ready
        .flat_map(|endpoint| endpoint["addresses"].as_array().cloned().unwrap_or_default())
        .filter_map(|address| address.as_str().map(str::to_owned))
        .collect()
}

/// Puts one object's fields over another's; null removes.
fn merge(into: &mut Value, from: &Value) {
    for (key, value) in from.as_object().into_iter().flatten() {
        match value {
            Value::Null => drop(into.as_object_mut().map(|object| object.remove(key))),
            Value::Object(_) if key == "annotations" || key == "labels" => merge(&mut into[key], value),
            _ => into[key] = value.clone(),
        }
    }
}
