//! Asks the agent's admin endpoint: plain HTTP to this node, one request a run.

use std::{
    io::{Read, Write},
    net::{TcpStream, ToSocketAddrs},
    time::Duration,
};

use serde_json::Value;

const DEADLINE: Duration = Duration::from_secs(15);
const CONNECT_DEADLINE: Duration = Duration::from_secs(3);
/// The largest page that is read.
const MAX_ANSWER: u64 = 64 << 20;

/// Why there is no page.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AgentError {
    /// The command can't be used as it is.
    #[error("{0}")]
    Usage(String),
    /// What it names doesn't exist, or can't be told now.
    #[error("{0}")]
    Agent(String),
    /// The agent can't be asked.
    #[error(
        "no agent answers at {url}: {reason}; --agent URL (or EDGEMESH_AGENT) says where it is, admin.listen of its settings is that address"
    )]
    Unreachable {
        /// Where.
        url: String,
        /// What happened.
        reason: String,
    },
}

/// An agent's admin endpoint.
pub(crate) struct Agent {
    url: String,
    authority: String,
}

impl Agent {
    /// By its URL.
    pub(crate) fn at(url: &str) -> Result<Self, AgentError> {
        let authority = url.strip_prefix("http://").map(|rest| rest.trim_end_matches('/'));
        let valid = authority.filter(|authority| !authority.is_empty() && !authority.contains('/'));
        let Some(authority) = valid else {
            return Err(AgentError::Usage(format!(
                "--agent {url:?}: must be http://HOST:PORT, as http://127.0.0.1:9442"
            )));
        };
        let port =
            if authority.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok()) { "" } else { ":80" };
        Ok(Self { url: url.to_owned(), authority: format!("{authority}{port}") })
    }

    /// A page with parameters; empty ones are left out.
    pub(crate) fn get(&self, path: &str, parameters: &[(&str, &str)]) -> Result<Value, AgentError> {
        for (name, value) in parameters {
            // As the agent takes them; here the message can name the argument.
            if let Some(odd) = value.chars().find(|c| !(c.is_ascii_alphanumeric() || "-_./:".contains(*c))) {
                return Err(AgentError::Usage(format!("{name} {value:?}: {odd:?} is in no name of Kubernetes or DNS")));
            }
        }
        let given = parameters.iter().filter(|(_, value)| !value.is_empty());
        let query: Vec<_> = given.map(|(name, value)| format!("{name}={value}")).collect();
        let request = format!("GET {path}?{} HTTP/1.1\r\nHost: agent\r\nConnection: close\r\n\r\n", query.join("&"));
        let answer = self.exchange(&request).map_err(|error| self.unreachable(error.to_string()))?;
        let (status, body) = read(&answer).ok_or_else(|| self.unreachable("that is no HTTP".to_owned()))?;
        match status {
            200 => serde_json::from_slice(body)
                .map_err(|error| self.unreachable(format!("a page that is no JSON: {error}"))),
            400 => Err(AgentError::Usage(String::from_utf8_lossy(body).into_owned())),
            // An agent without this page answers with the list of those that it has.
            404 if body.starts_with(b"try /") => Err(AgentError::Agent(format!(
                "the agent at {} has no page {path}: it is of another version",
                self.url
            ))),
            404 | 503 => Err(AgentError::Agent(String::from_utf8_lossy(body).into_owned())),
            status => Err(self.unreachable(format!("status {status}"))),
        }
    }

    fn unreachable(&self, reason: String) -> AgentError {
        AgentError::Unreachable { url: self.url.clone(), reason }
    }

    fn exchange(&self, request: &str) -> std::io::Result<Vec<u8>> {
        let address = self.authority.to_socket_addrs()?.next().ok_or_else(|| std::io::Error::other("no address"))?;
        let mut stream = TcpStream::connect_timeout(&address, CONNECT_DEADLINE)?;
        stream.set_read_timeout(Some(DEADLINE))?;
        stream.write_all(request.as_bytes())?;
        let mut answer = Vec::new();
        stream.take(MAX_ANSWER).read_to_end(&mut answer)?;
        Ok(answer)
    }
}

/// Status and body of an answer that ends with the connection.
fn read(answer: &[u8]) -> Option<(u16, &[u8])> {
    let end = answer.windows(4).position(|four| four == b"\r\n\r\n")?;
    let head = std::str::from_utf8(&answer[..end]).ok()?;
    let status = head.strip_prefix("HTTP/1.1 ")?.get(..3)?.parse().ok()?;
    Some((status, &answer[end + 4..]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_agent_is_named_by_a_plain_http_url() {
        assert_eq!(Agent::at("http://127.0.0.1:9442/").unwrap().authority, "127.0.0.1:9442");
        assert_eq!(Agent::at("http://node").unwrap().authority, "node:80");
        for url in ["127.0.0.1:9442", "https://127.0.0.1:9442", "http://", "http://a/b"] {
            assert!(matches!(Agent::at(url), Err(AgentError::Usage(text)) if text.contains("--agent")), "{url}");
        }
    }

    #[test]
    fn a_parameter_that_needs_escapes_is_refused_by_its_name() {
        let agent = Agent::at("http://127.0.0.1:1").unwrap();
        let error = agent.get("/debug/trace", &[("pod", "a b")]).unwrap_err();
        assert!(matches!(&error, AgentError::Usage(text) if text.contains("pod \"a b\"")), "{error}");
        let error = agent.get("/debug/trace", &[("pod", "a")]).unwrap_err().to_string();
        assert!(error.contains("http://127.0.0.1:1") && error.contains("--agent"), "{error}");
    }

    #[test]
    fn an_answer_is_its_status_and_body() {
        assert_eq!(read(b"HTTP/1.1 404 Not Found\r\nA: b\r\n\r\nno pod\n"), Some((404, &b"no pod\n"[..])));
        assert_eq!(read(b"SSH-2.0\r\n\r\n"), None);
    }
}
