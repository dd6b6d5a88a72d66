//! The agent as a process of its own: which datapath it takes with what the kernel allows it, and what stays when it is killed.

use std::{
    io::{ErrorKind, Write as _},
    mem::offset_of,
    net::{SocketAddr, TcpListener},
    os::unix::{fs::MetadataExt as _, process::CommandExt as _},
    path::Path,
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use edgemesh_agent::datapath::nftables::{Rules, TABLE};

use crate::{
    hosts::{client, node, pod, who_calls},
    outside::{call, nft, shown},
    sandbox::{Mode, Sandbox, in_both_modes, ip},
    sites::until,
    whole_agent::{admin, catalog, try_admin},
};

/// What an agent needs for eBPF and not for rules.
const WITHOUT_BPF: &str = "-bpf,-sys_admin,-perfmon";

/// An agent, or another program, that ends with the test.
struct Agent(Child);

impl Agent {
    /// Kills it, as a crash would end it.
    fn kill(mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn command(sandbox: &Sandbox, data: &Path, port: u16, capabilities: &str, settings: &[&str]) -> Command {
    std::fs::write(data.join("catalog.json"), catalog().to_string()).unwrap();
    let mut command = Command::new("setpriv");
    command.args([&format!("--bounding-set={capabilities}"), env!("CARGO_BIN_EXE_edgemesh-agent")]);
    let settings = settings.iter().map(|&text| text.to_owned());
    let own = [
        format!("dataDir={}", data.display()),
        "nodeName=edge-a1".to_owned(),
        "apiServer=http://127.0.0.1:1".to_owned(),
        format!("cgroup={}", sandbox.cgroup.display()),
        format!("bpffs={}", sandbox.bpffs.display()),
        format!("admin.listen=127.0.0.1:{port}"),
    ];
    for setting in own.into_iter().chain(settings) {
        command.args(["--set", &setting]);
    }
    command
}

/// Starts an agent and waits until it is ready.
fn start(mut command: Command, port: u16) -> Agent {
    let agent = Agent(command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap());
    let address = SocketAddr::from(([127, 0, 0, 1], port));
    let until = Instant::now() + Duration::from_secs(30);
    while !try_admin(address, "/readyz").is_ok_and(|answer| answer.starts_with("HTTP/1.1 200")) {
        assert!(Instant::now() < until, "not ready");
    }
    agent
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn output(mut command: Command) -> Output {
    command.output().unwrap()
}

#[test]
fn auto_takes_nftables_where_the_programs_can_not_be_loaded_and_what_was_written_outlives_the_agent() {
    let sandbox = node();
    let (pod5, client, data, port) = (pod(5), client(), tempfile::tempdir().unwrap(), free_port());
    pod5.run(|| who_calls("10.244.1.5:8080"));
    let command = |settings: &[&str]| command(&sandbox, data.path(), port, WITHOUT_BPF, settings);
    let agent = start(command(&[]), port);
    let page = admin(SocketAddr::from(([127, 0, 0, 1], port)), "/debug/datapath");
    let page: serde_json::Value = serde_json::from_str(page.split_once("\r\n\r\n").unwrap().1).unwrap();
    assert_eq!(page["datapath"], "nftables");
    assert!(page["reason"].as_str().unwrap().starts_with("no eBPF: "), "{}", page["reason"]);
    let serves = || {
        assert_eq!(call("10.96.0.20:80").unwrap(), "10.244.1.5:8080 10.244.1.1");
        assert_eq!(client.run(|| call("192.168.1.11:30080")).unwrap(), "10.244.1.5:8080 192.168.1.50");
    };
    serves();
    agent.kill();
    serves();
    let agent = start(command(&[]), port);
    serves();
    agent.kill();
    uninstall(command(&[]));
    assert!(!Rules::is_present());
    assert!(call("10.96.0.20:80").is_err());
}

/// Has the kernel answer a program as one before Linux 5.14, whose network namespaces have no cookies.
fn without_netns_cookies(command: &mut Command) {
    let load = |offset: usize| step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, offset as u32, 0);
    let unless = |value: u32, skip: u8| step(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, value, skip);
    let answer = |value: u32| step(libc::BPF_RET | libc::BPF_K, value, 0);
    // The lower half of the third argument, the option.
    let option =
        offset_of!(libc::seccomp_data, args) + 2 * size_of::<u64>() + if cfg!(target_endian = "big") { 4 } else { 0 };
    let mut steps = [
        load(offset_of!(libc::seccomp_data, nr)),
        unless(libc::SYS_getsockopt as u32, 3),
        load(option),
        unless(libc::SO_NETNS_COOKIE as u32, 1),
        answer(libc::SECCOMP_RET_ERRNO | libc::ENOPROTOOPT as u32),
        answer(libc::SECCOMP_RET_ALLOW),
    ];
    let filter = move || {
        let program = libc::sock_fprog { len: steps.len() as u16, filter: steps.as_mut_ptr() };
        // SAFETY: the kernel copies the program during the call.
        match unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program) } {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        }
    };
    // SAFETY: between fork and exec this makes one system call and takes no memory.
    unsafe { command.pre_exec(filter) };
}

/// One step of a filter of system calls, which goes on behind the next `skip` ones where a comparison fails.
fn step(code: u32, value: u32, skip: u8) -> libc::sock_filter {
    libc::sock_filter { code: code as u16, jt: 0, jf: skip, k: value }
}

#[test]
fn auto_takes_nftables_on_kernels_whose_network_namespaces_have_no_cookies() {
    let sandbox = node();
    let (data, port) = (tempfile::tempdir().unwrap(), free_port());
    let mut command = command(&sandbox, data.path(), port, "+all", &[]);
    without_netns_cookies(&mut command);
    let _agent = start(command, port);
    let page = admin(SocketAddr::from(([127, 0, 0, 1], port)), "/debug/datapath");
    let page: serde_json::Value = serde_json::from_str(page.split_once("\r\n\r\n").unwrap().1).unwrap();
    assert_eq!(page["datapath"], "nftables");
    assert!(page["reason"].as_str().unwrap().starts_with("no eBPF: "), "{}", page["reason"]);
}

#[test]
fn the_limit_of_open_descriptors_is_as_high_as_it_may_be() {
    let sandbox = node();
    let (data, port) = (tempfile::tempdir().unwrap(), free_port());
    let agent = command(&sandbox, data.path(), port, "+all", &[]);
    let mut limited = Command::new("prlimit");
    limited.arg("--nofile=1024:16384").arg(agent.get_program()).args(agent.get_args());
    let agent = start(limited, port);
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", agent.0.id())).unwrap();
    let open_files = limits.lines().find_map(|line| line.strip_prefix("Max open files")).unwrap();
    assert_eq!(open_files.split_whitespace().collect::<Vec<_>>(), ["16384", "16384", "files"]);
}

fn uninstall(mut command: Command) {
    command.arg("uninstall");
    assert!(output(command).status.success());
}

/// What the kernel holds that an agent could have put there.
fn kernel_state(sandbox: &Sandbox) -> Vec<String> {
    let lines = |program: &str, arguments: &[&str]| -> Vec<String> {
        shown(program, arguments).lines().map(|line| format!("{program} {arguments:?}: {line}")).collect()
    };
    let mut state = lines("nft", &["list", "ruleset"]);
    for family in ["-4", "-6"] {
        state.extend(lines("ip", &[family, "rule"]));
        state.extend(lines("ip", &[family, "route", "show", "table", "all"]));
    }
    // Those come and go with links and their addresses.
    state.retain(|line| !line.contains("proto kernel"));
    let pins = std::fs::read_dir(sandbox.bpffs.join("edgemesh")).into_iter().flatten().flatten();
    state.extend(pins.map(|pin| format!("pin {}", pin.path().display())));
    state
}

/// The host's list of resolvers: which file, when it was written, and what is in it.
fn host_resolvers() -> (u64, i64, i64, Vec<u8>) {
    let path = "/etc/resolv.conf";
    let file = std::fs::metadata(path).unwrap();
    (file.ino(), file.mtime(), file.mtime_nsec(), std::fs::read(path).unwrap())
}

/// Another node of the network.
fn neighbour() -> serde_json::Value {
    serde_json::json!({"apiVersion": "v1", "kind": "Node",
        "metadata": {"name": "edge-a2", "labels": {"edgemesh.dev/network": "site-a"}},
        "spec": {"podCIDRs": ["10.244.2.0/24"]},
        "status": {"addresses": [{"type": "InternalIP", "address": "192.168.1.12"}]}})
}

in_both_modes! {
    after_an_uninstallation_the_kernel_is_as_before,
    what_others_remove_with_all_tables_is_there_again_without_a_change,
}

fn after_an_uninstallation_the_kernel_is_as_before(mode: Mode) {
    let sandbox = node();
    let (data, port) = (tempfile::tempdir().unwrap(), free_port());
    let setting = format!("datapath={}", if mode == Mode::Ebpf { "ebpf" } else { "nftables" });
    let command = || command(&sandbox, data.path(), port, "+all", &[&setting]);
    let started = command();
    let mut items = catalog();
    items["items"].as_array_mut().unwrap().push(neighbour());
    std::fs::write(data.path().join("catalog.json"), items.to_string()).unwrap();
    let (before, resolvers) = (kernel_state(&sandbox), host_resolvers());
    let agent = start(started, port);
    let has = |text: &str| kernel_state(&sandbox).iter().any(|line| line.contains(text));
    for ours in ["10.244.2.0/24 via 192.168.1.12", "local 169.254.64.0/18", "local fd", "local 10.244.7.0/24", TABLE] {
        until(ours, || has(ours));
    }
    assert_eq!(host_resolvers(), resolvers);
    agent.kill();
    uninstall(command());
    assert_eq!(kernel_state(&sandbox), before);
    assert_eq!(host_resolvers(), resolvers);
}

#[test]
fn rules_that_can_not_be_written_are_tried_again_ever_more_rarely() {
    let sandbox = node();
    let (data, port) = (tempfile::tempdir().unwrap(), free_port());
    let _agent = start(command(&sandbox, data.path(), port, "+all", &["datapath=nftables"]), port);
    nft(&format!("delete table inet {TABLE}"));
    let held = held_table();
    // From now on each attempt fails. The host gets an external address of a Service.
    ip("address add 203.0.113.9/32 dev lo");
    let address = SocketAddr::from(([127, 0, 0, 1], port));
    let failures = || -> u32 {
        let name = "edgemesh_agent_datapath_rules_failures_total ";
        try_admin(address, "/metrics")
            .unwrap_or_default()
            .lines()
            .find_map(|line| line.strip_prefix(name)?.parse().ok())
            .unwrap_or(0)
    };
    until("a failure", || failures() >= 1);
    let first = Instant::now();
    until("further attempts", || failures() >= 5);
    assert!(first.elapsed() > Duration::from_secs(10), "{:?}", first.elapsed());
    held.kill();
}

fn what_others_remove_with_all_tables_is_there_again_without_a_change(mode: Mode) {
    let sandbox = node();
    let (pod5, client, data, port) = (pod(5), client(), tempfile::tempdir().unwrap(), free_port());
    pod5.run(|| who_calls("10.244.1.5:8080"));
    let setting = format!("datapath={}", if mode == Mode::Ebpf { "ebpf" } else { "nftables" });
    let elsewhere = format!("cgroup={}", sandbox.child_cgroup().display());
    let command = command(&sandbox, data.path(), port, "+all", &[&setting, &elsewhere]);
    // Nothing has the agent look again but that it is time to.
    let mut items = catalog();
    items["items"][0]["spec"].as_object_mut().unwrap().remove("externalIPs");
    std::fs::write(data.path().join("catalog.json"), items.to_string()).unwrap();
    let _agent = start(command, port);
    let serves = || {
        client.run(|| call("192.168.1.11:30080")).is_ok()
            && (mode == Mode::Ebpf || client.run(|| call("203.0.113.7:80")).is_ok() && call("10.96.0.20:80").is_ok())
    };
    assert!(serves());
    // The agent may look just between the two.
    until("nothing is served", || {
        nft("flush ruleset");
        for rule in ["32800", "30176"] {
            // As networkd does with those that it doesn't know.
            let _ = Command::new("ip").args(["rule", "del", "pref", rule]).output().unwrap();
        }
        !serves()
    });
    until("all is served again", serves);
}

#[test]
fn what_rules_served_is_served_at_every_moment_while_programs_take_over() {
    let sandbox = node();
    let (pod5, data, port) = (pod(5), tempfile::tempdir().unwrap(), free_port());
    pod5.run(|| who_calls("10.244.1.5:8080"));
    let command = |mode: &str| {
        let command = command(&sandbox, data.path(), port, "+all", &[&format!("datapath={mode}")]);
        // So many that a moment in which they are not there is seen.
        let mut items = catalog();
        let all = items["items"].as_array_mut().unwrap();
        let (service, slice) = (all[0].clone(), all[1].clone());
        for number in 0..3000 {
            let (mut service, mut slice) = (service.clone(), slice.clone());
            let (name, ip) = (format!("many-{number}"), format!("10.97.{}.{}", number / 200, number % 200 + 1));
            service["metadata"]["name"] = name.clone().into();
            service["spec"] = serde_json::json!({"clusterIP": ip, "clusterIPs": [ip], "ports": [{"port": 80}]});
            service.as_object_mut().unwrap().remove("status");
            slice["metadata"]["name"] = format!("{name}-1").into();
            slice["metadata"]["labels"]["kubernetes.io/service-name"] = name.into();
            all.extend([service, slice]);
        }
        std::fs::write(data.path().join("catalog.json"), items.to_string()).unwrap();
        command
    };
    start(command("nftables"), port).kill();
    // The host calls, from where the programs are attached.
    let done = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let stop = std::sync::Arc::clone(&done);
    let calls = std::thread::spawn(move || {
        let mut calls = 0;
        while !stop.load(std::sync::atomic::Ordering::Relaxed) {
            for number in [0, 1500, 2999] {
                call(&format!("10.97.{}.{}:80", number / 200, number % 200 + 1)).unwrap();
                calls += 1;
            }
        }
        calls
    });
    let agent = start(command("ebpf"), port);
    until("the rules are gone", || !shown("ip", &["rule"]).contains("32800"));
    done.store(true, std::sync::atomic::Ordering::Relaxed);
    assert!(calls.join().unwrap() > 0);
    agent.kill();
}

#[test]
fn routes_that_shall_not_be_kept_go_with_the_next_start() {
    let sandbox = node();
    let (data, port) = (tempfile::tempdir().unwrap(), free_port());
    let command = |routes: &str| {
        let command = command(&sandbox, data.path(), port, "+all", &["datapath=ebpf", routes]);
        let mut items = catalog();
        items["items"].as_array_mut().unwrap().push(neighbour());
        std::fs::write(data.path().join("catalog.json"), items.to_string()).unwrap();
        command
    };
    let has_route = || shown("ip", &["route"]).contains("10.244.2.0/24 via 192.168.1.12");
    let agent = start(command("routes=true"), port);
    until("the route", has_route);
    agent.kill();
    assert!(has_route());
    let agent = start(command("routes=false"), port);
    until("no route", || !has_route());
    agent.kill();
}

#[test]
fn ebpf_that_is_asked_for_and_not_to_be_had_is_an_error_that_says_so() {
    let sandbox = node();
    let data = tempfile::tempdir().unwrap();
    let output = output(command(&sandbox, data.path(), free_port(), WITHOUT_BPF, &["datapath=ebpf"]));
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text);
    assert!(!output.status.success());
    assert!(text.contains("datapath: ebpf: ") && !Rules::is_present(), "{text}");
}

#[test]
fn with_ebpf_callers_from_outside_are_served_by_rules_that_go_when_nothing_is_to_be_served() {
    let sandbox = node();
    let (pod5, client, data, port) = (pod(5), client(), tempfile::tempdir().unwrap(), free_port());
    pod5.run(|| who_calls("10.244.1.5:8080"));
    // The client is a thread of this process: its sockets must not be those of the node.
    let elsewhere = format!("cgroup={}", sandbox.child_cgroup().display());
    let command = || command(&sandbox, data.path(), port, "+all", &["datapath=ebpf", &elsewhere]);
    let agent = start(command(), port);
    for address in ["192.168.1.11:30080", "203.0.113.7:80", "192.168.1.11:80"] {
        assert_eq!(client.run(move || call(address)).unwrap(), "10.244.1.5:8080 192.168.1.50", "{address}");
    }
    assert!(Rules::is_present());
    agent.kill();
    // Another catalog: without the Service that outside callers reach, there is nothing to track packets for.
    let command = command();
    let mut items = catalog();
    items["items"].as_array_mut().unwrap().retain(|item| item["metadata"]["name"] != "here");
    std::fs::write(data.path().join("catalog.json"), items.to_string()).unwrap();
    let agent = start(command, port);
    assert!(!Rules::is_present());
    agent.kill();
}

/// The agent's table, owned by a process that ends with this: nobody else may write it, and it goes with its owner.
fn held_table() -> Agent {
    let mut nft = Command::new("nft").arg("-i").stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
    let script = format!("add table inet {TABLE} {{ flags owner; }}\n");
    nft.stdin.as_mut().unwrap().write_all(script.as_bytes()).unwrap();
    let is_there = || Command::new("nft").args(["list", "table", "inet", TABLE]).output().unwrap().status.success();
    until("the table", is_there);
    Agent(nft)
}

#[test]
fn rules_for_callers_from_outside_that_could_not_be_written_are_tried_again_and_nothing_else_waits_for_them() {
    let sandbox = node();
    let (pod5, client, data, port) = (pod(5), client(), tempfile::tempdir().unwrap(), free_port());
    pod5.run(|| who_calls("10.244.1.5:8080"));
    let elsewhere = format!("cgroup={}", sandbox.child_cgroup().display());
    let command = command(&sandbox, data.path(), port, "+all", &["datapath=ebpf", &elsewhere]);
    // Nothing but the failure itself has the agent look again: the host's addresses don't matter.
    let mut items = catalog();
    items["items"][0]["spec"].as_object_mut().unwrap().remove("externalIPs");
    std::fs::write(data.path().join("catalog.json"), items.to_string()).unwrap();
    let held = held_table();
    let _agent = start(command, port);
    let refused = client.run(|| call("192.168.1.11:30080")).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
    let metrics = || admin(SocketAddr::from(([127, 0, 0, 1], port)), "/metrics");
    let failures = || -> u32 {
        let name = "edgemesh_agent_datapath_rules_failures_total ";
        metrics().lines().find_map(|line| line.strip_prefix(name)?.parse().ok()).unwrap()
    };
    until("another attempt", || failures() > 1);
    held.kill();
    until("the rules", || client.run(|| call("192.168.1.11:30080")).is_ok());
    assert_eq!(client.run(|| call("192.168.1.11:30080")).unwrap(), "10.244.1.5:8080 192.168.1.50");
}
