//! The rows, by what they are about.

mod affinity;
mod conntrack;
mod dns;
mod dual_stack;
mod explained;
mod granular;
mod latency;
mod node_ports;
mod pods;
mod services;
mod slices;
mod topology;
mod traffic_policy;
mod types;

use crate::case::Row;

/// All rows.
pub fn all() -> Vec<Row> {
    [
        services::ROWS,
        node_ports::ROWS,
        types::ROWS,
        affinity::ROWS,
        traffic_policy::ROWS,
        topology::ROWS,
        conntrack::ROWS,
        granular::ROWS,
        dual_stack::ROWS,
        slices::ROWS,
        pods::ROWS,
        latency::ROWS,
        dns::ROWS,
        explained::ROWS,
    ]
    .concat()
}

#[cfg(test)]
mod tests {
    use crate::field::MODES;

    #[test]
    fn the_documented_table_has_every_row_and_no_other() {
        let page = include_str!("../../../../docs/conformance.md");
        let modes: Vec<_> = MODES.iter().map(|mode| mode.name).collect();
        let head = format!("| row | {} |\n", modes.join(" | "));
        let (_, table) = page.split_once(&head).expect("the table begins with the modes");
        let lines = table.lines().skip(1).take_while(|line| line.starts_with('|'));
        let documented: Vec<_> = lines.filter_map(|line| line.trim_matches(['|', ' ']).split(" | ").next()).collect();
        let rows: Vec<_> = super::all().iter().map(|row| row.name).collect();
        assert_eq!(documented, rows);
    }
}
