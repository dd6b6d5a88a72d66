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
            Ok(bytes) => tracing::debug!(bytes, "mappings of the program's files given back"),
            Err(error) => {
                tracing::debug!(%error, "mappings of the program's files can't be given back");
                return;
            }
        }
    }
}

/// Gives the mappings of the program's files back that can't differ from them, and memory that was allocated for the start.
/// Returns how many bytes the mappings span.
fn give_back() -> io::Result<usize> {
    let maps = fs::read_to_string("/proc/self/maps")?;
    if maps.len() > MAX_MAPS {
        return Ok(0);
    }
    let mut bytes = 0;
    for range in as_in_their_files(&maps) {
        // SAFETY: the range is mapped from a file, privately, and was never writable: each page that is dropped comes back
        // from the file as it was.
        let result =
            unsafe { libc::madvise(ptr::with_exposed_provenance_mut(range.start), range.len(), libc::MADV_DONTNEED) };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
        bytes += range.len();
    }
    #[cfg(target_env = "gnu")]
    // SAFETY: the function has no conditions.
    unsafe {
        libc::malloc_trim(0);
    }
    Ok(bytes)
}

/// Address ranges of the program's file, and of those of its libraries, that nobody writes: code, and the constants before it.
/// Constants behind it can hold addresses, which were written when the file was loaded, and are then protected.
fn as_in_their_files(maps: &str) -> Vec<Range<usize>> {
    let mut found = Vec::new();
    let mut file = "";
    let mut before_code = Some(Vec::new());
    for line in maps.lines() {
        let mut fields = line.split_ascii_whitespace();
        let (Some(range), Some(access), Some(path)) = (fields.next(), fields.next(), fields.nth(3)) else { continue };
        if path != file {
            (file, before_code) = (path, path.starts_with('/').then(Vec::new));
        }
        let address = |text: &str| usize::from_str_radix(text, 16).ok();
        let range = range.split_once('-').and_then(|(start, end)| Some(address(start)?..address(end)?));
        match (access, range, &mut before_code) {
            ("r--p", Some(range), Some(before)) => before.push(range),
            ("r-xp", Some(range), Some(before)) => {
                found.append(before);
                found.push(range);
                before_code = None;
            }
            // A file of another shape: nothing is known of what follows.
            _ => before_code = None,
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_code_and_what_stands_before_it_is_given_back() {
        let maps = "\
55d0c0000000-55d0c0001000 r--p 00000000 fe:00 1 /bin/daemon
55d0c0001000-55d0c0003000 r-xp 00001000 fe:00 1 /bin/daemon
55d0c0003000-55d0c0004000 r--p 00002000 fe:00 1 /bin/daemon
55d0c0004000-55d0c0005000 rw-p 00003000 fe:00 1 /bin/daemon
7e0000000000-7e0000001000 r--p 00000000 fe:00 3 /usr/lib/locale/C.utf8/LC_CTYPE
7f0000000000-7f0000001000 r-xp 00000000 fe:00 2 /lib/libc.so
7f0000001000-7f0000002000 r-xp 00001000 fe:00 2 /lib/libc.so
7ffd00000000-7ffd00001000 rw-p 00000000 00:00 0 [stack]
";
        let (start, code, library) = (0x55d0_c000_0000, 0x55d0_c000_1000, 0x7f00_0000_0000);
        let expected = [start..code, code..code + 0x2000, library..library + 0x1000];
        assert_eq!(as_in_their_files(maps), expected);
        let writable = maps.replace("r--p 00000000 fe:00 1", "rw-p 00000000 fe:00 1");
        assert_eq!(as_in_their_files(&writable), expected[2..]);
        assert!(as_in_their_files("nonsense\n\n1-2 r-xp\nx-y r-xp 0 0:0 1 /bin/daemon").is_empty());
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
            let maps = fs::read_to_string("/proc/self/maps").unwrap();
            let ranges = as_in_their_files(&maps);
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
