//! Keeps a daemon's resident memory at what it uses: a start runs through much code that is never needed again, and its pages
//! would be mapped for as long as the process lives.

use std::{fs, io, ops::Range, ptr, time::Duration};

/// When the start is over.
const FIRST: Duration = Duration::from_secs(10);
/// Code that ran once is looked for that often. What is needed is mapped again from the page cache, within a microsecond for
/// sixteen pages.
const EVERY: Duration = Duration::from_secs(600);
/// The largest `/proc/self/maps` that is read, in bytes.
const MAX_MAPS: usize = 4 << 20;

/// Gives mappings of unused code back from time to time; never ends.
pub(crate) async fn keep_small() {
    let mut pause = FIRST;
    loop {
        tokio::time::sleep(pause).await;
        pause = EVERY;
        match give_back() {
            Ok(bytes) => tracing::debug!(bytes, "mappings of the program's file given back"),
            Err(error) => {
                tracing::debug!(%error, "mappings of the program's file can't be given back");
                return;
            }
        }
    }
}

/// Gives the mappings of the program's file back that can't differ from it. Returns how many bytes they span.
fn give_back() -> io::Result<usize> {
    let program = fs::read_link("/proc/self/exe")?;
    let maps = fs::read_to_string("/proc/self/maps")?;
    let (Some(program), true) = (program.to_str(), maps.len() <= MAX_MAPS) else { return Ok(0) };
    let mut bytes = 0;
    for range in as_in_the_file(&maps, program) {
        // SAFETY: the range is mapped from the program's file, privately, and was never writable: each page that is dropped
        // comes back from the file as it was.
        let result =
            unsafe { libc::madvise(ptr::with_exposed_provenance_mut(range.start), range.len(), libc::MADV_DONTNEED) };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
        bytes += range.len();
    }
    Ok(bytes)
}

/// Address ranges of a program's file that nobody writes: its code, and the constants before it. Constants behind it hold
/// addresses, which were written when the program was loaded, and are then protected.
fn as_in_the_file(maps: &str, program: &str) -> Vec<Range<usize>> {
    let mut found = Vec::new();
    for line in maps.lines() {
        let mut fields = line.split_ascii_whitespace();
        let (Some(range), Some(access), Some(path)) = (fields.next(), fields.next(), fields.nth(3)) else { continue };
        if path != program {
            continue;
        }
        let address = |text: &str| usize::from_str_radix(text, 16).ok();
        let Some((start, end)) = range.split_once('-').and_then(|(start, end)| Some((address(start)?, address(end)?)))
        else {
            continue;
        };
        match access {
            "r--p" => found.push(start..end),
            "r-xp" => {
                found.push(start..end);
                return found;
            }
            // A file of another shape: nothing is known of what follows.
            _ => return Vec::new(),
        }
    }
    Vec::new()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_stands_before_the_first_writable_part_is_given_back() {
        let maps = "\
55d0c0000000-55d0c0001000 r--p 00000000 fe:00 1 /bin/daemon
55d0c0001000-55d0c0003000 r-xp 00001000 fe:00 1 /bin/daemon
55d0c0003000-55d0c0004000 r--p 00002000 fe:00 1 /bin/daemon
55d0c0004000-55d0c0005000 rw-p 00003000 fe:00 1 /bin/daemon
7f0000000000-7f0000001000 r-xp 00000000 fe:00 2 /lib/libc.so
7ffd00000000-7ffd00001000 rw-p 00000000 00:00 0 [stack]
";
        let (start, code) = (0x55d0_c000_0000, 0x55d0_c000_1000);
        assert_eq!(as_in_the_file(maps, "/bin/daemon"), [start..code, code..code + 0x2000]);
        assert!(as_in_the_file(&maps.replace("r--p 00000000", "rw-p 00000000"), "/bin/daemon").is_empty());
        assert!(
            as_in_the_file(maps, "/bin/other").is_empty() && as_in_the_file("nonsense\n\n", "/bin/daemon").is_empty()
        );
    }

    #[test]
    fn a_process_goes_on_without_its_mappings_and_is_smaller() {
        let resident = || -> u64 {
            let status = fs::read_to_string("/proc/self/status").unwrap();
            let line = status.lines().find_map(|line| line.strip_prefix("RssFile:")).unwrap();
            line.trim().trim_end_matches(" kB").parse().unwrap()
        };
        // Reads every page of the code, as a start would.
        let read_all = || {
            let program = fs::read_link("/proc/self/exe").unwrap();
            let maps = fs::read_to_string("/proc/self/maps").unwrap();
            let ranges = as_in_the_file(&maps, program.to_str().unwrap());
            assert!(!ranges.is_empty(), "{maps}");
            let mut sum = 0_u64;
            for address in ranges.into_iter().flat_map(|range| range.step_by(4096)) {
                // SAFETY: the address is in a readable mapping of the program's file.
                sum += u64::from(unsafe { ptr::with_exposed_provenance::<u8>(address).read_volatile() });
            }
            sum
        };
        let sum = read_all();
        let before = resident();
        assert!(give_back().unwrap() > 0);
        let after = resident();
        assert!(after < before, "{after} kB of {before} kB");
        assert_eq!(read_all(), sum);
    }
}
