//! Measures lapsed against the bare databases, and prints a table of medians; `benches/run --help` says what.
//!
//! Relies on `benches/run`, which starts PostgreSQL. Reference and measurement alternate within a run, so that what else
//! the machine does weighs on both.

mod deliver;
mod fill;
mod idle;
mod place;
mod planning;
mod program;
mod relay;
mod render;
mod service;
#[path = "../../tests/support/mod.rs"]
mod support;
mod table;
mod verify;

use place::{OnFile, OnPg};
use table::Line;

/// How much is measured, and how often.
pub struct Sizes {
    quick: bool,
    runs: usize,
}

impl Sizes {
    /// The number of rows where the full measurement has so many.
    pub fn of(&self, full: u64) -> u64 {
        if self.quick { full / 10 } else { full }
    }
}

const ROWS: [&str; 15] = [
    "expire-postgres",
    "expire-sqlite",
    "remind",
    "idle",
    "import",
    "verify",
    "render",
    "deliver-postgres",
    "deliver-sqlite",
    "deliver-far",
    "deliver-one",
    "deliver-slow",
    "deliver-scaling",
    "service-postgres",
    "service-sqlite",
];

#[tokio::main]
async fn main() {
    let mut sizes = Sizes { quick: false, runs: 3 };
    let mut rows = Vec::new();
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--bench" => {} // cargo says so
            "--quick" => sizes.quick = true,
            "--runs" => sizes.runs = arguments.next().and_then(|n| n.parse().ok()).expect("--runs N"),
            row => rows.push(row.to_owned()),
        }
    }
    if rows.is_empty() {
        rows = ROWS.map(str::to_owned).to_vec();
    }
    let mut lines: Vec<Line> = Vec::new();
    for row in &rows {
        match row.as_str() {
            "expire-postgres" => lines.push(planning::expire::<OnPg>(&sizes).await),
            "expire-sqlite" => lines.push(planning::expire::<OnFile>(&sizes).await),
            "remind" => lines.push(planning::remind(&sizes).await),
            "idle" => lines.extend(idle::rows(&sizes).await),
            "import" => lines.push(program::import(&sizes).await),
            "verify" => lines.push(verify::row(&sizes).await),
            "render" => lines.extend(render::rows(&sizes)),
            "deliver-postgres" => lines.extend(deliver::near::<OnPg>(&sizes).await),
            "deliver-sqlite" => lines.extend(deliver::near::<OnFile>(&sizes).await),
            "deliver-far" => lines.push(deliver::far(&sizes).await),
            "deliver-one" => lines.push(deliver::one(&sizes).await),
            "deliver-slow" => lines.push(deliver::slow(&sizes).await),
            "deliver-scaling" => lines.push(deliver::scaling(&sizes).await),
            "service-postgres" => lines.extend(service::rows::<OnPg>(&sizes).await),
            "service-sqlite" => lines.extend(service::rows::<OnFile>(&sizes).await),
            "build" => lines.push(program::build()),
            other => panic!("no row {other:?}; there are {ROWS:?}"),
        }
    }
    table::print(&lines);
}
