//! How long DNS answers take at a steady rate.

use std::{
    fs,
    net::{SocketAddr, UdpSocket},
    path::Path,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use hickory_proto::{
    op::{Message, Query, ResponseCode},
    rr::RecordType,
};

const ANSWER_DEADLINE: Duration = Duration::from_secs(5);

/// Asks for the A records of the names of a file (`NAME A` a line) one after the other, and gives the 99th percentile in microseconds.
///
/// # Errors
/// When an answer is lost, or none.
pub(crate) fn p99_microseconds(server: SocketAddr, names: &Path, per_second: u32, time: Duration) -> Result<f64> {
    let text = fs::read_to_string(names).with_context(|| names.display().to_string())?;
    let mut queries = text.lines().filter_map(|line| line.split(' ').next()).map(query).collect::<Result<Vec<_>>>()?;
    ensure!(!queries.is_empty(), "{}: no names", names.display());
    let socket = UdpSocket::bind(("0.0.0.0", 0))?;
    socket.connect(server)?;
    socket.set_read_timeout(Some(ANSWER_DEADLINE))?;
    let (mut took, begin) = (Vec::new(), Instant::now());
    let between = Duration::from_secs(1) / per_second.max(1);
    let many = queries.len();
    for number in 0..u16::MAX {
        let due = begin + between * u32::from(number);
        if due - begin > time {
            break;
        }
        let query = &mut queries[usize::from(number) % many];
        query.metadata.id = number;
        let query = query.to_vec()?;
        thread::sleep(due.saturating_duration_since(Instant::now()));
        let asked = Instant::now();
        socket.send(&query)?;
        let mut answer = [0; 512];
        let length = socket.recv(&mut answer).context("no answer")?;
        took.push(asked.elapsed());
        let answer = Message::from_vec(&answer[..length])?;
        let is_good = answer.metadata.id == number && answer.metadata.response_code == ResponseCode::NoError;
        ensure!(is_good && !answer.answers.is_empty(), "a bad answer: {answer}");
    }
    took.sort_unstable();
    let p99 = took.get(took.len() * 99 / 100).context("nothing was asked")?;
    Ok(p99.as_secs_f64() * 1e6)
}

fn query(name: &str) -> Result<Message> {
    let mut message = Message::query();
    message.add_query(Query::query(name.parse()?, RecordType::A));
    Ok(message)
}
