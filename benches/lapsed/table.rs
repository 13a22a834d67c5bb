//! What was measured, for people.

/// A row of the table.
pub struct Line {
    pub what: String,
    pub got: String,
    pub against: String,
    pub ratio: String,
    pub wanted: &'static str,
}

/// Prints the lines as a table in Markdown.
pub fn print(lines: &[Line]) {
    println!("\n| what | lapsed | against | ratio | must reach |\n| --- | --- | --- | --- | --- |");
    for Line { what, got, against, ratio, wanted } in lines {
        println!("| {what} | {got} | {against} | {ratio} | {wanted} |");
    }
}

/// The middle one; of an even number the lower of the two in the middle.
pub fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    values[(values.len() - 1) / 2]
}

/// Rows in so many seconds.
pub fn rate(rows: u64, seconds: f64) -> String {
    format!("{seconds:.1} s, {:.0} rows/s", rows as f64 / seconds)
}

/// A ratio, which has no unit.
pub fn ratio(value: f64) -> String {
    format!("{value:.2}")
}
