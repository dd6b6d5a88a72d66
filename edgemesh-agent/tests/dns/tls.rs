//! Upstreams over TLS: one connection for many questions, only with the right certificate, closed when idle.

use std::{
    net::SocketAddr,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use edgemesh_agent::config::DnsConfig;
use hickory_proto::{
    op::{Message, ResponseCode},
    rr::RecordType,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{self, pki_types::PrivateKeyDer},
};

use crate::harness::{Dns, Upstream, addresses, eventually, sorted};

/// A server over TLS with a certificate for `dns.test`, and the file in which that is trusted.
struct TlsUpstream {
    address: SocketAddr,
    state: Arc<State>,
    dir: tempfile::TempDir,
    task: tokio::task::JoinHandle<()>,
}

#[derive(Default)]
struct State {
    opened: AtomicUsize,
    closed: AtomicUsize,
    asked: AtomicUsize,
    /// Questions whose length tells something about the name.
    unpadded: AtomicUsize,
    /// Closes each connection after its first answer.
    hasty: AtomicBool,
}

impl Drop for TlsUpstream {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl TlsUpstream {
    async fn start() -> Self {
        let own = rcgen::generate_simple_self_signed(["dns.test".to_owned()]).unwrap();
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("ca.crt"), own.cert.pem()).unwrap();
        let key = PrivateKeyDer::try_from(own.signing_key.serialize_der()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![own.cert.der().clone()], key)
            .unwrap();
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let state: Arc<State> = Arc::default();
        let serving = Arc::clone(&state);
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serve(acceptor.clone(), stream, Arc::clone(&serving)));
            }
        });
        Self { address, state, dir, task }
    }

    fn ca(&self) -> PathBuf {
        self.dir.path().join("ca.crt")
    }

    fn dns(&self, name: &str, adjust: impl FnOnce(&mut DnsConfig)) -> Dns {
        let upstream = format!("tls://{}#{name}", self.address);
        Dns::start_with(&[], &[], |config| {
            config.upstreams = vec![upstream];
            config.tls_ca = self.ca();
            adjust(config);
        })
    }
}

/// Answers every question of a connection; those for `held…` only behind the next one's answer.
async fn serve(acceptor: TlsAcceptor, stream: TcpStream, state: Arc<State>) {
    let Ok(mut stream) = acceptor.accept(stream).await else { return };
    state.opened.fetch_add(1, Ordering::SeqCst);
    let mut held: Option<Vec<u8>> = None;
    while let Ok(length) = stream.read_u16().await {
        let mut bytes = vec![0; usize::from(length)];
        if stream.read_exact(&mut bytes).await.is_err() {
            break;
        }
        let answer = answer(&bytes, &state);
        let hold = Message::from_vec(&bytes).unwrap().queries[0].name.to_string().starts_with("held");
        let mut out = vec![answer];
        if hold {
            held = out.pop();
        } else {
            out.extend(held.take());
        }
        for answer in out {
            let framed = [&(answer.len() as u16).to_be_bytes(), &answer[..]].concat();
            if stream.write_all(&framed).await.is_err() {
                return;
            }
        }
        if state.hasty.load(Ordering::SeqCst) {
            drop(stream.shutdown().await);
            break;
        }
    }
    state.closed.fetch_add(1, Ordering::SeqCst);
}

fn answer(bytes: &[u8], state: &State) -> Vec<u8> {
    let query = Message::from_vec(bytes).unwrap();
    let question = query.queries[0].clone();
    let name = question.name.to_string();
    if name != "." && !name.ends_with("loop.edgemesh.invalid.") {
        state.asked.fetch_add(1, Ordering::SeqCst);
        state.unpadded.fetch_add(usize::from(!bytes.len().is_multiple_of(128)), Ordering::SeqCst);
    }
    let mut answer = addresses(&question, &["192.0.2.1"], 60);
    answer.metadata.id = query.metadata.id;
    answer.queries = query.queries;
    answer.to_vec().unwrap()
}

#[tokio::test]
async fn many_questions_share_one_connection_that_is_closed_when_idle() {
    let upstream = TlsUpstream::start().await;
    let dns = Arc::new(upstream.dns("dns.test", |_| {}));
    let crowd: Vec<_> = (0..50)
        .map(|i| {
            let dns = Arc::clone(&dns);
            let name = format!("n{i}.{}.example.", "x".repeat(i + 1));
            tokio::spawn(async move { dns.ask(&name, RecordType::A).await })
        })
        .collect();
    for answer in crowd {
        assert_eq!(answer.await.unwrap().answers.len(), 1);
    }
    assert_eq!((upstream.state.asked.load(Ordering::SeqCst), upstream.state.opened.load(Ordering::SeqCst)), (50, 1));
    assert_eq!(upstream.state.unpadded.load(Ordering::SeqCst), 0, "RFC 8467");
    let metrics = dns.metrics();
    assert!(metrics.contains("edgemesh_agent_dns_upstream_tls_connections_total 1"), "{metrics}");
    assert!(metrics.contains(r#"edgemesh_agent_dns_upstream_exchanges_total{transport="udp"} 0"#), "{metrics}");
    eventually("the idle connection is closed", || async { upstream.state.closed.load(Ordering::SeqCst) == 1 }).await;
    assert_eq!(dns.ask("again.example.", RecordType::A).await.answers.len(), 1);
    assert_eq!(upstream.state.opened.load(Ordering::SeqCst), 2);
}

#[tokio::test]
async fn answers_in_another_order_reach_those_who_asked() {
    let upstream = TlsUpstream::start().await;
    let dns = Arc::new(upstream.dns("dns.test", |_| {}));
    let first = {
        let dns = Arc::clone(&dns);
        tokio::spawn(async move { dns.ask("held.example.", RecordType::A).await })
    };
    eventually("the first question is there", || async { upstream.state.asked.load(Ordering::SeqCst) == 1 }).await;
    let second = dns.ask("second.example.", RecordType::A).await;
    assert_eq!(second.answers[0].name.to_string(), "second.example.");
    assert_eq!(first.await.unwrap().answers[0].name.to_string(), "held.example.");
}

#[tokio::test]
async fn a_server_that_closes_after_each_answer_is_asked_on_new_connections() {
    let upstream = TlsUpstream::start().await;
    upstream.state.hasty.store(true, Ordering::SeqCst);
    let dns = upstream.dns("dns.test", |_| {});
    for i in 0..5 {
        let answer = dns.ask(&format!("n{i}.example."), RecordType::A).await;
        assert_eq!(answer.metadata.response_code, ResponseCode::NoError, "{i}");
    }
    assert!(dns.metrics().contains("edgemesh_agent_dns_upstreams_alive 1"));
}

#[tokio::test]
async fn a_certificate_for_another_name_or_of_an_unknown_authority_is_not_accepted() {
    let (upstream, other) = (TlsUpstream::start().await, TlsUpstream::start().await);
    let wrong_name = upstream.dns("dns.example", |_| {});
    let wrong_authority = upstream.dns("dns.test", |config| config.tls_ca = other.ca());
    for dns in [wrong_name, wrong_authority] {
        assert_eq!(dns.ask("a.example.", RecordType::A).await.metadata.response_code, ResponseCode::ServFail);
        assert!(dns.metrics().contains("edgemesh_agent_dns_upstreams_alive 0"), "{}", dns.metrics());
    }
    assert_eq!(upstream.state.asked.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn plain_servers_of_a_mixed_list_are_asked_only_when_those_over_tls_fail() {
    let server = TlsUpstream::start().await;
    server.state.hasty.store(true, Ordering::SeqCst);
    let plain = Upstream::fixed("192.0.2.2", 60).await;
    let dns = server.dns("dns.test", |config| config.upstreams.push(plain.address.to_string()));
    let first = async |name: &str| sorted(&dns.ask(name, RecordType::A).await.answers);
    for name in ["one.example.", "two.example."] {
        assert_eq!(first(name).await, [format!("{name} 60 IN A 192.0.2.1")]);
    }
    assert_eq!(plain.asked(), 0, "in plain text");
    drop(server);
    assert_eq!(first("three.example.").await, ["three.example. 60 IN A 192.0.2.2"]);
}

#[tokio::test]
async fn a_file_without_certificates_is_a_clear_error() {
    let config = DnsConfig {
        upstreams: vec!["tls://127.0.0.1".to_owned()],
        tls_ca: "/nonexistent/ca.crt".into(),
        ..DnsConfig::default()
    };
    let catalog = edgemesh_mesh::CatalogStore::new();
    let bound = edgemesh_agent::dns::Server::bind(&["127.0.0.1:0".parse().unwrap()], catalog, &config, &Arc::default());
    let error = bound.err().unwrap().to_string();
    assert!(error.starts_with("tlsCa /nonexistent/ca.crt: "), "{error}");
}
