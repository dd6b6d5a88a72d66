//! Stock kubectl against a whole server: the one on PATH, and an old one where `KUBECTL_OLD` names it.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::{
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    time::{Duration, Instant},
};

use common::TestServer;
use edgemesh_api::{ObjectKey, ResourceName};
use edgemesh_apiserver::{RequestContext, Store};
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(60);

/// One kubectl with a kubeconfig.
#[derive(Clone)]
struct Kubectl {
    program: PathBuf,
    kubeconfig: PathBuf,
    home: PathBuf,
}

impl Kubectl {
    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command.arg("--kubeconfig").arg(&self.kubeconfig).args(args).env("HOME", &self.home).env_remove("KUBECONFIG");
        command
    }

    fn output(&self, args: &[&str], input: &str) -> Output {
        let mut command = self.command(args);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("kubectl must be there");
        child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
        child.wait_with_output().unwrap()
    }

    /// Runs it and gives its output; fails the test when it fails.
    fn ok(&self, args: &[&str]) -> String {
        self.pipe(args, "")
    }

    fn pipe(&self, args: &[&str], input: &str) -> String {
        let output = self.output(args, input);
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{} {args:?}: {out}{err}", self.program.display());
        out.into_owned()
    }

    /// Runs what must fail and gives its error.
    fn err(&self, args: &[&str], input: &str) -> String {
        let output = self.output(args, input);
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(!output.status.success(), "{args:?} should have failed: {out}");
        err.into_owned()
    }

    fn json(&self, args: &[&str]) -> Value {
        let mut all = args.to_vec();
        all.extend(["-o", "json"]);
        serde_json::from_str(&self.ok(&all)).unwrap()
    }
}

/// The kubectls to try: the present one, and an old one where there is one.
fn programs() -> Vec<PathBuf> {
    let mut programs = vec![PathBuf::from("kubectl")];
    programs.extend(std::env::var_os("KUBECTL_OLD").map(PathBuf::from));
    programs
}

async fn with_each(test: impl Fn(Kubectl, Store) + Clone + Send + 'static) {
    for program in programs() {
        let server = TestServer::start().await;
        let kubectl =
            Kubectl { program, kubeconfig: server.kubeconfig.clone(), home: server.folder.path().join("home") };
        std::fs::create_dir_all(&kubectl.home).unwrap();
        let (test, store) = (test.clone(), server.store.clone());
        tokio::task::spawn_blocking(move || test(kubectl, store)).await.unwrap();
        server.stop().await;
    }
}

const DEPLOYMENT: &str = "
apiVersion: apps/v1
kind: Deployment
metadata:
  name: web
spec:
  replicas: 2
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      containers:
      - {name: web, image: web:1, ports: [{containerPort: 80}], env: [{name: A, value: '1'}]}
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  selector: {app: web}
  ports: [{name: http, port: 80}]
";

const POD: &str = "
apiVersion: v1
kind: Pod
metadata: {name: one, labels: {app: one}}
spec:
  containers: [{name: c, image: 'busybox:1'}]
";

#[tokio::test(flavor = "multi_thread")]
async fn apply_get_describe_and_delete() {
    with_each(|kubectl, _| {
        assert!(kubectl.pipe(&["apply", "-f", "-"], DEPLOYMENT).contains("deployment.apps/web created"));
        assert!(kubectl.pipe(&["apply", "-f", "-"], DEPLOYMENT).contains("deployment.apps/web unchanged"));
        let changed = DEPLOYMENT.replace("web:1", "web:2").replace("{name: A, value: '1'}", "{name: B, value: '2'}");
        let out = kubectl.pipe(&["apply", "-f", "-"], &changed);
        assert!(out.contains("deployment.apps/web configured") && out.contains("service/web unchanged"), "{out}");
        let deployment = kubectl.json(&["get", "deployment", "web"]);
        let container = &deployment["spec"]["template"]["spec"]["containers"][0];
        assert_eq!(container["image"], "web:2");
        assert_eq!(container["env"], json!([{"name": "B", "value": "2"}]));
        assert_eq!(container["ports"][0]["protocol"], "TCP", "defaults are kept by an apply");
        assert_eq!(deployment["metadata"]["generation"], 2);
        let table = kubectl.ok(&["get", "deploy,svc", "-o", "wide"]);
        assert!(table.contains("READY") && table.contains("CLUSTER-IP") && table.contains("app=web"), "{table}");
        assert!(table.contains("10.96."), "{table}");
        assert!(kubectl.ok(&["get", "deploy", "web", "-o", "yaml"]).contains("image: web:2"));
        assert!(kubectl.ok(&["get", "svc", "-A"]).contains("default"));
        let text = kubectl.ok(&["describe", "deployment", "web"]);
        assert!(text.contains("web:2") && text.contains("RollingUpdateStrategy"), "{text}");
        assert!(kubectl.ok(&["describe", "service", "web"]).contains("TargetPort:"));
        assert!(kubectl.ok(&["get", "all"]).contains("deployment.apps/web"));
        assert!(kubectl.err(&["get", "pod", "none"], "").contains("pods \"none\" not found"));
        let columns = kubectl.ok(&["get", "deploy", "-o", "custom-columns=N:.metadata.name,R:.spec.replicas"]);
        assert!(columns.contains("web   2"), "{columns}");
        let out = kubectl.pipe(&["delete", "-f", "-"], DEPLOYMENT);
        assert!(out.contains("deployment.apps \"web\" deleted"), "{out}");
        assert!(!kubectl.ok(&["get", "deploy", "-o", "name"]).contains("web"));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn discovery_and_explain() {
    with_each(|kubectl, _| {
        let resources = kubectl.ok(&["api-resources"]);
        for line in ["deployments", "endpointslices", "customresourcedefinitions", "leases"] {
            assert!(resources.contains(line), "{resources}");
        }
        assert!(kubectl.ok(&["api-versions"]).contains("apps/v1"));
        assert!(kubectl.ok(&["version"]).contains("v1.32.0+edgemesh"));
        assert_eq!(kubectl.ok(&["get", "--raw", "/readyz"]), "ok");
        assert!(kubectl.ok(&["get", "po,no,ns,cm"]).contains("namespace/default"));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn create_label_annotate_edit_and_patch() {
    with_each(|kubectl, _| {
        kubectl.ok(&["create", "configmap", "c", "--from-literal=k=1"]);
        assert!(kubectl.err(&["create", "configmap", "c", "--from-literal=k=1"], "").contains("already exists"));
        kubectl.ok(&["create", "secret", "generic", "s", "--from-literal=p=x"]);
        kubectl.ok(&["create", "namespace", "other"]);
        kubectl.ok(&["create", "deployment", "d", "--image=i:1", "-n", "other"]);
        kubectl.ok(&["label", "configmap", "c", "tier=a"]);
        kubectl.ok(&["annotate", "configmap", "c", "note=hello"]);
        assert!(kubectl.ok(&["get", "cm", "-l", "tier in (a,b)"]).contains('c'));
        assert!(kubectl.ok(&["get", "cm", "-l", "tier!=a", "-o", "name"]).is_empty());
        kubectl.ok(&["label", "configmap", "c", "tier-"]);
        let patch = |kind: &str, patch: &str| {
            kubectl.ok(&["patch", "deployment", "d", "-n", "other", "--type", kind, "-p", patch])
        };
        patch("strategic", r#"{"spec":{"template":{"spec":{"containers":[{"name":"side","image":"s:1"}]}}}}"#);
        patch("merge", r#"{"spec":{"replicas":3}}"#);
        patch("json", r#"[{"op":"replace","path":"/spec/template/spec/containers/0/image","value":"new:1"}]"#);
        let deployment = kubectl.json(&["get", "deployment", "d", "-n", "other"]);
        assert_eq!(deployment["spec"]["replicas"], 3);
        assert_eq!(deployment["spec"]["template"]["spec"]["containers"].as_array().unwrap().len(), 2);
        assert_eq!(deployment["spec"]["template"]["spec"]["containers"][0]["image"], "new:1");
        kubectl.ok(&["set", "image", "deployment/d", "-n", "other", "*=set:1"]);
        kubectl.ok(&["scale", "deployment", "d", "-n", "other", "--replicas=5"]);
        assert_eq!(kubectl.json(&["get", "deployment", "d", "-n", "other"])["spec"]["replicas"], 5);
        let edit =
            kubectl.command(&["edit", "configmap", "c"]).env("KUBE_EDITOR", "sed -i s/hello/edited/").output().unwrap();
        assert!(edit.status.success(), "{}", String::from_utf8_lossy(&edit.stderr));
        assert_eq!(kubectl.json(&["get", "cm", "c"])["metadata"]["annotations"]["note"], "edited");
        let replaced = kubectl.ok(&["get", "cm", "c", "-o", "yaml"]).replace("\"1\"", "\"2\"");
        kubectl.pipe(&["replace", "-f", "-"], &replaced);
        assert_eq!(kubectl.json(&["get", "cm", "c"])["data"]["k"], "2");
        let stale = kubectl.err(&["replace", "-f", "-"], &replaced);
        assert!(stale.contains("the object has been modified"), "{stale}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn invalid_objects_are_refused_with_the_field() {
    with_each(|kubectl, _| {
        let service = "apiVersion: v1\nkind: Service\nmetadata: {name: bad}\nspec: {selector: {a: b}}\n";
        let error = kubectl.err(&["apply", "--validate=false", "-f", "-"], service);
        assert!(error.contains("spec.ports: Required value"), "{error}");
        let error = kubectl.err(&["create", "-f", "-"], &POD.replace("{name: one", "{name: One_"));
        assert!(error.contains("metadata.name: Invalid value"), "{error}");
        let big =
            format!("apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: big}}\ndata: {{k: {}}}\n", "x".repeat(4 << 20));
        let error = kubectl.err(&["create", "-f", "-"], &big);
        assert!(error.contains("too large"), "{error}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn unknown_fields_are_named() {
    with_each(|kubectl, _| {
        let error = kubectl.err(&["create", "-f", "-"], &POD.replace("spec:", "spec:\n  unknownField: 1"));
        assert!(error.contains("unknownField"), "{error}");
        let error = kubectl.err(&["create", "-f", "-"], &POD.replace("containers: [", "replicas: 3\n  containers: ["));
        assert!(error.contains("replicas"), "{error}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn watching_shows_changes_as_they_come() {
    with_each(|kubectl, _| {
        kubectl.pipe(&["create", "-f", "-"], POD);
        let child =
            kubectl.command(&["get", "pods", "-w", "--request-timeout=30s"]).stdout(Stdio::piped()).spawn().unwrap();
        let mut watch = Watching::new(child);
        watch.until("one");
        kubectl.pipe(&["create", "-f", "-"], &POD.replace("one", "two"));
        watch.until("two");
        // The old kubectl knows only --watch for whole objects; both know jsonpath waits.
        kubectl.ok(&["delete", "pod", "one", "--wait=true", "--timeout=20s"]);
    })
    .await;
}

/// The growing output of a kubectl that watches; ended on drop.
struct Watching {
    child: std::process::Child,
    lines: std::sync::mpsc::Receiver<String>,
}

impl Watching {
    fn new(mut child: std::process::Child) -> Self {
        use std::io::BufRead;
        let out = std::io::BufReader::new(child.stdout.take().unwrap());
        let (send, lines) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            for line in out.lines().map_while(Result::ok) {
                if send.send(line).is_err() {
                    return;
                }
            }
        });
        Self { child, lines }
    }

    fn until(&mut self, wanted: &str) {
        let end = Instant::now() + LIMIT;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let line = self.lines.recv_timeout(left).unwrap_or_else(|_| panic!("{wanted} was never shown"));
            if line.contains(wanted) {
                return;
            }
        }
    }
}

impl Drop for Watching {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn deletes_cascade_as_asked() {
    with_each(|kubectl, _| {
        let propagations = [("foreground", "foregroundDeletion"), ("orphan", "orphan")];
        for (mode, finalizer) in propagations {
            kubectl.ok(&["create", "deployment", mode, "--image=i:1"]);
            // Nothing collects garbage here, so the finalizer stays to be seen.
            let cascade = format!("--cascade={mode}");
            kubectl.ok(&["delete", "deployment", mode, &cascade, "--wait=false"]);
            let object = kubectl.json(&["get", "deployment", mode]);
            assert_eq!(object["metadata"]["finalizers"], json!([finalizer]));
            assert!(object["metadata"]["deletionTimestamp"].is_string());
            kubectl.ok(&["patch", "deployment", mode, "--type=merge", "-p", r#"{"metadata":{"finalizers":null}}"#]);
            assert!(kubectl.err(&["get", "deployment", mode], "").contains("not found"));
        }
        kubectl.ok(&["create", "deployment", "gone", "--image=i:1"]);
        kubectl.ok(&["delete", "deployment", "gone", "--cascade=background"]);
        kubectl.pipe(&["create", "-f", "-"], POD);
        kubectl.ok(&["delete", "pods", "--all"]);
        kubectl.pipe(&["create", "-f", "-"], POD);
        kubectl.ok(&["delete", "pod", "one", "--grace-period=0", "--force"]);
        assert!(kubectl.ok(&["get", "pods", "-o", "name"]).is_empty());
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rollout_status_follows_the_deployment() {
    with_each(|kubectl, store| {
        kubectl.pipe(&["apply", "-f", "-"], DEPLOYMENT);
        let child = kubectl
            .command(&["rollout", "status", "deployment/web", "--timeout=40s"])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut rollout = Watching::new(child);
        rollout.until("Waiting for deployment");
        let key = ObjectKey::new(ResourceName::new("apps", "v1", "deployments"), "default", "web");
        let runtime = tokio::runtime::Runtime::new().unwrap();
        runtime.block_on(async {
            let mut new = (*store.get(&key).await.unwrap()).clone();
            new["status"] = json!({"observedGeneration": 1, "replicas": 2, "updatedReplicas": 2, "readyReplicas": 2, "availableReplicas": 2});
            store.update_status(&key, new, &RequestContext::system()).await.unwrap();
        });
        rollout.until("successfully rolled out");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn custom_resources_are_served_as_any_other() {
    with_each(|kubectl, _| {
        let definition = "
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {name: widgets.example.com}
spec:
  group: example.com
  scope: Namespaced
  names: {plural: widgets, singular: widget, kind: Widget, shortNames: [wd]}
  versions:
  - name: v1
    served: true
    storage: true
    subresources: {status: {}}
    additionalPrinterColumns: [{name: Size, type: integer, jsonPath: .spec.size}]
    schema:
      openAPIV3Schema:
        type: object
        properties:
          spec: {type: object, required: [size], properties: {size: {type: integer, minimum: 1}}}
          status: {type: object, x-kubernetes-preserve-unknown-fields: true}
";
        kubectl.pipe(&["apply", "-f", "-"], definition);
        kubectl.ok(&["wait", "--for=condition=Established", "crd/widgets.example.com", "--timeout=20s"]);
        let widget = "apiVersion: example.com/v1\nkind: Widget\nmetadata: {name: w}\nspec: {size: 7}\n";
        kubectl.pipe(&["apply", "-f", "-"], widget);
        kubectl.pipe(&["apply", "-f", "-"], &widget.replace('7', "8"));
        let table = kubectl.ok(&["get", "wd"]);
        assert!(table.contains("SIZE") && table.contains('8'), "{table}");
        let error = kubectl.err(&["apply", "--validate=false", "-f", "-"], &widget.replace('7', "0"));
        assert!(error.contains("spec.size: Invalid value"), "{error}");
        kubectl.ok(&["delete", "crd", "widgets.example.com"]);
        kubectl.err(&["get", "widgets"], "");
    })
    .await;
}

#[test]
fn the_kubectl_on_path_is_used() {
    let found = std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|folder| Path::new(&folder).join("kubectl").exists()));
    assert!(found, "kubectl must be on PATH: install it, or Debian's kubernetes-client");
}
