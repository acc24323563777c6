//! The figures for people.

use std::fmt::Write;

use crate::analysis::Spread;
use crate::record::Record;

/// A column: its title, the figure, and how many digits it has after the point.
type Column = (&'static str, &'static str, usize);

const REDIS: [Column; 9] = [
    ("longest gap ms", "gap_ms", 0),
    ("downtime ms", "downtime_ms", 0),
    ("lost s", "lost_s", 2),
    ("of it since gap", "lost_since_gap_s", 2),
    ("95 % after s", "back_s", 1),
    ("command s", "command_s", 1),
    ("rounds %", "during_rounds_percent", 0),
    ("wire MiB", "wire_mib", 0),
    ("usual gap ms", "usual_gap_ms", 1),
];

/// All tables for which there are figures.
pub(crate) fn all(record: &Record) -> String {
    let mut text = String::new();
    table(&mut text, record, "redis", "One client that writes 1 KB values to Redis", &REDIS);
    text
}

fn table(text: &mut String, record: &Record, section: &str, title: &str, columns: &[Column]) {
    let cases = record.cases(section);
    if cases.is_empty() {
        return;
    }
    let mut rows = vec![Vec::new()];
    for (title, _, _) in columns {
        rows.iter_mut().for_each(|row| row.push((*title).to_owned()));
    }
    if let Some(head) = rows.first_mut() {
        head.insert(0, String::new());
    }
    for case in cases {
        let mut row = vec![case.split_once('/').map_or(case, |(_, rest)| rest).to_owned()];
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
