//! Masquerading: pods' traffic that leaves the cluster takes the node's address. The rules are in a table of their own.

use std::process::Stdio;

use edgemesh_api::cidr::Cidr;
use sha2::{Digest, Sha256};
use tokio::{io::AsyncWriteExt, process::Command, time::Duration};

use super::{NetworkError, cni::parse_range};

/// The table that belongs to edgecore, in this network namespace.
pub const TABLE: &str = "edgemesh_pods";
/// Never masqueraded: link-local, with the node-local addresses of the mesh, and multicast.
const ALWAYS_INSIDE: [&str; 2] = ["169.254.0.0/16", "224.0.0.0/4"];
/// The same of IPv6.
const ALWAYS_INSIDE6: [&str; 3] = ["fe80::/10", "fd65:6467:656d:6573:6800::/112", "ff00::/8"];
const DEADLINE: Duration = Duration::from_secs(10);
/// How much of the sets' digest is in the rules: enough to tell one setting from the next.
const MARK_BYTES: usize = 8;

/// What differs between the families: the set, the type of its elements and the word for the header.
fn words(range: Cidr) -> (&'static str, &'static str, &'static str) {
    if range.network().is_ipv4() { ("inside", "ipv4_addr", "ip") } else { ("inside6", "ipv6_addr", "ip6") }
}

fn rule(pods: Cidr) -> String {
    let (set, _, header) = words(pods);
    format!("{header} saddr {pods} {header} daddr != @{set} masquerade")
}

/// The sets, and the rules that use them. Each rule carries a mark of all the sets, because the kernel gives sets back in another
/// form than it took them: ranges that lie side by side are one.
struct Masquerading {
    sets: String,
    rules: Vec<String>,
}

impl Masquerading {
    fn new(pod_ranges: &[Cidr], cluster_ranges: &[String]) -> Result<Self, NetworkError> {
        // Ranges come from outside and land in a script: only parsed ones do.
        let cluster: Vec<Cidr> = cluster_ranges.iter().map(|range| parse_range(range)).collect::<Result<_, _>>()?;
        let mut sets = String::new();
        for pods in pod_ranges {
            let (set, kind, _) = words(*pods);
            let always: &[&str] = if pods.network().is_ipv4() { &ALWAYS_INSIDE } else { &ALWAYS_INSIDE6 };
            let same_family = cluster.iter().filter(|range| range.network().is_ipv4() == pods.network().is_ipv4());
            let inside = [pods].into_iter().chain(same_family).map(ToString::to_string);
            let inside: Vec<_> = inside.chain(always.iter().map(|range| (*range).to_owned())).collect();
            sets.push_str(&format!(
                "\tset {set} {{\n\
                 \t\ttype {kind}\n\
                 \t\tflags interval\n\
                 \t\tauto-merge\n\
                 \t\telements = {{ {} }}\n\
                 \t}}\n",
                inside.join(", ")
            ));
        }
        let digest = Sha256::digest(&sets);
        let mark: String = digest.iter().take(MARK_BYTES).map(|byte| format!("{byte:02x}")).collect();
        let rules = pod_ranges.iter().map(|pods| format!("{} comment \"sets {mark}\"", rule(*pods))).collect();
        Ok(Self { sets, rules })
    }

    fn is_in(&self, table: &str) -> bool {
        self.rules.iter().all(|rule| table.contains(rule))
    }

    fn script(&self) -> String {
        let rules: String = self.rules.iter().map(|rule| format!("\t\t{rule}\n")).collect();
        format!(
            "table inet {TABLE}\n\
             delete table inet {TABLE}\n\
             table inet {TABLE} {{\n\
             {}\
             \tchain postrouting {{\n\
             \t\ttype nat hook postrouting priority srcnat; policy accept;\n\
             {rules}\
             \t}}\n\
             }}\n",
            self.sets
        )
    }
}

/// The rules for the pod ranges, at most one of each family. Applied as a whole, so running it twice changes nothing.
///
/// # Errors
/// When a range of the cluster is malformed.
pub fn script(pod_ranges: &[Cidr], cluster_ranges: &[String]) -> Result<String, NetworkError> {
    Ok(Masquerading::new(pod_ranges, cluster_ranges)?.script())
}

/// Installs the rules, unless they are there already: replacing them would cost the counters and a kernel transaction.
///
/// # Errors
/// When a range is malformed or `nft` fails.
pub async fn apply(pod_ranges: &[Cidr], cluster_ranges: &[String]) -> Result<(), NetworkError> {
    let wanted = Masquerading::new(pod_ranges, cluster_ranges)?;
    if nft(&["list", "table", "inet", TABLE], "").await.is_ok_and(|present| wanted.is_in(&present)) {
        return Ok(());
    }
    nft(&["-f", "-"], &wanted.script()).await.map(|_| ())
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
        let both = ["10.244.3.0/24", "fd00:10:244:3::/64"].map(|range| Cidr::parse(range).unwrap());
        let cluster = ["10.244.0.0/16", "fd00:10:244::/48"].map(str::to_owned);
        let script = script(&both, &cluster).unwrap();
        assert!(script.contains("ip saddr 10.244.3.0/24 ip daddr != @inside masquerade"), "{script}");
        assert!(script.contains("{ 10.244.3.0/24, 10.244.0.0/16, 169.254.0.0/16, 224.0.0.0/4 }"), "{script}");
        assert!(script.contains("ip6 saddr fd00:10:244:3::/64 ip6 daddr != @inside6 masquerade"), "{script}");
        assert!(script.contains("{ fd00:10:244:3::/64, fd00:10:244::/48, fe80::/10, "), "{script}");
        let one = super::script(&both[..1], &cluster).unwrap();
        assert!(!one.contains("ip6"), "{one}");
    }

    /// Runs in a network namespace of its own: needs root and `nft`.
    #[test]
    fn what_is_in_force_follows_the_cluster_ranges_and_stays_while_they_do() {
        let body = || {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).expect("this test needs root");
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let pods = [Cidr::parse("10.244.3.0/24").unwrap()];
                // Ranges that lie side by side are one in the set.
                let ranges = ["10.244.0.0/16", "10.245.0.0/16", "10.9.0.0/16"].map(str::to_owned);
                let listed = || async { nft(&["-a", "list", "table", "inet", TABLE], "").await.unwrap() };
                apply(&pods, &ranges).await.unwrap();
                let first = listed().await;
                assert!(first.contains("10.9.0.0/16"), "{first}");
                apply(&pods, &ranges).await.unwrap();
                assert_eq!(listed().await, first, "the rules were replaced by the same");
                apply(&pods, &ranges[..2]).await.unwrap();
                let second = listed().await;
                assert!(!second.contains("10.9.0.0/16"), "{second}");
                nft(&["flush", "chain", "inet", TABLE, "postrouting"], "").await.unwrap();
                apply(&pods, &ranges[..2]).await.unwrap();
                let third = listed().await;
                assert!(third.contains(&rule(pods[0])), "{third}");
            });
        };
        if let Err(panic) = std::thread::spawn(body).join() {
            std::panic::resume_unwind(panic);
        }
    }

    #[test]
    fn nothing_but_ranges_gets_into_the_script() {
        let pods = [Cidr::parse("10.244.3.0/24").unwrap()];
        for bad in ["10.244.3.0/24; flush ruleset", "0.0.0.0/0 } }"] {
            assert!(script(&pods, &[bad.to_owned()]).is_err(), "{bad}");
        }
    }
}
