//! The figures for people.

use std::fmt::Write;

use crate::analysis::Spread;
use crate::record::Record;

/// A column: its title, the figure, and how many digits it has after the point.
type Column = (&'static str, &'static str, usize);

/// What a table is about, and its columns.
struct Table {
    section: &'static str,
    title: &'static str,
    columns: &'static [Column],
}

const TABLES: [Table; 7] = [
    Table {
        section: "redis/",
        title: "Redis, one client that writes 1 KB values without pause",
        columns: &[
            ("longest gap ms", "gap_ms", 0),
            ("lost s", "lost_s", 2),
            ("since the gap", "lost_since_gap_s", 2),
            ("95 % after s", "back_s", 1),
            ("command s", "command_s", 1),
            ("in rounds %", "during_rounds_percent", 0),
            ("answers/s", "normal_per_s", 0),
            ("usual gap ms", "usual_gap_ms", 1),
            ("usually lost ms/s", "usual_loss_ms", 0),
        ],
    },
    Table {
        section: "redis/",
        title: "The same: haulier's downtime, and its parts in ms",
        columns: &[
            ("downtime", "downtime_ms", 0),
            ("expected", "predicted_ms", 0),
            ("freeze", "freeze_ms", 1),
            ("dump", "dump_ms", 1),
            ("send", "send_ms", 1),
            ("restore", "restore_ms", 1),
            ("commit", "commit_ms", 1),
            ("rounds", "rounds", 0),
        ],
    },
    Table {
        section: "redis/",
        title: "The same: bytes on the wire, and faults that waited for the source",
        columns: &[
            ("memory MiB", "memory_mib", 0),
            ("rewritten", "rewritten_mib", 0),
            ("wire", "wire_mib", 0),
            ("ratio", "wire_ratio", 3),
            ("faults", "remote_faults", 0),
            ("median us", "remote_fault_median_us", 0),
            ("99 % us", "remote_fault_p99_us", 0),
            ("all median us", "fault_median_us", 0),
            ("99 % us", "fault_p99_us", 0),
        ],
    },
    Table {
        section: "clients/",
        title: "100 TCP clients and one over UDP, each sending every 5 ms",
        columns: &[
            ("longest wait ms", "tcp_longest_ms", 0),
            ("usual ms", "usual_longest_ms", 0),
            ("UDP lost", "udp_lost", 0),
            ("doubled", "udp_doubled", 0),
            ("TCP lost", "tcp_lost", 0),
            ("errors", "errors", 0),
            ("downtime ms", "downtime_ms", 0),
        ],
    },
    Table {
        section: "bulk/",
        title: "Bulk rate of memory, payload",
        columns: &[
            ("haulier Mbit/s", "haulier_mbit", 0),
            ("iperf3 Mbit/s", "iperf3_mbit", 0),
            ("of iperf3 %", "of_iperf3_percent", 0),
            ("of the line %", "of_line_percent", 1),
            ("iperf3 of it %", "iperf3_of_line_percent", 1),
        ],
    },
    Table {
        section: "growth/",
        title: "Downtime of memory that is mostly clean, and its parts in ms",
        columns: &[
            ("downtime", "downtime_ms", 1),
            ("freeze", "freeze_ms", 1),
            ("dump", "dump_ms", 1),
            ("send", "send_ms", 1),
            ("restore", "restore_ms", 1),
            ("commit", "commit_ms", 1),
            ("all", "total_ms", 0),
        ],
    },
    Table {
        section: "images/",
        title: "CRIU's images to another host, and what it costs",
        columns: &[
            ("dump to restored ms", "restored_ms", 0),
            ("frozen at the source ms", "frozen_ms", 0),
            ("CPU s per GiB", "cpu_s_per_gib", 2),
            ("wire MiB", "wire_mib", 0),
        ],
    },
];

/// All tables for which there are figures.
pub(crate) fn all(record: &Record) -> String {
    let mut text = String::new();
    for Table {
        section,
        title,
        columns,
    } in TABLES
    {
        table(&mut text, record, section, title, columns);
    }
    text
}

fn table(text: &mut String, record: &Record, section: &str, title: &str, columns: &[Column]) {
    let mut cases = record.cases(section);
    // A peer has nothing to say of haulier's downtime.
    cases.retain(|case| {
        let known = |(_, figure, _): &Column| record.spread(case, figure).is_some();
        columns.iter().any(known) || record.of(case).any(|run| run.failed.is_some())
    });
    if cases.is_empty() {
        return;
    }
    let mut rows = vec![Vec::new()];
    for (title, _, _) in columns {
        rows.iter_mut()
            .for_each(|row| row.push((*title).to_owned()));
    }
    if let Some(head) = rows.first_mut() {
        head.insert(0, String::new());
    }
    for case in cases {
        let mut row = vec![
            case.split_once('/')
                .map_or(case, |(_, rest)| rest)
                .to_owned(),
        ];
        for (_, figure, digits) in columns {
            let figure = record.spread(case, figure);
            row.push(figure.map_or_else(|| "-".to_owned(), |figure| words(figure, *digits)));
        }
        let failed = record.of(case).filter(|run| run.failed.is_some()).count();
        if failed > 0 {
            row.push(format!("({failed} failed)"));
        }
        rows.push(row);
    }
    let _ = writeln!(text, "\n{title}\n");
    align(text, &rows);
}

/// `median (min-max)`, or the one value there is.
fn words(figure: Spread, digits: usize) -> String {
    let Spread { min, median, max } = figure;
    if min.total_cmp(&max).is_eq() {
        return format!("{median:.digits$}");
    }
    format!("{median:.digits$} ({min:.digits$}-{max:.digits$})")
}

/// The first column to the left, the others to the right.
fn align(text: &mut String, rows: &[Vec<String>]) {
    let count = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..count).map(width).collect();
    for row in rows {
        let mut line = String::new();
        for (index, (cell, width)) in row.iter().zip(&widths).enumerate() {
            let _ = match index {
                0 => write!(line, "  {cell:<width$}"),
                _ => write!(line, "  {cell:>width$}"),
            };
        }
        let _ = writeln!(text, "{}", line.trim_end());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let mut text = String::new();
        let row = |a: &str, b: &str| vec![a.to_owned(), b.to_owned()];
        align(&mut text, &[row("", "ms"), row("pre-copy", "7")]);
        assert_eq!(text, "            ms\n  pre-copy   7\n");
    }

    #[test]
    fn one_value_has_no_range() {
        let figure = |min, median, max| Spread { min, median, max };
        assert_eq!(words(figure(2.0, 2.0, 2.0), 0), "2");
        assert_eq!(words(figure(1.0, 2.0, 3.25), 1), "2.0 (1.0-3.2)");
    }
}
