//! The `edgemesh-agent` command.

fn main() {}
