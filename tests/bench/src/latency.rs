//! How long DNS answers take at a steady rate.

use std::{
    fs,
    net::{SocketAddr, UdpSocket},
    path::Path,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};

const ANSWER_DEADLINE: Duration = Duration::from_secs(5);

/// Asks for the A records of the names of a file (`NAME A` a line) one after the other, and gives the 99th percentile in microseconds.
///
/// # Errors
/// When an answer is lost, or none.
pub(crate) fn p99_microseconds(server: SocketAddr, names: &Path, per_second: u32, time: Duration) -> Result<f64> {
    let text = fs::read_to_string(names).with_context(|| names.display().to_string())?;
    let queries: Vec<_> = text.lines().filter_map(|line| Some(query(line.split(' ').next()?))).collect();
    ensure!(!queries.is_empty(), "{}: no names", names.display());
    let socket = UdpSocket::bind(("0.0.0.0", 0))?;
    socket.connect(server)?;
    socket.set_read_timeout(Some(ANSWER_DEADLINE))?;
    let (mut took, begin) = (Vec::new(), Instant::now());
    let between = Duration::from_secs(1) / per_second.max(1);
    for (number, query) in (0_u16..=u16::MAX).zip(queries.iter().cycle()) {
        let due = begin + between * u32::from(number);
        if due - begin > time {
            break;
        }
        thread::sleep(due.saturating_duration_since(Instant::now()));
        let asked = Instant::now();
        socket.send(&[&number.to_be_bytes(), query.as_slice()].concat())?;
        let mut answer = [0; 512];
        let length = socket.recv(&mut answer).context("no answer")?;
        took.push(asked.elapsed());
        let is_good = length > 12 && answer[..2] == number.to_be_bytes() && answer[3] & 0x0f == 0 && answer[7] > 0;
        ensure!(is_good, "a bad answer: {:?}", &answer[..length.min(12)]);
    }
    took.sort_unstable();
    let p99 = took.get(took.len() * 99 / 100).context("nothing was asked")?;
    Ok(p99.as_secs_f64() * 1e6)
}

/// A query for A records, without its first two bytes, the id.
fn query(name: &str) -> Vec<u8> {
    let mut query = vec![1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.trim_end_matches('.').split('.') {
        query.push(label.len() as u8);
        query.extend_from_slice(label.as_bytes());
    }
    query.extend_from_slice(&[0, 0, 1, 0, 1]);
    query
}
