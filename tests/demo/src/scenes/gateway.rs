//! North-south: an outside client, the gateway at site b, backends at both sites.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::applications;
use crate::Stage;

/// The public address of site b, whose router forwards 80 and 443 to the gateway's node.
const SITE_B: &str = "203.0.113.42";
const REQUESTS: usize = 40;

pub(super) fn run(stage: &Stage) -> Result<()> {
    ensure_gateway(stage)?;
    stage.kubectl("get gateways,httproutes")?.ok()?;
    serves(stage)
}

/// The example Gateway is applied, its certificate is there, and its status says Programmed.
pub(super) fn ensure_gateway(stage: &Stage) -> Result<()> {
    applications::ensure_all(stage)?;
    if stage.unseen().kubectl("get secret shop-tls")?.code != 0 {
        let folder = "/tmp/shop-tls";
        let make = format!(
            "mkdir -p {folder} && openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 30 \
             -subj /CN=shop.example -addext subjectAltName=DNS:shop.example -keyout {folder}/tls.key -out {folder}/tls.crt"
        );
        stage.unseen().lab(&["node", "client", "--", "sh", "-c", &make])?.ok()?;
        stage.kubectl(&format!("create secret tls shop-tls --cert={folder}/tls.crt --key={folder}/tls.key"))?.ok()?;
    }
    stage.kubectl("apply -f examples/gateway.yaml")?.ok()?;
    stage.until("the Gateway is Programmed and its routes Accepted", Duration::from_secs(10), |stage| {
        let gateway = stage.json("gateway edge")?;
        ensure!(condition(&gateway["status"], "Programmed"), "{}", gateway["status"]);
        for route in ["shop", "empty"] {
            let route = stage.json(&format!("httproute {route}"))?;
            ensure!(condition(&route["status"]["parents"][0], "Accepted"), "{}", route["status"]);
        }
        Ok(())
    })
}

fn condition(holder: &Value, name: &str) -> bool {
    let mut all = holder["conditions"].as_array().into_iter().flatten();
    all.any(|condition| condition["type"] == name && condition["status"] == "True")
}

/// A request of the outside client; gives the status code and the node that answered.
fn request(stage: &Stage, url: &str, more: &[&str]) -> Result<(u16, Option<String>)> {
    let host = url.split('/').nth(2).context("a URL has a host")?;
    let (http, https) = (format!("{host}:80:{SITE_B}"), format!("{host}:443:{SITE_B}"));
    let mut words = vec![
        "node",
        "client",
        "--",
        "curl",
        "-sS",
        "--max-time",
        "5",
        "-w",
        "\n%{http_code}",
        "--resolve",
        &http,
        "--resolve",
        &https,
    ];
    words.extend(more);
    words.push(url);
    let text = stage.lab(&words)?.ok()?;
    let (body, code) = text.trim_end().rsplit_once('\n').context("a body and a code")?;
    let node = serde_json::from_str::<Value>(body).ok().and_then(|body| body["node"].as_str().map(str::to_owned));
    Ok((code.parse()?, node))
}

/// The gateway does all that its routes say.
pub(super) fn serves(stage: &Stage) -> Result<()> {
    let trusted = ["--cacert", "/tmp/shop-tls/tls.crt"];
    for (url, more) in [("http://shop.example/", [].as_slice()), ("https://shop.example/", &trusted)] {
        let (code, node) = request(stage, url, more)?;
        ensure!(code == 200 && node.is_some(), "{url}: {code}");
        let unseen = stage.unseen();
        let mut at_b = 0;
        for _ in 0..REQUESTS {
            match request(&unseen, url, more)? {
                (200, Some(node)) if node == "edge-b1" => at_b += 1,
                (200, Some(node)) if node == "edge-a2" => {}
                other => anyhow::bail!("{url}: {other:?}"),
            }
        }
        stage.say(&format!(
            "    {REQUESTS} requests to {url}: {at_b} answered at site b, {} at site a (weights 3 : 1)",
            REQUESTS - at_b
        ));
        // Three in four, give or take four standard deviations.
        ensure!((19..=39).contains(&at_b), "{at_b} of {REQUESTS} at site b");
    }
    for (url, more) in [("http://shop.example/a2/x", [].as_slice()), ("http://shop.example/", &["-H", "x-site: a"])] {
        let (code, node) = request(stage, url, more)?;
        ensure!(code == 200 && node.as_deref() == Some("edge-a2"), "{url} {more:?}: {code} from {node:?}");
    }
    let (code, _) = request(stage, "https://shop.example/", &["--cacert", "/tmp/shop-tls/tls.crt", "--http2"])?;
    ensure!(code == 200, "HTTP/2: {code}");
    let (code, _) = request(stage, "http://unknown.example/", &[])?;
    ensure!(code == 404, "an unknown host got {code}");
    let (code, _) = request(stage, "http://empty.example/", &[])?;
    ensure!(code == 503, "a Service with no endpoint got {code}");
    Ok(())
}
