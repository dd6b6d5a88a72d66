//! How many files and sockets a daemon may have open.

use std::io;

/// With fewer than this, the connections that a node may carry at the same time are limited by it.
const ENOUGH: libc::rlim_t = 65_536;

/// Raises the limit of open descriptors to the highest that the process may give itself. What starts daemons leaves the
/// limit low, commonly at 1,024, for programs that use `select`, and the rest to them.
pub(crate) fn raise_limit() {
    match raise() {
        Ok(limit) if limit < ENOUGH => {
            tracing::warn!(limit, "few descriptors may be open: a connection that is carried takes two");
        }
        Ok(limit) => tracing::debug!(limit, "descriptors that may be open"),
        Err(error) => tracing::warn!(%error, "the limit of open descriptors can't be raised"),
    }
}

fn raise() -> io::Result<libc::rlim_t> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the kernel writes one such structure.
    if unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) } != 0 {
        return Err(io::Error::last_os_error());
    }
    if limit.rlim_cur < limit.rlim_max {
        limit.rlim_cur = limit.rlim_max;
        // SAFETY: the kernel reads one such structure.
        if unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) } != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(limit.rlim_cur)
}
