//! Masquerading: pods' traffic that leaves the cluster takes the node's address. The rules are in a table of their own.

use std::process::Stdio;

use tokio::{io::AsyncWriteExt, process::Command, time::Duration};

use super::{NetworkError, cni::parse_range};

/// The table that belongs to edgecore, in this network namespace.
pub const TABLE: &str = "edgemesh_pods";
/// Never masqueraded: link-local, with the node-local addresses of the mesh, and multicast.
const ALWAYS_INSIDE: [&str; 2] = ["169.254.0.0/16", "224.0.0.0/4"];
const DEADLINE: Duration = Duration::from_secs(10);

/// The rules for a pod range. Applied as a whole, so running it twice changes nothing.
///
/// # Errors
/// When a range is malformed.
pub fn script(pod_range: &str, cluster_ranges: &[String]) -> Result<String, NetworkError> {
    // Ranges come from outside and land in a script: only parsed ones do.
    let pods = parse_range(pod_range)?;
    let mut inside = vec![pods.to_string()];
    for range in cluster_ranges {
        inside.push(parse_range(range)?.to_string());
    }
    inside.extend(ALWAYS_INSIDE.map(str::to_owned));
    let inside = inside.join(", ");
    Ok(format!(
        "table inet {TABLE}\n\
         delete table inet {TABLE}\n\
         table inet {TABLE} {{\n\
         \tset inside {{\n\
         \t\ttype ipv4_addr\n\
         \t\tflags interval\n\
         \t\tauto-merge\n\
         \t\telements = {{ {inside} }}\n\
         \t}}\n\
         \tchain postrouting {{\n\
         \t\ttype nat hook postrouting priority srcnat; policy accept;\n\
         \t\tip saddr {pods} ip daddr != @inside masquerade\n\
         \t}}\n\
         }}\n"
    ))
}

/// Installs the rules, unless they are there already: replacing them would cost the counters and a kernel transaction.
///
/// # Errors
/// When a range is malformed or `nft` fails.
pub async fn apply(pod_range: &str, cluster_ranges: &[String]) -> Result<(), NetworkError> {
    let script = script(pod_range, cluster_ranges)?;
    let wanted = format!("ip saddr {} ip daddr != @inside masquerade", parse_range(pod_range)?);
    if nft(&["list", "table", "inet", TABLE], "").await.is_ok_and(|present| {
        present.contains(&wanted) && cluster_ranges.iter().all(|range| present.contains(range.as_str()))
    }) {
        return Ok(());
    }
    nft(&["-f", "-"], &script).await.map(|_| ())
}

async fn nft(arguments: &[&str], input: &str) -> Result<String, NetworkError> {
    let failed = |error: std::io::Error| NetworkError::Nft(error.to_string());
    let mut child = Command::new("nft")
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(failed)?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(input.as_bytes()).await.map_err(failed)?;
    }
    let output = tokio::time::timeout(DEADLINE, child.wait_with_output())
        .await
        .map_err(|_| NetworkError::Nft(format!("no answer within {DEADLINE:?}")))?
        .map_err(failed)?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    Err(NetworkError::Nft(String::from_utf8_lossy(&output.stderr).trim().to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn traffic_inside_of_the_cluster_keeps_its_address() {
        let script = script("10.244.3.0/24", &["10.244.0.0/16".to_owned()]).unwrap();
        assert!(script.contains("ip saddr 10.244.3.0/24 ip daddr != @inside masquerade"), "{script}");
        assert!(script.contains("{ 10.244.3.0/24, 10.244.0.0/16, 169.254.0.0/16, 224.0.0.0/4 }"), "{script}");
    }

    #[test]
    fn nothing_but_ranges_gets_into_the_script() {
        assert!(script("10.244.3.0/24; flush ruleset", &[]).is_err());
        assert!(script("10.244.3.0/24", &["0.0.0.0/0 } }".to_owned()]).is_err());
    }
}
